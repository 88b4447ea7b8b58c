"""Laws of the hinge loss."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minivlp import hinge
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.peers import unit_rows
from tests.strategies import arrays, pairs, sizes


@st.composite
def cases(draw):
    """(x (B, D), y (B, D)) and the settings."""
    settings = {"margin": draw(st.sampled_from([0.05, 0.2, 1.0])), "hardest": draw(st.booleans())}
    return draw(pairs(0.5, 1.0)), settings


@law("hinge", hint="A pair that beats all others by the margin is content: does the pair itself count?")
@given(B=sizes(), seed=st.integers(0, 99), hardest=st.booleans())
def separated_pairs_cost_nothing(f, B, seed, hardest):
    margin = 0.5
    x = np.eye(B)[np.random.default_rng(seed).permutation(B)]  # 1 with their own text, 0 with the others
    loss = f(x, x, margin=margin, hardest=hardest)
    assert loss == 0, f"got a loss of {float(loss):.6g}, expected 0"
    grads = f.grads(x, x, margin=margin, hardest=hardest)
    assert all((g == 0).all() for g in grads), "the loss is 0, a gradient is not"


@law("hinge", hint="Images look for texts and texts for images: exchanging the two must not matter.")
@given(case=cases())
def images_and_texts_exchange(f, case):
    (x, y), settings = case
    close(f(y, x, **settings), f(x, y, **settings))


def slow_loop(x, y, margin, hardest):
    """The formula, one pair at a time."""
    total = 0.0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        own = x[i] @ y[i]
        texts = [max(0.0, margin + x[i] @ y[j] - own) for j in others]
        images = [max(0.0, margin + x[j] @ y[i] - own) for j in others]
        total += sum(max(c, default=0.0) if hardest else sum(c) for c in (texts, images))
    return total


@law("hinge", hint="Two loops: cost = max(0, margin + S_ij − S_ii); add up the largest of each line, or all.")
@given(case=cases())
def equals_the_slow_loop(f, case):
    (x, y), settings = case
    close(f(x, y, **settings), slow_loop(x, y, **settings))


@law("hinge", hint="Each cost that counts pushes one negative and pulls the pair: is it pulled as often?")
@given(
    B=sizes(),
    D=sizes(5, 2),
    data=st.data(),
    hardest=st.booleans(),
    zeros=st.sampled_from([False, False, True]),
)
def gradients_are_the_slopes(f, B, D, data, hardest, zeros):
    B = 2 if zeros else B  # with more texts one that is 0 makes a column of ties
    x, y = data.draw(arrays(B, D)), data.draw(arrays(B, D))
    if zeros:
        y[0] = 0
    S = x @ y.T
    costs = [0.2 + S - S.diagonal()[:, None], (0.2 + S - S.diagonal()).T]
    for cost in costs:  # near a kink or a tie a step of the difference could cross it
        cost = cost[~np.eye(B, dtype=bool)].reshape(B, B - 1)
        assume(np.abs(cost).min(initial=1.0) > 1e-3)
        assume(np.diff(np.sort(cost, 1), axis=1).min(initial=1.0) > 1e-3)
    settings = {"margin": 0.2, "hardest": hardest}
    for which, gradient in enumerate(f.grads(x, y, **settings)):
        close(
            gradient,
            central_differences(lambda x, y: f(x, y, **settings), (x, y), which),
            rtol=1e-6,
            atol=1e-7,
        )


@law("hinge", hint="Of equally hard negatives the first takes the whole gradient.")
@given(B=sizes(5, 3), row=arrays(3))
def the_first_of_equal_negatives_wins(f, B, row):
    x = np.tile(row, (B, 1))  # all scores are equal
    # Everyone is pushed from index 0, which is pushed from 1; each pair pulls itself as often as it pushes.
    chosen = np.array([B - 1, 1, *[0] * (B - 2)])
    for gradient in f.grads(x, x, margin=0.2, hardest=True):
        close(gradient, (chosen - 1)[:, None] * x)


@law("hinge", hint="A cost of exactly 0 does not count: only what is inside the margin has a gradient.")
@given(B=sizes(5, 2), hardest=st.booleans(), seed=st.integers(0, 99))
def a_cost_of_zero_has_no_gradient(f, B, hardest, seed):
    x = np.eye(B)[np.random.default_rng(seed).permutation(B)]
    y = x.copy()  # the own score is 1, all others 0: with a margin of 1 every cost is exactly 0
    assert f(x, y, margin=1.0, hardest=hardest) == 0, "1 + 0 − 1 is no cost"
    for gradient in f.grads(x, y, margin=1.0, hardest=hardest):
        assert not gradient.any(), "a cost of exactly 0 has a gradient"


@law("hinge", hint="Every cost counts by itself, equal ones too: G has a whole number at each entry.")
@given(B=sizes(5, 3), scale=st.sampled_from([1.0, 1e4]), hardest=st.booleans())
def equal_and_large_costs_count_once_each(f, B, scale, hardest):
    x, y = scale * np.eye(B), -np.eye(B) - 1  # all negatives alike, all pairs behind them by `scale`
    dx, dy = f.grads(x, y, margin=0.2, hardest=hardest)
    if hardest:
        G = np.zeros((B, B))
        for i in range(B):
            other = 1 if i == 0 else 0
            G[i, other] += 1
            G[other, i] += 1
        G -= 2 * np.eye(B)
    else:
        G = 2 * (1 - np.eye(B)) - 2 * (B - 1) * np.eye(B)
    close(dx, G @ y)
    close(dy, G.T @ x)


@law("hinge", hint="float32 comes in, float32 goes out.")
@given(B=sizes(5, 2), hardest=st.booleans())
def float32_is_enough(f, B, hardest):
    rng = np.random.default_rng(B)
    case = rng.integers(-4, 5, (2, B, 3)) / 8  # exact in both, so that no tie is broken by rounding
    same_in_float32(f, tuple(case), {"margin": 0.25, "hardest": hardest})


test_laws = obeys(hinge)

x, y = np.ones((3, 2)), np.ones((3, 2))
test_refusals = refuses(
    hinge,
    [
        ("hinge", "one text too many", (x, np.ones((4, 2))), {}, "texts must have shape"),
        ("hinge", "widths differ", (x, np.ones((3, 1))), {}, "texts must have shape"),
        ("hinge", "no pair", (x[:0], y[:0]), {}, "images must hold at least one pair"),
        ("hinge", "integer texts", (x, y.astype(int)), {}, "texts must have a floating dtype"),
        ("hinge", "NaN", (x * np.nan, y), {}, "images must not contain NaN"),
        ("hinge", "margin zero", (x, y), {"margin": 0.0}, "margin must be a finite number > 0"),
        ("hinge", "a margin for each pair", (x, y), {"margin": np.ones(3)}, "margin must be a scalar"),
    ],
)


def test_all_negatives_equal_torch():
    """Outside truth: torch's margin ranking loss over every (pair, negative)."""
    x, y = unit_rows(6, 4)
    S, other = x @ y.T, ~torch.eye(6, dtype=torch.bool)
    total = 0.0
    for scores in (S, S.T):
        own = scores.diagonal()[:, None].expand(6, 6)[other]
        ones = torch.ones_like(own)
        total += torch.nn.functional.margin_ranking_loss(
            own, scores[other], ones, margin=0.3, reduction="sum"
        )
    close(hinge.hinge(x, y, margin=0.3, hardest=False), total)


