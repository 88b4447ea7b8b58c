"""Laws of noise-contrastive estimation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minivlp import nce
from tests.held import enough, keeps_no_matrix, same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.peers import softplus
from tests.strategies import arrays, sizes


@st.composite
def cases(draw, lengths=(1.0, 1e4)):
    """score_data (B,), score_noise (B, K), logp_data (B,), logp_noise (B, K), of size 1 or ten thousand."""
    B, K, length = draw(sizes()), draw(sizes()), draw(st.sampled_from(lengths))
    return tuple(draw(arrays(*shape, scale=length)) for shape in ((B,), (B, K), (B,), (B, K)))


@law(
    "nce",
    hint="If score = logp + c everywhere, all K + 1 log-odds of a row are c − log K: is log K in, once?",
)
@given(case=cases(), c=st.sampled_from((-3.0, 0.0, 1.0)))
def equal_densities_cost_the_odds(f, case, c):
    _, _, logp_data, logp_noise = case
    K = logp_noise.shape[1]
    cost = softplus(math.log(K) - c) + K * softplus(c - math.log(K))
    close(f(logp_data + c, logp_noise + c, logp_data, logp_noise), cost, atol=1e-8)


@law(
    "nce",
    hint="Every noise sample is a question of its own: which of the B·K places it stands in must not matter.",
)
@given(case=cases(), seed=st.integers(0, 99))
def samples_come_in_any_order(f, case, seed):
    score_data, score_noise, logp_data, logp_noise = case
    rng = np.random.default_rng(seed)
    data, noise = rng.permutation(len(score_data)), rng.permutation(score_noise.size)
    shuffled = [t.reshape(-1)[noise].reshape(t.shape) for t in (score_noise, logp_noise)]
    close(f(score_data[data], shuffled[0], logp_data[data], shuffled[1]), f(*case))


def slow_loop(score_data, score_noise, logp_data, logp_noise):
    """The formula, one sample at a time."""
    B, K = score_noise.shape
    total = 0.0
    for b in range(B):
        total += softplus(-float(score_data[b] - logp_data[b] - math.log(K)))
        for k in range(K):
            total += softplus(float(score_noise[b, k] - logp_noise[b, k] - math.log(K)))
    return total / B


@law(
    "nce", hint="Write it with two loops first; softplus(t) of t = 10,000 is 10,000, and no exp may overflow."
)
@given(case=cases())
def equals_the_slow_loop(f, case):
    close(f(*case), slow_loop(*case))


@st.composite
def worlds(draw):
    """Data and noise of a few symbols in exact proportions: data (B,), noise (B, K), log p, log p_noise."""
    symbols, K = draw(st.integers(2, 4)), draw(sizes(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    data = np.repeat(np.arange(symbols), rng.integers(1, 4, symbols))
    noise = np.concatenate([np.arange(symbols), rng.integers(0, symbols, len(data) * K - symbols)])
    logp, logp_noise = (np.log(np.bincount(s) / len(s)) for s in (data, noise))
    return data, rng.permutation(noise).reshape(len(data), K), logp, logp_noise


@law(
    "nce",
    hint="At score = log p_data the pull of the data and the push of the noise cancel: do both pull?",
)
@given(world=worlds())
def the_true_density_is_stationary(f, world):
    data, noise, logp, logp_noise = world
    d_data, d_noise, *_ = f.grads(logp[data], logp[noise], logp_noise[data], logp_noise[noise])
    for symbol in range(len(logp)):
        close(d_data[data == symbol].sum() + d_noise[noise == symbol].sum(), 0.0)


@law(
    "nce",
    hint="By how much is the label missed, 1 for data, 0 for noise? The density pulls the other way.",
)
@given(case=cases(lengths=(1.0,)))
def gradients_are_the_slopes(f, case):
    for which, gradient in enumerate(f.grads(*case)):
        close(gradient, central_differences(f, case, which), rtol=1e-6, atol=1e-7)


@law("nce", hint="σ(t) = exp(−softplus(−t)): where the answer is sure and wrong the slope is 1, not 0.")
@given(case=cases(lengths=(1.0, 30.0, 1e4)))
def gradients_hold_at_every_score(f, case):
    B, K = case[1].shape
    h_data, h_noise = (s - p - math.log(K) for s, p in ((case[0], case[2]), (case[1], case[3])))
    wanted = [-np.exp(-np.logaddexp(0, h_data)) / B, np.exp(-np.logaddexp(0, -h_noise)) / B]
    for gradient, slopes in zip(f.grads(*case), [*wanted, *(-w for w in wanted)], strict=True):
        close(gradient, slopes, rtol=1e-8, atol=1e-12)


@law("nce", hint="float32 comes in, float32 goes out.")
@given(case=cases(lengths=(1.0, 100.0)))
def float32_is_enough(f, case):
    same_in_float32(f, case)


SLOPES = {"exp", "sigmoid", "log_sigmoid_backward", "sigmoid_backward", "softplus_backward", "log1p", "tanh"}
SLOPES |= {"log_sigmoid_forward", "log_sigmoid", "softplus", "logaddexp", "exp2", "expm1", "where"}


@law("nce", hint="The slope of a score is known with the score: make it in forward, let backward multiply.")
def the_slopes_are_made_beside_the_loss(f):
    rng = np.random.default_rng(0)
    args = tuple(rng.standard_normal(shape) for shape in ((64,), (64, 64), (64,), (64, 64)))
    found = keeps_no_matrix(f, args, {}, 64 * 64, "the scores", enough(*args) // 2)
    if found:
        late = sorted(found.backward_calls & SLOPES)
        assert not late, f"the backward pass calls {late[0]}: the slopes were known in the forward pass"


test_laws = obeys(nce)

data, noise = np.zeros(3), np.zeros((3, 2))
test_refusals = refuses(
    nce,
    [
        ("nce", "noise for fewer rows", (data, noise[:2], data, noise), {}, "score_noise must have shape"),
        ("nce", "flat noise", (data, data, data, noise), {}, "score_noise must have shape"),
        (
            "nce",
            "density of other noise",
            (data, noise, data, noise[:, :1]),
            {},
            "logp_noise must have shape",
        ),
        (
            "nce",
            "no data",
            (data[:0], noise[:0], data[:0], noise[:0]),
            {},
            "score_data must hold at least one",
        ),
        (
            "nce",
            "no noise",
            (data, noise[:, :0], data, noise[:, :0]),
            {},
            "score_noise must hold at least one",
        ),
        (
            "nce",
            "integer scores",
            (data.astype(int), noise, data, noise),
            {},
            "score_data must have a floating",
        ),
        ("nce", "NaN", (data, noise, data, noise * np.nan), {}, "logp_noise must not contain NaN"),
    ],
)


def some_scores(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4,), (4, 3), (4,), (4, 3))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def test_equals_binary_cross_entropy():
    """Outside truth: torch's binary cross-entropy of the log-odds, summed over samples, over B."""
    score_data, score_noise, logp_data, logp_noise = some_scores()
    h = torch.cat([score_data - logp_data, (score_noise - logp_noise).flatten()]) - math.log(3)
    labels = torch.cat([torch.ones(4), torch.zeros(12)]).double()
    expected = F.binary_cross_entropy_with_logits(h, labels, reduction="sum") / 4
    close(nce.nce(score_data, score_noise, logp_data, logp_noise), expected)


