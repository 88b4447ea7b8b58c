"""Laws of attention pooling, and of the resampler."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import pooling
from minivlp.models.parts import MapPool
from minivlp.pooling import Resampler, attention_pool, attention_pool_np, grid_positions
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes


@st.composite
def cases(draw, scale=1.0):
    """(queries, x), settings: masks for each picture, for all, or none."""
    Q, B, N, D = draw(sizes(3)), draw(sizes(3)), draw(sizes(5)), draw(sizes(3))
    arguments = draw(arrays(Q, D, scale=scale)), draw(arrays(B, N, D, scale=scale))
    shape = draw(st.sampled_from([None, (N,), (B, N)]))
    if shape is None:
        return arguments, {}
    mask = np.random.default_rng(draw(st.integers(0, 99))).random(shape) < 0.6
    mask[..., draw(st.integers(0, N - 1))] = True
    return arguments, {"mask": mask}


def slow(queries, x, mask=None):
    """One query and picture at a time, the softmax by logarithms."""
    (Q, D), (B, N, _) = queries.shape, x.shape
    real = np.broadcast_to(True if mask is None else mask, (B, N))
    out = np.zeros((B, Q, D))
    for b, i in np.ndindex(B, Q):
        tokens = x[b, real[b]]
        scores = tokens @ queries[i] / D**0.5
        out[b, i] = np.exp(scores - np.logaddexp.reduce(scores)) @ tokens
    return out


@law("attention_pool", hint="Patches without positions are a set: shuffled, they give the same vectors.")
@given(case=cases(), seed=st.integers(0, 99))
def the_order_of_tokens_means_nothing(f, case, seed):
    (queries, x), settings = case
    order = np.random.default_rng(seed).permutation(x.shape[1])
    shuffled = {name: mask[..., order] for name, mask in settings.items()}
    close(f(queries, x[:, order], **shuffled), f(queries, x, **settings))


@law(
    "attention_pool", hint="Softmax over a picture's real tokens of q·x / √D; the mean so weighted of tokens."
)
@given(case=cases())
def equals_the_slow_loop(f, case):
    arguments, settings = case
    close(f(*arguments, **settings), slow(*arguments, **settings))


@law("attention_pool", hint="Subtract each row's largest score before exp.")
@given(case=cases(scale=40.0))
def stays_exact_at_huge_scores(f, case):
    arguments, settings = case
    close(f(*arguments, **settings), slow(*arguments, **settings))
    assert all(np.isfinite(gradient).all() for gradient in f.grads(*arguments, **settings))


@law("attention_pool", hint="A token is felt twice, as a value and as a key; a query by all pictures.")
@given(case=cases(), seed=st.integers(0, 99), still=st.booleans())
def gradients_are_the_slopes(f, case, seed, still):
    (queries, x), settings = case
    x[:, 0] *= not still  # a token of zeros is felt as a value and as a key all the same
    upstream = np.random.default_rng(seed).standard_normal((len(x), *queries.shape))
    for which, gradient in enumerate(f.grads(queries, x, grad=upstream, **settings)):
        slope = central_differences(lambda *a: f(*a, **settings), (queries, x), which, grad=upstream)
        close(gradient, slope, rtol=1e-6, atol=1e-7)


@law("attention_pool", hint="float32 comes in, float32 goes out; −∞ is in every dtype, −1e300 is not.")
@given(case=cases())
def float32_is_enough(f, case):
    same_in_float32(f, *case, near=1e-5)


def made(f, side=2, width=5, dim=8, heads=2):
    """A resampler whose every part matters: float64, wide weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = f(width, dim, heads, side).double()
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(std=0.6)
    return module


def picture(B, rows, columns, width=5, dim=8, side=2):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((B, rows * columns, width)))
    return x, grid_positions(rows, columns, dim, side).double()


@law("resampler", hint="As many vectors as there are queries, side · side, whatever the picture's grid.")
def the_number_of_outputs_is_that_of_the_queries(f):
    for side, rows, columns in ((2, 3, 4), (2, 6, 2), (1, 1, 1), (3, 2, 2)):
        found = made(f, side)(*picture(2, rows, columns, side=side))
        assert found.shape == (2, side * side, 8), f"{tuple(found.shape)} of {side} · {side} queries"


@law("resampler", hint="A patch is known by its position, not by its place in the sequence.")
def patches_move_with_their_positions(f):
    module, (x, positions) = made(f), picture(2, 3, 2)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    before = module(x, positions)
    close(module(x[:, order], positions[order]).detach(), before.detach())
    alone = (module(x[:, order], positions) - before).abs().amax((0, 2))
    assert (alone > 1e-3).all(), "patches alone moved, and a query has not noticed"


@law(
    "resampler",
    hint="Positions belong to queries and keys: of equal patches the mean is that patch, anywhere.",
)
def values_have_no_position(f):
    module, (x, positions) = made(f), picture(2, 3, 2)
    alike = x[:, :1].expand(-1, 6, -1)
    close(module(alike, positions).detach(), module(alike, 3 * positions.flip(0)).detach())


def written_out(m, x, positions, mask=None):
    """One query, head and picture at a time; the norms and maps are the module's own."""
    tokens, out = m.norm_read(m.read(x)), []
    q, k, v = m.q(m.norm_query(m.queries) + m.places), m.k(tokens + positions), m.v(tokens)
    d = q.shape[-1] // m.heads
    for b in range(len(x)):
        real = torch.ones(x.shape[1], dtype=torch.bool) if mask is None else mask[b]
        heads = [slice(h * d, h * d + d) for h in range(m.heads)]
        parts = [(k[b, real][:, h] @ q[:, h].mT / d**0.5).softmax(0).mT @ v[b, real][:, h] for h in heads]
        out.append(m.out(m.norm(m.proj(torch.cat(parts, -1)))))
    return torch.stack(out)


