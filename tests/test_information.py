"""Laws of information."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import information
from minivlp.infonce import infonce_np
from minivlp.information import entropies, infonce_bound, rate_distortion, rate_distortion_np
from tests.laws import close, law, obeys, refuses
from tests.strategies import sizes

TURNS = ("rate_distortion", "rate_distortion_np")  # all rungs, and the one that learners write


def table(seed, *shape):
    """A joint distribution with some impossible entries."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(math.prod(shape), 0.7)).reshape(shape) * (rng.random(shape) < 0.8)
    return p / p.sum() if p.any() else np.full(shape, 1 / math.prod(shape))


@law("entropies", hint="−Σ p log p in nats; an entry of 0 adds nothing; I = H(X) + H(Y) − H(X, Y).")
@given(M=sizes(5), N=sizes(4), seed=st.integers(0, 99))
def equals_the_sums(f, M, N, seed):
    p = table(seed, M, N)
    x, y = p.sum(1), p.sum(0)
    mutual = sum(p[i, j] * math.log(p[i, j] / (x[i] * y[j])) for i, j in np.ndindex(M, N) if p[i, j])
    found = f(p)
    close(found["mutual"], mutual, atol=1e-12)
    close(found["x"], -sum(v * math.log(v) for v in x if v), atol=1e-12)
    close(found["y"], -sum(v * math.log(v) for v in y if v), atol=1e-12)
    close(found["y_given_x"], found["y"] - mutual, atol=1e-12)
    close(found["x_given_y"], found["x"] - mutual, atol=1e-12)
    close(found["joint"], found["x"] + found["y_given_x"], atol=1e-12)


@law("infonce_bound", hint="log B − loss: nats, of B pairs. Bits would need a division by ln 2.")
@given(B=st.integers(1, 512), loss=st.floats(0, 9))
def is_the_logarithm_of_the_batch_less_the_loss(f, B, loss):
    close(f(loss, B), math.log(B) - loss, atol=1e-12)


def optimal_loss(p, B, draws=400, seed=0):
    """The InfoNCE loss of the best critic, log p(x, y) / p(x) p(y), over batches drawn from a table."""
    rng, total = np.random.default_rng(seed), 0.0
    critic = np.log(p / p.sum(1, keepdims=True) / p.sum(0))
    for _ in range(draws):
        x, y = np.unravel_index(rng.choice(p.size, B, p=p.ravel()), p.shape)
        S = critic[x][:, y]  # (B, B)
        total += (np.logaddexp.reduce(S, 1) - S.diagonal()).mean() / draws
    return total


@law(*TURNS, hint="W = softmax(log q − β d) along each row, then q = p W; the rate is I of p and W.")
@given(M=sizes(4), N=sizes(4), beta=st.sampled_from([0.3, 2.0, 8.0]), seed=st.integers(0, 99))
def equals_the_slow_loop(f, M, N, beta, seed):
    rng = np.random.default_rng(seed)
    d, p = rng.random((M, N)), rng.dirichlet(np.ones(M))
    q = np.full(N, 1 / N)
    for _ in range(7):
        W = np.array([[q[j] * math.exp(-beta * d[i, j]) for j in range(N)] for i in range(M)])
        W /= W.sum(1, keepdims=True)
        q = np.array([sum(p[i] * W[i, j] for i in range(M)) for j in range(N)])
    rate = sum(p[i] * W[i, j] * math.log(W[i, j] / q[j]) for i, j in np.ndindex(M, N))
    mean = sum(p[i] * W[i, j] * d[i, j] for i, j in np.ndindex(M, N))
    for found, wanted in zip(f(d, p, beta=beta, steps=7), (rate, mean, q), strict=True):
        close(found, wanted, rtol=1e-8, atol=1e-10)


@law(*TURNS, hint="In logarithms: exp(−β d) underflows at a high price, its softmax does not.")
@given(seed=st.integers(0, 99))
def a_high_price_keeps_everything(f, seed):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(4, 2.0))
    d = 2.0 + rng.random((4, 4)) + np.eye(4) * -1.9  # the nearest stand-in is one's own, never at distance 0
    rate, mean, q = f(d, p, beta=5000.0, steps=300)
    close(rate, -(p * np.log(p)).sum(), rtol=1e-6)
    close(q, p, rtol=1e-5, atol=1e-7)
    close(mean, (p * d.diagonal()).sum(), rtol=1e-6)


@law(*TURNS, hint="A stand-in that nobody takes has q = 0: keep its logarithm finite, for 0 · log 0 is 0.")
@given(seed=st.integers(0, 99))
def a_stand_in_that_nobody_takes_changes_nothing(f, seed):
    rng = np.random.default_rng(seed)
    d, p = rng.random((4, 3)), rng.dirichlet(np.full(4, 2.0))
    rate, mean, q = f(np.concatenate([d, d[:, :1] + 2], 1), p, beta=900.0, steps=9)
    wanted = f(d, p, beta=900.0, steps=9)
    for got, one in zip((rate, mean, q[:3]), wanted, strict=True):
        close(got, one, rtol=1e-9, atol=1e-11)
    close(q[3], 0.0, atol=1e-300)


test_laws = obeys(information)

