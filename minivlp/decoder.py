"""The decoder of today's language models, and how it writes: one token after the other, from what it allows.

A block is the pre-norm block of transformer.py with four parts exchanged, all of them cheaper or steadier:

    rms_norm     w ∘ x / √(mean x² + ε): LayerNorm without mean and shift. It forgets the length of x alone.
    rotary       the pair (x_i, x_{i + d/2}) is turned by the angle position · θ^(−2i/d). Turning keeps
                 lengths, and ⟨R_m q, R_n k⟩ depends on m − n alone: positions are told by differences.
    gated MLP    W_down (silu(W_gate x) ∘ W_up x)
    QK-norm      queries and keys of each head pass a LayerNorm before they are turned, so that no score can
                 grow with the weights: scaling W_q or W_k changes nothing.

Gradient: with x̂ = x / √(mean x² + ε) and g = w ∘ G, the norm's is (g − x̂ mean(g ∘ x̂)) / √(mean x² + ε), and
dw = Σ G ∘ x̂; a rotation's is the rotation back, R₋ₘ G.

`decode` writes with any model that can tell the scores of the next token (`Writer`): the likeliest token, the
best of several beams, or a draw. What is not allowed has probability exactly 0. Keys and values are kept, so
a token costs one row of attention and not the whole square. Classifier-free guidance, l₀ + s (l − l₀), is a
writer made of two (`Guided`): s = 0 writes without the condition, s = 1 with it, s > 1 beyond it.

Rungs:
    rms_norm_np, rotary_np    gradients by hand
    rms_norm, rotary          the same in PyTorch; the blocks call torch's own kernel of the first
    decode                    no gradient

Sources: Zhang and Sennrich 2019 (RMSNorm), eq. 4; Su et al. 2021 (RoFormer), eq. 34; Shazeer 2020 (GLU
variants), eq. 6; Dehghani et al. 2023 (ViT-22B) and Chameleon team 2024, section 2.3, for QK-norm; Ho and
Salimans 2022 for guidance.
Left out: heads that share keys; top-p and repetition penalties; interleaved pairs (x_2i, x_{2i+1}), which are
the same up to the order of the rows of W_q and W_k.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from minivlp.attention import attend
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working_np
from minivlp.transformer import join_heads, normal_init, split_heads


def _check_norm(library, x, weight, eps: float) -> None:
    require.shapes(library, x=(x, "… D"), weight=(weight, "D"))
    require.floats(x=x, weight=weight)
    require.positive(eps=eps)


def rms_norm_np(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5, grad=None):
    """RMSNorm over the last axis and its gradients by hand.

    x (…, D), weight (D,), eps > 0 added to the mean square, grad (…, D) the upstream gradient (None = ones).
    Returns `(out (…, D), (dx, dweight))`. Raises ValueError on bad shapes, mixed dtypes, NaN, infinities,
    eps ≤ 0 and a mean square that overflows.
    """
    _check_norm(np.ndarray, x, weight, eps)
    x, weight = working_np(x, weight)
    square = (x**2).mean(-1, keepdims=True)  # (…, 1)
    require.held(square, "mean square", "x", x.dtype)
    r = 1 / np.sqrt(square + eps)
    x_hat = x * r  # (…, D)
    out = weight * x_hat
    G = np.ones_like(out) if grad is None else grad
    # w is shared by all rows. x̂ = r · x, and dr/dx = −r³ x / D gives the second term of dx.
    g = weight * G
    dx = r * (g - x_hat * (g * x_hat).mean(-1, keepdims=True))
    return out, (dx, (G * x_hat).sum(tuple(range(x.ndim - 1))))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last axis: x (…, D), weight (D,) → (…, D). Errors as in `rms_norm_np`.

    Half precisions are added up in float32, also under autocast.
    """
    _check_norm(Tensor, x, weight, eps)
    with at_least_float32(x, weight) as (z, w):
        square = z.square().mean(-1, keepdim=True)  # (…, 1)
        require.held(square, "mean square", "x", z.dtype)
        return (w * z * (square + eps).rsqrt()).to(x.dtype)


def _check_rotary(library, x, positions, base: float) -> None:
    sizes = require.shapes(library, x=(x, "B H L d"))
    require.floats(x=x)
    require.positive(base=base)
    if sizes["d"] % 2:
        require.fail("x", "must have an even width d", sizes["d"])
    require.of_library(library, "positions", positions)
    require.integers(positions=positions)
    require.axis("positions", positions, (sizes["B"],), sizes["L"])


