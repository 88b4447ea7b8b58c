"""Noise-contrastive estimation: learn a density without its normaliser, by telling data from noise.

A model gives every u an energy E(u) and means the density p(u) = exp(−E(u)) / Z. Maximum likelihood needs

    ∇ log p(u) = −∇E(u) − ∇ log Z,        −∇ log Z = Σ_v p(v) ∇E(v):

lower the energy of the data and raise it on samples of the model, which must be drawn anew at every step. NCE
draws from a fixed noise density instead, K samples for each sample of data, and asks of each: data or noise?
With score(u) = −E(u) − c, where c stands for log Z and is learned like any weight, Bayes' rule gives the
log-odds h and the loss its logistic regression:

    h(u) = score(u) − log p_noise(u) − log K,
    L = 1/B Σ_b [ softplus(−h(data_b)) + Σ_k softplus(h(noise_bk)) ].

Its expectation is least at score = log p_data, normaliser included. As K → ∞ the gradient of a model with
normalised scores becomes that of maximum likelihood, noise samples reweighted to stand for the model's own.

Gradient: dL/dh = (σ(h) − label) / B with label 1 for data and 0 for noise; dscore = dL/dh, dlogp = −dL/dh.

Rungs (B samples of data, K of noise for each):
    nce_np      the formula, a few (B, K) arrays
    nce         the same in PyTorch, differentiated by autograd
    nce_fused   one walk over the scores makes the loss and its slopes, B (K + 1) numbers that are kept

Sources: Gutmann and Hyvärinen 2010, for K = 1, and 2012, for any K; Mnih and Teh 2012, for the limit K → ∞.
Left out: drawing the noise and evaluating its density, which belong to the problem; choosing one of K + 1
samples instead of answering K + 1 yes-or-no questions, which is InfoNCE, the next file.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import working, working_np


def _check(library, score_data, score_noise, logp_data, logp_noise) -> tuple[int, int]:
    """Refuse what is not `score_data, logp_data (B,)`, `score_noise, logp_noise (B, K)`; return B and K."""
    sizes = require.shapes(
        library,
        score_data=(score_data, "B"),
        score_noise=(score_noise, "B K"),
        logp_data=(logp_data, "B"),
        logp_noise=(logp_noise, "B K"),
    )
    if sizes["B"] < 1:
        require.fail("score_data", "must hold at least one sample of data", tuple(score_data.shape))
    if sizes["K"] < 1:
        require.fail("score_noise", "must hold at least one sample of noise", tuple(score_noise.shape))
    # A density of 0 is a score of −∞. But −∞ − (−∞) says nothing, and then the loss is not finite.
    require.floats(
        infinite=True,
        score_data=score_data,
        score_noise=score_noise,
        logp_data=logp_data,
        logp_noise=logp_noise,
    )
    return sizes["B"], sizes["K"]


def nce_np(score_data: np.ndarray, score_noise: np.ndarray, logp_data: np.ndarray, logp_noise: np.ndarray):
    """Noise-contrastive estimation and its gradients by hand.

    score_data (B,), score_noise (B, K) the model's log-densities, normalised or not; logp_data (B,),
    logp_noise (B, K) the noise log-densities of the same samples; all in nats.
    Returns `(loss, (d score_data, d score_noise, d logp_data, d logp_noise))`.
    Raises ValueError on bad shapes, mixed dtypes or NaN, when B or K is 0, and when the loss is not finite.
    """
    B, K = _check(np.ndarray, score_data, score_noise, logp_data, logp_noise)
    h_data = np.subtract(*working_np(score_data, logp_data)) - math.log(K)  # (B,)
    h_noise = np.subtract(*working_np(score_noise, logp_noise)) - math.log(K)  # (B, K)
    # softplus(t) = log(1 + exp(t)) = logaddexp(0, t), which never forms exp of a large number.
    loss = (np.logaddexp(0, -h_data).sum() + np.logaddexp(0, h_noise).sum()) / B
    # softplus' = σ, and σ(t) = exp(−softplus(−t)) keeps every digit of a small σ; −h brings the minus.
    dh_data = -np.exp(-np.logaddexp(0, h_data)) / B  # (B,)
    dh_noise = np.exp(-np.logaddexp(0, -h_noise)) / B  # (B, K)
    # h = score − logp − log K, so the score receives dh and the noise density −dh.
    return require.loss(loss, score_data=score_data), (dh_data, dh_noise, -dh_data, -dh_noise)


def nce(score_data: Tensor, score_noise: Tensor, logp_data: Tensor, logp_noise: Tensor) -> Tensor:
    """Noise-contrastive estimation: scores and noise log-densities, (B,) at data, (B, K) at noise → scalar.

    Errors as in `nce_np`. Half precisions are added up in float32.
    """
    _, K = _check(Tensor, score_data, score_noise, logp_data, logp_noise)
    h_data = torch.sub(*working(score_data, logp_data)) - math.log(K)  # (B,)
    h_noise = torch.sub(*working(score_noise, logp_noise)) - math.log(K)  # (B, K)
    # −softplus(−h) = logsigmoid(h), and exact: torch's softplus is a straight line above 20.
    loss = -(F.logsigmoid(h_data) + F.logsigmoid(-h_noise).sum(1)).mean()
    return require.loss(loss, score_data=score_data)


# The fused rung makes the slopes beside the loss, one block of scores after another, so that a block passes
# through the cache once; both gradients are dL/dh but for the sign, so one array serves the two.


def nce_fused(score_data: Tensor, score_noise: Tensor, logp_data: Tensor, logp_noise: Tensor) -> Tensor:
    """`nce` with the gradients made beside the loss; arguments and errors as there, differentiable once.

    In units of B·K numbers the plain rung writes or reads some 20, an array for every operation and its
    gradient; this one reads 2, writes 1 and keeps it, as both gradients are dL/dh but for the sign.
    """
    _check(Tensor, score_data, score_noise, logp_data, logp_noise)
    loss = stream.differentiable(_Fused, score_data, score_noise, logp_data, logp_noise)
    return require.loss(loss, score_data=score_data)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, score_data, score_noise, logp_data, logp_noise):
        K = score_noise.shape[1]
        dh_data, dh_noise = torch.empty_like(score_data), torch.empty_like(score_noise)
        loss = _walk(-1, dh_data[:, None], score_data[:, None], logp_data[:, None], K)
        loss = loss + _walk(1, dh_noise, score_noise, logp_noise, K)
        ctx.save_for_backward(dh_data, dh_noise)
        return loss.to(score_data.dtype)

    @staticmethod
    def backward(ctx, upstream):
        stream.refuse_create_graph()
        dh = [upstream * slope for slope in ctx.saved_tensors]
        signed = (*dh, *dh)
        return tuple(
            (-g if i >= 2 else g) if needed else None
            for i, (g, needed) in enumerate(zip(signed, ctx.needs_input_grad, strict=True))
        )


# Scores that are worked on together: they stay in the cache from one operation to the next.
BLOCK = 2**16


def _walk(sign: int, slopes: Tensor, score: Tensor, logp: Tensor, K: int) -> Tensor:
    """Σ softplus(sign · h) / B over (B, n) samples, and slopes (B, n) its derivatives by h."""
    total, rows = 0.0, max(1, BLOCK // score.shape[1])
    for slope, s, p in zip(*(z.split(rows) for z in (slopes, score, logp)), strict=True):
        t = torch.sub(*working(s, p)).sub_(math.log(K)).mul_(sign)
        total = total - F.logsigmoid(-t).sum()
        slope.copy_(t.sigmoid_().mul_(sign / len(score)))
    return total / len(score)


RUNGS = {"nce": {"np": nce_np, "torch": nce, "fused": nce_fused}}
