"""Laws of entropic transport, and the exact transport that its neighbours are held to."""

from itertools import permutations
from math import lcm

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import sinkhorn
from tests.held import enough, keeps_no_matrix, same_in_float32, tiles
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes

# Sizes whose least common multiple is at most 6: then a transport problem is an assignment of at most 6
# tokens.
SMALL = [(M, N) for M in range(1, 7) for N in range(1, 7) if lcm(M, N) <= 6]


def exact_cost(cost: np.ndarray) -> float:
    """The least ⟨T, C⟩ between uniform marginals: repeat tokens up to n a side, try every matching."""
    M, N = cost.shape
    n = lcm(M, N)
    square = np.repeat(np.repeat(cost, n // M, 0), n // N, 1)
    return min(square[np.arange(n), order].mean() for order in permutations(range(n)))


def cosine_cost(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    def unit(z):
        return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-5)

    return 1 - unit(x) @ unit(y).swapaxes(-1, -2)


def slow_sinkhorn(cost, a, b, eps, iters):
    """The textbook loop on the kernel itself, for costs and ε that it survives; a zero weight starts at 0."""
    K, u = np.exp(-cost / eps), (a > 0).astype(float)
    for _ in range(iters):
        v = b / (K.T @ u)
        u = a / (K @ v)
    return u[:, None] * K * v


@st.composite
def weights(draw, length, zeros=True):
    """A marginal with awkward numbers; with `zeros`, some tokens get nothing."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    w = rng.uniform(0.1, 1, length)
    if zeros and length > 1:
        w[rng.permutation(length)[: draw(sizes(length - 1, 0))]] = 0
    return w / w.sum()


@st.composite
def masks(draw, *shape):
    """Bool, a True in every row, at any position."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    mask = rng.random(shape) < 0.6
    mask[..., rng.integers(shape[-1])] = True
    return mask


@st.composite
def problems(draw):
    """cost (M, N) in [0, 1], a (M,), b (N,)."""
    M, N = draw(sizes()), draw(sizes())
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return rng.random((M, N)), draw(weights(M)), draw(weights(N))


@law("sinkhorn", hint="Rows are solved last: their sums are exact after any number of iterations.")
@given(case=problems(), eps=st.sampled_from([0.05, 0.3, 1.0, 3.0]), iters=sizes(4))
def row_sums_are_exact(f, case, eps, iters):
    cost, a, b = case
    plan = f(cost, a, b, eps=eps, iters=iters)
    assert (plan >= 0).all(), "a plan has no negative entry"
    close(plan.sum(1), a, rtol=1e-12, atol=1e-14)
    close(plan[:, b == 0].sum(), 0.0)


@law("sinkhorn", hint="With enough iterations the column sums become b. Is b used, and is u carried along?")
@given(case=problems())
def column_sums_converge(f, case):
    cost, a, b = case
    close(f(cost, a, b, eps=0.3, iters=100).sum(0), b, atol=1e-6)


@law("sinkhorn", hint="A padded token gives and receives nothing, and the rest share equally.")
@given(data=st.data(), M=sizes(), N=sizes())
def padding_takes_no_part(f, data, M, N):
    rows, columns = data.draw(masks(2, M)), data.draw(masks(2, N))
    cost = np.random.default_rng(M).random((2, M, N))
    plan = f(cost, eps=0.3, iters=100, row_mask=rows, col_mask=columns)
    close(plan.sum(2), rows / rows.sum(1, keepdims=True))
    close(plan.sum(1), columns / columns.sum(1, keepdims=True), atol=1e-6)


@law("sinkhorn", hint="When ε is large the cost stops mattering: T → a bᵀ. Is the cost divided by ε?")
@given(case=problems())
def large_eps_gives_the_independent_plan(f, case):
    cost, a, b = case
    close(f(cost, a, b, eps=1e6, iters=3), np.outer(a, b), rtol=1e-5, atol=1e-12)


@law("sinkhorn", hint="When ε is small the plan is optimal. exp(−C/ε) underflows: work with logarithms.")
@given(shape=st.sampled_from(SMALL), seed=st.integers(0, 99))
def small_eps_solves_the_linear_programme(f, shape, seed):
    cost = 10 + np.random.default_rng(seed).random(shape)
    close((f(cost, eps=5e-3, iters=400) * cost).sum(), exact_cost(cost), atol=2e-2)


@law("sinkhorn", hint="After any number of iterations it is the textbook loop on the real tokens alone.")
@given(data=st.data(), M=sizes(), N=sizes(), iters=sizes(3))
def equals_the_loop_on_the_real_tokens(f, data, M, N, iters):
    rows, columns = data.draw(masks(M)), data.draw(masks(N))
    cost = np.random.default_rng(data.draw(st.integers(0, 99))).random((M, N))
    real, wanted = np.ix_(rows, columns), np.zeros((M, N))
    a, b = (np.full(n, 1 / n) for n in cost[real].shape)
    wanted[real] = slow_sinkhorn(cost[real], a, b, 0.3, iters)
    close(f(cost, eps=0.3, iters=iters, row_mask=rows, col_mask=columns), wanted)


@law("sinkhorn", hint="At ε = 1e-4 nothing but logarithms holds exp(−C/ε): no row may be lost.")
@given(case=problems(), eps=st.sampled_from([1e-3, 1e-4]), iters=sizes(20))
def no_row_is_lost_at_small_eps(f, case, eps, iters):
    cost, a, b = case
    close(f(cost, a, b, eps=eps, iters=iters).sum(1), a, rtol=1e-9, atol=1e-12)


@law(
    "sinkhorn",
    hint="Differentiable through every iteration: neither no_grad nor detach anywhere in the loop.",
)
@given(case=problems(), eps=st.sampled_from([0.3, 1.0]), iters=sizes(4), seed=st.integers(0, 99))
def the_plan_is_differentiable(f, case, eps, iters, seed):
    if f.rung == "np":  # it returns the plan alone
        return
    cost, a, b = case
    a, b = np.full_like(a, 1 / len(a)), np.full_like(b, 1 / len(b))
    upstream = np.random.default_rng(seed).standard_normal(cost.shape)
    settings = {"eps": eps, "iters": iters}
    slope = central_differences(lambda c: f(c, **settings), (cost,), 0, grad=upstream)
    close(f.grads(cost, grad=upstream, **settings)[0], slope, rtol=1e-6, atol=1e-8)


@law("sinkhorn", hint="float32 comes in, float32 goes out.")
@given(case=problems())
def float32_is_enough(f, case):
    same_in_float32(f, case[:1], {"eps": 0.3, "iters": 10}, near=1e-5, gradients=False)


@st.composite
def token_sets(draw):
    """x (M, D), y (N, D), lengths far from one; a (M,), b (N,)."""
    M, N, D = draw(sizes()), draw(sizes()), draw(sizes(5, 2))
    return draw(arrays(M, D, scale=3)), draw(arrays(N, D, scale=2)), draw(weights(M)), draw(weights(N))


@law("sinkhorn_cost", hint="The value is Σ T·C with C = 1 − cos: no entropy, and unit rows.")
@given(case=token_sets(), uniform=st.booleans())
def is_the_plan_times_the_cost(f, case, uniform):
    x, y, a, b = case
    C = cosine_cost(x, y)
    marginals = {} if uniform else {"a": a, "b": b}
    a, b = (np.full(n, 1 / n) for n in C.shape) if uniform else (a, b)
    close(f(x, y, **marginals, eps=0.3, iters=20), (slow_sinkhorn(C, a, b, 0.3, 20) * C).sum())


@law("sinkhorn_cost", hint="Hold the plan fixed and differentiate the cost alone, through the cosine.")
@given(case=token_sets())
def gradients_hold_the_plan_fixed(f, case):
    x, y, a, b = case
    plan = slow_sinkhorn(cosine_cost(x, y), a, b, 0.3, 20)
    for which, gradient in enumerate(f.grads(x, y, a=a, b=b, eps=0.3, iters=20)):
        slope = central_differences(lambda x, y: (plan * cosine_cost(x, y)).sum(), (x, y), which)
        close(gradient, slope, rtol=1e-5, atol=1e-6)


@law(
    "sinkhorn_cost",
    hint="Divide by max(length, 1e-5): a row of zeros has cosine 0, and the slope −T q / 1e-5.",
)
@given(case=token_sets(), short=st.sampled_from([0.0, 1e-7]))
def short_rows_have_a_slope(f, case, short):
    x, y, a, b = case
    x[0] *= short
    y[-1] *= short
    C = cosine_cost(x, y)
    T = slow_sinkhorn(C, a, b, 0.3, 20)
    close(f(x, y, a=a, b=b, eps=0.3, iters=20), (T * C).sum())
    dx, dy = f.grads(x, y, a=a, b=b, eps=0.3, iters=20)
    p, q = (z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-5) for z in (x, y))
    assert np.isfinite(dx).all() and np.isfinite(dy).all(), "a row of zeros makes a gradient infinite or NaN"
    close(dx[0], -T[0] @ q / 1e-5, rtol=1e-8, atol=1e-8)
    close(dy[-1], -T[:, -1] @ p / 1e-5, rtol=1e-8, atol=1e-8)


@law("sinkhorn_cost", hint="float32 comes in, float32 goes out.")
@given(case=token_sets())
def float32_is_enough_for_the_cost(f, case):
    same_in_float32(f, case[:2], {"eps": 0.3, "iters": 20}, near=1e-5)


@law(
    "sinkhorn_cost",
    hint="The gradients of the tokens are known with the plan: keep them, and no M × N array.",
)
def no_plan_is_kept(f):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((150, 4)), rng.standard_normal((200, 4))
    with tiles():
        keeps_no_matrix(f, (x, y), {"iters": 5}, 150 * 200, "the plan", enough(x, y, tokens=350))


@st.composite
def stacks(draw, scale=1.0):
    """x (B, M, N)."""
    return draw(arrays(draw(sizes(3)), draw(sizes()), draw(sizes()), scale=scale))


@law(
    "logsumexp_np",
    hint="Sum the exponentials along the axis that is asked for; that axis is gone afterwards.",
)
@given(x=stacks(), axis=st.sampled_from([-1, -2]))
def log_of_the_sum_of_exponentials(f, x, axis):
    close(f(x, axis), np.log(np.exp(x).sum(axis)))


@law(
    "logsumexp_np", hint="Take the maximum of each row or column out before exp, not one for the whole array."
)
@given(x=stacks(), axis=st.sampled_from([-1, -2]), seed=st.integers(0, 99))
def no_shift_matters(f, x, axis, seed):
    shift = 1e4 * np.random.default_rng(seed).standard_normal(x.shape[:1])[:, None, None]
    shift = np.broadcast_to(shift, x.shape).copy()
    close(f(x + shift, axis), f(x, axis) + shift.max(axis), rtol=1e-10, atol=1e-8)


@law(
    "unit_np", hint="Divide each row by its own length and return the lengths too, with an axis of length 1."
)
@given(x=stacks())
def rows_of_length_one(f, x):
    rows, length = f(x)
    close(length, np.sqrt((x**2).sum(-1))[..., None])
    close(rows * length, x)


@law("unit_np", hint="The divisor is max(length, 1e-5): a row of zeros stays zero, a short one stays short.")
@given(x=stacks(), factor=st.sampled_from([0.0, 1e-9, 1e-7]))
def short_rows_are_divided_by_the_smallest_divisor(f, x, factor):
    short = factor * x / (1 + np.abs(x).max() * x.shape[-1])  # shorter than 1e-7
    rows, length = f(short)
    close(length, np.full((*x.shape[:-1], 1), 1e-5))
    close(rows, short / 1e-5)


@law("unit_grad_np", hint="A unit row can only turn, and a long one turns slowly: which part of g is lost?")
@given(x=stacks(scale=3.0), seed=st.integers(0, 99))
def unit_gradients_are_the_slopes(f, x, seed):
    upstream = np.random.default_rng(seed).standard_normal(x.shape)
    rows, length = sinkhorn.unit_np(x)
    slopes = central_differences(lambda z: sinkhorn.unit_np(z)[0], (x,), 0, grad=upstream)
    close(f(rows, length, upstream), slopes, rtol=1e-5, atol=1e-6)


@law(
    "unit_grad_np",
    hint="Where the divisor is the constant 1e-5 it does not move: is nothing lost there?",
)
@given(x=stacks(), seed=st.integers(0, 99))
def a_constant_divisor_does_not_move(f, x, seed):
    upstream = np.random.default_rng(seed).standard_normal(x.shape)
    rows, length = sinkhorn.unit_np(1e-8 * x)
    close(f(rows, length, upstream), upstream / 1e-5)


test_laws = obeys(sinkhorn)

C, x, third = np.ones((2, 3, 4)), np.ones((3, 2)), np.full(3, 1 / 3)
no_row = np.array([[True, True, False], [False, False, False]])
test_refusals = refuses(
    sinkhorn,
    [
        ("sinkhorn", "a vector", (np.ones(3),), {}, "cost must have shape"),
        ("sinkhorn", "no columns", (np.ones((3, 0)),), {}, "cost must have at least one row"),
        ("sinkhorn", "NaN", (C * np.nan,), {}, "cost must not contain NaN"),
        ("sinkhorn", "infinite", (C * np.inf,), {}, "cost must be finite"),
        ("sinkhorn", "integers", (C.astype(int),), {}, "cost must have a floating dtype"),
        ("sinkhorn", "eps zero", (C,), {"eps": 0.0}, "eps must be a finite number > 0"),
        ("sinkhorn", "no iterations", (C,), {"iters": 0}, "iters must be a whole number"),
        ("sinkhorn", "a too long", (C, np.full(4, 0.25)), {}, "a must have shape"),
        ("sinkhorn", "a sums to 2", (C, 2 * third), {}, "a must sum to one"),
        ("sinkhorn", "b sums to 0", (C, third, np.zeros(4)), {}, "b must sum to one"),
        ("sinkhorn", "negative a", (C, np.array([1.5, -0.5, 0])), {}, "a must not be negative"),
        ("sinkhorn", "mask of numbers", (C,), {"row_mask": np.ones((2, 3))}, "row_mask must be bool"),
        ("sinkhorn", "mask too short", (C,), {"col_mask": no_row}, "col_mask must have shape"),
        ("sinkhorn", "all padding", (C,), {"row_mask": no_row}, "row_mask must have a True in every row"),
        ("sinkhorn", "a on padding", (C, third), {"row_mask": no_row[0]}, "a must be zero where"),
        ("sinkhorn_cost", "widths differ", (x, np.ones((3, 4))), {}, "y must have shape"),
        ("sinkhorn_cost", "no tokens", (x, np.ones((0, 2))), {}, "y must hold at least one token"),
        ("sinkhorn_cost", "dtypes differ", (x, x.astype("float32")), {}, "y must have the dtype"),
        ("sinkhorn_cost", "NaN", (x, x * np.nan), {}, "y must not contain NaN"),
        ("sinkhorn_cost", "a sums to 2", (x, x, 2 * third), {}, "a must sum to one"),
    ],
)


def rng_tokens(M=6, N=9, D=4, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((M, D)), rng.standard_normal((N, D))
    return *tokens, rng.dirichlet(np.ones(M)), rng.dirichlet(np.ones(N))


@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_equals_pot(eps):
    """Outside truth: POT's log-domain solver at the same ε, both converged."""
    ot = pytest.importorskip("ot", reason="needs POT")
    x, y, a, b = rng_tokens()
    cost = cosine_cost(x, y)
    expected = ot.sinkhorn(a, b, cost, eps, method="sinkhorn_log", numItermax=2000, stopThr=1e-10)
    assert np.abs(sinkhorn.sinkhorn_np(cost, a, b, eps, 1000) - expected).max() < 1e-8


def test_is_never_cheaper_than_exact_transport():
    """Outside truth: POT's network simplex. A feasible plan cannot beat it, and a small ε comes close."""
    ot = pytest.importorskip("ot", reason="needs POT")
    for seed in range(3):
        x, y, a, b = rng_tokens(seed=seed)
        best = ot.emd2(a, b, cosine_cost(x, y))
        found = sinkhorn.sinkhorn_cost_np(x, y, a, b, eps=0.01, iters=2000)[0]
        assert best - 1e-4 < found < best + 0.02
    assert abs(exact_cost(cosine_cost(x[:2], y[:3])) - ot.emd2([], [], cosine_cost(x[:2], y[:3]))) < 1e-12


@pytest.mark.parametrize("function", [sinkhorn.sinkhorn_np, sinkhorn.sinkhorn])
def test_the_order_of_tokens_carries_over_to_the_plan(function):
    kind = torch.from_numpy if function is sinkhorn.sinkhorn else np.asarray
    x, y, a, b = rng_tokens()
    p, q = np.random.default_rng(1).permutation(6), np.random.default_rng(2).permutation(9)
    cost = cosine_cost(x, y)
    plan = np.asarray(function(kind(cost), kind(a), kind(b)))
    shuffled = np.asarray(function(kind(cost[p][:, q]), kind(a[p]), kind(b[q])))
    assert np.abs(shuffled - plan[p][:, q]).max() < 1e-12


def test_a_weight_vector_and_a_mask_may_be_shared_by_the_batch():
    cost, mask = torch.rand(2, 3, 4), torch.tensor([True, False, True])
    plan = sinkhorn.sinkhorn(cost, b=torch.full((4,), 0.25), row_mask=mask)
    assert torch.equal(plan[1], sinkhorn.sinkhorn(cost[1], row_mask=mask))


def test_the_plan_itself_can_be_differentiated():
    x, y, a, b = (torch.from_numpy(z) for z in rng_tokens(3, 4))
    cost = (1 - x @ y.T).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sinkhorn.sinkhorn(c, a, b, eps=0.3, iters=5), cost)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("f", [sinkhorn.sinkhorn_cost, sinkhorn.sinkhorn_cost_fused])
def test_low_precision_is_solved_in_float32(f, dtype, tolerance):
    """ε = 0.01 puts exp(−200) into the kernel: out of reach of a float32 kernel, let alone a half."""
    x, y, _, _ = rng_tokens()
    value = f(torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype), eps=0.01)
    assert value.dtype == dtype
    assert abs(float(value) - sinkhorn.sinkhorn_cost_np(x, y, eps=0.01)[0]) < tolerance


