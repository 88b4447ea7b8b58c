"""Plausible wrong measures of information."""

import math

import numpy as np
import torch

from minivlp.information import entropies
from tests.laws import bug

SUMS, BOUND = "equals_the_sums", "is_the_logarithm_of_the_batch_less_the_loss"
LOOP, PRICE = "equals_the_slow_loop", "a_high_price_keeps_everything"
NOBODY = "a_stand_in_that_nobody_takes_changes_nothing"


@bug("entropies", SUMS, "Bits for nats.", rung="plain")
def bits_for_nats(joint):
    return {name: value / math.log(2) for name, value in entropies(joint).items()}


@bug("entropies", SUMS, "0 log 0 is NaN.", rung="plain")
def zero_is_not_a_number(joint):
    with np.errstate(divide="ignore", invalid="ignore"):
        return entropies(joint) | {"joint": float(-(joint * np.log(joint)).sum())}


@bug("entropies", SUMS, "x and y exchanged.", rung="plain")
def axes_exchanged(joint):
    return entropies(joint.T)


@bug("entropies", SUMS, "The conditionals exchanged.", rung="plain")
def conditionals_exchanged(joint):
    found = entropies(joint)
    return found | {"x_given_y": found["y_given_x"], "y_given_x": found["x_given_y"]}


@bug("entropies", SUMS, "The mutual information against uniform marginals.", rung="plain")
def uniform_marginals(joint):
    found = entropies(joint)
    return found | {"mutual": math.log(joint.size) - found["joint"]}


@bug("infonce_bound", BOUND, "The loss itself.", rung="plain")
def the_loss(loss, B):
    return loss


@bug("infonce_bound", BOUND, "log(B − 1): the negatives alone.", rung="plain")
def negatives_alone(loss, B):
    return math.log(max(B - 1, 1)) - loss


@bug("infonce_bound", BOUND, "Bits on one side, nats on the other.", rung="plain")
def bits_of_the_batch(loss, B):
    return math.log2(B) - loss


@bug("infonce_bound", BOUND, "Never below 0: a bad critic would look like no information.", rung="plain")
def clipped_at_zero(loss, B):
    return max(0.0, math.log(B) - loss)


@bug("infonce_bound", BOUND, "Both directions of the loss counted.", rung="plain")
def both_directions(loss, B):
    return math.log(B) - 2 * loss


def wrong_turn(caught_by, story):
    """Register for the rungs of rate_distortion and for what learners write."""

    def register(function):
        for family in ("rate_distortion", "rate_distortion_np"):
            bug(family, caught_by, story)(function)
        return function

    return register


def turns(distortion, p, beta, steps, rows=True, learn=True):
    q = torch.full_like(distortion[0], 1 / distortion.shape[1])
    for _ in range(steps):
        W = (q.log() - beta * distortion).softmax(1 if rows else 0)
        q = p @ W if learn else q
    T = p[:, None] * W
    return T, W, q, (T * distortion).sum()


@wrong_turn(LOOP, "The marginal stays uniform.")
def marginal_not_learned(distortion, p, beta, steps=100):
    T, W, q, mean = turns(distortion, p, beta, steps, learn=False)
    return (T * (W / q).log()).sum(), mean, q


@wrong_turn(LOOP, "Softmax along the columns.")
def along_the_columns(distortion, p, beta, steps=100):
    T, W, q, mean = turns(distortion, p, beta, steps, rows=False)
    return (T * (W / q).log()).sum(), mean, q


@wrong_turn(LOOP, "The rate in bits.")
def rate_in_bits(distortion, p, beta, steps=100):
    T, W, q, mean = turns(distortion, p, beta, steps)
    return (T * (W / q).log2()).sum(), mean, q


@wrong_turn(LOOP, "The Lagrangian in place of the rate.")
def lagrangian(distortion, p, beta, steps=100):
    T, W, q, mean = turns(distortion, p, beta, steps)
    return (T * (W / q).log()).sum() + beta * mean, mean, q


@wrong_turn(LOOP, "The mean distance over all pairs, not over those that are used.")
def mean_over_all(distortion, p, beta, steps=100):
    T, W, q, _ = turns(distortion, p, beta, steps)
    return (T * (W / q).log()).sum(), distortion.mean(), q


@wrong_turn(PRICE, "exp(−β d) itself: at a high price every row is 0 / 0.")
def exp_underflows(distortion, p, beta, steps=100):
    q = torch.full_like(distortion[0], 1 / distortion.shape[1])
    for _ in range(steps):
        W = q * (-beta * distortion).exp()
        W = W / W.sum(1, keepdim=True)
        q = p @ W
    T = p[:, None] * W
    return torch.xlogy(T, W / q).sum(), (T * distortion).sum(), q


@wrong_turn(NOBODY, "The logarithm of a stand-in that nobody takes: 0 times infinity in the rate.")
def log_of_nothing(distortion, p, beta, steps=100):
    q = torch.full_like(distortion[0], 1 / distortion.shape[1])
    for _ in range(steps):
        log_W = (q.log() - beta * distortion).log_softmax(1)
        q = p @ log_W.exp()
    T = p[:, None] * log_W.exp()
    return (T * (log_W - q.log())).sum(), (T * distortion).sum(), q
