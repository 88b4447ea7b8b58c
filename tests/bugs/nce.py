"""Plausible wrong noise-contrastive estimates."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from minivlp.nce import nce, nce_np
from tests.laws import bug

ODDS, ORDER, LOOP = "equal_densities_cost_the_odds", "samples_come_in_any_order", "equals_the_slow_loop"
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
