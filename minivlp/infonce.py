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
    infonce_fused      two walks over tiles of S, normalisers then gradients: two tiles, dx and dy
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

from minivlp import stream
from minivlp.core import require


def _check(x, y, scale) -> int:
    """Refuse what is not `x (B, D)`, `y (B, D)` with B ≥ 1 and `scale` > 0; return B."""
    sizes = require.shapes(x=(x, "B D"), y=(y, "B D"))
    if sizes["B"] < 1:
        require.fail("x", "must hold at least one pair", tuple(x.shape))
    require.floats(x=x, y=y)
    require.positive(scale=scale)
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


# The fused rung walks S in bits, S / ln 2, because exp2 costs half of exp.
BITS = 1 / math.log(2)
# Below this a sum of powers, of which the largest may be 1, has lost digits at the floor of float32.
FAINT = 2.0**-100


def normaliser_tile(S: Tensor, spare: Tensor, rows, columns, row_lse, column_lse, own) -> None:
    """First walk: fold the tile into the normalisers of its rows and columns (B,), and keep the diagonal."""
    diagonal = S.diagonal(rows[0].start - columns[0].start)  # empty off the diagonal of the whole S
    own[max(rows[0].start, columns[0].start) :][: len(diagonal)] = diagonal
    # One power serves rows and columns, shifted by the largest score of the tile.
    top = S.amax()
    powers = torch.sub(S, top, out=spare).exp2_()
    along, down = powers.sum(1), powers.sum(0)
    if min(along.min(), down.min()) > FAINT:
        along, down = top + along.log2(), top + down.log2()
    else:  # where all is far below the top it is lost: then a shift for each row and each column
        along, down = _log2_sum(S, 1), _log2_sum(S, 0)
    torch.logaddexp2(row_lse[rows], along, out=row_lse[rows])
    torch.logaddexp2(column_lse[columns], down, out=column_lse[columns])


def _log2_sum(S: Tensor, axis: int) -> Tensor:
    """log₂ Σ 2^S along an axis."""
    top = S.amax(axis, keepdim=True)
    return top.squeeze(axis) + (S - top).exp2_().sum(axis).log2()


def softmax_tile(S: Tensor, spare: Tensor, rows, columns, row_lse, column_lse) -> None:
    """Second walk: S becomes 2B · G = P_row + P_col − 2I."""
    r, c = row_lse[rows][:, None], column_lse[columns]  # (m, 1), (n,)
    low, high = min(r.min(), c.min()), max(r.max(), c.max())
    if high - low < -math.log2(FAINT):
        # 2^(S − r) + 2^(S − c) = 2^(S − low) · (2^(low − r) + 2^(low − c)): again one power for both.
        S.sub_(low).exp2_().mul_(torch.add((low - r).exp2(), (low - c).exp2(), out=spare))
    else:
        torch.sub(S, c, out=spare).exp2_()
        S.sub_(r).exp2_().add_(spare)
    S.diagonal(rows[0].start - columns[0].start).sub_(2)


def infonce_fused(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """`infonce` without S, whose tiles are made twice: for the normalisers, then for the gradients.

    4 products in place of 3, less traffic. In units of B² numbers read or written: the plain rung moves some
    24 to and from memory, S, its two softmaxes and what autograd makes of them; this one moves rows of y and
    dy, 5 D/512 in all, as its tiles stay in the cache. It can be differentiated once. Arguments and errors as
    in `infonce`.
    """
    _check(x, y, scale)
    return stream.run(_Fused, "kernels.losses.infonce", x, y, scale)


class _Fused(stream.Ready):
    """Two walks: P_row and P_col need their normalisers, so G is unknown until all of S was seen."""

    @staticmethod
    def forward(ctx, x, y, scale):
        B, bits = len(x), float(scale) * BITS
        p, q = stream.working(x, y)
        row_lse, column_lse, own = p.new_full((3, B), -math.inf)
        stream.fold(normaliser_tile, p, q, row_lse, column_lse, own, scale=bits)
        if any(ctx.needs_input_grad):
            # dL/dS / BITS is the gradient in bits.
            dx, dy, dscale = stream.accumulate(
                softmax_tile,
                p,
                q,
                row_lse,
                column_lse,
                scale=bits,
                weight=0.5 / (B * BITS),
                wanted=ctx.needs_input_grad,
            )
            ctx.save_for_backward(dx, dy, None if dscale is None else dscale * BITS)
        return ((row_lse + column_lse - 2 * own).sum() / (2 * B * BITS)).to(x.dtype)


def infonce_gathered(
    x: Tensor, y: Tensor, scale: float | Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """InfoNCE over the processes of `group`: local shards x (b, D), y (b, D) in, loss of the whole batch out.

    The batch is the shards in rank order; all ranks receive the same loss and must call backward on it alike.
    The gradients of x and y are this rank's rows of the one-process gradients; that of `scale`, which must be
    equal on all ranks, is already summed over them. (Gradients of the towers are not: sum those over ranks.)
    Raises ValueError, on every rank, when any rank holds what `infonce` refuses or shards differ in shape.
    """
    require.on_every_rank(lambda: _check(x, y, scale), "x", x, group)
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


RUNGS = {"infonce": {"np": infonce_np, "torch": infonce, "fused": infonce_fused}}
