"""BLIP-2's Q-Former: learned queries and words in one stack, of which the queries alone look at a picture.

A frozen encoder has read the picture, states (N, I). Q learned queries and the words of a text, if there is
one, are the rows of one post-norm stack. With x the rows, x_q the queries' and x_w the words':

    x   ← LN(x + MSA(x))                     queries and words look at one another, as far as the table allows
    x_q ← LN(x_q + Attention(x_q, picture))  in layers 0, every, 2 · every, …
    x_q ← LN(x_q + MLP_q(x_q)),              x_w ← LN(x_w + MLP_w(x_w))

So words learn of the picture through queries or not at all, and one set of weights does three things by three
tables (masks.py), queries first:

    contrast    10/01               neither sees the other: max over queries of cos(W_i x_q, W_t x_[CLS])
    captions    10/11, words causal the next word, from words that see queries and earlier words
    matching    11/11               mean over queries of a linear map: do the two belong together?

No query has a place of its own: permuted queries give permuted rows, and every score is a maximum, a mean or
an attention over them. Under `captions` queries see queries only, so that their keys can be kept: `write`
reads words over them, and one pass over both says the same.

A maximum over the tokens of one side is late interaction (filip.py) whose other side has one token. A matrix
of scores is the matrix of InfoNCE of its rows with unit vectors.

Sources: Li et al. 2023 (BLIP-2), section 3.1 and figure 2; the names and shapes of Hugging Face's BLIP-2.
Left out: dropout, smoothed labels, and the momentum queues of BLIP-2's parents.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from minivlp.attention import attend
from minivlp.core import require
from minivlp.filip import late_interaction
from minivlp.infonce import InfoNCE
from minivlp.masks import FULL, PREFIX, TOWERS, real_keys, visible
from minivlp.models.parts import MaskedWords, MlmHead, alike, check_text
from minivlp.models.published import qformer as weights
from minivlp.models.published.safetensors import filled, load_state
from minivlp.transformer import join_heads, normal_init, split_heads

# Segments: queries, words. A table and the segments that are causal inside.
TABLES = {"contrast": (TOWERS, ()), "captions": (PREFIX, (1,)), "matching": (FULL, ())}
Kept = list[list[Tensor]]  # of each layer the keys and values (B, heads, L, d)


@dataclass(frozen=True)
class QformerConfig:
    """The sizes of a Q-Former; the defaults are the published model's."""

    vocab_size: int = 30522  # 0 = no table of words
    max_text_len: int = 512
    queries: int = 32
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    image_dim: int = 1408  # I, the width of the picture's states
    every: int = 2  # of so many layers the first looks at the picture
    words: bool = True  # have the layers an MLP for words?
    embed: int = 256  # width of the space of comparison; 0 = no heads for contrast and matching
    captions: bool = True  # has it the head of next words?
    eps: float = 1e-12

    def __post_init__(self):
        if self.heads < 1 or self.dim % self.heads:
            require.fail("heads", f"must divide dim={self.dim}", self.heads)
        if self.every < 1:
            require.fail("every", "must be at least 1", self.every)


class PostMlp(nn.Module):
    """LN(x + W₂ gelu(W₁ x + b₁) + b₂): (B, L, D) → (B, L, D)."""

    def __init__(self, c: QformerConfig):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)
        self.norm = nn.LayerNorm(c.dim, c.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc2(gelu(self.fc1(x))))


