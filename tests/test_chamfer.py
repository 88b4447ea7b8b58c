"""Laws of Chamfer alignment."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minivlp import chamfer
from tests.held import enough, holds_tiles_only, same_in_float32, tiles
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes
from tests.test_sinkhorn import SMALL, cosine_cost, exact_cost, masks


@st.composite
def token_sets(draw):
    """x (B, M, D), y (B, N, D) and their masks; rows of any length, real tokens at any position."""
    B, M, N, D = draw(sizes(3)), draw(sizes()), draw(sizes()), draw(sizes(5, 2))
    x, y = draw(arrays(B, M, D, scale=3)), draw(arrays(B, N, D, scale=2))
    return x, y, draw(masks(B, M)), draw(masks(B, N))


def real_tokens(x, y, x_mask, y_mask):
    """The token sets of each pair without their padding."""
    return [(x[b][x_mask[b]], y[b][y_mask[b]]) for b in range(len(x))]


@law("chamfer", hint="What stands in a padded token must not show: neither in a maximum nor in a mean.")
@given(case=token_sets())
def padding_never_counts(f, case):
    x, y, x_mask, y_mask = case
    value = f(x, y, x_mask=x_mask, y_mask=y_mask)
    alone = [f(p[None], q[None])[0] for p, q in real_tokens(*case)]
    close(value, alone)


@law("chamfer", hint="A similarity: ½ (mean over x of the best cosine in y + mean over y of the best in x).")
@given(case=token_sets())
def equals_the_double_loop(f, case):
    x, y, _, _ = case
    for b, value in enumerate(f(x, y)):
        S = [[float(p @ q) / (np.linalg.norm(p) * np.linalg.norm(q)) for q in y[b]] for p in x[b]]
        best_of_x = [max(row) for row in S]
        best_of_y = [max(column) for column in zip(*S, strict=True)]
        close(value, (np.mean(best_of_x) + np.mean(best_of_y)) / 2)


@law("chamfer", hint="Only the best partner receives a gradient, ½/M for rows and ½/N for columns.")
@given(case=token_sets(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    x, y, x_mask, y_mask = case
    S = 1 - cosine_cost(x, y)
    gaps = [
        np.diff(np.sort(S[b], axis), axis=axis).min(initial=1.0) for b in range(len(x)) for axis in (0, 1)
    ]
    assume(
        min(gaps) > 1e-3
    )  # where two partners almost tie, a step of the difference could change the best one
    upstream = np.random.default_rng(seed).standard_normal(len(x))
    settings = {"x_mask": x_mask, "y_mask": y_mask}
    for which, gradient in enumerate(f.grads(x, y, grad=upstream, **settings)):
        slope = central_differences(lambda x, y: f(x, y, **settings), (x, y), which, grad=upstream)
        close(gradient, slope, rtol=1e-5, atol=1e-6)


@law("chamfer", hint="Of equal maxima the first takes the whole gradient.")
@given(copies=sizes(4, 2), D=sizes(4, 2), seed=st.integers(0, 99))
def the_first_of_equal_partners_wins(f, copies, D, seed):
    rng = np.random.default_rng(seed)
    p, q = np.eye(D)[:1], rng.integers(1, 4, (1, D)) * 1.0
    dx, dy = f.grads(np.repeat(p, copies, 0), np.repeat(q, copies, 0))
    one_dx, one_dy = f.grads(p, q)
    # Each of the copies of x points at the first of y, ½ in all; each of y at the first of x, ½/copies a
    # copy.
    close(dy, np.vstack([one_dy * (0.5 + 0.5 / copies), np.repeat(one_dy * 0.5 / copies, copies - 1, 0)]))
    close(dx, np.vstack([one_dx * (0.5 + 0.5 / copies), np.repeat(one_dx * 0.5 / copies, copies - 1, 0)]))


@law(
    "chamfer", hint="Divide by max(length, 1e-5): x / ‖x‖ of a padded row of zeros is NaN in every gradient."
)
@given(case=token_sets(), seed=st.integers(0, 99), short=st.sampled_from([0.0, 1e-9]))
def padded_zero_rows_spoil_nothing(f, case, seed, short):
    x, y, x_mask, y_mask = case
    x, y = x * np.where(x_mask, 1, short)[..., None], y * np.where(y_mask, 1, short)[..., None]
    upstream = np.random.default_rng(seed).standard_normal(len(x))
    dx, dy = f.grads(x, y, x_mask=x_mask, y_mask=y_mask, grad=upstream)
    for b in range(len(x)):
        alone = f.grads(x[b][x_mask[b]][None], y[b][y_mask[b]][None], grad=upstream[b : b + 1])
        for gradient, real, one in zip((dx[b], dy[b]), (x_mask[b], y_mask[b]), alone, strict=True):
            assert np.isfinite(gradient).all(), (
                "a row of zeros, masked or not, makes a gradient infinite or NaN"
            )
            close(gradient[real], one[0])
            close(gradient[~real], gradient[~real] * 0)


@law(
    "chamfer", hint="A real row shorter than 1e-5 is divided by 1e-5: its cosine is small, its slope is not."
)
@given(M=sizes(4), D=sizes(4, 2), seed=st.integers(0, 99), short=st.sampled_from([0.0, 1e-7]))
def real_short_rows_have_a_slope(f, M, D, seed, short):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.standard_normal((M, D)), 0), rng.standard_normal((1, D))
    x[0] *= short
    q = y[0] / np.linalg.norm(y)
    cosines = np.append(x[:1] / 1e-5, x[1:] / np.linalg.norm(x[1:], axis=1, keepdims=True), 0) @ q
    assume(M == 1 or abs(np.diff(np.sort(cosines)[-2:])[0]) > 1e-3)
    weight = 0.5 / M + 0.5 * (cosines.argmax() == 0)
    close(f(x, y), (cosines.mean() + cosines.max()) / 2)
    close(f.grads(x, y)[0][0], weight * q / 1e-5)
    close(f.grads(y, x)[1][0], weight * q / 1e-5)


@law("chamfer", hint="float32 comes in, float32 goes out.")
@given(case=token_sets())
def float32_is_enough(f, case):
    x, y, x_mask, y_mask = case
    S = 1 - cosine_cost(x, y)
    gaps = [
        np.diff(np.sort(S[b], axis), axis=axis).min(initial=1.0) for b in range(len(S)) for axis in (0, 1)
    ]
    assume(min(gaps) > 1e-3)
    same_in_float32(f, (x, y), {"x_mask": x_mask, "y_mask": y_mask}, near=1e-5)


def large_sets(M=800, D=4):
    """One pair of sets over several tiles each way, the last ones not full, with padding at the end."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((1, M, D)), rng.standard_normal((1, M, D)), np.arange(M)[None] < M - 50


