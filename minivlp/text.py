"""WordPiece: cut a caption into words, and words into the longest pieces of a fixed vocabulary; ViLT's input.

A vision-language model reads ids, not letters. If every word had an id, a new word would be unknown; if every
letter had one, captions would be long; word pieces lie between. From text to ids there are three steps:

    clean and split   drop control characters; put spaces around punctuation and CJK; lowercase; strip accents
    cut               from the left, each time the longest piece in the vocabulary; a piece that continues a
                      word is written ##piece; a word that cannot be cut is one [UNK]
    look up           piece → id, the line of the piece in vocab.txt

Training starts from single characters and merges, again and again, the neighbours a, b with the largest

    score(a, b) = freq(ab) / (freq(a) · freq(b)),

the pair that occurs most often for how common its parts are. To first order this merge raises the likelihood
of a unigram model of the pieces more for each occurrence than any other merge. There is no gradient. Encoding
then cuts by longest match and does not replay the merges; byte-pair encoding replays its merges, and chooses
them by freq(ab) alone.

Rungs (plain Python):
    wordpiece           the greedy cut of one word, O(length²) look-ups; `WordPiece` remembers what it has cut
    learn_vocab_slow    the training loop as one explains it: all pairs are counted anew before every merge
    learn_vocab         the same merges from a heap; a merge revisits only the words and pairs that it touches

Sources: Schuster and Nakajima 2012 (WordPiece); Wu et al. 2016, section 4.1; Devlin et al. 2019 (BERT: basic
tokenisation, ##, the special tokens); Kim, Son and Kim 2021 (ViLT) reads bert-base-uncased.
Left out: offsets into the text and pairs of texts, which no model here reads. Ids equal those of the
`tokenizers` library but for the case and decomposition of a few letters that are younger than the Unicode
tables of one of the two.
"""

import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from minivlp.core import require
from minivlp.core.files import whole_file

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece(word: str, vocab: Mapping[str, int], unknown: str = "[UNK]", longest: int = 100) -> list[str]:
    """Cut one word from the left into the longest pieces of `vocab`; all but the first are written ##piece.

    Returns `[unknown]` when some rest has no piece in `vocab` or the word is over `longest` characters.
    """
    if len(word) > longest:
        return [unknown]
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = range(len(word), start, -1)  # the longest candidate first
        end = next((end for end in ends if prefix + word[start:end] in vocab), None)
        if end is None:
            return [unknown]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def learn_vocab_slow(
    counts: Mapping[str, int], vocab_size: int, min_count: int = 2, alphabet: int = 1000
) -> list[str]:
    """`learn_vocab`, counting everything anew before every merge; arguments, result and errors as there."""
    words = {word: _characters(word) for word in counts}  # each word's pieces so far
    learned = dict.fromkeys(_first_tokens(counts, vocab_size, alphabet))
    while len(learned) < vocab_size:
        piece_count, pair_count = Counter(), Counter()
        for word, pieces in words.items():
            for piece in pieces:
                piece_count[piece] += counts[word]
            for pair in pairwise(pieces):
                pair_count[pair] += counts[word]
        # The largest score first, then the more frequent pair, then the alphabet: the least of these tuples.
        ranks = [
            (-n / (piece_count[a] * piece_count[b]), -n, a, b)
            for (a, b), n in pair_count.items()
            if n >= min_count
        ]
        if not ranks:
            break
        *_, a, b = min(ranks)
        merged = a + b.removeprefix("##")
        learned[merged] = None
        for pieces in words.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == (a, b):
                    pieces[i : i + 2] = [merged]
                i += 1
    return list(learned)


def _characters(word: str) -> list[str]:
    """The pieces that training starts from: "dog" → d ##o ##g."""
    return [word[0], *("##" + char for char in word[1:])]


