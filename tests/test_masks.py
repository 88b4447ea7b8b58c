"""Laws of masks: the table, what it lets through, and attention on its blocks alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minivlp import masks
from minivlp.masks import FULL, PREFIX, TOWERS
from tests.laws import close, law, obeys
from tests.strategies import sizes

# (lengths, sees, causal) of the systems in the docstring of minivlp.masks and of others.
SYSTEMS = {
    "ViLT": ((3, 4), FULL, ()),
    "two towers": ((3, 4), TOWERS, (0,)),
    "prefix language model": ((4, 3), PREFIX, (1,)),
    "plain language model": ((4, 3), PREFIX, (0, 1)),
    "CoCa's first half": ((4, 1), PREFIX, (0,)),
    "one side reads the other": ((3, 4), ((1, 1), (0, 1)), ()),
    "captions of videos": ((1, 3, 3), ((1, 1, 0), (1, 1, 0), (1, 1, 1)), (2,)),
}


@st.composite
def tables(draw, segments=4, most=4, whole_rows=False):
    """lengths, sees, causal: segments without tokens, tables with empty rows, any segments causal."""
    S = draw(sizes(segments))
    lengths = tuple(draw(st.integers(0, most)) for _ in range(S))
    sees = np.random.default_rng(draw(st.integers(0, 999))).random((S, S)) < 0.6
    if whole_rows:
        lengths = (max(lengths[0], 1), *lengths[1:])
        sees[:, 0] |= ~sees[:, np.array(lengths) > 0].any(1)
    causal = tuple(s for s in range(S) if draw(st.booleans()))
    return lengths, tuple(tuple(int(x) for x in row) for row in sees), causal


def slow_visible(lengths, sees, causal):
    """Token by token."""
    segment = [s for s, n in enumerate(lengths) for _ in range(n)]
    wanted = np.zeros((len(segment), len(segment)), dtype=bool)
    for i, s in enumerate(segment):
        for j, t in enumerate(segment):
            future = s == t and s in causal and j > i
            wanted[i, j] = bool(sees[s][t]) and not future
    return wanted


def same_mask(got, wanted):
    got = np.asarray(got)
    assert got.dtype == bool, f"the mask must be bool, not {got.dtype}"
    close(got.astype(int), wanted.astype(int))


@law(
    "visible", hint="Row i may see column j where sees[s(i)][s(j)], but no later token of its causal segment."
)
@given(case=tables())
def equals_the_slow_loop(f, case):
    same_mask(f(*case), slow_visible(*case))


@law(
    "visible", hint="Causal stops the future inside one segment; what a table allows elsewhere stays allowed."
)
@given(case=tables(), seed=st.integers(0, 99))
def the_layout_means_nothing(f, case, seed):
    """Segments in another order: the same table and mask, with rows and columns in another order."""
    (lengths, sees, causal), S = case, len(case[0])
    order = np.random.default_rng(seed).permutation(S)
    moved = (
        tuple(lengths[s] for s in order),
        tuple(tuple(sees[s][t] for t in order) for s in order),
        tuple(i for i, s in enumerate(order) if s in causal),
    )
    starts = np.cumsum([0, *lengths])
    places = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in order]).astype(int)
    same_mask(f(*moved), np.asarray(f(*case))[np.ix_(places, places)])


test_laws = obeys(masks)
