"""Yours to write: nearest_np, nearest_fused, kmeans, vq_np, vq.

`pytest tests/test_vq.py` holds what you write here to the laws of minivlp/vq.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.vq import Rows, nearest, restart_dead
from tests import Todo


def nearest_np(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The nearest code of each vector: z (M, D), codes (K, D) → ids (M,) int64, the first on ties.

    Raises ValueError on bad shapes, mixed dtypes, NaN, infinities, no code and scores that overflow.
    """
    raise Todo


def nearest_fused(z: Tensor, codes: Tensor) -> Tensor:
    """`nearest` tile by tile; arguments and errors as there.

    The plain rung writes S to memory and reads it again, 2 M · K numbers beside the product; this one keeps
    its tiles in the cache.
    """
    raise Todo


def kmeans(z: Rows, K: int, rng: np.random.Generator, steps: int = 20) -> Rows:
    """K codes for the vectors z (M, D), by Lloyd's steps from K of the vectors: (K, D), of z's library.

    Each step moves every code to the mean of the vectors that are nearest to it, and dead codes to vectors
    drawn at random; neither lets the mean squared distance rise. Raises ValueError on bad shapes and dtypes,
    NaN, infinities, K outside [1, M] and steps < 0.
    """
    raise Todo


def vq_np(z: np.ndarray, codes: np.ndarray, beta: float = 0.25, grad=None):
    """Quantisation, its loss, and the gradients by hand.

    z (M, D), codes (K, D), beta ≥ 0; grad = (dL/dquantised (M, D), dL/dloss), None = zeros and 1, which is
    the loss alone. Returns `((quantised (M, D), loss), (dz, dcodes))`. Raises ValueError as `nearest_np`
    does, for beta < 0, and for distances that overflow.
    """
    raise Todo


def vq(z: Tensor, codes: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor]:
    """Quantisation and its loss: z (M, D), codes (K, D) → (quantised (M, D), loss).

    The rows of quantised are those of codes, exactly; their gradient goes to z. Errors as in `vq_np`.
    """
    raise Todo
