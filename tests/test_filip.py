"""Laws of late interaction and of its contrastive loss."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minivlp import filip
from minivlp.chamfer import chamfer
from minivlp.infonce import infonce_np
from minivlp.sinkhorn import unit_np
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes
from tests.test_sinkhorn import masks


@st.composite
def token_sets(draw, B=None):
    """x (A, M, D), y (B, N, D) and their masks; rows of any length; B sets on both sides when it is given."""
    A, B = (draw(sizes(3)), draw(sizes(3))) if B is None else (B, B)
    M, N, D = draw(sizes(4)), draw(sizes(4)), draw(sizes(4, 2))
    x, y = draw(arrays(A, M, D, scale=3)), draw(arrays(B, N, D, scale=2))
    return x, y, draw(masks(A, M)), draw(masks(B, N))


@st.composite
def pairs(draw):
    """As many sets on both sides, and a scale."""
    x, y, x_mask, y_mask = draw(token_sets(draw(sizes(3))))
    return x, y, draw(st.sampled_from([0.3, 3.0, 14.3])), x_mask, y_mask


def cosine(p, q):
    return float(p @ q) / (np.linalg.norm(p) * np.linalg.norm(q))


def directed(p, q):
    """The mean over p's tokens of the best cosine in q, one token at a time."""
    return sum(max(cosine(s, t) for t in q) for s in p) / len(p)


def sure_of_the_best(x, y, x_mask, y_mask):
    """Does every token, on both sides, prefer its best partner by more than a step of the difference?"""
    S = np.einsum("amd,bnd->abmn", unit_np(x)[0], unit_np(y)[0])
    gaps = [np.diff(np.sort(S, axis), axis=axis).min(initial=1.0) for axis in (-1, -2)]
    return min(gaps) > 1e-3


@law(
    "late_interaction",
    hint="A padded token must not show: neither in a maximum nor in a mean.",
)
@given(case=token_sets())
def padding_never_counts(f, case):
    x, y, x_mask, y_mask = case
    value = f(x, y, x_mask=x_mask, y_mask=y_mask)
    for a in range(len(x)):
        for b in range(len(y)):
            close(value[a, b], f(x[a][x_mask[a]][None], y[b][y_mask[b]][None])[0, 0])


@law("late_interaction", hint="Only x's tokens look for partners: saying a token of y twice changes nothing.")
@given(case=token_sets(), seed=st.integers(0, 99))
def the_chosen_side_may_repeat_itself(f, case, seed):
    x, y, _, _ = case
    repeated = np.random.default_rng(seed).integers(0, y.shape[1], 3)
    close(f(x, np.concatenate([y, y[:, repeated]], 1)), f(x, y))


@law("late_interaction", hint="Entry (a, b): the mean over a's tokens of the largest cosine with one of b's.")
@given(case=token_sets())
def equals_the_quadruple_loop(f, case):
    x, y, _, _ = case
    close(f(x, y), np.array([[directed(p, q) for q in y] for p in x]))


