"""Laws of targets: where labels stand, and what is hidden."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import targets
from minivlp.targets import next_words, spans_back, spans_to_end
from tests.laws import close, law, obeys, refuses
from tests.strategies import sizes


def often(share, draws, error=4.5):
    """How far a share of many draws may be from its chance: so many standard errors."""
    return error * np.sqrt(share * (1 - share) / draws) + 1e-9


@st.composite
def captions(draw):
    """ids (B, L) in several dtypes, mask (B, L) with real words anywhere."""
    B, L = draw(sizes(3)), draw(sizes(6))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    ids = rng.integers(0, 200, (B, L)).astype(draw(st.sampled_from([np.int64, np.int32, np.uint8])))
    return ids, rng.random((B, L)) < draw(st.sampled_from([0.5, 1.0]))


@law(
    "next_words",
    hint="Position i is asked for word i + 1, once; −100 where that is padding or beyond the end.",
)
@given(case=captions())
def each_position_is_asked_for_the_next_real_word(f, case):
    ids, mask = case
    wanted = np.full(ids.shape, -100)
    for b, i in np.ndindex(len(ids), ids.shape[1] - 1):
        if mask[b, i + 1]:
            wanted[b, i] = ids[b, i + 1]
    before = ids.copy()
    found = f(ids, mask)
    close(np.asarray(found), wanted)
    assert np.array_equal(ids, before), "ids were changed"


@st.composite
def grids(draw, blocks=False):
    """grid, share, rng and a block that fits, or None."""
    grid = draw(sizes(6)), draw(sizes(6))
    share = draw(st.sampled_from([0.0, 0.3, 0.6, 0.85, 1.0]))
    block = draw(st.integers(1, min(grid))) if blocks else None
    return grid, share, np.random.default_rng(draw(st.integers(0, 999))), block


@law(
    "hide_patches",
    hint="Not a coin for each: exactly round(share · rows · columns), as one row of bool.",
)
@given(case=grids(), other=grids(blocks=True))
def as_many_as_asked_for(f, case, other):
    for grid, share, rng, block in (case, other):
        hidden = np.asarray(f(grid, share, rng, block=block))
        count = round(share * grid[0] * grid[1])
        assert hidden.shape == (grid[0] * grid[1],) and hidden.dtype == bool
        assert hidden.sum() == count, f"{hidden.sum()} hidden of {hidden.size}, {count} were asked for"


@law("hide_patches", hint="Any set of so many patches is as likely as another: draw without replacement.")
def every_set_is_as_likely(f):
    rng, draws = np.random.default_rng(0), 3000
    sets = Counter(tuple(np.flatnonzero(f((2, 2), 0.5, rng)).tolist()) for _ in range(draws))
    assert len(sets) == 6, f"{len(sets)} of the 6 pairs of patches were ever hidden"
    for pair, times in sets.items():
        assert abs(times / draws - 1 / 6) <= often(1 / 6, draws), f"{pair} was hidden {times} times"


def squares(hidden, block):
    """All places of a block that are hidden whole, as one mask."""
    rows, columns = (n - block + 1 for n in hidden.shape)
    covered = np.zeros_like(hidden)
    for r, c in np.ndindex(rows, columns):
        if hidden[r : r + block, c : c + block].all():
            covered[r : r + block, c : c + block] = True
    return covered


@law("hide_patches", hint="Blocks lie inside the grid: none is cut by its edge, none wraps around.")
@given(case=grids(blocks=True))
def what_is_hidden_is_blocks(f, case):
    """All but the last block are whole; of the last one the rest fits in a block."""
    grid, share, rng, block = case
    hidden = np.asarray(f(grid, share, rng, block=block)).reshape(grid)
    rest = np.argwhere(hidden & ~squares(hidden, block))
    if len(rest):
        extent = rest.max(0) - rest.min(0) + 1
        assert (extent <= block).all() and len(rest) < block * block, f"no blocks:\n{hidden.astype(int)}"


@law(
    "hide_patches",
    hint="A block may lie anywhere inside the grid, at its far edges too, and as often.",
)
def a_block_may_lie_anywhere(f):
    rng, draws = np.random.default_rng(0), 3000
    places = Counter(int(np.asarray(f((3, 5), 4 / 15, rng, block=2)).argmax()) for _ in range(draws))
    assert sorted(places) == [0, 1, 2, 3, 5, 6, 7, 8], f"blocks begin at {sorted(places)}"
    for place, times in places.items():
        assert abs(times / draws - 1 / 8) <= often(1 / 8, draws), f"patch {place} came first {times} times"


@st.composite
def both_sides(draw, B=4):
    """patches (B, N), words (B, L): what may be hidden, somewhere in each row."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    sides = [rng.random((B, draw(sizes(6, 2)))) < 0.6 for _ in "ab"]
    for side in sides:
        side[np.arange(B), rng.integers(side.shape[1], size=B)] = True
    return sides, rng


