"""What the fused transports share: kernels with scalings, and the way back through the cosine.

The plan of Sinkhorn and of IPOT is T = exp(t · K + uᵢ + vⱼ), K = −C/ε. Two forms find the potentials u, v:

    product form    row and column sums of exp(t · K) are products with vectors; u and v are scaled, not added
    logarithms      every sum is a logsumexp: several times slower, and right for any K

`exponent_budget` decides between them from the range of K and the exponents of float32 or float64.

The gradient of ⟨T, C⟩, C = 1 − cos, is made from T in two products and in one pass over the tokens.

Source: Schmitzer 2019 (Stabilized sparse scaling algorithms), section 3: absorbing scalings.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minivlp.core.precision import working

# The log-weight of a token of weight 0. Finite, because −inf − (−inf) is NaN; its exp is exactly 0.
LOG_ZERO = -1e30
# A row shorter than this is divided by it instead of by its length, so that a zero row stays zero.
MIN_NORM = 1e-5
# Rows with longer entries are scaled before they are squared: float32 has no 1e20².
LONG = 2.0**32
# Entries that are worked on together: a block of them stays in the cache from one operation to the next.
BLOCK = 2**16


def exponent_budget(log_kernel: Tensor) -> float:
    """The largest t for which exp(t · log_kernel), of entries ≤ 0, is safe in its dtype.

    The fused solvers choose their form by it. Scalings are about as large as the kernel is small, so the
    kernel may use three quarters of the exponents that the dtype has (66 of the 88 of float32).
    """
    return 0.75 * math.log(torch.finfo(log_kernel.dtype).max) / max(-float(log_kernel.min()), 1e-9)


def potential_dtype(z: Tensor) -> torch.dtype:
    """float64 where there is one: potentials are as large as the logarithms that they cancel."""
    return torch.float32 if z.device.type == "mps" else torch.float64


def logarithms(weights: Tensor) -> Tensor:
    """log weights in the dtype of potentials, LOG_ZERO where the weight is 0."""
    return torch.where(weights > 0, weights.to(potential_dtype(weights)).log(), LOG_ZERO)


def gibbs(log_kernel: Tensor, u: Tensor, v: Tensor, out: Tensor, power: int = 1) -> Tensor:
    """out = exp(power · log_kernel + u + v) (…, M, N), u (…, M, 1), v (…, 1, N); out may be log_kernel."""
    rows = max(1, BLOCK // log_kernel[..., :1, :].numel())
    for o, k, r in zip(*(z.split(rows, -2) for z in (out, log_kernel, u)), strict=True):
        o.copy_(torch.add(r, k, alpha=power).add_(v))  # added up in the dtype of the potentials
    return out.exp_()


def log_sums(log_kernel: Tensor, u: Tensor, axis: int, power: int = 1) -> Tensor:
    """logsumexp of power · log_kernel + u along axis −2 or −1, which is kept with length 1, slab by slab."""
    across = -3 - axis
    width = max(1, BLOCK // log_kernel.select(across, 0).numel())
    slabs = log_kernel.split(width, across)
    return torch.cat([torch.add(u, k, alpha=power).logsumexp(axis, keepdim=True) for k in slabs], across)


def within_range(*sets: Tensor) -> tuple[Tensor, ...]:
    """Token sets (…, D), rows with an entry above LONG divided by a power of two: cosines stay to the bit."""
    return tuple(map(_within_range, sets))


def _within_range(x: Tensor) -> Tensor:
    if torch.finfo(x.dtype).max < LONG or not bool((x.detach().norm(dim=-1) > LONG).any()):
        return x
    (part,) = working(torch.linalg.vector_norm(x.detach(), torch.inf, -1, keepdim=True))  # (…, 1)
    exponent = torch.frexp(part).exponent.where(part > LONG, 0)
    return x * torch.ldexp(torch.ones_like(part), -exponent).to(x.dtype)


def cosines(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos (…, M, N) of the rows of x (…, M, D) and y (…, N, D), and 1/‖x‖ (…, M, 1), 1/‖y‖ (…, N, 1).

    No copy of x or y is made: their products are divided by their lengths.
    """
    per_x, per_y = (1 / z.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM) for z in (x, y))
    return (x @ y.mT).mul_(per_x).mul_(per_y.mT), per_x, per_y