@law("late_interaction", hint="dL/dcos is upstream / M at a token's best partner; then back through x/‖x‖.")
@given(case=token_sets(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    x, y, x_mask, y_mask = case
    assume(sure_of_the_best(*case))
    upstream = np.random.default_rng(seed).standard_normal((len(x), len(y)))
    settings = {"x_mask": x_mask, "y_mask": y_mask}
    for which, gradient in enumerate(f.grads(x, y, grad=upstream, **settings)):
        slope = central_differences(lambda x, y: f(x, y, **settings), (x, y), which, grad=upstream)
        close(gradient, slope, rtol=1e-5, atol=1e-6)


@law("late_interaction", hint="Of equal maxima the first takes the whole gradient.")
@given(copies=sizes(4, 2), D=sizes(4, 2), seed=st.integers(0, 99))
def the_first_of_equal_partners_wins(f, copies, D, seed):
    x = np.eye(D)[None, :1]
    y = np.random.default_rng(seed).integers(1, 4, (1, 1, D)) * 1.0
    _, dy = f.grads(x, np.repeat(y, copies, 1))
    _, one = f.grads(x, y)
    close(dy, np.concatenate([one, np.zeros((1, copies - 1, D))], 1))


@law("filip", hint="Equal scores leave a choice of one in B: half of log B for each of the two directions.")
@given(case=pairs())
def equal_scores_cost_log_B(f, case):
    x, y, scale, _, _ = case
    close(f(x * 0 + x[:1], y * 0 + y[:1], scale), math.log(len(x)), atol=1e-8)


@law("filip", hint="Shuffling the pairs together must not matter: is the right answer on the diagonal?")
@given(case=pairs(), seed=st.integers(0, 99))
def pairs_come_in_any_order(f, case, seed):
    x, y, scale, x_mask, y_mask = case
    p = np.random.default_rng(seed).permutation(len(x))
    shuffled = f(x[p], y[p], scale, image_mask=x_mask[p], text_mask=y_mask[p])
    close(shuffled, f(x, y, scale, image_mask=x_mask, text_mask=y_mask), atol=1e-8)


@law("filip", hint="With one token a side the two matrices are one, and the loss is InfoNCE on unit rows.")
@given(B=sizes(), D=sizes(), data=st.data(), scale=st.sampled_from([0.3, 3.0, 14.3]))
def one_token_each_is_infonce(f, B, D, data, scale):
    x, y = data.draw(arrays(B, D)), data.draw(arrays(B, D))
    close(f(x[:, None], y[:, None], scale), infonce_np(unit_np(x)[0], unit_np(y)[0], scale)[0], atol=1e-8)


@law("filip", hint="An image chooses by its patches' mean over texts, a text by its words' mean over images.")
@given(case=pairs())
def equals_the_slow_loop(f, case):
    x, y, scale, x_mask, y_mask = case
    images = [p[m] for p, m in zip(x, x_mask, strict=True)]
    texts = [q[m] for q, m in zip(y, y_mask, strict=True)]
    total = 0.0
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        by_image = [scale * directed(image, other) for other in texts]
        by_text = [scale * directed(text, other) for other in images]
        for scores in (by_image, by_text):
            total += max(scores) + math.log(sum(math.exp(s - max(scores)) for s in scores)) - scores[i]
    close(f(x, y, scale, image_mask=x_mask, text_mask=y_mask), total / (2 * len(x)), atol=1e-8)


@law("filip", hint="Each of the two choices pulls at the best partners of its direction, and at the scale.")
@given(case=pairs())
def loss_gradients_are_the_slopes(f, case):
    x, y, scale, x_mask, y_mask = case
    scale = min(scale, 3.0)
    assume(sure_of_the_best(x, y, x_mask, y_mask))
    settings = {"image_mask": x_mask, "text_mask": y_mask}
    for which, gradient in enumerate(f.grads(x, y, scale, **settings)):
        slope = central_differences(lambda *a: f(*a, **settings), (x, y, scale), which)
        close(gradient, slope, rtol=1e-5, atol=1e-6)


def zeros_at_padding(x, x_mask, short=0.0):
    return x * np.where(x_mask, 1, short)[..., None]


@law("late_interaction", hint="Divide by max(length, 1e-5): x / ‖x‖ of a padded row of zeros is NaN.")
@given(case=token_sets(), seed=st.integers(0, 99))
def padded_zero_rows_spoil_nothing(f, case, seed):
    x, y, x_mask, y_mask = case
    assume(sure_of_the_best(*case))
    upstream = np.random.default_rng(seed).standard_normal((len(x), len(y)))
    settings = {"x_mask": x_mask, "y_mask": y_mask, "grad": upstream}
    wanted = f.grads(x, y, **settings)
    found = f.grads(zeros_at_padding(x, x_mask), zeros_at_padding(y, y_mask), **settings)
    for gradient, other, real in zip(found, wanted, (x_mask, y_mask), strict=True):
        assert np.isfinite(gradient).all(), "a row of zeros, masked or not, makes a gradient infinite or NaN"
        close(gradient, other * real[..., None])


@law("late_interaction", hint="A real row shorter than 1e-5 is divided by 1e-5: its slope is q / (M · 1e-5).")
@given(M=sizes(4), D=sizes(4, 2), seed=st.integers(0, 99), short=st.sampled_from([0.0, 1e-7]))
def real_short_rows_have_a_slope(f, M, D, seed, short):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((1, M, D)), rng.standard_normal((1, 1, D))
    x[0, 0] *= short
    q = y[0, 0] / np.linalg.norm(y)
    rest = x[0, 1:] / np.linalg.norm(x[0, 1:], axis=1, keepdims=True) @ q
    close(f(x, y), [[(x[0, 0] @ q / 1e-5 + rest.sum()) / M]])
    close(f.grads(x, y)[0][0, 0], q / 1e-5 / M)
    close(f.grads(y, x[:, :1])[1][0, 0], q / 1e-5)


@law("late_interaction", hint="float32 comes in, float32 goes out.")
@given(case=token_sets())
def float32_is_enough(f, case):
    assume(sure_of_the_best(*case))
    same_in_float32(f, case[:2], {"x_mask": case[2], "y_mask": case[3]}, near=1e-5)


@law("filip", hint="Divide by max(length, 1e-5): x / ‖x‖ of a padded row of zeros is NaN in every gradient.")
@given(case=pairs())
def padded_zero_rows_spoil_no_loss(f, case):
    x, y, scale, x_mask, y_mask = case
    assume(sure_of_the_best(x, y, x_mask, y_mask))
    masks = {"image_mask": x_mask, "text_mask": y_mask}
    wanted = f.grads(x, y, scale, **masks)
    found = f.grads(zeros_at_padding(x, x_mask), zeros_at_padding(y, y_mask), scale, **masks)
    for gradient, other, real in zip(found, wanted, (x_mask[..., None], y_mask[..., None], 1), strict=True):
        assert np.isfinite(gradient).all(), "a row of zeros, masked or not, makes a gradient infinite or NaN"
        close(gradient, other * real, atol=1e-10)


@law(
    "filip", hint="A real row shorter than 1e-5 is divided by 1e-5: its slope is that of its unit row / 1e-5."
)
@given(B=sizes(4, 2), D=sizes(5, 2), short=st.sampled_from([0.0, 1e-7]), seed=st.integers(0, 99))
def real_short_rows_have_a_slope_in_the_loss(f, B, D, short, seed):
    x, y = np.random.default_rng(seed).standard_normal((2, B, D))
    x[0] *= short
    y[-1] *= short
    p, q = (z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-5) for z in (x, y))
    S = 3.0 * p @ q.T  # with one token a side the loss is InfoNCE
    G = sum(np.exp(S - np.logaddexp.reduce(S, a, keepdims=True)) for a in (0, 1)) - 2 * np.eye(B)
    dx, dy, _ = f.grads(x[:, None], y[:, None], 3.0)
    close(dx[0, 0], 3.0 * (G / (2 * B))[0] @ q / 1e-5, rtol=1e-8, atol=1e-7)
    close(dy[-1, 0], 3.0 * (G / (2 * B))[:, -1] @ p / 1e-5, rtol=1e-8, atol=1e-7)


@law("filip", hint="P is a softmax however large the scale is: clip nothing, and a sure mistake pulls fully.")
@given(B=sizes(4, 2), D=sizes(5, 2), scale=st.sampled_from([30.0, 100.0, 1e4]), kind=st.sampled_from("srwa"))
def gradients_hold_at_every_scale(f, B, D, scale, kind):
    rng = np.random.default_rng(B)
    x = rng.standard_normal((B, 1, D))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    y = {"s": x, "r": np.roll(x, 1, 0), "w": -x, "a": x * 0 + x[0]}[kind].copy()
    S = scale * x[:, 0] @ y[:, 0].T  # with one token a side the loss is InfoNCE
    G = sum(np.exp(S - np.logaddexp.reduce(S, a, keepdims=True)) for a in (0, 1)) - 2 * np.eye(B)
    G /= 2 * B
    close(f.grads(x, y, scale)[2], (G * S).sum() / scale, rtol=1e-6, atol=1e-9)
    dx = scale * G @ y[:, 0]
    dx -= x[:, 0] * (x[:, 0] * dx).sum(1, keepdims=True)
    close(f.grads(x, y, scale)[0][:, 0], dx, rtol=1e-6, atol=1e-10 * scale * scale)


@law("filip", hint="Of equal maxima the first takes the whole gradient.")
@given(copies=sizes(4, 2), D=sizes(4, 2), seed=st.integers(0, 99))
def the_first_of_equal_partners_learns(f, copies, D, seed):
    rng = np.random.default_rng(seed)
    # Along an axis all copies have the same cosine to the last bit, in whatever order it is summed.
    x, y = rng.standard_normal((2, 1, D)), np.eye(D)[rng.integers(D, size=(2, 1))] * 2
    _, one, _ = f.grads(x, y, 3.0)
    _, dy, _ = f.grads(x, np.repeat(y, copies, 1), 3.0)
    # The image token looks at the first copy alone; the copies look at the image token, in equal parts.
    close(dy[:, 1:], np.repeat(dy[:, 1:2], copies - 1, 1))
    close(dy.sum(1, keepdims=True), one)
    half = f.grads(x, np.repeat(y, copies, 1), 3.0, text_mask=np.arange(copies)[None].repeat(2, 0) < 1)[1]
    close(half[:, :1], one)
    assert not np.allclose(dy[:, 0], dy[:, 1]) or np.abs(one).max() < 1e-9, "the copies share the gradient"


@law("filip", hint="float32 comes in, float32 goes out.")
@given(case=pairs())
def float32_is_enough_for_the_loss(f, case):
    x, y, scale, x_mask, y_mask = case
    assume(sure_of_the_best(x, y, x_mask, y_mask))
    same_in_float32(f, (x, y, scale), {"image_mask": x_mask, "text_mask": y_mask}, near=1e-4)


test_laws = obeys(filip)

x, y = np.ones((2, 3, 5)), np.ones((2, 4, 5))
no_row = np.array([[True, True, False], [False, False, False]])


def shared(family: str, names: tuple[str, ...], *scale: float) -> list[tuple]:
    """What both functions refuse; `names` are those of the arguments."""
    x_name, y_name, x_mask, y_mask = names
    table = [
        ("widths differ", np.ones((2, 4, 6)), {}, f"{y_name} must have shape"),
        ("dtypes differ", y.astype("float32"), {}, f"{y_name} must have the dtype .* of {x_name}"),
        ("integers", y.astype(int), {}, f"{y_name} must have a floating dtype"),
        ("no tokens", y[:, :0], {}, f"{y_name} must hold at least one token"),
        ("NaN", y * np.nan, {}, f"{y_name} must not contain NaN"),
        ("all padding", y, {x_mask: no_row}, f"{x_mask} must have a True in every row"),
        ("mask too short", y, {y_mask: no_row}, f"{y_mask} must have shape"),
        ("mask of numbers", y, {x_mask: np.ones((2, 3))}, f"{x_mask} must be bool"),
    ]
    return [(family, what, (x, other, *scale), masks, message) for what, other, masks, message in table]


test_refusals = refuses(
    filip,
    [
        *shared("late_interaction", ("x", "y", "x_mask", "y_mask")),
        *shared("filip", ("images", "texts", "image_mask", "text_mask"), 1.0),
        ("late_interaction", "no set", (x, y[:0]), {}, "y must hold at least one set of tokens"),
        ("filip", "no pair", (x[:0], y[:0], 1.0), {}, "images must hold at least one set of tokens"),
        ("filip", "one text too many", (x, np.ones((3, 4, 5)), 1.0), {}, "texts must have shape"),
        ("filip", "scale zero", (x, y, 0.0), {}, "scale must be a finite number > 0"),
        ("filip", "a scale for each pair", (x, y, np.ones(2)), {}, "scale must be a scalar"),
    ],
)


def random_sets(dtype=torch.float64):
    """x (4, 6, 5), y (4, 3, 5) and masks that are not all True; x is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, n, 5, generator=generator, dtype=torch.float64).to(dtype) for n in (6, 3))
    x = x.transpose(0, 2).contiguous().transpose(0, 2)
    return x, y, torch.arange(6) < torch.tensor([[6], [2], [1], [5]]), torch.arange(3) < torch.ones(4, 1) * 2


def test_the_diagonal_of_the_mean_of_both_directions_is_chamfer():
    x, y, x_mask, y_mask = random_sets()
    both = filip.late_interaction(x, y, x_mask, y_mask) + filip.late_interaction(y, x, y_mask, x_mask).T
    close(both.diagonal() / 2, chamfer(x, y, x_mask, y_mask))


def test_one_mask_for_the_whole_batch():
    x, y, _, y_mask = random_sets()
    close(filip.late_interaction(x, y, None, y_mask[0]), filip.late_interaction(x, y, None, y_mask))
    close(filip.filip(x, y, 3.0, None, y_mask[0]), filip.filip(x, y, 3.0, None, y_mask))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_low_precision(dtype, tolerance):
    x, y, x_mask, y_mask = random_sets(dtype)
    tokens = [x.requires_grad_(), y.requires_grad_()]
    loss = filip.filip(*tokens, torch.tensor(3.0), x_mask, y_mask)
    similarity = filip.late_interaction(*tokens, x_mask, y_mask)
    wide = [t.detach().double().numpy() for t in tokens]
    exact, (dx, dy, _) = filip.filip_np(*wide, 3.0, x_mask.numpy(), y_mask.numpy())
    assert loss.dtype == similarity.dtype == dtype
    assert abs(loss.item() - exact) < tolerance
    expected = filip.late_interaction_np(*wide, x_mask.numpy(), y_mask.numpy())[0]
    assert np.abs(similarity.detach().double().numpy() - expected).max() < tolerance
    for got, wanted in zip(torch.autograd.grad(loss, tokens), (dx, dy), strict=True):
        assert np.abs(got.double().numpy() - wanted).max() < tolerance


def test_backward_twice_one_side_frozen_and_zero_rows():
    x, y, x_mask, y_mask = random_sets()
    loss = filip.filip(x.requires_grad_(), y, 3.0, x_mask, y_mask)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)
    assert not first[1, 2:].any()  # padding
    zero = torch.zeros_like(x, requires_grad=True)
    filip.filip(zero, y, 3.0).backward()
    assert bool(torch.isfinite(zero.grad).all())