p, d = np.full(2, 0.5), np.eye(2)
test_refusals = refuses(
    information,
    [
        ("entropies", "one axis", (p,), {}, "joint must have shape"),
        ("entropies", "below 0", (np.array([[1.5, -0.5]]),), {}, "joint must be at least 0"),
        ("entropies", "no distribution", (np.eye(2),), {}, "joint must sum to 1"),
        ("infonce_bound", "no pair", (1.0, 0), {}, "B must be at least 1"),
        ("infonce_bound", "no number", (math.nan, 4), {}, "loss must be finite"),
        ("rate_distortion", "other lengths", (d, np.full(3, 1 / 3)), {"beta": 1.0}, "p must have shape"),
        ("rate_distortion", "no distribution", (d, np.ones(2)), {"beta": 1.0}, "p must sum to 1"),
        ("rate_distortion", "no price", (d, p), {"beta": 0.0}, "beta must be"),
        ("rate_distortion", "no step", (d, p), {"beta": 1.0, "steps": 0}, "steps must be a whole number ≥ 1"),
        (
            "rate_distortion",
            "half a step",
            (d, p),
            {"beta": 1.0, "steps": 1.5},
            "steps must be a whole number",
        ),
        ("rate_distortion", "no stand-in", (d[:, :0], p), {"beta": 1.0}, "distortion must have at least one"),
    ],
)


def test_tables_in_half_precision_are_added_up_in_float64():
    """4,096 equal entries: in float16 their sums stop at a quarter."""
    wide = np.full((64, 64), 2.0**-12, np.float16)
    found = entropies(wide)
    assert found["joint"] == pytest.approx(12 * math.log(2)) and found["mutual"] == pytest.approx(
        0, abs=1e-12
    )
    uneven = np.repeat(np.array([[0.3], [0.7]], np.float16) / np.float16(2), 2, 1)
    assert entropies(uneven)["y"] == pytest.approx(math.log(2), abs=1e-3)


def h(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("beta", [1.5, 3.0])
def test_bits_with_hamming_distance_have_the_closed_form(p, beta):
    """R(D) = h(p) − h(D), as long as D < min(p, 1 − p)."""
    table, weights = 1.0 - np.eye(2), np.array([p, 1 - p])
    for function, give in ((rate_distortion_np, np.array), (rate_distortion, torch.tensor)):
        d, weights = give(table), give(np.asarray(weights))
        rate, mean, _ = function(d, weights, beta, 4000)
        assert float(mean) == pytest.approx(1 / (1 + math.exp(beta)), abs=1e-10)
        assert float(rate) == pytest.approx(h(p) - h(float(mean)), abs=1e-12)


def test_a_gaussian_on_a_grid_has_the_closed_form():
    """½ ln(σ²/D) with squared distance."""
    x = np.linspace(-6, 6, 161)
    p = np.exp(-(x**2) / 2)
    rate, mean, _ = rate_distortion_np((x[:, None] - x) ** 2, p / p.sum(), 2.0, 600)
    assert rate == pytest.approx(0.5 * math.log(1 / mean), abs=1e-3) and rate == pytest.approx(
        0.6931, abs=2e-3
    )


def test_the_curve_falls_and_is_convex():
    rng = np.random.default_rng(0)
    d, p = rng.random((6, 5)), rng.dirichlet(np.ones(6))
    points = [rate_distortion_np(d, p, beta, 3000)[:2] for beta in np.geomspace(4, 60, 15)]
    rate, mean = np.array(points).T
    assert (np.diff(rate) > 0).all() and (np.diff(mean) < 0).all()
    assert (np.diff(np.diff(rate) / np.diff(mean)) < 1e-6).all()
    cheap, _, _ = rate_distortion_np(d, p, 0.2, 3000)  # all stand for the one nearest to all
    assert cheap < 1e-9 and rate.max() <= -(p * np.log(p)).sum() + 1e-9


def test_infonce_rises_to_information_and_never_above():
    p = table(3, 6, 6) + np.eye(6) / 10 + 1e-3
    p /= p.sum()
    true = entropies(p)["mutual"]
    bounds = {B: infonce_bound(optimal_loss(p, B), B) for B in (2, 4, 16, 64)}
    assert list(bounds.values()) == sorted(bounds.values())
    assert all(bound <= min(true, math.log(B)) + 0.02 for B, bound in bounds.items())
    assert bounds[2] < 0.7 * true and bounds[64] > 0.93 * true


def test_infonce_bound_takes_the_library_s_loss():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    loss, _ = infonce_np(x, x, 50.0)
    assert infonce_bound(loss, 64) <= math.log(64) and infonce_bound(loss, 64) > 0.99 * math.log(64)


def test_processing_never_adds_information():
    """Along a chain X → Y → Z, I(X; Z) ≤ I(X; Y)."""
    for seed in range(20):
        p = table(seed, 4, 5)
        channel = np.random.default_rng(seed).dirichlet(np.ones(3), 5)  # p(z | y)
        assert entropies(p @ channel)["mutual"] <= entropies(p)["mutual"] + 1e-12


def test_marginal_gains_may_miss_everything_or_count_twice():
    """XOR: either bit alone tells nothing, both tell all; a copy: each tells all, together no more."""
    xor = np.zeros((2, 2, 2))
    for a, b in np.ndindex(2, 2):
        xor[a, b, a ^ b] = 1 / 4
    each = [entropies(xor.sum(axis))["mutual"] for axis in (1, 0)]
    assert sum(each) == pytest.approx(0, abs=1e-12)
    assert entropies(xor.reshape(4, 2))["mutual"] == pytest.approx(math.log(2))
    copy = np.zeros((2, 2, 2))
    copy[0, 0, 0] = copy[1, 1, 1] = 1 / 2
    assert sum(entropies(copy.sum(axis))["mutual"] for axis in (1, 0)) == pytest.approx(2 * math.log(2))
    assert entropies(copy.reshape(4, 2))["mutual"] == pytest.approx(math.log(2))
