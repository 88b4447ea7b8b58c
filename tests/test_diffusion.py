"""Laws of diffusion, and Gaussian classes, whose best denoiser is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import diffusion
from minivlp.bayes import posterior
from minivlp.diffusion import back, deviation, errors, even_levels, noisy, signal
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes


@st.composite
def drowning(draw):
    """x (B, h, w), noise of the same shape, levels (B,)."""
    B, h, w = draw(sizes(3)), draw(sizes(3)), draw(sizes(2))
    levels = np.array([draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])) for _ in range(B)])
    return draw(arrays(B, h, w)), draw(arrays(B, h, w)), levels


@law("noisy", hint="cos(πt/2) of the picture and sin(πt/2) of the noise: the squares of the two sum to one.")
@given(case=drowning())
def equals_the_sum(f, case):
    x, noise, level = case
    found = f(*case)
    for b, t in enumerate(level):
        close(found[b], math.cos(math.pi * t / 2) * x[b] + math.sin(math.pi * t / 2) * noise[b])


@law("noisy", hint="Linear in picture and noise, with the level's own slopes.")
@given(case=drowning(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    upstream = np.random.default_rng(seed).standard_normal(case[0].shape)
    x, noise, level = case
    x = x * (seed % 3 > 0)  # an empty picture has slopes too
    inside = (x, noise, level.clip(0.01, 0.99))
    for which, gradient in enumerate(f.grads(*inside, grad=upstream)):
        close(gradient, central_differences(f, inside, which, grad=upstream), rtol=1e-6, atol=1e-8)


class Gaussian:
    """Classes N(mean_c, v): the best ε̂ is deviation · (x_t − signal · mean_c) / variance of x_t."""

    def __init__(self, means, v):
        self.means, self.v = means, v

    def __deepcopy__(self, memo):  # an attempt is given copies, and a call changes nothing here
        return self

    def __call__(self, x_t, level, c):
        a, s = (z.view(-1, *[1] * (x_t.ndim - 1)) for z in (signal(level), deviation(level)))
        return s * (x_t - a * self.means[c]) / (a**2 * self.v + s**2)


def problem(B=3, C=4, T=5, D=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(C, D, generator=generator, dtype=torch.float64)
    x = means[:B] + 0.3 * torch.randn(B, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(T, B, D, generator=generator, dtype=torch.float64)
    return Gaussian(means, 0.09), x, torch.arange(C), even_levels(T).double(), noise


@law("errors", hint="Who does not look at the class must be indifferent: every class gets the same noise.")
def a_model_that_ignores_the_class_ties(f):
    _, x, c, levels, noise = problem()
    found = f(lambda x_t, level, c: torch.sin(3 * x_t) + level[:, None], x, c, levels, noise)
    assert torch.equal(found, found[:, :1].expand_as(found)), "classes differ"


@law(
    "errors", hint="|ε̂ − ε|², summed over the picture, averaged over levels; all classes meet the same noise."
)
def equals_the_triple_loop(f):
    model, x, c, levels, noise = case = problem()
    found = f(*case)
    for b, j in np.ndindex(len(x), len(c)):
        total = 0.0
        for t, level in enumerate(levels):
            x_t = math.cos(math.pi * level / 2) * x[b] + math.sin(math.pi * level / 2) * noise[t, b]
            guess = model(x_t[None], level[None], c[j : j + 1])[0]
            total += float((guess - noise[t, b]).square().sum()) / len(levels)
        assert float(found[b, j]) == pytest.approx(total, rel=1e-9), f"picture {b}, class {j}"


@law(
    "back",
    hint="With the true noise, what comes back is the picture at the lower level: its mean, its variance.",
)
def the_true_noise_leads_to_the_lower_level(f):
    """Linear in (x_t, ε̂, noise): its three slopes are measured, and the law of the result follows."""
    for t, s in ((0.9, 0.5), (0.5, 0.1), (0.99, 0.0)):
        level, lower = (torch.tensor([v], dtype=torch.float64) for v in (t, s))
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        of_x, of_guess, of_noise = (
            float(f(*parts[:2], level, lower, parts[2]))
            for parts in ((one, zero, zero), (zero, one, zero), (zero, zero, one))
        )
        a, d = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        close(of_x * a, math.cos(math.pi * s / 2), rtol=1e-9)  # of the picture
        close(math.hypot(of_x * d + of_guess, of_noise), math.sin(math.pi * s / 2), rtol=1e-9, atol=1e-9)


@law("back", hint="What is drawn is q(x_s | x_t, x̂), whose variance is that of the step times σ_s² / σ_t².")
def its_own_noise_is_that_of_the_source(f):
    """Ho et al., eq. 7, in terms of α and β: β̃ = (1 − ᾱ_s) / (1 − ᾱ_t) · β."""
    t, s = (torch.tensor([v], dtype=torch.float64) for v in (0.7, 0.4))
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    bar_t, bar_s = math.cos(math.pi * 0.35) ** 2, math.cos(math.pi * 0.2) ** 2
    beta = 1 - bar_t / bar_s
    close(float(f(zero, zero, t, s, one)) ** 2, (1 - bar_s) / (1 - bar_t) * beta, rtol=1e-9)


test_laws = obeys(diffusion)

x, half = torch.ones(2, 3), torch.full((2,), 0.5)
ones, (model, *_) = np.ones((2, 3)), problem()
test_refusals = refuses(
    diffusion,
    [
        (
            "noisy",
            "another shape",
            (np.ones((2, 3)), np.ones((2, 4)), np.full(2, 0.5)),
            {},
            "noise must have",
        ),
        ("noisy", "level", (np.ones((2, 3)), np.ones((2, 3)), np.full(2, 1.5)), {}, "level must lie in"),
        ("errors", "own noises", (model, x, torch.arange(4), half, x), {}, "noise must have shape"),
        ("errors", "no level", (model, x, torch.arange(4), half[:0], x[None][:0]), {}, "levels must hold"),
        ("back", "upwards", (x, x, half, half + 0.1, x), {}, "lower must lie in"),
    ],
)


def test_signal_and_noise_keep_unit_variance():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(signal(t) ** 2 + deviation(t) ** 2, torch.ones_like(t))
    assert signal(t).diff().max() < 0 < deviation(t).diff().min()
    assert even_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    with pytest.raises(ValueError, match="T must be at least 1"):
        even_levels(0)


def test_the_best_denoiser_is_the_score():
    """ε̂ = −deviation · ∇ log p(x_t), by autograd on the Gaussian's own density."""
    model, x, c, _, noise = problem()
    level = torch.full((3,), 0.4, dtype=torch.float64)
    x_t = noisy(x, noise[0], level).requires_grad_()
    variance = signal(level) ** 2 * model.v + deviation(level) ** 2
    log_p = -((x_t - signal(level)[:, None] * model.means[c[:3]]).square().sum(1) / (2 * variance)).sum()
    (score,) = torch.autograd.grad(log_p, x_t)
    assert torch.allclose(model(x_t.detach(), level, c[:3]), -deviation(level)[:, None] * score)


