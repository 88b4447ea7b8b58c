"""ViLT whole, on one page: multi-head attention, block, model, losses, optimisers and the loop, as functions.

For tokens Z (L, D), with one matrix W of 3 D rows for the maps of queries, keys and values, and H heads,

    Q, K, V = Z W_Qᵀ + b_Q, Z W_Kᵀ + b_K, Z W_Vᵀ + b_V,    MSA(Z) = [O_1 … O_H] W_Oᵀ + b_O,

where head h attends with its d = D / H columns of Q, K and V. Backwards Z collects by three paths,
dZ = dQ W_Q + dK W_K + dV W_V, and each map by one, dW_Q = dQᵀ Z. The rest adds up what other files have.

A model is a dictionary `w` from names to tensors, those of `models.vilt.Vilt.state_dict()`: weights are an
argument like any other, and trained weights can be exchanged. models/vilt.py is the same model in modules,
for pictures of any size and with more heads; training/loop.py is the same loop with checkpoints.

Rungs of `multi_head`:
    multi_head_np    S and P of every head in full; gradients by hand
    multi_head       the same in PyTorch

Sources: Vaswani et al. 2017, section 3.2.2, for heads; Kim, Son and Kim 2021 (ViLT), eq. 1 to 6 and sections
3.2 and 4.2; Loshchilov and Hutter 2019 for AdamW; Jordan et al. 2024 for Muon.
Left out: checks of arguments in all but `multi_head`, for a model looks at its inputs once; sizes of pictures
other than that of the stored positions.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from minivlp.attention import attention, attention_np
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working_np
from minivlp.ipot import alignment_masks, wpa_fused
from minivlp.itm import itm_loss
from minivlp.mlm import mlm_loss
from minivlp.patch import patch_embed
from minivlp.transformer import join_heads, layer_norm, split_heads


def _check(library, z, w_qkv, b_qkv, w_out, b_out, heads: int) -> None:
    sizes = require.shapes(library, z=(z, "B L D"), w_qkv=(w_qkv, "E D"), b_qkv=(b_qkv, "E"))
    require.shapes(library, z=(z, "B L D"), w_out=(w_out, "D D"), b_out=(b_out, "D"))
    require.floats(z=z, w_qkv=w_qkv, b_qkv=b_qkv, w_out=w_out, b_out=b_out)
    if sizes["E"] != 3 * sizes["D"]:
        require.fail("w_qkv", f"must have 3 · D = {3 * sizes['D']} rows", sizes["E"])
    if heads < 1 or sizes["D"] % heads:
        require.fail("heads", f"must divide D={sizes['D']}", heads)


def multi_head_np(
    z: np.ndarray, w_qkv: np.ndarray, b_qkv: np.ndarray, w_out: np.ndarray, b_out: np.ndarray,
    heads: int = 1, mask: np.ndarray | None = None, grad: np.ndarray | None = None,
):  # fmt: skip
    """Multi-head attention of tokens among themselves, with its four maps, and the gradients by hand.

    z (B, L, D), w_qkv (3 D, D) with the rows of queries, keys and values in this order, b_qkv (3 D,), w_out
    (D, D), b_out (D,); heads divides D; mask bool (True = may look) broadcasts to (B, heads, L, L); grad
    (B, L, D) the upstream gradient (None = ones). Returns `(out (B, L, D), (dz, dw_qkv, db_qkv, dw_out,
    db_out))`. Raises ValueError on bad shapes, mixed dtypes, NaN, infinities, sums that overflow, and when a
    query may see no key.
    """
    _check(np.ndarray, z, w_qkv, b_qkv, w_out, b_out, heads)
    dtype = z.dtype
    z, w_qkv, b_qkv, w_out, b_out = working_np(z, w_qkv, b_qkv, w_out, b_out)
    B, L, D = z.shape

    def split(x):  # (B, L, D) → (B, H, L, d)
        return x.reshape(B, L, heads, D // heads).swapaxes(1, 2)

    def join(x):  # and back
        return x.swapaxes(1, 2).reshape(B, L, D)

    qkv = z @ w_qkv.T + b_qkv  # (B, L, 3 D)
    require.held(qkv, "result", "z", dtype)
    q, k, v = (split(x) for x in np.split(qkv, 3, axis=-1))  # (B, H, L, d) each
    joined = join(attention_np(q, k, v, mask)[0])  # (B, L, D)
    out = joined @ w_out.T + b_out
    require.held(out, "result", "z", dtype)
    G = np.ones_like(out) if grad is None else grad
    # out = O W_Oᵀ + b_O, one linear layer for all tokens; each head then gets its own columns of dO.
    dw_out, db_out = np.einsum("bld,ble->de", G, joined), G.sum((0, 1))
    dq, dk, dv = attention_np(q, k, v, mask, grad=split(G @ w_out))[1]
    dqkv = np.concatenate([join(dq), join(dk), join(dv)], -1)  # (B, L, 3 D)
    # Z made queries, keys and values: the product adds up its three gradients, dQ W_Q + dK W_K + dV W_V.
    dz = dqkv @ w_qkv
    return out, (dz, np.einsum("ble,bld->ed", dqkv, z), dqkv.sum((0, 1)), dw_out, db_out)


def multi_head(
    z: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, b_out: Tensor,
    heads: int = 1, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Multi-head attention of tokens among themselves, with its four maps: z (B, L, D) → (B, L, D).

    w_qkv (3 D, D) has the rows of queries, keys and values in this order, b_qkv (3 D,), w_out (D, D), b_out
    (D,); heads divides D; mask bool (True = may look) broadcasts to (B, heads, L, L). Errors as in
    `multi_head_np`.
    """
    _check(Tensor, z, w_qkv, b_qkv, w_out, b_out, heads)
    with at_least_float32(z, w_qkv, b_qkv, w_out, b_out) as (x, wx, bx, wo, bo):
        qkv = linear(x, wx, bx)  # (B, L, 3 D)
        require.held(qkv, "result", "z", z.dtype)
        q, k, v = (split_heads(y, heads) for y in qkv.chunk(3, -1))  # (B, H, L, d) each
        out = linear(join_heads(attention(q, k, v, mask)), wo, bo).to(z.dtype)
    require.held(out, "result", "z", z.dtype)
    return out


