"""The two walks of `stream` in Triton: one kernel folds, one accumulates, and a step function makes the loss.

A tile of S_ij = r_i c_j (x_i · y_j) never leaves the chip. One program owns a strip of rows and walks:

    fold          S_ij + v_j is folded into three numbers for each row
    accumulate    a step turns S into G; the program adds up dx_i = r_i Σ_j G_ij c_j y_j, and sums along rows

For the columns call it with the sides exchanged, `fold(step, columns, rows)`. So every number is written by
one program, in one order: no atomics, the same bits in every run, and S made once more for each side. A side
is its rows and three vectors: `times` (r, c) the scale, or 1/‖row‖ where S is a cosine; `plus` (u, v) a bias,
a potential, or what the first walk made; `ids`: positive_ij is true where row and column have the same id.

A step is a `@triton.jit` function that the kernel takes as a `tl.constexpr`, compiled into it:

    logsumexp(state, S, positive, first)    → (top, Σ_j exp(S_ij − top), Σ_j S_ij positive_ij)
    best(state, S, positive, first)         → (maximum, the first column that holds it, 0)
    infonce, plan, sigmoid(S, u, v, positive)    → (G, a tile to be summed along rows beside G)

Numbers: products of float16 or bfloat16 are added up in float32, and float32 is multiplied as such ("ieee":
TF32 would keep 10 bits of it). Before sm_80 no chip multiplies bfloat16: there both half precisions are read
as they are and converted to float32 on the chip. D is padded to a multiple of 16 where it is not one: rows
that begin off 16 bytes would be loaded number by number.

Sources: Tillet, Kung and Cox 2019 (Triton); Dao et al. 2022 (FlashAttention); Cheng et al. 2024 (Inf-CL).
Left out: attention, whose gradient needs a second product for each tile, and which torch has as
`scaled_dot_product_attention`; the tensor cores of sm_75; gradients of gradients.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minivlp.core.transport import MIN_NORM

LOWEST = tl.constexpr(-1e30)  # below any S, yet finite: −inf − (−inf) would be NaN


@triton.jit
def similarities(x, y, r, c, i, j, b, M, N, D, DOT: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile S[i, j] of problem b, in float32; zero outside of M and N."""
    S = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    rows = x + (b.to(tl.int64) * M + i)[:, None] * D
    columns = y + (b.to(tl.int64) * N + j)[None, :] * D
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        X = tl.load(rows + d[None, :], (i < M)[:, None] & (d < D)[None, :], other=0.0)
        Y = tl.load(columns + d[:, None], (j < N)[None, :] & (d < D)[:, None], other=0.0)
        S = tl.dot(X.to(DOT), Y.to(DOT), S, input_precision="ieee")
    return S * r[:, None] * c[None, :]


@triton.jit
def vectors(times, plus, ids, k, b, M):
    """Entries k of the three vectors of a side."""
    at, inside = b.to(tl.int64) * M + k, k < M
    return tl.load(times + at, inside, 0.0), tl.load(plus + at, inside, 0.0), tl.load(ids + at, inside, -1)


@triton.jit
def strip(M, BLOCK_M: tl.constexpr):
    """The rows and the problem of this program, and the number of problems."""
    strips = tl.cdiv(M, BLOCK_M)
    i = tl.program_id(0) % strips * BLOCK_M + tl.arange(0, BLOCK_M)
    return i, tl.program_id(0) // strips, tl.num_programs(0) // strips


