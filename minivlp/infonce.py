"""InfoNCE: each image picks its text out of the batch, and each text its image; the loss that trains CLIP.

With images X (B, D), their texts Y (B, D) and scale = 1/τ, the scores S = scale · X Yᵀ are the logits of two
B-way choices, along the rows and along the columns, whose right answers lie on the diagonal:

    L = 1/(2B) Σ_i [ logsumexp_j S_ij + logsumexp_j S_ji − 2 S_ii ].

Equal scores cost log B, and log B − E[L] is a lower bound of the mutual information of image and text, so a
batch of B cannot show more than log B nats.

Gradient, with P_row and P_col the softmax of S along rows and columns: G = dL/dS = (P_row + P_col − 2I) / 2B,
dX = scale · G Y, dY = scale · Gᵀ X, dscale = ⟨G, X Yᵀ⟩.

Rungs (S has B² entries):
    infonce_np         the formula and its gradients, a few arrays like S
    infonce            the same in PyTorch: one product makes S, autograd keeps it for the backward pass
    infonce_fused      two walks over tiles of S, normalisers then gradients: two tiles, dX and dY
Over R processes, each with b = B/R pairs:
    infonce_gathered   a strip of b rows of S on each rank: b·B entries

Sources: van den Oord, Li and Vinyals 2018 (CPC), eq. 4; Poole et al. 2019, who prove the bound; Radford et
al. 2021 (CLIP), figure 3 and section 2.5.
Left out: normalising X and Y, which the model does; several right answers in a row, as when two images share
a caption; a memory of past batches (momentum queues).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working, working_np


def _check(library, images, texts, scale) -> int:
    """Refuse what is not `images (B, D)`, `texts (B, D)` with B ≥ 1 and `scale` > 0; return B."""
    sizes = require.shapes(library, images=(images, "B D"), texts=(texts, "B D"))
    if sizes["B"] < 1:
        require.fail("images", "must hold at least one pair", tuple(images.shape))
    require.floats(images=images, texts=texts)
    require.positive(library, scale=scale)
    return sizes["B"]


def infonce_np(images: np.ndarray, texts: np.ndarray, scale: float):
    """InfoNCE and its gradients by hand.

    images (B, D) and texts (B, D), row i of one the partner of row i of the other; scale = 1/τ > 0.
    Returns `(loss in nats, (dimages, dtexts, dscale))`.
    Raises ValueError on bad shapes, mixed dtypes, NaN, infinities, B = 0, scale ≤ 0 and scores that overflow.
    """
    B = _check(np.ndarray, images, texts, scale)
    x, y = working_np(images, texts)
    cosines = x @ y.T  # (B, B)
    S = scale * cosines
    rows, columns = _logsumexp(S, 1), _logsumexp(S, 0)  # (B, 1), (1, B)
    loss = (rows[:, 0] + columns[0] - 2 * S.diagonal()).mean() / 2
    # d logsumexp_j S_ij / dS_ij = exp(S_ij − logsumexp_j S_ij), a softmax; the diagonal adds −2; all over 2B.
    G = (np.exp(S - rows) + np.exp(S - columns) - 2 * np.eye(B)) / (2 * B)  # (B, B)
    # S_ij = scale Σ_d x_id y_jd, so a factor's gradient is G times the other factors, summed over the rest.
    dimages = scale * G @ y  # (B, D)
    dtexts = scale * G.T @ x  # (B, D)
    dscale = (G * cosines).sum()
    return require.loss(loss, images=images), (dimages, dtexts, dscale)


def _logsumexp(S: np.ndarray, axis: int) -> np.ndarray:
    """log Σ exp(S) along an axis, kept with length 1; minus the largest entry first, so no exp overflows."""
    top = S.max(axis, keepdims=True)
    return top + np.log(np.exp(S - top).sum(axis, keepdims=True))


def infonce(images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
    """InfoNCE: images (B, D), texts (B, D), scale = 1/τ > 0 → scalar in nats.

    Errors as in `infonce_np`. Half precisions are added up in float32, also under autocast.
    """
    _check(Tensor, images, texts, scale)
    with at_least_float32(images, texts) as (x, y):
        S = scale * x @ y.T  # (B, B)
        loss = (S.logsumexp(1) + S.logsumexp(0) - 2 * S.diagonal()).mean() / 2
    return require.loss(loss, images=images)


class InfoNCE(torch.nn.Module):
    """InfoNCE with CLIP's learned temperature: scale = exp(log_scale), at first 1/0.07, at most 100."""

    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """1/τ as a differentiable scalar."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale(self, largest: float = 100.0) -> None:
        """Pull the scale back to at most `largest`, as CLIP does after each step."""
        # It is the parameter that is clamped: a clamp in the graph has no gradient above its limit.
        self.log_scale.clamp_(max=math.log(largest))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        self.clamp_scale()  # the last step may have gone too far
        return infonce(images, texts, self.scale)


def infonce_gathered(
    images: Tensor, texts: Tensor, scale: float | Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """InfoNCE over the processes of `group`: shards images (b, D) and texts (b, D) → loss of the whole batch.

    The batch is the shards in rank order; all ranks receive the same loss and must call backward on it alike.
    The gradients of images and texts are this rank's rows of the one-process gradients; that of `scale`,
    which must be equal on all ranks, is already summed over them. (Gradients of the towers are not: sum those
    over ranks.)
    Raises ValueError, on every rank, when any rank holds what `infonce` refuses or shards differ in shape.
    """
    require.on_every_rank(lambda: _check(Tensor, images, texts, scale), "images", images, group)
    loss = stream.differentiable(_Gathered, images, texts, scale, group)
    return require.loss(loss, images=images)


class _Gathered(torch.autograd.Function):
    """A strip of rows of S on each rank. Gradients are made beside the loss, so that no strip is kept."""

    @staticmethod
    def forward(ctx, images, texts, scale, group):
        b, B = len(images), len(images) * dist.get_world_size(group)
        first = b * dist.get_rank(group)
        all_texts = texts.new_empty(B, texts.shape[1])
        # The older names are those of torch before 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(all_texts, texts.contiguous(), group=group)  # (B, D)
        x, y, all_y = working(images, texts, all_texts)
        cosines = x @ all_y.T  # (b, B)
        S = scale * cosines
        positives = S[
            :, first : first + b
        ].diagonal()  # (b,), this rank's part of the diagonal of the whole S
        rows = S.logsumexp(1)  # (b,)
        # A column is spread over the ranks: they agree on its largest entry, then add up the exponentials.
        top = S.amax(0)  # (B,)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        columns = (S - top).exp().sum(0)
        dist.all_reduce(columns, group=group)
        columns = top + columns.log()  # (B,)
        loss = (rows + columns[first : first + b] - 2 * positives).sum() / (2 * B)
        # The gradient of infonce_np, for b of its rows.
        G = ((S - rows[:, None]).exp() + (S - columns).exp()) / (2 * B)  # (b, B)
        G[:, first : first + b].diagonal().sub_(1 / B)
        dimages = scale * G @ all_y  # (b, D)
        # Each rank holds a share of all rows of dY, and of the two scalars: add the shares up.
        dtexts = torch.empty_like(y, memory_format=torch.contiguous_format)  # (b, D)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(dtexts, scale * G.T @ x, group=group)
        totals = torch.stack([loss, (G * cosines).sum()])
        dist.all_reduce(totals, group=group)
        loss, dscale = totals
        ctx.save_for_backward(dimages, dtexts, dscale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(upstream * gradient if needed else None for gradient, needed in wanted), None


# The fused rung never holds S: it walks over its tiles twice. A tile of the first walk pays one exponential
# an entry for its rows and columns both, by one shift for the whole tile (each row and each column has its
# own only where that loses digits); the second walk shares its exponential in the same way. Both walks count
# S in bits, S / ln 2, because 2^s costs half of e^s.
BITS = 1 / math.log(2)
# If a row's sum of 2^(S − top), with `top` the largest score of the tile, is below 2⁻¹⁰⁰, its terms may have
# underflowed in float32: that tile is redone with a maximum for each row and each column.
UNDERFLOW = 2.0**-100


def infonce_fused(images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
    """`infonce` without S, whose tiles are made twice: for the normalisers, then for the gradients.

    4 products in place of 3, less traffic. In units of B² numbers read or written: the plain rung moves some
    24 to and from memory, S, its two softmaxes and what autograd makes of them; this one moves rows of Y and
    dY, 5 D/512 in all, as its tiles stay in the cache. It can be differentiated once. Arguments and errors as
    in `infonce`.
    """
    _check(Tensor, images, texts, scale)
    return require.loss(stream.dispatch(_Fused, images, texts, scale, kernel=_kernel), images=images)


def _kernel() -> Callable:
    from minivlp.kernels import losses  # imports Triton, hence only where it is used

    return losses.infonce


class _Fused(stream.GradientsFromForward):
    """Two walks: P_row and P_col need their normalisers, so G is unknown until all of S was seen."""

    @staticmethod
    def forward(ctx, images, texts, scale):
        B, bits = len(images), float(scale) * BITS
        x, y = working(images, texts)
        row_lse, column_lse, positives = x.new_full((3, B), -math.inf)
        stream.fold(normaliser_tile, x, y, row_lse, column_lse, positives, scale=bits)
        if any(ctx.needs_input_grad):
            # dL/dS / BITS is the gradient in bits.
            dimages, dtexts, dscale = stream.accumulate(
                softmax_tile,
                x,
                y,
                row_lse,
                column_lse,
                scale=bits,
                weight=0.5 / (B * BITS),
                wanted=ctx.needs_input_grad,
            )
            ctx.save_for_backward(dimages, dtexts, None if dscale is None else dscale * BITS)
        return ((row_lse + column_lse - 2 * positives).sum() / (2 * B * BITS)).to(images.dtype)


def normaliser_tile(S: Tensor, scratch: Tensor, rows, columns, row_lse, column_lse, positives) -> None:
    """First walk: fold the tile into the normalisers of its rows and columns (B,), and keep the diagonal."""
    diagonal = S.diagonal(rows[0].start - columns[0].start)  # empty off the diagonal of the whole S
    positives[max(rows[0].start, columns[0].start) :][: len(diagonal)] = diagonal
    top = S.amax()
    powers = torch.sub(S, top, out=scratch).exp2_()
    row_sums, column_sums = powers.sum(1), powers.sum(0)
    if min(row_sums.min(), column_sums.min()) > UNDERFLOW:
        row_part, column_part = top + row_sums.log2(), top + column_sums.log2()
    else:
        row_part, column_part = _log2_sum(S, 1), _log2_sum(S, 0)
    torch.logaddexp2(row_lse[rows], row_part, out=row_lse[rows])
    torch.logaddexp2(column_lse[columns], column_part, out=column_lse[columns])


def _log2_sum(S: Tensor, axis: int) -> Tensor:
    """log₂ Σ 2^S along an axis."""
    top = S.amax(axis, keepdim=True)
    return top.squeeze(axis) + (S - top).exp2_().sum(axis).log2()


def softmax_tile(S: Tensor, scratch: Tensor, rows, columns, row_lse, column_lse) -> None:
    """Second walk: S becomes 2B · G = P_row + P_col − 2I."""
    r, c = row_lse[rows][:, None], column_lse[columns]  # (m, 1), (n,)
    low, high = min(r.min(), c.min()), max(r.max(), c.max())
    if high - low < -math.log2(UNDERFLOW):
        # 2^(S − r) + 2^(S − c) = 2^(S − low) · (2^(low − r) + 2^(low − c)): one exponential serves both.
        S.sub_(low).exp2_().mul_(torch.add((low - r).exp2(), (low - c).exp2(), out=scratch))
    else:
        torch.sub(S, c, out=scratch).exp2_()
        S.sub_(r).exp2_().add_(scratch)
    S.diagonal(rows[0].start - columns[0].start).sub_(2)


RUNGS = {"infonce": {"np": infonce_np, "torch": infonce, "fused": infonce_fused}}
