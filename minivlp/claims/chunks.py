"""The sigmoid loss in pieces is the sigmoid loss: every score has its own term, and sums may be cut anywhere.

A softmax needs all scores of its row before any term is known; with the sigmoid a block of texts can come,
be scored and go. Compared in float64, values and all gradients: the whole loss, sums over blocks of texts,
and the tiled loss of sigmoid.py.

Source: Zhai et al. 2023 (SigLIP), section 3.3 and algorithm 1.
Left out: the exchange between processes; sigmoid_loss_ring has it, and its tests compare it with this.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from minivlp.claims.settings import ChunksSize
from minivlp.claims.verdict import Sample
from minivlp.sigmoid import sigmoid_loss, sigmoid_loss_fused

SMALLEST = -18.0  # the logarithm reported for two numbers that agree to the last bit


def chunked_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, block: int) -> Tensor:
    """The loss of x, y (B, D) with `block` texts, and so (B, block) scores, at a time."""
    total = x.new_zeros(())
    for start in range(0, len(y), block):
        texts = y[start : start + block]  # (b, D)
        S = scale * x @ texts.T + bias  # (B, b)
        own = S[start : start + len(texts)].diagonal()
        # Every pair a negative, then the b positives set right: softplus(−s) − softplus(s) = −s.
        total = total + softplus(S).sum() - own.sum()
    return total / len(x)


def chunks(size: ChunksSize, seed: int) -> dict[str, Sample]:
    """Samples "error block b" and "error tiled": log10 of the largest difference of value or gradients.

    One item a draw of x, y; "largest" is the worst of all kinds, draw by draw.
    """
    kinds = {f"block {b}": b for b in size.blocks} | {"tiled": None}
    errors: dict[str, list[float]] = {f"error {name}": [] for name in kinds}
    for draw in range(size.draws):
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        x, y = (normalize(torch.randn(size.batch, size.dim, generator=generator, dtype=torch.float64))
                for _ in range(2))  # fmt: skip
        inputs = (x, y, torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64))
        whole = _differentiated(sigmoid_loss, inputs)
        for name, block in kinds.items():
            loss = sigmoid_loss_fused if block is None else lambda *a, b=block: chunked_loss(*a, b)
            errors[f"error {name}"].append(_error(_differentiated(loss, inputs), whole))
    errors["largest"] = [max(row) for row in zip(*errors.values(), strict=True)]
    return {name: Sample(values, list(range(size.draws))) for name, values in errors.items()}


def _differentiated(loss, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


def _error(found: tuple[Tensor, ...], whole: tuple[Tensor, ...]) -> float:
    """log10 of the largest difference, each relative to the largest entry of its tensor."""
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, whole, strict=True))
    return max(SMALLEST, math.log10(worst)) if worst else SMALLEST
