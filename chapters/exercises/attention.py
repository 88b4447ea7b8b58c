"""Yours to write: attention_np, attention, attention_fused.

`pytest tests/test_attention.py` holds what you write here to the laws of minivlp/attention.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import math

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from tests import Todo


def attention_np(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask=None, causal=False, grad=None):
    """Attention and its gradients by hand.

    q (B, H, Lq, d), k and v (B, H, Lk, d), mask bool broadcasting to (B, H, Lq, Lk), grad (B, H, Lq, d) the
    upstream gradient (None = ones). Returns `(out (B, H, Lq, d), (dq, dk, dv))`. Raises ValueError on bad
    shapes, mixed dtypes, NaN, infinities, when a query may see no key and when scores overflow.
    """
    raise Todo


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention: q (B, H, Lq, d), k and v (B, H, Lk, d) → (B, H, Lq, d).

    mask is bool, True = may look, and broadcasts to (B, H, Lq, Lk): a key padding mask (B, Lk) comes as
    `mask[:, None, None]`. Errors as in `attention_np`. Half precisions are added up in float32, also under
    autocast.
    """
    raise Todo


def attention_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """`attention` tile by tile; arguments and errors as there, differentiable once.

    In units of B·H·Lq·Lk numbers the plain rung moves S, its mask, its softmax and the gradients of both
    through memory, some 12; this one keeps tiles of them in the cache, and makes S twice for it.
    """
    raise Todo
