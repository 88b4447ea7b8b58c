"""Paint EmojiVL drawings on a mid-tone background, fast enough never to hold training back.

A background is one colour with a linear gradient along x and along y. A drawing covers it by its alpha:

    pixel ← (1 − α) · pixel + α · colour · gain,       one gain per colour channel and object.

A picture in the making is (H, W·3) float32, the three channels of a pixel side by side: NumPy is slow on
arrays whose last axis has only three entries. Drawings are scaled once per size, stored as α · colour and
1 − α per pixel and channel, and the most recently used are kept, up to CACHE_BYTES.

Sources: Porter and Duff 1984 (compositing with premultiplied alpha).
Left out: rotation, mirroring (left must stay left), shadows, blur.
"""

from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

from minivlp.data.emojivl import EmojiVL

CACHE_BYTES = 2**27
Square = tuple[int, int, int]  # x, y, side
Box = tuple[int, int, int, int]  # x1, y1, x2, y2


class Painter:
    """Paints pictures of canvas × canvas pixels; `largest` is the side of the largest drawing, in pixels."""

    def __init__(self, emojivl: EmojiVL, canvas: int, largest: float):
        self.emojivl, self.canvas = emojivl, canvas
        self._ramp = np.linspace(-0.5, 0.5, canvas, dtype=np.float32)
        self._channel = np.arange(3 * canvas) % 3  # of each number in a row of the picture
        bytes_each = 2 * 3 * 4 * largest**2
        self._sprite = lru_cache(maxsize=int(CACHE_BYTES / bytes_each))(self._cut)

    def background(self, rng: Random) -> np.ndarray:
        """A new picture (H, W·3) in mid-tones, 40…210."""
        colours = [[rng.uniform(low, high) for _ in "RGB"] for low, high in ((80, 170), (-40, 40), (-40, 40))]
        base, slope_x, slope_y = np.array(colours, np.float32)[:, self._channel]  # each (W·3,)
        picture = self._ramp[:, None] * slope_y  # (H, W·3)
        picture += base + self._ramp.repeat(3) * slope_x
        return picture

    def gains(self, rng: Random, n: int) -> np.ndarray:
        """The gains of n objects, 0.8…1.2, repeated along a row: (n, W·3)."""
        gains = [[rng.uniform(0.8, 1.2) for _ in "RGB"] for _ in range(n)]
        return np.array(gains, np.float32)[:, self._channel]

    def add(self, picture: np.ndarray, concept: int, artist: str, square: Square, gain: np.ndarray) -> Box:
        """Paint one drawing into the picture, centred in its square; return the box around it."""
        x, y, side = square
        colour, transparency = self._sprite(concept, artist, side)  # each (h, w·3)
        h, w = colour.shape[0], colour.shape[1] // 3
        x, y = x + (side - w) // 2, y + (side - h) // 2
        region = picture[y : y + h, 3 * x : 3 * (x + w)]
        region *= transparency
        region += colour * gain[: 3 * w]
        return x, y, x + w, y + h

    def finished(self, picture: np.ndarray) -> np.ndarray:
        """The picture as (H, W, 3) uint8."""
        np.minimum(picture, 255, out=picture)  # a gain may overshoot; nothing here can be negative
        return picture.astype(np.uint8).reshape(self.canvas, self.canvas, 3)

    def _cut(self, concept: int, artist: str, side: int) -> tuple[np.ndarray, np.ndarray]:
        """α · colour in 0…255 and 1 − α, both (h, w·3), of a drawing cropped to what is visible.

        Its longer side is that of the square, and the margins left and right, or above and below, are equal
        and whole pixels: drawing and square have the same centre.
        """
        tile = Image.fromarray(self.emojivl.sheets[artist][concept])
        visible = tile.getchannel("A").getbbox()
        width, height = visible[2] - visible[0], visible[3] - visible[1]
        margins = (round(side * (1 - d / max(width, height)) / 2) for d in (width, height))
        w, h = (side - 2 * min(margin, (side - 1) // 2) for margin in margins)  # at least one pixel
        small = tile.convert("RGBa").resize((w, h), Image.Resampling.BICUBIC, box=visible)
        rgba = np.asarray(small, dtype=np.float32)  # (h, w, 4)
        colour = rgba[..., :3].reshape(h, 3 * w)
        return colour, 1 - rgba[..., 3].repeat(3, axis=1) / 255
