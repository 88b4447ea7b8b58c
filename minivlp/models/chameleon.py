"""Chameleon: one vocabulary for words and picture codes, one causal transformer, the next token of each.

    picture → patches → numbers of their nearest codes → ids behind those of the words
    text    = [CLS] w₁ … w_n [SEP]        image = [BOI] c₁ … c_N

    z⁰ = E[ids],        z = DecoderBlocks(z⁰),        scores of the next token = W RMSNorm(z)

The order of the two is a table and nothing else (masks.py). One layout [text; image] serves both: with
TEXT_FIRST the picture sees its caption, and the model draws; with IMAGE_FIRST the words see the picture, and
the model writes. Each part predicts its own next token, so log p(picture | caption) and log p(caption) come
from one pass, log p(caption | picture) and log p(picture) from another. A position is where a token stands in
the layout with the longest text, so that no padding moves the picture.

The picture's codes are the k-means of raw patches (vq.py), kept in the model: `tokenise` and `paint` are each
other's inverse on codes. Published Chameleons have a VQ-VAE in their place, which is not read here.

Sources: Chameleon team 2024, sections 2.1 to 2.3; Yu et al. 2023 (CM3Leon), section 2; Trockman and Kolter
2023 (mimetic initialization) for the small initial values.
Left out: the 34B model's norms after attention and MLP, and its heads that share keys; dropout; the VQ-VAE.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.core import require
from minivlp.decoder import DecoderBlock, Kept, turns
from minivlp.masks import Table, real_keys, visible
from minivlp.mlm import IGNORE
from minivlp.models.parts import begin_alike, check_text, sine_cosine_positions
from minivlp.models.published import chameleon as names
from minivlp.models.published.safetensors import filled, load_state
from minivlp.patch import check_pixels, from_patches, patches_a_side, to_patches
from minivlp.targets import next_words
from minivlp.transformer import normal_init
from minivlp.vq import nearest_fused

# Segments: text, image; both are causal inside.
TEXT_FIRST: Table = ((1, 0), (1, 1))
IMAGE_FIRST: Table = ((1, 1), (0, 1))


@dataclass(frozen=True)
class ChameleonConfig:
    """The sizes of a Chameleon. The last 1 + codes ids of the vocabulary are [BOI] and the picture codes."""

    vocab_size: int = 65_536
    dim: int = 4096
    layers: int = 32
    heads: int = 32
    hidden: int = 11_008
    base: float = 10_000.0  # of the rotary positions
    eps: float = 1e-5
    codes: int = 0  # picture codes that the model itself keeps; 0 = none, as in published weights
    places: bool = False  # is a learned vector of its place added to each token of the layout?
    max_text_len: int = 24
    patch: int = 8
    image_size: int = 48  # pixels

    def __post_init__(self):
        patches_a_side(self.image_size, self.patch)
        if self.codes < 0 or (self.codes and self.codes + 1 >= self.vocab_size):
            require.fail("codes", "must be ≥ 0 and leave ids for words", self.codes)

    @property
    def grid(self) -> int:
        """Patches a side."""
        return patches_a_side(self.image_size, self.patch)

    @property
    def begin(self) -> int:
        """The id of [BOI]; those of the codes follow."""
        return self.vocab_size - self.codes - 1


class Chameleon(nn.Module):
    """`states` runs the blocks, `encode` a batch of pairs; `scores` reads either."""

    def __init__(self, config: ChameleonConfig):
        super().__init__()
        self.config = c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(DecoderBlock(c.dim, c.heads, c.hidden, c.eps) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, c.eps)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.place = nn.Embedding(c.max_text_len + 1 + c.grid**2, c.dim) if c.places else None
        if c.codes:
            self.register_buffer("codebook", torch.zeros(c.codes, 3 * c.patch**2))
        self.apply(normal_init)

    def run(
        self, ids: Tensor, positions: Tensor, mask: Tensor, cache: tuple[Kept, ...] | None = None
    ) -> tuple[Tensor, tuple[Kept, ...]]:
        """The blocks, unchecked: ids (B, n) after the tokens of the cache → states (B, n, D), a new cache.

        positions (n,) integers; mask (True = may look) broadcasts to (B, heads, n, all tokens).
        """
        c, z, kept = self.config, self.word(ids), []
        if self.place is not None:
            z = z + self.place(positions)
        angles = turns(positions, c.dim // c.heads, c.base, z)
        for i, block in enumerate(self.blocks):
            z, now = block(z, angles, mask, None if cache is None else cache[i])
            kept.append(now)
        return self.norm(z), tuple(kept)

    def states(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """A plain causal reading: ids (B, L), mask (B, L) bool, True = real (None = all) → states (B, L, D).

        Raises ValueError on bad shapes and dtypes, ids outside the vocabulary and a row without a token.
        """
        L = check_text(ids, mask, self.config.vocab_size, 2**31)
        past = torch.from_numpy(visible([L], [[1]], [0])).to(ids.device)
        seen = past if mask is None else real_keys(past, mask)
        return self.run(ids, torch.arange(L, device=ids.device), seen)[0]

    def encode(self, text: Tensor, text_mask: Tensor, image: Tensor, image_first: Tensor) -> Tensor:
        """Pairs in the layout [text; image]: states (B, L + N + 1, D).

        text (B, L) ids with [CLS] first, text_mask (B, L) bool, True = a word; image (B, N) ids as of
        `tokenise`, before which [BOI] is put; image_first (B,) bool: do the words see the picture, or the
        picture the words? Raises ValueError on bad shapes and dtypes, and ids outside the vocabulary.
        """
        c = self.config
        L = check_text(text, text_mask, c.vocab_size, c.max_text_len, "text_mask")
        require.shapes(text=(text, "B L"), image=(image, f"B {c.grid**2}"), image_first=(image_first, "B"))
        check_text(image, None, c.vocab_size, c.grid**2)
        require.mask("image_first", image_first)
        ids = torch.cat([text, self.with_begin(image)], 1)  # (B, L+N+1)
        lengths, device = (L, 1 + c.grid**2), ids.device
        real = torch.cat([text_mask, text_mask.new_ones(len(ids), lengths[1])], 1)
        tables = (visible(lengths, table, (0, 1)) for table in (IMAGE_FIRST, TEXT_FIRST))
        both = (real_keys(torch.from_numpy(table).to(device), real) for table in tables)
        seen = torch.where(image_first[:, None, None, None], *both)  # (B, 1, L+N+1, L+N+1)
        return self.run(ids, self.layout(L).to(device), seen)[0]

    def scores(self, states: Tensor) -> Tensor:
        """Scores of the next token: states (…, D) → (…, V)."""
        return self.head(states)

    def nats(self, text: Tensor, text_mask: Tensor, image: Tensor, image_first: Tensor) -> Tensor:
        """−log p of each text and of each picture, (B, 2) in nats; arguments as of `encode`.

        With the image first they are those of p(text | image) and p(image), else of p(text) and p(image |
        text). A text is made of words alone and a picture of codes alone: other ids have probability 0, or a
        caption would be charged for codes that nobody would write.
        """
        begin, L = self.config.begin, text.shape[1]
        scores, labels = (
            self.scores(self.encode(text, text_mask, image, image_first)),
            next_words(text, text_mask),
        )
        words, codes = scores[:, :L, :begin].log_softmax(-1), scores[:, L:-1, begin + 1 :].log_softmax(-1)
        told = words.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != IGNORE)  # (B, L)
        drawn = codes.gather(-1, image[..., None] - begin - 1)[..., 0]  # (B, N)
        return -torch.stack([told.sum(1), drawn.sum(1)], 1)

    def layout(self, text: int, image_first: bool = False) -> Tensor:
        """Where the tokens of a text of this length and of a picture stand, (text + N + 1,), in an order."""
        c = self.config
        parts = torch.arange(text), c.max_text_len + torch.arange(1 + c.grid**2)
        return torch.cat(parts[::-1] if image_first else parts)

    def with_begin(self, image: Tensor) -> Tensor:
        """[BOI] before the ids of a picture: (B, N) → (B, N + 1)."""
        return torch.cat([image.new_full((len(image), 1), self.config.begin), image], 1)

    def tokenise(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → the ids of their patches' codes (B, N)."""
        check_pixels(pixels, self.config.patch)
        patches = to_patches(pixels, self.config.patch)  # (B, N, 3·p·p)
        ids = nearest_fused(patches.flatten(0, 1), self.codebook.to(patches.dtype))
        return ids.view(patches.shape[:2]) + self.config.begin + 1

    def paint(self, image: Tensor) -> Tensor:
        """The picture of codes: ids (B, N) as of `tokenise` → pixels (B, 3, H, W). Refuses other ids."""
        c = self.config
        codes = image - c.begin - 1
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= c.codes:
            require.fail("image", "must hold ids of picture codes only", f"{low} to {high} after [BOI]")
        return from_patches(self.codebook[codes], c.patch, c.image_size, c.image_size)


