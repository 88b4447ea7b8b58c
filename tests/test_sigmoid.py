"""Laws of the sigmoid loss."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minivlp import sigmoid
from tests import ranks
from tests.held import enough, holds_tiles_only, right_pairs, same_in_float32, tiles
from tests.laws import central_differences, close, law, obeys, refuses
from tests.peers import open_clip_loss, softplus, unit_rows
from tests.strategies import arrays, pairs, sizes


@st.composite
def cases(draw, scales=(0.3, 1.0, 10.0, 100.0), lengths=(1.0, 10.0)):
    """x (B, D), y (B, D), scale, bias."""
    return *draw(pairs(*lengths)), draw(st.sampled_from(scales)), draw(st.sampled_from((-10.0, -1.0, 0.5)))


def slow_slopes(S):
    """G = dL/dS (B, B) = −z σ(−z S) / B; σ(t) by logarithms, so that a small one keeps its digits."""
    z = 2 * np.eye(len(S)) - 1
    return -z * np.exp(-np.logaddexp(0, z * S)) / len(S)


@law(
    "sigmoid_loss",
    hint="The diagonal of S crosses a tile at the offset row start − column start, if it meets it at all.",
)
def right_pairs_lie_on_the_diagonal_of_the_whole(f):
    if f.rung == "fused":
        right_pairs(f, (2.0, -1.0), lambda x: slow_slopes(2 * x - 1))


@law(
    "sigmoid_loss",
    hint="With all cosines zero S is the bias: per image one softplus(−bias), B − 1 softplus(bias).",
)
@given(case=cases())
def zero_cosines_leave_the_bias(f, case):
    x, y, scale, bias = case
    close(f(x * 0, y, scale, bias), softplus(-bias) + (len(x) - 1) * softplus(bias))


@law(
    "sigmoid_loss",
    hint="Shuffling the pairs together must not matter: are the positives always on the diagonal?",
)
@given(case=cases(), seed=st.integers(0, 99))
def pairs_come_in_any_order(f, case, seed):
    x, y, scale, bias = case
    order = np.random.default_rng(seed).permutation(len(x))
    close(f(x[order], y[order], scale, bias), f(x, y, scale, bias), atol=1e-8)


@law(
    "sigmoid_loss",
    hint="Pairs do not meet: the sum over all is the sum over blocks, each counted once, over B.",
)
@given(case=cases(), seed=st.integers(0, 99))
def blocks_add_up(f, case, seed):
    x, y, scale, bias = case
    place = np.random.default_rng(seed).integers(0, 3, len(x))  # three chunks of any sizes

    def total(*chunks):
        """Σ softplus over the square of the chunks' pairs: B times the loss."""
        chosen = np.isin(place, chunks)
        return chosen.sum() * f(x[chosen], y[chosen], scale, bias) if chosen.any() else 0.0

    # The square of two chunks holds their own squares besides the two blocks where they meet.
    together = sum(total(*two) for two in itertools.combinations(range(3), 2)) - sum(map(total, range(3)))
    close(total(0, 1, 2), together, atol=1e-8)


def slow_loop(x, y, scale, bias):
    """The formula, one score at a time."""
    B, total = len(x), 0.0
    for i, j in np.ndindex(B, B):
        score = scale * float(x[i] @ y[j]) + bias
        total += softplus(-score if i == j else score)
    return total / B


@law(
    "sigmoid_loss",
    hint="Write it with two loops first: S_ij = scale · x_i · y_j + bias, and no exp of a large score.",
)
@given(case=cases())
def equals_the_slow_loop(f, case):
    close(f(*case), slow_loop(*case), atol=1e-8)


@law("sigmoid_loss", hint="S is scale times x yᵀ plus the bias, so scale · dL/dscale = ⟨x, dL/dx⟩.")
@given(case=cases())
def scale_and_images_share_one_slope(f, case):
    x, _, scale, _ = case
    dx, _, dscale, _ = f.grads(*case)
    close(scale * dscale, (x * dx).sum(), atol=1e-8)


@law(
    "sigmoid_loss",
    hint="By how much does each answer miss yes or no? Then the product, the scale and the bias.",
)
@given(case=cases(scales=(0.3, 1.0, 3.0), lengths=(1.0,)))
def gradients_are_the_slopes(f, case):
    for which, gradient in enumerate(f.grads(*case)):
        close(gradient, central_differences(f, case, which), rtol=1e-6, atol=1e-7)


