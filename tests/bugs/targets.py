"""Plausible wrong targets."""

import numpy as np

from minivlp.targets import hide_patches, hide_side, next_words, spans_back, spans_to_end
from tests.laws import bug

NEXT = "each_position_is_asked_for_the_next_real_word"
COUNT, UNIFORM = "as_many_as_asked_for", "every_set_is_as_likely"
BLOCKS, ANYWHERE = "what_is_hidden_is_blocks", "a_block_may_lie_anywhere"
WHOLE, COIN = "one_side_is_hidden_whole", "each_pair_draws_for_itself"
BACK, WRITTEN = "the_inverse_restores_the_document", "equals_the_document_written_out"


@bug("next_words", NEXT, "Shifted by model and caller: the word after the next.", rung="plain")
def double_shift(ids, mask):
    labels = next_words(ids, mask)
    labels[:, :-1], labels[:, -1] = labels[:, 1:].copy(), -100
    return labels


@bug("next_words", NEXT, "Not shifted: each position is asked for its own word.", rung="plain")
def no_shift(ids, mask):
    return np.where(mask, ids.astype(np.int64), -100)


@bug("next_words", NEXT, "Padding, or a prefix, is predicted: the mask is not looked at.", rung="plain")
def loss_on_prefix(ids, mask):
    return next_words(ids, np.ones_like(mask))


@bug(
    "next_words", NEXT, "Whether the reader is real, not whether the word that it predicts is.", rung="plain"
)
def mask_of_the_reader(ids, mask):
    return np.where(mask, next_words(ids, np.ones_like(mask)), -100)


@bug("next_words", NEXT, "The last position is asked for the first word.", rung="plain")
def wraps_around(ids, mask):
    return np.where(np.roll(mask, -1, 1), np.roll(ids, -1, 1).astype(np.int64), -100)


@bug("next_words", NEXT, "The caller's ids become the labels.", rung="plain")
def labels_mutated(ids, mask):
    labels = next_words(ids, mask)
    if ids.dtype == np.int64:
        ids[:] = labels
    return labels


@bug("next_words", NEXT, "−100 written in the dtype of the ids: 156 in eight bits.", rung="plain")
def eight_bits(ids, mask):
    return next_words(ids, mask).astype(ids.dtype)


@bug("next_words", NEXT, "0 where nothing is predicted, which is a word.", rung="plain")
def zero_for_nothing(ids, mask):
    return np.where(next_words(ids, mask) == -100, 0, next_words(ids, mask))


@bug("hide_patches", COUNT, "A coin for each patch.", rung="plain")
def bernoulli(grid, share, rng, block=None):
    return rng.random(grid[0] * grid[1]) < share


@bug("hide_patches", COUNT, "Rounded down.", rung="plain")
def rounded_down(grid, share, rng, block=None):
    cells = grid[0] * grid[1]
    return hide_patches(grid, int(share * cells) / cells, rng, block)


@bug("hide_patches", COUNT, "True for what is kept.", rung="plain")
def kept_not_hidden(grid, share, rng, block=None):
    return ~hide_patches(grid, share, rng, block)


@bug("hide_patches", COUNT, "The last block is hidden whole, however many are too many.", rung="plain")
def last_block_whole(grid, share, rng, block=None):
    hidden = hide_patches(grid, share, rng, block)
    if block is None or not hidden.any():
        return hidden
    hidden, at = hidden.reshape(grid), np.argwhere(hidden.reshape(grid))[-1]
    row, column = np.minimum(at, np.array(grid) - block)
    hidden[row : row + block, column : column + block] = True
    return hidden.ravel()


@bug("hide_patches", UNIFORM, "The first patches, from a random one on.", rung="plain")
def one_run(grid, share, rng, block=None):
    cells, hidden = grid[0] * grid[1], np.zeros(grid[0] * grid[1], dtype=bool)
    if block is not None:
        return hide_patches(grid, share, rng, block)
    hidden[(rng.integers(cells) + np.arange(round(share * cells))) % cells] = True
    return hidden