class Writing:
    """A Chameleon as a `Writer` of decoder.py: each token sees all that are written before it."""

    def __init__(self, model: Chameleon, positions: Tensor):
        """positions (n,): where the tokens stand, prefix and all, as of `layout`."""
        self.model, self.positions = model, positions

    def next_scores(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """As of `Writer`."""
        past, n = 0 if cache is None else cache[0][0].shape[2], ids.shape[1]
        mask = torch.ones(n, past + n, dtype=torch.bool, device=ids.device).tril(past)
        here = self.positions[past : past + n].to(ids.device)
        states, cache = self.model.run(ids, here, mask, cache)
        return self.model.scores(states[:, -1]), cache


@torch.no_grad()
def small_init(model: Chameleon) -> Chameleon:
    """Values with which a small Chameleon learns from little data, in place; return it.

    A code begins as a random map of its patch, so that like patches have like vectors; its place in the
    grid as sines and cosines; W_k = W_q orthogonal, so that a token first looks at tokens like itself. The
    numbers come from torch's default generator.
    """
    c = model.config
    nn.init.normal_(model.word.weight, std=1)
    if c.codes:
        size = model.codebook.shape[1]
        look = torch.empty(size, c.dim).normal_(std=2 / size**0.5)  # pixels have deviation ½
        model.word.weight[c.begin + 1 :] = model.codebook @ look
    if c.places:
        nn.init.normal_(model.place.weight, std=0.5)
        model.place.weight[c.max_text_len + 1 :] = sine_cosine_positions(c.grid, c.dim)
    begin_alike(model.blocks)
    return model


def load_chameleon(source: Mapping[str, Tensor] | str | os.PathLike) -> Chameleon:
    """A Chameleon with published weights, on CPU in float32.

    source: a state dict, a folder, or a `.safetensors` or `.bin` file, with Hugging Face's names; a
    config.json beside it is read. The tensors of the VQ-VAE are left aside. Without config.json the base of
    the positions is 10,000 and eps 1e-5. Raises ValueError on missing and unexpected tensors, and for what
    is left out above.
    """
    state, beside = load_state(source)
    tensors, spelling = names.from_hugging_face(state)
    config = ChameleonConfig(**names.config_fields(tensors, spelling, beside))
    return filled(lambda: Chameleon(config), tensors, spelling)
