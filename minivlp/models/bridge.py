"""A language model that has never seen a picture, and bridges that tell it of one.

    rows   = [CLS], prefix p₁ … p_P, ":", w₁ … w_n, [SEP]
    states = decoder blocks over the rows, causal;        scores of the next token = W RMSNorm(state)

The language model learns on text alone to say what a list of facts tells it (data/lists.py); there the prefix
is the embedded list. A bridge puts rows of its own in the place of the list, made from the states of a frozen
picture encoder, and learns through the language model: gradients pass it, its weights need not move. What
makes the rows is a connector:

    pooled      P · D numbers from the mean of the patches (Frozen)
    linear      one row a patch, by a linear map (LLaVA, MiniGPT-4)
    mlp         one row a patch, by two maps (LLaVA 1.5, VILA)
    merge       one row of four neighbours in raster order (MiniGPT-v2)
    resampler   queries on a grid, which look at the patches (Qwen-VL; pooling.py)
    qformer     queries that also look at one another (BLIP-2, stage 2; models/qformer.py)

Sources: Tsimpoukelli et al. 2021 (Frozen), section 3; Liu et al. 2023 (LLaVA), section 4.1; Chen et al. 2023
(MiniGPT-v2), section 2.1; Bai et al. 2023 (Qwen-VL), section 2.1; Li et al. 2023 (BLIP-2), section 3.2.
Left out: prompts in words around the prefix, several pictures in one text, and published weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.core import require
from minivlp.decoder import DecoderBlock, Kept, turns
from minivlp.lora import Lora, freeze
from minivlp.models.parts import begin_alike, check_text
from minivlp.models.qformer import Qformer, QformerConfig
from minivlp.pooling import Resampler, grid_positions
from minivlp.transformer import normal_init


@dataclass(frozen=True)
class LanguageConfig:
    """The sizes of a language model."""

    vocab_size: int = 512
    max_text_len: int = 24  # tokens of a text, the prefix aside
    dim: int = 96
    layers: int = 3
    heads: int = 3
    hidden: int = 256
    base: float = 10_000.0  # of the rotary positions
    eps: float = 1e-5


class LanguageModel(nn.Module):
    """A causal decoder over rows, which are words or whatever stands in their place."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(DecoderBlock(c.dim, c.heads, c.hidden, c.eps) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, c.eps)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.apply(normal_init)

    def run(self, rows: Tensor, cache: tuple[Kept, ...] | None = None) -> tuple[Tensor, tuple[Kept, ...]]:
        """The blocks, unchecked: rows (B, n, D) after those of the cache → states (B, n, D), a new cache."""
        c, past, n = self.config, 0 if cache is None else cache[0][0].shape[2], rows.shape[1]
        angles = turns(torch.arange(past, past + n, device=rows.device), c.dim // c.heads, c.base, rows)
        mask = torch.ones(n, past + n, dtype=torch.bool, device=rows.device).tril(past)
        z, kept = rows, []
        for i, block in enumerate(self.blocks):
            z, now = block(z, angles, mask, None if cache is None else cache[i])
            kept.append(now)
        return self.norm(z), tuple(kept)

    def encode(self, ids: Tensor, text_mask: Tensor, prefix: Tensor | None = None) -> Tensor:
        """States (B, L, D) of texts, after a prefix (B, P, D) that stands behind their first token.

        ids (B, L) with [CLS] first; text_mask (B, L) bool, True = a token; padding stands at the end, where
        no token looks. Raises ValueError on bad shapes and dtypes, and ids outside the vocabulary.
        """
        check_text(ids, text_mask, self.config.vocab_size, self.config.max_text_len, "text_mask")
        words = self.word(ids)
        if prefix is None:
            return self.run(words)[0]
        require.shapes(ids=(ids, "B L"), prefix=(prefix, f"B P {self.config.dim}"))
        states = self.run(torch.cat([words[:, :1], prefix, words[:, 1:]], 1))[0]
        return torch.cat([states[:, :1], states[:, 1 + prefix.shape[1] :]], 1)

    def scores(self, states: Tensor) -> Tensor:
        """Scores of the next token: states (…, D) → (…, V)."""
        return self.head(states)


@dataclass(frozen=True)
class BridgeConfig(LanguageConfig):
    """The sizes of a language model and of what tells it of pictures."""

    connector: str = "resampler"
    reader: str = "frozen"  # or "lora", a change of low rank, or "tuned", all weights
    queries: int = 9  # rows of pooled, resampler (a square) and qformer
    image_dim: int = 96  # I, the width of the picture's states
    grid: int = 6  # patches a side
    bridge_layers: int = 2  # of the qformer
    rank: int = 8  # of a LoRA


class Pooled(nn.Module):
    """Frozen's: (B, N, I) → (B, P, D), P rows by a linear map of the mean patch."""

    def __init__(self, c: BridgeConfig):
        super().__init__()
        self.rows, self.map = c.queries, nn.Linear(c.image_dim, c.queries * c.dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.map(image.mean(1)).unflatten(1, (self.rows, -1))


class Merge(nn.Module):
    """MiniGPT-v2's: four neighbours of a row of patches become one row, (B, N, I) → (B, N / 4, D)."""

    def __init__(self, c: BridgeConfig):
        super().__init__()
        if c.grid**2 % 4:
            require.fail("grid", "must hold a multiple of four patches for merge", f"{c.grid} × {c.grid}")
        self.map = nn.Linear(4 * c.image_dim, c.dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.map(image.unflatten(1, (-1, 4)).flatten(2))


class Resampled(nn.Module):
    """Qwen-VL's: queries on a grid over the picture, (B, N, I) → (B, P, D)."""

    def __init__(self, c: BridgeConfig):
        super().__init__()
        side = round(c.queries**0.5)
        if side**2 != c.queries:
            require.fail("queries", "must be a square for the resampler", c.queries)
        self.resampler = Resampler(c.image_dim, c.dim, c.heads, side)
        self.register_buffer("places", grid_positions(c.grid, c.grid, c.dim, side), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.resampler(image, self.places)


class Asked(nn.Module):
    """BLIP-2's: a Q-Former's queries, which every layer lets look at the picture, and a linear map."""

    def __init__(self, c: BridgeConfig):
        super().__init__()
        sizes = dict(queries=c.queries, dim=c.dim, layers=c.bridge_layers, heads=c.heads, hidden=c.hidden)
        none = dict(vocab_size=0, words=False, embed=0, captions=False)
        self.qformer = Qformer(QformerConfig(**sizes, **none, image_dim=c.image_dim, every=1))
        self.map = nn.Linear(c.dim, c.dim)

    def forward(self, image: Tensor) -> Tensor:
        rows = self.qformer.query.expand(len(image), -1, -1)
        return self.map(self.qformer.run(rows, rows.shape[1], image))


CONNECTORS = {
    "pooled": Pooled,
    "linear": lambda c: nn.Linear(c.image_dim, c.dim),
    "mlp": lambda c: nn.Sequential(nn.Linear(c.image_dim, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.dim)),
    "merge": Merge,
    "resampler": Resampled,
    "qformer": Asked,
}
READERS = ("frozen", "lora", "tuned")


class Bridge(nn.Module):
    """A language model, `reader`, whatever learns of it, and the `connector` that tells it of pictures."""

    def __init__(self, config: BridgeConfig):
        super().__init__()
        self.config = c = config
        if c.connector not in CONNECTORS:
            require.fail("connector", f"must be one of {', '.join(CONNECTORS)}", c.connector)
        if c.reader not in READERS:
            require.fail("reader", f"must be one of {', '.join(READERS)}", c.reader)
        self.reader = LanguageModel(c)
        self.connector = CONNECTORS[c.connector](c)
        if c.reader != "tuned":
            freeze(self.reader)
        if c.reader == "lora":
            rng = np.random.default_rng(0)
            for block in self.reader.blocks:
                block.qkv, block.proj = (Lora(z, c.rank, 2 * c.rank, rng) for z in (block.qkv, block.proj))

    def prefix(self, image: Tensor) -> Tensor:
        """What the language model is told: picture states (B, N, I) → rows (B, P, D)."""
        require.shapes(Tensor, image=(image, f"B {self.config.grid**2} {self.config.image_dim}"))
        require.floats(image=image)
        return self.connector(image)

    def encode(self, ids: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        """States (B, L, D) of texts that follow a picture; ids and text_mask as of LanguageModel.encode."""
        return self.reader.encode(ids, text_mask, self.prefix(image))

    def scores(self, states: Tensor) -> Tensor:
        """Scores of the next token: states (…, D) → (…, V)."""
        return self.reader.scores(states)


@dataclass
class Reading:
    """What `decoder.decode` asks to write after [CLS], a prefix (n, P, D) and more ids."""

    model: LanguageModel
    prefix: Tensor

    def next_scores(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """As of `decoder.Writer`."""
        rows = self.model.word(ids)
        if cache is None:  # beams repeat the prefix
            prefix = self.prefix.repeat_interleave(len(ids) // len(self.prefix), 0)
            rows = torch.cat([rows[:, :1], prefix, rows[:, 1:]], 1)
        states, cache = self.model.run(rows, cache)
        return self.model.scores(states[:, -1]), cache


@torch.no_grad()
def small_init(model: LanguageModel) -> LanguageModel:
    """Values with which a small one learns from little text (`parts.begin_alike`), in place; return it."""
    nn.init.normal_(model.word.weight, std=1)
    begin_alike(model.blocks)
    return model
