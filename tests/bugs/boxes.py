"""Plausible wrong GIoUs and box losses."""

import numpy as np
import torch

from minivlp.boxes import box_loss, box_loss_np, cxcywh_to_xyxy, giou, giou_np
from tests.laws import bug

CELLS, DEGENERATE = "equals_counting_cells", "a_box_without_area_spoils_only_itself"
SLOPES, SHARED, SINGLE_GIOU = "gradients_are_the_slopes", "a_shared_edge_counts_once", "float32_is_enough"
SWAPPED, SWAPPED_SLOPES = "swapped_corners_enclose_nothing", "gradients_of_swapped_corners_are_the_slopes"
EQUAL, LOSS_SINGLE = "equal_numbers_have_no_difference", "float32_is_enough_for_the_loss"
DEFINITION, SINGLE = "equals_the_definition", "is_the_mean_of_the_losses_of_single_boxes"
EMPTY, LOSS_SLOPES = "no_box_costs_nothing", "gradients_are_the_slopes_of_the_loss"


def areas(a, b, cut=True):
    """Intersection, union and enclosing area; `cut` = False lets a negative extent through."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inner = (high - low).clamp_min(0) if cut else high - low
    I = inner.prod(-1)
    U = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - I
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    return I, U, (high - low).prod(-1)


@bug("giou", CELLS, "IoU alone: 0 for all disjoint boxes, near or far.")
def overlap_only(a, b):
    I, U, _ = areas(a, b)
    return I / U


@bug("giou", CELLS, "The intersection is not cut off at 0: two negative extents make a positive area.")
def negative_extents(a, b):
    I, U, C = areas(a, b, cut=False)
    return I / U - (C - U) / C


@bug("giou", CELLS, "The empty part is divided by the union, not by the enclosing box.")
def over_the_union(a, b):
    I, U, C = areas(a, b)
    return I / U - (C - U) / U


@bug("giou", CELLS, "Corners are pixels, both ends included: one is added to every side.")
def inclusive_pixels(a, b):
    one = torch.tensor([0.0, 0, 1, 1], dtype=a.dtype)
    return giou(a + one, b + one)


@bug("giou", CELLS, "A distance, 1 − GIoU.")
def distance(a, b):
    return 1 - giou(a, b)


@bug("giou", CELLS, "A small number in the denominators: equal boxes are not quite equal.")
def smoothed(a, b):
    I, U, C = areas(a, b)
    return I / (U + 1e-7) - (C - U) / (C + 1e-7)


@bug("giou", DEGENERATE, "0/0 is left as it is: NaN.")
def not_a_number(a, b):
    I, U, C = areas(a, b)
    return I / U - (C - U) / C


@bug("giou", DEGENERATE, "The value is repaired by one where, the gradient behind it is still NaN.")
def nan_gradient(a, b):
    I, U, C = areas(a, b)
    return torch.where(U > 0, I / U, 0) - torch.where(C > 0, (C - U) / C, 0)


@bug("giou", DEGENERATE, "One box without area, and the whole batch counts as 0.")
def all_or_nothing(a, b):
    empty = (a[..., 2:] <= a[..., :2]).any() | (b[..., 2:] <= b[..., :2]).any()
    return giou(a, b) * (~empty)


@bug("giou", SLOPES, "The gradient forgets that the union contains the intersection.", rung="np")
def union_held_fixed(a, b, grad=None):
    value, _ = giou_np(a, b, grad)
    ta, tb = (torch.from_numpy(z).requires_grad_() for z in (a, b))
    I, U, C = areas(ta, tb)
    out = I / U.detach() + U.detach() / C
    weight = torch.ones_like(out) if grad is None else torch.from_numpy(grad)
    da, db = torch.autograd.grad(out, (ta, tb), weight)
    return value, (da.numpy(), db.numpy())


@bug("giou", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(a, b, grad=None):
    return giou_np(a, b)


@bug("box_loss", DEFINITION, "GIoU is taken of centres and sizes as if they were corners.")
def no_corners(pred, target):
    overlap = giou(pred, target)
    return ((pred - target).abs().sum() + (1 - overlap).sum()) / max(len(pred), 1)


@bug("box_loss", DEFINITION, "The mean of the four differences in place of their sum.")
def mean_of_four(pred, target):
    overlap = giou(cxcywh_to_xyxy(pred), cxcywh_to_xyxy(target))
    return ((pred - target).abs().sum() / 4 + (1 - overlap).sum()) / max(len(pred), 1)


@bug("box_loss", DEFINITION, "GIoU is added, not 1 − GIoU: the loss rewards boxes that miss.")
def rewards_missing(pred, target):
    overlap = giou(cxcywh_to_xyxy(pred), cxcywh_to_xyxy(target))
    return ((pred - target).abs().sum() + overlap.sum()) / max(len(pred), 1)


@bug("box_loss", DEFINITION, "A sum over boxes: the loss grows with the batch.")
def sum_over_boxes(pred, target):
    return box_loss(pred, target) * len(pred)


@bug("box_loss", DEFINITION, "Squared differences.")
def squared(pred, target):
    return box_loss(pred, target) + ((pred - target) ** 2 - (pred - target).abs()).sum() / max(len(pred), 1)


@bug("box_loss", SINGLE, "One box without area switches the GIoU term off for the whole batch.")
def all_or_nothing_loss(pred, target):
    if bool((pred[:, 2:] <= 0).any() or (target[:, 2:] <= 0).any()):
        return (pred - target).abs().sum() / max(len(pred), 1)
    return box_loss(pred, target)


@bug("box_loss", EMPTY, "The mean of no box at all: NaN.")
def mean_of_nothing(pred, target):
    overlap = giou(cxcywh_to_xyxy(pred), cxcywh_to_xyxy(target))
    return ((pred - target).abs().sum(-1) + 1 - overlap).mean()


@bug("box_loss", LOSS_SLOPES, "GIoU is only measured, the gradient comes from the differences alone.")
def detached_overlap(pred, target):
    absolute = (pred - target).abs().sum() / max(len(pred), 1)
    return absolute + (box_loss(pred, target) - absolute).detach()


@bug("box_loss", LOSS_SLOPES, "A size moves each corner by half of itself; the half is forgotten.", rung="np")
def half_forgotten(pred, target):
    value, grads = box_loss_np(pred, target)
    side = np.sign(pred - target) / max(len(pred), 1)
    slopes = (g - s for g, s in zip(grads, (side, -side), strict=True))  # of 1 − GIoU alone
    return value, tuple(g * [1, 1, 2, 2] + s for g, s in zip(slopes, (side, -side), strict=True))


def own_areas(a, b, area):
    """GIoU with another area of a single box."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    I = (high - low).clamp_min(0).prod(-1)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    C, U = (high - low).clamp_min(0).prod(-1), area(a) + area(b) - I

    def ratio(top, bottom):
        return torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1), 0)

    return ratio(I, U) - ratio(C - U, C)


