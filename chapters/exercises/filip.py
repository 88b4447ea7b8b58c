"""Yours to write: late_interaction_np, late_interaction, filip_np, filip.

`pytest tests/test_filip.py` holds what you write here to the laws of minivlp/filip.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp.chamfer import mean_max, mean_max_np
from minivlp.sinkhorn import logsumexp_np, unit, unit_grad_np, unit_np
from tests import Todo


def late_interaction_np(x: np.ndarray, y: np.ndarray, x_mask=None, y_mask=None, grad=None):
    """The similarity from all sets of tokens x to all sets y, and its gradients by hand.

    x (A, M, D), y (B, N, D), masks (A, M) and (B, N) with True = real; grad (A, B) the upstream
    gradient (None = ones). Rows are divided by max(‖row‖, 1e-5). Returns `(value (A, B) in [−1, 1], (dx,
    dy))`: entry (a, b) is the mean over a's tokens of the largest cosine with one of b's. Raises
    ValueError on bad shapes, mixed dtypes, NaN, infinities, no set or no token, and an all-False mask row.
    """
    raise Todo


def late_interaction(
    x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None
) -> Tensor:
    """The similarity from all sets of tokens x (A, M, D) to all sets y (B, N, D): (A, B).

    For FILIP x are images and y texts, or the reverse: the other direction is `late_interaction(y, x, y_mask,
    x_mask).T`. Arguments and errors as in `late_interaction_np`.
    """
    raise Todo


def filip_np(images: np.ndarray, texts: np.ndarray, scale: float, image_mask=None, text_mask=None):
    """The contrastive loss of late interaction and its gradients by hand.

    images (B, M, D) and texts (B, N, D), row i of one the partner of row i of the other; scale = 1/τ > 0;
    masks (B, M) and (B, N) with True = real. Returns `(loss in nats, (dimages, dtexts, dscale))`. Raises
    ValueError as `late_interaction_np` does, and when scale ≤ 0.
    """
    raise Todo


def filip(
    images: Tensor,
    texts: Tensor,
    scale: float | Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Tensor:
    """The contrastive loss of late interaction: images (B, M, D), texts (B, N, D), scale = 1/τ → scalar,
    nats.

    Arguments and errors as in `filip_np`.
    """
    raise Todo
