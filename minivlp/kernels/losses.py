"""The losses on the kernels: each is the steps it passes to `kernels.fold` and `kernels.accumulate`.

Every function takes the inputs of its concept, already checked, and returns `(loss, gradients)` in float32,
one gradient for each input that may have one, None where it is not `wanted`. The gradients are those of an
upstream gradient of 1. Products of 2·M·N·D flops, with both sides wanted (the plain rung makes 3, Chamfer 1
for the value and 2 for its gradient):

    infonce         two folds and two accumulates, 6
    sigmoid_loss    two accumulates, the first of which sums the loss, 4
    best_partners   two folds, 2: the gradient of a maximum is a gather
"""

from typing import Any

from torch import Tensor

from minivlp.kernels import walks as kernels
from minivlp.kernels.walks import Side

Gradients = tuple[Tensor | None, ...]
ALL = (True, True, True, True)


def infonce(x: Tensor, y: Tensor, scale: float | Tensor, wanted: tuple = ALL) -> tuple[Tensor, Gradients]:
    """x (B, D), y (B, D): loss, (dx, dy, dscale)."""
    images, texts = kernels.side(x, times=scale), kernels.side(y)
    top, total, own = kernels.fold(kernels.logsumexp, images, texts)[:, 0]  # (B,) each
    row_lse = top + total.log()
    top, total, _ = kernels.fold(kernels.logsumexp, texts, images)[:, 0]
    column_lse = top + total.log()
    images, texts = images._replace(plus=-row_lse), texts._replace(plus=-column_lse)
    dx = _gradient(kernels.infonce, images, texts, x, 0.5 / len(x)) if wanted[0] or wanted[2] else None
    dy = _gradient(kernels.infonce, texts, images, y, 0.5 / len(x)) if wanted[1] else None
    dscale = _slope(x, dx, scale) if wanted[2] else None
    return (row_lse + column_lse - 2 * own).mean() / 2, (dx, dy, dscale)


def sigmoid_loss(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, wanted: tuple = ALL
) -> tuple[Tensor, Gradients]:
    """x (B, D), y (B, D): loss, (dx, dy, dscale, dbias)."""
    B = len(x)
    images, texts = kernels.side(x, times=scale), kernels.side(y, plus=bias)
    dx, sums = kernels.accumulate(kernels.sigmoid, images, texts)
    dx, (slopes, losses) = dx[0, :, : x.shape[1]] / B, sums[:, 0].sum(1) / B
    dy = _gradient(kernels.sigmoid, texts, images, y, 1 / B) if wanted[1] else None
    return losses, (dx, dy, _slope(x, dx, scale), slopes)


def best_partners(
    x: Tensor, y: Tensor, x_veto: Tensor | float = 0.0, y_veto: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best cosine of each token and its partner: x (P, M, D) and y (P, N, D).

    A veto (P, M) or (P, N) is −inf at padding, which is nobody's partner, else 0. Returns cosines (P, M)
    and places (P, M), int64, of x's tokens, then the same of y's. Of equal cosines the first wins.
    """
    xs, ys = kernels.side(x, 1 / kernels.lengths(x), x_veto), kernels.side(y, 1 / kernels.lengths(y), y_veto)
    found = kernels.fold(kernels.best, xs, ys), kernels.fold(kernels.best, ys, xs)
    (x_best, x_place, _), (y_best, y_place, _) = found
    return x_best, x_place.long(), y_best, y_place.long()


def _gradient(step: Any, rows: Side, columns: Side, like: Tensor, weight: float) -> Tensor:
    """The gradient of `rows` without the padding of its width, like (M, D)."""
    return kernels.accumulate(step, rows, columns)[0][0, :, : like.shape[1]] * weight


def _slope(x: Tensor, dx: Tensor, scale: float | Tensor) -> Tensor:
    """dL/dscale = ⟨G, x yᵀ⟩ = ⟨x, dx⟩ / scale, because S is scale · x yᵀ."""
    return (x.detach() * dx).sum() / scale
