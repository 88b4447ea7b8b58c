"""Plausible wrong regions."""

import numpy as np
import torch

from minivlp.regions import patches_touched, region_mask, region_tokens, region_tokens_np
from tests.laws import bug

PIXELS, POINTS = (
    "a_patch_is_touched_when_it_shares_a_pixel",
    "a_box_without_area_touches_the_patch_it_lies_in",
)
LOOP, SLOPES = "equals_the_slow_loop", "gradients_are_the_slopes"


@bug("patches_touched", PIXELS, "Only patches whose centre lies in the box.", rung="plain")
def centres(boxes, patch, height, width):
    y, x = np.mgrid[patch / 2 : height : patch, patch / 2 : width : patch].reshape(2, -1)
    x1, y1, x2, y2 = boxes.T[..., None]
    return (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)


@bug(
    "patches_touched",
    PIXELS,
    "The last column is floor(x2/p): a box that ends at a seam has one too many.",
    rung="plain",
)
def far_edge_included(boxes, patch, height, width):
    more = np.minimum(boxes + np.array([0, 0, 1, 1]), [width, height, width, height])
    return patches_touched(more, patch, height, width)


@bug(
    "patches_touched",
    PIXELS,
    "The last column is floor(x2/p) − 1: what is touched in part is lost.",
    rung="plain",
)
def part_is_not_enough(boxes, patch, height, width):
    return patches_touched(np.concatenate([boxes[:, :2], boxes[:, 2:] // patch * patch], 1).clip(
        np.tile(boxes[:, :2], 2)), patch, height, width)  # fmt: skip


@bug("patches_touched", PIXELS, "x counts rows and y columns.", rung="plain")
def axes_swapped(boxes, patch, height, width):
    inside = patches_touched(boxes[:, [1, 0, 3, 2]], patch, width, height)
    return inside.reshape(len(boxes), -1)


@bug("patches_touched", PIXELS, "Patches in column-major order.", rung="plain")
def columns_first(boxes, patch, height, width):
    inside = patches_touched(boxes, patch, height, width).reshape(-1, height // patch, width // patch)
    return inside.swapaxes(1, 2).reshape(len(boxes), -1)


@bug("patches_touched", POINTS, "A box without area at a seam touches nothing.", rung="plain")
def nothing_at_a_seam(boxes, patch, height, width):
    low, high = boxes[:, :2] // patch, -(-boxes[:, 2:] // patch)
    inside = patches_touched(boxes, patch, height, width)
    return inside & (low < high).all(1, keepdims=True)


@bug("region_tokens", LOOP, "The mean of all patches of the picture.")
def mean_of_the_picture(patches, inside):
    return torch.cat([patches.mean(1, keepdim=True), region_tokens(patches, inside)[:, 1:]], 1)


@bug("region_tokens", LOOP, "The mean counts the padding.")
def mean_with_padding(patches, inside):
    tokens = region_tokens(patches, inside)[:, 1:]
    return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


@bug("region_tokens", LOOP, "The mean comes last, after the padding.")
def mean_last(patches, inside):
    return region_tokens(patches, inside).roll(-1, 1)


@bug("region_tokens", LOOP, "Patches in the reverse order.")
def backwards(patches, inside):
    tokens = region_tokens(patches, inside)
    back = region_tokens(patches.flip(1), inside.flip(1))
    return torch.cat([tokens[:, :1], back[:, 1:]], 1)


@bug("region_tokens", LOOP, "The places after the last patch keep what the sort left there.")
def padding_is_not_zero(patches, inside):
    order = (~inside).int().argsort(dim=1, stable=True)[:, : int(inside.sum(1).max())]
    rest = patches.gather(1, order[..., None].expand(-1, -1, patches.shape[-1]))
    tokens = region_tokens(patches, inside)
    return torch.cat([tokens[:, :1], torch.where(region_mask(inside)[:, 1:, None], tokens[:, 1:], rest)], 1)


@bug("region_tokens", LOOP, "Patches stay in their places, the others set to zero: longer than the region.")
def in_place(patches, inside):
    mean = region_tokens(patches, inside)[:, :1]
    return torch.cat([mean, patches.masked_fill(~inside[..., None], 0)], 1)


@bug("region_tokens", SLOPES, "The mean is cut from the graph.")
def mean_detached(patches, inside):
    tokens = region_tokens(patches, inside)
    return torch.cat([tokens[:, :1].detach(), tokens[:, 1:]], 1)


@bug("region_tokens", SLOPES, "The share of the mean goes to each patch whole.", rung="np")
def gradient_of_the_sum(patches, inside, grad=None):
    tokens, _ = region_tokens_np(patches, inside)
    G = np.ones_like(tokens) if grad is None else np.array(grad)
    G[:, 0] *= inside.sum(1)[:, None]
    return tokens, region_tokens_np(patches, inside, G)[1]


@bug("region_tokens", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(patches, inside, grad=None):
    return region_tokens_np(patches, inside)
