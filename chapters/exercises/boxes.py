"""Yours to write: giou_np, giou, box_loss_np, box_loss.

`pytest tests/test_boxes.py` holds what you write here to the laws of minivlp/boxes.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp.boxes import cxcywh_to_xyxy
from tests import Todo


def giou_np(a: np.ndarray, b: np.ndarray, grad: np.ndarray | None = None):
    """GIoU of boxes a and b (…, 4) as corners x₁ y₁ x₂ y₂, pair by pair, and its gradients by hand.

    grad (…) is the upstream gradient (None = ones). A box with swapped corners has no area. Returns `(value
    (…) in [−1, 1], (d a, d b))`. Raises ValueError on bad or different shapes, mixed dtypes, NaN or
    infinities.
    """
    raise Todo


def giou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes a and b (…, 4) as corners → (…), pair by pair; arguments and errors as in `giou_np`."""
    raise Todo


def box_loss_np(pred: np.ndarray, target: np.ndarray):
    """L1 plus GIoU loss of pred and target (n, 4), centre and size in fractions of the image; gradients too.

    Returns `(value ≥ 0, (d pred, d target))`; 0 with zero gradients for n = 0. Raises ValueError on bad
    shapes, mixed dtypes, NaN, infinities, and targets outside [0, 1].
    """
    raise Todo


def box_loss(pred: Tensor, target: Tensor) -> Tensor:
    """L1 plus GIoU loss of pred and target (n, 4) → scalar; arguments and errors as in `box_loss_np`."""
    raise Todo