def test_autograd_habits():
    """Backward twice, a frozen side, a non-contiguous one, zero rows, and no graph through the plan."""
    x, y, a, b = (torch.from_numpy(z) for z in rng_tokens())
    x = x.T.contiguous().T.requires_grad_()
    loss = sinkhorn.sinkhorn_cost(x, y, a, b)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    zero = torch.zeros(3, 4, dtype=y.dtype, requires_grad=True)
    for f in (sinkhorn.sinkhorn_cost, sinkhorn.sinkhorn_cost_fused):
        f(zero, y).backward()
        assert torch.isfinite(zero.grad).all()


def test_rows_shorter_than_the_floor_are_divided_by_the_floor():
    """Length 1e-7: the divisor is the constant 1e-5, so the gradient has no projection."""
    x, y, a, b = rng_tokens()
    x[:2] *= 1e-7 / np.linalg.norm(x[:2], axis=-1, keepdims=True)
    _, (dx, _) = sinkhorn.sinkhorn_cost_np(x, y, a, b)
    for f in (sinkhorn.sinkhorn_cost, sinkhorn.sinkhorn_cost_fused):
        tx, ty = torch.tensor(x, requires_grad=True), torch.tensor(y)
        f(tx, ty, torch.tensor(a), torch.tensor(b)).backward()
        assert np.abs(tx.grad.numpy() / dx - 1).max() < 1e-9
    T = sinkhorn.sinkhorn_np(cosine_cost(x, y), a, b)
    pull = -T @ (y / np.linalg.norm(y, axis=-1, keepdims=True))
    assert np.abs(dx[:2] / (pull[:2] / 1e-5) - 1).max() < 1e-9


def test_memory_for_the_backward_pass_does_not_grow_with_the_iterations():
    def saved(iters):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            sinkhorn.sinkhorn_cost(torch.rand(8, 4, requires_grad=True), torch.rand(9, 4), iters=iters)
        return sum(numbers)

    assert saved(1) == saved(50)