@triton.jit(do_not_specialize=["M", "N"])
def fold_kernel(
    x, r, u, row_ids, y, c, v, column_ids, out, M, N, D,
    step: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program folds one strip of one problem into out (3, P, M)."""
    i, b, P = strip(M, BLOCK_M)
    ri, _, row = vectors(r, u, row_ids, i, b, M)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    state = (zeros + LOWEST, zeros, zeros)
    for first in range(0, N, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        cj, vj, column = vectors(c, v, column_ids, j, b, N)
        S = similarities(x, y, ri, cj, i, j, b, M, N, D, DOT, BLOCK_D)
        S = tl.where((j < N)[None, :], S + vj[None, :], -float("inf"))
        positive = (row[:, None] == column[None, :]) & (j < N)[None, :]
        state = step(state, S, positive, first)
    for k in tl.static_range(3):
        tl.store(out + (k * P + b).to(tl.int64) * M + i, state[k], i < M)


@triton.jit(do_not_specialize=["M", "N"])
def accumulate_kernel(
    x, r, u, row_ids, y, c, v, column_ids, dx, sums, M, N, D,
    step: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Each program adds up one strip of one problem: dx (P, M, D), and sums (2, P, M) of G and beside it.

    The strip of dx is too wide for registers. It is added up in memory, which in the cache costs little, and
    without atomics, since no other program touches these rows.
    """
    i, b, P = strip(M, BLOCK_M)
    ri, ui, row = vectors(r, u, row_ids, i, b, M)
    into = dx + (b.to(tl.int64) * M + i)[:, None] * D
    total, beside = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, N, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        cj, vj, column = vectors(c, v, column_ids, j, b, N)
        S = similarities(x, y, ri, cj, i, j, b, M, N, D, DOT, BLOCK_D)
        G, more = step(S, ui[:, None], vj[None, :], row[:, None] == column[None, :])
        G = tl.where((j < N)[None, :], G, 0.0)
        total += tl.sum(G, 1)
        beside += tl.sum(tl.where((j < N)[None, :], more, 0.0), 1)
        columns = y + (b.to(tl.int64) * N + j)[:, None] * D
        for start in range(0, D, BLOCK_E):
            d = start + tl.arange(0, BLOCK_E)
            Y = tl.load(columns + d[None, :], (j < N)[:, None] & (d < D)[None, :], other=0.0)
            # c goes to Y, whose products with it are of ordinary size; G by 1/‖y‖ could leave float16.
            Y = (Y.to(tl.float32) * cj[:, None]).to(DOT)
            inside = (i < M)[:, None] & (d < D)[None, :]
            so_far = tl.load(into + d[None, :], inside & (first > 0), other=0.0)
            product = tl.dot(G.to(DOT), Y, input_precision="ieee")
            tl.store(into + d[None, :], so_far + ri[:, None] * product, inside)
        tl.debug_barrier()  # the next tile reads what other threads of this program have written
    tl.store(sums + b.to(tl.int64) * M + i, total, i < M)
    tl.store(sums + (P + b).to(tl.int64) * M + i, beside, i < M)


@triton.jit
def logsumexp(state, S, positive, first):
    """Running maximum, sum of exponentials below it, and the score of the row's positive."""
    top, total, positives = state
    new = tl.maximum(top, tl.max(S, 1))
    total = total * tl.exp(top - new) + tl.sum(tl.exp(S - new[:, None]), 1)
    return new, total, positives + tl.sum(tl.where(positive, S, 0.0), 1)


@triton.jit
def best(state, S, positive, first):
    """Running maximum and its column; a number below 2²⁴ is exact in float32. The first of equals wins."""
    top, place, unused = state
    value, index = tl.max(S, 1, return_indices=True)
    return tl.maximum(top, value), tl.where(value > top, (first + index).to(tl.float32), place), unused


@triton.jit
def infonce(S, u, v, positive):
    """G = P_row + P_col − 2 I, with u and v minus the logsumexp of row and column."""
    return tl.exp(S + u) + tl.exp(S + v) - tl.where(positive, 2.0, 0.0), tl.zeros_like(S)


@triton.jit
def plan(S, u, v, positive):
    """G = a transport plan, with u and v its potentials."""
    return tl.exp(S + u + v), tl.zeros_like(S)


@triton.jit
def sigmoid(S, u, v, positive):
    """G = −z σ(−z s) with s = S + u + v and z = ±1, beside it softplus(−z s)."""
    s = tl.where(positive, -S - u - v, S + u + v)
    e = tl.exp(-tl.abs(s))
    slope = tl.where(s > 0, 1.0, e) / (1.0 + e)
    # log(1 + e) = 2 artanh z: the logarithm of 1 + e would lose the digits of a small e, its series does not.
    z = e / (2.0 + e)  # at most 1/3
    q = z * z
    log = 2 * z * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13))))))
    return tl.where(positive, -slope, slope), tl.maximum(s, 0.0) + log


