"""Laws of IPOT and of word-patch alignment."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import ipot
from tests.held import enough, keeps_no_matrix, same_in_float32, tiles
from tests.laws import LAWS, Subject, central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes
from tests.test_sinkhorn import SMALL, cosine_cost, exact_cost, masks


def slow_ipot(cost, beta, iters):
    """The published loop on T itself: columns first, from the row scaling of the step before, then rows."""
    (M, N), T = cost.shape, np.ones_like(cost)
    a = np.ones(M)
    for _ in range(iters):
        Q = T * np.exp(-cost / beta)
        b = 1 / (N * (Q.T @ a))
        a = 1 / (M * (Q @ b))
        T = a[:, None] * Q * b
    return T


@law(
    "ipot", hint="Rows are scaled last: every real row gives exactly 1/M, and padding neither gives nor gets."
)
@given(data=st.data(), M=sizes(), N=sizes(), iters=sizes(4), seed=st.integers(0, 99))
def row_sums_are_exact(f, data, M, N, iters, seed):
    rows, columns = data.draw(masks(2, M)), data.draw(masks(2, N))
    cost = np.random.default_rng(seed).random((2, M, N)) * 2
    plan = f(cost, iters=iters, row_mask=rows, col_mask=columns)
    assert (plan >= 0).all(), "a plan has no negative entry"
    close(plan.sum(-1), rows / rows.sum(-1, keepdims=True), rtol=1e-12)
    close(plan[~np.broadcast_to(columns[:, None], plan.shape)].sum(), 0.0)


@law("ipot", hint="More steps must end at the exact optimum. Is the row scaling carried into the next step?")
@given(shape=st.sampled_from(SMALL), seed=st.integers(0, 99))
def more_steps_reach_the_exact_optimum(f, shape, seed):
    cost = np.random.default_rng(seed).random(shape)
    plan = f(cost, iters=200)
    close(plan.sum(0), np.full(shape[1], 1 / shape[1]), atol=1e-4)
    close((plan * cost).sum(), exact_cost(cost), atol=2e-3)


@law("ipot", hint="Only C/β matters: cost and β in other units leave the plan as it is.")
@given(M=sizes(), N=sizes(), unit=st.sampled_from([0.01, 3.0, 100.0]), iters=sizes(4))
def cost_and_beta_share_a_unit(f, M, N, unit, iters):
    cost = np.random.default_rng(M).random((M, N))
    close(f(cost * unit, beta=0.5 * unit, iters=iters), f(cost, beta=0.5, iters=iters))


@law(
    "ipot", hint="exp(−C/β) falls to 0 in floating point. Work with logarithms, or no row must ever be lost."
)
@given(M=sizes(), N=sizes(), beta=st.sampled_from([1e-2, 1e-3]))
def no_row_is_lost_at_small_beta(f, M, N, beta):
    plan = f(1 + np.random.default_rng(N).random((M, N)), beta=beta, iters=10)
    close(plan.sum(-1), np.full(M, 1 / M))


@law(
    "ipot", hint="Follow the recurrence: Q = T·exp(−C/β), columns from the last row scaling, rows, T = a Q b."
)
@given(data=st.data(), shape=st.tuples(sizes(), sizes()), beta=st.sampled_from([0.2, 0.5]), iters=sizes(8))
def equals_the_plain_recurrence(f, data, shape, beta, iters):
    """Of the real tokens alone, masked or not."""
    cost = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) * 2
    rows, columns = data.draw(masks(shape[0])), data.draw(masks(shape[1]))
    real, wanted = np.ix_(rows, columns), np.zeros(shape)
    wanted[real] = slow_ipot(cost[real], beta, iters)
    close(f(cost, beta=beta, iters=iters, row_mask=rows, col_mask=columns), wanted)


@law("ipot", hint="The plan is detached: it is solved without a graph.")
@given(M=sizes(), N=sizes(), iters=sizes(4))
def the_plan_has_no_graph(f, M, N, iters):
    if f.rung != "np":
        cost = torch.from_numpy(np.random.default_rng(M).random((M, N))).requires_grad_()
        assert not f.function(cost, iters=iters).requires_grad, (
            "the plan is part of a graph: solve under no_grad"
        )


@law("ipot", hint="float32 comes in, float32 goes out.")
@given(M=sizes(), N=sizes(), iters=sizes(4))
def float32_is_enough(f, M, N, iters):
    cost = np.random.default_rng(M).random((M, N))
    same_in_float32(f, (cost,), {"iters": iters}, near=1e-5, gradients=False)


@st.composite
def pairs(draw):
    """words (B, L, D), patches (B, N, D) and their masks, real tokens at any position."""
    B, L, N, D = draw(sizes(3)), draw(sizes(4)), draw(sizes(4)), draw(sizes(5, 2))
    words, patches = draw(arrays(B, L, D, scale=3)), draw(arrays(B, N, D, scale=2))
    return words, patches, draw(masks(B, L)), draw(masks(B, N))


def by_pair(words, patches, word_mask, patch_mask, iters):
    """For each pair the tokens that are real, and their plan, from the slow loop."""
    for b in range(len(words)):
        C = cosine_cost(words[b][word_mask[b]], patches[b][patch_mask[b]])
        yield b, C, slow_ipot(C, 0.5, iters)


@law("wpa", hint="What stands in a padded token must not show. Are both masks used?")
@given(case=pairs(), seed=st.integers(0, 99))
def padding_never_counts(f, case, seed):
    words, patches, word_mask, patch_mask = case
    rng = np.random.default_rng(seed)
    other_words = np.where(word_mask[..., None], words, rng.standard_normal(words.shape))
    other_patches = np.where(patch_mask[..., None], patches, rng.standard_normal(patches.shape))
    masks = {"word_mask": word_mask, "patch_mask": patch_mask, "iters": 5}
    close(f(other_words, other_patches, **masks), f(words, patches, **masks))


@law("wpa", hint="The value of a pair is Σ T·C over its real tokens, with C = 1 − cos.")
@given(case=pairs(), iters=sizes(8), padded=st.sampled_from([True, True, True, False]))
def is_the_plan_times_the_cost(f, case, iters, padded):
    words, patches, word_mask, patch_mask = case
    masks = {"word_mask": word_mask, "patch_mask": patch_mask} if padded else {}
    if not padded:
        word_mask, patch_mask = (np.ones(z.shape[:2], dtype=bool) for z in (words, patches))
    value = f(words, patches, **masks, iters=iters)
    close(value, [(T * C).sum() for _, C, T in by_pair(words, patches, word_mask, patch_mask, iters)])


@law("wpa", hint="Hold the plan fixed and differentiate the cost alone, through the cosine.")
@given(case=pairs(), seed=st.integers(0, 99))
def gradients_hold_the_plan_fixed(f, case, seed):
    words, patches, word_mask, patch_mask = case
    upstream = np.random.default_rng(seed).standard_normal(len(words))
    plan = np.zeros((len(words), words.shape[1], patches.shape[1]))
    for b, _, T in by_pair(*case, 5):
        plan[np.ix_([b], word_mask[b], patch_mask[b])] = T

    def with_that_plan(words, patches):
        return (plan * cosine_cost(words, patches)).sum((1, 2))

    settings = {"word_mask": word_mask, "patch_mask": patch_mask, "iters": 5}
    for which, gradient in enumerate(f.grads(words, patches, grad=upstream, **settings)):
        slope = central_differences(with_that_plan, (words, patches), which, grad=upstream)
        close(gradient, slope, rtol=1e-5, atol=1e-6)


@law("wpa", hint="Divide by max(length, 1e-5): x / ‖x‖ of a padded row of zeros is NaN in every gradient.")
@given(case=pairs(), seed=st.integers(0, 99))
def padded_zero_rows_spoil_nothing(f, case, seed):
    words, patches, word_mask, patch_mask = case
    settings = {"word_mask": word_mask, "patch_mask": patch_mask, "iters": 5}
    settings["grad"] = np.random.default_rng(seed).standard_normal(len(words))
    wanted = f.grads(words, patches, **settings)
    found = f.grads(words * word_mask[..., None], patches * patch_mask[..., None], **settings)
    for gradient, other, real in zip(found, wanted, (word_mask, patch_mask), strict=True):
        assert np.isfinite(gradient).all(), "a row of zeros, masked or not, makes a gradient infinite or NaN"
        close(gradient, other * real[..., None])


@law("wpa", hint="A real row shorter than 1e-5 is divided by 1e-5: its slope is −T q / 1e-5.")
@given(case=pairs(), short=st.sampled_from([0.0, 1e-7]))
def real_short_rows_have_a_slope(f, case, short):
    words, patches, word_mask, patch_mask = case
    words[:, 0] *= short
    patches[:, -1] *= short
    settings = {"word_mask": word_mask, "patch_mask": patch_mask, "iters": 5}
    value, (dwords, dpatches) = f(words, patches, **settings), f.grads(words, patches, **settings)
    for b, C, T in by_pair(*case, 5):
        close(value[b], (T * C).sum())
        p, q = (
            z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-5)
            for z in (words[b][word_mask[b]], patches[b][patch_mask[b]])
        )
        if word_mask[b, 0]:
            close(dwords[b, 0], -T[0] @ q / 1e-5, rtol=1e-8, atol=1e-8)
        if patch_mask[b, -1]:
            close(dpatches[b, -1], -T[:, -1] @ p / 1e-5, rtol=1e-8, atol=1e-8)


@law("wpa", hint="float32 comes in, float32 goes out.")
@given(case=pairs())
def float32_is_enough_for_the_alignment(f, case):
    settings = {"word_mask": case[2], "patch_mask": case[3], "iters": 5}
    same_in_float32(f, case[:2], settings, near=1e-5)


@law("wpa", hint="Keep the potentials, one a token, and make the plan again in the backward pass.")
def no_plan_is_kept(f):
    rng = np.random.default_rng(0)
    words, patches = rng.standard_normal((2, 60, 4)), rng.standard_normal((2, 90, 4))
    most = enough(words, patches, tokens=2 * (60 + 90))
    with tiles():
        keeps_no_matrix(f, (words, patches), {"iters": 5}, 2 * 60 * 90, "the plans", most)


@st.composite
def captions(draw):
    """text_mask (B, L), True for the real tokens, which need not begin at the first place."""
    B, L = draw(sizes(3)), draw(sizes(7))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    first, length = rng.integers(0, L, B), rng.integers(0, L + 1, B)
    places = np.arange(L)
    return (places >= first[:, None]) & (places < (first + length)[:, None])


@law(
    "alignment_masks",
    hint="The first real token is [CLS], the last real one [SEP]; what is between takes part.",
)
@given(text_mask=captions())
def first_and_last_real_token_stay_out(f, text_mask):
    wanted = text_mask.copy()
    for row in wanted:
        real = np.flatnonzero(row)
        row[real[:1]] = row[real[-1:]] = False
    found = np.asarray(f(torch.from_numpy(text_mask)))
    assert found.dtype == bool, f"your result has dtype {found.dtype}, expected bool"
    close(found.astype(int), wanted.astype(int))


test_laws = obeys(ipot)


@pytest.mark.parametrize("name", LAWS["ipot"])
def test_potentials_alone_obey_the_same_laws(name):
    LAWS["ipot"][name].check(Subject(ipot.ipot_potentials_np, "np"))


C, words, patches = np.ones((2, 3, 4)), np.ones((2, 3, 5)), np.ones((2, 4, 5))
no_row = np.array([[True, True, False], [False, False, False]])
test_refusals = refuses(
    ipot,
    [
        ("ipot", "a vector", (np.ones(3),), {}, "cost must have shape"),
        ("ipot", "no rows", (np.ones((0, 3)),), {}, "cost must have at least one row"),
        ("ipot", "NaN", (C * np.nan,), {}, "cost must not contain NaN"),
        ("ipot", "infinite", (-C * np.inf,), {}, "cost must be finite"),
        ("ipot", "integers", (C.astype(int),), {}, "cost must have a floating dtype"),
        ("ipot", "beta negative", (C,), {"beta": -0.5}, "beta must be a finite number > 0"),
        ("ipot", "no steps", (C,), {"iters": 0}, "iters must be a whole number"),
        ("ipot", "all padding", (C,), {"row_mask": no_row}, "row_mask must have a True in every row"),
        ("ipot", "mask too short", (C,), {"col_mask": no_row}, "col_mask must have shape"),
        ("ipot", "mask of numbers", (C,), {"row_mask": np.ones((2, 3))}, "row_mask must be bool"),
        ("wpa", "widths differ", (words, np.ones((2, 4, 6))), {}, "patches must have shape"),
        ("wpa", "batches differ", (words, np.ones((3, 4, 5))), {}, "patches must have shape"),
        ("wpa", "dtypes differ", (words, patches.astype("float32")), {}, "patches must have the dtype"),
        ("wpa", "no words", (np.ones((2, 0, 5)), patches), {}, "words must hold at least one token"),
        ("wpa", "NaN", (words * np.nan, patches), {}, "words must not contain NaN"),
        ("wpa", "all padding", (words, patches, no_row), {}, "word_mask must have a True in every row"),
        ("wpa", "mask too short", (words, patches, None, no_row), {}, "patch_mask must have shape"),
        ("wpa", "beta zero", (words, patches), {"beta": 0.0}, "beta must be a finite number > 0"),
    ],
)


def clusters(seed=0, B=3, L=8, N=36, D=16):
    """Structured pairs: patches are noisy copies of words, so that the plan is far from uniform."""
    rng = np.random.default_rng(seed)
    words = rng.standard_normal((B, L, D))
    copies = words[np.arange(B)[:, None], rng.integers(0, L, (B, N))]
    return words, copies + 0.3 * rng.standard_normal((B, N, D))


@pytest.mark.parametrize("solve", ["linprog", "emd2"])
def test_comes_down_to_the_linear_programme(solve):
    """Outside truth: two simplex solvers. 50 steps come close, 1000 closer, none ends below the optimum."""
    if solve == "emd2":
        ot = pytest.importorskip("ot", reason="needs POT")
    else:
        optimize = pytest.importorskip("scipy.optimize", reason="needs SciPy")
    for seed in range(3):
        C = cosine_cost(*clusters(seed, B=1, N=12))[0]
        M, N = C.shape
        a, b = np.full(M, 1 / M), np.full(N, 1 / N)
        if solve == "emd2":
            best = ot.emd2(a, b, C)
        else:
            sums = np.vstack([np.kron(np.eye(M), np.ones(N)), np.kron(np.ones(M), np.eye(N))])
            best = optimize.linprog(C.ravel(), A_eq=sums, b_eq=np.concatenate([a, b])).fun
        after = [float((ipot.ipot_np(C, iters=iters) * C).sum()) - best for iters in (1, 50, 1000)]
        assert after[0] > after[1] > after[2] > -1e-9
        assert after[1] < 0.02 * best
        assert after[2] < 1e-3 * best


def test_potentials_give_the_same_plan():
    """One Sinkhorn sweep at ε = β/t from extrapolated log-scalings is one step of IPOT, to rounding."""
    C = cosine_cost(*clusters())
    rows, columns = np.ones((3, 8), bool), np.ones((3, 36), bool)
    rows[1, 5:], columns[2, :9] = False, False
    for beta, iters in [(0.5, 50), (0.1, 20), (0.5, 400)]:
        plan = ipot.ipot_np(C, beta, iters, rows, columns)
        assert np.abs(ipot.ipot_potentials_np(C, beta, iters, rows, columns) - plan).max() < 1e-10


@pytest.mark.parametrize("beta, iters", [(0.5, 1), (0.5, 50), (0.1, 10), (0.01, 1), (0.01, 50)])
def test_float32_keeps_every_row_and_five_digits(beta, iters):
    """β/t goes down to 2e-4 here: entries of T reach exp(−10 000), far below what float32 can hold."""
    C = cosine_cost(*clusters())
    fine, coarse = (
        ipot.ipot_np(C, beta, iters),
        ipot.ipot(torch.tensor(C).float(), beta, iters).double().numpy(),
    )
    assert np.abs(coarse.sum(-1) - 1 / 8).max() < 1e-6
    assert np.abs(coarse.sum(-2) - fine.sum(-2)).max() < 1e-5
    assert np.abs(((coarse - fine) * C).sum((1, 2))).max() < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("f", [ipot.wpa, ipot.wpa_fused])
def test_low_precision_is_solved_in_float32(f, dtype, tolerance):
    """Compared on the same rounded tokens, so that all that is left is the rounding of the result."""
    tokens = [torch.tensor(z).to(dtype).requires_grad_() for z in clusters()]
    value = f(*tokens)
    expected, _ = ipot.wpa_np(*(z.detach().double().numpy() for z in tokens))
    assert value.dtype == dtype
    assert np.abs(value.detach().double().numpy() / expected - 1).max() < tolerance
    value.sum().backward()
    assert all(z.grad.dtype == dtype and torch.isfinite(z.grad).all() for z in tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = f(*(z.detach().float() for z in tokens))
    assert np.abs(inside.numpy() / expected - 1).max() < 1e-5


@pytest.mark.parametrize("function", [ipot.ipot_np, ipot.ipot])
def test_the_order_of_tokens_and_pairs_carries_over_to_the_plan(function):
    kind = torch.from_numpy if function is ipot.ipot else np.asarray
    C, rng = cosine_cost(*clusters()), np.random.default_rng(1)
    p, q, r = rng.permutation(3), rng.permutation(8), rng.permutation(36)
    plan = np.asarray(function(kind(C)))
    assert np.abs(np.asarray(function(kind(C[np.ix_(p, q, r)]))) - plan[np.ix_(p, q, r)]).max() < 1e-12
    assert np.abs(np.asarray(function(kind(C[1]))) - plan[1]).max() < 1e-15


def test_autograd_habits():
    """No graph through the plan; backward twice; a frozen side; a zero row; padding; a leading axis more."""
    words, patches = (torch.from_numpy(z) for z in clusters())
    assert not ipot.ipot((1 - words @ words.mT).requires_grad_()).requires_grad
    words = words.mT.contiguous().mT
    words[0, 0] = 0
    words.requires_grad_()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 3:] = False
    for f in (ipot.wpa, ipot.wpa_fused):
        loss = f(words, patches, mask).sum()
        (first,) = torch.autograd.grad(loss, words, retain_graph=True)
        (second,) = torch.autograd.grad(loss, words)
        assert torch.equal(first, second)
        assert torch.isfinite(first).all()
        assert not first[1, 3:].any()
    assert ipot.ipot(torch.rand(2, 3, 4, 5), row_mask=torch.arange(4) > 0).shape == (2, 3, 4, 5)
    assert ipot.ipot(torch.rand(0, 4, 5)).shape == (0, 4, 5)


def test_memory_for_the_backward_pass_does_not_grow_with_the_steps():
    def saved(iters):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            ipot.wpa(torch.rand(2, 8, 4, requires_grad=True), torch.rand(2, 9, 4), iters=iters)
        return sum(numbers)

    assert saved(1) == saved(50)


def test_alignment_leaves_out_cls_sep_and_padding():
    text_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(ipot.alignment_masks(text_mask), expected)
    with pytest.raises(ValueError, match="text_mask must be bool"):
        ipot.alignment_masks(text_mask.long())
    with pytest.raises(ValueError, match="word_mask must have a True"):
        ipot.wpa(torch.rand(4, 5, 3), torch.rand(4, 2, 3), ipot.alignment_masks(text_mask))
