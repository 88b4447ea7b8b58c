"""RandAugment: change a picture by random operations of one strength, so that no two epochs look the same.

ViLT fine-tunes with n = 2 operations of strength M = 9 on a scale of 30. Each operation has a range [low,
high] and takes the value

    value = M / 30 · (high − low) + low.

Operations are drawn with replacement. Rotation, shears and translations (SIGNED) take the negative value with
probability one half; pixels that come in from outside are black.

Two operations of the original list are left out, as in ViLT: Invert, because captions name colours, and
Cutout, because it can hide a small object that the caption names. For the first reason M starts at 1: at M =
0 Solarize would be Invert. A trace remains: at M = 9 Solarize inverts every value from 77 on, so a colour
that a caption names may change. Solarize and Posterize grow weaker as M grows, M = 9 leaves Posterize one
bit, and Color, Contrast, Brightness and Sharpness change nothing at M = 15.

Two decisions. ViLT's translation of at most 100 pixels suits a short side of 384 or more; on a smaller
picture it shrinks with the short side (× short side / 384), or at M = 9 it would push a 48-pixel scene half
out of view. And SolarizeAdd changes the values below 128 only, its first definition; a widespread PyTorch
port adds to all values and then inverts from 128 on, which brings back what leaving out Invert was to avoid.

Nothing is mirrored, so "left of" stays true. Boxes do not move along: leave pictures alone whose boxes count.

Sources: Cubuk et al. 2020 (RandAugment), section 3; Kim, Son and Kim 2021 (ViLT), section 3.4.
Left out: magnitudes that are themselves random or change during training.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from minivlp.core.require import fail


def auto_contrast(image: Image.Image, _: float) -> Image.Image:
    """Stretch each channel so that it spans 0…255; the value is not used."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, _: float) -> Image.Image:
    """Flatten the histogram of each channel; the value is not used."""
    return ImageOps.equalize(image)


def posterize(image: Image.Image, bits: float) -> Image.Image:
    """Keep the whole number of upper bits of each channel, at least one."""
    return ImageOps.posterize(image, max(1, int(bits)))


def solarize_add(image: Image.Image, addition: float) -> Image.Image:
    """Add the whole part of `addition` to the values below 128."""
    return image.point([v + int(addition) if v < 128 else v for v in range(256)] * len(image.getbands()))


def enhance(kind: type, image: Image.Image, factor: float) -> Image.Image:
    """Move towards the picture that this kind compares with (factor < 1), or away from it (> 1)."""
    return kind(image).enhance(factor)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Output pixel (x, y) shows input pixel (a·x + b·y + c, d·x + e·y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def shear_x(image: Image.Image, slope: float) -> Image.Image:
    """Row y moves left by slope · y."""
    return _affine(image, 1, slope, 0, 0, 1, 0)


def shear_y(image: Image.Image, slope: float) -> Image.Image:
    """Column x moves up by slope · x."""
    return _affine(image, 1, 0, 0, slope, 1, 0)


def _pixels(image: Image.Image, value: float) -> float:
    """A distance meant for a short side of 384 pixels, made smaller for a smaller picture."""
    return value * min(1.0, min(image.size) / 384)


def translate_x(image: Image.Image, pixels: float) -> Image.Image:
    """Move left by `pixels`, in proportion less when the short side is under 384."""
    return _affine(image, 1, 0, _pixels(image, pixels), 0, 1, 0)


def translate_y(image: Image.Image, pixels: float) -> Image.Image:
    """Move up by `pixels`, in proportion less when the short side is under 384."""
    return _affine(image, 1, 0, 0, 0, 1, _pixels(image, pixels))


# name → (function of an RGB picture and a value, low, high)
OPERATIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, float]] = {
    "AutoContrast": (auto_contrast, 0, 1),
    "Equalize": (equalize, 0, 1),
    "Rotate": (Image.Image.rotate, 0, 30),  # degrees counter-clockwise, about the centre
    "Posterize": (posterize, 0, 4),  # bits kept
    "Solarize": (ImageOps.solarize, 0, 256),  # values from here on are inverted: v → 255 − v
    "SolarizeAdd": (solarize_add, 0, 110),
    "Color": (partial(enhance, ImageEnhance.Color), 0.1, 1.9),  # compares with the grey picture
    "Contrast": (partial(enhance, ImageEnhance.Contrast), 0.1, 1.9),  # compares with the mean grey
    "Brightness": (partial(enhance, ImageEnhance.Brightness), 0.1, 1.9),  # compares with black
    "Sharpness": (partial(enhance, ImageEnhance.Sharpness), 0.1, 1.9),  # compares with a smoothed picture
    "ShearX": (shear_x, 0, 0.3),
    "ShearY": (shear_y, 0, 0.3),
    "TranslateXabs": (translate_x, 0, 100),  # pixels of a picture with a short side of 384
    "TranslateYabs": (translate_y, 0, 100),
}
SIGNED = frozenset({"Rotate", "ShearX", "ShearY", "TranslateXabs", "TranslateYabs"})


def magnitude(name: str, m: float) -> float:
    """The value of an operation at strength m: m / 30 · (high − low) + low, before any change of sign."""
    _, low, high = OPERATIONS[name]
    return m / 30 * (high - low) + low


def rand_augment(
    image: Image.Image | np.ndarray, rng: np.random.Generator, n: int = 2, m: float = 9
) -> Image.Image | np.ndarray:
    """Apply n random operations of strength m to one picture; equal generators give equal pictures.

    image: a Pillow picture of mode RGB, or (H, W, 3) uint8; the same kind and size comes back and the input
    is left as it was. Raises ValueError for another mode, shape or dtype, n < 0, or m outside [1, 30].
    """
    if n < 0 or n != int(n):
        fail("n", "must be a whole number ≥ 0", n)
    if not 1 <= m <= 30:
        fail("m", "must lie in [1, 30]", m)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            fail("image", "must be (H, W, 3) uint8", f"{image.shape} {image.dtype}")
        return np.array(rand_augment(Image.fromarray(image), rng, n, m))
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        fail("image", "must be RGB", getattr(image, "mode", type(image).__name__))
    names = tuple(OPERATIONS)
    image = image.copy()
    for _ in range(n):
        name = names[rng.integers(len(names))]
        flip = name in SIGNED and rng.random() < 0.5
        image = OPERATIONS[name][0](image, -magnitude(name, m) if flip else magnitude(name, m))
    return image
