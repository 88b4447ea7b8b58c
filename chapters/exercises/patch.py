"""Yours to write: to_patches, patch_embed_np, patch_embed, patch_embed_fused.

`pytest tests/test_patch.py` holds what you write here to the laws of minivlp/patch.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp import stream
from minivlp.patch import from_patches
from tests import Todo


def to_patches(images, p: int):
    """Cut images (B, C, H, W) into patches (B, N, C·p·p), row-major over the grid, each in (C, p, p) order.

    Takes NumPy arrays and torch tensors. Raises ValueError when H or W is not a multiple of p.
    """
    raise Todo


def patch_embed_np(images: np.ndarray, weight: np.ndarray, bias: np.ndarray, grad: np.ndarray | None = None):
    """Patch embedding and its gradients by hand.

    images (B, C, H, W), weight (D, C, p, p), bias (D,), grad (B, N, D) the upstream gradient (None = ones).
    Returns `(out (B, N, D), (d images, d weight, d bias))`. Raises ValueError on bad shapes, mixed
    dtypes, NaN, infinities and sums that overflow.
    """
    raise Todo


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Patch embedding: images (B, C, H, W), weight (D, C, p, p), bias (D,) → (B, N, D), row-major patches.

    Raises ValueError as `patch_embed_np` does. Half precisions are added up in float32, also under autocast.
    """
    raise Todo


def patch_embed_fused(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`patch_embed` as a strided convolution, which reads the pixels where they lie; arguments as there.

    The plain rung first writes all pixels in the order of the patches, and keeps that copy for the gradient.
    In PyTorch on CPUs the convolution is the slower one all the same (`python -m minivlp bench --only
    patch`), so models take the plain rung.
    """
    raise Todo
