"""Laws of attention."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import attention
from tests.held import enough, holds_tiles_only, same_in_float32, tiles
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes


@st.composite
def cases(draw, scale=1.0):
    """(q, k, v), settings: Lq and Lk apart, masks of every broadcast shape, no query without a key."""
    B, H, Lq, Lk, d = (draw(sizes(n)) for n in (2, 2, 4, 5, 3))
    arguments = (
        draw(arrays(B, H, Lq, d, scale=scale)),
        draw(arrays(B, H, Lk, d, scale=scale)),
        draw(arrays(B, H, Lk, d)),
    )
    settings = {"causal": draw(st.booleans())}
    shape = draw(st.sampled_from([None, (B, 1, 1, Lk), (Lq, Lk), (B, H, Lq, Lk)]))
    if shape:
        mask = np.random.default_rng(draw(st.integers(0, 99))).random(shape) < 0.6
        if settings["causal"]:
            mask[..., 0] = True
        else:  # a walk over tiles may meet one without a key first
            mask[..., : draw(st.integers(0, Lk - 1))] = False
            mask[..., -1] |= ~mask.any(-1)
        settings["mask"] = mask
    return arguments, settings


def slow(q, k, v, mask=None, causal=False):
    """Attention one query at a time, the softmax by logarithms."""
    B, H, Lq, d = q.shape
    allowed = np.broadcast_to(True if mask is None else mask, (B, H, Lq, k.shape[2]))
    out = np.zeros((B, H, Lq, d))
    for b, h, i in np.ndindex(B, H, Lq):
        keys = [j for j in range(k.shape[2]) if allowed[b, h, i, j] and not (causal and j > i)]
        scores = np.array([q[b, h, i] @ k[b, h, j] / d**0.5 for j in keys])
        weights = np.exp(scores - np.logaddexp.reduce(scores))
        out[b, h, i] = sum(weight * v[b, h, j] for weight, j in zip(weights, keys, strict=True))
    return out


@law("attention", hint="Softmax over the keys that the mask (True = may look) and j ≤ i allow, of q·k / √d.")
@given(case=cases())
def equals_the_slow_loop(f, case):
    arguments, settings = case
    close(f(*arguments, **settings), slow(*arguments, **settings))


@law("attention", hint="Subtract each row's largest score before exp; a forbidden key gets exactly weight 0.")
@given(case=cases(scale=100.0))
def stays_exact_at_huge_scores(f, case):
    (q, k, v), settings = case
    close(f(q, k, v, **settings), slow(q, k, v, **settings))
    assert all(np.isfinite(gradient).all() for gradient in f.grads(q, k, v, **settings))


@law(
    "attention",
    hint="Walk back through product, softmax, product; do not forget √d, nor the upstream.",
)
@given(case=cases(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    arguments, settings = case
    upstream = np.random.default_rng(seed).standard_normal(arguments[0].shape)
    for which, gradient in enumerate(f.grads(*arguments, grad=upstream, **settings)):
        slope = central_differences(lambda *a: f(*a, **settings), arguments, which, grad=upstream)
        close(gradient, slope, rtol=1e-6, atol=1e-7)


def slow_gradients(q, k, v, G, mask=None, causal=False):
    """One query at a time; a weight's slope is P (dP − Σ P dP), written as Σ P_j P_l (dP_j − dP_l)."""
    B, H, Lq, d = q.shape
    allowed = np.broadcast_to(True if mask is None else mask, (B, H, Lq, k.shape[2]))
    dq, dk, dv = (np.zeros_like(z) for z in (q, k, v))
    for b, h, i in np.ndindex(B, H, Lq):
        keys = np.array([j for j in range(k.shape[2]) if allowed[b, h, i, j] and not (causal and j > i)])
        scores = k[b, h, keys] @ q[b, h, i] / d**0.5
        P = np.exp(scores - np.logaddexp.reduce(scores))
        dP = v[b, h, keys] @ G[b, h, i]
        dS = (P[:, None] * P * (dP[:, None] - dP)).sum(1) / d**0.5
        dq[b, h, i] += dS @ k[b, h, keys]
        dk[b, h, keys] += dS[:, None] * q[b, h, i]
        dv[b, h, keys] += P[:, None] * G[b, h, i]
    return dq, dk, dv


