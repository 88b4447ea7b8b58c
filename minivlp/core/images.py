"""A Pillow picture as its pixels are meant: upright, three channels of 8 bits, transparent parts on white.

A picture is turned upright by its EXIF orientation, 16-bit grey keeps its upper 8 bits, and grey, palette
and CMYK become RGB by Pillow's formulas, without colour profiles. Of an animation the first frame counts.
Metadata that cannot be read is passed over: the pixels may be good.
"""

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minivlp.core.require import fail


def upright_rgb(image: Image.Image) -> np.ndarray:
    """A picture of any mode → (H, W, 3) uint8 RGB; the picture itself is left as it was.

    Raises ValueError for a mode whose range of brightness is not known, and what Pillow raises on a bad file.
    """
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises errors of many kinds on damaged metadata, SyntaxError among them
        image = image.copy()
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        # Pillow would clip these modes at 255; a 16-bit file has a known range, the others do not.
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"mode {image.mode} without a known range of brightness")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def square_pixels(path: str | os.PathLike, side: int, rule: str = "must be a file with a picture") -> Tensor:
    """A picture file, squeezed into a square: pixels (1, 3, side, side) in [−1, 1].

    Raises ValueError, which says `rule`, for a file that is no picture.
    """
    try:
        with Image.open(path) as image:
            rgb = upright_rgb(image)
    except (OSError, ValueError) as error:
        fail("picture", rule, f"{path} ({error})")
    small = np.array(Image.fromarray(rgb).resize((side, side), Image.Resampling.BOX))
    return torch.from_numpy(small).permute(2, 0, 1)[None].float().div(127.5).sub(1)