@law("chamfer", hint="A partner's index counts from the first token, and the last tiles may be smaller.")
def many_tiles_give_one_answer(f):
    x, y, real = large_sets()
    S = np.where(real[0][:, None], 1 - cosine_cost(x[0], y[0]), -np.inf)
    with tiles():
        value, (_, dy) = f(x, y, x_mask=real), f.grads(x, y, x_mask=real)
    forward, backward = S[real[0]].max(1), S.max(0)
    close(value[0], (forward.mean() + backward.mean()) / 2)
    length = np.linalg.norm(y[0], axis=1, keepdims=True)
    p, q = x[0] / np.linalg.norm(x[0], axis=1, keepdims=True), y[0] / length
    pull = 0.5 / len(q) * p[S.argmax(0)]
    np.add.at(pull, S[real[0]].argmax(1), 0.5 / real.sum() * p[real[0]])
    close(dy[0], (pull - q * (q * pull).sum(1, keepdims=True)) / length, rtol=1e-7, atol=1e-10)


@law("chamfer", hint="Keep each token's best value and partner, and make S tile by tile.")
def no_more_than_tiles_is_held(f):
    x, y, real = large_sets()
    most = enough(x, y, tokens=2 * x.shape[1])
    holds_tiles_only(f, (x, y), {"x_mask": real}, x.shape[1] ** 2, "S", most)


test_laws = obeys(chamfer)

x, y = np.ones((2, 3, 5)), np.ones((2, 4, 5))
no_row = np.array([[True, True, False], [False, False, False]])
test_refusals = refuses(
    chamfer,
    [
        ("chamfer", "widths differ", (x, np.ones((2, 4, 6))), {}, "y must have shape"),
        ("chamfer", "batches differ", (x, np.ones((3, 4, 5))), {}, "y must have the leading axes"),
        ("chamfer", "dtypes differ", (x, y.astype("float32")), {}, "y must have the dtype"),
        ("chamfer", "integers", (x.astype(int), y), {}, "x must have a floating dtype"),
        ("chamfer", "no tokens", (np.ones((2, 0, 5)), y), {}, "x must hold at least one token"),
        ("chamfer", "NaN", (x, y * np.nan), {}, "y must not contain NaN"),
        ("chamfer", "all padding", (x, y, no_row), {}, "x_mask must have a True in every row"),
        ("chamfer", "mask too short", (x, y), {"y_mask": no_row}, "y_mask must have shape"),
        ("chamfer", "mask of numbers", (x, y, np.ones((2, 3))), {}, "x_mask must be bool"),
    ],
)


def random_sets(M=6, N=9, D=4, seed=0, *leading):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*leading, M, D)), rng.standard_normal((*leading, N, D))


def test_is_one_minus_a_quarter_of_the_squared_chamfer_distance():
    """Outside truth: the squared distance of Fan et al. on unit rows, by torch.cdist, is 4 (1 − s)."""
    x, y = (torch.nn.functional.normalize(torch.from_numpy(z), dim=-1) for z in random_sets())
    squared = torch.cdist(x, y) ** 2
    distance = squared.min(1).values.mean() + squared.min(0).values.mean()
    assert abs(float(distance - 4 * (1 - chamfer.chamfer(x, y)))) < 1e-12


