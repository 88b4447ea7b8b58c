"""CoCa: a text is read twice, first by itself, to be compared with pictures, then beside one, to be written.

    image  = Encoder(LN([cls ; patches] + position)),      pooled = LN(queries look at image)     one picture
    x      = unit(W pooled₀),                              tokens = pooled₁ … pooled_Q−1
    words  = Blocks([words ; cls] + position), causal      y = unit(W LN(words_cls))              no picture
    next   = LN((Block causal, Across tokens) × layers of words) Wᵀ                               both

One pass gives both losses: the first half ends in y, for a contrast of x and y, and its states go on into the
second half, which predicts at each word the next one. So the first half must not see the picture, or x and y
would be compared with themselves; and no word may see a later one, or it would be copied. [CLS] stands last
for that reason: in a causal text only the last position has seen every word.

Sources: Yu et al. 2022 (CoCa), sections 3.2 and 4.1; open_clip 3.3 for the shapes and names of the published
weights, whose second half has two residual blocks a layer, each with an MLP, and whose one pooler has the
contrast's query beside the others. Trockman and Kolter 2023 (mimetic initialization) for the small values.
Left out: open_clip's older [CLS] mask, which hides the [CLS] of a padded text from itself and shows it the
first padding (its `correct_cls_mask=False`, with which its published weights were trained; a text that fills
all positions has the same vector under both); other sizes of picture than the stored grid; the paper's second
pooler.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from minivlp.attention import attend
from minivlp.core import require
from minivlp.infonce import InfoNCE
from minivlp.masks import visible
from minivlp.models.parts import alike, check_text, mean_of_seen, sine_cosine_positions
from minivlp.models.published import coca as weights
from minivlp.models.published.safetensors import filled, load_state
from minivlp.patch import PatchEmbed, check_pixels, patches_a_side
from minivlp.transformer import Block, Encoder, join_heads, normal_init, split_heads

WORDS_THEN_CLS = ((1, 0), (1, 1))  # the table of the first half: words see words, [CLS] sees all; causal (0,)


@dataclass(frozen=True)
class CocaConfig:
    """The sizes of a CoCa; the defaults are a small one, for a CPU."""

    vocab_size: int = 512
    max_text_len: int = 24  # words, without [CLS]
    patch: int = 8
    image_size: int = 48  # pixels a side, of every picture
    image_dim: int = 96
    image_layers: int = 3
    image_heads: int = 3
    image_hidden: int = 192
    dim: int = 96  # width of the text, of the pooled picture and of the space of comparison
    heads: int = 3
    hidden: int = 192
    text_layers: int = 1  # of the first half
    layers: int = 2  # of the second half
    queries: int = 1  # that pool the picture: one for the contrast, the others for the words; with 1 alone
    # the words look at all of the picture's states themselves
    pool_heads: int = 3
    eps: float = 1e-5

    def __post_init__(self):
        patches_a_side(self.image_size, self.patch)
        if self.pool_heads < 1 or self.dim % self.pool_heads:
            require.fail("pool_heads", f"must divide dim={self.dim}", self.pool_heads)
        if self.queries < 1:
            require.fail("queries", "must be at least 1, for the contrast", self.queries)
        if self.queries == 1 and self.image_dim != self.dim:
            require.fail("image_dim", f"must be dim={self.dim}, as words look at the picture", self.image_dim)

    @property
    def grid(self) -> int:
        """Rows (and columns) of patches."""
        return patches_a_side(self.image_size, self.patch)


class Across(Block):
    """A pre-norm block whose tokens look at tokens of another kind in place of one another, then an MLP."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float):
        super().__init__(dim, heads, hidden, eps)
        self.norm_others = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        """x (B, L, D), others (B, K, D) → (B, L, D)."""
        sizes = [x.shape[-1], 2 * x.shape[-1]]
        (Wq, Wkv), (bq, bkv) = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
        q = split_heads(linear(self.norm1(x), Wq, bq), self.heads)  # (B, heads, L, d)
        k, v = (split_heads(z, self.heads) for z in linear(self.norm_others(others), Wkv, bkv).chunk(2, -1))
        return self.transform(x + self.proj(join_heads(attend(q, k, v))))