@law("hide_side", hint="Of a chosen pair all of one side that may be hidden, and nothing of the other.")
@given(case=both_sides(), p=st.sampled_from([0.0, 0.5, 1.0]))
def one_side_is_hidden_whole(f, case, p):
    (patches, words), rng = case
    before = patches.copy(), words.copy()
    for _ in range(5):
        hidden = f(patches, words, rng, p)
        assert all(h.dtype == bool and h.shape == m.shape for h, m in zip(hidden, before, strict=True))
        for b in range(len(words)):
            of_patches, of_words = hidden[0][b], hidden[1][b]
            whole = np.array_equal(of_patches, patches[b]), np.array_equal(of_words, words[b])
            none = not of_patches.any(), not of_words.any()
            one = (whole[0] and none[1]) or (none[0] and whole[1])
            assert one or (all(none) and p < 1), f"{of_patches}, {of_words} of {patches[b]}, {words[b]}"
            assert p > 0 or all(none), "hidden with probability 0"
    assert all(np.array_equal(m, b) for m, b in zip((patches, words), before, strict=True)), "arrays changed"


@law("hide_side", hint="Each pair by itself: one side with probability p / 2, the other with p / 2.")
def each_pair_draws_for_itself(f):
    rng, p, draws = np.random.default_rng(0), 0.6, 2000
    some = np.ones((2, 3), dtype=bool)
    drawn = np.array([[side.any(1) for side in f(some, some, rng, p)] for _ in range(draws)])  # (draws, 2, 2)
    for side, pair in np.ndindex(2, 2):
        found = drawn[:, side, pair].mean()
        assert abs(found - p / 2) <= often(p / 2, draws), f"side {side}: {found:.0%}, not {p / 2:.0%}"
    both = (drawn[:, 0, 0] & drawn[:, 0, 1]).mean()
    assert abs(both - p * p / 4) <= often(p * p / 4, draws), "the pairs of a batch share their coin"


@st.composite
def documents(draw):
    """ids (L,), spans in order, some empty, marks that are too many, end."""
    L = draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    ids = rng.integers(0, 90, L).astype(draw(st.sampled_from([np.int64, np.uint8])))
    cuts = sorted(rng.integers(0, L + 1, 2 * draw(st.integers(0, 3))).tolist())
    spans = list(zip(cuts[::2], cuts[1::2], strict=True))
    marks = (100 + rng.permutation(5)).tolist()[: len(spans) + draw(st.integers(0, 2))]
    return ids, spans, marks, draw(st.sampled_from([99, 1000]))


@law("spans_to_end", hint="Nothing is lost, not by an empty span, nor at the end: there is an inverse.")
@given(case=documents())
def the_inverse_restores_the_document(f, case):
    ids, spans, marks, end = case
    before = ids.copy()
    moved = np.asarray(f(ids, spans, marks, end))
    assert np.array_equal(ids, before), "ids were changed"
    close(spans_back(moved, marks, end), ids.astype(np.int64))
    assert len(moved) == len(ids) + 3 * len(spans), "two marks and an end for each span, and all words"


@law("spans_to_end", hint="left mark₀ middle mark₁ right, then mark₀ span₀ end mark₁ span₁ end.")
@given(case=documents())
def equals_the_document_written_out(f, case):
    ids, spans, marks, end = case
    wanted, tail = [], []
    for place in range(len(ids) + 1):
        for n, (start, stop) in enumerate(spans):
            if start == place:
                wanted.append(marks[n])
                tail += [marks[n], *ids[start:stop].tolist(), end]
        if place < len(ids) and not any(start <= place < stop for start, stop in spans):
            wanted.append(int(ids[place]))
    close(f(*case), np.array(wanted + tail, dtype=np.int64))


@law("spans_back", hint="Every span goes to its first mark; marks and end marks go, and so do empty spans.")
@given(case=documents())
def the_document_comes_back(f, case):
    ids, spans, marks, end = case
    moved = spans_to_end(ids, spans, marks, end)
    before = moved.copy()
    close(f(moved, marks, end), ids.astype(np.int64))
    assert np.array_equal(moved, before), "ids were changed"


@law("spans_back", hint="The end mark is the last token of a span; the same id may also be a word of it.")
@given(case=documents())
def an_end_mark_may_be_a_word(f, case):
    ids, spans, marks, _ = case
    for end in np.unique(ids).tolist():
        close(f(spans_to_end(ids, spans, marks, end), marks, end), ids.astype(np.int64))


