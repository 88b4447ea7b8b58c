"""Images to ViLT's input: resized, cut to whole patches, padded to one batch, with a mask of what is real.

The shorter side becomes 384 pixels and the longer at most int(384 · 1333/800) = 639; both are rounded, then
lowered to multiples of 32, which changes the aspect ratio a little. So the longest side is 608, and an image
has at most 12 × 19 = 228 patches (the paper says 640 and 240).

Source: the resize and the normalisation of the original code (Kim, Son and Kim 2021, section 4.2).
Left out: the original's mask, a pixel being real where its normalised channels do not sum to 0, which holds
for 8-bit colours but not for others; here the mask is explicit. Augmentation is in augment.py.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlp.core import require
from minivlp.core.images import upright_rgb


def resized(height: int, width: int, size: int = 384, multiple: int = 32) -> tuple[int, int]:
    """The height and width that ViLT gives an image, in pixels; a side that would vanish is refused."""
    sides = [size / min(height, width) * side for side in (height, width)]
    longest = int(1333 / 800 * size)
    if max(sides) > longest:
        sides = [longest / max(sides) * side for side in sides]
    H, W = (int(side + 0.5) // multiple * multiple for side in sides)
    if not H or not W:
        rule = f"must keep {multiple} pixels a side after the resize"
        require.fail("images", rule, f"{height} × {width} → {sides[0]:.0f} × {sides[1]:.0f}")
    return H, W


def vilt_pixels(images: list[Any], size: int = 384, multiple: int = 32) -> tuple[Tensor, Tensor]:
    """Images to ViLT's input: `(pixels (B, 3, H, W), pixel_mask (B, H, W))`.

    Each image, a PIL image of any mode (as core/images.py reads it: upright, transparent parts on white) or a
    uint8 array (H, W, 3), is resized (bicubic) to a shorter side of `size` and a
    longer one of at most 1333/800 of it, both rounded, then cut to multiples of `multiple` by the resize
    itself; numbers go from 0…255 to -1…1; the batch is padded with zeros at the right and the bottom. 384 and
    32 give at most 12 × 19 patches. Raises ValueError for other inputs and for an image so narrow that a side
    would vanish.
    """
    if not images:
        require.fail("images", "must hold at least one image", "none")
    arrays = [_array(image, size, multiple) for image in images]
    H, W = (max(array.shape[axis] for array in arrays) for axis in (0, 1))
    pixels, mask = torch.zeros(len(arrays), 3, H, W), torch.zeros(len(arrays), H, W, dtype=torch.bool)
    for b, array in enumerate(arrays):
        h, w, _ = array.shape
        pixels[b, :, :h, :w] = (torch.from_numpy(array).float() / 255 - 0.5).permute(2, 0, 1) / 0.5
        mask[b, :h, :w] = True
    return pixels, mask


def _array(image: Any, size: int, multiple: int) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            require.fail("images", "must be PIL images or uint8 (H, W, 3)", f"{image.dtype} {image.shape}")
    elif not isinstance(image, Image.Image):
        require.fail("images", "must be PIL images or uint8 (H, W, 3)", type(image).__name__)
    else:
        try:
            image = upright_rgb(image)
        except ValueError as problem:
            raise ValueError(f"images must be pictures whose colours are known, got {problem}") from None
    H, W = resized(*image.shape[:2], size, multiple)
    return np.array(Image.fromarray(image).resize((W, H), Image.Resampling.BICUBIC))