class Side(NamedTuple):
    """Rows (P, M, D) of P problems; float32 `times` and `plus` and int32 `ids` for each of them, (P, M)."""

    rows: Tensor
    times: Tensor
    plus: Tensor
    ids: Tensor


class Tile(NamedTuple):
    """m × n entries of S; steps of d along D to make it, of e along D for its product; what products take."""

    m: int
    n: int
    d: int
    e: int
    warps: int
    stages: int
    dot: Any


def side(
    rows: Tensor, times: float | Tensor = 1.0, plus: float | Tensor = 0.0, ids: Tensor | None = None
) -> Side:
    """A side of S from rows (M, D) or (P, M, D); `times` and `plus` broadcast to (P, M), ids count up."""
    rows = rows if rows.ndim == 3 else rows[None]  # (P, M, D)
    shape = rows.shape[:2]
    rows = F.pad(rows.detach(), (0, -rows.shape[2] % 16)).contiguous()
    ids = torch.arange(shape[1], device=rows.device) if ids is None else ids
    times, plus = (
        torch.as_tensor(t, dtype=torch.float32, device=rows.device).detach() for t in (times, plus)
    )
    return Side(rows, *(t.expand(shape).contiguous() for t in (times, plus, ids.int())))


def lengths(rows: Tensor) -> Tensor:
    """‖row‖ of rows (…, D) in float32, at least 1e-5: what `times` divides by to make S a cosine."""
    return torch.linalg.vector_norm(rows.detach(), dim=-1, dtype=torch.float32).clamp_min(MIN_NORM)


def tile_for(dtype: torch.dtype, chip: int | None) -> Tile:
    """For rows of `dtype` on `chip`, 80 for sm_80: the largest without spills. None is the interpreter."""
    if chip is None:  # small, so that small tests have edges; the interpreter's product of bfloat16 is inf
        return Tile(16, 16, 16, 16, 4, 1, tl.float16 if dtype == torch.float16 else tl.float32)
    if dtype == torch.float32 or chip < 80:
        return Tile(64, 64, 16, 16, 8, 1, tl.float32)
    return Tile(64, 64, 32, 64, 8, 3, {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype])


def chip_of(x: Tensor) -> int | None:
    """80 for a tensor on an sm_80; None for one on the CPU, where Triton can only be interpreted."""
    if not x.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def fold(step: Any, rows: Side, columns: Side, tile: Tile | None = None) -> Tensor:
    """The three numbers that `step` makes of each row of S: (3, P, M), float32."""
    x, y = rows.rows, columns.rows
    P, M, D = x.shape
    t = tile or tile_for(x.dtype, chip_of(x))
    out = x.new_empty(3, P, M, dtype=torch.float32)
    with torch.cuda.device_of(x):
        fold_kernel[(triton.cdiv(M, t.m) * P,)](
            *rows, *columns, out, M, y.shape[1], D, step, t.dot, t.m, t.n, t.d,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out


def accumulate(step: Any, rows: Side, columns: Side, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """(dx (P, M, D), sums (2, P, M)), float32: the gradient of `rows`, and sums of G and beside it."""
    x, y = rows.rows, columns.rows
    P, M, D = x.shape
    t = tile or tile_for(x.dtype, chip_of(x))
    dx, sums = x.new_empty(P, M, D, dtype=torch.float32), x.new_empty(2, P, M, dtype=torch.float32)
    with torch.cuda.device_of(x):
        accumulate_kernel[(triton.cdiv(M, t.m) * P,)](
            *rows, *columns, dx, sums, M, y.shape[1], D, step, t.dot, t.m, t.n, t.d, t.e,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return dx, sums