@law("attention", hint="P is a softmax however large the scores are: clip nothing, not in the backward pass.")
@given(case=cases(scale=30.0), seed=st.integers(0, 99), alike=st.booleans())
def gradients_hold_at_every_score(f, case, seed, alike):
    (q, k, v), settings = case
    k = np.broadcast_to(k[:, :, :1], k.shape).copy() if alike else k  # equal keys share equally
    upstream = np.random.default_rng(seed).standard_normal(q.shape)
    wanted = slow_gradients(q, k, v, upstream, **settings)
    near = 1e-11 * (1 + np.abs(q).max()) * (1 + np.abs(k).max()) * (1 + np.abs(q).max() + np.abs(k).max())
    for gradient, slopes in zip(f.grads(q, k, v, grad=upstream, **settings), wanted, strict=True):
        close(gradient, slopes, rtol=1e-7, atol=near)


@law("attention", hint="float32 comes in, float32 goes out; −∞ is in every dtype, −1e300 is not.")
@given(case=cases())
def float32_is_enough(f, case):
    same_in_float32(f, *case, near=1e-5)


def long_sequence(L=800, d=4):
    """One head over several tiles each way, the last ones not full."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((1, 1, L, d)) for _ in "qkv")


@law(
    "attention", hint="Walk to the end: the last tile of queries and of keys may be smaller than the others."
)
def many_tiles_give_one_answer(f):
    q, k, v = case = long_sequence()
    S = q[0, 0] @ k[0, 0].T / 2
    S[~np.tri(len(S), dtype=bool)] = -np.inf
    P = np.exp(S - np.logaddexp.reduce(S, 1, keepdims=True))
    with tiles():
        out, (_, _, dv) = f(*case, causal=True), f.grads(*case, causal=True)
    close(out[0, 0], P @ v[0, 0], rtol=1e-8, atol=1e-10)
    close(dv[0, 0], np.repeat(P.sum(0)[:, None], v.shape[-1], 1), rtol=1e-8, atol=1e-10)


@law("attention", hint="Keep the output and one logsumexp a query; make S tile by tile, in backward anew.")
def no_more_than_tiles_is_held(f):
    q, *_ = case = long_sequence()
    for causal in (False, True):
        holds_tiles_only(f, case, {"causal": causal}, q.shape[2] ** 2, "S", enough(*case, tokens=q.shape[2]))


test_laws = obeys(attention)

q, k, v = np.ones((2, 1, 3, 4)), np.ones((2, 1, 5, 4)), np.ones((2, 1, 5, 4))
no_key = np.ones((2, 1, 3, 5), dtype=bool)
no_key[1, 0, 2] = False
late = np.ones((2, 1, 1, 5), dtype=bool)
late[:, :, :, 0] = False  # causal leaves query 0 the key 0 alone, and this mask takes it
test_refusals = refuses(
    attention,
    [
        ("attention", "widths differ", (q, np.ones((2, 1, 5, 3)), v), {}, "k must have shape"),
        ("attention", "values too short", (q, k, v[:, :, :4]), {}, "v must have shape"),
        ("attention", "no keys", (q, k[:, :, :0], v[:, :, :0]), {}, "k must hold at least one key"),
        ("attention", "integers", (q.astype(int), k, v), {}, "q must have a floating dtype"),
        ("attention", "NaN", (q, k, v * np.nan), {}, "v must not contain NaN"),
        ("attention", "float mask", (q, k, v), {"mask": no_key * 1.0}, "mask must be bool"),
        ("attention", "mask shape", (q, k, v), {"mask": no_key[..., :4]}, "mask must broadcast"),
        ("attention", "mask axes", (q, k, v), {"mask": no_key[None]}, "mask must broadcast"),
        ("attention", "no key", (q, k, v), {"mask": no_key}, "mask must have a True in every row"),
        ("attention", "no past", (q, k, v), {"mask": late, "causal": True}, "mask must have a True"),
    ],
)


@pytest.mark.parametrize("lengths", [(5, 5), (3, 5), (5, 3)])
@pytest.mark.parametrize("how", ["plain", "mask", "causal"])
@pytest.mark.parametrize("f", [attention.attention, attention.attention_fused])
def test_equals_torch(f, lengths, how):
    """Outside truth: torch's own, whose is_causal also counts from the first key when Lq ≠ Lk."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator) for n in (lengths[0], lengths[1], lengths[1]))
    mask = torch.rand(2, 1, 1, lengths[1], generator=generator) < 0.5
    mask[..., 0] = True
    ours = {"plain": {}, "mask": {"mask": mask}, "causal": {"causal": True}}[how]
    theirs = {"plain": {}, "mask": {"attn_mask": mask}, "causal": {"is_causal": True}}[how]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **theirs)
    assert torch.allclose(f(q, k, v, **ours), expected, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rung", [r for r in attention.RUNGS["attention"] if r != "np"])
def test_low_precision_views_and_frozen_sides(rung, dtype, tolerance):
    """Views with permuted strides, no gradient for a frozen side, a second backward, and the dtype kept."""
    f = attention.RUNGS["attention"][rung]
    q, k, v = (torch.randn(2, n, 3, 4, dtype=torch.float64).transpose(1, 2) for n in (6, 5, 5))
    low = [x.to(dtype).requires_grad_(i != 1) for i, x in enumerate((q, k, v))]
    out = f(*low, causal=True)
    assert out.dtype == dtype
    expected, gradients = attention.attention_np(q.numpy(), k.numpy(), v.numpy(), causal=True)
    assert np.allclose(out.detach().double().numpy(), expected, atol=tolerance)
    first = torch.autograd.grad(out.sum(), (low[0], low[2]), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (low[0], low[2]))
    for one, two, reference in zip(first, second, (gradients[0], gradients[2]), strict=True):
        assert torch.equal(one, two)
        assert np.allclose(one.double().numpy(), reference, atol=10 * tolerance)
    assert low[1].grad is None


@pytest.mark.parametrize("f", [attention.attention, attention.attention_fused])
def test_scores_of_ten_thousand_in_single_precision(f):
    """Logits of ±1e4 pick one key and stay finite, forward and backward."""
    q = torch.full((1, 1, 2, 4), 100.0, requires_grad=True)
    k = torch.stack([torch.full((4,), 200.0), torch.full((4,), -200.0)])[None, None]
    v = torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8]]]])
    out = f(q, k, v)
    assert torch.equal(out[0, 0, 0], v[0, 0, 0])
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("lengths", [(5, 5), (3, 5), (5, 3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [None, (2, 1, 1), (2, 3, 1), (2, 3, 5)])
def test_the_core_of_the_models(lengths, causal, shape):
    """`attend` is `attention` without a look at its arguments, and equals torch's own under both masks."""
    generator, (Lq, Lk) = torch.Generator().manual_seed(0), lengths
    inputs = [torch.randn(2, 3, n, 4, generator=generator, requires_grad=True) for n in (Lq, Lk, Lk)]
    mask = torch.ones(1, Lk, dtype=torch.bool)
    if shape:
        mask = torch.rand(*shape[:2], min(shape[2], Lq), Lk, generator=generator) < 0.5
        mask[..., 0] = True
    before, past = mask.clone(), torch.ones(Lq, Lk, dtype=torch.bool).tril()
    theirs = {"attn_mask": (mask & past if causal else mask).expand(2, 3, Lq, Lk)}
    upstream, found = torch.randn(2, 3, Lq, 4, generator=generator), []
    for out in (
        torch.nn.functional.scaled_dot_product_attention(*inputs, **theirs),
        attention.attend(*inputs, mask if shape else None, causal),
    ):
        found.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mask, before)
    assert torch.equal(attention.attention(*inputs, mask, causal), found[1][0])
    assert attention.attend(inputs[0] * torch.nan, *inputs[1:]).isnan().all()  # nobody looked
