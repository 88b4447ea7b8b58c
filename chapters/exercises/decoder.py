"""Yours to write: rms_norm_np, rotary_np, restrict.

`pytest tests/test_decoder.py` holds what you write here to the laws of minivlp/decoder.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp.decoder import turn
from tests import Todo


def rms_norm_np(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5, grad=None):
    """RMSNorm over the last axis and its gradients by hand.

    x (…, D), weight (D,), eps > 0 added to the mean square, grad (…, D) the upstream gradient (None = ones).
    Returns `(out (…, D), (dx, dweight))`. Raises ValueError on bad shapes, mixed dtypes, NaN, infinities,
    eps ≤ 0 and a mean square that overflows.
    """
    raise Todo


def rotary_np(x: np.ndarray, positions: np.ndarray, base: float = 10_000.0, grad=None):
    """Rotary positions and their gradient by hand.

    x (B, H, L, d) with an even d, positions (L,) or (B, L) integers, base = θ > 0, grad (B, H, L, d) the
    upstream gradient (None = ones). Returns `(out (B, H, L, d), (dx,))`. Raises ValueError on bad shapes and
    dtypes, NaN, infinities and base ≤ 0.
    """
    raise Todo


def restrict(scores: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities of scores (…, V) among the allowed (V,) bool: −∞, probability 0, for all others."""
    raise Todo