def test_the_classes_of_gaussians_are_found():
    """Many noises: the difference of two errors is that of log p up to one positive factor."""
    model, x, c, _, _ = problem(B=4)
    levels = even_levels(8).double()
    noise = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = errors(model, x, c, levels, noise)
    assert found.argmin(1).tolist() == [0, 1, 2, 3]
    assert (posterior(-found / 2).diagonal() > 0.9).all()


def test_own_noises_drown_the_difference_of_classes():
    """Two classes that nearly agree: with one noise for both the nearer wins, with two it is a lottery."""
    means = torch.zeros(2, 60, dtype=torch.float64)
    means[1, 0] = 0.8
    model, levels, generator = (
        Gaussian(means, 0.05),
        even_levels(4).double(),
        torch.Generator().manual_seed(0),
    )
    shared = own = 0
    for trial in range(100):
        true = trial % 2
        x = means[true][None] + 0.05**0.5 * torch.randn(1, 60, generator=generator, dtype=torch.float64)
        a, b = torch.randn(2, 4, 1, 60, generator=generator, dtype=torch.float64)
        one = errors(model, x, torch.arange(2), levels, a)
        two = torch.cat([errors(model, x, torch.tensor([k]), levels, n) for k, n in enumerate((a, b))], 1)
        shared += int(one.argmin()) == true
        own += int(two.argmin()) == true
    assert shared >= 85 and own <= 80


def test_sampling_a_gaussian_ends_in_that_gaussian():
    """Ancestral steps with the best denoiser, from noise to level 0: mean and deviation of the class."""
    means = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
    model, generator = Gaussian(means, 0.16), torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    levels = torch.linspace(0.995, 0, 60, dtype=torch.float64)
    c = torch.ones(4000, dtype=torch.long)
    for t, s in pairwise(levels):
        level, lower = t.expand(4000), s.expand(4000)
        fresh = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
        x = back(x, model(x, level, c), level, lower, fresh)
    assert x.mean().item() == pytest.approx(-0.5, abs=0.03) and x.std().item() == pytest.approx(0.4, abs=0.03)
