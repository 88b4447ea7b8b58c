"""Laws of InfoNCE."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minivlp import infonce
from tests import ranks
from tests.held import enough, holds_tiles_only, right_pairs, same_in_float32, tiles
from tests.laws import central_differences, close, law, obeys, refuses
from tests.peers import open_clip_loss, unit_rows
from tests.strategies import arrays, pairs, sizes


@st.composite
def cases(draw, scales=(0.3, 1.0, 14.3, 100.0), lengths=(1.0, 10.0)):
    """x (B, D), y (B, D), scale."""
    return *draw(pairs(*lengths)), draw(st.sampled_from(scales))


def slow_slopes(S):
    """G = dL/dS (B, B), each softmax by logarithms, 1 − P of a right pair as the sum of the others."""
    B = len(S)
    rows, columns = (np.logaddexp.reduce(S, axis, keepdims=True) for axis in (1, 0))
    G = np.exp(S - rows) + np.exp(S - columns)
    np.fill_diagonal(G, 0)
    P_row, P_column = (np.where(np.eye(B), 0, np.exp(S - z)) for z in (rows, columns))
    return (G - np.diag(P_row.sum(1) + P_column.sum(0))) / (2 * B)


@law(
    "infonce",
    hint="The diagonal of S crosses a tile at the offset row start − column start, if it meets it at all.",
)
def right_pairs_lie_on_the_diagonal_of_the_whole(f):
    if f.rung == "fused":
        right_pairs(f, (2.0,), lambda x: slow_slopes(2 * x))


@law("infonce", hint="Equal scores leave a choice of one in B: half of log B for each of the two directions.")
@given(case=cases(), same=st.booleans())
def equal_scores_cost_log_B(f, case, same):
    x, y, scale = case
    x, y = (x * 0 + x[0], y * 0 + y[0]) if same else (x * 0, y)
    close(f(x, y, scale), math.log(len(x)), atol=1e-8)


@law(
    "infonce",
    hint="Shuffling the pairs together must not matter: is the right answer always on the diagonal?",
)
@given(case=cases(), seed=st.integers(0, 99))
def pairs_come_in_any_order(f, case, seed):
    x, y, scale = case
    order = np.random.default_rng(seed).permutation(len(x))
    close(f(x[order], y[order], scale), f(x, y, scale), atol=1e-8)


@law("infonce", hint="Images choose texts and texts choose images: exchanging the two must not matter.")
@given(case=cases())
def images_and_texts_exchange(f, case):
    x, y, scale = case
    close(f(y, x, scale), f(x, y, scale), atol=1e-8)


@st.composite
def worlds(draw):
    """A joint table p(X, Y), a critic's table of scores for (X, Y), a batch size B ≤ 3 and a scale."""
    m, n, B = draw(st.sampled_from([(2, 2, 2), (2, 2, 3), (3, 3, 2), (2, 3, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    p = rng.dirichlet(np.full(m * n, draw(st.sampled_from([0.1, 1.0])))).reshape(m, n) + 1e-6
    p = p / p.sum()
    best = np.log(p / p.sum(1, keepdims=True) / p.sum(0))  # the critic that makes the bound tightest
    critic = best + draw(st.sampled_from([0.0, 1.0])) * rng.standard_normal((m, n))
    return p, critic, B, draw(st.sampled_from([0.5, 1.0, 3.0]))


@law(
    "infonce",
    hint="log B − E[L] may exceed neither the mutual information nor log B: is the positive counted too?",
)
@given(world=worlds())
def bounds_mutual_information(f, world):
    p, critic, B, scale = world
    information = (p * np.log(p / p.sum(1, keepdims=True) / p.sum(0))).sum()
    images, texts = (
        np.eye(len(p)),
        critic.T,
    )  # one-hot rows against columns of the table: x · y = critic[X, Y]
    expected = 0.0
    for batch in itertools.product(np.ndindex(p.shape), repeat=B):  # every batch there is
        X, Y = np.array(batch).T
        expected += p[X, Y].prod() * f(images[X], texts[Y], scale)
    most = min(information, math.log(B))
    assert math.log(B) - expected <= most + 1e-9, (
        f"log B − E[L] = {math.log(B) - expected:.6g} is more than {most:.6g}"
    )


def slow_loop(x, y, scale):
    """The formula, one score at a time."""
    B, total = len(x), 0.0
    for i in range(B):
        row = [scale * float(x[i] @ y[j]) for j in range(B)]
        column = [scale * float(x[j] @ y[i]) for j in range(B)]
        for scores in (row, column):
            total += max(scores) + math.log(sum(math.exp(s - max(scores)) for s in scores)) - scores[i]
    return total / (2 * B)


@law(
    "infonce",
    hint="Write it with two loops first: S_ij = scale · x_i · y_j, and subtract the largest before exp.",
)
@given(case=cases())
def equals_the_slow_loop(f, case):
    close(f(*case), slow_loop(*case), atol=1e-8)


@law(
    "infonce",
    hint="S is scale times x yᵀ, so scale · dL/dscale = ⟨x, dL/dx⟩: does the scale have its gradient?",
)
@given(case=cases())
def scale_and_images_share_one_slope(f, case):
    x, _, scale = case
    dx, _, dscale = f.grads(*case)
    close(scale * dscale, (x * dx).sum(), atol=1e-8)


@law(
    "infonce",
    hint="What do two softmaxes give a score, and what does the diagonal take? Then product and scale.",
)
@given(case=cases(scales=(0.3, 1.0, 3.0), lengths=(1.0,)))
def gradients_are_the_slopes(f, case):
    for which, gradient in enumerate(f.grads(*case)):
        close(gradient, central_differences(f, case, which), rtol=1e-6, atol=1e-7)


@st.composite
def hard_cases(draw):
    """Scores up to ± 10,000: unit or long rows, the right text far ahead, far behind, or neither; zeros."""
    B, D, length = draw(sizes(5, 2)), draw(sizes(5, 2)), draw(st.sampled_from([1.0, 10.0]))
    x = draw(arrays(B, D))
    x = length * x / np.linalg.norm(x, axis=1, keepdims=True)
    others = draw(arrays(B, D, scale=length))
    y = draw(st.sampled_from([x, -x, np.roll(x, 1, 0), others, x * 0])).copy()
    return x, y, draw(st.sampled_from([1.0, 14.3, 100.0]))


@law("infonce", hint="P is a softmax however large the scores are: shift, but clip nothing and add nothing.")
@given(case=hard_cases())
def gradients_hold_at_every_score(f, case):
    x, y, scale = case
    G = slow_slopes(scale * x @ y.T)
    wanted = scale * G @ y, scale * G.T @ x, (G * (x @ y.T)).sum()
    near = 1e-11 * scale * np.abs(x).max() * (1 + np.abs(x).max() ** 2)  # rounding of the scores
    for gradient, slopes in zip(f.grads(*case), wanted, strict=True):
        close(gradient, slopes, rtol=1e-6, atol=near)


@law("infonce", hint="float32 comes in, float32 goes out: make what you add in the dtype of the images.")
@given(case=hard_cases())
def float32_is_enough(f, case):
    same_in_float32(f, case, near=1e-4 * case[2] * np.abs(case[0]).max() ** 2)


def large_batch(B=800, D=4):
    """Several tiles each way, the last ones not full."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((B, D)), rng.standard_normal((B, D)), 2.0


@law("infonce", hint="Walk to the end: the last row of tiles and the last column of tiles may be smaller.")
def many_tiles_give_one_answer(f):
    x, y, scale = case = large_batch()
    S = scale * x @ y.T
    with tiles():
        value, grads = f(*case), f.grads(*case)
    total = np.logaddexp.reduce(S, 1) + np.logaddexp.reduce(S, 0) - 2 * S.diagonal()
    close(value, total.mean() / 2)
    close(grads[0], scale * slow_slopes(S) @ y, rtol=1e-6, atol=1e-9)


@law("infonce", hint="Make S tile by tile, each over the one before, and the gradients beside the loss.")
def no_more_than_tiles_is_held(f):
    x, y, scale = large_batch()
    holds_tiles_only(f, (x, y, scale), {}, len(x) ** 2, "S", enough(x, y))


test_laws = obeys(infonce)

x, y = np.ones((3, 2)), np.ones((3, 2))
test_refusals = refuses(
    infonce,
    [
        ("infonce", "one text too many", (x, np.ones((4, 2)), 1.0), {}, "texts must have shape"),
        ("infonce", "widths differ", (x, np.ones((3, 1)), 1.0), {}, "texts must have shape"),
        ("infonce", "no pair", (x[:0], y[:0], 1.0), {}, "images must hold at least one pair"),
        ("infonce", "integer texts", (x, y.astype(int), 1.0), {}, "texts must have a floating dtype"),
        ("infonce", "NaN", (x * np.nan, y, 1.0), {}, "images must not contain NaN"),
        ("infonce", "scale zero", (x, y, 0.0), {}, "scale must be a finite number > 0"),
        ("infonce", "scale negative", (x, y, -1.0), {}, "scale must be a finite number > 0"),
        ("infonce", "scale NaN", (x, y, math.nan), {}, "scale must be a finite number > 0"),
        ("infonce", "a scale for each pair", (x, y, np.ones(3)), {}, "scale must be a scalar"),
    ],
)


def test_one_pair_costs_nothing():
    assert infonce.infonce(*unit_rows(1, 4), 100.0) == 0


def test_orthonormal_pairs_have_a_closed_form():
    for scale in (1.0, 14.3, 100.0):
        expected = math.log1p(4 * math.exp(-scale))
        close(infonce.infonce_np(np.eye(5), np.eye(5), scale)[0], expected, atol=1e-14)


def test_equals_cross_entropy_twice():
    """Outside truth: torch's cross-entropy with the diagonal as target, along rows and along columns."""
    x, y = unit_rows(7, 5)
    S, target = 100 * x @ y.T, torch.arange(7)
    expected = (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2
    close(infonce.infonce(x, y, 100.0), expected)


def test_equals_open_clip():
    """Outside truth: open_clip's ClipLoss, value and gradients."""
    loss = open_clip_loss().ClipLoss()
    ours, theirs = [
        [t.requires_grad_() for t in (*unit_rows(6, 8), torch.tensor(14.3, dtype=torch.float64))]
        for _ in "ab"
    ]
    value, expected = infonce.infonce(*ours), loss(*theirs)
    close(value.detach(), expected.detach())
    for a, b in zip(torch.autograd.grad(value, ours), torch.autograd.grad(expected, theirs), strict=True):
        close(a, b)


def test_equals_hugging_face_clip():
    """Outside truth: the loss that a tiny CLIPModel with random weights returns."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 19},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    out = model(torch.randint(0, 20, (5, 6)), torch.randn(5, 3, 8, 8), return_loss=True)
    ours = infonce.infonce(out.image_embeds, out.text_embeds, model.logit_scale.exp())
    close(ours.detach(), out.loss.detach(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    args = [t.requires_grad_() for t in (*unit_rows(6, 8, dtype), torch.tensor(2.0))]
    loss = infonce.infonce(*args)
    assert loss.dtype == dtype
    exact, slopes = infonce.infonce_np(*(t.detach().double().numpy() for t in args[:2]), 2.0)
    # |S| ≤ 2 is rounded twice, P = exp(S − logsumexp) three times, and the products once more: about 16 eps.
    eps = torch.finfo(dtype).eps
    close(loss.detach().double(), exact, rtol=16 * eps)
    for got, wanted in zip(torch.autograd.grad(loss, args), slopes, strict=True):
        close(got.double(), wanted, rtol=0, atol=16 * eps * np.abs(wanted).max())


def test_backward_twice_and_one_side_frozen():
    x, y = unit_rows(4, 3)
    scale = torch.tensor(2.0, dtype=torch.float64)
    loss = infonce.infonce(x.requires_grad_(), y, scale)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in "ab")
    close(second, first)
    close(first, infonce.infonce_np(x.detach().numpy(), y.numpy(), 2.0)[1][0])


def test_keeps_one_array_of_scores():
    """The backward pass needs S once: with B ≫ D hardly more than B² numbers are kept."""
    x, y = (t.requires_grad_() for t in unit_rows(100, 2))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        infonce.infonce(x, y, 10.0)
    assert 100**2 <= sum(kept.values()) < 1.2 * 100**2


def test_module_starts_as_clip_and_returns_from_its_limit():
    module = infonce.InfoNCE().double()
    x, y = unit_rows(4, 3)
    close(module.scale.detach(), 1 / 0.07, rtol=1e-6)
    close(module(x, y).detach(), infonce.infonce(x, y, 1 / 0.07), rtol=1e-6)
    # One step too far is pulled back to 100, where the gradient lives: mismatched pairs want it smaller.
    module.log_scale.data.fill_(7.0)
    module(torch.eye(3).double(), torch.eye(3).double().roll(1, 0)).backward()
    close(module.scale.detach(), 100.0, rtol=1e-6)
    assert module.log_scale.grad > 1


@pytest.fixture(scope="module", params=ranks.COUNTS)
def results(request, tmp_path_factory):
    """The results of 1, 2, 3 and 4 ranks, each in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.in_ranks(infonce.infonce_gathered, (14.3,), request.param, folder)


def test_ranks_equal_one_process(results):
    ranks.equal_one_process(results, infonce.infonce, (14.3,))


def test_a_bad_shard_is_refused_on_every_rank(results):
    ranks.refuse_together(results)


def test_a_rank_holds_one_strip_and_keeps_its_gradients_only(results):
    for result in results:
        assert result["largest"] == ranks.b * ranks.b * len(results)
        assert result["kept"] == 2 * ranks.b * ranks.D + 1
