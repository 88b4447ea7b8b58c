"""Vector quantisation: a vector becomes the number of its nearest code, and so a picture becomes words.

Vectors z (M, D) and codes C (K, D). Since ‖z_i − c_k‖² = ‖z_i‖² − S_ik, the nearest code is a row argmax of
one matrix,

    S_ik = 2 z_i · c_k − ‖c_k‖²,        a_i = argmax_k S_ik,  the first k on ties,

and the reduction is that of stream.fold with scale 2 and a bias for each column, −‖c_k‖². Codes and vectors
learn from each other by

    quantised_i = c_{a_i},        loss = 1/MD Σ_i [ ‖sg z_i − c_{a_i}‖² + β ‖z_i − sg c_{a_i}‖² ],

sg = stop gradient. The first term moves codes to their vectors, the second ties vectors to their codes; β
stands on the second, where much public code has it on the first.

Gradient: with d_i = z_i − c_{a_i}, dz_i = 2β d_i / MD + G_i, where G is the gradient of `quantised`, passed
straight through the argmax, which has none; and dc_k = −2 Σ_{a_i = k} d_i / MD.

A code that no vector chooses has no gradient and stays dead, and a VQ-VAE can end with one code for all.
`restart_dead` puts such codes on vectors that exist. `kmeans` needs no network: codes become the means of
their vectors, step by step, and the mean distance never rises.

Rungs (M × K scores):
    nearest_np, vq_np          S whole; gradients by hand
    nearest, vq                the same in PyTorch; autograd keeps M × D numbers, but S is made whole
    nearest_fused, vq_fused    one walk over tiles of S, which keeps each row's best score and its place

Sources: Lloyd 1982 (k-means); van den Oord, Vinyals and Kavukcuoglu 2017 (VQ-VAE), eq. 3; Łańcucki et al.
2020 for restarts of dead codes.
Left out: codes that follow a running mean in place of a gradient; products of several small codebooks;
centring z and C before S is made, which would save digits far from the origin.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working, working_np

Rows = TypeVar("Rows", np.ndarray, Tensor)


def _check(library, z, codes, beta: float = 1.0) -> None:
    """Refuse other than z (M, D), codes (K, D) with K ≥ 1, D ≥ 1, and beta ≥ 0."""
    sizes = require.shapes(library, z=(z, "M D"), codes=(codes, "K D"))
    require.floats(z=z, codes=codes)
    if not sizes["K"] or not sizes["D"]:
        require.fail("codes", "must hold at least one code of width ≥ 1", tuple(codes.shape))
    require.finite(beta=beta)
    if beta < 0:
        require.fail("beta", "must be ≥ 0", beta)


def _squares(codes):
    """‖c_k‖² (K,), which must be finite."""
    squares = (codes * codes).sum(1)
    require.held(squares, "squared length", "codes", squares.dtype)
    return squares


def nearest_np(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The nearest code of each vector: z (M, D), codes (K, D) → ids (M,) int64, the first on ties.

    Raises ValueError on bad shapes, mixed dtypes, NaN, infinities, no code and scores that overflow.
    """
    _check(np.ndarray, z, codes)
    z, codes = working_np(z, codes)
    S = 2 * z @ codes.T - _squares(codes)  # (M, K)
    require.held(S.max(1), "score", "z", S.dtype)
    return S.argmax(1)


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """The nearest code of each vector: z (M, D), codes (K, D) → ids (M,). Errors as in `nearest_np`."""
    _check(Tensor, z, codes)
    with at_least_float32(z.detach(), codes.detach()) as (x, c):
        best, ids = (2 * x @ c.T - _squares(c)).max(1)  # of (M, K)
    require.held(best, "score", "z", best.dtype)
    return ids


def vq_np(z: np.ndarray, codes: np.ndarray, beta: float = 0.25, grad=None):
    """Quantisation, its loss, and the gradients by hand.

    z (M, D), codes (K, D), beta ≥ 0; grad = (dL/dquantised (M, D), dL/dloss), None = zeros and 1, which is
    the loss alone. Returns `((quantised (M, D), loss), (dz, dcodes))`. Raises ValueError as `nearest_np`
    does, for beta < 0, and for distances that overflow.
    """
    _check(np.ndarray, z, codes, beta)
    ids, dtype = nearest_np(z, codes), z.dtype
    z, codes = working_np(z, codes)
    quantised, numbers = codes[ids], max(z.size, 1)
    d = z - quantised  # (M, D)
    loss = (1 + beta) * (d**2).sum() / numbers  # both terms have this value; only their gradients differ
    G, g = (0.0, 1.0) if grad is None else grad
    # The second term moves z alone, and what follows `quantised` moves z as if it had been z.
    dz = 2 * beta * g / numbers * d + G
    # The first moves codes alone, each by the vectors that chose it.
    dcodes = np.zeros_like(codes)
    np.add.at(dcodes, ids, -2 * g / numbers * d)
    return (quantised.astype(dtype), require.loss(loss, z=z)), (dz, dcodes)


def vq(z: Tensor, codes: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor]:
    """Quantisation and its loss: z (M, D), codes (K, D) → (quantised (M, D), loss).

    The rows of quantised are those of codes, exactly; their gradient goes to z. Errors as in `vq_np`.
    """
    _check(Tensor, z, codes, beta)
    chosen = codes[nearest(z, codes)]  # (M, D)
    quantised = chosen.detach() + (z - z.detach())  # z − z is 0, with a gradient
    with at_least_float32(z, chosen) as (x, c):
        both = (x.detach() - c).square().sum() + beta * (x - c.detach()).square().sum()
    return quantised, require.loss(both / max(z.numel(), 1), z=z)


