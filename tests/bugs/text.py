"""Plausible wrong cuts into word pieces, and wrong ways of learning them."""

from collections import Counter
from itertools import pairwise

from minivlp.text import SPECIALS, learn_vocab, wordpiece
from tests.laws import bug

JOIN, LONGEST = "pieces_join_to_the_word", "every_piece_is_the_longest"
DEAD_END, LIMIT = "unknown_only_at_a_dead_end", "over_100_characters_is_unknown"
FIRST, LOOP = "specials_and_characters_come_first", "equals_the_slow_loop"
KEPT = "only_frequent_characters_are_kept"


@bug("wordpiece", JOIN, "Continuations are looked up and returned without ##.", rung="plain")
def no_continuation_mark(word, vocab):
    pieces, start = [], 0
    while start < len(word) <= 100:
        end = next((e for e in range(len(word), start, -1) if word[start:e] in vocab), None)
        if end is None:
            return ["[UNK]"]
        pieces.append(word[start:end])
        start = end
    return pieces or ["[UNK]"]


@bug(
    "wordpiece",
    JOIN,
    "At a dead end the pieces found so far are kept, with [UNK] for the rest.",
    rung="plain",
)
def unknown_rest(word, vocab):
    for end in range(len(word), 0, -1):
        pieces = wordpiece(word[:end], vocab)
        if pieces != ["[UNK]"]:
            return pieces if end == len(word) else [*pieces, "[UNK]"]
    return ["[UNK]"]


@bug(
    "wordpiece",
    JOIN,
    "At a dead end the pieces found so far are returned and the rest is lost.",
    rung="plain",
)
def lost_rest(word, vocab):
    pieces = unknown_rest(word, vocab)
    return pieces[:-1] or pieces if pieces[-1] == "[UNK]" else pieces


@bug("wordpiece", LONGEST, "The shortest piece first.", rung="plain")
def shortest_first(word, vocab):
    pieces, start = [], 0
    while start < len(word) <= 100:
        prefix = "##" if start else ""
        ends = range(start + 1, len(word) + 1)
        end = next((e for e in ends if prefix + word[start:e] in vocab), None)
        if end is None:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces or ["[UNK]"]


@bug(
    "wordpiece",
    LONGEST,
    "Backtracking: any cut that works, where the greedy one ends in [UNK].",
    rung="plain",
)
def backtracking(word, vocab):
    def cut(start):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            rest = cut(end) if piece in vocab and end < len(word) else []
            if piece in vocab and rest is not None:
                return [piece, *rest]
        return None

    return cut(0) or ["[UNK]"] if len(word) < 50 else wordpiece(word, vocab)


@bug("wordpiece", DEAD_END, "[UNK] as soon as one character is no piece by itself.", rung="plain")
def needs_every_character(word, vocab):
    return wordpiece(word, vocab) if all(c in vocab or "##" + c in vocab for c in word) else ["[UNK]"]


@bug("wordpiece", DEAD_END, "Whole words only.", rung="plain")
def whole_words(word, vocab):
    return [word] if word in vocab else ["[UNK]"]


@bug("wordpiece", LIMIT, "No limit of length.", rung="plain")
def no_limit(word, vocab):
    return wordpiece(word, vocab, longest=10**9)


@bug("wordpiece", LIMIT, "The limit is one too early.", rung="plain")
def limit_of_99(word, vocab):
    return wordpiece(word, vocab, longest=99)


