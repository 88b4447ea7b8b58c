"""Word-patch alignment in Triton: one program solves the transport of a whole pair without leaving the chip.

A pair has few words and patches, here up to 64 × 256, and IPOT walks over its plan again and again. The tile
that `walks` would make anew in each walk is made once here and stays in registers. With K = exp(−C/β) a step
is

    T ← T · K,   b = ν / (Tᵀ a),   T ← T diag(b),   a = μ / (T 1),   T ← diag(a) T,

a few products an entry and no exponential. Sums of T over a row or column cannot underflow, since before
T · K they are the marginals, and K ≥ exp(−2/β); single entries may, and are then 0, which is their value in
float32. Hence β ≥ 1/32. What is written are ⟨T, C⟩ and log Πa, log Πb, from which T = diag(Πa) Kᵗ diag(Πb):
the gradient −T ŷ is then a walk of `walks.accumulate`, with t/β times the cosine for S.

The table in `traffic` has a row for it. The arrays of the plain rung fit the cache, so neither rung moves
much through memory; the program saves passes over the cache and hundreds of launches.

Source: Xie et al. 2020 (IPOT), algorithm 1; the identity is that of `ipot.ipot_potentials_np`.
Left out: larger pairs, which take the tiles of `stream`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivlp.core.transport import MIN_NORM
from minivlp.kernels import walks
from minivlp.kernels.walks import Tile

ENTRIES = 64 * 256  # of the plan, and as many of K, are what a program can keep in registers
SMALLEST_BETA = 1 / 32


@triton.jit(do_not_specialize=["M", "N", "iters"])
def wpa_kernel(
    x, r, mu, row_ids, y, c, nu, column_ids, value, log_rows, log_columns, M, N, D, beta, iters,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program b transports pair b: value (P,), log_rows (P, M), log_columns (P, N). Weight 0 is padding."""
    b, i, j = tl.program_id(0), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    ri, mi, _ = walks.vectors(r, mu, row_ids, i, b, M)
    cj, nj, _ = walks.vectors(c, nu, column_ids, j, b, N)
    S = walks.similarities(x, y, ri, cj, i, j, b, M, N, D, DOT, BLOCK_D)
    K = tl.exp((S - 1.0) / beta)
    T = tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32)
    a = tl.where(mi > 0, 1.0, 0.0)
    log_A = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(iters):
        T *= K
        scaling = tl.where(nj > 0, nj / tl.sum(T * a[:, None], 0), 0.0)
        T *= scaling[None, :]
        a = tl.where(mi > 0, mi / tl.sum(T, 1), 0.0)
        T *= a[:, None]
        log_A += tl.log(a)
    log_K = tl.log(K)
    tl.store(value + b, -beta * tl.sum(tl.sum(T * log_K, 1), 0))
    tl.store(log_rows + b.to(tl.int64) * M + i, log_A, i < M)
    # Πb is not carried along, for want of registers: it is what gives T its column sums.
    Z = log_A[:, None] + iters * log_K
    top = tl.max(Z, 0)
    log_B = tl.log(tl.sum(T, 0)) - top - tl.log(tl.sum(tl.exp(Z - top[None, :]), 0))
    tl.store(log_columns + b.to(tl.int64) * N + j, log_B, j < N)


def block(length: int) -> int:
    """The power of two, at least 16, that holds so many rows."""
    return max(16, triton.next_power_of_2(length))


def unfit(
    words: Tensor, patches: Tensor, word_mask=None, patch_mask=None, beta: float = 0.5, iters=50
) -> str:
    """Why `wpa` cannot solve these pairs on the chip; empty when it can."""
    L, N = words.shape[1], patches.shape[1]
    if block(L) * block(N) > ENTRIES:
        return f"{L} words and {N} patches exceed a plan of {ENTRIES} entries on the chip"
    return "" if beta >= SMALLEST_BETA else f"beta {beta} is below {SMALLEST_BETA}"


def wpa(
    words: Tensor,
    patches: Tensor,
    word_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    beta: float = 0.5,
    iters: int = 50,
    wanted: tuple[bool, ...] = (True, True),
) -> tuple[Tensor, list[Tensor | None]]:
    """⟨T, C⟩ (B,) and its gradients like words (B, L, D) and patches (B, N, D); arguments as in `ipot.wpa`.

    All float32; the gradients are for an upstream gradient of 1, None where not `wanted`. Pairs must fit.
    """
    P, L, N = *words.shape[:2], patches.shape[1]
    real = [
        torch.ones(t.shape[:2], device=t.device) if mask is None else mask.expand(t.shape[:2]).float()
        for t, mask in ((words, word_mask), (patches, patch_mask))
    ]
    lengths = [walks.lengths(words), walks.lengths(patches)]  # (P, L), (P, N)
    x, y = (
        walks.side(t, 1 / length, weight / weight.sum(1, keepdim=True))
        for t, length, weight in zip((words, patches), lengths, real, strict=True)
    )
    value, log_rows, log_columns = (x.times.new_empty(shape) for shape in ((P,), (P, L), (P, N)))
    t = wpa_tile(words.dtype, walks.chip_of(words), L, N)
    with torch.cuda.device_of(words):
        wpa_kernel[(P,)](
            *x, *y, value, log_rows, log_columns, L, N, x.rows.shape[2], beta, iters,
            t.dot, t.m, t.n, t.d, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    # T_ij = exp(t/β · cos_ij + log Πa_i − t/β + log Πb_j); times L, so that a row sums to one, not to 1/L.
    x = x._replace(times=x.times * (iters / beta), plus=log_rows + (math.log(L) - iters / beta))
    y = y._replace(plus=log_columns)
    sides = (x, y, words, lengths[0]), (y, x, patches, lengths[1])
    gradients = [
        _through_cosine(raw, length, walks.accumulate(walks.plan, rows, columns)[0] * (-beta / (iters * L)))
        if needed
        else None
        for (rows, columns, raw, length), needed in zip(sides, wanted, strict=False)
    ]
    return value, gradients


def _through_cosine(raw: Tensor, length: Tensor, d: Tensor) -> Tensor:
    """d = dû / ‖x‖, padded in width as it comes, becomes dx: of û = x / ‖x‖ only the part across x moves."""
    unit, d = raw.detach() / length[..., None], d[..., : raw.shape[-1]]
    along = torch.where(length > MIN_NORM, (unit * d).sum(-1), 0.0)
    return d - unit * along[..., None]


def wpa_tile(dtype: torch.dtype, chip: int | None, L: int, N: int) -> Tile:
    """One tile for the whole plan, as in `walks.tile_for`; K and T are shared out among more warps."""
    dot = walks.tile_for(dtype, chip).dot
    return Tile(block(L), block(N), 16, 16, 16 if dot == tl.float32 else 8, 1, dot)
