"""Yours to write: wordpiece, learn_vocab.

`pytest tests/test_text.py` holds what you write here to the laws of minivlp/text.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from minivlp.text import SPECIALS
from tests import Todo


def wordpiece(word: str, vocab: Mapping[str, int], unknown: str = "[UNK]", longest: int = 100) -> list[str]:
    """Cut one word from the left into the longest pieces of `vocab`; all but the first are written ##piece.

    Returns `[unknown]` when some rest has no piece in `vocab` or the word is over `longest` characters.
    """
    raise Todo


def learn_vocab(
    counts: Mapping[str, int], vocab_size: int, min_count: int = 2, alphabet: int = 1000
) -> list[str]:
    """Learn a vocabulary from {word: occurrences} by merging, again and again, the pair of the largest score.

    Returns the tokens in order of ids: the special tokens, the single characters (at most `alphabet`, the
    most frequent, sorted), the merged pieces in the order of their merges; fewer than `vocab_size` when no
    pair is left. A pair must occur `min_count` times: two pieces seen once, together, would have the largest
    score there is. Of equal scores the more frequent pair wins, then the alphabetically first. A quotient of
    integers is correctly rounded, so equal fractions are equal floats and every machine learns the same.
    Raises ValueError when `vocab_size` leaves no room for the single characters.
    """
    raise Todo
