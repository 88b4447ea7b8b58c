"""Yours to write: chamfer_np, chamfer, chamfer_fused.

`pytest tests/test_chamfer.py` holds what you write here to the laws of minivlp/chamfer.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.chamfer import mean_max, mean_max_np
from minivlp.sinkhorn import cosine, unit, unit_grad_np, unit_np
from tests import Todo


def chamfer_np(
    x: np.ndarray,
    y: np.ndarray,
    x_mask: np.ndarray | None = None,
    y_mask: np.ndarray | None = None,
    grad: np.ndarray | None = None,
):
    """The Chamfer similarity of token sets and its gradients by hand.

    x (…, M, D), y (…, N, D), masks (…, M) and (…, N) with True = real; grad (…) is the upstream gradient
    (None = ones). Rows are divided by max(‖row‖, 1e-5). Returns `(value (…) in [−1, 1], (d x, d y))`. Raises
    ValueError on bad shapes, mixed dtypes, NaN, infinities, an empty set and an all-False mask row.
    """
    raise Todo


def chamfer(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """The Chamfer similarity: x (…, M, D), y (…, N, D) → (…); arguments and errors as in `chamfer_np`."""
    raise Todo


def chamfer_fused(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """`chamfer` without S: all that is kept is each token's best partner. Arguments and errors as there.

    1 product in place of 3, as G has M + N entries that are not 0: the gradients are gathers. In units of
    M · N numbers read or written: the plain rung moves some 16 to and from memory, S and the gradients of its
    maxima, mostly zeros; this one moves rows of y, D/512 in all, as its tiles stay in the cache. It can be
    differentiated once.
    """
    raise Todo