def test_is_symmetric_bounded_and_one_on_equal_sets():
    x, y = random_sets()
    value = chamfer.chamfer_np(x, y)[0]
    assert abs(value - chamfer.chamfer_np(y, x)[0]) < 1e-15
    assert -1 <= value < 1
    shuffled = 3 * x[np.random.default_rng(0).permutation(6)]
    assert abs(chamfer.chamfer_np(x, shuffled)[0] - 1) < 1e-12


def test_is_the_mean_of_the_two_directions_of_late_interaction():
    """FILIP's two matrices over all pairs of a batch: their diagonals average to the Chamfer values."""
    x, y = (torch.from_numpy(z) for z in random_sets(5, 7, 4, 0, 3))
    x_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    y_mask = torch.tensor([[1] * 7, [1] * 2 + [0] * 5, [1] * 4 + [0] * 3]).bool()
    unit = torch.nn.functional.normalize
    S = torch.einsum("amd,bnd->abmn", unit(x, dim=-1), unit(y, dim=-1))  # (B, B, M, N)
    image = chamfer.mean_max(S, x_mask[:, None], y_mask[None])  # (B, B)
    text = chamfer.mean_max(S.mT, y_mask[None], x_mask[:, None])
    expected = chamfer.chamfer(x, y, x_mask, y_mask)
    assert torch.allclose(0.5 * (image + text).diagonal(), expected, atol=1e-12)
    value, slope = chamfer.mean_max_np(S.numpy(), x_mask[:, None].numpy(), y_mask[None].numpy())
    assert np.abs(value - image.numpy()).max() < 1e-12
    assert np.abs(slope.sum((-2, -1)) - 1).max() < 1e-12


@pytest.mark.parametrize("shape", SMALL)
def test_each_direction_costs_at_most_the_transport_cost(shape):
    """Dropping one marginal from the transport problem can only make it cheaper."""
    for seed in range(5):
        C = cosine_cost(*random_sets(*shape, 3, seed))
        for half in (C, C.T):
            assert 1 - chamfer.mean_max_np(1 - half, None, None)[0] <= exact_cost(C) + 1e-12


def test_mismatched_is_the_mean_over_wrong_pairs_of_equal_size():
    x, y = (torch.from_numpy(z) for z in random_sets(5, 7, 4, 0, 4))
    value = {(i, j): float(chamfer.chamfer(x[i], y[j])) for i in range(4) for j in range(4)}
    wrong = np.mean([v for (i, j), v in value.items() if i != j])
    assert abs(float(chamfer.mismatched(x, y)) - wrong) < 1e-12
    y_mask = torch.arange(7) < torch.tensor([3, 3, 5, 3])[:, None]  # set 2 has no partner of its size
    trio = [float(chamfer.chamfer(x[i], y[j, :3])) for i in (0, 1, 3) for j in (0, 1, 3) if i != j]
    assert abs(float(chamfer.mismatched(x, y, y_mask=y_mask)) - np.mean(trio)) < 1e-12
    with pytest.raises(ValueError, match="two sets with equally many real tokens"):
        chamfer.mismatched(x[:1], y[:1])
    with pytest.raises(ValueError, match="two sets with equally many real tokens"):
        chamfer.mismatched(x[1:3], y[1:3], y_mask=y_mask[1:3])


def test_unrelated_sets_score_higher_the_larger_they_are():
    """Why a baseline is needed: the null value is far from 0 and grows with the number of tokens."""
    null = [chamfer.chamfer_np(*random_sets(n, n, 64, 0, 4))[0].mean() for n in (4, 16, 64)]
    assert 0.05 < null[0] < null[1] < null[2]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_low_precision(dtype, tolerance):
    tokens = [torch.tensor(z).to(dtype).requires_grad_() for z in random_sets()]
    value = chamfer.chamfer(*tokens)
    expected, slopes = chamfer.chamfer_np(*(z.detach().double().numpy() for z in tokens))
    assert value.dtype == dtype
    assert abs(value.item() - expected) < tolerance
    value.backward()
    for z, slope in zip(tokens, slopes, strict=True):
        assert np.abs(z.grad.double().numpy() - slope).max() < tolerance


def test_autograd_habits():
    """Backward twice, a frozen side, a non-contiguous one, and zero rows."""
    x, y = (torch.from_numpy(z) for z in random_sets())
    x = x.T.contiguous().T.requires_grad_()
    loss = chamfer.chamfer(x, y)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])
    zero = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    chamfer.chamfer(zero, y).backward()
    assert torch.equal(zero.grad, torch.from_numpy(chamfer.chamfer_np(np.zeros((3, 4)), y.numpy())[1][0]))
