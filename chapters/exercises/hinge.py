"""Yours to write: hinge_np, hinge.

`pytest tests/test_hinge.py` holds what you write here to the laws of minivlp/hinge.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from tests import Todo


def hinge_np(images: np.ndarray, texts: np.ndarray, margin: float = 0.2, hardest: bool = True):
    """The hinge loss and its gradients by hand.

    images (B, D) and texts (B, D), row i of one the partner of row i of the other; margin > 0 in units of S.
    With `hardest` one negative counts in each row and column, else all. Returns `(loss, (dimages, dtexts))`,
    the loss summed over the batch.
    Raises ValueError on bad shapes, mixed dtypes, NaN, infinities, B = 0, margin ≤ 0 and scores that
    overflow.
    """
    raise Todo


def hinge(images: Tensor, texts: Tensor, margin: float = 0.2, hardest: bool = True) -> Tensor:
    """The hinge loss: images (B, D), texts (B, D) → scalar, summed over the batch.

    With `hardest` one negative counts in each row and column, else all. Errors as in `hinge_np`. Half
    precisions are added up in float32, also under autocast.
    """
    raise Todo
