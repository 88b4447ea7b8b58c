"""Noise-contrastive estimation: learn a density without its normaliser, by telling data from noise.

A model gives every u an energy E(u) and means the density p(u) = exp(−E(u)) / Z. Maximum likelihood needs

    ∇ log p(u) = −∇E(u) − ∇ log Z,        −∇ log Z = Σ_v p(v) ∇E(v):

lower the energy of the data and raise it on samples of the model itself, drawn anew after every step. NCE
draws from a fixed noise density instead, K samples for each sample of data, and asks of each: data or noise?
With score(u) = −E(u) − c, where c stands for log Z and is learned like any weight, Bayes' rule gives the
log-odds h and the loss its logistic regression:

    h(u) = score(u) − log p_noise(u) − log K,
    L = 1/B Σ_b [ softplus(−h(data_b)) + Σ_k softplus(h(noise_bk)) ].

Its expectation is least at score = log p_data, normaliser included. As K → ∞ the gradient of a model with
normalised scores becomes that of maximum likelihood, noise samples reweighted to stand for the model's own.

Gradient: dL/dh = (σ(h) − label) / B with label 1 for data and 0 for noise; dscore = dL/dh, dlogp = −dL/dh.

Rungs (B samples of data, K of noise for each):
    nce_np    the formula, a few (B, K) arrays
    nce       the same in PyTorch, differentiated by autograd

Sources: Gutmann and Hyvärinen 2010, for K = 1, and 2012, for any K; Mnih and Teh 2012, for the limit K → ∞.
Left out: drawing the noise and evaluating its density, which belong to the problem; choosing one of K + 1
samples instead of answering K + 1 yes-or-no questions, which is InfoNCE, the next file.
"""

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from minivlp import refuse


def _check(score_data, score_noise, logp_data, logp_noise) -> tuple[int, int]:
    """Refuse what is not `score_data, logp_data (B,)`, `score_noise, logp_noise (B, K)`; return B and K."""
    sizes = refuse.shapes(
        score_data=(score_data, "B"),
        score_noise=(score_noise, "B K"),
        logp_data=(logp_data, "B"),
        logp_noise=(logp_noise, "B K"),
    )
    if sizes["B"] < 1:
        refuse.refuse("score_data", "must hold at least one sample of data", tuple(score_data.shape))
    if sizes["K"] < 1:
        refuse.refuse("score_noise", "must hold at least one sample of noise", tuple(score_noise.shape))
    refuse.floats(score_data=score_data, score_noise=score_noise, logp_data=logp_data, logp_noise=logp_noise)
    return sizes["B"], sizes["K"]


def nce_np(score_data: np.ndarray, score_noise: np.ndarray, logp_data: np.ndarray, logp_noise: np.ndarray):
    """Noise-contrastive estimation and its gradients by hand.

    score_data (B,), score_noise (B, K) the model's log-densities, normalised or not; logp_data (B,),
    logp_noise (B, K) the noise log-densities of the same samples; all in nats.
    Returns `(loss, (d score_data, d score_noise, d logp_data, d logp_noise))`.
    Raises ValueError on bad shapes, dtypes or NaN, and when B or K is 0.
    """
    B, K = _check(score_data, score_noise, logp_data, logp_noise)
    h_data = score_data - logp_data - math.log(K)  # (B,)
    h_noise = score_noise - logp_noise - math.log(K)  # (B, K)
    # softplus(t) = log(1 + exp(t)) = logaddexp(0, t), which never forms exp of a large number.
    loss = (np.logaddexp(0, -h_data).sum() + np.logaddexp(0, h_noise).sum()) / B
    # softplus' = σ, and σ(t) = exp(−softplus(−t)) keeps every digit of a small σ; −h brings the minus.
    dh_data = -np.exp(-np.logaddexp(0, h_data)) / B  # (B,)
    dh_noise = np.exp(-np.logaddexp(0, -h_noise)) / B  # (B, K)
    # h = score − logp − log K, so the score receives dh and the noise density −dh.
    return float(loss), (dh_data, dh_noise, -dh_data, -dh_noise)


def nce(score_data: Tensor, score_noise: Tensor, logp_data: Tensor, logp_noise: Tensor) -> Tensor:
    """Noise-contrastive estimation: scores and noise log-densities, (B,) at data, (B, K) at noise → scalar.

    Raises ValueError on bad shapes, dtypes or NaN, and when B or K is 0.
    """
    _, K = _check(score_data, score_noise, logp_data, logp_noise)
    h_data = score_data - logp_data - math.log(K)  # (B,)
    h_noise = score_noise - logp_noise - math.log(K)  # (B, K)
    # −softplus(−h) = logsigmoid(h), and exact: torch's softplus is a straight line above 20.
    return -(F.logsigmoid(h_data) + F.logsigmoid(-h_noise).sum(1)).mean()


RUNGS = {"nce": {"np": nce_np, "torch": nce}}
