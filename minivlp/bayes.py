"""Asking a generator: a model that tells how likely a picture is under a caption also chooses the caption.

S_ij = log p(x_i | c_j) is one matrix, and what is asked of it are reductions of its rows:

    posterior    p(c_j | x_i) = softmax_j (S_ij + log p(c_j))                which caption has this picture?
    pmi          log p(x_i | c_j) − log p(x_i) = S_ij − logmeanexp_j S_ij    how much likelier than usual?
    debias       log p(c | x) − α log p(c)                                   what is left without the prior?

Rows choose captions. Columns of S must not be compared raw, for some pictures are likelier than others
whatever the caption says: a grey one beats a colourful one. The pointwise mutual information takes that off,
and it is also what a perfect contrast scores, up to a constant a row: there the two families meet.

Gradient of the posterior P, with G = dL/dP: dS = P ∘ (G − rowsum(G ∘ P)), and d log p(c_j) = Σ_i dS_ij.

Rungs:
    posterior_np    softmax and its Jacobian by hand
    posterior       the same in PyTorch

Sources: Li et al. 2023 (Your diffusion model is secretly a zero-shot classifier), eq. 4; Lin et al. 2024
(Revisiting the role of language priors), section 3, for α; van den Oord et al. 2018 (CPC), section 2.3, for
what a contrast learns.
Left out: classes of probability 0, which are left out of the matrix instead; a fused rung, as C is small.
"""

import math

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import working, working_np
from minivlp.sinkhorn import logsumexp_np


def _check(library, loglik, log_prior) -> None:
    sizes = require.shapes(library, loglik=(loglik, "B C"))
    if not sizes["C"]:
        require.fail("loglik", "must hold at least one class", tuple(loglik.shape))
    require.floats(loglik=loglik)
    if log_prior is not None:
        require.shapes(library, loglik=(loglik, "B C"), log_prior=(log_prior, "C"))
        require.floats(loglik=loglik, log_prior=log_prior)


def posterior_np(loglik: np.ndarray, log_prior: np.ndarray | None = None, grad: np.ndarray | None = None):
    """p(class | row) and its gradients by hand.

    loglik (B, C), log p(row | class) in nats, up to a constant a row; log_prior (C,), up to a constant too,
    None = all alike; grad (B, C) the upstream gradient (None = ones). Returns `(posterior (B, C), (dloglik,
    dlog_prior))`, the second left out without a prior; rows sum to one. Raises ValueError on bad shapes,
    mixed dtypes, NaN and infinities.
    """
    _check(np.ndarray, loglik, log_prior)
    S = working_np(loglik)[0] + (0 if log_prior is None else working_np(log_prior)[0])  # (B, C)
    P = np.exp(S - logsumexp_np(S, 1)[:, None])
    G = np.ones_like(P) if grad is None else grad
    # The softmax Jacobian ∂P_j/∂S_l = P_j (δ_jl − P_l).
    dS = P * (G - (G * P).sum(1, keepdims=True))
    return P, (dS,) if log_prior is None else (dS, dS.sum(0))  # a prior is added to every row


def posterior(loglik: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """p(class | row): loglik (B, C), log_prior (C,) → (B, C); arguments and errors as of `posterior_np`."""
    _check(Tensor, loglik, log_prior)
    (S,) = working(loglik)
    if log_prior is not None:
        S = S + working(log_prior)[0]
    return S.softmax(1).to(loglik.dtype)


def pmi(loglik: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Pointwise mutual information of rows and classes, all equally likely: (B, C) → (B, C) nats.

    loglik: log p(row | class). Each row's mean of exp is 1 afterwards, and its columns can be compared.
    Arrays in, arrays out; tensors in, tensors out. Raises ValueError on bad shapes, NaN and infinities.
    """
    tensor = isinstance(loglik, Tensor)
    _check(Tensor if tensor else np.ndarray, loglik, None)
    (S,) = working(loglik) if tensor else working_np(loglik)
    total = torch.logsumexp(S, 1) if tensor else logsumexp_np(S, 1)
    found = S - (total - math.log(S.shape[1]))[:, None]
    return found.to(loglik.dtype) if tensor else found


def debias(
    loglik: np.ndarray | Tensor, prior_loglik: np.ndarray | Tensor, alpha: float = 1.0
) -> np.ndarray | Tensor:
    """Scores without the share `alpha` of what captions are worth by themselves: log p(c | x) − α log p(c).

    loglik (B, C), log p(class c | row); prior_loglik (C,), log p(c), or (B, C). With α = 1 this is the
    pointwise mutual information; 0 leaves the scores as they are. Raises ValueError on bad shapes, mixed
    dtypes, NaN, infinities and an alpha that is not finite.
    """
    library = Tensor if isinstance(loglik, Tensor) else np.ndarray
    pattern = "C" if getattr(prior_loglik, "ndim", 0) == 1 else "B C"
    require.shapes(library, loglik=(loglik, "B C"), prior_loglik=(prior_loglik, pattern))
    require.floats(loglik=loglik, prior_loglik=prior_loglik)
    require.finite(alpha=alpha)
    return loglik - alpha * prior_loglik


RUNGS = {
    "posterior": {"np": posterior_np, "torch": posterior}, "pmi": {"plain": pmi}, "debias": {"plain": debias},
}  # fmt: skip
