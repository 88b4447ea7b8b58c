"""Boxes: the loss that teaches a model to point, L1 for the coordinates and GIoU for the overlap.

    GIoU(a, b) = I/U − (C − U)/C,        loss = mean over boxes of Σ₄ |pred − target| + 1 − GIoU,

with I the area of the intersection, U = A + B − I the area of the union and C the area of the smallest box
around both. IoU is 0 for every pair of disjoint boxes; the second term still measures their distance. GIoU
lies in [−1, 1] and is 1 only for equal boxes. A ratio 0/0, of boxes without area, counts as 0 with gradient
0, so that a degenerate box affects no term but its own.

Gradient: GIoU = I/U + U/C − 1, and every area is a product of two extents whose ends are corners of a or b.

Rungs (n boxes):
    giou_np, box_loss_np    corners, areas, and the chain rule through them; O(n)
    giou, box_loss          the same by autograd; elementwise, never all n × n pairs

Sources: Rezatofighi et al. 2019 (GIoU), algorithm 1; Zeng, Zhang and Li 2022 (X-VLM), box prediction.
Left out: weights other than 1 : 1 between the two terms, and the matching of predictions to boxes, because
grounding has one box for each phrase.
"""

import math

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import working, working_np


def cxcywh_to_xyxy(boxes):
    """Boxes (…, 4) as centre and size → two opposite corners. Takes NumPy arrays and torch tensors."""
    require.shapes(boxes=(boxes, "… 4"))
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return _join(centre - half, centre + half)


def xyxy_to_cxcywh(boxes):
    """The inverse of `cxcywh_to_xyxy`."""
    require.shapes(boxes=(boxes, "… 4"))
    low, high = boxes[..., :2], boxes[..., 2:]
    return _join((low + high) / 2, high - low)


def _join(first, second):
    return (torch.cat if isinstance(first, Tensor) else np.concatenate)([first, second], -1)


def _check(library, a, b) -> None:
    require.shapes(library, a=(a, "… 4"), b=(b, "… 4"))
    require.floats(a=a, b=b)
    if a.shape != b.shape:
        require.fail("b", f"must have the shape {tuple(a.shape)} of a", tuple(b.shape))


def _check_loss(library, pred, target) -> None:
    require.shapes(library, pred=(pred, "n 4"), target=(target, "n 4"))
    require.floats(pred=pred, target=target)
    if bool((abs(target - 0.5) > 0.5 + 1e-5).any()):
        got = f"an entry {abs(target - 0.5).max().item():.3g} away from the middle"
        require.fail("target", "must be fractions of the image in [0, 1]", got)


def _unit(a, b, library):
    """Powers of two (…, 4), by which boxes a and b (…, 4) are multiplied so that no area leaves the range.

    In each axis the box around both gets a size near 1. GIoU is the same in any unit.
    """
    low, high = library.minimum(a[..., :2], b[..., :2]), library.maximum(a[..., 2:], b[..., 2:])
    around = high / 2 - low / 2  # (…, 2), halved, as the whole may be outside the range itself
    smallest = int(math.log2(library.finfo(around.dtype).tiny))  # 2 ** −smallest is still a number
    exponent = library.frexp(around)[1].clip(smallest)
    unit = library.ldexp(library.ones_like(around), -exponent)
    return _join(unit, unit)


