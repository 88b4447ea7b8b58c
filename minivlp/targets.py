"""Targets: what a model is asked to predict, and what is hidden from it for that.

A label is the true id where something is predicted and −100 where nothing is. One loss, `mlm_loss`, then
serves hidden words, next words and picture codes; the functions here and `mask_tokens` differ in where labels
stand:

    next_words      at every position the word that follows
    hide_patches    a share of a picture's patches, one by one or in blocks
    hide_side       in some pairs one side whole, so that all of it must be told by the other
    spans_to_end    spans cut out of a document, a mark left in their place, and appended behind it: a model
                    that writes from left to right fills in what it has seen on both sides

No function changes what it is given.

Sources: Xu et al. 2021 (VLM), for whole sides; Bao et al. 2022 (BEiT), algorithm 1, and Kwon et al. 2023
(MaskVLM), for blocks; Aghajanyan et al. 2022 (CM3), for spans.
Left out: BEiT's blocks of any shape; how many spans there are and where, which is the recipe's choice.
"""

from collections.abc import Sequence
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
    and at the last position. Arrays in, arrays out; tensors in, tensors out; `ids` keeps its values. Whoever
    takes these labels shifts nothing. Raises ValueError on bad shapes and dtypes.
    """
    library = Tensor if isinstance(ids, Tensor) else np.ndarray
    require.shapes(library, ids=(ids, "B L"), mask=(mask, "B L"))
    require.integers(ids=ids)
    require.mask("mask", mask)
    if isinstance(ids, Tensor):
        labels = torch.full(ids.shape, IGNORE, device=ids.device)
        labels[:, :-1] = ids[:, 1:].long().masked_fill(~mask[:, 1:], IGNORE)
    else:
        labels = np.full(ids.shape, IGNORE, dtype=np.int64)
        labels[:, :-1] = np.where(mask[:, 1:], ids[:, 1:].astype(np.int64), IGNORE)
    return labels


def hide_patches(
    grid: tuple[int, int], share: float, rng: np.random.Generator, block: int | None = None
) -> np.ndarray:
    """Which patches to hide: (rows · columns,) bool, row-major, True = hidden.

    grid (rows, columns), share in [0, 1]: round(share · rows · columns) patches are hidden. Without `block`
    any set of so many is as likely as another. With it, squares of block × block patches inside the grid are
    hidden one after the other; of the last one only its first patches, where the rest would be too many.
    Raises ValueError for a grid without patches, a share that is none, and blocks that do not fit.
    """
    rows, columns = grid
    if rows < 1 or columns < 1:
        require.fail("grid", "must have rows and columns", grid)
    if not 0 <= share <= 1:
        require.fail("share", "must lie between 0 and 1", share)
    require.generator(rng)
    count, hidden = round(share * rows * columns), np.zeros((rows, columns), dtype=bool)
    if block is None:
        hidden.flat[rng.permutation(hidden.size)[:count]] = True
        return hidden.ravel()
    if not 1 <= block <= min(rows, columns):
        require.fail("block", f"must lie between 1 and the shorter side of {rows} × {columns}", block)
    while (left := count - hidden.sum()) > 0:
        row, column = rng.integers(rows - block + 1), rng.integers(columns - block + 1)
        square = np.zeros_like(hidden)
        square[row : row + block, column : column + block] = True
        hidden.flat[np.flatnonzero(square & ~hidden)[:left]] = True
    return hidden.ravel()


def hide_side(
    patches: np.ndarray, words: np.ndarray, rng: np.random.Generator, p: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Hide one side of some pairs whole: `(hidden patches (B, N), hidden words (B, L))`, bool.

    patches (B, N) and words (B, L) bool say which tokens may be hidden: real ones, no special words. Each
    pair is chosen with probability p, independently; of a chosen pair either all of these patches or all of
    these words are hidden, with equal chance, and none of the other side. A pair that is not chosen has none
    hidden here, and is masked in the ordinary way. What is hidden must be hidden from all: replaced by the
    mask token, without mask_tokens' 80/10/10, which leaves a tenth readable. Raises ValueError on bad shapes,
    dtypes and p, and for a row without a token that may be hidden.
    """
    require.shapes(np.ndarray, patches=(patches, "B N"), words=(words, "B L"))
    require.mask("patches", patches, whole_rows=True)
    require.mask("words", words, whole_rows=True)
    require.generator(rng)
    if not 0 <= p <= 1:
        require.fail("p", "must be a probability", p)
    coin = rng.random((len(words), 1))  # (B, 1)
    return patches & (coin < p / 2), words & (p / 2 <= coin) & (coin < p)


