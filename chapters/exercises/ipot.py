"""Yours to write: ipot_np, ipot, wpa_np, wpa, wpa_fused, alignment_masks.

`pytest tests/test_ipot.py` holds what you write here to the laws of minivlp/ipot.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.core.transport import cosines, gibbs, ipot_scalings
from minivlp.sinkhorn import cosine, log_weights, log_weights_np, logsumexp_np, unit_grad_np, unit_np
from tests import Todo


def ipot_np(
    cost: np.ndarray,
    beta: float = 0.5,
    iters: int = 50,
    row_mask: np.ndarray | None = None,
    col_mask: np.ndarray | None = None,
) -> np.ndarray:
    """The plan (…, M, N) after `iters` proximal steps on cost (…, M, N), uniform over the real tokens.

    Masks (…, M) and (…, N) are bool, True = real; padded rows and columns of the plan are 0. beta > 0 is in
    units of cost. Row sums are exact. Raises ValueError on bad shapes, dtypes, NaN, infinities, an
    all-False mask row, iters < 1, and beta ≤ 0 or below the rounding of the costs.
    """
    raise Todo


@torch.no_grad()
def ipot(
    cost: Tensor,
    beta: float = 0.5,
    iters: int = 50,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
) -> Tensor:
    """The plan (…, M, N), detached; arguments and errors as in `ipot_np`.

    Half precisions are solved in float32, and the plan is returned in the dtype of the cost.
    """
    raise Todo


def wpa_np(
    words: np.ndarray,
    patches: np.ndarray,
    word_mask: np.ndarray | None = None,
    patch_mask: np.ndarray | None = None,
    beta: float = 0.5,
    iters: int = 50,
    grad: np.ndarray | None = None,
):
    """Word-patch alignment ⟨T, C⟩ per pair and its gradients with T held fixed.

    words (B, L, D), patches (B, N, D), masks (B, L) and (B, N) with True = a token that takes part; grad (B,)
    is the upstream gradient (None = ones). beta and iters act through the plan only, so they have no
    gradient. Returns `(value (B,) in [0, 2], (d words, d patches))`. Raises ValueError as `ipot_np` does.
    """
    raise Todo


def wpa(
    words: Tensor,
    patches: Tensor,
    word_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    beta: float = 0.5,
    iters: int = 50,
) -> Tensor:
    """⟨sg(T), C⟩ per pair: words (B, L, D), patches (B, N, D) → (B,); arguments and errors as in `wpa_np`."""
    raise Todo


def wpa_fused(
    words: Tensor,
    patches: Tensor,
    word_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    beta: float = 0.5,
    iters: int = 50,
) -> Tensor:
    """`wpa` by products of a kernel with vectors and a gradient by hand; differentiable once.

    In units of L·N numbers a step of the plain rung reads and writes some 20 and takes two logsumexps, and
    this rung reads 4 and writes 1, in the cache. It never makes unit copies of the tokens nor the gradients
    of those copies, which the plain rung moves through memory 12 times. Padding behind the longest caption
    and the largest picture of a group is skipped. Arguments and errors as in `wpa_np`.
    """
    raise Todo


def alignment_masks(text_mask: Tensor) -> Tensor:
    """The words that take part in ViLT's alignment: text_mask (B, L), True = real → word mask (B, L).

    Left out are padding, the first real token ([CLS]) and the last ([SEP]), neither of which names anything.
    On the image side drop the class token likewise: `wpa(text, image[:, 1:], word_mask, image_mask[:, 1:])`.
    A caption without words gives an all-False row, which `wpa` refuses. Raises ValueError unless text_mask is
    bool (B, L).
    """
    raise Todo
