"""Plausible wrong Sinkhorns."""

import numpy as np
import torch

from minivlp.sinkhorn import (
    cosine,
    logsumexp_np,
    sinkhorn,
    sinkhorn_cost,
    sinkhorn_cost_np,
    unit,
    unit_grad_np,
)
from tests.laws import bug

ROWS, COLUMNS, PADDING = "row_sums_are_exact", "column_sums_converge", "padding_takes_no_part"
LARGE, SMALL = "large_eps_gives_the_independent_plan", "small_eps_solves_the_linear_programme"
LOOP, LOST = "equals_the_loop_on_the_real_tokens", "no_row_is_lost_at_small_eps"
THROUGH, SINGLE = "the_plan_is_differentiable", "float32_is_enough"
SHORT, COST, KEPT = "short_rows_have_a_slope", "float32_is_enough_for_the_cost", "no_plan_is_kept"
VALUE, SLOPES = "is_the_plan_times_the_cost", "gradients_hold_the_plan_fixed"


def uniform(cost, a, b, row_mask, col_mask):
    """The default marginals, so that a bug may be wrong in one place only."""
    rows = torch.ones_like(cost[..., 0]) if row_mask is None else row_mask.to(cost)
    columns = torch.ones_like(cost[..., 0, :]) if col_mask is None else col_mask.to(cost)
    a = rows / rows.sum(-1, keepdim=True) if a is None else a
    return a, columns / columns.sum(-1, keepdim=True) if b is None else b


