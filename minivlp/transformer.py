"""The pre-norm transformer: blocks that add attention, then an MLP, to a stream of tokens, each after a norm.

For tokens z (L, D):

    z ← z + MSA(LN(z)),        z ← z + W₂ gelu(W₁ LN(z) + b₁) + b₂,        after the last block LN(z).

The sum z passes every block unchanged, so gradients reach the embeddings undamped; that is why the norm
stands before each part ("pre-norm") and one more stands at the end. LayerNorm gives every token mean 0 and
variance 1 over its width, then a learned scale and shift; with x̂ = (x − mean)/√(var + ε):

    LN(x) = w ∘ x̂ + b,        dx = (g − mean(g) − x̂ mean(g ∘ x̂)) / √(var + ε),  g = w ∘ dL/dLN.

Rungs:
    layer_norm_np    two passes over each row, (…, D) extra for x̂; gradients by hand
    layer_norm       the same in PyTorch; autograd keeps the centred rows and two scalars a row

Sources: Vaswani et al. 2017; Ba, Kiros and Hinton 2016 (LayerNorm), section 3; Dosovitskiy et al. 2021 (ViT),
eq. 2 to 4, for the pre-norm order; Hendrycks and Gimpel 2016 for gelu(x) = x Φ(x), here with the exact error
function.
Left out: dropout (0.1 in ViLT's pretraining, 0 in its Hugging Face configuration, of no use to one short pass
over composed scenes) and stochastic depth.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from minivlp.attention import attend
from minivlp.core import require
from minivlp.core.precision import working, working_np


def _check(library, x, weight, bias, eps: float) -> None:
    require.shapes(library, x=(x, "… D"), weight=(weight, "D"), bias=(bias, "D"))
    require.floats(x=x, weight=weight, bias=bias)
    require.positive(eps=eps)


def layer_norm_np(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-6, grad=None):
    """LayerNorm over the last axis and its gradients by hand.

    x (…, D), weight (D,), bias (D,), eps > 0 added to the variance, grad (…, D) the upstream gradient (None =
    ones). Returns `(out (…, D), (dx, dweight, dbias))`. Raises ValueError on bad shapes, mixed
    dtypes, NaN, infinities, eps ≤ 0 and a variance that overflows.
    """
    _check(np.ndarray, x, weight, bias, eps)
    x, weight, bias = working_np(x, weight, bias)
    centred = x - x.mean(-1, keepdims=True)  # centre first: E[x²] − E[x]² cancels when the mean is large
    variance = (centred**2).mean(-1, keepdims=True)  # (…, 1)
    require.held(variance, "variance", "x", x.dtype)
    r = 1 / np.sqrt(variance + eps)  # (…, 1)
    x_hat = centred * r  # (…, D)
    out = weight * x_hat + bias
    G = np.ones_like(out) if grad is None else grad
    leading = tuple(range(x.ndim - 1))
    # out = w ∘ x̂ + b: w and b are shared by all rows, so their gradients are sums over the rows.
    dweight = (G * x_hat).sum(leading)
    dbias = G.sum(leading)
    # x̂ = r · centred. dr = −½ r³ d(var) and d(var)/dx = 2 centred / D give −r x̂ mean(g ∘ x̂);
    # centring sends g to g − mean(g), and mean(x̂) = 0 leaves the other term as it is.
    g = weight * G
    dx = r * (g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True))
    return out, (dx, dweight, dbias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis: x (…, D), weight (D,), bias (D,) → (…, D).

    Errors as in `layer_norm_np`. Half precisions are added up in float32.
    """
    _check(Tensor, x, weight, bias, eps)
    z, w, b = working(x, weight, bias)
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)  # (…, 1)
    require.held(variance, "variance", "x", z.dtype)
    return (w * centred * (variance + eps).rsqrt() + b).to(x.dtype)