def spans_to_end(
    ids: np.ndarray, spans: Sequence[tuple[int, int]], marks: Sequence[int], end: int
) -> np.ndarray:
    """A document with spans moved behind it: (L + 3 · spans,) int64.

    ids (L,) integers; spans (start, stop), in order and without overlap, start = stop for an empty one. In
    the place of span i stands marks[i]; behind the document follow, span by span, marks[i], its tokens and
    `end`. Marks are ids that the document does not have, more of them than spans do no harm. Raises
    ValueError on bad shapes and dtypes, spans that leave the document, overlap or go backwards, and marks
    that are too few, not all different, or in the document.
    """
    _check(ids, marks)
    if len(marks) < len(spans):
        require.fail("marks", f"must be one for each of {len(spans)} spans", len(marks))
    if np.isin(ids, marks).any():
        require.fail("marks", "must not occur in ids", ids[np.isin(ids, marks)][0])
    bounds = [0, *(place for span in spans for place in span), len(ids)]
    if any(len(span) != 2 for span in spans) or sorted(bounds) != bounds:
        rule = f"must be (start, stop) in order, without overlap, in 0 to {len(ids)}"
        require.fail("spans", rule, [tuple(span) for span in spans])
    body, tail, at = [], [], 0
    for (start, stop), mark in zip(spans, marks, strict=False):
        body += [ids[at:start], [mark]]
        tail += [[mark], ids[start:stop], [end]]
        at = stop
    return np.concatenate([*body, ids[at:], *tail]).astype(np.int64)


def spans_back(ids: np.ndarray, marks: Sequence[int], end: int) -> np.ndarray:
    """The inverse: what `spans_to_end` made becomes the document again, (L,) int64.

    ids as it gives them, marks as it takes them. Raises ValueError for a mark that does not occur twice, for
    spans in another order than their marks, and for a span without its end mark, as where a text was cut.
    """
    _check(ids, marks)
    places = sorted(tuple(np.flatnonzero(ids == mark)) for mark in marks if (ids == mark).any())
    if any(len(pair) != 2 for pair in places):
        require.fail("ids", "must hold a mark twice or not at all", ids.tolist())
    gaps, starts = [pair[0] for pair in places], [pair[1] for pair in places]
    if sorted(gaps + starts) != gaps + starts:
        require.fail("ids", "must have spans behind the document, in the order of their marks", ids.tolist())
    found, at = [], 0
    for gap, start, stop in zip(gaps, starts, [*starts[1:], len(ids)], strict=False):
        if ids[stop - 1] != end:
            require.fail("ids", f"must close every span by end={end}", ids.tolist())
        found += [ids[at:gap], ids[start + 1 : stop - 1]]
        at = gap + 1
    return np.concatenate([*found, ids[at : starts[0] if starts else len(ids)]]).astype(np.int64)


def _check(ids: np.ndarray, marks: Sequence[int]) -> None:
    require.shapes(np.ndarray, ids=(ids, "L"))
    require.integers(ids=ids)
    if len(set(marks)) < len(marks):
        require.fail("marks", "must be all different", list(marks))


RUNGS = {
    "next_words": {"plain": next_words},
    "hide_patches": {"plain": hide_patches},
    "hide_side": {"plain": hide_side},
    "spans_to_end": {"plain": spans_to_end},
}