def alignment_grads(
    T: Tensor, T_cos: Tensor, x: Tensor, y: Tensor, per_x: Tensor, per_y: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dy of ⟨T, 1 − cos⟩ with T (…, M, N) held fixed; T_cos is T · cos. T is overwritten."""
    W = T.mul_(per_x).mul_(per_y.mT)  # (…, M, N)
    dx = _token_grad(x, per_x, W, y, T_cos.sum(-1, keepdim=True)) if wanted[0] else None
    dy = _token_grad(y, per_y, W.mT, x, T_cos.sum(-2, keepdim=True).mT) if wanted[1] else None
    return dx, dy


def _token_grad(x: Tensor, per_x: Tensor, W: Tensor, y: Tensor, along: Tensor) -> Tensor:
    # cos = xᵢ · yⱼ / (‖xᵢ‖ ‖yⱼ‖). Its first factor pulls xᵢ to Σⱼ Wᵢⱼ yⱼ; d(1/‖xᵢ‖) = −xᵢ · dxᵢ / ‖xᵢ‖³ takes
    # the part along xᵢ back, Σⱼ Tᵢⱼ cosᵢⱼ in all. A divisor that is the constant 1e-5 does not change.
    dx = x * (along * per_x.square() * (per_x < 1 / MIN_NORM))
    multiply = torch.addmm if dx.ndim == 2 else torch.baddbmm
    return multiply(dx, W, y, alpha=-1, out=dx)


def sinkhorn_scaled(log_kernel: Tensor, a: Tensor, b: Tensor, iters: int) -> Tensor:
    """Sinkhorn's plan (M, N) of log_kernel = −C/ε (M, N), at most 0, and the marginals a (M, 1), b (1, N)."""
    if exponent_budget(log_kernel) < 1:
        log_a, log_b = logarithms(a), logarithms(b)
        u = torch.where(a > 0, 0.0, log_a)
        for _ in range(iters):
            v = log_b - log_sums(log_kernel, u, -2)
            u = log_a - log_sums(log_kernel, v, -1)
        return gibbs(log_kernel, u, v, out=torch.empty_like(log_kernel))
    K, u = log_kernel.exp(), (a > 0).to(a.dtype)  # (M, N), (M, 1)
    column_sums = u.mT @ K  # (1, N)
    blocks = list(zip(*(z.split(max(1, BLOCK // K.shape[1])) for z in (K, a, u)), strict=True))
    for _ in range(iters):
        v = b / column_sums
        column_sums.zero_()
        for k, a_k, u_k in blocks:  # a block is read once: for its rows, then for its share of Kᵀu
            torch.div(a_k, k @ v.mT, out=u_k)
            column_sums.addmm_(u_k.mT, k)
    return K.mul_(u).mul_(v)


def safe_steps(log_kernel: Tensor) -> int:
    """How many steps of IPOT the product form may take before its scalings go into the kernel; 0: logarithms.

    A third of `exponent_budget`, because extrapolated scalings outgrow the kernel that they answer.
    """
    return int(exponent_budget(log_kernel) / 3)


def ipot_scalings(
    log_kernel: Tensor, padding: Tensor, mu: Tensor, nu: Tensor, iters: int
) -> tuple[Tensor, Tensor]:
    """u (b, L, 1) and v (b, 1, N) of IPOT's plan exp(iters · log_kernel + u + v) for a batch of pairs.

    log_kernel (b, L, N) is −C/β, at most 0, and 0 where padding (b, L, N) is True; mu (b, L, 1) and
    nu (b, 1, N) are the marginals, 0 for padded tokens.
    """
    most, dtype = safe_steps(log_kernel), potential_dtype(log_kernel)
    if most == 0:
        u = before = log_mu = logarithms(mu)
        log_nu = logarithms(nu)
        for t in range(1, iters + 1):
            v = log_nu - log_sums(log_kernel, 2 * u - before, -2, t)
            before, u = u, log_mu - log_sums(log_kernel, v, -1, t)
        return u, v
    u, v, a = torch.zeros_like(mu, dtype=dtype), torch.zeros_like(nu, dtype=dtype), (mu > 0).to(mu.dtype)
    K, P = log_kernel.exp(), torch.empty_like(log_kernel)
    for done in range(0, iters, most):
        # All scalings so far go into the kernel, so that the next ones start at one.
        gibbs(log_kernel, u, v, P, done + 1).masked_fill_(padding, 1)
        a, row, column = _steps(P, K, a, mu, nu, min(most, iters - done))
        u, v = u + row.log(), v + column.log()
    return u, v


def _steps(P: Tensor, K: Tensor, a: Tensor, mu: Tensor, nu: Tensor, steps: int) -> tuple[Tensor, ...]:
    """Proximal steps on P (b, L, N), multiplied by K after each: the last a, and all scalings A and B.

    With r = P B the rows' scaling is A = μ/r, and the extrapolated A²/A₋₁ is μ · r₋₁ / r².
    """
    # What follows is this loop, in place and block by block:
    #
    #     r = mu
    #     for _ in range(steps):
    #         B = nu / (a.mT @ P)           (b, 1, N), columns
    #         before, r = r, P @ B.mT       (b, L, 1), rows
    #         a = mu * before / r**2
    #         P = P * K
    #     return before / r, mu / r, B
    #
    # One large pair is walked in blocks of rows: a block's r, its product with K and its share of the next
    # column sums aᵀP are made while it is in the cache. Several small pairs are one block. Two buffers hold r
    # and r₋₁ in turn: r of the even steps and r of the odd ones.
    column_sums, B = a.mT @ P, nu.new_empty(nu.shape)  # not empty_like: its strides would slow bmm down
    a, even, odd = a.clone(), torch.empty_like(a), mu.clone()
    size = max(1, BLOCK // P.shape[2]) if len(P) == 1 else P.shape[1]
    blocks = list(zip(*(z.split(size, 1) for z in (P, K, mu, a, even, odd)), strict=True))
    for step in range(steps):
        torch.div(nu, column_sums, out=B)
        column_sums.zero_()
        for p, k, m, a_block, r_even, r_odd in blocks:
            r, before = (r_odd, r_even) if step % 2 else (r_even, r_odd)
            torch.bmm(p, B.mT, out=r)
            torch.div(before, r, out=a_block).div_(r).mul_(m)
            column_sums.baddbmm_(a_block.mT, p.mul_(k))
    r, before = (odd, even) if steps % 2 == 0 else (even, odd)
    return before / r * (mu > 0), mu / r, B