test_laws = obeys(targets)

ids, real = np.ones((2, 3), dtype=np.int64), np.ones((2, 3), dtype=bool)
rng = np.random.default_rng(0)
test_refusals = refuses(
    targets,
    [
        ("next_words", "one row", (ids[0], real[0]), {}, "ids must have shape"),
        ("next_words", "lengths differ", (ids, real[:, :2]), {}, "mask must have shape"),
        ("next_words", "numbers", (ids * 1.0, real), {}, "ids must have an integer dtype"),
        ("next_words", "mask of numbers", (ids, ids), {}, "mask must be bool"),
        ("hide_patches", "no rows", ((0, 3), 0.5, rng), {}, "grid must have rows and columns, got"),
        ("hide_patches", "percent", ((3, 3), 60, rng), {}, "share must lie between 0 and 1, got 60"),
        ("hide_patches", "a seed", ((3, 3), 0.5, 0), {}, "rng must be a numpy.random.Generator"),
        (
            "hide_patches",
            "too large",
            ((3, 5), 0.5, rng),
            {"block": 4},
            "block must lie between 1 and",
        ),
        (
            "hide_patches",
            "no block",
            ((3, 5), 0.5, rng),
            {"block": 0},
            "block must lie between 1 and",
        ),
        ("hide_side", "other pairs", (real, real[:1], rng), {}, "words must have shape"),
        ("hide_side", "numbers", (real, ids, rng), {}, "words must be bool"),
        ("hide_side", "nothing", (real, ~real, rng), {}, "words must have a True in every row"),
        ("hide_side", "no picture", (~real, real, rng), {}, "patches must have a True in every row"),
        ("hide_side", "percent", (real, real, rng, 50), {}, "p must be a probability, got 50"),
        ("hide_side", "a seed", (real, real, 0), {}, "rng must be a numpy.random.Generator"),
        ("spans_to_end", "two rows", (ids, [], [], 0), {}, "ids must have shape"),
        ("spans_to_end", "numbers", (ids[0] * 1.0, [], [], 0), {}, "ids must have an integer dtype"),
        ("spans_to_end", "few marks", (ids[0], [(0, 1)], [], 0), {}, "marks must be one for each of 1 spans"),
        ("spans_to_end", "a mark twice", (ids[0], [(0, 1)], [7, 7], 0), {}, "marks must be all different"),
        ("spans_to_end", "a word", (ids[0], [(0, 1)], [1], 0), {}, "marks must not occur in ids, got 1"),
        (
            "spans_to_end",
            "overlap",
            (ids[0], [(0, 2), (1, 3)], [7, 8], 0),
            {},
            "spans must be .start, stop.",
        ),
        ("spans_to_end", "backwards", (ids[0], [(2, 1)], [7], 0), {}, "spans must be .start, stop."),
        ("spans_to_end", "beyond", (ids[0], [(2, 4)], [7], 0), {}, "spans must be .start, stop."),
        (
            "spans_to_end",
            "no pair",
            (ids[0], [(0, 1, 2)], [7], 0),
            {},
            "spans must be .start, stop.",
        ),
        ("next_words", "two libraries", (ids, torch.from_numpy(real)), {}, "mask must be a NumPy array"),
    ],
)


def test_tensors_in_tensors_out():
    ids, mask = torch.tensor([[5, 200, 7, 0]], dtype=torch.uint8), torch.tensor([[True, True, True, False]])
    labels = next_words(ids, mask)
    assert labels.dtype == torch.int64 and labels.tolist() == [[200, 7, -100, -100]]
    assert next_words(ids.numpy(), mask.numpy()).tolist() == labels.tolist()


def test_a_document_and_back():
    document = np.array([10, 11, 12, 13, 14])
    moved = spans_to_end(document, [(1, 3)], [100], 2)
    assert moved.tolist() == [10, 100, 13, 14, 100, 11, 12, 2]
    assert spans_back(moved, [100, 101], 2).tolist() == document.tolist()
    assert spans_back(document, [100], 2).tolist() == document.tolist()


@pytest.mark.parametrize(
    "moved, message",
    [
        ([10, 100, 13, 100, 11, 12], "ids must close every span by end=2"),  # what cutting to a length leaves
        ([10, 100, 13, 100], "ids must close every span by end=2"),
        ([10, 100, 13], "ids must hold a mark twice or not at all"),
        ([100, 101, 101, 5, 2, 100, 6, 2], "in the order of their marks"),
        ([100, 100, 5, 2, 101, 101, 6, 2], "behind the document"),
    ],
)
def test_what_is_no_moved_document_is_refused(moved, message):
    with pytest.raises(ValueError, match=message):
        spans_back(np.array(moved), [100, 101], 2)