class Pooler(nn.Module):
    """Learned queries look at the picture's tokens: (B, N, image_dim) → (B, queries, dim)."""

    def __init__(self, c: CocaConfig):
        super().__init__()
        self.heads = c.pool_heads
        self.query = nn.Parameter(torch.randn(c.queries, c.dim))
        self.norm_query = nn.LayerNorm(c.dim, c.eps)
        self.q = nn.Linear(c.dim, c.dim)
        self.k = nn.Linear(c.image_dim, c.dim)
        self.v = nn.Linear(c.image_dim, c.dim)
        self.proj = nn.Linear(c.dim, c.dim)
        self.norm = nn.LayerNorm(c.dim, c.eps)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.norm_query(self.query)).expand(len(x), -1, -1)
        q, k, v = (split_heads(z, self.heads) for z in (q, self.k(x), self.v(x)))
        return self.norm(self.proj(join_heads(attend(q, k, v))))


class Coca(nn.Module):
    """CoCa: a picture's vector and tokens, a text's vector and words, and the next word after each of them.

    Initial values use torch's default generator.
    """

    def __init__(self, config: CocaConfig):
        super().__init__()
        self.config = c = config
        self.cls = nn.Parameter(torch.empty(c.image_dim).normal_(std=0.02))
        self.position = nn.Parameter(torch.empty(1 + c.grid**2, c.image_dim).normal_(std=0.02))  # row 0: cls
        self.image_norm = nn.LayerNorm(c.image_dim, c.eps)
        self.image = Encoder(c.image_dim, c.image_heads, c.image_hidden, c.image_layers, c.eps)
        self.pool = Pooler(c)
        self.image_project = nn.Linear(c.dim, c.dim, bias=False)
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.text_cls = nn.Parameter(torch.empty(c.dim).normal_(std=0.02))
        self.text_position = nn.Parameter(torch.empty(c.max_text_len + 1, c.dim).normal_(std=0.02))
        block = (c.dim, c.heads, c.hidden, c.eps)
        self.text = nn.ModuleList(Block(*block) for _ in range(c.text_layers))
        self.text_norm = nn.LayerNorm(c.dim, c.eps)
        self.text_project = nn.Linear(c.dim, c.dim, bias=False)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(c.layers))
        self.across = nn.ModuleList(Across(*block) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.dim, c.eps)
        self.vocabulary = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.apply(normal_init)
        self.patch = PatchEmbed(c.image_dim, c.patch, bias=False)
        self.contrast = InfoNCE()

    @property
    def scale(self) -> Tensor:
        """1/τ of the dot products, a differentiable scalar, at most 100."""
        self.contrast.clamp_scale()
        return self.contrast.scale

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, S, S), normalised, S = image_size → unit rows (B, dim), tokens (B, K, dim), of
        which K = queries − 1, or with one query 1 + N, [CLS] and the patches.

        Raises ValueError on other shapes, dtypes and NaN.
        """
        c = self.config
        B, *size = check_pixels(pixels, c.patch)
        if size != [c.image_size] * 2:
            require.fail("pixels", f"must be {c.image_size} × {c.image_size}", tuple(pixels.shape))
        z = torch.cat([self.cls.expand(B, 1, -1), self.patch(pixels)], 1)  # (B, 1+N, D)
        states = self.image(self.image_norm(z + self.position))  # (B, 1+N, D)
        pooled = self.pool(states)  # (B, queries, dim)
        tokens = states if self.config.queries == 1 else pooled[:, 1:]
        return normalize(self.image_project(pooled[:, 0]), dim=-1), tokens

    def encode_text(self, ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) integers; text_mask (B, L) bool, True = a word → unit rows (B, dim), words (B, L, dim).

        No picture is seen. Padding stands behind the words. Raises ValueError on bad shapes, dtypes, ids
        outside the vocabulary and a text that does not begin with a word.
        """
        c = self.config
        L = check_text(ids, text_mask, c.vocab_size, c.max_text_len, "text_mask")
        if not bool(text_mask[:, 0].all()):
            require.fail("text_mask", "must be True at the first word of every text", "a False")
        cls = self.text_cls.expand(len(ids), 1, -1)
        z = torch.cat([self.word(ids), cls], 1) + self.text_position[: L + 1]  # (B, L+1, dim)
        keys = torch.cat([text_mask, torch.ones_like(text_mask[:, :1])], 1)  # (B, L+1): [CLS] sees itself
        table = torch.from_numpy(visible((L, 1), WORDS_THEN_CLS, causal=(0,))).to(ids.device)
        for block in self.text:
            z = block(z, table & keys[:, None, None])
        return normalize(self.text_project(self.text_norm(z[:, L])), dim=-1), z[:, :L]

    def hidden(self, words: Tensor, tokens: Tensor) -> Tensor:
        """What the decoder reads: words (B, L, dim) of `encode_text`, tokens (B, K, dim) → (B, L, dim)."""
        require.shapes(words=(words, "B L D"), tokens=(tokens, "B K D"))
        for block, across in zip(self.blocks, self.across, strict=True):
            words = across(block(words, causal=True), tokens)
        return self.norm(words)

    def next_logits(self, words: Tensor, tokens: Tensor) -> Tensor:
        """Scores of the word after each one; arguments as of `hidden` → (B, L, V)."""
        return self.vocabulary(self.hidden(words, tokens))

    def follow(self, ids: Tensor, tokens: Tensor, cache: Sequence[list] | None) -> tuple[Tensor, list]:
        """The last row of `next_logits` for texts that grow: ids (B,) their newest word → (B, V), cache.

        cache: what the call before gave, the keys and values of the words before; None at the first word.
        Unchecked.
        """
        layers = len(self.text) + len(self.blocks)
        past = [list(pair) for pair in cache] if cache else [[] for _ in range(layers)]
        length = past[0][0].shape[2] if cache else 0
        z = self.word(ids)[:, None] + self.text_position[length]  # (B, 1, dim)
        for block, pair in zip(self.text, past, strict=False):
            z = block.follow(z, pair)
        for block, across, pair in zip(self.blocks, self.across, past[len(self.text) :], strict=True):
            z = across(block.follow(z, pair), tokens)
        return self.vocabulary(self.norm(z[:, 0])), past