@bug("giou", SWAPPED, "A box's own area is not cut off at 0: swapped twice it is an area again.")
def two_negatives(a, b):
    return own_areas(a, b, lambda z: (z[..., 2:] - z[..., :2]).prod(-1))


@bug("giou", SWAPPED, "Swapped corners are put right in silence.")
def sorted_corners(a, b):
    a, b = (
        torch.cat([torch.minimum(z[..., :2], z[..., 2:]), torch.maximum(z[..., :2], z[..., 2:])], -1)
        for z in (a, b)
    )
    return giou(a, b)


@bug("giou", SWAPPED_SLOPES, "The slope of an extent that is cut off is kept.", rung="np")
def slope_of_a_cut_extent(a, b, grad=None):
    value, (da, db) = giou_np(a, b, grad)
    ta, tb = (torch.from_numpy(z).requires_grad_() for z in (a, b))

    def area(z):
        extent = z[..., 2:] - z[..., :2]
        return (extent.clamp_min(0) + (extent - extent.detach()) * (extent < 0)).prod(-1)

    out = own_areas(ta, tb, area)
    weight = torch.ones_like(out) if grad is None else torch.from_numpy(grad)
    da, db = torch.autograd.grad(out, (ta, tb), weight)
    return value, (da.numpy(), db.numpy())


@bug("giou", SHARED, "A shared edge is given to both boxes.", rung="np")
def edge_given_to_both(a, b, grad=None):
    value, (da, db) = giou_np(a, b, grad)
    _, (eb, ea) = giou_np(b, a, grad)  # here b takes what both share
    shared = a == b
    return value, (
        np.where(shared, np.where(np.abs(ea) > np.abs(da), ea, da), da),
        np.where(shared, np.where(np.abs(eb) > np.abs(db), eb, db), db),
    )


@bug("giou", SHARED, "A shared edge is given to neither box: > where ≥ belongs.", rung="np")
def edge_given_to_neither(a, b, grad=None):
    value, (da, db) = giou_np(a, b, grad)
    return value, (da * (a != b), db * (a != b))


@bug("giou", SINGLE_GIOU, "Computed in float64 and left there.")
def computed_in_float64(a, b):
    return giou(a.double(), b.double())


@bug("box_loss", EQUAL, "The sign of 0 is taken for 1: a number that is right is still pulled.", rung="np")
def no_zero_sign(pred, target):
    value, (dpred, dtarget) = box_loss_np(pred, target)
    off = (pred == target) / max(len(pred), 1)
    return value, (dpred + off, dtarget - off)


@bug("box_loss", LOSS_SINGLE, "Computed in float64 and left there.")
def loss_in_float64(pred, target):
    return box_loss(pred.double(), target.double())