def _first_tokens(counts: Mapping[str, int], vocab_size: int, alphabet: int) -> list[str]:
    """The special tokens and the `alphabet` most frequent single characters, sorted."""
    occurrences = Counter()
    for word, n in counts.items():
        for piece in _characters(word):
            occurrences[piece] += n
    singles = sorted(occurrences, key=lambda piece: (-occurrences[piece], piece))[:alphabet]
    tokens = [*SPECIALS, *sorted(singles)]
    if len(tokens) > vocab_size:
        rule = f"must be at least {len(tokens)}, the special tokens and single characters"
        require.fail("vocab_size", rule, vocab_size)
    return tokens


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
    # A merge changes the counts of few pairs. So all counts are kept up to date, and each pair whose score
    # may have changed is pushed on the heap again; an entry whose rank is out of date is skipped.
    words = [(_characters(word), n) for word, n in sorted(counts.items())]
    learned = dict.fromkeys(_first_tokens(counts, vocab_size, alphabet))
    piece_count, pair_count = Counter(), Counter()
    places = defaultdict(set)  # pair → indices of words that hold it, or held it
    pairs_of = defaultdict(set)  # piece → pairs that it is in, or was in

    def count(index: int, sign: int) -> None:
        pieces, n = words[index]
        for piece in pieces:
            piece_count[piece] += sign * n
        for pair in pairwise(pieces):
            pair_count[pair] += sign * n
            places[pair].add(index)
            pairs_of[pair[0]].add(pair)
            pairs_of[pair[1]].add(pair)

    def rank(pair: tuple[str, str]) -> tuple:
        score = pair_count[pair] / (piece_count[pair[0]] * piece_count[pair[1]])
        return -score, -pair_count[pair], pair

    for index in range(len(words)):
        count(index, +1)
    heap = sorted(rank(pair) for pair, n in pair_count.items() if n >= min_count)  # a sorted list is a heap
    while heap and len(learned) < vocab_size:
        best = heapq.heappop(heap)
        a, b = pair = best[2]
        if pair_count[pair] < min_count or best != rank(pair):
            continue  # the counts have changed since this entry was pushed
        merged = a + b.removeprefix("##")
        learned[merged] = None
        for index in places.pop(pair):
            count(index, -1)
            words[index] = _merge(words[index][0], pair, merged), words[index][1]
            count(index, +1)
        # Only pairs with a, b or the new piece have another score now.
        for piece in (a, b, merged):
            pairs_of[piece] = {near for near in pairs_of[piece] if pair_count[near] >= min_count}
            for near in pairs_of[piece]:
                heapq.heappush(heap, rank(near))
    return list(learned)


