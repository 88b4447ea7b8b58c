"""The two towers of a dual encoder: pixels to a vector, ids to a vector, by a transformer and a pooling each.

    image    [CLS] in front and its state projected ("cls"), or a learned query that reads all patches ("map")
    text     causal and read at the end-of-text token ("eot"), or both ways and at the last position ("last")

In a causal tower only the last token has seen all the others, so that one is read. With attention pooling
(MAP) no token has to carry the sum through the blocks: p = proj(Attention(probe, tokens)), p + MLP(LN p).

Sources: Radford et al. 2021 (CLIP), section 2.4; Zhai et al. 2022 (Scaling vision transformers), section 3.2,
for attention pooling; Hendrycks and Gimpel 2016 for the two approximations of GELU.
Left out: images of other sizes than the stored grid of positions; dropping of patches.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from minivlp.attention import attention
from minivlp.core import require
from minivlp.patch import PatchEmbed
from minivlp.transformer import Encoder, normal_init


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the approximation of x Φ(x) that OpenAI's CLIP was trained with."""
    return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu, "gelu_pytorch_tanh": partial(gelu, approximate="tanh"), "quick_gelu": quick_gelu,
}  # fmt: skip


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
        B, N, D = x.shape
        heads, d = self.heads, D // self.heads
        (Wq, Wkv), (bq, bkv) = (t.split([D, 2 * D]) for t in (self.qkv.weight, self.qkv.bias))
        q = linear(self.probe, Wq, bq).view(1, heads, 1, d).expand(B, -1, -1, -1)  # (B, heads, 1, d)
        k, v = linear(x, Wkv, bkv).view(B, N, 2, heads, d).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        mixed = self.proj(attention(q, k, v).reshape(B, D))
        return mixed + self.fc2(self.activation(self.fc1(self.norm(mixed))))


class ImageTower(nn.Module):
    """Pixels (B, 3, H, W) → pooled images (B, embed), not yet of unit length."""

    def __init__(
        self, embed: int, patch: int, image_size: int, dim: int, layers: int, heads: int, hidden: int,
        eps: float, activation: str, pool: str,
    ):  # fmt: skip
        super().__init__()
        cls, nonlinear = pool == "cls", ACTIVATIONS[activation]
        self.size = image_size
        self.cls = nn.Parameter(torch.empty(dim).normal_(std=0.02)) if cls else None
        tokens = (image_size // patch) ** 2 + cls
        self.position = nn.Parameter(torch.empty(tokens, dim).normal_(std=0.02))  # row 0 for cls
        self.pre_norm = nn.LayerNorm(dim, eps) if cls else None
        self.encoder = Encoder(dim, heads, hidden, layers, eps, nonlinear)
        self.pool = None if cls else MapPool(dim, heads, hidden, eps, nonlinear)
        self.project = nn.Linear(dim, embed, bias=False) if cls else None
        self.apply(normal_init)
        self.patch = PatchEmbed(dim, patch, bias=not cls)

    def states(self, pixels: Tensor) -> Tensor:
        """The tokens after the final norm: (B, N, D), or (B, 1+N, D) with [CLS] first."""
        B = require.shapes(pixels=(pixels, "B 3 H W"))["B"]
        if tuple(pixels.shape[2:]) != (self.size, self.size):
            require.fail("pixels", f"must be {self.size} × {self.size}", tuple(pixels.shape))
        z = self.patch(pixels)  # (B, N, D)
        if self.cls is None:
            return self.encoder(z + self.position)
        z = torch.cat([self.cls.expand(B, 1, -1), z], 1) + self.position  # (B, 1+N, D)
        return self.encoder(self.pre_norm(z))

    def forward(self, pixels: Tensor) -> Tensor:
        z = self.states(pixels)
        return self.project(z[:, 0]) if self.pool is None else self.pool(z)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Every patch as if it stood alone, (B, N, embed): projected, or pooled with no other to look at."""
        z = self.states(pixels)
        return self.project(z[:, 1:]) if self.pool is None else self.pool(z.flatten(0, 1)[:, None]).view_as(z)


class TextTower(nn.Module):
    """Ids (B, L) → pooled texts (B, embed), not yet of unit length."""

    def __init__(
        self, embed: int, vocab_size: int, max_text_len: int, eot: int | None, dim: int, layers: int,
        heads: int, hidden: int, eps: float, activation: str, pool: str,
    ):  # fmt: skip
        super().__init__()
        self.causal, self.eot = pool == "eot", eot
        self.word = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.empty(max_text_len, dim).normal_(std=0.02))
        self.encoder = Encoder(dim, heads, hidden, layers, eps, ACTIVATIONS[activation])
        self.project = nn.Linear(dim, embed, bias=not self.causal)
        self.apply(normal_init)

    def states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The tokens after the final norm, (B, L, D)."""
        L, (longest, V) = require.shapes(ids=(ids, "B L"))["L"], (len(self.position), len(self.word.weight))
        require.integers(ids=ids)
        if not 1 <= L <= longest:
            require.fail("ids", f"must have 1 to {longest} words", L)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= V):
            require.fail("ids", f"must lie in [0, {V})", f"{int(ids.min())} to {int(ids.max())}")
        if mask is not None:
            require.shapes(ids=(ids, "B L"), mask=(mask, "B L"))
            require.mask("mask", mask, whole_rows=True)
        keys = None if mask is None or bool(mask.all()) else mask[:, None, None]
        return self.encoder(self.word(ids) + self.position[:L], keys, self.causal)

    def _end(self, ids: Tensor) -> Tensor:
        """The position of each text's end-of-text token, (B,): the first, where padding repeats its id."""
        if self.eot is None:
            return ids.argmax(1)
        found = ids == self.eot
        if not bool(found.any(1).all()):  # argmax would say 0: every such text the same vector
            require.fail("ids", f"must hold the end-of-text id {self.eot} in every row", "a row without")
        return found.int().argmax(1)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        z = self.states(ids, mask)
        if not self.causal:
            return self.project(z[:, -1])
        return self.project(z[torch.arange(len(z), device=z.device), self._end(ids)])
