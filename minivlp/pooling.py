"""Attention pooling: learned queries read a picture of any size, and as many vectors come out.

With queries Q (Q, D) and the tokens X (N, D) of one picture, of which some may be padding:

    S = Q Xᵀ / √D,        P = row softmax of S over the real tokens,        O = P X.

It is attention whose queries are parameters and whose keys and values are one. One query makes the vector of
a dual encoder (SigLIP), two sets of them serve contrast and captions (CoCa), 256 are what a language model is
given to read (Qwen-VL).

Gradient, with G = dL/dO, dP = G Xᵀ and dS = P ∘ (dP − rowsum(P ∘ dP)) / √D: dQ = Σ_b dS X, and a token is
felt twice, as a value and as a key, dX = Pᵀ G + dSᵀ Q.

Nothing in O tells where a patch was: all patches may be shuffled. `Resampler` therefore adds positions to
queries and keys, so that a query can ask for a place; the values stay what the patches say.

Rungs:
    attention_pool_np    P in full, (B, Q, N); gradients by hand
    attention_pool       the same in PyTorch
`attention_fused` serves where N is large; Q is small here.

Sources: Lee et al. 2019 (Set Transformer), section 3.2 (pooling by attention); Zhai et al. 2022 (Scaling
Vision Transformers), for one query; Yu et al. 2022 (CoCa), for two sets; Bai et al. 2023 (Qwen-VL), section
2.1.
Left out: Qwen-VL resizes one table of positions to the grid of the picture; sines need no table.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.attention import attend
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working_np
from minivlp.transformer import join_heads, normal_init, split_heads


def _check(library, queries, x, mask) -> None:
    sizes = require.shapes(library, queries=(queries, "Q D"), x=(x, "B N D"))
    require.floats(queries=queries, x=x)
    if not sizes["N"] or not sizes["D"]:
        require.fail("x", "must hold at least one token of width ≥ 1", tuple(x.shape))
    require.token_mask("mask", mask, x)


def attention_pool_np(queries: np.ndarray, x: np.ndarray, mask=None, grad: np.ndarray | None = None):
    """Attention pooling and its gradients by hand.

    queries (Q, D), x (B, N, D), mask (B, N) or (N,) bool, True = real, with a True in every row; grad
    (B, Q, D) the upstream gradient (None = ones). Returns `(out (B, Q, D), (dqueries, dx))`. Raises
    ValueError on bad shapes, mixed dtypes, NaN, infinities, a picture without a token and scores that
    overflow.
    """
    _check(np.ndarray, queries, x, mask)
    dtype, (queries, x) = x.dtype, working_np(queries, x)
    scale = 1 / math.sqrt(x.shape[-1])
    S = queries @ x.swapaxes(-1, -2) * scale  # (B, Q, N)
    if mask is not None:
        S = np.where(mask[..., None, :], S, -np.inf)
    P = np.exp(S - S.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    out = P @ x  # (B, Q, D)
    require.held(out, "result", "x", dtype)
    G = np.ones_like(out) if grad is None else grad
    # As in attention_np: O = P X, and the softmax takes the mean slope of a row from each of its slopes. The
    # mean is made from those slopes, so that a row with one token that counts has exactly none.
    dP = G @ x.swapaxes(-1, -2)
    dS = P * (dP - (P * dP).sum(-1, keepdims=True)) * scale
    # The queries are shared by all pictures; a token is a value, by P, and a key, by S.
    dqueries = (dS @ x).sum(0)
    dx = P.swapaxes(-1, -2) @ G + dS.swapaxes(-1, -2) @ queries
    return out, (dqueries, dx)


def attention_pool(queries: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention pooling: queries (Q, D), x (B, N, D), mask (B, N) or (N,) → (B, Q, D).

    Errors as in `attention_pool_np`. Half precisions are added up in float32, also under autocast.
    """
    _check(Tensor, queries, x, mask)
    with at_least_float32(queries, x) as (q, z):
        allowed = None if mask is None else mask[..., None, :].expand(len(x), len(q), -1)[:, None]
        z = z[:, None]  # (B, 1, N, D)
        out = attend(q.expand(len(x), 1, -1, -1), z, z, allowed)[:, 0].to(x.dtype)
    require.held(out, "result", "x", x.dtype)
    return out


def grid_positions(rows: int, columns: int, dim: int, unit: int) -> Tensor:
    """Positions of a grid of patches, (rows · columns, dim), row-major: sines and cosines of the centres.

    A quarter each are sin and cos of the row and of the column; a picture is `unit` wide and high, whatever
    its grid, so two grids of one picture have positions that match. dim must be divisible by 4.
    """
    if dim < 4 or dim % 4:
        require.fail("dim", "must be divisible by 4", dim)
    wave = 1e4 ** -(torch.arange(dim // 4) / (dim // 4))  # (dim/4,)
    angles = [((torch.arange(n) + 0.5) * unit / n)[:, None] * wave for n in (rows, columns)]  # (n, dim/4)
    down, across = (torch.cat([angle.sin(), angle.cos()], 1) for angle in angles)  # (n, dim/2)
    both = down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)
    return torch.cat(both, -1).flatten(0, 1)


class Resampler(nn.Module):
    """Qwen-VL's adapter: learned queries on a grid of side × side read the patches of a picture of any size.

    q = LN(query) + position, k = LN(W x) + position, v = LN(W x) without one; attention with `heads` heads,
    which must divide dim, then LN and a linear map. Two queries differ by what they ask for and by where.
    """

    def __init__(self, width: int, dim: int, heads: int, side: int, eps: float = 1e-6):
        super().__init__()
        if heads < 1 or dim % heads:
            require.fail("heads", f"must divide dim={dim}", heads)
        self.heads, self.side = heads, side
        self.queries = nn.Parameter(torch.empty(side * side, dim).normal_(std=0.02))
        self.read = nn.Linear(width, dim, bias=False)
        self.norm_query, self.norm_read, self.norm = (nn.LayerNorm(dim, eps) for _ in range(3))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.out = nn.Linear(dim, dim, bias=False)
        self.apply(normal_init)
        self.register_buffer("places", grid_positions(side, side, dim, side), persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, width), positions (N, dim) or (B, N, dim), mask (B, N) bool of real patches.

        `grid_positions(rows, columns, dim, side)` are the positions of a whole picture.
        """
        tokens = self.norm_read(self.read(x))  # (B, N, dim)
        q = self.q(self.norm_query(self.queries) + self.places).expand(len(x), -1, -1)
        k, v = self.k(tokens + positions), self.v(tokens)
        q, k, v = (split_heads(z, self.heads) for z in (q, k, v))  # (B, heads, …, d)
        mixed = join_heads(attend(q, k, v, None if mask is None else mask[:, None, None]))
        return self.out(self.norm(self.proj(mixed)))


RUNGS = {
    "attention_pool": {"np": attention_pool_np, "torch": attention_pool},
    "resampler": {"plain": Resampler},
}
