"""Texts with pictures through a model, in batches of texts of one length: no row needs padding or a mask."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.core.require import fail
from minivlp.data import Scene, scene_pixels
from minivlp.evaluation.splits import Tick, silent
from minivlp.text import WordPiece

BATCH = 64  # texts a forward pass: more of them leave the cache of a CPU, and each takes a fifth longer


def fitting_rows(tokenizer: WordPiece, texts: Sequence[str], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask (B, L) of the texts. Raises ValueError for a text of more than `longest` tokens."""
    ids, _, mask = tokenizer.batch(texts, longest + 1)
    if ids.shape[1] > longest:
        text = texts[int(mask.sum(1).argmax())]
        fail("texts", f"must fit the model's {longest} tokens with [CLS] and [SEP]", repr(text))
    return ids, mask


def equal_lengths(
    tokenizer: WordPiece, texts: Sequence[str], longest: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of texts of one length, `(rows (b,), ids (b, L))`, that together hold every text once."""
    ids, mask = fitting_rows(tokenizer, texts, longest)
    lengths = mask.sum(1)
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        for rows in np.split(same, range(BATCH, len(same), BATCH)):
            yield rows, ids[rows, :length]


def encoded(
    model: nn.Module, tokenizer: WordPiece, texts: Sequence[str], scenes: Sequence[Scene], tick: Tick = silent
) -> Iterator[tuple[np.ndarray, Tensor, dict[str, Tensor]]]:
    """Text i with picture i, in batches: `(rows (b,), ids (b, L), the states of model.encode)`.

    model: one with ViLT's `encode`, such as Vilt or Xvlm. tick(b) is called after each batch of b texts.
    """
    device = next(model.parameters()).device
    for rows, ids in equal_lengths(tokenizer, texts, model.config.max_text_len):
        words, pixels = torch.from_numpy(ids).to(device), scene_pixels([scenes[i] for i in rows]).to(device)
        yield rows, words, model.encode(words, torch.ones_like(words, dtype=torch.bool), pixels)
        tick(len(rows))