def _merge(pieces: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    """Replace every occurrence of `pair` in `pieces`, from the left."""
    out, i = [], 0
    while i < len(pieces):
        here = tuple(pieces[i : i + 2]) == pair
        out.append(merged if here else pieces[i])
        i += 2 if here else 1
    return out


REMEMBERED = 1 << 16  # chunks of text whose ids a tokenizer keeps


class WordPiece:
    """Text ↔ ids. Make one with `train`, `from_vocab` (a published vocab.txt) or `load` (what `save` wrote).

    Attributes: `vocab` {token: id}, `lowercase`, `pad_id`, `unk_id`, `cls_id`, `sep_id`, `mask_id` and
    `special_ids`, the tuple of these five. `len(tokenizer)` is the size of the vocabulary.
    Raises ValueError when a token repeats or one of the five special tokens is absent.
    """

    def __init__(self, tokens: Sequence[str], lowercase: bool = True):
        self.tokens, self.lowercase = list(tokens), lowercase
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        if len(self.vocab) < len(self.tokens):
            repeated = Counter(self.tokens).most_common(1)[0][0]
            require.fail("vocabulary", "must not repeat a token", repr(repeated))
        for token in SPECIALS:
            if token not in self.vocab:
                require.fail("vocabulary", f"must hold {', '.join(SPECIALS)}", f"none that is {token}")
        self.special_ids = tuple(self.vocab[token] for token in SPECIALS)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids
        self._remembered: dict[str, tuple[tuple[int, ...], ...]] = {}

    @classmethod
    def train(
        cls, corpus: Iterable[str], vocab_size: int, lowercase: bool = True, **limits: int
    ) -> "WordPiece":
        """Learn a vocabulary of at most `vocab_size` tokens; the special tokens have ids 0 to 4.

        `limits` are the `min_count` and `alphabet` of `learn_vocab`; words of rare characters will be [UNK].
        Raises ValueError for a corpus without words and for a vocabulary too small for its single characters.
        """
        if isinstance(corpus, str):
            require.fail("corpus", "must be an iterable of texts", "one str")
        words = Counter(word for text in corpus for word in split_words(text, lowercase))
        counts = {word: n for word, n in words.items() if word not in SPECIALS}
        if not counts:
            require.fail("corpus", "must hold at least one word", "none")
        return cls(learn_vocab(counts, vocab_size, **limits), lowercase)

    @classmethod
    def from_vocab(cls, path: str | Path, lowercase: bool = True) -> "WordPiece":
        """Read a vocab.txt like that of bert-base-uncased: UTF-8, one token a line, in order of ids."""
        # Split at line feeds only: published vocabularies hold U+2028 and its like as tokens.
        lines = Path(path).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        return cls([line.removesuffix("\r") for line in lines], lowercase)

    @classmethod
    def load(cls, path: str | Path) -> "WordPiece":
        """Read what `save` wrote. Raises ValueError when the file is something else."""
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            tokens, lowercase = content["tokens"], content["lowercase"]
        except (ValueError, KeyError, TypeError) as error:
            require.fail("path", "must be a file written by WordPiece.save", f"{path} ({error!r})")
        return cls(tokens, lowercase)

    def save(self, path: str | Path) -> None:
        """Write one JSON file {"lowercase": bool, "tokens": [token, …]}, whole or not at all."""
        content = {"lowercase": self.lowercase, "tokens": self.tokens}
        with whole_file(path) as file:
            file.write(json.dumps(content, indent=0).encode())

    def _words(self, text: str) -> list[tuple[int, ...]]:
        """The ids of each word."""
        if not isinstance(text, str):
            require.fail("text", "must be a str", type(text).__name__)
        # No word crosses a space, so each chunk between spaces can be cut alone, and remembered.
        return [word for chunk in text.split(" ") for word in self._cut(chunk)]

    def _cut(self, chunk: str) -> tuple[tuple[int, ...], ...]:
        ids = self._remembered.get(chunk)
        if ids is None:
            words = (wordpiece(word, self.vocab) for word in split_words(chunk, self.lowercase))
            ids = tuple(tuple(self.vocab[piece] for piece in pieces) for pieces in words)
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            self._remembered[chunk] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Text → ids, without [CLS] and [SEP]."""
        return [i for word in self._words(text) for i in word]

    def word_ids(self, text: str) -> list[int]:
        """The word index of each id of `encode(text)`: 0 0 1 when the first of two words has two pieces."""
        return [index for index, word in enumerate(self._words(text)) for _ in word]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids → words with a space between, pieces joined; [CLS], [SEP] and [PAD] are dropped.

        The text's own spacing, case and accents are gone. Raises ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self):
                require.fail("ids", f"must lie between 0 and {len(self) - 1}", i)
        frame = (self.cls_id, self.sep_id, self.pad_id)
        return " ".join(self.tokens[i] for i in ids if i not in frame).replace(" ##", "")

    def batch(self, texts: Sequence[str], max_len: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Texts → `(ids (B, L) int64, word_ids (B, L) int64, mask (B, L) bool)`, L ≤ max_len the longest row.

        A row is [CLS] pieces … [SEP] [PAD] …; a text that is too long loses its last pieces, never [SEP].
        `word_ids` is −1 at every special token ([UNK] and a written [MASK] too), so at padding; `mask` is
        True off the padding. Raises ValueError for an empty batch, a str in place of a sequence, max_len < 2.
        """
        if isinstance(texts, str) or not len(texts):
            require.fail("texts", "must be a sequence of at least one text", repr(texts))
        if max_len < 2:
            require.fail("max_len", "must leave room for [CLS] and [SEP]", max_len)
        rows = [[(i, w) for w, word in enumerate(self._words(t)) for i in word][: max_len - 2] for t in texts]
        shape = len(rows), max(map(len, rows)) + 2  # (B, L)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        word_ids, mask = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=bool)
        for b, row in enumerate(rows):
            n = len(row) + 2
            ids[b, :n] = [self.cls_id, *(i for i, _ in row), self.sep_id]
            word_ids[b, :n] = [-1, *(w for _, w in row), -1]
            mask[b, :n] = True
        word_ids[np.isin(ids, self.special_ids)] = -1
        return ids, word_ids, mask

    def __len__(self) -> int:
        return len(self.tokens)


# Text to words: BERT's rules, character by character, and the Unicode tables they need.

_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")


def split_words(text: str, lowercase: bool = True) -> list[str]:
    """BERT's basic tokenisation: text → words; each punctuation mark and each ideograph is a word.

    With `lowercase`, accents go too: canonical decomposition makes them marks of category Mn, which are cut.
    A special token written in the text ("a [MASK] on a mat") stays whole.
    """
    words = []
    for part in _SPECIAL.split(text):
        if part in SPECIALS:
            words.append(part)
            continue
        part = "".join(map(_clean, part))
        part = map(_fold, unicodedata.normalize("NFD", part)) if lowercase else map(_space_around, part)
        words.extend("".join(part).split())
    return words


def _category(char: str) -> str:
    """The general category in Unicode 8; of characters that are younger, that of a letter."""
    code = ord(char)
    if any(first <= code <= last for first, last in _AFTER_UNICODE_8):
        return "Lo"
    return _CATEGORY_OF_UNICODE_8.get(code) or unicodedata.category(char)


@cache
def _clean(char: str) -> str:
    """Drop control, format and private characters; any white space is a space; ideographs get spaces."""
    if char in "\t\n\r\u2028\u2029" or _category(char) == "Zs":
        return " "
    if char == "\ufffd" or _category(char) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return f" {char} " if any(first <= ord(char) <= last for first, last in _CJK) else char


@cache
def _space_around(char: str) -> str:
    """Spaces around punctuation, in which BERT counts every ASCII symbol ("$", "+", "~" …)."""
    ascii_symbol = char.isascii() and char.isprintable() and not char.isalnum() and char != " "
    return f" {char} " if ascii_symbol or _category(char).startswith("P") else char


@cache
def _fold(char: str) -> str:
    """Lowercase without the accent. One character at a time: str.lower() would turn a final Σ into ς."""
    return "" if _category(char) == "Mn" else "".join(map(_space_around, char.lower()))


# The ideographs that BERT sets apart as words of their own; not kana, not hangul.
_CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F))
_CJK += ((0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))

