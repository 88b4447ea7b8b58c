"""Yours to write: visible, influence, leaks, attention_blocks_np, attention_blocks, attention_blocks_fused.

`pytest tests/test_masks.py` holds what you write here to the laws of minivlp/masks.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

from collections.abc import Iterable, Sequence
import math

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.attention import attend_tile, attention, attention_np
from minivlp.masks import Table
from tests import Todo


def visible(lengths: Sequence[int], sees: Table, causal: Sequence[int] = ()) -> np.ndarray:
    """Who sees whom, token by token: (L, L) bool, True where the row may look at the column.

    lengths: the numbers of tokens of S segments, in the order of the sequence; sees: S × S of 0 and 1,
    sees[s][t] = may segment s look at segment t; causal: the segments in which no token looks at a later one.
    The answer is a NumPy array: a model makes it a tensor once, `torch.from_numpy(visible(…))`. A row may be
    all False. Raises ValueError for lengths below 0, for a table of another size or with other entries, and
    for causal segments that are not there.
    """
    raise Todo


def influence(mask: np.ndarray, layers: int) -> np.ndarray:
    """Which outputs of a stack depend on which inputs: the Boolean power (mask or 1)^layers, (L, L) bool.

    mask (L, L) bool, True where the row may look at the column, as `visible` gives it; the 1 is the residual
    stream, so that 0 layers give the identity. Raises ValueError for a mask that is not square or not bool,
    and for layers below 0.
    """
    raise Todo


def leaks(mask: np.ndarray, layers: int, reads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The predictions that can be copied: of the pairs (i, t) in `reads` those whose i reaches t.

    mask (L, L) bool and layers as in `influence`. A pair (i, t) says that the output of position i is read to
    predict the token at position t; for next words t = i + 1. A token that is hidden in the input can be
    reached without harm: leave its pairs out. The answer keeps their order; no leak is an empty list. Raises
    ValueError as `influence` does, and for positions outside the sequence.
    """
    raise Todo


def attention_blocks_np(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths, sees, causal=(), grad: np.ndarray | None = None
):
    """Attention under the table and its gradients by hand.

    q, k and v (B, H, L, d); lengths, sees and causal as in `visible`, the lengths adding up to L; grad
    (B, H, L, d) the upstream gradient (None = ones). Returns `(out (B, H, L, d), (dq, dk, dv))`. Raises
    ValueError on what `visible` and `attention_np` refuse, on lengths with another sum, and when a token may
    see nothing.
    """
    raise Todo


def attention_blocks(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], sees: Table, causal: Sequence[int] = ()
) -> Tensor:
    """Attention under the table: q, k and v (B, H, L, d) → (B, H, L, d); arguments and errors as above."""
    raise Todo


def attention_blocks_fused(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], sees: Table, causal: Sequence[int] = ()
) -> Tensor:
    """`attention_blocks` block by block; arguments and errors as there, differentiable once.

    A query's running softmax goes on from one block of keys to the next, so the blocks that its segment may
    see are walked in place, with no mask and no copy of their keys, and the others are not touched.
    """
    raise Todo
