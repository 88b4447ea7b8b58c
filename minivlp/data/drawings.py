"""Single drawings as training pictures: one object, placed, turned, tinted and lit at random; never mirrored.

Every drawing is first cut to what is visible and centred in a square, so that an artist's margins tell
nothing. Then, all of a batch at once,

    picture ← (1 − α) · background + M (α · colour),        α · colour read at A p + t for each pixel p,

with A a random turn, slant and scale, t a random place and M a random 3 × 3 matrix near the identity. A model
that has seen one drawing so often, and never twice alike, has to hold on to what another artist keeps too.
Some drawings are halfway between those of two artists: a new artist draws one more version of that kind.

Sources: Porter and Duff 1984 (compositing with premultiplied alpha); Zhang et al. 2018 (mixup), for mixing,
here of two drawings of the same thing.
Left out: mirroring (no caption here would mind, but the course keeps left left), blur, occlusion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from minivlp.data.emojivl import EmojiVL

GREY, FILLED = 0.5, 0.92  # of a plain picture: the background, and the object's share of the side


@dataclass(frozen=True)
class Variation:
    """How much drawings vary, in shares of the canvas, radians and otherwise factors.

    Little, on purpose: in a short run strong changes cost more than they bring.
    """

    sides: tuple[float, float] = (0.85, 1.0)
    turn: float = 0.1
    slant: float = 0.05
    stretch: float = 0.08  # of one axis against the other, as a logarithm
    tint: float = 0.05  # deviation of the entries of M
    light: float = 0.1  # of all three channels together
    background: tuple[float, float] = (0.35, 0.65)
    slope: float = 0.1  # of the background across the canvas
    mix: float = 0.3  # probability that two artists' drawings of the thing are mixed


class Portraits:
    """All drawings of a data set at canvas × canvas pixels."""

    def __init__(self, emojivl: EmojiVL, canvas: int):
        self.canvas = canvas
        self.sheets = {artist: _cut_out(sheet, canvas) for artist, sheet in emojivl.sheets.items()}

    def _sprites(self, concepts: Sequence[int], artists: Sequence[str]) -> Tensor:
        """α · colour and α in [0, 1], (B, 4, H, W)."""
        pairs = zip(concepts, artists, strict=True)
        return torch.stack([self.sheets[artist][concept] for concept, artist in pairs]).float() / 255

    def plain(self, concepts: Sequence[int], artists: Sequence[str]) -> Tensor:
        """Drawings in the middle of a grey background: pixels (B, 3, H, W) in [−1, 1], for testing."""
        sprites = self._sprites(concepts, artists)
        theta = torch.eye(2, 3).div(FILLED).repeat(len(sprites), 1, 1)
        return _painted(_placed(sprites, theta), torch.full_like(sprites[:, :3], GREY))

    def varied(
        self,
        concepts: Sequence[int],
        artists: Sequence[str],
        others: Sequence[str],
        rng: np.random.Generator,
        v: Variation,
    ) -> Tensor:
        """Drawings changed at random: pixels (B, 3, H, W) in [−1, 1]; with `others` they may be mixed."""
        B = len(concepts)
        sprites = self._sprites(concepts, artists)
        mixed = np.flatnonzero(rng.random(B) < v.mix)
        share = torch.from_numpy(rng.uniform(0.3, 0.7, (len(mixed), 1, 1, 1))).float()
        if len(mixed):
            second = self._sprites([concepts[i] for i in mixed], [others[i] for i in mixed])
            sprites[mixed] = torch.lerp(sprites[mixed], second, share)
        placed = _placed(sprites, torch.from_numpy(_places(B, rng, v)).float())
        matrix = np.eye(3) * np.exp(rng.normal(0, v.light, (B, 1, 1))) + rng.normal(0, v.tint, (B, 3, 3))
        colours = torch.einsum("bij,bjhw->bihw", torch.from_numpy(matrix).float(), placed[:, :3])
        colours = torch.minimum(colours.clamp_min_(0), placed[:, 3:])  # no brighter than white
        return _painted(torch.cat([colours, placed[:, 3:]], 1), self._backgrounds(B, rng, v))

    def _backgrounds(self, B: int, rng: np.random.Generator, v: Variation) -> Tensor:
        """One colour each with a linear slope along x and along y: (B, 3, H, W)."""
        ramp = torch.linspace(-0.5, 0.5, self.canvas)
        base, across, down = (
            torch.from_numpy(rng.uniform(low, high, (B, 3, 1, 1))).float()
            for low, high in (v.background, (-v.slope, v.slope), (-v.slope, v.slope))
        )
        return (base + across * ramp + down * ramp[:, None]).clamp_(0, 1)


def _places(B: int, rng: np.random.Generator, v: Variation) -> np.ndarray:
    """Affine maps (B, 2, 3) from places in the picture to places in the drawing, both in [−1, 1]."""
    side, turn, slant, stretch = (
        rng.uniform(low, high, B)
        for low, high in (v.sides, (-v.turn, v.turn), (-v.slant, v.slant), (-v.stretch, v.stretch))
    )
    cos, sin, longer = np.cos(turn), np.sin(turn), np.exp(stretch / 2)
    turned = np.array([[cos, sin], [-sin, cos]]).transpose(2, 0, 1)  # (B, 2, 2)
    shaped = np.array([[longer, slant], [np.zeros(B), 1 / longer]]).transpose(2, 0, 1)
    A = shaped @ turned / side[:, None, None]
    room = 1 - side[:, None]  # so far may the centre move before the drawing's edge leaves the canvas
    centre = rng.uniform(-1, 1, (B, 2)) * room
    return np.concatenate([A, -A @ centre[..., None]], axis=2)


def _placed(sprites: Tensor, theta: Tensor) -> Tensor:
    grid = affine_grid(theta, list(sprites.shape), align_corners=False)
    return grid_sample(sprites, grid, align_corners=False)  # zeros, so transparent, outside


def _painted(placed: Tensor, background: Tensor) -> Tensor:
    picture = background * (1 - placed[:, 3:]) + placed[:, :3]
    return picture.clamp_(0, 1).mul_(2).sub_(1)


def _cut_out(sheet: np.ndarray, side: int) -> Tensor:
    """Drawings (n, h, w, 4) uint8 → α · colour and α, (n, 4, side, side) uint8, cut and centred."""
    cut = np.zeros((len(sheet), side, side, 4), np.uint8)
    for out, tile in zip(cut, sheet, strict=True):
        picture = Image.fromarray(tile)
        visible = picture.getchannel("A").getbbox()
        if visible is None:  # this artist did not draw that concept
            continue
        width, height = visible[2] - visible[0], visible[3] - visible[1]
        w, h = (max(1, round(side * d / max(width, height))) for d in (width, height))
        # Cropped first: with `box` the edge would be mixed with what lies beyond it.
        small = picture.crop(visible).convert("RGBa").resize((w, h), Image.Resampling.BICUBIC)
        x, y = (side - w) // 2, (side - h) // 2
        out[y : y + h, x : x + w] = np.asarray(small)
    return torch.from_numpy(cut.transpose(0, 3, 1, 2).copy())
