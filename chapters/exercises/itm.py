"""Yours to write: derangement, hard_negatives, itm_loss_np, itm_loss.

`pytest tests/test_itm.py` holds what you write here to the laws of minivlp/itm.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import Todo


def derangement(n: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of 0 … n−1 that moves every element, (n,) int64, uniform over all such permutations.

    Uniform permutations are drawn until one has no fixed point. It has none with probability near 1/e
    (between 1/3 and 1/2 from n = 2 on), so about e draws of O(n) are needed on average, whatever n is.
    Raises ValueError for n < 2: a single pair has no other to swap with.
    """
    raise Todo


def hard_negatives(
    similarity: np.ndarray, rng: np.random.Generator, ids: np.ndarray | None = None
) -> np.ndarray:
    """For each row a wrong column, drawn by the softmax of the row over the legal ones: (B,) int64.

    similarity (B, B) finite; row i and column i are a true pair. It is not scaled here: multiply it by 1/τ
    before the call. ids (B,) integers, equal where pairs share an image or a caption: a column with the row's
    id is as illegal as the diagonal. Rows draw independently; a column may serve several rows.
    Raises ValueError on bad shapes, dtypes or entries, and when a row has no legal column.
    """
    raise Todo


def itm_loss_np(logits: np.ndarray, labels: np.ndarray):
    """Matching loss and its gradient by hand.

    logits (B, 2), column 1 speaks for a match; labels (B,) integers, 1 = match; loss in nats.
    Returns `(loss, (d logits,))`. Raises ValueError on bad shapes, dtypes, labels, NaN, infinities, and for
    B = 0.
    """
    raise Todo


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Matching loss: logits (B, 2), labels (B,) with 1 = match → scalar, in nats, the mean over pairs.

    Errors as in `itm_loss_np`. Half precisions are added up in float32.
    """
    raise Todo
