"""Sinkhorn: the cheapest way to send words to patches when every token must give and receive its exact share.

Among the plans T ≥ 0 with row sums a and column sums b, the entropic optimum

    T = argmin ⟨T, C⟩ − ε H(T) = exp(uᵢ − Cᵢⱼ / ε + vⱼ)

is found by solving for one marginal at a time, in logarithms so that no ε underflows:

    vⱼ = log bⱼ − logsumexpᵢ(uᵢ − Cᵢⱼ / ε),        then        uᵢ = log aᵢ − logsumexpⱼ(vⱼ − Cᵢⱼ / ε).

u and v are dimensionless; in units of cost they are ε·u and ε·v. v comes first, so the row sums are exact at
the end, and the error of the column sums shrinks with the iterations. As ε → 0 the plan solves the linear
programme, as ε → ∞ it is a bᵀ.

The alignment cost is ⟨T, C⟩ with C = 1 − cos(x, y). Gradient: T is held fixed, so dC = T.

Rungs (M × N pairs, width D):
    sinkhorn_np, sinkhorn             the plan: a few M × N arrays, or, when PyTorch differentiates the plan,
                                      a few for every iteration
    sinkhorn_cost_np, sinkhorn_cost   ⟨T, C⟩ with T a constant: a few M × N arrays, however many iterations
    sinkhorn_cost_fused               the same from one M × N array, which is S, the kernel and the plan in
                                      turn; gradients by hand, ready after the forward pass: (M + N) × D kept
The fused rung scales exp(−C/ε) itself, v = b / (Kᵀu), u = a / (Kv), as long as `exponent_budget` ≥ 1: in
float32 for range(C)/ε up to 66. Beyond, it takes logarithms, block by block, as the other rungs do.

Sources: Cuturi 2013, algorithm 1; Peyré and Cuturi 2019 (Computational Optimal Transport), section 4.4.
Left out: the debiased divergence and unbalanced marginals, which solve other problems; a stopping rule,
because rungs can be compared only at the same number of iterations.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working, working_np
from minivlp.core.transport import (
    LOG_ZERO,
    LONG,
    MIN_NORM,
    alignment_grads,
    cosines,
    sinkhorn_scaled,
    within_range,
)


def sinkhorn_np(
    cost: np.ndarray,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    eps: float = 0.05,
    iters: int = 100,
    row_mask: np.ndarray | None = None,
    col_mask: np.ndarray | None = None,
) -> np.ndarray:
    """The entropic transport plan (…, M, N) of cost (…, M, N), with exact row sums.

    a (…, M) and b (…, N) are the marginals, each summing to one; None is uniform over the real tokens (mask
    True). eps > 0 is in units of cost. Raises ValueError on bad shapes, dtypes, NaN, infinities, an
    all-False mask row, eps ≤ 0 or below the rounding of the costs, and marginals that are negative, do not
    sum to one or put weight on padding.
    """
    _check(np.ndarray, cost, a, b, eps, iters, row_mask, col_mask)
    log_a = log_weights_np(a, row_mask, cost.shape[-2])  # (…, M)
    log_b = log_weights_np(b, col_mask, cost.shape[-1])  # (…, N)
    K = -working_np(cost)[0] / eps  # (…, M, N)
    u = np.where(log_a > LOG_ZERO, 0.0, LOG_ZERO)
    for _ in range(iters):
        v = log_b - logsumexp_np(K + u[..., None], -2)  # columns
        u = log_a - logsumexp_np(K + v[..., None, :], -1)  # rows last: their sums are exact
    return np.exp(K + u[..., None] + v[..., None, :])


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    iters: int = 100,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
) -> Tensor:
    """The entropic transport plan (…, M, N); arguments and errors as in `sinkhorn_np`.

    Differentiable through every iteration, in memory for all of them; `sinkhorn_cost` holds the plan fixed
    instead. Half precisions are solved in float32, and the plan is returned in the dtype of the cost.
    """
    _check(Tensor, cost, a, b, eps, iters, row_mask, col_mask)
    K = -working(cost)[0] / eps  # (…, M, N)
    log_a = log_weights(a, row_mask, K, -2)  # (…, M)
    log_b = log_weights(b, col_mask, K, -1)  # (…, N)
    u = torch.where(log_a > LOG_ZERO, 0.0, LOG_ZERO).to(K.dtype)
    for _ in range(iters):
        v = log_b - (K + u[..., None]).logsumexp(-2)
        u = log_a - (K + v[..., None, :]).logsumexp(-1)
    return (K + u[..., None] + v[..., None, :]).exp().to(cost.dtype)


def log_weights_np(weights: np.ndarray | None, mask: np.ndarray | None, length: int) -> np.ndarray:
    """log weights (…, length), uniform over the real tokens when None; LOG_ZERO where the weight is 0."""
    if weights is None:
        real = np.ones(length, dtype=bool) if mask is None else mask
        weights = real / real.sum(-1, keepdims=True)
    return np.where(weights > 0, np.log(np.where(weights > 0, weights, 1.0)), LOG_ZERO)


def log_weights(weights: Tensor | None, mask: Tensor | None, like: Tensor, axis: int) -> Tensor:
    """The same for one axis of the cost `like` (…, M, N), in its dtype and on its device."""
    if weights is None:
        real = like.new_ones(like.shape[axis]) if mask is None else mask.to(like.dtype)
        weights = real / real.sum(-1, keepdim=True)
    weights = weights.to(like.dtype)
    return torch.where(weights > 0, weights.clamp_min(torch.finfo(like.dtype).tiny).log(), LOG_ZERO)


def logsumexp_np(x: np.ndarray, axis: int) -> np.ndarray:
    """log Σ exp(x) along one axis, shifted by the maximum so that nothing overflows."""
    top = x.max(axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis)) + top.squeeze(axis)


def _check(library, cost, a, b, eps, iters, row_mask, col_mask) -> None:
    check_cost(library, cost, row_mask, col_mask, iters, eps=eps)
    _check_marginals(library, tuple(cost.shape), a, b, row_mask, col_mask)


def _check_marginals(library, shape, a, b, row_mask=None, col_mask=None) -> None:
    for name, weights, mask, axis in (("a", a, row_mask, -2), ("b", b, col_mask, -1)):
        if weights is not None:
            require.of_library(library, name, weights)
            check_weights(name, weights, mask, shape[:-2], shape[axis])


def check_cost(library, cost, row_mask, col_mask, iters: int, **temperature: float) -> None:
    """Refuse what is not a finite `cost (…, M, N)`, unfit masks, iters < 1 and a bad temperature."""
    sizes = require.shapes(library, cost=(cost, "… M N"))
    require.floats(cost=cost)
    if sizes["M"] * sizes["N"] == 0:
        require.fail("cost", "must have at least one row and one column", tuple(cost.shape))
    require.token_mask("row_mask", row_mask, cost)
    require.token_mask("col_mask", col_mask, cost.swapaxes(-1, -2))
    check_iters(iters)
    real = cost if row_mask is None else cost * row_mask[..., None]  # padding may cost anything
    check_temperature(real if col_mask is None else real * col_mask[..., None, :], cost.dtype, **temperature)


def check_temperature(costs, dtype, **temperature: float) -> None:
    """Refuse a temperature `name=value` that is not > 0, or at which the rounding of C/ε decides the plan."""
    require.positive(**temperature)
    ((name, value),) = temperature.items()
    rounding = 2.0**-52 if "float64" in str(dtype) else 2.0**-23
    over = abs(costs) > value / rounding  # costs: an array, or one number
    if bool(over.any() if hasattr(over, "any") else over):
        require.fail(
            name, f"must be at least the rounding of the costs, {rounding:.2g} of the largest", value
        )


def check_iters(iters: int) -> None:
    if not isinstance(iters, int | np.integer) or isinstance(iters, bool) or iters < 1:
        require.fail("iters", "must be a whole number ≥ 1", iters)


def check_weights(name: str, weights, mask, leading: tuple[int, ...], length: int) -> None:
    """Refuse weights that are negative, do not sum to one, or lie on a padded token. Zeros are legal."""
    require.axis(name, weights, leading, length)
    require.floats(**{name: weights})
    if bool((weights < 0).any()):
        require.fail(name, "must not be negative", float(weights.min()))
    finfo = torch.finfo if isinstance(weights, Tensor) else np.finfo
    total = weights.sum(-1)
    off = float(abs(total - 1).max()) if 0 not in total.shape else 0.0
    if off > max(1e-6, length * float(finfo(weights.dtype).eps)):
        require.fail(name, "must sum to one", f"a sum that is off by {off:.3g}")
    if mask is not None and bool(((weights > 0) & ~mask).any()):
        require.fail(name, "must be zero where the mask is False", "weight on a padded token")


LARGEST = 2.0  # 1 − cos is no larger


def unit_np(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of x (…, D) divided by max(‖row‖, 1e-5); returns the rows and those divisors (…, 1)."""
    top = abs(x).max(-1, keepdims=True, initial=0)
    part = np.where(top > LONG, top, 1).astype(x.dtype)  # what is longer would leave the range when squared
    x = x / part
    length = np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), MIN_NORM)
    return x / length, part * length


