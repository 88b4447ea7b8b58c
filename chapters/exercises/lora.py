"""Yours to write: lora_np, lora.

`pytest tests/test_lora.py` holds what you write here to the laws of minivlp/lora.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import at_least_float32, working_np
from tests import Todo


def lora_np(x: np.ndarray, weight: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float, grad=None):
    """The product and its gradients by hand.

    x (M, D), weight W (O, D), down A (r, D), up B (O, r), scale s > 0; grad (M, O) the upstream gradient
    (None = ones). Returns `(y (M, O), (dx, dweight, ddown, dup, dscale))`. Raises ValueError on bad shapes,
    mixed dtypes, NaN, infinities, scale ≤ 0 and results or changes of the weight that overflow.
    """
    raise Todo


def lora(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float | Tensor) -> Tensor:
    """x Wᵀ + s (x Aᵀ) Bᵀ: x (M, D), weight (O, D), down (r, D), up (O, r) → (M, O).

    Errors as in `lora_np`. Half precisions are added up in float32, also under autocast.
    """
    raise Todo
