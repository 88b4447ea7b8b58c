"""Yours to write: logsumexp_np, unit_np, unit_grad_np, sinkhorn_np, sinkhorn, sinkhorn_cost_np,
sinkhorn_cost, sinkhorn_cost_fused.

`pytest tests/test_sinkhorn.py` holds what you write here to the laws of minivlp/sinkhorn.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.core.transport import MIN_NORM, alignment_grads, cosines, sinkhorn_scaled
from minivlp.sinkhorn import cosine, log_weights, log_weights_np
from tests import Todo


def logsumexp_np(x: np.ndarray, axis: int) -> np.ndarray:
    """log Σ exp(x) along one axis, shifted by the maximum so that nothing overflows."""
    raise Todo


def unit_np(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of x (…, D) divided by max(‖row‖, 1e-5); returns the rows and those divisors (…, 1)."""
    raise Todo


def unit_grad_np(unit: np.ndarray, length: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """The gradient of x given the gradient of its unit rows, both (…, D)."""
    raise Todo


def sinkhorn_np(
    cost: np.ndarray,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    eps: float = 0.05,
    iters: int = 100,
    row_mask: np.ndarray | None = None,
    col_mask: np.ndarray | None = None,
) -> np.ndarray:
    """The entropic transport plan (…, M, N) of cost (…, M, N), with exact row sums.

    a (…, M) and b (…, N) are the marginals, each summing to one; None is uniform over the real tokens (mask
    True). eps > 0 is in units of cost. Raises ValueError on bad shapes, dtypes, NaN, infinities, an
    all-False mask row, eps ≤ 0 or below the rounding of the costs, and marginals that are negative, do not
    sum to one or put weight on padding.
    """
    raise Todo


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    iters: int = 100,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
) -> Tensor:
    """The entropic transport plan (…, M, N); arguments and errors as in `sinkhorn_np`.

    Differentiable through every iteration, in memory for all of them; `sinkhorn_cost` holds the plan fixed
    instead. Half precisions are solved in float32, and the plan is returned in the dtype of the cost.
    """
    raise Todo


def sinkhorn_cost_np(
    x: np.ndarray,
    y: np.ndarray,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    eps: float = 0.05,
    iters: int = 100,
):
    """⟨T, C⟩ with C = 1 − cos(x, y) and T the Sinkhorn plan of C, and its gradients with T held fixed.

    x (M, D), y (N, D); a, b, eps, iters as in `sinkhorn_np` act through the plan only, so they have no
    gradient. Returns `(value, (d x, d y))`; the value lies in [0, 2]. Raises ValueError as `sinkhorn_np`
    does.
    """
    raise Todo


def sinkhorn_cost(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    iters: int = 100,
) -> Tensor:
    """⟨sg(T), C⟩ with C = 1 − cos: x (M, D), y (N, D) → scalar; otherwise as `sinkhorn_cost_np`."""
    raise Todo


def sinkhorn_cost_fused(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    iters: int = 100,
) -> Tensor:
    """`sinkhorn_cost` by products of the kernel with vectors and a gradient by hand; differentiable once.

    In units of M·N numbers an iteration of the plain rung reads and writes some 14, for two logsumexps of
    arrays that it makes; this one reads 1, because a block of rows is used for u and for the columns at once.
    """
    raise Todo
