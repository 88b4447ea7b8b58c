"""Plausible wrong judges."""

import numpy as np
import torch

from minivlp.bayes import pmi, posterior_np
from tests.laws import bug

RULE, SHIFT, SLOPES = "is_bayes_rule", "a_constant_a_row_is_nothing", "gradients_are_the_slopes"
TABLE, LIKELY, PRIOR = "equals_the_table", "a_likely_picture_is_no_better", "takes_the_share_of_the_prior"


@bug("posterior", RULE, "Softmax over the pictures: columns compared raw.")
def raw_columns(loglik, log_prior=None):
    return (loglik if log_prior is None else loglik + log_prior).softmax(0)


@bug("posterior", RULE, "The prior is a probability, added to logarithms.")
def prior_not_in_logarithms(loglik, log_prior=None):
    return (loglik if log_prior is None else loglik + log_prior.exp()).softmax(1)


@bug("posterior", RULE, "The prior is left out.")
def no_prior(loglik, log_prior=None):
    return loglik.softmax(1) + (0 if log_prior is None else 0 * log_prior)


@bug("posterior", SHIFT, "exp of the likelihoods themselves: a picture of a thousand numbers has p = 0.")
def exp_underflows(loglik, log_prior=None):
    joint = loglik.exp() * (1 if log_prior is None else log_prior.exp())
    return joint / joint.sum(1, keepdim=True)


@bug("posterior", SLOPES, "The slopes of a softmax without what one class takes from the others.", rung="np")
def diagonal_jacobian(loglik, log_prior=None, grad=None):
    P, _ = posterior_np(loglik, log_prior)
    dS = P * (1 - P) * (1 if grad is None else grad)
    return P, (dS,) if log_prior is None else (dS, dS.sum(0))


@bug("posterior", SLOPES, "The prior's slope is the mean of its rows', not their sum.", rung="np")
def mean_slope_of_the_prior(loglik, log_prior=None, grad=None):
    P, grads = posterior_np(loglik, log_prior, grad)
    return P, (grads[0], *(g / max(len(loglik), 2) for g in grads[1:]))


@bug("pmi", TABLE, "The sum over captions, not the mean: every entry is log C too small.", rung="plain")
def sum_in_place_of_the_mean(loglik):
    return loglik - np.log(np.exp(loglik).sum(1, keepdims=True))


@bug("pmi", TABLE, "The mean of the logarithms in place of the logarithm of the mean.", rung="plain")
def mean_of_logarithms(loglik):
    return loglik - loglik.mean(1, keepdims=True)


@bug("pmi", TABLE, "log p(x) from the columns: pictures are compared raw.", rung="plain")
def by_columns(loglik):
    return loglik - np.log(np.exp(loglik).mean(0))


@bug("pmi", TABLE, "Tensors are added up over the other axis.", rung="plain")
def tensors_by_columns(loglik):
    if isinstance(loglik, torch.Tensor):
        return loglik - loglik.logsumexp(0) + np.log(len(loglik))
    return pmi(loglik)


@bug("debias", PRIOR, "The prior to the power of α is subtracted as a probability.", rung="plain")
def probability_subtracted(loglik, prior_loglik, alpha=1.0):
    return loglik - np.exp(prior_loglik) * alpha


@bug("debias", PRIOR, "α belongs to the other side.", rung="plain")
def alpha_on_the_likelihood(loglik, prior_loglik, alpha=1.0):
    return alpha * loglik - prior_loglik


@bug("pmi", LIKELY, "exp of the likelihoods themselves, before the mean.", rung="plain")
def exp_overflows(loglik):
    with np.errstate(over="ignore", divide="ignore"):
        return loglik - np.log(np.exp(loglik).mean(1, keepdims=True))


@bug("posterior", "float32_is_enough", "Answers in float64, whatever it was asked in.")
def answers_in_float64(loglik, log_prior=None):
    return (loglik if log_prior is None else loglik + log_prior).double().softmax(1)


@bug("pmi", TABLE, "The best caption stands for the mean of all.", rung="plain")
def best_for_the_mean(loglik):
    return loglik - loglik.max(1, keepdims=True)


@bug("debias", PRIOR, "The prior is added: what was likely before is likelier now.", rung="plain")
def prior_added(loglik, prior_loglik, alpha=1.0):
    return loglik + alpha * prior_loglik


@bug("debias", PRIOR, "All of the prior, whatever α says.", rung="plain")
def alpha_forgotten(loglik, prior_loglik, alpha=1.0):
    return loglik - prior_loglik


@bug("debias", PRIOR, "One number of the prior for all captions.", rung="plain")
def prior_of_the_mean(loglik, prior_loglik, alpha=1.0):
    return loglik - alpha * np.mean(prior_loglik)