class Layer(nn.Module):
    """One layer over queries and words, post-norm: LayerNorm stands behind each sum."""

    def __init__(self, c: QformerConfig, across: bool):
        super().__init__()
        self.heads, self.across, D = c.heads, across, c.dim
        self.qkv, self.proj, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D, c.eps)
        if across:
            self.q, self.kv = nn.Linear(D, D), nn.Linear(c.image_dim, 2 * D)
            self.proj_cross, self.norm_cross = nn.Linear(D, D), nn.LayerNorm(D, c.eps)
        self.queries = PostMlp(c)
        self.words = PostMlp(c) if c.words else None

    def forward(
        self, x: Tensor, Q: int, image: Tensor | None, image_mask: Tensor | None,
        mask: Tensor | None, past: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, L, D), the first Q rows queries → (B, L, D); keys and values join those in `past`."""
        q, k, v = (split_heads(z, self.heads) for z in self.qkv(x).chunk(3, -1))  # (B, heads, L, d)
        if past is not None:
            past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
            k, v = past
        x = self.norm(x + self.proj(join_heads(attend(q, k, v, mask))))
        asking, words = x[:, :Q], x[:, Q:]
        if Q and self.across:
            q = split_heads(self.q(asking), self.heads)  # (B, heads, Q, d)
            k, v = (split_heads(z, self.heads) for z in self.kv(image).chunk(2, -1))  # (B, heads, N, d)
            seen = join_heads(attend(q, k, v, image_mask))
            asking = self.norm_cross(asking + self.proj_cross(seen))
        asking = self.queries(asking) if Q else asking
        return torch.cat([asking, self.words(words)], 1) if words.shape[1] else asking


class Qformer(MaskedWords, nn.Module):
    """A Q-Former, its heads and its three tables. Initial values use torch's default generator.

    `mlm_hidden`, `mlm_logits`, `mlm_weight` and `mlm_bias` read next words from the words of `captions`.
    """

    def __init__(self, config: QformerConfig):
        super().__init__()
        self.config = c = config
        self.query = nn.Parameter(torch.empty(c.queries, c.dim).normal_(std=0.02))
        self.word, self.position = (
            nn.Embedding(n, c.dim) if c.vocab_size else None for n in (c.vocab_size, c.max_text_len)
        )
        self.norm = nn.LayerNorm(c.dim, c.eps)  # of queries and words, before the first layer
        self.layers = nn.ModuleList(Layer(c, i % c.every == 0) for i in range(c.layers))
        self.image_project, self.text_project, self.itm = (
            nn.Linear(c.dim, n) if c.embed else None for n in (c.embed, c.embed, 2)
        )
        self.contrast = InfoNCE() if c.embed else None
        self.mlm = MlmHead(c.vocab_size, c.dim, c.eps, tied=True) if c.captions and c.vocab_size else None
        self.apply(normal_init)

    # Who sees whom

    def run(
        self, rows: Tensor, Q: int, image: Tensor | None = None, image_mask: Tensor | None = None,
        mask: Tensor | None = None, kept: Kept | None = None,
    ) -> Tensor:  # fmt: skip
        """The stack, unchecked: rows (B, L, D), the first Q of them queries → states (B, L, D).

        image (B, N, I) and image_mask (B, N) bool; mask bool, True = may look, broadcasts to (B, heads, L,
        all tokens); kept: of each layer the keys and values of tokens before, which those of these rows join.
        """
        x, image_mask = self.norm(rows), None if image_mask is None else image_mask[..., None, None, :]
        for i, layer in enumerate(self.layers):
            x = layer(x, Q, image, image_mask, mask, None if kept is None else kept[i])
        return x

    def read(self, image: Tensor, image_mask: Tensor | None = None) -> tuple[Tensor, Kept]:
        """The queries alone: picture states (B, N, I) → states (B, Q, D), and what `write` goes on from.

        image_mask (B, N) bool, True = a patch. Raises ValueError on bad shapes, dtypes, NaN and infinities.
        """
        B, kept = self._check_image(image, image_mask), [[] for _ in self.layers]
        rows = self.query.expand(B, -1, -1)
        return self.run(rows, len(self.query), image, image_mask, None, kept), kept

    def read_words(self, ids: Tensor, text_mask: Tensor) -> Tensor:
        """The words alone, as under `contrast`; ids and text_mask as of `encode` → (B, L, D)."""
        rows = self._embed(ids, text_mask)
        return self.run(rows, 0, mask=real_keys(_table((rows.shape[1],), [[1]], (), ids), text_mask))

    def encode(
        self, ids: Tensor, text_mask: Tensor, image: Tensor, table: str, image_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries and words in one pass under a table, "contrast", "captions" or "matching".

        ids (B, L) and text_mask (B, L) bool, True = a word; image and image_mask as of `read` → states
        (B, Q, D) and (B, L, D). Raises ValueError on bad shapes, dtypes, ids outside the vocabulary, texts
        without words and another table.
        """
        words, Q = self._embed(ids, text_mask), len(self.query)
        require.shapes(ids=(ids, "B L"), image=(image, "B N I"))
        B, mask = self._check_image(image, image_mask), self.sees(table, text_mask)
        rows = torch.cat([self.query.expand(B, -1, -1), words], 1)
        states = self.run(rows, Q, image, image_mask, mask)
        return states[:, :Q], states[:, Q:]

    def sees(self, table: str, text_mask: Tensor) -> Tensor:
        """Which of queries and words look at which, under a table: (B, 1, Q + L, Q + L) bool."""
        if table not in TABLES:
            require.fail("table", f"must be one of {', '.join(TABLES)}", table)
        (B, L), Q = text_mask.shape, len(self.query)
        real = torch.cat([text_mask.new_ones(B, Q), text_mask], 1)
        return real_keys(_table((Q, L), *TABLES[table], real), real)

    def write(self, ids: Tensor, text_mask: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """The words of `captions` over kept keys: ids (B, L) → states (B, L, D), and what is kept now.

        kept comes from `read`, or from here after words without padding; it stays as it was.
        """
        kept, Q = [list(pair) for pair in kept], len(self.query)
        past = kept[0][0].shape[2]
        words = self._embed(ids, text_mask, past - Q)
        real = torch.cat([text_mask.new_ones(len(ids), past), text_mask], 1)
        mask = real_keys(_table((past, words.shape[1]), *TABLES["captions"], ids), real)[:, :, past:]
        return self.run(words, 0, mask=mask, kept=kept), kept

    # What is predicted

    @property
    def scale(self) -> Tensor:
        """1/τ of the similarities, a differentiable scalar, at most 100."""
        self._head("contrast").clamp_scale()
        return self.contrast.scale

    def similarity(self, queries: Tensor, words: Tensor) -> Tensor:
        """Pictures with texts: states (A, Q, D), (B, L, D) of `contrast` → max over queries of cos (A, B)."""
        x, y = self._head("image_project")(queries), self.text_project(words[:, :1])
        return late_interaction(y, x).T

    def contrast_loss(self, queries: Tensor, words: Tensor) -> Tensor:
        """InfoNCE of the pairs: states (B, Q, D) and (B, L, D) of `contrast`, pair by pair; in nats."""
        S = self.similarity(queries, words)
        return self.contrast(S, torch.eye(len(S), dtype=S.dtype, device=S.device))

    def itm_logits(self, queries: Tensor) -> Tensor:
        """Do they match? States (B, Q, D) of `matching` → (B, 2), column 1 = match, the mean over queries."""
        return self._head("itm")(queries).mean(1)

    def _embed(self, ids: Tensor, text_mask: Tensor, first: int = 0) -> Tensor:
        """Rows (B, L, D) of words that stand at positions first, first + 1, …"""
        c = self.config
        if self.word is None or not c.words:
            require.fail("model", "must have words", "a configuration without them")
        L = check_text(ids, text_mask, c.vocab_size, c.max_text_len - first, "text_mask")
        if not bool(text_mask[:, 0].all()):
            require.fail("text_mask", "must be True at the first word of every text", "a False")
        return self.word(ids) + self.position.weight[first : first + L]

    def _check_image(self, image: Tensor, image_mask: Tensor | None) -> int:
        require.shapes(Tensor, image=(image, f"B N {self.config.image_dim}"))
        require.tokens(("image", image, "image_mask", image_mask))
        return len(image)


def _table(lengths: tuple[int, ...], sees: Any, causal: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.from_numpy(visible(lengths, sees, causal)).to(like.device)


@dataclass
class Captioner:
    """What `decoder.decode` asks to write about pictures: a model and what `read` kept of them."""

    model: Qformer
    kept: Kept

    def next_scores(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """As of `decoder.Writer`."""
        if cache is None:  # beams repeat the prefix
            repeats = len(ids) // len(self.kept[0][0])
            cache = [[z.repeat_interleave(repeats, 0) for z in pair] for pair in self.kept]
        words, cache = self.model.write(ids, torch.ones_like(ids, dtype=torch.bool), cache)
        return self.model.mlm_logits(words[:, -1]), cache


@torch.no_grad()
def small_init(model: Qformer) -> Qformer:
    """Values with which a small Q-Former learns from little data, in place; return it.

    Rows have variance 1 and look first at rows like themselves; the other maps of attention begin orthogonal,
    and both sides enter the space of comparison by one map. With deviations of 0.02 neither captions nor
    matching had learned which noun stands where after 1,200 steps (tried). Numbers come from torch's default
    generator.
    """
    nn.init.normal_(model.word.weight, std=1)
    nn.init.normal_(model.position.weight, std=0.5)
    nn.init.normal_(model.query, std=1)
    for layer in model.layers:
        query, key, value = layer.qkv.weight.chunk(3)
        alike(query, key)
        nn.init.orthogonal_(value)
        nn.init.orthogonal_(layer.proj.weight, gain=0.5)
        if layer.across:
            for weight in (layer.q.weight, *layer.kv.weight.chunk(2), layer.proj_cross.weight):
                nn.init.orthogonal_(weight)
    nn.init.orthogonal_(model.image_project.weight)
    model.text_project.load_state_dict(model.image_project.state_dict())
    return model


def load_qformer(
    source: Mapping[str, Tensor] | str | os.PathLike, heads: int | None = None, eps: float | None = None
) -> Qformer:
    """A Qformer with the weights of Hugging Face's BLIP-2, on CPU in float32.

    source: a state dict, a folder, or a `.safetensors` or `.bin` file; a config.json beside it is read. heads
    and eps: config.json's, or D / 64 and 1e-12. A Blip2QFormerModel has neither queries nor words of its own:
    give its rows to `run`. Hugging Face has no head of next words and no temperature; 1/τ is 1/0.07. Raises
    ValueError on missing or unexpected tensors.
    """
    state, beside = load_state(source)
    tensors, spelling = weights.from_published(state)
    config = QformerConfig(**weights.config_fields(tensors, spelling, beside, heads, eps))
    return filled(lambda: Qformer(config), tensors, spelling)