@bug("sinkhorn", ROWS, "Rows first, columns last: now the columns are exact.")
def columns_last(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    return sinkhorn(cost.mT, b, a, eps, iters, col_mask, row_mask).mT


@bug("sinkhorn", ROWS, "Potentials in units of cost, added undivided in the logsumexp; right at ε = 1.")
def unscaled_potentials(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    a, b = uniform(cost, a, b, row_mask, col_mask)
    u = torch.where(a > 0, 0.0, -torch.inf).to(a)
    for _ in range(iters):
        v = eps * (b.log() - (-cost / eps + u[..., None]).logsumexp(-2))
        u = eps * (a.log() - (-cost / eps + v[..., None, :]).logsumexp(-1))
    return (-cost / eps + u[..., None] + v[..., None, :]).exp()


@bug("sinkhorn", ROWS, "Potentials in units of cost, divided by ε at the end, and not in the logsumexp.")
def unscaled_potentials_in_the_sums(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    a, b = uniform(cost, a, b, row_mask, col_mask)
    u = torch.where(a > 0, 0.0, -torch.inf).to(a)
    for _ in range(iters):
        v = eps * (b.log() - (-cost / eps + u[..., None]).logsumexp(-2))
        u = eps * (a.log() - (-cost / eps + v[..., None, :]).logsumexp(-1))
    return ((u[..., None] + v[..., None, :] - cost) / eps).exp()


@bug("sinkhorn", ROWS, "log(a + 1e-8): tokens without weight receive some.")
def smoothed_marginals(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    a, b = uniform(cost, a, b, row_mask, col_mask)
    u = torch.zeros_like(a)
    for _ in range(iters):
        v = (b + 1e-8).log() - (-cost / eps + u[..., None]).logsumexp(-2)
        u = (a + 1e-8).log() - (-cost / eps + v[..., None, :]).logsumexp(-1)
    return (-cost / eps + u[..., None] + v[..., None, :]).exp()


@bug("sinkhorn", COLUMNS, "One sweep is not enough: the potentials start afresh in every iteration.")
def potentials_reset(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    return sinkhorn(cost, a, b, eps, 1, row_mask, col_mask)


@bug("sinkhorn", COLUMNS, "The column marginal is forgotten: every patch with weight gets the same.")
def uniform_columns(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    b = None if b is None else (b > 0) / (b > 0).sum(-1, keepdim=True).to(cost)
    return sinkhorn(cost, a, b, eps, iters, row_mask, col_mask)


@bug("sinkhorn", PADDING, "Padded columns count: the masks are applied to the plan, not to the marginals.")
def masked_afterwards(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    plan = sinkhorn(cost, a, b, eps, iters)
    plan = plan if row_mask is None else plan * row_mask[..., None]
    return plan if col_mask is None else plan * col_mask[..., None, :]


@bug("sinkhorn", LARGE, "exp(−C·ε) for exp(−C/ε).")
def eps_multiplies(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    return sinkhorn(cost * eps, a, b, 1.0, iters, row_mask, col_mask)


@bug("sinkhorn", SMALL, "The kernel exp(−C/ε) itself: it underflows to 0 and the plan is NaN.")
def plain_kernel(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    a, b = uniform(cost, a, b, row_mask, col_mask)
    K, u = (-cost / eps).exp(), torch.ones_like(a)
    for _ in range(iters):
        v = b / (K.mT @ u[..., None])[..., 0]
        u = a / (K @ v[..., None])[..., 0]
    return u[..., None] * K * v[..., None, :]


@bug("sinkhorn", SMALL, "The sign of the cost: the dearest plan.")
def dearest_plan(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    return sinkhorn(-cost, a, b, eps, iters, row_mask, col_mask)


@bug("sinkhorn", LOOP, "Padded rows begin like real ones: forgotten with the iterations, felt in the first.")
def padded_rows_begin(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    a, b = uniform(cost, a, b, row_mask, col_mask)
    u = torch.zeros_like(a)
    for _ in range(iters):
        v = b.log() - (-cost / eps + u[..., None]).logsumexp(-2)
        u = a.log() - (-cost / eps + v[..., None, :]).logsumexp(-1)
    return (-cost / eps + u[..., None] + v[..., None, :]).exp()


@bug("sinkhorn_cost", VALUE, "Σ T·S: a similarity where a cost is asked for.")
def similarity(x, y, a=None, b=None, eps=0.05, iters=100):
    S = cosine(x, y)
    return (sinkhorn(1 - S, a, b, eps, iters).detach() * S).sum()


@bug("sinkhorn_cost", VALUE, "The entropic objective is returned, ε·Σ T log T included.")
def with_entropy(x, y, a=None, b=None, eps=0.05, iters=100):
    T = sinkhorn(1 - cosine(x, y), a, b, eps, iters).detach()
    return sinkhorn_cost(x, y, a, b, eps, iters) + eps * torch.special.xlogy(T, T).sum()


@bug("sinkhorn_cost", VALUE, "Dot products of rows that nobody scaled to length one.")
def not_normalised(x, y, a=None, b=None, eps=0.05, iters=100):
    C = 1 - x @ y.T
    return (sinkhorn(C, a, b, eps, iters).detach() * C).sum()


@bug("sinkhorn_cost", VALUE, "Squared distance of unit rows, which is twice 1 − cos.")
def squared_distance(x, y, a=None, b=None, eps=0.05, iters=100):
    C = torch.cdist(unit(x), unit(y)) ** 2
    return (sinkhorn(C, a, b, eps, iters).detach() * C).sum()


@bug("sinkhorn_cost", VALUE, "The marginals are dropped on the way to the plan.")
def marginals_dropped(x, y, a=None, b=None, eps=0.05, iters=100):
    return sinkhorn_cost(x, y, eps=eps, iters=iters)


@bug("sinkhorn_cost", SLOPES, "The plan is differentiated too, through every iteration.")
def unrolled(x, y, a=None, b=None, eps=0.05, iters=100):
    C = 1 - cosine(x, y)
    return (sinkhorn(C, a, b, eps, iters) * C).sum()


@bug("sinkhorn_cost", SLOPES, "Cost and plan change places under detach: no pair is pulled together.")
def detached_cost(x, y, a=None, b=None, eps=0.05, iters=100):
    C = 1 - cosine(x, y)
    return (sinkhorn(C, a, b, eps, iters) * C.detach()).sum()


@bug("sinkhorn_cost", SLOPES, "The length of a row is held fixed: no projection.", rung="np")
def length_held_fixed(x, y, a=None, b=None, eps=0.05, iters=100):
    value, _ = sinkhorn_cost_np(x, y, a, b, eps, iters)
    (px, py) = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y))
    T = sinkhorn(torch.from_numpy(1 - px @ py.T), *(map(torch.from_numpy, (a, b))), eps, iters).numpy()
    return value, (
        -T @ py / np.linalg.norm(x, axis=-1, keepdims=True),
        -T.T @ px / np.linalg.norm(y, axis=-1, keepdims=True),
    )


TERMS, SHIFT = "log_of_the_sum_of_exponentials", "no_shift_matters"


@bug("logsumexp_np", SHIFT, "exp without subtracting the maximum: overflows.", rung="plain")
def naive_logsumexp(x, axis):
    return np.log(np.exp(x).sum(axis))


@bug("logsumexp_np", TERMS, "The maximum is never added back.", rung="plain")
def maximum_not_added_back(x, axis):
    return logsumexp_np(x, axis) - x.max(axis)


@bug("logsumexp_np", TERMS, "The axis is kept, so what follows broadcasts to another shape.", rung="plain")
def axis_kept(x, axis):
    return np.expand_dims(logsumexp_np(x, axis), axis)


@bug("logsumexp_np", TERMS, "Always the last axis, whatever is asked for.", rung="plain")
def always_the_last_axis(x, axis):
    return logsumexp_np(x, -1)


@bug("logsumexp_np", TERMS, "The log of the mean.", rung="plain")
def log_of_the_mean(x, axis):
    return logsumexp_np(x, axis) - np.log(x.shape[axis])


@bug(
    "logsumexp_np",
    SHIFT,
    "One maximum for the whole array: what lies far below it becomes log 0.",
    rung="plain",
)
def one_maximum_for_all(x, axis):
    return x.max() + np.log(np.exp(x - x.max()).sum(axis))


LENGTH, SHORT_ROWS = "rows_of_length_one", "short_rows_are_divided_by_the_smallest_divisor"


@bug(
    "unit_np", SHORT_ROWS, "Nothing holds the divisor away from 0: a row of zeros becomes NaN.", rung="plain"
)
def zero_rows_become_nan(x):
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / length, length


@bug("unit_np", LENGTH, "1e-5 is added to the length, so that no row has length one.", rung="plain")
def added_not_clamped(x):
    length = np.sqrt((x * x).sum(-1, keepdims=True)) + 1e-5
    return x / length, length


@bug("unit_np", SHORT_ROWS, "The squared length is held above 1e-5, not the length.", rung="plain")
def square_clamped(x):
    length = np.sqrt(np.maximum((x * x).sum(-1, keepdims=True), 1e-5))
    return x / length, length


@bug("unit_np", LENGTH, "Divided by the squared length: the root is forgotten.", rung="plain")
def root_forgotten(x):
    length = np.maximum((x * x).sum(-1, keepdims=True), 1e-5)
    return x / length, length


@bug("unit_np", LENGTH, "One length for the whole array.", rung="plain")
def one_length_for_all(x):
    length = np.maximum(np.sqrt((x * x).sum()), 1e-5) * np.ones((*x.shape[:-1], 1))
    return x / length, length


@bug("unit_np", LENGTH, "Columns are normalised.", rung="plain")
def columns_normalised(x):
    length = np.maximum(np.sqrt((x * x).sum(-2, keepdims=True)), 1e-5)
    return x / length, length


TURN, CONSTANT = "unit_gradients_are_the_slopes", "a_constant_divisor_does_not_move"


@bug("unit_grad_np", TURN, "The part along the row is not taken off.", rung="plain")
def no_projection(unit, length, grad):
    return grad / length


@bug("unit_grad_np", TURN, "The length of the row is forgotten.", rung="plain")
def length_forgotten(unit, length, grad):
    return unit_grad_np(unit, length, grad) * length


@bug("unit_grad_np", TURN, "The part along the row is added instead of taken off.", rung="plain")
def projection_added(unit, length, grad):
    return 2 * grad / length - unit_grad_np(unit, length, grad)


@bug("unit_grad_np", TURN, "Projected with the row before it was divided by its length.", rung="plain")
def projected_with_long_rows(unit, length, grad):
    x = unit * length
    return (grad - x * (x * grad).sum(-1, keepdims=True)) / length


@bug("unit_grad_np", CONSTANT, "Projected also where the divisor is a constant.", rung="plain")
def short_rows_projected(unit, length, grad):
    return (grad - unit * (unit * grad).sum(-1, keepdims=True)) / length


@bug(
    "sinkhorn",
    LOST,
    "exp(−(C − min C)/ε) in product form: right until the range of C/ε passes the exponents.",
)
def shifted_kernel(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    a, b = uniform(cost, a, b, row_mask, col_mask)
    K, u = (-(cost - cost.amin((-2, -1), keepdim=True)) / eps).exp(), (a > 0).to(a)
    for _ in range(iters):
        v = b / (K.mT @ u[..., None])[..., 0]
        u = a / (K @ v[..., None])[..., 0]
    return u[..., None] * K * v[..., None, :]


def potentials_loop(cost, a, b, eps, iters, row_mask, col_mask, u_cut=lambda u: u, v_cut=lambda v: v):
    a, b = uniform(cost, a, b, row_mask, col_mask)
    log_a, log_b = (z.clamp_min(1e-300).log().where(z > 0, -1e30) for z in (a, b))
    K, u = -cost / eps, torch.where(a > 0, 0.0, -1e30).to(a)
    for _ in range(iters):
        v = log_b - (K + u_cut(u)[..., None]).logsumexp(-2)
        u = log_a - (K + v_cut(v)[..., None, :]).logsumexp(-1)
    return (K + u[..., None] + v[..., None, :]).exp()


@bug("sinkhorn", THROUGH, "The plan is made under no_grad: whatever is trained on it learns nothing.")
def under_no_grad(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    return sinkhorn(cost, a, b, eps, iters, row_mask, col_mask).detach() + 0 * cost.sum()


@bug("sinkhorn", THROUGH, "The row potentials are detached between iterations: only the last one is felt.")
def rows_detached(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    return potentials_loop(cost, a, b, eps, iters, row_mask, col_mask, u_cut=torch.Tensor.detach)


@bug("sinkhorn", THROUGH, "The column potentials are detached inside the loop.")
def columns_detached(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    return potentials_loop(cost, a, b, eps, iters, row_mask, col_mask, v_cut=torch.Tensor.detach)


@bug("sinkhorn", SINGLE, "Solved in float64, and the plan is left there.")
def solved_in_float64(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    a, b = (z if z is None else z.double() for z in (a, b))
    return sinkhorn(cost.double(), a, b, eps, iters, row_mask, col_mask)


@bug("sinkhorn_cost", SHORT, "No floor under the lengths: a row of zeros makes value and gradients NaN.")
def no_floor(x, y, a=None, b=None, eps=0.05, iters=100):
    p, q = (z / z.norm(dim=-1, keepdim=True) for z in (x, y))
    C = (1 - p @ q.T).nan_to_num(1.0)
    return (sinkhorn(C, a, b, eps, iters).detach() * C).sum()


@bug("sinkhorn_cost", SHORT, "The floor is 1e-12: the slope of a short row is ten million times as large.")
def lower_floor(x, y, a=None, b=None, eps=0.05, iters=100):
    p, q = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))
    C = 1 - p @ q.T
    return (sinkhorn(C, a, b, eps, iters).detach() * C).sum()


@bug("sinkhorn_cost", SHORT, "A row below the floor receives no gradient.", rung="np")
def nothing_for_short_rows(x, y, a=None, b=None, eps=0.05, iters=100):
    value, (dx, dy) = sinkhorn_cost_np(x, y, a, b, eps, iters)
    return value, tuple(d * (np.linalg.norm(z, axis=1) > 1e-5)[:, None] for d, z in ((dx, x), (dy, y)))


@bug("sinkhorn_cost", COST, "The cosines are float64, and float32 leaves as float64.")
def computed_in_float64(x, y, a=None, b=None, eps=0.05, iters=100):
    return sinkhorn_cost(x.double(), y.double(), a, b, eps, iters)


@bug("sinkhorn_cost", KEPT, "The plain function: the plan is kept for the backward pass.", rung="fused")
def plain(x, y, a=None, b=None, eps=0.05, iters=100):
    return sinkhorn_cost(x, y, a, b, eps, iters)


@bug("sinkhorn_cost", KEPT, "The gradient by the plan as a coefficient, which autograd keeps.", rung="fused")
def plan_as_a_coefficient(x, y, a=None, b=None, eps=0.05, iters=100):
    p, q = unit(x), unit(y)
    with torch.no_grad():
        T = sinkhorn(1 - p @ q.T, a, b, eps, iters)
    return T.sum() - (p * (T @ q)).sum()