def test_finds_the_normaliser_of_a_gaussian():
    """With score = −u²/2 − c the best c is log √(2π), up to the scatter that theory gives it.

    For this one parameter the variance of Gutmann and Hyvärinen 2012, theorem 3, is (1/a − 1 − 1/K) / B, with
    a the mean over the data of the posterior of noise, K p_noise / (p_data + K p_noise).
    """
    log_Z, runs, rng, scatters = math.log(2 * math.pi) / 2, 100, np.random.default_rng(0), []

    def log_noise(u):
        """A Gaussian of standard deviation 2."""
        return -((u / 2) ** 2) / 2 - math.log(2) - log_Z

    for B, K in ((100, 1), (100, 16), (1600, 1)):
        grid = np.linspace(-12, 12, 4001)
        p, p_noise = np.exp(-(grid**2) / 2 - log_Z), np.exp(log_noise(grid))
        a = (p * K * p_noise / (p + K * p_noise)).sum() * (grid[1] - grid[0])
        scatters.append(math.sqrt((1 / a - 1 - 1 / K) / B))
        # All runs side by side, each with its c. The loss is convex in c: halve the interval again and again.
        u, v = rng.standard_normal((runs, B)), 2 * rng.standard_normal((runs, B, K))
        low, high = np.full(runs, log_Z - 3), np.full(runs, log_Z + 3)
        for _ in range(30):
            c = (low + high) / 2
            scores = -(u**2) / 2 - c[:, None], -(v**2) / 2 - c[:, None, None]
            samples = (*scores, log_noise(u), log_noise(v))
            rows = [t.reshape(runs * B, *t.shape[2:]) for t in samples]  # (runs · B,) and (runs · B, K)
            d_data, d_noise, *_ = nce.nce_np(*rows)[1]
            falling = (d_data + d_noise.sum(1)).reshape(runs, B).sum(1) > 0  # dL/dc < 0: dscore/dc = −1
            low, high = np.where(falling, c, low), np.where(falling, high, c)
        z = (c - log_Z) / scatters[-1]
        # Mean 0 and mean square 1, each within four standard errors.
        assert abs(z.mean()) < 4 / math.sqrt(runs), (B, K, z.mean())
        assert abs((z**2).mean() - 1) < 4 * math.sqrt(2 / runs), (B, K, (z**2).mean())
    assert scatters[1] < scatters[0] and scatters[2] < scatters[0]  # more noise helps, and so do more data


