"""Yours to write: next_words, hide_patches, spans_to_end, hide_side, spans_back.

`pytest tests/test_targets.py` holds what you write here to the laws of minivlp/targets.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

from collections.abc import Sequence

import numpy as np

from minivlp.mlm import IGNORE
from minivlp.targets import Ids
from tests import Todo


def next_words(ids: Ids, mask: Ids) -> Ids:
    """Labels for predicting the next word: at position i the word of position i + 1, (B, L) int64.

    ids (B, L) integers, mask (B, L) bool, True = a real word: −100 stands where the next word is not real,
    and at the last position. Arrays in, arrays out; tensors in, tensors out; `ids` keeps its values. Whoever
    takes these labels shifts nothing. Raises ValueError on bad shapes and dtypes.
    """
    raise Todo


def hide_patches(
    grid: tuple[int, int], share: float, rng: np.random.Generator, block: int | None = None
) -> np.ndarray:
    """Which patches to hide: (rows · columns,) bool, row-major, True = hidden.

    grid (rows, columns), share in [0, 1]: round(share · rows · columns) patches are hidden. Without `block`
    any set of so many is as likely as another. With it, squares of block × block patches inside the grid are
    hidden one after the other; of the last one only its first patches, where the rest would be too many.
    Raises ValueError for a grid without patches, a share that is none, and blocks that do not fit.
    """
    raise Todo


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
    raise Todo


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
    raise Todo


def spans_back(ids: np.ndarray, marks: Sequence[int], end: int) -> np.ndarray:
    """The inverse: what `spans_to_end` made becomes the document again, (L,) int64.

    ids as it gives them, marks as it takes them. Raises ValueError for a mark that does not occur twice, for
    spans in another order than their marks, and for a span without its end mark, as where a text was cut.
    """
    raise Todo