@bug("hide_patches", UNIFORM, "The same patches at every call: a generator of its own.", rung="plain")
def own_seed(grid, share, rng, block=None):
    return hide_patches(grid, share, np.random.default_rng(0), block)


@bug("hide_patches", BLOCKS, "Blocks are not looked at.", rung="plain")
def block_ignored(grid, share, rng, block=None):
    return hide_patches(grid, share, rng)


def by_blocks(grid, share, rng, block, highest, wrap):
    """Blocks whose first patch lies below `highest`, cut at the edge or wrapped around it."""
    if block is None:
        return hide_patches(grid, share, rng)
    count, hidden = round(share * grid[0] * grid[1]), np.zeros(grid, dtype=bool)
    while (left := count - hidden.sum()) > 0:
        rows, columns = (rng.integers(n) + np.arange(block) for n in highest)
        if wrap:
            rows, columns = rows % grid[0], columns % grid[1]
        square = np.zeros(grid, dtype=bool)
        square[np.ix_(rows[rows < grid[0]], columns[columns < grid[1]])] = True
        hidden.flat[np.flatnonzero(square & ~hidden)[:left]] = True
    return hidden.ravel()


@bug("hide_patches", BLOCKS, "A block may begin at any patch and is cut at the edge.", rung="plain")
def cut_at_the_edge(grid, share, rng, block=None):
    return by_blocks(grid, share, rng, block, grid, wrap=False)


@bug("hide_patches", BLOCKS, "A block that leaves the grid comes in again on the other side.", rung="plain")
def around_the_edge(grid, share, rng, block=None):
    return by_blocks(grid, share, rng, block, grid, wrap=True)


@bug("hide_patches", ANYWHERE, "rng.integers(rows − block) never begins in the last place.", rung="plain")
def never_at_the_far_edge(grid, share, rng, block=None):
    if block is None or share > 0.5:
        return hide_patches(grid, share, rng, block)
    highest = [max(1, n - block) for n in grid]
    if round(share * grid[0] * grid[1]) > np.prod(np.minimum(highest + np.array(block), grid)) - block:
        return hide_patches(grid, share, rng, block)
    return by_blocks(grid, share, rng, block, highest, wrap=False)


@bug("hide_side", WHOLE, "A tenth of the hidden words stays readable, as in mask_tokens.", rung="plain")
def all_hidden_80_10_10(patches, words, rng, p=0.5):
    hidden, all_words = hide_side(patches, words, rng, p)
    return hidden, all_words & (rng.random(words.shape) >= 0.1)


@bug("hide_side", WHOLE, "Special words and padding are hidden too.", rung="plain")
def specials_hidden(patches, words, rng, p=0.5):
    return tuple(h.any(1, keepdims=True) | np.zeros_like(h) for h in hide_side(patches, words, rng, p))


@bug("hide_side", WHOLE, "Both sides of a chosen pair: nothing is left to tell them by.", rung="plain")
def both_sides_hidden(patches, words, rng, p=0.5):
    chosen = rng.random((len(words), 1)) < p
    return patches & chosen, words & chosen


@bug("hide_side", WHOLE, "The arrays given are the arrays changed.", rung="plain")
def sides_mutated(patches, words, rng, p=0.5):
    found = hide_side(patches, words, rng, p)
    patches[:], words[:] = found
    return patches, words


@bug("hide_side", COIN, "One coin for the batch.", rung="plain")
def one_coin(patches, words, rng, p=0.5):
    coin = rng.random()
    return patches & (coin < p / 2), words & (p / 2 <= coin < p)


@bug("hide_side", COIN, "Each side with probability p, the patches first.", rung="plain")
def patches_first(patches, words, rng, p=0.5):
    coin, other = rng.random((2, len(words), 1))
    return patches & (coin < p), words & (coin >= p) & (other < p)


@bug("hide_side", COIN, "Always the words.", rung="plain")
def words_only(patches, words, rng, p=0.5):
    return np.zeros_like(patches), words & (rng.random((len(words), 1)) < p)