def _area_np(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The area between corners (…, 2), 0 if swapped, and its gradient in `high`; in `low` it is minus."""
    extent = np.maximum(high - low, 0)  # (…, 2)
    # area = w · h, so d area / d w = h, and w = x₂ − x₁ unless it was cut off at 0.
    return extent.prod(-1), extent[..., ::-1] * (high >= low)


def _ratio_np(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), 0)


def giou_np(a: np.ndarray, b: np.ndarray, grad: np.ndarray | None = None):
    """GIoU of boxes a and b (…, 4) as corners x₁ y₁ x₂ y₂, pair by pair, and its gradients by hand.

    grad (…) is the upstream gradient (None = ones). A box with swapped corners has no area. Returns `(value
    (…) in [−1, 1], (d a, d b))`. Raises ValueError on bad or different shapes, mixed dtypes, NaN or
    infinities.
    """
    _check(np.ndarray, a, b)
    a, b = working_np(a, b)
    unit = _unit(a, b, np)
    (a_low, a_high), (b_low, b_high) = (
        (z[..., :2] * unit[..., :2], z[..., 2:] * unit[..., 2:]) for z in (a, b)
    )
    A, dA = _area_np(a_low, a_high)
    B, dB = _area_np(b_low, b_high)
    I, dI = _area_np(np.maximum(a_low, b_low), np.minimum(a_high, b_high))
    C, dC = _area_np(np.minimum(a_low, b_low), np.maximum(a_high, b_high))
    U = A + B - I
    value = _ratio_np(I, U) - _ratio_np(C - U, C)
    G = np.ones_like(value) if grad is None else np.asarray(grad)
    # value = I/U − 1 + U/C, hence ∂U = −I/U² + 1/C and ∂C = −U/C². U = A + B − I: A and B receive ∂U, and I
    # receives 1/U − ∂U.
    to_U = G * (_ratio_np(np.ones_like(C), C) - _ratio_np(_ratio_np(I, U), U))
    to_C = -G * _ratio_np(_ratio_np(U, C), C)
    to_I = G * _ratio_np(np.ones_like(U), U) - to_U
    dA, dB, dI, dC = (slope * to[..., None] for slope, to in ((dA, to_U), (dB, to_U), (dI, to_I), (dC, to_C)))
    # A corner of the intersection or of the enclosing box is a corner of a or of b, and its gradient goes
    # there, to a when the two are equal. High corners receive plus, low corners minus the gradient of the
    # area.
    inner, outer = a_high <= b_high, a_high >= b_high
    a_from_high, b_from_high = dA + dI * inner + dC * outer, dB + dI * ~inner + dC * ~outer
    inner, outer = a_low >= b_low, a_low <= b_low
    a_from_low, b_from_low = dA + dI * inner + dC * outer, dB + dI * ~inner + dC * ~outer
    return value, (unit * _join(-a_from_low, a_from_high), unit * _join(-b_from_low, b_from_high))


def _area(low: Tensor, high: Tensor) -> Tensor:
    extent = (high - low).clamp_min(0)  # (…, 2)
    return extent[..., 0] * extent[..., 1]


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    # The inner where keeps the division finite, so that no NaN hides in the gradient behind the outer one.
    return torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1), 0)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes a and b (…, 4) as corners → (…), pair by pair; arguments and errors as in `giou_np`."""
    _check(Tensor, a, b)
    x, y = working(a, b)  # C − U cancels
    unit = _unit(x.detach(), y.detach(), torch)
    (a_low, a_high), (b_low, b_high) = (x * unit).split(2, -1), (y * unit).split(2, -1)
    # where, not minimum and maximum, which split the gradient of equal corners; here a takes all of it.
    I = _area(torch.where(a_low >= b_low, a_low, b_low), torch.where(a_high <= b_high, a_high, b_high))
    C = _area(torch.where(a_low <= b_low, a_low, b_low), torch.where(a_high >= b_high, a_high, b_high))
    U = _area(a_low, a_high) + _area(b_low, b_high) - I
    return (_ratio(I, U) - _ratio(C - U, C)).to(a.dtype)


def box_loss_np(pred: np.ndarray, target: np.ndarray):
    """L1 plus GIoU loss of pred and target (n, 4), centre and size in fractions of the image; gradients too.

    Returns `(value ≥ 0, (d pred, d target))`; 0 with zero gradients for n = 0. Raises ValueError on bad
    shapes, mixed dtypes, NaN, infinities, and targets outside [0, 1].
    """
    _check_loss(np.ndarray, pred, target)
    (p, t), n = working_np(pred, target), max(len(pred), 1)
    overlap, corners = giou_np(cxcywh_to_xyxy(p), cxcywh_to_xyxy(t))
    value = (np.abs(p - t).sum() + (1 - overlap).sum()) / n
    # corners = centre ∓ size/2: the centre moves both corners, the size moves them apart, by half each.
    side = np.sign(p - t)
    grads = []
    for sign, corner in zip((1, -1), corners, strict=True):
        low, high = corner[..., :2], corner[..., 2:]
        grads.append((sign * side - _join(low + high, (high - low) / 2)) / n)
    return require.loss(value, pred=pred), tuple(grads)


def box_loss(pred: Tensor, target: Tensor) -> Tensor:
    """L1 plus GIoU loss of pred and target (n, 4) → scalar; arguments and errors as in `box_loss_np`."""
    _check_loss(Tensor, pred, target)
    p, t = working(pred, target)
    overlap = giou(cxcywh_to_xyxy(p), cxcywh_to_xyxy(t))  # (n,)
    return require.loss(((p - t).abs().sum() + (1 - overlap).sum()) / max(len(p), 1), pred=pred)


RUNGS = {"giou": {"np": giou_np, "torch": giou}, "box_loss": {"np": box_loss_np, "torch": box_loss}}
