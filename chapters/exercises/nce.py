"""Yours to write: nce_np, nce, nce_fused.

`pytest tests/test_nce.py` holds what you write here to the laws of minivlp/nce.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp import stream
from tests import Todo


def nce_np(score_data: np.ndarray, score_noise: np.ndarray, logp_data: np.ndarray, logp_noise: np.ndarray):
    """Noise-contrastive estimation and its gradients by hand.

    score_data (B,), score_noise (B, K) the model's log-densities, normalised or not; logp_data (B,),
    logp_noise (B, K) the noise log-densities of the same samples; all in nats.
    Returns `(loss, (d score_data, d score_noise, d logp_data, d logp_noise))`.
    Raises ValueError on bad shapes, mixed dtypes or NaN, when B or K is 0, and when the loss is not finite.
    """
    raise Todo


def nce(score_data: Tensor, score_noise: Tensor, logp_data: Tensor, logp_noise: Tensor) -> Tensor:
    """Noise-contrastive estimation: scores and noise log-densities, (B,) at data, (B, K) at noise → scalar.

    Errors as in `nce_np`. Half precisions are added up in float32.
    """
    raise Todo


def nce_fused(score_data: Tensor, score_noise: Tensor, logp_data: Tensor, logp_noise: Tensor) -> Tensor:
    """`nce` with the gradients made beside the loss; arguments and errors as there, differentiable once.

    In units of B·K numbers the plain rung writes or reads some 20, an array for every operation and its
    gradient; this one reads 2, writes 1 and keeps it, as both gradients are dL/dh but for the sign.
    """
    raise Todo
