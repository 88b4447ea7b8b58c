"""Yours to write: posterior_np, pmi.

`pytest tests/test_bayes.py` holds what you write here to the laws of minivlp/bayes.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import math

import numpy as np
import torch
from torch import Tensor

from minivlp.sinkhorn import logsumexp_np
from tests import Todo


def posterior_np(loglik: np.ndarray, log_prior: np.ndarray | None = None, grad: np.ndarray | None = None):
    """p(class | row) and its gradients by hand.

    loglik (B, C), log p(row | class) in nats, up to a constant a row; log_prior (C,), up to a constant too,
    None = all alike; grad (B, C) the upstream gradient (None = ones). Returns `(posterior (B, C), (dloglik,
    dlog_prior))`, the second left out without a prior; rows sum to one. Raises ValueError on bad shapes,
    mixed dtypes, NaN and infinities.
    """
    raise Todo


def pmi(loglik: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Pointwise mutual information of rows and classes, all equally likely: (B, C) → (B, C) nats.

    loglik: log p(row | class). Each row's mean of exp is 1 afterwards, and its columns can be compared.
    Arrays in, arrays out; tensors in, tensors out. Raises ValueError on bad shapes, NaN and infinities.
    """
    raise Todo