def test_one_negative_counts_in_each_line_or_all():
    x, y = unit_rows(8, 3)
    S, other = (x @ y.T).requires_grad_(), ~torch.eye(8, dtype=torch.bool)
    pushed = {}
    for hardest in (True, False):
        value = hinge.hinge(S, torch.eye(8).double(), margin=3.0, hardest=hardest)  # no cost is 0
        G = torch.autograd.grad(value, S)[0]
        pushed[hardest] = int(G[other].sum())
        assert G.sum() == 0
    assert pushed == {True: 8 + 8, False: 2 * 8 * 7}


def test_another_picture_of_the_same_thing_costs_the_whole_margin():
    x = torch.eye(4).double()
    twins = torch.tensor([0, 1, 2, 2])  # images and texts 2 and 3 are the same
    value = hinge.hinge(x[twins], x[twins], margin=0.2)
    assert abs(float(value) - 4 * 0.2) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hardest", [True, False])
def test_low_precision(dtype, hardest):
    args = [t.requires_grad_() for t in unit_rows(6, 8, dtype)]
    loss = hinge.hinge(*args, hardest=hardest)
    assert loss.dtype == dtype
    exact, _ = hinge.hinge_np(*(t.detach().double().numpy() for t in args), hardest=hardest)
    # Each of at most 60 costs is a difference of scores below 1, rounded about three times.
    close(loss.detach().double(), exact, rtol=0, atol=60 * 3 * torch.finfo(dtype).eps)
    assert all(g.dtype == dtype for g in torch.autograd.grad(loss, args))


def test_backward_twice_and_one_side_frozen():
    x, y = unit_rows(5, 3)
    loss = hinge.hinge(x.requires_grad_(), y)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in "ab")
    close(second, first)
    close(first, hinge.hinge_np(x.detach().numpy(), y.numpy())[1][0])
