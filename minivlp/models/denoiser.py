"""A denoiser: the transformer of ViLT reads a caption beside a drowned picture, and predicts the noise in it.

    z  = [patches of x_t + position + level t ; words + position],    every token sees every other one
    v̂  = Linear(LN(blocks(z))) at the patches,                        ε̂ = deviation(t) · x_t + signal(t) · v̂

So the three questions have plain answers: all see all, the noise is predicted, everything learns. What the
network gives is v = signal · ε − deviation · x, which has the same size at every level; ε itself is almost
the input where noise is all there is, and v is turned back into it exactly.

Sources: Ho, Jain and Abbeel 2020 (DDPM) for ε̂; Salimans and Ho 2022, section 4, for v; Peebles and Xie 2023
(DiT) for a transformer over noisy patches and the level's sines and cosines; Bao et al. 2023 (U-ViT) for
conditions that are tokens beside the patches.
Left out: DiT's norms that the level scales, U-nets, a compressed space in place of pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlp.core import require
from minivlp.diffusion import Denoiser as Conditional
from minivlp.diffusion import deviation, signal
from minivlp.models.parts import alike, check_text, sine_cosine_positions
from minivlp.patch import check_pixels, from_patches, patches_a_side, to_patches
from minivlp.transformer import Encoder, key_mask, normal_init


@dataclass(frozen=True)
class DenoiserConfig:
    """The sizes of a denoiser; the defaults are a small one, for a CPU."""

    vocab_size: int = 512
    max_text_len: int = 16  # tokens
    image_size: int = 24  # pixels a side, of every picture
    patch: int = 4
    dim: int = 80
    layers: int = 4
    heads: int = 4
    hidden: int = 160
    waves: int = 16  # sines of the level, and as many cosines
    eps: float = 1e-6

    def __post_init__(self):
        patches_a_side(self.image_size, self.patch)

    @property
    def grid(self) -> int:
        """Rows (and columns) of patches."""
        return patches_a_side(self.image_size, self.patch)


class Denoiser(nn.Module):
    """ε̂(x_t, t, caption). Initial values use torch's default generator."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = c = config
        numbers = 3 * c.patch**2  # of a patch
        self.patch = nn.Linear(numbers, c.dim)
        self.level = nn.Linear(2 * c.waves, c.dim)
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.position = nn.Parameter(torch.empty(c.grid**2, c.dim).normal_(std=0.02))
        self.text_position = nn.Parameter(torch.empty(c.max_text_len, c.dim).normal_(std=0.02))
        self.encoder = Encoder(c.dim, c.heads, c.hidden, c.layers, c.eps)
        self.out = nn.Linear(c.dim, numbers)
        self.apply(normal_init)

    def forward(self, x_t: Tensor, level: Tensor, ids: Tensor, text_mask: Tensor) -> Tensor:
        """The noise in pictures: x_t (B, 3, S, S), level (B,) in [0, 1], ids (B, L), text_mask (B, L) bool.

        → (B, 3, S, S). Raises ValueError on bad shapes, dtypes, NaN, ids outside the vocabulary and levels
        outside [0, 1].
        """
        c = self.config
        L = check_text(ids, text_mask, c.vocab_size, c.max_text_len, "text_mask")
        _, *size = check_pixels(x_t, c.patch)
        if size != [c.image_size] * 2:
            require.fail("x_t", f"must be {c.image_size} × {c.image_size}", tuple(x_t.shape))
        require.shapes(x_t=(x_t, "B 3 H W"), level=(level, "B"), ids=(ids, "B L"))
        if len(level) and not 0 <= float(level.min()) <= float(level.max()) <= 1:
            require.fail("level", "must lie in [0, 1]", f"{float(level.min())} to {float(level.max())}")
        image = self.patch(to_patches(x_t, c.patch)) + self.position + self._level(level)[:, None]
        z = torch.cat([image, self.word(ids) + self.text_position[:L]], 1)  # (B, N + L, D)
        keys = torch.cat([text_mask.new_ones(image.shape[:2]), text_mask], 1)
        states = self.encoder(z, key_mask(keys), first=image.shape[1])  # (B, N, D)
        v = from_patches(self.out(states), c.patch, c.image_size, c.image_size)
        t = level.view(-1, 1, 1, 1)
        return deviation(t) * x_t + signal(t) * v

    def _level(self, level: Tensor) -> Tensor:
        """Sines and cosines of the level, and a map of them: (B,) → (B, D)."""
        angle = level[:, None] * (math.pi / 2) * torch.arange(1, 1 + self.config.waves, device=level.device)
        return self.level(torch.cat([angle.sin(), angle.cos()], 1))

    def given(self, ids: Tensor, text_mask: Tensor) -> Conditional:
        """ε̂ as `diffusion.errors` asks for it: class c is the caption of row c of ids (C, L)."""
        return lambda x_t, level, c: self(x_t, level, ids[c], text_mask[c])


@torch.no_grad()
def small_init(model: Denoiser) -> Denoiser:
    """Give `model` values with which a small one learns from little data, in place; return it.

    As `vilt.small_init`, from torch's default generator; the output begins at v̂ = 0.
    """
    c = model.config
    nn.init.normal_(model.patch.weight, std=1 / math.sqrt(3 * c.patch**2))  # of noise with deviation 1
    nn.init.normal_(model.level.weight, std=1 / math.sqrt(2 * c.waves))
    model.position.copy_(sine_cosine_positions(c.grid, c.dim))
    for table in (model.word.weight, model.text_position):
        nn.init.normal_(table, std=0.5)
    for block in model.encoder.blocks:
        query, key, value = block.qkv.weight.chunk(3)
        alike(query, key)
        nn.init.orthogonal_(value)
        nn.init.orthogonal_(block.fc1.weight)
    nn.init.zeros_(model.out.weight)
    return model