def slow(counts, size, min_count, alphabet, key, weigh=True, singles=sorted, again=True):
    """The training loop with its choices open."""
    words = {w: [w[0], *("##" + c for c in w[1:])] for w in counts}
    seen = Counter()
    for w, pieces in words.items():
        for piece in pieces:
            seen[piece] += counts[w]
    kept = set(sorted(seen, key=lambda piece: (-seen[piece], piece))[:alphabet])
    learned = dict.fromkeys([*SPECIALS, *singles({p: 0 for p in seen if p in kept})])
    single, pair = Counter(), Counter()
    while len(learned) < size:
        if again or not single:
            single, pair = Counter(), Counter()
            for w, pieces in words.items():
                single.update(
                    Counter({p: n * (counts[w] if weigh else 1) for p, n in Counter(pieces).items()})
                )
                for two in pairwise(pieces):
                    pair[two] += counts[w] if weigh else 1
        left = {two: n for two, n in pair.items() if n >= min_count}
        if not left:
            break
        a, b = min(left, key=lambda two: key(left[two], single[two[0]], single[two[1]], two))
        learned[a + b[2:]] = None
        pair.pop((a, b))
        for w, pieces in words.items():
            out = []
            while pieces:
                n = 2 if pieces[:2] == [a, b] else 1
                out.append(a + b[2:] if n == 2 else pieces[0])
                pieces = pieces[n:]
            words[w] = out
    return list(learned)


def score(n, a, b, pair):
    return -n / (a * b), -n, pair


@bug("learn_vocab", FIRST, "The special tokens are forgotten.", rung="plain")
def no_specials(counts, vocab_size, min_count=2, alphabet=1000):
    return learn_vocab(counts, vocab_size + 5, min_count, alphabet)[5:]


@bug("learn_vocab", FIRST, "Characters in the order in which they are met.", rung="plain")
def unsorted_characters(counts, vocab_size, min_count=2, alphabet=1000):
    return slow(counts, vocab_size, min_count, alphabet, score, singles=list)


@bug("learn_vocab", FIRST, "Characters without a ## twin for the inside of words.", rung="plain")
def no_inner_characters(counts, vocab_size, min_count=2, alphabet=1000):
    return slow(counts, vocab_size, min_count, alphabet, score, singles=lambda s: sorted({p[-1] for p in s}))


@bug("learn_vocab", LOOP, "Byte-pair encoding: the most frequent pair.", rung="plain")
def most_frequent(counts, vocab_size, min_count=2, alphabet=1000):
    return slow(counts, vocab_size, min_count, alphabet, lambda n, a, b, pair: (-n, pair))


@bug("learn_vocab", LOOP, "The score is divided by the frequency of the first piece alone.", rung="plain")
def first_piece_only(counts, vocab_size, min_count=2, alphabet=1000):
    return slow(counts, vocab_size, min_count, alphabet, lambda n, a, b, pair: (-n / a, -n, pair))


@bug("learn_vocab", LOOP, "Every word counts once, however often it occurs.", rung="plain")
def unweighted(counts, vocab_size, min_count=2, alphabet=1000):
    return slow(counts, vocab_size, min_count, alphabet, score, weigh=False)


@bug("learn_vocab", LOOP, "Of equal scores the rarer pair wins.", rung="plain")
def rarer_first(counts, vocab_size, min_count=2, alphabet=1000):
    return slow(counts, vocab_size, min_count, alphabet, lambda n, a, b, pair: (-n / (a * b), n, pair))


@bug("learn_vocab", LOOP, "The frequencies are those before the first merge.", rung="plain")
def stale_counts(counts, vocab_size, min_count=2, alphabet=1000):
    return slow(counts, vocab_size, min_count, alphabet, score, again=False)


@bug("learn_vocab", LOOP, "min_count is not respected.", rung="plain")
def no_min_count(counts, vocab_size, min_count=2, alphabet=1000):
    return learn_vocab(counts, vocab_size, 1, alphabet)


@bug("learn_vocab", KEPT, "The first characters from a to z are kept, not the most frequent.", rung="plain")
def first_of_the_alphabet(counts, vocab_size, min_count=2, alphabet=1000):
    learned = learn_vocab(counts, vocab_size, min_count)
    singles = [piece for piece in learned[5:] if len(piece.removeprefix("##")) == 1]
    return [piece for piece in learned if piece not in singles[alphabet:]]
