"""Plausible wrong noise-contrastive estimates."""

import math

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from minivlp.nce import nce, nce_np
from tests.laws import bug

ODDS, ORDER, LOOP = "equal_densities_cost_the_odds", "samples_come_in_any_order", "equals_the_slow_loop"
HARD, SINGLE = "gradients_hold_at_every_score", "float32_is_enough"
BESIDE = "the_slopes_are_made_beside_the_loss"
TRUTH, SLOPES = "the_true_density_is_stationary", "gradients_are_the_slopes"


@bug("nce", ODDS, "log K is forgotten, so the learned normaliser is off by it.")
def log_K_forgotten(score_data, score_noise, logp_data, logp_noise):
    shift = math.log(score_noise.shape[1])
    return nce(score_data + shift, score_noise + shift, logp_data, logp_noise)


@bug("nce", ODDS, "The wrong sign on the noise: noise is taught to be data too.")
def noise_taught_as_data(score_data, score_noise, logp_data, logp_noise):
    K = score_noise.shape[1]
    h_data, h_noise = (s - p - math.log(K) for s, p in ((score_data, logp_data), (score_noise, logp_noise)))
    return (F.softplus(-h_data) + F.softplus(-h_noise).sum(1)).mean()


@bug("nce", ODDS, "The noise terms are averaged over K, not summed.")
def noise_averaged(score_data, score_noise, logp_data, logp_noise):
    K = score_noise.shape[1]
    h_data, h_noise = (s - p - math.log(K) for s, p in ((score_data, logp_data), (score_noise, logp_noise)))
    return (F.softplus(-h_data) + F.softplus(h_noise).mean(1)).mean()


@bug(
    "nce",
    ODDS,
    "The noise density is left out of the log-odds; negative sampling drops log K as well.",
)
def noise_density_left_out(score_data, score_noise, logp_data, logp_noise):
    return nce(score_data, score_noise, 0 * logp_data, 0 * logp_noise)


@bug("nce", ODDS, "The batch is summed, not averaged.")
def sum_over_batch(score_data, score_noise, logp_data, logp_noise):
    return len(score_data) * nce(score_data, score_noise, logp_data, logp_noise)


@bug("nce", ORDER, "One noise sample stands for all K of its row.")
def first_noise_only(score_data, score_noise, logp_data, logp_noise):
    first, K = (score_noise - logp_noise)[:, :1], score_noise.shape[1]
    return nce(score_data, first.expand(-1, K), logp_data, 0 * logp_noise)


@bug("nce", LOOP, "log(1 + exp(·)) taken literally: overflows.", rung="np")
def softplus_overflows(score_data, score_noise, logp_data, logp_noise):
    K = score_noise.shape[1]
    h_data, h_noise = (s - p - math.log(K) for s, p in ((score_data, logp_data), (score_noise, logp_noise)))
    value = (np.log(1 + np.exp(-h_data)) + np.log(1 + np.exp(h_noise)).sum(1)).mean()
    return value, nce_np(score_data, score_noise, logp_data, logp_noise)[1]


@bug("nce", LOOP, "Probabilities are clipped before the log, so a sure mistake costs 27.6 nats at most.")
def clipped_probabilities(score_data, score_noise, logp_data, logp_noise):
    K = score_noise.shape[1]
    h_data, h_noise = (s - p - math.log(K) for s, p in ((score_data, logp_data), (score_noise, logp_noise)))
    cost_data, cost_noise = (-torch.sigmoid(t).clamp(min=1e-12).log() for t in (h_data, -h_noise))
    return (cost_data + cost_noise.sum(1)).mean()


@bug("nce", TRUTH, "The noise scores are detached: nothing pushes the density down.")
def noise_detached(score_data, score_noise, logp_data, logp_noise):
    return nce(score_data, score_noise.detach(), logp_data, logp_noise)


