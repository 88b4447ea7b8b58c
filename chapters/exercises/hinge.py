"""Yours to write: hinge_np, hinge.

`pytest tests/test_hinge.py` holds what you write here to the laws of minivlp/hinge.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from tests import Todo


def hinge_np(x: np.ndarray, y: np.ndarray, margin: float = 0.2, hardest: bool = True):
    """The hinge loss and its gradients by hand.

    x (B, D), y (B, D) with row i of one the partner of row i of the other, margin > 0 in units of S; hardest:
    one negative a row and a column, else all. Returns `(loss, (dx, dy))`, the loss summed over the batch.
    Raises ValueError on bad shapes, dtypes, NaN, B = 0 or margin ≤ 0.
    """
    raise Todo


def hinge(x: Tensor, y: Tensor, margin: float = 0.2, hardest: bool = True) -> Tensor:
    """The hinge loss: x (B, D), y (B, D) → scalar, summed over the batch.

    With `hardest` one negative counts in each row and column, else all. Errors as in `hinge_np`.
    """
    raise Todo