def unit_grad_np(unit: np.ndarray, length: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """The gradient of x given the gradient of its unit rows, both (…, D)."""
    # û = x / ‖x‖ moves only across itself: dx = (dû − û ⟨û, dû⟩) / ‖x‖. Where the divisor is the constant
    # 1e-5 it does not move at all, and dx = dû / 1e-5.
    along = np.where(length > MIN_NORM, (unit * grad).sum(-1, keepdims=True), 0.0)
    return (grad - unit * along) / length


def unit(x: Tensor) -> Tensor:
    """Rows of x (…, D) divided by max(‖row‖, 1e-5)."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """cos between rows: x (…, M, D), y (…, N, D) → (…, M, N), in float32 at least, also under autocast."""
    with at_least_float32(*within_range(x, y)) as (x, y):  # a cosine rounded to 8 bits is a different plan
        return unit(x) @ unit(y).mT


def sinkhorn_cost_np(
    x: np.ndarray,
    y: np.ndarray,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    eps: float = 0.05,
    iters: int = 100,
):
    """⟨T, C⟩ with C = 1 − cos(x, y) and T the Sinkhorn plan of C, and its gradients with T held fixed.

    x (M, D), y (N, D); a, b, eps, iters as in `sinkhorn_np` act through the plan only, so they have no
    gradient. Returns `(value, (d x, d y))`; the value lies in [0, 2]. Raises ValueError as `sinkhorn_np`
    does.
    """
    _check_rows(np.ndarray, x, y, eps)
    (p, x_length), (q, y_length) = map(unit_np, working_np(x, y))
    C = 1 - p @ q.T  # (M, N)
    T = sinkhorn_np(C, a, b, eps, iters)
    # value = Σ_ij T_ij (1 − p_i · q_j) with T a constant, so dp_i = −Σ_j T_ij q_j and dq_j = −Σ_i T_ij p_i.
    dx = unit_grad_np(p, x_length, -T @ q)
    dy = unit_grad_np(q, y_length, -T.T @ p)
    return float((T * C).sum()), (dx, dy)


def sinkhorn_cost(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    iters: int = 100,
) -> Tensor:
    """⟨sg(T), C⟩ with C = 1 − cos: x (M, D), y (N, D) → scalar; otherwise as `sinkhorn_cost_np`."""
    _check_rows(Tensor, x, y, eps)
    C = 1 - cosine(x, y)  # (M, N)
    with torch.no_grad():
        T = sinkhorn(C, a, b, eps, iters)
    return (T * C).sum().to(x.dtype)


def _check_rows(library, x, y, eps) -> None:
    require.shapes(library, x=(x, "M D"), y=(y, "N D"))
    require.tokens(("x", x, "", None), ("y", y, "", None))
    check_temperature(LARGEST, x.dtype, eps=eps)


# The fused rung scales the kernel exp(−C/ε) by vectors, without logarithms, where the exponents of the dtype
# allow it (see core/transport.py). S, the kernel and the plan are one array in turn, and the gradients of the
# rows are made by hand from the plan, two products for both.


def sinkhorn_cost_fused(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    iters: int = 100,
) -> Tensor:
    """`sinkhorn_cost` by products of the kernel with vectors and a gradient by hand; differentiable once.

    In units of M·N numbers an iteration of the plain rung reads and writes some 14, for two logsumexps of
    arrays that it makes; this one reads 1, because a block of rows is used for u and for the columns at once.
    """
    _check_rows(Tensor, x, y, eps)
    check_iters(iters)
    _check_marginals(Tensor, (len(x), len(y)), a, b)
    return stream.differentiable(_Fused, *within_range(x, y), a, b, eps, iters)


class _Fused(stream.GradientsFromForward):
    @staticmethod
    def forward(ctx, x, y, a, b, eps, iters):
        p, q = working(x, y)
        S, per_x, per_y = cosines(p, q)  # (M, N), (M, 1), (N, 1)
        a, b = (
            S.new_full((n,), 1 / n) if weights is None else weights.to(S.dtype)
            for weights, n in ((a, len(x)), (b, len(y)))
        )
        top = S.max()
        log_kernel = S.sub_(top).div_(eps)  # −C/ε but for a constant, which the scalings absorb
        T = sinkhorn_scaled(log_kernel, a[:, None], b[None], iters)
        T_cos = log_kernel.mul_(eps).add_(top).mul_(T)  # T · cos
        value = (T.sum(1) - T_cos.sum(1)).sum()
        gradients = alignment_grads(T, T_cos, p, q, per_x, per_y, ctx.needs_input_grad)
        ctx.save_for_backward(*(g if g is None else g.to(x.dtype) for g in gradients))
        return value.to(x.dtype)


RUNGS = {
    "sinkhorn": {"np": sinkhorn_np, "torch": sinkhorn},
    "sinkhorn_cost": {"np": sinkhorn_cost_np, "torch": sinkhorn_cost, "fused": sinkhorn_cost_fused},
}