@pytest.mark.parametrize("K", [4, 64, 1024])
def test_tends_to_maximum_likelihood(K):
    """With score = θ − c, c held at log Z, the gradient is that of −mean log softmax(θ) up to a bound in 1/K.

    So the noise supplies −∇ log Z, which maximum likelihood takes from samples of the model. Both terms weigh
    a sample by 1 − p / (p + K p_noise) instead of 1: entry u is off by (p_data + p) p / (K p_noise) at most.
    """
    theta = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    data = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    noise = torch.arange(4).repeat(len(data), K // 4)  # (B, K): each symbol equally often, p_noise = 1/4
    score = theta - theta.logsumexp(0).detach()
    uniform = torch.full((), math.log(1 / 4), dtype=torch.float64)
    loss = nce.nce(score[data], score[noise], uniform.expand(7), uniform.expand(7, K))
    (gradient,) = torch.autograd.grad(loss, theta)
    (likelihood,) = torch.autograd.grad(-theta.log_softmax(0)[data].mean(), theta)
    p, p_data = theta.softmax(0).detach(), torch.bincount(data) / len(data)
    assert ((gradient - likelihood).abs() <= (p_data + p) * p / (K / 4)).all()


def test_a_sample_out_of_reach_costs_nothing():
    """Where the noise has no density data are certain, where the model has none noise is. No inf, no NaN."""
    inf = np.array([[np.inf]])
    args = (np.zeros(1), -inf, -inf[0], np.zeros((1, 1)))
    loss, grads = nce.nce_np(*args)
    assert loss == 0 and all((g == 0).all() for g in grads)
    for f in (nce.nce, nce.nce_fused):
        tensors = [torch.from_numpy(a).requires_grad_() for a in args]
        out = f(*tensors)
        assert out == 0 and all((g == 0).all() for g in torch.autograd.grad(out, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", [nce.nce, nce.nce_fused])
def test_low_precision(f, dtype):
    args = [t.requires_grad_() for t in some_scores(dtype)]
    loss = f(*args)
    assert loss.dtype == dtype
    exact, slopes = nce.nce_np(*(t.detach().double().numpy() for t in args))
    # |h| ≤ 4 is rounded twice, softplus and σ once, and the sum once more: about 16 eps.
    eps = torch.finfo(dtype).eps
    close(loss.detach().double(), exact, rtol=16 * eps)
    for got, wanted in zip(torch.autograd.grad(loss, args), slopes, strict=True):
        close(got.double(), wanted, rtol=0, atol=16 * eps * np.abs(wanted).max())


def test_backward_twice_and_noise_frozen():
    args = some_scores()
    loss = nce.nce(args[0].requires_grad_(), *args[1:])
    first, second = (torch.autograd.grad(loss, args[0], retain_graph=True)[0] for _ in "ab")
    close(second, first)
    close(first, nce.nce_np(*(t.detach().numpy() for t in args))[1][0])