class Block(nn.Module):
    """One pre-norm block over tokens (B, L, dim); `heads` must divide dim.

    The norms are torch.nn.LayerNorm: the numbers of `layer_norm` above, in one kernel instead of six. Blocks
    check nothing: a model looks at its inputs once, before the first of them.
    """

    def __init__(self, dim: int, heads: int, hidden: int, eps: float = 1e-6, activation: Callable = gelu):
        super().__init__()
        if heads < 1 or dim % heads:
            require.fail("heads", f"must divide dim={dim}", heads)
        self.heads, self.activation = heads, activation
        self.norm1 = nn.LayerNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim)  # one product for queries, keys and values, its rows in this order
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.apply(normal_init)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, first: int | None = None
    ) -> Tensor:
        """x (B, L, D) → (B, L, D); mask (True = may look) broadcasts to (B, heads, L, L).

        With `first`, all tokens are looked at, but only the first so many are computed: (B, first, D).
        """
        return self.transform(self.attend(x, mask, causal, first))

    def attend(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, first: int | None = None
    ) -> Tensor:
        """The first half: tokens look at one another."""
        z = self.norm1(x)
        if first is None:
            q, k, v = self.qkv(z).chunk(3, -1)
        else:
            sizes = [x.shape[-1], 2 * x.shape[-1]]
            (Wq, Wkv), (bq, bkv) = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
            x, q = x[:, :first], linear(z[:, :first], Wq, bq)
            k, v = linear(z, Wkv, bkv).chunk(2, -1)
            mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., :first, :]
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        return x + self.proj(join_heads(attend(q, k, v, mask, causal)))

    def follow(self, x: Tensor, past: list[Tensor]) -> Tensor:
        """The last row of a causal pass: one more token x (B, 1, D), behind those in `past`.

        past: the keys and values (B, heads, L, d) of the tokens before, [] of none; those of x join them.
        """
        q, k, v = (split_heads(z, self.heads) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
        return self.transform(x + self.proj(join_heads(attend(q, *past))))

    def transform(self, x: Tensor) -> Tensor:
        """The second half: the MLP, each token by itself."""
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    """`layers` pre-norm blocks and the final LayerNorm."""

    def __init__(
        self, dim: int, heads: int, hidden: int, layers: int, eps: float = 1e-6, activation: Callable = gelu
    ):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, eps, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, first: int | None = None
    ) -> Tensor:
        """x (B, L, D) → (B, L, D), or (B, first, D): the last block computes no token that is not wanted.

        mask (True = may look) broadcasts to (B, heads, L, L).
        """
        for block in self.blocks:
            x = block(x, mask, causal, first if block is self.blocks[-1] else None)
        return self.norm(x)


class CrossBlock(Block):
    """A pre-norm block whose tokens look at one another, then at tokens of another kind, before the MLP."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float = 1e-6, activation: Callable = gelu):
        super().__init__(dim, heads, hidden, eps, activation)
        self.norm_cross = nn.LayerNorm(dim, eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj_cross = nn.Linear(dim, dim)
        self.apply(normal_init)

    def forward(self, x: Tensor, others: Tensor, mask: Tensor | None, others_mask: Tensor | None) -> Tensor:
        """x (B, L, D), others (B, K, D) → (B, L, D); masks (True = may be seen) broadcast to (…, L or K)."""
        x = self.attend(x, mask)
        q = split_heads(self.q(self.norm_cross(x)), self.heads)  # (B, heads, L, d)
        k, v = (split_heads(z, self.heads) for z in self.kv(others).chunk(2, -1))  # (B, heads, K, d)
        return self.transform(x + self.proj_cross(join_heads(attend(q, k, v, others_mask))))


class CrossEncoder(nn.Module):
    """`layers` CrossBlocks and the final LayerNorm. The other tokens come normed from an Encoder."""

    def __init__(self, dim: int, heads: int, hidden: int, layers: int, eps: float = 1e-6):
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, hidden, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, others: Tensor, mask: Tensor | None, others_mask: Tensor | None) -> Tensor:
        """Shapes and masks as in `CrossBlock`."""
        for block in self.blocks:
            x = block(x, others, mask, others_mask)
        return self.norm(x)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Tokens (B, L, D) as `attention` takes them, (B, heads, L, D / heads): a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """The inverse: (B, heads, L, d) → (B, L, heads · d)."""
    return x.transpose(1, 2).flatten(2)


def key_mask(mask: Tensor) -> Tensor | None:
    """Real tokens (B, L) as the mask of `attention`; None, which is faster, where all are real."""
    return None if bool(mask.all()) else mask[:, None, None]


def normal_init(module: nn.Module) -> None:
    """BERT's and ViLT's initial values, for `apply`: weights normal with std 0.02, biases 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


RUNGS = {"layer_norm": {"np": layer_norm_np, "torch": layer_norm}}