def under(w: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it: of a part of the model."""
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def block(
    z: Tensor, w: Mapping[str, Tensor], heads: int, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """One pre-norm block: z ← z + MSA(LN(z)), then z ← z + MLP(LN(z)), with the exact GELU.

    z (B, L, D); w: norm1, qkv, proj, norm2, fc1 and fc2, each with `.weight` and `.bias`, qkv with the rows
    of queries, keys and values; mask bool (True = may look) broadcasts to (B, heads, L, L). → (B, L, D).
    """
    n = layer_norm(z, w["norm1.weight"], w["norm1.bias"], eps)
    maps = w["qkv.weight"], w["qkv.bias"], w["proj.weight"], w["proj.bias"]
    z = z + multi_head(n, *maps, heads, mask)
    n = layer_norm(z, w["norm2.weight"], w["norm2.bias"], eps)
    bent = gelu(linear(n, w["fc1.weight"], w["fc1.bias"]))  # (B, L, hidden)
    return z + linear(bent, w["fc2.weight"], w["fc2.bias"])


def encoder(
    z: Tensor, w: Mapping[str, Tensor], layers: int, heads: int, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """`layers` blocks in turn, then one LayerNorm: z (B, L, D) → (B, L, D).

    w: the weights of block n as `blocks.n.norm1.weight` and so on, those of the last norm as `norm.weight`
    and `norm.bias`. `under(w, "blocks.0.")` has the weights of block 0 by the names that `block` knows.
    """
    for n in range(layers):
        z = block(z, under(w, f"blocks.{n}."), heads, mask, eps)
    return layer_norm(z, w["norm.weight"], w["norm.bias"], eps)


def embed_words(ids: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Rows of words: LN(word + position + segment) + type 0.

    ids (B, L) integers; w: `word.weight` (V, D), `text_position.weight` (≥ L, D), `segment.weight` and
    `modality.weight` of which row 0 is taken, `text_norm.weight` and `.bias`, with ε = 1e-12. → (B, L, D).
    """
    rows = w["word.weight"][ids] + w["text_position.weight"][: ids.shape[1]] + w["segment.weight"][0]
    return layer_norm(rows, w["text_norm.weight"], w["text_norm.bias"], 1e-12) + w["modality.weight"][0]


def embed_patches(pixels: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Rows of a picture: its [CLS] first, then projected patches; positions and type 1 are added to all.

    pixels (B, 3, H, W); w: `patch.weight` (D, 3, p, p), `patch.bias`, `cls` (D,), `position` (1 + N, D) with
    the row of [CLS] first, `modality.weight` of which row 1 is taken. → (B, 1 + N, D), row-major patches.
    """
    patches = patch_embed(pixels, w["patch.weight"], w["patch.bias"])  # (B, N, D)
    cls = w["cls"].expand(len(pixels), 1, -1)
    return torch.cat([cls, patches], 1) + w["position"] + w["modality.weight"][1]


def encode(
    ids: Tensor, text_mask: Tensor, pixels: Tensor, w: Mapping[str, Tensor], layers: int, heads: int,
    writing: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Words and picture in one sequence through the encoder: states of words and of the picture.

    ids (B, L), text_mask (B, L) bool (True = a word), pixels (B, 3, H, W); w: the whole model, its blocks as
    `encoder.blocks.0.norm1.weight` and so on. Nobody looks at padding. When `writing`, no word sees a later
    one and no row of the picture sees a word. → (B, L, D) and (B, 1 + N, D).
    """
    text, image = embed_words(ids, w), embed_patches(pixels, w)
    L, K = text.shape[1], image.shape[1]
    real = torch.cat([text_mask, text_mask.new_ones(len(ids), K)], 1)  # (B, L + K)
    sees = real[:, None, None]  # (B, 1, 1, L + K): for all heads and queries
    if writing:
        order = torch.ones(L + K, L + K, dtype=torch.bool, device=ids.device)
        order[:L, :L] = order[:L, :L].tril()
        order[L:, :L] = False
        sees = sees & order
    z = encoder(torch.cat([text, image], 1), under(w, "encoder."), layers, heads, sees)
    return z[:, :L], z[:, L:]


def mlm_hidden(states: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """The head of hidden words before its decoder: a linear map, GELU, LayerNorm with ε = 1e-12.

    states (…, D); w: `mlm.dense.weight`, `mlm.dense.bias`, `mlm.norm.weight`, `mlm.norm.bias`. → (…, D).
    """
    bent = gelu(linear(states, w["mlm.dense.weight"], w["mlm.dense.bias"]))
    return layer_norm(bent, w["mlm.norm.weight"], w["mlm.norm.bias"], 1e-12)


def itm_logits(cls: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Does the text match the picture? The pooler, tanh of a linear map, then the two logits.

    cls (B, D), the states of the text's first token; w: `pooler` and `itm`, each with `.weight` and `.bias`.
    → (B, 2), column 1 = match.
    """
    return linear(linear(cls, w["pooler.weight"], w["pooler.bias"]).tanh(), w["itm.weight"], w["itm.bias"])


def pretraining_loss(
    batch: Any, w: Mapping[str, Tensor], layers: int, heads: int, wpa_weight: float = 0.1
) -> dict[str, Tensor]:
    """The weighted terms of a batch's loss: "mlm" ("next" in a batch that is written), "itm" and "wpa".

    batch has `ids` and `labels` (B, L), −100 where nothing is predicted, `text_mask` (B, L) bool, `pixels`
    (B, 3, H, W), `match` (B,): 1, 0, or −1 for an example that does not serve matching, `align` (B,): +1
    pulls words and patches of an example together, −1 pushes them apart, 0 does neither, and `written`, bool.
    Means are over predicted words, for "itm" and "wpa" over the examples that serve matching. "itm" and "wpa"
    are missing where no example serves them.
    """
    text, image = encode(batch.ids, batch.text_mask, batch.pixels, w, layers, heads, batch.written)
    asked, paired, aligned = batch.labels != -100, batch.match >= 0, batch.align != 0
    hidden = mlm_hidden(text[asked], w)  # (predicted words, D)
    name = "next" if batch.written else "mlm"
    terms = {name: mlm_loss(hidden, w["mlm.weight"], w["mlm.bias"], batch.labels[asked])}
    if paired.any():
        terms["itm"] = itm_loss(itm_logits(text[paired, 0], w), batch.match[paired])
    if aligned.any():
        words = alignment_masks(batch.text_mask[aligned])  # without [CLS], [SEP] and padding
        cost = wpa_fused(text[aligned], image[aligned, 1:], words)  # (aligned examples,)
        terms["wpa"] = wpa_weight * (batch.align[aligned] * cost).sum() / paired.sum().clamp(min=1)
    return terms


def rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """The share of the peak rate at a step, in (0, 1]: linear warm-up, flat, linear towards zero.

    Step 0 has 1 / warmup, step warmup − 1 and later ones have 1. The last round(cooldown · steps) steps have
    the steps that are left, this one among them, divided by that number.
    """
    left = (steps - step) / max(1, round(cooldown * steps))
    return min(1.0, (step + 1) / max(1, warmup)) * min(1.0, left)


def adamw(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, count: int, lr: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW, with β = (0.9, 0.98) and ε = 1e-8: the new weight, mean and square.

    mean and square: running means of the gradient and of its square, zeros before the first step; count: 1 at
    the first step. Both are divided by 1 − βᵏ at step k, since they began at zero. The weight decays by
    lr · decay of itself, beside the step: weight ← (1 − lr · decay) weight − lr mean / (√square + ε).
    """
    mean, square = 0.9 * mean + 0.1 * grad, 0.98 * square + 0.02 * grad**2
    step = mean / (1 - 0.9**count) / ((square / (1 - 0.98**count)).sqrt() + 1e-8)
    return (1 - lr * decay) * weight - lr * step, mean, square


def muon(weight: Tensor, grad: Tensor, mean: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """One step of Muon: momentum whose singular values are brought near 1. The new weight and mean.

    weight (A, B). mean ← 0.95 mean + 0.05 grad, and M = 0.95 mean + 0.05 grad (Nesterov). M, divided by its
    Frobenius norm (at least 1e-7), goes five times through X ← 3.4445 X − 4.7750 X Xᵀ X + 2.0315 (X Xᵀ)² X,
    and the weight moves by −lr √max(1, A / B) X.
    """
    mean = 0.95 * mean + 0.05 * grad
    X = 0.95 * mean + 0.05 * grad
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        square = X @ X.mT
        X = 3.4445 * X + (-4.7750 * square + 2.0315 * square @ square) @ X
    A, B = weight.shape
    return weight - lr * math.sqrt(max(1, A / B)) * X, mean


def train(
    w: Mapping[str, Tensor], loss: Callable[[dict[str, Tensor], int], dict[str, Tensor]], matrices: set[str],
    steps: int, lr: float = 2e-3, matrix_lr: float = 0.01, decay: float = 0.01, warmup: int = 30,
    cooldown: float = 0.4, look: Callable[[int, dict, dict], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The loop: a loss, its gradients, one update of every weight; returns the trained weights.

    loss(w, step) gives the terms of a step, whose sum is differentiated. The weights that `matrices` names
    are updated by `muon` with matrix_lr, all others by `adamw` with lr; only those with two axes or more
    decay. Both rates are multiplied by `rate(step, …)`. The gradients of all weights with two axes or more
    that are not in `matrices` are scaled together, so that their common norm is at most 1. A weight that no
    term reads in a step is left as it is. After every update `look(steps done, w, terms)` is called. The
    tensors given are not changed.
    """
    w = {name: value.detach().clone().requires_grad_() for name, value in w.items()}
    zeros = {name: torch.zeros_like(value) for name, value in w.items()}
    means, squares, counts = dict(zeros), dict(zeros), dict.fromkeys(w, 0)
    for step in range(steps):
        terms = loss(w, step)
        found = torch.autograd.grad(sum(terms.values()), list(w.values()), allow_unused=True)
        grads = {name: g for name, g in zip(w, found, strict=True) if g is not None}
        clipped = [name for name, g in grads.items() if g.ndim >= 2 and name not in matrices]
        norm = math.sqrt(sum(float(grads[name].square().sum()) for name in clipped))
        share = rate(step, steps, warmup, cooldown)
        with torch.no_grad():
            for name, g in grads.items():
                if name in matrices:
                    new, means[name] = muon(w[name], g, means[name], share * matrix_lr)
                else:
                    g = g * min(1.0, 1 / (norm + 1e-6)) if name in clipped else g
                    counts[name] += 1
                    state = means[name], squares[name], counts[name]
                    rates = share * lr, decay if g.ndim >= 2 else 0.0
                    new, means[name], squares[name] = adamw(w[name], g, *state, *rates)
                w[name].copy_(new)
        if look:
            look(step + 1, w, terms)
    return {name: value.detach() for name, value in w.items()}


RUNGS = {"multi_head": {"np": multi_head_np, "torch": multi_head}}