@st.composite
def hard_cases(draw):
    """Scores up to ± 10,000: unit or long rows, all sure and right, sure and wrong, or neither; zeros."""
    B, D, length = draw(sizes(5)), draw(sizes(5)), draw(st.sampled_from([1.0, 10.0]))
    x = draw(arrays(B, D))
    x = length * x / np.linalg.norm(x, axis=1, keepdims=True)
    y = draw(st.sampled_from([x, -x, draw(arrays(B, D, scale=length)), x * 0])).copy()
    return x, y, draw(st.sampled_from([1.0, 10.0, 100.0])), draw(st.sampled_from([-10.0, 0.5, 100.0]))


@law(
    "sigmoid_loss",
    hint="σ(t) = exp(−softplus(−t)) keeps the digits of a small σ: clip no score and no probability.",
)
@given(case=hard_cases())
def gradients_hold_at_every_score(f, case):
    x, y, scale, bias = case
    G = slow_slopes(scale * x @ y.T + bias)
    wanted = scale * G @ y, scale * G.T @ x, (G * (x @ y.T)).sum(), G.sum()
    near = 1e-11 * scale * (1 + np.abs(x).max() ** 3)  # rounding of the scores
    for gradient, slopes in zip(f.grads(*case), wanted, strict=True):
        close(gradient, slopes, rtol=1e-6, atol=near)


@law("sigmoid_loss", hint="float32 comes in, float32 goes out: make z in the dtype of the images.")
@given(case=hard_cases())
def float32_is_enough(f, case):
    same_in_float32(f, case, near=1e-4 * case[2] * np.abs(case[0]).max() ** 2)


def large_batch(B=800, D=4):
    """Several tiles each way, the last ones not full."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((B, D)), rng.standard_normal((B, D)), 2.0, -1.0


@law("sigmoid_loss", hint="Walk to the end: the last row and the last column of tiles may be smaller.")
def many_tiles_give_one_answer(f):
    x, y, scale, bias = case = large_batch()
    S, z = scale * x @ y.T + bias, 2 * np.eye(len(x)) - 1
    with tiles():
        value, grads = f(*case), f.grads(*case)
    close(value, np.logaddexp(0, -z * S).sum() / len(x))
    close(grads[0], scale * slow_slopes(S) @ y, rtol=1e-6, atol=1e-9)


@law("sigmoid_loss", hint="Make S tile by tile, each over the one before, and the gradients beside the loss.")
def no_more_than_tiles_is_held(f):
    x, y, scale, bias = large_batch()
    holds_tiles_only(f, (x, y, scale, bias), {}, len(x) ** 2, "S", enough(x, y))


test_laws = obeys(sigmoid)

x, y = np.ones((3, 2)), np.ones((3, 2))
test_refusals = refuses(
    sigmoid,
    [
        ("sigmoid_loss", "one text too many", (x, np.ones((4, 2)), 1.0, 0.0), {}, "texts must have shape"),
        ("sigmoid_loss", "widths differ", (x, np.ones((3, 1)), 1.0, 0.0), {}, "texts must have shape"),
        ("sigmoid_loss", "no pair", (x[:0], y[:0], 1.0, 0.0), {}, "images must hold at least one pair"),
        (
            "sigmoid_loss",
            "integer texts",
            (x, y.astype(int), 1.0, 0.0),
            {},
            "texts must have a floating dtype",
        ),
        ("sigmoid_loss", "NaN", (x * np.nan, y, 1.0, 0.0), {}, "images must not contain NaN"),
        ("sigmoid_loss", "scale zero", (x, y, 0.0, 0.0), {}, "scale must be a finite number > 0"),
        ("sigmoid_loss", "scale negative", (x, y, -1.0, 0.0), {}, "scale must be a finite number > 0"),
        ("sigmoid_loss", "bias NaN", (x, y, 1.0, math.nan), {}, "bias must be finite"),
        ("sigmoid_loss", "a bias for each pair", (x, y, 1.0, np.ones(3)), {}, "bias must be a scalar"),
    ],
)


def test_starts_at_the_cost_of_the_positives():
    """Zhai et al. 2023, section 3.2: at scale 10 and bias −10 the negatives cost next to nothing."""
    zero = torch.zeros(64, 8)
    loss = sigmoid.SigmoidLoss()(zero, zero)
    assert round(loss.item(), 3) == 10.003
    # With the sign of the displayed equation, scale · x · y − bias, all 63 negatives would start at 10.
    assert sigmoid.sigmoid_loss(zero, zero, 10.0, 10.0) > 63 * 10


def test_one_pair_is_one_positive():
    x, y = unit_rows(1, 4)
    close(sigmoid.sigmoid_loss(x, y, 100.0, -10.0), softplus(10 - 100 * (x * y).sum().item()))


def test_equals_binary_cross_entropy():
    """Outside truth: torch's binary cross-entropy with the identity as labels, summed, over B."""
    x, y = unit_rows(7, 5)
    S = 100 * x @ y.T - 10
    expected = F.binary_cross_entropy_with_logits(S, torch.eye(7, dtype=S.dtype), reduction="sum") / 7
    close(sigmoid.sigmoid_loss(x, y, 100.0, -10.0), expected)


