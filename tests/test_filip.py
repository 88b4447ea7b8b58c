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