def rotary_np(x: np.ndarray, positions: np.ndarray, base: float = 10_000.0, grad=None):
    """Rotary positions and their gradient by hand.

    x (B, H, L, d) with an even d, positions (L,) or (B, L) integers, base = θ > 0, grad (B, H, L, d) the
    upstream gradient (None = ones). Returns `(out (B, H, L, d), (dx,))`. Raises ValueError on bad shapes and
    dtypes, NaN, infinities and base ≤ 0.
    """
    _check_rotary(np.ndarray, x, positions, base)
    (x,) = working_np(x)
    half = x.shape[-1] // 2
    angle = positions[..., None, :, None] * base ** -(np.arange(half) / half)  # (H or B, H, L, d/2)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)

    def turned(z: np.ndarray, sin: np.ndarray) -> np.ndarray:
        a, b = z[..., :half], z[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    G = np.ones_like(x) if grad is None else grad
    return turned(x, sin), (turned(G, -sin),)  # a rotation's transpose turns back


def rotary(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary positions: x (B, H, L, d), positions (L,) or (B, L) integers → (B, H, L, d).

    Errors as in `rotary_np`. Half precisions are turned in float32.
    """
    _check_rotary(Tensor, x, positions, base)
    with at_least_float32(x) as (z,):
        return turn(z, *turns(positions, z.shape[-1], base, z)).to(x.dtype)


def turns(positions: Tensor, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of positions (L,) or (B, L), each (…, 1, L, d/2), made in float64."""
    half = width // 2
    rates = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = positions.cpu()[..., None, :, None] * rates  # (…, 1, L, d/2)
    return angle.cos().to(like), angle.sin().to(like)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary`, unchecked: what the blocks call."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class GatedMlp(nn.Module):
    """W_down (silu(W_gate x) ∘ W_up x), without biases: (…, D) → (…, D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, D)."""
        return self.down(silu(self.gate(x)) * self.up(x))


class HeadNorm(nn.Module):
    """LayerNorm over the width of each head, with a scale and a shift a head: (B, H, L, d) → the same."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, width))
        self.bias = nn.Parameter(torch.zeros(heads, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, L, d) → (B, H, L, d)."""
        return layer_norm(x, x.shape[-1:], eps=1e-5) * self.weight + self.bias


Kept = tuple[Tensor, Tensor]  # keys and values (B, H, n, d) of the tokens so far


class DecoderBlock(nn.Module):
    """RMSNorm, attention with QK-norm and rotary positions, RMSNorm, gated MLP; it checks nothing."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float = 1e-5):
        super().__init__()
        if heads < 1 or dim % (2 * heads):
            require.fail("heads", f"must divide dim={dim} into even widths", heads)
        self.heads = heads
        self.norm1 = nn.RMSNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)  # its rows are those of queries, keys and values
        self.q_norm, self.k_norm = (HeadNorm(heads, dim // heads) for _ in range(2))
        self.proj = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.RMSNorm(dim, eps)
        self.mlp = GatedMlp(dim, hidden)
        self.apply(normal_init)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, kept: Kept | None = None
    ) -> tuple[Tensor, Kept]:
        """x (B, n, D) after the tokens of `kept` → (B, n, D) and what is kept now.

        angles: `turns` of the n positions; mask (True = may look) broadcasts to (B, heads, n, all tokens).
        """
        q, k, v = (split_heads(z, self.heads) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k = turn(self.q_norm(q), *angles), turn(self.k_norm(k), *angles)  # (B, H, n, d)
        if kept is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(kept, (k, v), strict=True))
        x = x + self.proj(join_heads(attend(q, k, v, mask)))
        return x + self.mlp(self.norm2(x)), (k, v)


class Writer(Protocol):
    """What can write: it tells the scores of the next token."""

    def next_scores(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Scores (R, V) of the token after ids, and the cache to come back with.

        ids (R, n) are the tokens that follow those the cache was made of; None is no cache. A cache is a
        tensor with R rows, or a tuple or list of caches.
        """
        ...


class Guided:
    """Classifier-free guidance, l₀ + scale · (l − l₀): l by `model`, l₀ by `other` after another prefix.

    blank (P,): what `other` reads in place of the prefix. scale 0 is `other`, 1 is `model`, exactly.
    """

    def __init__(self, model: Writer, other: Writer, blank: Tensor, scale: float):
        require.finite(scale=scale)
        self.model, self.other, self.blank, self.scale = model, other, blank, float(scale)

    def next_scores(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """As of `Writer`."""
        first, second = (None, None) if cache is None else cache
        conditional, first = self.model.next_scores(ids, first)
        read = self.blank.expand(len(ids), -1) if cache is None else ids
        free, second = self.other.next_scores(read, second)
        return torch.lerp(free, conditional, self.scale), (first, second)  # exact at both ends


def restrict(scores: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities of scores (…, V) among the allowed (V,) bool: −∞, probability 0, for all others."""
    return scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)


@torch.no_grad()
def decode(
    model: Writer,
    prefix: Tensor,
    allowed: Tensor,
    rng: np.random.Generator | None = None,
    temperature: float = 1.0,
    beams: int = 1,
    end: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Write after a prefix, one token at a time.

    model: a `Writer`; prefix (B, P) ids, P ≥ 1; allowed (T, V) bool: which of the V tokens may stand at each
    of the T places; end: the id after which a row is finished, and repeats it at no cost. Without rng the
    likeliest is written: token by token, or with `beams` > 1 the likeliest of the sequences that are kept
    when each place keeps that many; ties go to the first. With rng, each token is drawn from the
    probabilities to the power 1 / temperature. Scores are restricted to what is allowed before anything else.

    Returns the ids (B, T) and their log-probability (B,) float64, at temperature 1, among what is allowed.
    Raises ValueError on bad shapes and dtypes, a place at which nothing is allowed, temperature ≤ 0,
    beams < 1, and beams > 1 beside rng.
    """
    B, P = (require.shapes(Tensor, prefix=(prefix, "B P"))[n] for n in "BP")
    T, V = (require.shapes(Tensor, allowed=(allowed, "T V"))[n] for n in "TV")
    require.integers(prefix=prefix)
    require.mask("allowed", allowed, whole_rows=True)
    require.positive(temperature=temperature)
    if not P:
        require.fail("prefix", "must hold at least one token", tuple(prefix.shape))
    if beams < 1 or (beams > 1 and rng is not None):
        require.fail("beams", "must be at least 1, and 1 beside rng", beams)
    if end is not None and not 0 <= end < V:
        require.fail("end", f"must be None or lie in [0, {V})", end)
    if rng is not None:
        require.generator(rng)
    fresh, cache = prefix.repeat_interleave(beams, 0), None  # (B·beams, P)
    first = torch.arange(B, device=prefix.device)[:, None] * beams  # (B, 1)
    total = torch.full((B, beams), -torch.inf, dtype=torch.float64, device=prefix.device)
    total[:, 0] = 0  # at first all beams are alike, and one of them counts
    written = prefix.new_empty(B * beams, 0)
    for place in range(T):
        scores, cache = model.next_scores(fresh, cache)
        require.shapes(scores=(scores, "R V"), allowed=(allowed, "T V"))
        log_p = restrict(scores.double(), allowed[place])  # (B·beams, V)
        if end is not None and place:
            finished = written[:, -1] == end
            log_p[finished] = -torch.inf
            log_p[finished, end] = 0
        if rng is None:
            sums = (total.view(-1, 1) + log_p).view(B, -1)  # (B, beams · V)
            best = sums.argsort(dim=1, descending=True, stable=True)[:, :beams]
            rows, fresh = (first + best // V).view(-1), (best % V).view(-1, 1)
            if beams > 1:
                written, cache = written[rows], _select(cache, rows)
        else:
            fresh, best = _draw(log_p / temperature, rng), None
            sums = total + log_p.gather(1, fresh)
        total = sums if best is None else sums.gather(1, best)
        written = torch.cat([written, fresh.to(written.dtype)], 1)
    return written.view(B, beams, T)[:, 0], total[:, 0]


def _draw(log_weights: Tensor, rng: np.random.Generator) -> Tensor:
    """One index a row, drawn by weights exp (R, V), by one random number a row: (R, 1)."""
    sums = (log_weights - log_weights.amax(1, keepdim=True)).exp().cumsum(1)
    below = torch.from_numpy(rng.random((len(sums), 1))).to(sums) * sums[:, -1:]
    return torch.searchsorted(sums, below, right=True)  # the first sum above it: never a weight of 0


def _select(cache: Any, rows: Tensor) -> Any:
    """The rows of every tensor of a cache."""
    if isinstance(cache, Tensor):
        return cache[rows]
    return None if cache is None else tuple(_select(part, rows) for part in cache)


RUNGS = {
    "rms_norm": {"np": rms_norm_np, "torch": rms_norm},
    "rotary": {"np": rotary_np, "torch": rotary},
    "decode": {"plain": decode},
}