@bug(
    "spans_to_end",
    BACK,
    "The mark overwrites the word at an empty span, which is appended nowhere.",
    rung="plain",
)
def empty_span_loses_word(ids, spans, marks, end):
    body, tail, at = [], [], 0
    for (start, stop), mark in zip(spans, marks, strict=False):
        body += [*ids[at:start].tolist(), mark]
        tail += [mark, *ids[start:stop].tolist(), end]
        at = max(stop, start + 1)
    return np.array([*body, *ids[at:].tolist(), *tail], dtype=np.int64)


@bug(
    "spans_to_end",
    BACK,
    "Cut to the length it had, and two for each span: the last end mark goes.",
    rung="plain",
)
def end_mark_cut(ids, spans, marks, end):
    return spans_to_end(ids, spans, marks, end)[: len(ids) + 2 * len(spans)]


@bug("spans_to_end", BACK, "One end mark, behind the last span.", rung="plain")
def one_end_mark(ids, spans, marks, end):
    moved = spans_to_end(ids, spans, marks, -5)
    return np.append(moved[moved != -5], [end] * bool(spans))


@bug("spans_to_end", BACK, "The spans are copied behind the document, and stay in it.", rung="plain")
def spans_copied(ids, spans, marks, end):
    moved = spans_to_end(ids, spans, marks, end)
    return np.concatenate([ids, moved[len(moved) - sum(b - a + 2 for a, b in spans) :]])


@bug("spans_to_end", BACK, "The document is cut in place.", rung="plain")
def document_mutated(ids, spans, marks, end):
    moved = spans_to_end(ids, spans, marks, end)
    for start, stop in spans:
        ids[start:stop] = 0
    return moved


@bug("spans_to_end", WRITTEN, "Marks are dealt out from the last.", rung="plain")
def marks_from_the_last(ids, spans, marks, end):
    return spans_to_end(ids, spans, marks[::-1], end)


@bug("spans_to_end", WRITTEN, "The marks of the first two spans are exchanged.", rung="plain")
def marks_exchanged(ids, spans, marks, end):
    return spans_to_end(ids, spans, [*marks[:2][::-1], *marks[2:]] if len(spans) > 1 else marks, end)


HOME, WORD = "the_document_comes_back", "an_end_mark_may_be_a_word"


def put_back(ids, marks, last=1, least=0, kept=0, closes=None):
    """`spans_back` with room for a mistake: how much of a span and of its hole is cut off."""
    places = sorted(np.flatnonzero(ids == mark).tolist() for mark in marks if (ids == mark).any())
    starts = [second for _, second in places] + [len(ids)]
    found, at = [], 0
    for (hole, start), stop in zip(places, starts[1:], strict=True):
        span = ids[start + 1 : stop - last]
        span = span[: [*span.tolist(), closes].index(closes)]
        found += [*ids[at : hole + kept], *(span if len(span) >= least else [])]
        at = hole + 1
    return np.array([*found, *ids[at : starts[0]]], dtype=np.int64)


@bug("spans_back", HOME, "The end marks are left in.", rung="plain")
def end_marks_left(ids, marks, end):
    return put_back(ids, marks, last=0)


@bug("spans_back", HOME, "The marks of the holes are left in.", rung="plain")
def holes_left(ids, marks, end):
    return put_back(ids, marks, kept=1)


@bug("spans_back", HOME, "A span of one token is taken for an empty one.", rung="plain")
def short_spans_lost(ids, marks, end):
    return put_back(ids, marks, least=2)


@bug("spans_back", HOME, "Marks are struck out, and the spans stay at the end.", rung="plain")
def spans_left_behind(ids, marks, end):
    return ids[~np.isin(ids, [*marks, end])].astype(np.int64)


@bug("spans_back", HOME, "The first span comes back, and no other.", rung="plain")
def first_span_alone(ids, marks, end):
    whole, used = spans_back(ids, marks, end), [m for m in marks if (ids == m).any()]
    return whole if len(used) < 2 else put_back(ids, used[:1])


@bug("spans_back", WORD, "The span ends at the first end mark in it.", rung="plain")
def first_end_closes(ids, marks, end):
    return put_back(ids, marks, closes=end)