# The fused rungs never hold S: one walk over its tiles keeps the best score of each row and its place.


def nearest_fused(z: Tensor, codes: Tensor) -> Tensor:
    """`nearest` tile by tile; arguments and errors as there.

    The plain rung writes S to memory and reads it again, 2 M · K numbers beside the product; this one keeps
    its tiles in the cache.
    """
    _check(Tensor, z, codes)
    with at_least_float32(z.detach(), codes.detach()) as (x, c):
        best = x.new_full((len(x),), -torch.inf)
        ids = torch.zeros_like(best, dtype=torch.int64)
        stream.fold(nearest_tile, x, c, best, ids, scale=2.0, bias=-_squares(c))
    require.held(best, "score", "z", best.dtype)
    return ids


def nearest_tile(S, scratch, rows, columns, best, ids) -> None:
    """Fold the tile into the best score (M,) of each row and its place (M,)."""
    top = S.amax(1)
    better = top > best[rows]  # not ≥: of equal scores the first stays
    best[rows][better] = top[better]
    ids[rows][better] = S[better].argmax(1) + columns[0].start


def vq_fused(z: Tensor, codes: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor]:
    """`vq` by `nearest_fused`, with gradients by hand: kept are z, codes and one id a row.

    Arguments and errors as there; it can be differentiated once.
    """
    _check(Tensor, z, codes, beta)
    quantised, loss = stream.differentiable(_Fused, z, codes, nearest_fused(z, codes), float(beta))
    return quantised, require.loss(loss, z=z)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, codes, ids, beta):
        ctx.save_for_backward(z, codes, ids)
        ctx.beta, ctx.numbers = beta, max(z.numel(), 1)
        x, c = working(z, codes)
        loss = (1 + beta) * (x - c[ids]).square_().sum() / ctx.numbers
        return codes[ids], loss.to(z.dtype)

    @staticmethod
    def backward(ctx, G, g):
        stream.refuse_create_graph()
        z, codes, ids = ctx.saved_tensors
        x, c = working(z, codes)
        d = (x - c[ids]).mul_(2 * g / ctx.numbers)  # (M, D)
        dz = d.mul(ctx.beta).add_(G).to(z.dtype) if ctx.needs_input_grad[0] else None
        dcodes = torch.zeros_like(c).index_add_(0, ids, d, alpha=-1).to(codes.dtype)
        return dz, dcodes if ctx.needs_input_grad[1] else None, None, None


def perplexity(ids: Tensor, K: int) -> float:
    """How many of K codes are used, exp of the entropy of ids (M,): K when all are used alike, 1 for one."""
    share = torch.bincount(ids, minlength=K).double() / max(len(ids), 1)  # (K,)
    return float(torch.special.entr(share).sum().exp())


def restart_dead(codes: Tensor, ids: Tensor, z: Tensor, rng: np.random.Generator) -> Tensor:
    """The codes (K, D), where those that no entry of ids (N,) names are rows of z (M, D) drawn at random.

    Raises ValueError on bad shapes, and where a code is dead and there is no row to draw.
    """
    M = require.shapes(Tensor, codes=(codes, "K D"), ids=(ids, "N"), z=(z, "M D"))["M"]
    require.generator(rng)
    dead = torch.bincount(ids, minlength=len(codes)) == 0  # (K,)
    if not M and dead.any():
        require.fail("z", "must hold a row for a dead code", tuple(z.shape))
    drawn = torch.from_numpy(rng.integers(len(z), size=int(dead.sum()))).to(z.device)
    codes = codes.detach().clone()
    codes[dead] = z.detach()[drawn].to(codes)
    return codes


def kmeans(z: Rows, K: int, rng: np.random.Generator, steps: int = 20) -> Rows:
    """K codes for the vectors z (M, D), by Lloyd's steps from K of the vectors: (K, D), of z's library.

    Each step moves every code to the mean of the vectors that are nearest to it, and dead codes to vectors
    drawn at random; neither lets the mean squared distance rise. Raises ValueError on bad shapes and dtypes,
    NaN, infinities, K outside [1, M] and steps < 0.
    """
    if isinstance(z, np.ndarray):
        return kmeans(torch.from_numpy(z), K, rng, steps).numpy()
    M = require.shapes(Tensor, z=(z, "M D"))["M"]
    require.floats(z=z)
    require.generator(rng)
    if not 1 <= K <= M:
        require.fail("K", f"must lie in [1, {M}], the number of vectors", K)
    if steps < 0:
        require.fail("steps", "must be ≥ 0", steps)
    (x,) = working(z.detach())
    codes = x[torch.from_numpy(rng.choice(M, K, replace=False)).to(x.device)]
    for _ in range(steps):
        ids = nearest_fused(x, codes)
        sizes = torch.bincount(ids, minlength=K).clamp_min(1)[:, None]
        means = torch.zeros_like(codes).index_add_(0, ids, x).div_(sizes)
        codes = restart_dead(means, ids, x, rng)
    return codes.to(z.dtype)


RUNGS = {
    "nearest": {"np": nearest_np, "torch": nearest, "fused": nearest_fused},
    "vq": {"np": vq_np, "torch": vq, "fused": vq_fused},
    "kmeans": {"plain": kmeans},
}
