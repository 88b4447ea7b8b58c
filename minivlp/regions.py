"""Regions: a part of a picture as a short sequence of tokens, so that a phrase can be learned with its box.

A caption of a whole picture leaves open which patches it speaks of; a phrase with a box does not. The image
encoder runs once over the picture, and a region takes its tokens from the encoder's output. With P the set of
patches that the box touches, in row-major order:

    region = [ 1/|P| Σ_{n∈P} patch_n ; patch_n for n in P ],

the mean first, where a class token would stand, and zeros after the last patch up to the longest region of
the batch, with a mask that is False there. The box of the whole picture gives the representation of the
picture, so images and regions go through the same code.

Gradient: d patch_n = G_n + G_mean / |P| for n in P, 0 outside, G_n the gradient at the place that n moved to.

Rungs (R regions of N patches, at most K of them inside):
    patches_touched     one comparison of each box with each row and column of patches; no gradient
    region_tokens_np    a loop over regions; gradients by hand
    region_tokens       one stable sort and one gather of (R, K, D)

Sources: Zeng, Zhang and Li 2022 (X-VLM), section 3.2: the mean, then the patches, as with Swin.
Left out: running the last layers again with attention limited to the box, as its ViT variant does.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import working, working_np


def patches_touched(boxes: np.ndarray, patch: int, height: int, width: int) -> np.ndarray:
    """Which patches of a picture a box touches: (R, N) bool, patches row-major.

    boxes (R, 4) corners x1 y1 x2 y2 in pixels, inside the picture of height × width pixels, both multiples of
    `patch`. Columns floor(x1/p) to ceil(x2/p) − 1 and rows likewise; a box without area touches the patch
    that it lies in. Raises ValueError for bad shapes, swapped corners, boxes that reach outside, and NaN.
    """
    require.shapes(np.ndarray, boxes=(boxes, "R 4"))
    if patch < 1 or height < patch or width < patch or height % patch or width % patch:
        require.fail("patch", f"must divide the height and width {height} × {width}", patch)
    corners = boxes.astype(np.float64)  # what is unsigned has no −x
    low, high, ends = corners[:, :2], corners[:, 2:], np.array([width, height])
    if not ((low >= 0) & (low <= high) & (high <= ends)).all():
        rule = f"must have 0 ≤ x1 ≤ x2 ≤ {width} and 0 ≤ y1 ≤ y2 ≤ {height}"
        wrong = boxes[~((low >= 0) & (low <= high) & (high <= ends)).all(1)][0]
        require.fail("boxes", rule, wrong.tolist())
    first = np.minimum(low // patch, ends // patch - 1)  # a corner on the far edge lies in the last patch
    beyond = np.maximum(-(-high // patch), first + 1)  # at least one patch
    columns, rows = (np.arange(end // patch) for end in ends)
    across = (first[:, :1] <= columns) & (columns < beyond[:, :1])  # (R, columns)
    down = (first[:, 1:] <= rows) & (rows < beyond[:, 1:])  # (R, rows)
    return (down[:, :, None] & across[:, None, :]).reshape(len(boxes), len(rows) * len(columns))


def _check(library, patches, inside) -> None:
    require.shapes(library, patches=(patches, "R N D"), inside=(inside, "R N"))
    require.floats(patches=patches)
    require.mask("inside", inside, whole_rows=True)


def region_tokens_np(patches: np.ndarray, inside: np.ndarray, grad: np.ndarray | None = None):
    """Regions as tokens and the gradient by hand.

    patches (R, N, D), inside (R, N) bool with a True in every row; grad (R, 1+K, D) the upstream gradient
    (None = ones), K the most patches of a region. Returns `(tokens (R, 1+K, D), (d patches,))`, zeros where
    `region_mask` is False. Raises ValueError on bad shapes, dtypes, NaN, infinities and a region without
    patches.
    """
    _check(np.ndarray, patches, inside)
    (patches,), (R, _, D) = working_np(patches), patches.shape
    tokens = np.zeros((R, 1 + inside.sum(1).max(initial=0), D), patches.dtype)
    G = np.ones_like(tokens) if grad is None else grad
    dpatches = np.zeros_like(patches)
    for r, touched in enumerate(inside):
        region = patches[r, touched]  # (n, D), in order
        tokens[r, 0], tokens[r, 1 : 1 + len(region)] = region.mean(0), region
        # A patch is copied to its place, and is 1/n of the mean.
        dpatches[r, touched] = G[r, 1 : 1 + len(region)] + G[r, 0] / len(region)
    return tokens, (dpatches,)


def region_tokens(patches: Tensor, inside: Tensor) -> Tensor:
    """Regions as tokens: patches (R, N, D), inside (R, N) bool → (R, 1+K, D); see `region_tokens_np`."""
    _check(Tensor, patches, inside)
    count = inside.sum(1)  # (R,)
    K = int(count.max()) if len(count) else 0
    order = (~inside).int().argsort(dim=1, stable=True)[:, :K]  # patches inside first, in their order
    packed = patches.gather(1, order[..., None].expand(-1, -1, patches.shape[-1]))  # (R, K, D)
    packed = packed.masked_fill(~region_mask(inside)[:, 1:, None], 0)
    (whole,) = working(packed)
    mean = whole.sum(1, keepdim=True) / count[:, None, None].to(whole.dtype)  # (R, 1, D)
    return torch.cat([mean.to(packed.dtype), packed], 1)


def region_mask(inside: Tensor) -> Tensor:
    """Which tokens of `region_tokens` are real: inside (R, N) bool → (R, 1+K) bool, the mean always."""
    count = inside.sum(1, keepdim=True)  # (R, 1)
    K = int(count.max()) if len(count) else 0
    return torch.arange(1 + K, device=inside.device) <= count


RUNGS = {
    "patches_touched": {"plain": patches_touched},
    "region_tokens": {"np": region_tokens_np, "torch": region_tokens},
}