# Python's Unicode tables grow with every release; ids must not. The published ids follow the categories of
# Unicode 8, so marks, punctuation and format characters added since are ordinary characters, in every Python.
_YOUNGER = """
5C8-5C9 61D 7FD 890-8E2 9FD-9FE A76 AFA-AFF B53-B55 C04-C3C C77 C84 D00 D3B-D3C D81 EBA ECE 180F-1886
1ABF-1AF0 1B4E-1B4F 1B7D-1B7F 1DF6-1DFB 2E43-2E63 A82C A8C5 A8FF A9BD 10D24-10F89 11070-11074 110C2-110CD
111CF 1123E-11241 1133B 113BB-1145E 11660-1166C 116B9 1182F-11FFF 12FF1-1612F 16D6D-16F4F 16FE2-16FE4
1CF00-1D128 1D25B-1D25C 1E000-1E6F5 1E944-1E95F
"""
_AFTER_UNICODE_8 = [(int(r.split("-")[0], 16), int(r.split("-")[-1], 16)) for r in _YOUNGER.split()]
_CATEGORY_OF_UNICODE_8 = {0x166D: "Po", 0x1734: "Mn", 0x111C9: "Po", 0x1171E: "Mn"}  # it has changed since

RUNGS = {
    "wordpiece": {"plain": wordpiece},
    "learn_vocab": {"slow": learn_vocab_slow, "plain": learn_vocab},
}
