"""Targets: what a model is asked to predict, written as one array of labels.

A label is the true id where something is predicted and −100 where nothing is, so that `mlm_loss` serves
hidden words, next words and picture codes alike.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require
from minivlp.mlm import IGNORE

Ids = TypeVar("Ids", np.ndarray, Tensor)


def next_words(ids: Ids, mask: Ids) -> Ids:
    """Labels for predicting the next word: at position i the word of position i + 1, (B, L) int64.

    ids (B, L) integers, mask (B, L) bool, True = a real word: −100 stands where the next word is not real,
    and at the last position. Arrays in, arrays out; tensors in, tensors out; `ids` stays as it was. Whoever
    takes these labels shifts nothing. Raises ValueError on bad shapes and dtypes.
    """
    library = Tensor if isinstance(ids, Tensor) else np.ndarray
    require.shapes(library, ids=(ids, "B L"), mask=(mask, "B L"))
    require.integers(ids=ids)
    require.mask("mask", mask)
    if isinstance(ids, Tensor):
        labels = torch.full(ids.shape, IGNORE, device=ids.device)
        labels[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:].long(), IGNORE)
    else:
        labels = np.full(ids.shape, IGNORE, dtype=np.int64)
        labels[:, :-1] = np.where(mask[:, 1:], ids[:, 1:].astype(np.int64), IGNORE)
    return labels


RUNGS = {"next_words": {"plain": next_words}}
