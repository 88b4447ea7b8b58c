"""InfoNCE: each image picks its text out of the batch, and each text its image; the loss that trains CLIP.

With x (B, D) the images, y (B, D) their texts and scale = 1/τ, the scores S = scale · x yᵀ are the logits of
two B-way choices, along the rows and along the columns, whose right answers lie on the diagonal:

    L = 1/(2B) Σ_i [ logsumexp_j S_ij + logsumexp_j S_ji − 2 S_ii ].

Equal scores cost log B, and log B − E[L] is a lower bound of the mutual information of image and text, so a
batch of B cannot show more than log B nats.

Gradient, with P_row and P_col the softmax of S along rows and columns: G = dL/dS = (P_row + P_col − 2I) / 2B,
dx = scale · G y, dy = scale · Gᵀ x, dscale = ⟨G, x yᵀ⟩.

Rungs (S has B² entries):
    infonce_np         the formula and its gradients, a few arrays like S
    infonce            the same in PyTorch: one product makes S, autograd keeps it for the backward pass
Over R processes, each with b = B/R pairs:
    infonce_gathered   a strip of b rows of S on each rank: b·B entries

Sources: van den Oord, Li and Vinyals 2018 (CPC), eq. 4; Poole et al. 2019, who prove the bound; Radford et
al. 2021 (CLIP), figure 3 and section 2.5.
Left out: normalising x and y, which is the model's affair; several right answers in a row, as when two images
share a caption; a memory of past batches (momentum queues).
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minivlp import refuse


def _check(x, y, scale) -> int:
    """Refuse what is not `x (B, D)`, `y (B, D)` with B ≥ 1 and `scale` > 0; return B."""
    sizes = refuse.shapes(x=(x, "B D"), y=(y, "B D"))
    if sizes["B"] < 1:
        refuse.refuse("x", "must hold at least one pair", tuple(x.shape))
    refuse.floats(x=x, y=y)
    refuse.positive(scale=scale)
    return sizes["B"]


def infonce_np(x: np.ndarray, y: np.ndarray, scale: float):
    """InfoNCE and its gradients by hand.

    x (B, D), y (B, D) with row i of one the partner of row i of the other, scale = 1/τ > 0.
    Returns `(loss in nats, (dx, dy, dscale))`.
    Raises ValueError on bad shapes, dtypes, NaN, B = 0 or scale ≤ 0.
    """
    B = _check(x, y, scale)
    cosines = x @ y.T  # (B, B)
    S = scale * cosines
    rows, columns = _logsumexp(S, 1), _logsumexp(S, 0)  # (B, 1), (1, B)
    loss = (rows[:, 0] + columns[0] - 2 * S.diagonal()).mean() / 2
    # d logsumexp_j S_ij / dS_ij = exp(S_ij − logsumexp_j S_ij), a softmax; the diagonal pays −2; all over 2B.
    G = (np.exp(S - rows) + np.exp(S - columns) - 2 * np.eye(B)) / (2 * B)  # (B, B)
    # S_ij = scale Σ_d x_id y_jd, so a factor's gradient is G times the other factors, summed over the rest.
    dx = scale * G @ y  # (B, D)
    dy = scale * G.T @ x  # (B, D)
    dscale = (G * cosines).sum()
    return float(loss), (dx, dy, dscale)


def _logsumexp(S: np.ndarray, axis: int) -> np.ndarray:
    """log Σ exp(S) along an axis, kept with length 1; minus the largest entry first, so no exp overflows."""
    top = S.max(axis, keepdims=True)
    return top + np.log(np.exp(S - top).sum(axis, keepdims=True))


def infonce(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """InfoNCE: x (B, D), y (B, D), scale = 1/τ > 0 → scalar in nats.

    Raises ValueError on bad shapes, dtypes, NaN, B = 0 or scale ≤ 0.
    """
    _check(x, y, scale)
    S = scale * x @ y.T  # (B, B)
    return (S.logsumexp(1) + S.logsumexp(0) - 2 * S.diagonal()).mean() / 2


def infonce_gathered(
    x: Tensor, y: Tensor, scale: float | Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """InfoNCE over the processes of `group`: local shards x (b, D), y (b, D) in, loss of the whole batch out.

    The batch is the shards in rank order; all ranks receive the same loss and must call backward on it alike.
    The gradients of x and y are this rank's rows of the one-process gradients; that of `scale`, which must be
    equal on all ranks, is already summed over them. (Gradients of the towers are not: sum those over ranks.)
    Raises ValueError, on every rank, when any rank holds what `infonce` refuses or shards differ in shape.
    """
    refuse.on_every_rank(lambda: _check(x, y, scale), "x", x, group)
    return _Gathered.apply(x, y, scale, group)


class _Gathered(torch.autograd.Function):
    """A strip of rows of S on each rank. Gradients are made beside the loss, so that no strip is kept."""

    @staticmethod
    def forward(ctx, x, y, scale, group):
        b, B = len(x), len(x) * dist.get_world_size(group)
        first = b * dist.get_rank(group)
        texts = y.new_empty(B, y.shape[1])
        dist.all_gather_single(texts, y.contiguous(), group=group)  # (B, D)
        cosines = x @ texts.T  # (b, B)
        S = scale * cosines
        own = S[:, first : first + b].diagonal()  # (b,), this rank's part of the diagonal of the whole S
        rows = S.logsumexp(1)  # (b,)
        # A column is spread over the ranks: they agree on its largest entry, then add up the exponentials.
        top = S.amax(0)  # (B,)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        columns = (S - top).exp().sum(0)
        dist.all_reduce(columns, group=group)
        columns = top + columns.log()  # (B,)
        loss = (rows + columns[first : first + b] - 2 * own).sum() / (2 * B)
        # The gradient of infonce_np, for b of its rows.
        G = ((S - rows[:, None]).exp() + (S - columns).exp()) / (2 * B)  # (b, B)
        G[:, first : first + b].diagonal().sub_(1 / B)
        dx = scale * G @ texts  # (b, D)
        # Each rank holds a share of all rows of dy, and of the two scalars: add them up.
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)  # (b, D)
        dist.reduce_scatter_single(dy, scale * G.T @ x, group=group)
        totals = torch.stack([loss, (G * cosines).sum()])
        dist.all_reduce(totals, group=group)
        loss, dscale = totals
        ctx.save_for_backward(dx, dy, dscale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(upstream * gradient if needed else None for gradient, needed in wanted), None


class InfoNCE(torch.nn.Module):
    """InfoNCE with CLIP's learned temperature: scale = exp(log_scale), at first 1/0.07, at most 100."""

    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """1/τ as a differentiable scalar."""
        # The parameter itself is pulled back: above its limit a clamp in the graph would have no gradient.
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(100))
        return self.log_scale.exp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return infonce(x, y, self.scale)


RUNGS = {"infonce": {"np": infonce_np, "torch": infonce}}