def test_equals_open_clip():
    """Outside truth: open_clip's SigLipLoss, value and gradients."""
    loss = open_clip_loss().SigLipLoss()
    scalars = [torch.tensor(s, dtype=torch.float64) for s in (10.0, -10.0)]
    ours, theirs = [[t.clone().requires_grad_() for t in (*unit_rows(6, 8), *scalars)] for _ in "ab"]
    value, expected = sigmoid.sigmoid_loss(*ours), loss(*theirs)
    close(value.detach(), expected.detach())
    for a, b in zip(torch.autograd.grad(value, ours), torch.autograd.grad(expected, theirs), strict=True):
        close(a, b)


def test_equals_hugging_face_siglip():
    """Outside truth: the loss that a tiny SiglipModel with random weights returns, its scale and bias set."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 6},
        vision_config={**small, "image_size": 8, "patch_size": 4},
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    model.logit_scale.data.fill_(math.log(10))  # both are 0 in a fresh model
    model.logit_bias.data.fill_(-10)
    out = model(torch.randint(0, 20, (5, 6)), torch.randn(5, 3, 8, 8), return_loss=True)
    ours = sigmoid.sigmoid_loss(
        out.image_embeds, out.text_embeds, model.logit_scale.exp().squeeze(), model.logit_bias.squeeze()
    )
    close(ours.detach(), out.loss.detach(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    args = [t.requires_grad_() for t in (*unit_rows(6, 8, dtype), torch.tensor(2.0), torch.tensor(-1.0))]
    loss = sigmoid.sigmoid_loss(*args)
    assert loss.dtype == dtype
    exact, slopes = sigmoid.sigmoid_loss_np(*(t.detach().double().numpy() for t in args[:2]), 2.0, -1.0)
    # |S| ≤ 3 is rounded twice, softplus and σ once, and the products once more: about 16 eps.
    eps = torch.finfo(dtype).eps
    close(loss.detach().double(), exact, rtol=16 * eps)
    for got, wanted in zip(torch.autograd.grad(loss, args), slopes, strict=True):
        close(got.double(), wanted, rtol=0, atol=16 * eps * np.abs(wanted).max())


def test_backward_twice_and_one_side_frozen():
    x, y = unit_rows(4, 3)
    loss = sigmoid.sigmoid_loss(x.requires_grad_(), y, 2.0, -1.0)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in "ab")
    close(second, first)
    close(first, sigmoid.sigmoid_loss_np(x.detach().numpy(), y.numpy(), 2.0, -1.0)[1][0])


def test_module_starts_as_siglip():
    module = sigmoid.SigmoidLoss().double()
    x, y = unit_rows(4, 3)
    close(module(x, y).detach(), sigmoid.sigmoid_loss(x, y, 10.0, -10.0), rtol=1e-6)
    module(x, y).backward()
    assert module.log_scale.grad != 0 and module.bias.grad != 0


@pytest.fixture(scope="module", params=ranks.COUNTS)
def results(request, tmp_path_factory):
    """The results of 1, 2, 3 and 4 ranks, each in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.in_ranks(sigmoid.sigmoid_loss_ring, (10.0, -10.0), request.param, folder)


def test_ranks_equal_one_process(results):
    ranks.equal_one_process(results, sigmoid.sigmoid_loss, (10.0, -10.0))


def test_a_bad_shard_is_refused_on_every_rank(results):
    ranks.refuse_together(results)


def test_a_rank_holds_one_block_and_keeps_its_gradients_only(results):
    for result in results:
        assert result["largest"] == ranks.b * ranks.b
        assert result["kept"] == 2 * ranks.b * ranks.D + 2
