"""Four ways to spend the same parameters: which of picture, text and their meeting gets the layers.

    heavy      picture > text > meeting     a deep image tower, a shallow text tower, a dot product (VSE++)
    towers     picture = text > meeting     two equal towers, a dot product (CLIP)
    grid       picture, meeting > text      a convolutional grid of features, then a transformer (Pixel-BERT)
    patch      meeting > picture = text     a patch projection, then a transformer (ViLT)
    bag        the control: `towers` with a bag of words in place of the text tower

All are made of the towers, blocks and heads of models/dual.py and models/vilt.py, have one interface, `look`,
`read` and `meet`, and differ in their numbers of parameters by at most a tenth (the bag has fewer). Of the
`blocks` transformer blocks the heavy side of `heavy` has all but one, each of the two `towers` has half,
`patch` has all where words and patches meet, and `grid` has two fewer there, for its convolutions.

The bag adds up word vectors in the order of their ids, so two captions of the same words have the same vector
to the last bit, and no strict comparison can tell them apart: a test that scores it above 0 counts ties.

Sources: Kim, Son and Kim 2021 (ViLT), section 2.1 and figure 2 (the four archetypes); Faghri et al. 2018;
Radford et al. 2021; Huang et al. 2020 (Pixel-BERT).
Left out: region detectors, whose time goes into proposals and suppression and not into any model here; a
recurrent text tower; weights from ImageNet, which the convolutions of the sources start from.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from minivlp.core import require
from minivlp.models import dual, vilt
from minivlp.models.dual import Dual, DualConfig
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.transformer import key_mask

ARCHETYPES = ("heavy", "towers", "grid", "patch")
CONTROL = "bag"
CONVOLVED = 2  # blocks that the convolutions of `grid` stand for: about 17 dim² weights, and a block has 8


@dataclass(frozen=True)
class ArchetypeConfig:
    """The sizes of an archetype; widths are equal everywhere, and an MLP is twice as wide."""

    kind: str = "patch"
    vocab_size: int = 128
    max_text_len: int = 16
    dim: int = 64
    blocks: int = 4
    heads: int = 2
    patch: int = 8
    image_size: int = 32  # pixels
    eot: int = 3  # [SEP], which ends every text

    def __post_init__(self):
        if self.kind not in (*ARCHETYPES, CONTROL):
            require.fail("kind", f"must be one of {', '.join((*ARCHETYPES, CONTROL))}", repr(self.kind))
        if self.blocks < CONVOLVED + 1 or self.blocks % 2:
            require.fail("blocks", f"must be even and more than {CONVOLVED}", self.blocks)

    @property
    def dot(self) -> bool:
        """Do picture and text meet in a dot product alone?"""
        return self.kind not in ("grid", "patch")


class Archetype(nn.Module):
    """One of the four, or the control. Initial values use torch's default generator."""

    def __init__(self, config: ArchetypeConfig):
        super().__init__()
        self.config = config
        self.net = _dual(config) if config.dot else _vilt(config)

    def look(self, pixels: Tensor) -> Tensor:
        """The picture's part: pixels (B, 3, H, W) → a unit vector (B, D), or tokens (B, 1+N, D)."""
        if self.config.dot:
            return self.net.encode_image(pixels)
        return self.net.embed_image(pixels)[0]

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The text's part: ids (B, L), mask (B, L) → a unit vector (B, D), or tokens (B, L, D)."""
        return self.net.encode_text(ids) if self.config.dot else self.net.embed_text(ids, mask)

    def meet(self, seen: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """The log odds that picture i and text i match, (B,), from what `look` and `read` made of them."""
        if self.config.dot:
            # Not a matrix product, whose order of sums may depend on the row: equal vectors, equal scores.
            return self.net.scale * (seen * words).sum(-1) + self.net.bias
        return self.net.itm_logits(self._pooled(self.mix(seen, words, mask)[:, 0])).diff(dim=-1)[:, 0]

    def mix(self, seen: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """The transformer over both, (B, L+1+N, D); of `grid` and `patch` alone."""
        keys = torch.cat([mask, mask.new_ones(seen.shape[:2])], 1)  # (B, L+1+N)
        return self.net.encoder(torch.cat([words, seen], 1), key_mask(keys))

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """Text i with picture i → log odds of a match (B,)."""
        return self.meet(self.look(pixels), self.read(ids, mask), mask)

    def _pooled(self, first: Tensor) -> Tensor:
        return self.net.pooler(first).tanh()


def new_archetype(config: ArchetypeConfig, seed: int) -> Archetype:
    """An archetype with fresh values from the seed (set for torch's default generator)."""
    torch.manual_seed(seed)
    return Archetype(config)


def parameters(model: nn.Module) -> int:
    """How many numbers there are to learn."""
    return sum(p.numel() for p in model.parameters())


def _dual(c: ArchetypeConfig) -> Dual:
    light = 1 if c.kind == "heavy" else c.blocks // 2
    shared = {"dim": c.dim, "heads": c.heads, "hidden": 2 * c.dim}
    tower = {f"{side}_{name}": value for side in ("image", "text") for name, value in shared.items()}
    words = {"vocab_size": c.vocab_size, "max_text_len": c.max_text_len}
    size = {"patch": c.patch, "image_size": c.image_size, "embed": c.dim}
    layers = {"image_layers": c.blocks - light, "text_layers": light}
    # A bias to learn makes the dot product log odds, as matching wants them.
    net = dual.small_init(Dual(DualConfig(**words, **size, **tower, **layers, eot=c.eot, init_bias=0.0)))
    if c.kind == CONTROL:
        net.text = BagOfWords(c.vocab_size, c.dim)
    return net


def _vilt(c: ArchetypeConfig) -> Vilt:
    layers = c.blocks - CONVOLVED if c.kind == "grid" else c.blocks
    sizes = {"dim": c.dim, "heads": c.heads, "hidden": 2 * c.dim, "layers": layers}
    words = {"vocab_size": c.vocab_size, "max_text_len": c.max_text_len}
    net = vilt.small_init(Vilt(ViltConfig(**words, **sizes, patch=c.patch, image_size=c.image_size)))
    if c.kind == "grid":
        net.patch = ConvGrid(c.dim, c.patch)
    return net


class ConvGrid(nn.Module):
    """Pixels (B, 3, H, W) → a grid of features, (B, N, dim) row-major, N = H·W / patch².

    Three convolutions of stride 2 and one residual one, 3 × 3 each, with group norms between; a patch of 8 is
    thus one place of the grid, and of larger ones the mean is taken. Raises ValueError unless patch is a
    multiple of 8.
    """

    def __init__(self, dim: int, patch: int):
        super().__init__()
        if patch % 8:
            require.fail("patch", "must be a multiple of 8", patch)
        widths = (3, dim // 3, 2 * dim // 3, dim)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[1:])
        self.last = nn.Conv2d(dim, dim, 3, padding=1)
        self.final = nn.GroupNorm(1, dim)
        self.pool = nn.AvgPool2d(patch // 8)
        for conv in (*self.down, self.last):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        z = pixels
        for conv, norm in zip(self.down, self.norms, strict=True):
            z = relu(norm(conv(z)))
        z = self.pool(self.final(z + self.last(z)))  # (B, D, H/p, W/p), of unit variance like the patches
        return z.flatten(2).transpose(1, 2)  # (B, N, D)


class BagOfWords(nn.Module):
    """The mean of the word vectors of a text, added in the order of their ids: it cannot know theirs."""

    def __init__(self, vocab_size: int, embed: int):
        super().__init__()
        self.word = nn.Embedding(vocab_size, embed)
        nn.init.normal_(self.word.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L), padding included, which every text of a batch is free to have → (B, embed)."""
        return self.word(ids.sort(1).values).mean(1)
