"""Yours to write: attention_pool_np, attention_pool.

`pytest tests/test_pooling.py` holds what you write here to the laws of minivlp/pooling.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tests import Todo


def attention_pool_np(queries: np.ndarray, x: np.ndarray, mask=None, grad: np.ndarray | None = None):
    """Attention pooling and its gradients by hand.

    queries (Q, D), x (B, N, D), mask (B, N) or (N,) bool, True = real, with a True in every row; grad
    (B, Q, D) the upstream gradient (None = ones). Returns `(out (B, Q, D), (dqueries, dx))`. Raises
    ValueError on bad shapes, mixed dtypes, NaN, infinities, a picture without a token and scores that
    overflow.
    """
    raise Todo


def attention_pool(queries: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention pooling: queries (Q, D), x (B, N, D), mask (B, N) or (N,) → (B, Q, D).

    Errors as in `attention_pool_np`. Half precisions are added up in float32, also under autocast.
    """
    raise Todo
