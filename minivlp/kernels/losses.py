"""The losses on the kernels: each is the steps it passes to `walks.fold` and `walks.accumulate`.

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

from minivlp.kernels import walks
from minivlp.kernels.walks import Side

Gradients = tuple[Tensor | None, ...]
ALL = (True, True, True, True)


def infonce(
    images: Tensor, texts: Tensor, scale: float | Tensor, wanted: tuple = ALL
) -> tuple[Tensor, Gradients]:
    """images (B, D), texts (B, D): loss, (dimages, dtexts, dscale)."""
    B, rows, columns = len(images), walks.side(images, times=scale), walks.side(texts)
    top, total, positives = walks.fold(walks.logsumexp, rows, columns)[:, 0]  # (B,) each
    row_lse = top + total.log()
    top, total, _ = walks.fold(walks.logsumexp, columns, rows)[:, 0]
    column_lse = top + total.log()
    rows, columns = rows._replace(plus=-row_lse), columns._replace(plus=-column_lse)
    dimages = dtexts = dscale = None
    if wanted[0] or wanted[2]:
        dimages = _gradient(walks.infonce, rows, columns, images, 0.5 / B)
    if wanted[1]:
        dtexts = _gradient(walks.infonce, columns, rows, texts, 0.5 / B)
    if wanted[2]:
        dscale = _slope(images, dimages, scale)
    return (row_lse + column_lse - 2 * positives).mean() / 2, (dimages, dtexts, dscale)


def sigmoid_loss(
    images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor, wanted: tuple = ALL
) -> tuple[Tensor, Gradients]:
    """images (B, D), texts (B, D): loss, (dimages, dtexts, dscale, dbias)."""
    B, rows, columns = len(images), walks.side(images, times=scale), walks.side(texts, plus=bias)
    dimages, sums = walks.accumulate(walks.sigmoid, rows, columns)
    dimages, (dbias, loss) = dimages[0, :, : images.shape[1]] / B, sums[:, 0].sum(1) / B
    dtexts = _gradient(walks.sigmoid, columns, rows, texts, 1 / B) if wanted[1] else None
    return loss, (dimages, dtexts, _slope(images, dimages, scale), dbias)


def best_partners(
    x: Tensor, y: Tensor, x_veto: Tensor | float = 0.0, y_veto: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best cosine of each token and its partner: x (P, M, D) and y (P, N, D).

    A veto (P, M) or (P, N) is −inf at padding, which is nobody's partner, else 0. Returns cosines (P, M)
    and places (P, M), int64, of x's tokens, then the same of y's. Of equal cosines the first wins.
    """
    xs, ys = walks.side(x, 1 / walks.lengths(x), x_veto), walks.side(y, 1 / walks.lengths(y), y_veto)
    x_best, x_place, _ = walks.fold(walks.best, xs, ys)
    y_best, y_place, _ = walks.fold(walks.best, ys, xs)
    return x_best, x_place.long(), y_best, y_place.long()


def _gradient(step: Any, rows: Side, columns: Side, like: Tensor, weight: float) -> Tensor:
    """The gradient of `rows` without the padding of its width, like (M, D)."""
    return walks.accumulate(step, rows, columns)[0][0, :, : like.shape[1]] * weight


def _slope(images: Tensor, dimages: Tensor, scale: float | Tensor) -> Tensor:
    """dL/dscale = ⟨G, X Yᵀ⟩ = ⟨X, dX⟩ / scale, because S is scale · X Yᵀ."""
    return (images.detach() * dimages).sum() / scale