@law(
    "resampler",
    hint="q = LN(query) + position, k = LN(W x) + position, v = LN(W x); then LN and a linear map.",
)
def equals_the_formula(f):
    module, (x, positions) = made(f), picture(2, 3, 2)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False]])
    for settings in ({}, {"mask": mask}):
        expected = written_out(made(Resampler), x, positions, **settings)
        close(module(x, positions, **settings).detach(), expected.detach())


@law("resampler", hint="Queries are learned, positions are fixed.")
def queries_learn_and_places_do_not(f):
    module, (x, positions) = made(f), picture(2, 3, 2)
    module(x, positions).square().sum().backward()
    learns = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert "queries" in learns and "places" not in learns, f"what learns is {sorted(learns)}"
    assert "places" not in module.state_dict(), "positions are made anew, not stored"


test_laws = obeys(pooling)

queries, x, real = np.ones((2, 4)), np.ones((3, 5, 4)), np.ones((3, 5), dtype=bool)
test_refusals = refuses(
    pooling,
    [
        ("attention_pool", "widths differ", (queries[:, :3], x), {}, "x must have shape"),
        ("attention_pool", "one picture", (queries, x[0]), {}, "x must have shape"),
        ("attention_pool", "no tokens", (queries, x[:, :0]), {}, "x must hold at least one token"),
        ("attention_pool", "integers", (queries.astype(int), x), {}, "queries must have a floating dtype"),
        ("attention_pool", "NaN", (queries, x * np.nan), {}, "x must not contain NaN"),
        ("attention_pool", "mask shape", (queries, x), {"mask": real[:, :4]}, "mask must have shape"),
        ("attention_pool", "float mask", (queries, x), {"mask": real * 1.0}, "mask must be bool"),
        (
            "attention_pool",
            "nothing real",
            (queries, x),
            {"mask": ~real},
            "mask must have a True in every row",
        ),
        ("resampler", "heads", (5, 8, 3, 2), {}, "heads must divide dim=8, got 3"),
        ("resampler", "no head", (5, 8, 0, 2), {}, "heads must divide dim=8, got 0"),
        ("resampler", "width", (5, 6, 3, 2), {}, "dim must be divisible by 4, got 6"),
    ],
)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch(masked):
    """Outside truth: torch's MultiheadAttention of one head whose maps are the identity."""
    queries, x = torch.randn(3, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool() if masked else None
    theirs = torch.nn.MultiheadAttention(4, 1, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(4).repeat(3, 1))
        theirs.out_proj.weight.copy_(torch.eye(4))
    expected, _ = theirs(queries.expand(2, 3, 4), x, x, key_padding_mask=None if mask is None else ~mask)
    assert torch.allclose(attention_pool(queries, x, mask), expected, atol=1e-6)


def test_one_query_is_the_pool_of_siglip():
    """MapPool with maps that are the identity, its MLP silent, is attention_pool of its probe."""
    pool = MapPool(4, 1, 8, 1e-6, torch.nn.functional.gelu)
    with torch.no_grad():
        pool.qkv.weight.copy_(torch.eye(4).repeat(3, 1))
        pool.proj.weight.copy_(torch.eye(4))
        for p in (pool.qkv.bias, pool.proj.bias, pool.fc2.weight, pool.fc2.bias):
            p.zero_()
    x = torch.randn(2, 5, 4)
    assert torch.allclose(pool(x), attention_pool(pool.probe[None], x)[:, 0], atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_low_precision_views_and_frozen_sides(dtype, tolerance):
    queries, x = torch.randn(4, 3, dtype=torch.float64).T, torch.randn(5, 2, 4, dtype=torch.float64)
    x = x.transpose(0, 1)
    low = [queries.to(dtype), x.to(dtype).requires_grad_()]
    out = attention_pool(*low)
    expected, (_, dx) = attention_pool_np(queries.numpy(), x.numpy())
    assert out.dtype == dtype and np.allclose(out.detach().double().numpy(), expected, atol=tolerance)
    (found,) = torch.autograd.grad(out.sum(), low[1])
    assert np.allclose(found.double().numpy(), dx, atol=10 * tolerance)


def test_positions_of_two_grids_of_one_picture_match():
    """A patch of the coarse grid lies where the mean of its four finer patches lies, and no two are alike."""
    coarse, fine = grid_positions(3, 4, 8, 5), grid_positions(9, 12, 8, 5)
    middle = fine.unflatten(0, (9, 12))[1::3, 1::3].flatten(0, 1)
    assert torch.allclose(coarse, middle, atol=1e-6)
    assert all((coarse[i] - coarse[j]).abs().max() > 0.1 for i, j in permutations(range(12), 2))
    assert coarse.abs().max() <= 1


def test_positions_are_row_major_with_the_row_first():
    positions = grid_positions(2, 3, 8, 6).unflatten(0, (2, 3))
    assert torch.equal(positions[0, :, :4], positions[0, :1, :4].expand(3, 4))
    assert torch.equal(positions[:, 1, 4:], positions[:1, 1, 4:].expand(2, 4))
    angle = torch.tensor([1.5, 4.5])  # a row is 3 high, its centre half of that below its top
    assert torch.allclose(positions[:, 0, 0], angle.sin()) and torch.allclose(positions[:, 0, 2], angle.cos())
    assert torch.allclose(positions[:, 0, 1], (angle / 100).sin())