@bug("nce", TRUTH, "The noise gradient is divided by K as well.", rung="np")
def noise_gradient_averaged(score_data, score_noise, logp_data, logp_noise):
    value, (d_data, d_noise, *rest) = nce_np(score_data, score_noise, logp_data, logp_noise)
    return value, (d_data, d_noise / score_noise.shape[1], *rest)


@bug("nce", SLOPES, "The noise density receives the score's gradient without the minus.", rung="np")
def density_gradient_sign(score_data, score_noise, logp_data, logp_noise):
    value, (d_data, d_noise, _, _) = nce_np(score_data, score_noise, logp_data, logp_noise)
    return value, (d_data, d_noise, d_data, d_noise)


@bug("nce", SLOPES, "No division by B in the gradients.", rung="np")
def gradient_of_the_sum(score_data, score_noise, logp_data, logp_noise):
    value, grads = nce_np(score_data, score_noise, logp_data, logp_noise)
    return value, tuple(len(score_data) * g for g in grads)


def with_slopes(change, score_data, score_noise, logp_data, logp_noise):
    """The right value, the slopes after a change of σ, which is given the mistakes' probabilities."""
    value, (dh_data, dh_noise, *_) = nce_np(score_data, score_noise, logp_data, logp_noise)
    B = len(score_data)
    dh_data, dh_noise = -change(-dh_data * B) / B, change(dh_noise * B) / B
    return value, (dh_data, dh_noise, -dh_data, -dh_noise)


@bug("nce", HARD, "No slope where the classifier is sure and wrong: σ(h) (1 − σ(h)) creeps in.", rung="np")
def nothing_where_sure_and_wrong(*case):
    return with_slopes(lambda p: np.where(p > 1 - 1e-9, 0, p), *case)


@bug("nce", HARD, "Probabilities are cut off at 1e-7 in the slopes: they never vanish.", rung="np")
def clipped_slopes(*case):
    return with_slopes(lambda p: p.clip(1e-7, 1 - 1e-7), *case)


@bug("nce", HARD, "The log-odds are cut off at ± 10 in the gradient.")
def clipped_odds(score_data, score_noise, logp_data, logp_noise):
    def near(h):
        return h.clamp(-10, 10) + (h - h.clamp(-10, 10)).detach()

    shift = math.log(score_noise.shape[1])
    h_data, h_noise = near(score_data - logp_data - shift), near(score_noise - logp_noise - shift)
    return -(F.logsigmoid(h_data) + F.logsigmoid(-h_noise).sum(1)).mean()


@bug("nce", SINGLE, "log K is a float64 tensor of one entry a row, and float32 leaves as float64.")
def log_K_in_float64(score_data, score_noise, logp_data, logp_noise):
    shift = torch.full((len(score_data),), math.log(score_noise.shape[1]), dtype=torch.float64)
    h_data, h_noise = score_data - logp_data - shift, score_noise - logp_noise - shift[:, None]
    return -(F.logsigmoid(h_data) + F.logsigmoid(-h_noise).sum(1)).mean()


@bug("nce", BESIDE, "The plain loss: the slopes are made in the backward pass.", rung="fused")
def plain(score_data, score_noise, logp_data, logp_noise):
    shift = math.log(score_noise.shape[1])
    h_data, h_noise = score_data - logp_data - shift, score_noise - logp_noise - shift
    return -(F.logsigmoid(h_data) + F.logsigmoid(-h_noise).sum(1)).mean()


@bug(
    "nce", BESIDE, "Two softplus in place of two log-sigmoids: the plain loss in another dress.", rung="fused"
)
def two_softplus(score_data, score_noise, logp_data, logp_noise):
    zero, shift = score_data.new_zeros(()), math.log(score_noise.shape[1])
    h_data, h_noise = score_data - logp_data - shift, score_noise - logp_noise - shift
    return (torch.logaddexp(zero, -h_data) + torch.logaddexp(zero, h_noise).sum(1)).mean()


@bug("nce", BESIDE, "The scores are kept, and each is made again in the backward pass.", rung="fused")
def made_twice(*case):
    return torch.utils.checkpoint.checkpoint(nce, *case, use_reentrant=False)