@dataclass
class Captioner:
    """What `decoder.decode` asks to write about pictures: a model and the tokens (B, K, dim) of each."""

    model: Coca
    tokens: Tensor

    def next_scores(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """As of `decoder.Writer`; the cache holds the pictures too, so that beams keep theirs."""
        tokens, past = (self.tokens.repeat_interleave(len(ids) // len(self.tokens), 0), None)
        if cache is not None:
            tokens, past = cache
        for word in ids.unbind(1):
            scores, past = self.model.follow(word, tokens, past)
        return scores, (tokens, past)


@torch.no_grad()
def small_init(model: Coca) -> Coca:
    """Give `model` values with which a small CoCa learns from little data, in place; return it.

    As `vilt.small_init`, from torch's default generator: patches and positions of unit variance in the
    picture, words as large as their positions in the text; queries equal to keys wherever tokens look at
    tokens; and what the second half is given by a look across is a mean of the picture's tokens. Both sides
    enter the space of comparison by one map: what brings a word and its picture together there brings their
    states together, and the word's query finds the patches' keys.
    """
    c = model.config
    nn.init.normal_(model.patch.weight, std=1 / math.sqrt(3 * c.patch**2 / 4))  # pixels have deviation ½
    model.position[1:] = sine_cosine_positions(c.grid, c.image_dim)
    for table in (model.word.weight, model.text_position):
        nn.init.normal_(table, std=0.5)
    for block in (*model.image.blocks, *model.blocks, *model.across):
        query, key, value = block.qkv.weight.chunk(3)
        alike(query, key)
        nn.init.orthogonal_(value)
    for block in (*model.text, *model.across):
        mean_of_seen(block.qkv.weight.chunk(3)[2], block.proj.weight)
    for block in (*model.image.blocks, *model.text, *model.blocks, *model.across):
        nn.init.orthogonal_(block.fc1.weight)
    mean_of_seen(model.pool.v.weight, model.pool.proj.weight)
    nn.init.orthogonal_(model.image_project.weight)
    model.text_project.weight.copy_(model.image_project.weight)
    return model


def load_coca(source: Mapping[str, Tensor] | str | os.PathLike, heads: Sequence[int] | None = None) -> Coca:
    """A Coca with the weights of open_clip's CoCa, on CPU in float32.

    source: a state dict, a folder, or a file of tensors. heads: of the picture's blocks, of the text's and of
    the pooler; by default D / 64 in both towers and 8. Raises ValueError on missing or unexpected tensors.
    """
    state, _ = load_state(source)
    tensors, spelling = weights.from_published(state)
    config = CocaConfig(**weights.config_fields(tensors, spelling, heads))
    return filled(lambda: Coca(config), tensors, spelling)
