"""What several models share: the check of their inputs, heads, attention pooling, positions, initial values.

    check_text                ids and mask of a batch of texts, looked at once and by no block
    MlmHead, classifier       heads on the states; MaskedWords gives a model the methods that read its MlmHead
    MapPool                   attention pooling: p = proj(Attention(probe, tokens)), p + MLP(LN p)
    positions                 a stored grid resized to another picture; sines and cosines of row and column
    alike, begin_alike, mean_of_seen    attention that begins as a meaningful map

Sources: Devlin et al. 2019 (BERT) for the masked-word head; Zhai et al. 2022 (Scaling vision transformers),
section 3.2, for attention pooling; Chen, Xie and He 2021 (MoCo v3) for sine-cosine positions on a grid;
Trockman and Kolter 2023 (mimetic initialization) for attention's first values.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, linear

from minivlp.attention import attend
from minivlp.core import require
from minivlp.transformer import join_heads, split_heads


def check_text(ids: Tensor, mask: Tensor | None, vocab_size: int, longest: int, name: str = "mask") -> int:
    """Refuse what is not `ids (B, L)` in [0, vocab_size) with 1 ≤ L ≤ longest; return L.

    mask is None or (B, L) bool, True = a word, with a word in every row; `name` is what the caller calls it.
    """
    L = require.shapes(ids=(ids, "B L"))["L"]
    require.integers(ids=ids)
    if not 1 <= L <= longest:
        require.fail("ids", f"must have 1 to {longest} words", L)
    low, high = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        require.fail("ids", f"must lie in [0, {vocab_size})", f"{low} to {high}")
    if mask is not None:
        require.shapes(ids=(ids, "B L"), **{name: (mask, "B L")})
        require.mask(name, mask, whole_rows=True)
    return L


class MlmHead(nn.Module):
    """Dense, GELU, LayerNorm, then a decoder over the vocabulary: its own, or None when tied to the words."""

    def __init__(self, vocab_size: int, dim: int, eps: float, tied: bool):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps)
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: Tensor) -> Tensor:
        """What the decoder reads, (…, D) → (…, D): on the masked rows alone it is cheaper."""
        return self.norm(gelu(self.dense(states)))

    def logits(self, states: Tensor, weight: Tensor) -> Tensor:
        """Scores over the vocabulary by a decoder (V, D): states (…, D) → (…, V)."""
        return linear(self(states), weight, self.bias)


class MaskedWords:
    """The methods of a model by which its masked-word head is read; the model has `mlm` and `word`."""

    @property
    def mlm_weight(self) -> Tensor:
        """The masked-word decoder (V, D): the word embedding when the head is tied."""
        weight = self._head("mlm").weight
        return self.word.weight if weight is None else weight

    @property
    def mlm_bias(self) -> Tensor:
        """The masked-word decoder's bias (V,)."""
        return self._head("mlm").bias

    def mlm_hidden(self, text: Tensor) -> Tensor:
        """The masked-word head before its decoder: text states (…, D) → (…, D)."""
        return self._head("mlm")(text)

    def mlm_logits(self, text: Tensor) -> Tensor:
        """Scores over the vocabulary: text states (…, D) → (…, V)."""
        return self._head("mlm").logits(text, self.mlm_weight)

    def _head(self, name: str) -> nn.Module:
        head = getattr(self, name)
        if head is None:
            require.fail("model", f"must have the {name} head", "a configuration without it")
        return head


def classifier(width: int, hidden: int, labels: int) -> nn.Sequential:
    """The two-layer head of VQA and NLVR2; its norm has torch's own eps, 1e-5, in the original too."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, labels))


class MapPool(nn.Module):
    """Attention pooling: one learned query, the probe, reads all tokens, then an MLP; (B, N, D) → (B, D)."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, activation: Callable):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.probe = nn.Parameter(torch.empty(dim).normal_(std=dim**-0.5))
        self.qkv = nn.Linear(dim, 3 * dim)  # the rows of q read the probe, those of k and v the tokens
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) → (B, D)."""
        B, _, D = x.shape
        (Wq, Wkv), (bq, bkv) = (t.split([D, 2 * D]) for t in (self.qkv.weight, self.qkv.bias))
        q = split_heads(linear(self.probe, Wq, bq).expand(B, 1, D), self.heads)  # (B, heads, 1, d)
        k, v = (split_heads(z, self.heads) for z in linear(x, Wkv, bkv).chunk(2, -1))  # (B, heads, N, d)
        mixed = self.proj(join_heads(attend(q, k, v))[:, 0])  # (B, D)
        return mixed + self.fc2(self.activation(self.fc1(self.norm(mixed))))


def resize_positions(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Resize a grid of positions (g, h, D) → (rows, columns, D), bilinear with the corners kept in place."""
    if grid.shape[:2] == (rows, columns):
        return grid
    image = grid.permute(2, 0, 1)[None]  # (1, D, g, h)
    return interpolate(image, size=(rows, columns), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)


def sine_cosine_positions(grid: int, dim: int) -> Tensor:
    """Positions (grid², dim), row-major, of unit variance: a quarter each of sin and cos of row and column.

    The wavelengths run geometrically from about one grid width to far beyond it. dim must be divisible by 4.
    """
    wave = 100 ** -(torch.arange(dim // 4) / (dim // 4))  # (dim/4,)
    angle = torch.linspace(0, 6, grid)[:, None] * wave  # (grid, dim/4)
    code = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim/2)
    rows, columns = code[:, None].expand(-1, grid, -1), code[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, dim)


def alike(query: Tensor, key: Tensor) -> None:
    """Let a token look first at tokens like itself: W_k = W_q, orthogonal; both (D, D), in place."""
    nn.init.orthogonal_(query)
    key.copy_(query)


@torch.no_grad()
def begin_alike(blocks: Iterable[nn.Module]) -> None:
    """Let decoder blocks begin by looking at tokens like one's own, and with orthogonal maps, in place."""
    for block in blocks:
        query, key, value = block.qkv.weight.chunk(3)
        alike(query, key)
        nn.init.orthogonal_(value)
        nn.init.orthogonal_(block.mlp.gate.weight)
        nn.init.orthogonal_(block.mlp.up.weight)


def mean_of_seen(value: Tensor, out: Tensor) -> None:
    """Let attention give the mean of what it sees: W_out W_v = 1, both orthogonal (D, D), in place."""
    nn.init.orthogonal_(value)
    out.copy_(value.T)
