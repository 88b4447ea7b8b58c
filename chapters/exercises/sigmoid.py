"""Yours to write: sigmoid_loss_np, sigmoid_loss, sigmoid_loss_fused.

`pytest tests/test_sigmoid.py` holds what you write here to the laws of minivlp/sigmoid.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp import stream
from tests import Todo


def sigmoid_loss_np(images: np.ndarray, texts: np.ndarray, scale: float, bias: float):
    """The sigmoid loss and its gradients by hand.

    images (B, D) and texts (B, D), row i of one the partner of row i of the other; scale = 1/τ > 0; bias
    finite. Returns `(loss in nats, (dimages, dtexts, dscale, dbias))`. Raises ValueError on bad
    shapes, mixed dtypes, NaN, infinities, B = 0, scale ≤ 0 and scores that overflow.
    """
    raise Todo


def sigmoid_loss(images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """The sigmoid loss: images (B, D), texts (B, D), scale = 1/τ > 0, bias → scalar in nats.

    Errors as in `sigmoid_loss_np`. Half precisions are added up in float32, also under autocast.
    """
    raise Todo


def sigmoid_loss_fused(images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """`sigmoid_loss` without S: a tile gives its part of the loss and of the gradients, and is forgotten.

    The same 3 products, less traffic. In units of B² numbers read or written: the plain rung moves some 25 to
    and from memory, S, z and what autograd makes of them; this one moves rows of Y and dY, 4 D/512 in all, as
    its tiles stay in the cache. It can be differentiated once. Arguments and errors as in `sigmoid_loss`.
    """
    raise Todo
