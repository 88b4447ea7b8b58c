"""Plausible wrong diffusions."""

import math

import torch

from minivlp.diffusion import deviation, errors, noisy, signal
from tests.laws import bug

SUM, SLOPES = "equals_the_sum", "gradients_are_the_slopes"
LOOP, TIES = "equals_the_triple_loop", "a_model_that_ignores_the_class_ties"
LOWER, SOURCE = "the_true_noise_leads_to_the_lower_level", "its_own_noise_is_that_of_the_source"


def wide(level, x):
    return level.view(-1, *[1] * (x.ndim - 1))


@bug("noisy", SUM, "A straight line between picture and noise: the variance sinks in between.")
def straight_line(x, noise, level):
    t = wide(level, x)
    return (1 - t) * x + t * noise


@bug("noisy", SUM, "The variance of the noise where its deviation belongs.")
def sigma_squared(x, noise, level):
    t = wide(level, x)
    return signal(t) * x + deviation(t) ** 2 * noise


@bug("noisy", SUM, "Noise is added, and nothing of the picture is taken away.")
def picture_kept(x, noise, level):
    return x + deviation(wide(level, x)) * noise


@bug("noisy", SUM, "Levels run from noise to picture.")
def levels_reversed(x, noise, level):
    return noisy(x, noise, 1 - level)


@bug("noisy", SUM, "Half of the angle: at level 1 the picture is still there.")
def half_the_angle(x, noise, level):
    return noisy(x, noise, level / 2)


@bug("noisy", SLOPES, "The level's slope is cut off.")
def level_detached(x, noise, level):
    return noisy(x, noise, level.detach()) + 0 * wide(level, x)


def loop(model, x, c, levels, noises, total):
    """errors, with noise (T, B, …) of class j from noises(t, j)."""
    out = torch.zeros(len(x), len(c), dtype=x.dtype)
    for t, level in enumerate(levels):
        for j in range(len(c)):
            n = noises(t, j)
            guess = model(noisy(x, n, level.expand(len(x))), level.expand(len(x)), c[j].expand(len(x)))
            out[:, j] += total(guess, n)
    return out / len(levels)


def squares(guess, n):
    return (guess - n).square().flatten(1).sum(1)


@bug("errors", TIES, "Every class meets a noise of its own.", rung="plain")
def own_noise_per_class(model, x, c, levels, noise):
    return loop(model, x, c, levels, lambda t, j: noise[t].roll(j, 0), squares)


@bug("errors", LOOP, "Classes and pictures run through each other.", rung="plain")
def classes_in_the_wrong_order(model, x, c, levels, noise):
    B, C = len(x), len(c)
    return errors(model, x, c, levels, noise).T.reshape(B, C)


@bug("errors", LOOP, "The sum over levels, not their mean.", rung="plain")
def sum_over_levels(model, x, c, levels, noise):
    return errors(model, x, c, levels, noise) * len(levels)


@bug("errors", LOOP, "Distances that are not squared.", rung="plain")
def not_squared(model, x, c, levels, noise):
    return loop(model, x, c, levels, lambda t, j: noise[t], lambda g, n: (g - n).norm(dim=1))


@bug("errors", LOOP, "The picture in place of the noise is what the guess is compared with.", rung="plain")
def compared_with_the_picture(model, x, c, levels, noise):
    return loop(model, x, c, levels, lambda t, j: noise[t], lambda g, n: squares(g, x))


def step(x_t, predicted, level, lower, noise, variance):
    t, s = wide(level, x_t), wide(lower, x_t)
    x = (x_t - deviation(t) * predicted) / signal(t)
    kept = signal(t) / signal(s)
    fresh = deviation(t) ** 2 - kept**2 * deviation(s) ** 2
    mean = (kept * deviation(s) ** 2 * x_t + signal(s) * fresh * x) / deviation(t) ** 2
    return mean + variance(fresh, s, t).sqrt() * noise


@bug("back", LOWER, "The whole variance of the step, as if x̂ were not known.", rung="plain")
def variance_of_the_step(x_t, predicted, level, lower, noise):
    return step(x_t, predicted, level, lower, noise, lambda fresh, s, t: fresh)


@bug("back", LOWER, "The noise is multiplied by a variance.", rung="plain")
def noise_in_step(x_t, predicted, level, lower, noise):
    def squared(fresh, s, t):
        return (fresh * deviation(s) ** 2 / deviation(t) ** 2) ** 2

    return step(x_t, predicted, level, lower, noise, squared)


@bug(
    "back",
    LOWER,
    "Straight to the picture, then noise of the lower level without what x_t knows.",
    rung="plain",
)
def forgets_where_it_was(x_t, predicted, level, lower, noise):
    t, s = wide(level, x_t), wide(lower, x_t)
    x = (x_t - deviation(t) * predicted) / signal(t)
    return signal(s) * x + math.sqrt(0.5) * deviation(s) * noise


@bug(
    "back",
    SOURCE,
    "No noise at all: another sampler (DDIM), which is not the one that is written.",
    rung="plain",
)
def no_noise(x_t, predicted, level, lower, noise):
    t, s = wide(level, x_t), wide(lower, x_t)
    return signal(s) * (x_t - deviation(t) * predicted) / signal(t) + deviation(s) * predicted + 0 * noise


@bug("back", LOWER, "The guess is taken off the wrong way round.", rung="plain")
def sign_of_the_guess(x_t, predicted, level, lower, noise):
    return step(
        x_t, -predicted, level, lower, noise, lambda fresh, s, t: fresh * (deviation(s) / deviation(t)) ** 2
    )
