"""Yours to write: infonce_np, infonce, infonce_fused.

`pytest tests/test_infonce.py` holds what you write here to the laws of minivlp/infonce.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import math

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from tests import Todo


def infonce_np(images: np.ndarray, texts: np.ndarray, scale: float):
    """InfoNCE and its gradients by hand.

    images (B, D) and texts (B, D), row i of one the partner of row i of the other; scale = 1/τ > 0.
    Returns `(loss in nats, (dimages, dtexts, dscale))`.
    Raises ValueError on bad shapes, mixed dtypes, NaN, infinities, B = 0, scale ≤ 0 and scores that overflow.
    """
    raise Todo


def infonce(images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
    """InfoNCE: images (B, D), texts (B, D), scale = 1/τ > 0 → scalar in nats.

    Errors as in `infonce_np`. Half precisions are added up in float32, also under autocast.
    """
    raise Todo


def infonce_fused(images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
    """`infonce` without S, whose tiles are made twice: for the normalisers, then for the gradients.

    4 products in place of 3, less traffic. In units of B² numbers read or written: the plain rung moves some
    24 to and from memory, S, its two softmaxes and what autograd makes of them; this one moves rows of Y and
    dY, 5 D/512 in all, as its tiles stay in the cache. It can be differentiated once. Arguments and errors as
    in `infonce`.
    """
    raise Todo
