"""Yours to write: layer_norm_np, layer_norm.

`pytest tests/test_transformer.py` holds what you write here to the laws of minivlp/transformer.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from tests import Todo


def layer_norm_np(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-6, grad=None):
    """LayerNorm over the last axis and its gradients by hand.

    x (…, D), weight (D,), bias (D,), eps > 0 added to the variance, grad (…, D) the upstream gradient (None =
    ones). Returns `(out (…, D), (dx, dweight, dbias))`. Raises ValueError on bad shapes, mixed
    dtypes, NaN, infinities, eps ≤ 0 and a variance that overflows.
    """
    raise Todo


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis: x (…, D), weight (D,), bias (D,) → (…, D).

    Errors as in `layer_norm_np`. Half precisions are added up in float32.
    """
    raise Todo
