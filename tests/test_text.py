"""Laws of the word pieces and of their training, and the tokenizer against the `tokenizers` library."""

import csv
import os
import pickle
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minivlp import text
from minivlp.text import SPECIALS, WordPiece, split_words
from tests.laws import law, obeys, refuses

FOLDER = Path(__file__).parents[1] / "data_tiny"


@st.composite
def words_and_vocabularies(draw):
    """A word over three letters and a vocabulary of stretches of it: some can be cut, some are dead ends."""
    word = draw(st.text("abc", min_size=2, max_size=8))
    stretches = [(i, j) for i in range(len(word)) for j in range(i + 1, len(word) + 1)]
    drawn = draw(st.lists(st.sampled_from(stretches), min_size=2, max_size=16))
    tokens = [*SPECIALS, *("##" * (i > 0) + word[i:j] for i, j in drawn)]
    return word, {token: i for i, token in enumerate(dict.fromkeys(tokens))}


# The greedy cut takes "ab" and is stuck, although "a", "##bc" would do.
GREED = "abc", {"[UNK]": 0, "a": 1, "ab": 2, "##bc": 3}


@law(
    "wordpiece",
    hint="Strip the ## and join: the word must come back, from pieces of the vocabulary.",
)
@given(case=words_and_vocabularies())
def pieces_join_to_the_word(f, case):
    word, vocab = case
    pieces = f(word, vocab)
    if pieces == ["[UNK]"]:
        return
    assert all(piece in vocab for piece in pieces), f"a piece outside the vocabulary: {pieces}"
    assert all(piece.startswith("##") == (i > 0) for i, piece in enumerate(pieces)), f"## misplaced: {pieces}"
    joined = "".join(piece.removeprefix("##") for piece in pieces)
    assert joined == word, f"{pieces} join to {joined}, the word is {word}"


@law(
    "wordpiece",
    hint="At each place try the whole rest first, then one character less. Never take a piece back.",
)
@given(case=words_and_vocabularies())
@example(case=GREED)
def every_piece_is_the_longest(f, case):
    word, vocab = case
    pieces = f(word, vocab)
    start = 0
    for piece in pieces if pieces != ["[UNK]"] else []:
        prefix = "##" if start else ""
        for end in range(start + len(piece.removeprefix("##")) + 1, len(word) + 1):
            longer = prefix + word[start:end]
            assert longer not in vocab, f"{word}: took {piece} where {longer} is in the vocabulary"
        start += len(piece.removeprefix("##"))


@law("wordpiece", hint="Only where no piece at all begins the rest is the word [UNK], and then all of it is.")
@given(case=words_and_vocabularies())
@example(case=GREED)
def unknown_only_at_a_dead_end(f, case):
    word, vocab = case
    rest, prefix = word, ""
    while rest and any(prefix + rest[:n] in vocab for n in range(1, len(rest) + 1)):
        longest = max(n for n in range(1, len(rest) + 1) if prefix + rest[:n] in vocab)
        rest, prefix = rest[longest:], "##"
    pieces = f(word, vocab)
    assert ("[UNK]" in pieces) == bool(rest), f"{word} gave {pieces}; left over at the dead end: {rest!r}"


@law("wordpiece", hint="A word of 100 characters is cut, one of 101 is [UNK], whatever the vocabulary.")
@given(letter=st.sampled_from("aß中"))
def over_100_characters_is_unknown(f, letter):
    vocab = {letter: 0, "##" + letter: 1, "[UNK]": 2}
    assert f(letter * 100, vocab) == [letter] + ["##" + letter] * 99, "100 characters must be cut"
    assert f(letter * 101, vocab) == ["[UNK]"], "101 characters must be [UNK]"


counts_of_words = st.dictionaries(
    st.text("abc", min_size=1, max_size=6), st.integers(1, 9), min_size=1, max_size=8
)


@law(
    "learn_vocab", hint="First the five special tokens, then the single characters, a and ##a apart, sorted."
)
@given(counts=counts_of_words)
def specials_and_characters_come_first(f, counts):
    singles = sorted({w[0] for w in counts} | {"##" + char for w in counts for char in w[1:]})
    found, wanted = f(counts, 99)[: 5 + len(singles)], [*SPECIALS, *singles]
    assert found == wanted, f"the vocabulary begins with {found}, expected {wanted}"


@law(
    "learn_vocab",
    hint="Merge the pair with the largest freq(ab) / (freq(a) · freq(b)); ties: frequency, then a to z.",
)
@given(counts=counts_of_words, merges=st.integers(0, 8), min_count=st.integers(1, 4))
@example(counts={"ab": 2, "ca": 2}, merges=2, min_count=2)  # pairs that occur exactly min_count times
def equals_the_slow_loop(f, counts, merges, min_count):
    size = merges + len({w[0] for w in counts} | {"##" + char for w in counts for char in w[1:]}) + 5
    found, wanted = f(counts, size, min_count), text.learn_vocab_slow(counts, size, min_count)
    new = [piece for piece in found if piece not in wanted]
    assert found == wanted, f"{counts}: learned {found[5:]}, expected {wanted[5:]} (too much: {new})"


@law(
    "learn_vocab",
    hint="Keep the `alphabet` most frequent characters (a and ##a are two), of equals the first from a to z.",
)
@given(counts=counts_of_words, alphabet=st.integers(1, 4))
def only_frequent_characters_are_kept(f, counts, alphabet):
    occurrences = Counter()
    for word, n in counts.items():
        occurrences[word[0]] += n
        for char in word[1:]:
            occurrences["##" + char] += n
    wanted = sorted(occurrences, key=lambda piece: (-occurrences[piece], piece))[:alphabet]
    vocabulary = f(counts, 99, alphabet=alphabet)
    kept = [piece for piece in vocabulary if len(piece.removeprefix("##")) == 1]
    assert kept == sorted(wanted), f"{counts}: kept the characters {kept}, expected {sorted(wanted)}"


test_laws = obeys(text)

test_refusals = refuses(
    text,
    [("learn_vocab", "no room", ({"ab": 1, "ba": 1}, 8), {}, "vocab_size must be at least 9.*got 8")],
)


# The outside truth.

SAMPLES = [
    "Two dogs on a table.",
    "a [MASK] on a mat",
    "a[MASK]b [mask] [SEP][SEP] [CLS ] [UNK]",
    "Café naïve jalapeño Ångström SÃO PAULO crème-brûlée",
    "e\u0301 cafe\u0301 a\u0323\u0307 \u0301a e\u20dd",
    "don't stop!? $5 + 3% ~ `x` ^_^ {a|b} <c> #d @e \\",
    "„quoted“ ‘single’ — dash … ¿qué? « là » 、。",
    "一只猫 left of 狗狗 ひらがな カタカナ 한국어 漢字かな",
    "emoji 😀😁 👩‍👩‍👧 ❤️ 🏳️‍🌈 1️⃣ 🫠",
    "zero\u200bwidth \u200djoin\u200cer\ufeff soft\u00adhyphen",
    "nul\x00 repl\ufffd bell\x07 tab\tnew\nline\rfeed\x0b\x0c\x1c\x85end",
    "nbsp\u00a0en\u2002line\u2028para\u2029ideographic\u3000end",
    "ΟΔΟΣ ὈΔΥΣΣΕΎΣ İstanbul ıI ß ẞ ﬁ Ⅷ ½ ² ≠ ∂",
    "हिन्दी ไทย עִבְרִית عَرَبِي தமிழ்",
    "x" * 100 + " " + "y" * 101 + " ü" * 60,
    "##ing ## # un##do",
    "",
    "   ",
]


def corpus() -> list[str]:
    with open(FOLDER / "concepts.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = [row[key].replace("|", " ") for row in rows for key in ("name_en", "name_zh", "kw_en", "kw_zh")]
    return names + [path.read_text("utf-8") for path in sorted(FOLDER.glob("*.md"))] + SAMPLES


@pytest.fixture(scope="module", params=[True, False], ids=["lowercase", "cased"])
def pair(request):
    """Our tokenizer, trained on the concept names, and the library's with the same vocabulary."""
    peers = pytest.importorskip("tokenizers.implementations", reason="needs the tokenizers library")
    ours = WordPiece.train(corpus(), 3000, lowercase=request.param)
    return ours, peers.BertWordPieceTokenizer(ours.vocab, lowercase=request.param)


def agree(pair, sentence):
    ours, theirs = pair
    wanted = theirs.encode(sentence, add_special_tokens=False)
    assert ours.encode(sentence) == wanted.ids, ascii(sentence)
    assert ours.word_ids(sentence) == wanted.word_ids, ascii(sentence)


def test_equals_the_tokenizers_library_on_real_text(pair):
    for sentence in corpus():
        agree(pair, sentence)


# Letters that only one of the two Unicode tables can lowercase or decompose (see the module's "Left out").
UNSURE = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) in ("Cn", "Cs")]
UNSURE += [chr(c) for c in range(0x10000, sys.maxunicode + 1) if unicodedata.decomposition(chr(c))]
UNSURE = set(UNSURE)
MARKS = st.sampled_from("\u0301\u0323\u20dd\u3099\u200d\u200b\ufe0f\u00ad\x00\t #İΣ中😀[]-")


@given(sentence=st.text(st.characters(codec="utf-8").filter(lambda c: c not in UNSURE) | MARKS, max_size=20))
def test_equals_the_tokenizers_library_on_any_text(pair, sentence):
    agree(pair, sentence)


def their_words(lowercase):
    peers = pytest.importorskip("tokenizers", reason="needs the tokenizers library")
    normal = peers.normalizers.BertNormalizer(lowercase=lowercase)
    cut = peers.pre_tokenizers.BertPreTokenizer()
    return lambda sentence: [word for word, _ in cut.pre_tokenize_str(normal.normalize_str(sentence))]


def differing(lowercase, codes):
    """The characters that the library splits, drops, folds or decomposes otherwise than we do."""
    theirs, chars = their_words(lowercase), [chr(c) for c in codes if not 0xD800 <= c < 0xE000]
    return [char for char in chars if theirs(f"a{char}b") != split_words(f"a{char}b", lowercase)]


@pytest.mark.parametrize("lowercase", [True, False])
def test_common_characters_are_split_as_in_the_library(lowercase):
    rest = differing(lowercase, [*range(0x3400), *range(0xFB00, 0x10000), *range(0x1F000, 0x1FB00)])
    assert set(rest) <= UNSURE and len(rest) < 10, [hex(ord(char)) for char in rest]


@pytest.mark.slow
def test_all_characters_are_split_as_in_the_library():
    assert not differing(False, range(sys.maxunicode + 1))
    rest = differing(True, range(sys.maxunicode + 1))
    assert set(rest) <= UNSURE and len(rest) < 100, [hex(ord(char)) for char in rest]


def test_a_batch_equals_the_librarys_padding_and_truncation(pair):
    ours, theirs = pair
    theirs.enable_padding()
    theirs.enable_truncation(12)
    ids, word_ids, mask = ours.batch(SAMPLES, max_len=12)
    wanted = theirs.encode_batch(SAMPLES)
    theirs.no_padding()
    theirs.no_truncation()
    assert ids.tolist() == [one.ids for one in wanted]
    assert mask.tolist() == [[bool(m) for m in one.attention_mask] for one in wanted]
    for row, (got, one) in enumerate(zip(word_ids, wanted, strict=True)):
        special = np.isin(ids[row], ours.special_ids)
        assert (got == np.where(special, -1, [-1 if w is None else w for w in one.word_ids])).all()


# The class.


@pytest.fixture(scope="module")
def small():
    return WordPiece.train(["a dog left of a guitar", "two dogs", "three guitars", "café ol\u00e9"] * 2, 80)


def test_training_keeps_the_contract(small):
    assert list(small.vocab)[:5] == list(SPECIALS) and small.special_ids == (0, 1, 2, 3, 4)
    assert (small.pad_id, small.unk_id, small.cls_id, small.sep_id, small.mask_id) == (0, 1, 2, 3, 4)
    assert len(small) == len(small.vocab) <= 80
    assert small.vocab["cafe"] and "café" not in small.vocab


def test_a_word_of_several_pieces_has_one_index(small):
    ids, words = small.encode("dogs [MASK] guitarsguitar"), small.word_ids("dogs [MASK] guitarsguitar")
    assert len(ids) == len(words) > 3 and words == sorted(words) and set(words) == {0, 1, 2}
    assert small.mask_id in ids and ids.index(small.mask_id) == words.index(1)


def test_the_alphabet_is_limited():
    tokenizer = WordPiece.train(["aaaa aaab c"], 50, alphabet=2)
    assert {"a", "##a"} <= set(tokenizer.vocab) and not {"##b", "c"} & set(tokenizer.vocab)
    assert tokenizer.encode("c") == [tokenizer.unk_id]


@given(sentence=st.text(max_size=20) | st.sampled_from(SAMPLES))
def test_decoding_and_encoding_again_changes_nothing(pair, sentence):
    ours, _ = pair
    ids = [i for i in ours.encode(sentence) if i not in (ours.pad_id, ours.cls_id, ours.sep_id)]
    assert ours.encode(ours.decode(ids)) == ids


def test_decode_gives_the_words_back(small):
    ids, _, _ = small.batch(["Two dogs, [MASK] of a Café", "a"])
    assert small.decode(ids[0]) == "two dogs [UNK] [MASK] of a cafe"
    with pytest.raises(ValueError, match="ids must lie between 0 and"):
        small.decode([-1])


@pytest.mark.parametrize("lowercase", [True, False])
def test_save_and_load_keep_vocabulary_and_case(tmp_path, lowercase):
    before = WordPiece.train(corpus(), 2500, lowercase=lowercase)
    before.save(tmp_path / "words.json")
    after = WordPiece.load(tmp_path / "words.json")
    assert after.tokens == before.tokens and after.lowercase is lowercase
    assert [p.name for p in tmp_path.iterdir()] == ["words.json"]
    again = pickle.loads(pickle.dumps(after))
    assert all(again.encode(s) == before.encode(s) for s in SAMPLES)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, small, monkeypatch):
    path = tmp_path / "words.json"
    small.save(path)
    other = WordPiece([*SPECIALS, "x"])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        other.save(path)
    assert WordPiece.load(path).tokens == small.tokens


def test_a_published_vocabulary_is_read_line_by_line(tmp_path):
    tokens = [
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "\u2028",
        "\x85",
        "dog",
        "##s",
        "Dog",
    ]
    for end in ("\n", "\r\n"):
        (tmp_path / "vocab.txt").write_bytes((end.join(tokens) + end).encode())
        tokenizer = WordPiece.from_vocab(tmp_path / "vocab.txt")
        assert tokenizer.tokens == tokens and tokenizer.special_ids == (0, 2, 3, 4, 5)
    assert tokenizer.encode("Dogs dog Cat") == [8, 9, 8, 2]
    assert WordPiece.from_vocab(tmp_path / "vocab.txt", lowercase=False).encode("Dogs dog") == [10, 9, 8]


def test_batch_shapes_padding_and_truncation(small):
    ids, word_ids, mask = small.batch(["a dog", "", "a dog left of a guitar"], max_len=5)
    a, dog, left = (small.vocab[word] for word in ("a", "dog", "left"))
    assert ids.tolist() == [[2, a, dog, 3, 0], [2, 3, 0, 0, 0], [2, a, dog, left, 3]]
    assert word_ids.tolist() == [[-1, 0, 1, -1, -1], [-1] * 5, [-1, 0, 1, 2, -1]]
    assert mask.tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3, [True] * 5]
    assert ids.dtype == word_ids.dtype == np.int64 and mask.dtype == bool


def test_forgetting_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(text, "REMEMBERED", 2)
    forgetful = WordPiece(small.tokens)
    for sentence in SAMPLES * 2:
        assert forgetful.encode(sentence) == small.encode(sentence)
        assert len(forgetful._remembered) <= 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t, d: t.encode(b"bytes"), "text must be a str, got bytes"),
        (lambda t, d: t.batch("a dog"), "texts must be a sequence"),
        (lambda t, d: t.batch([]), "texts must be a sequence of at least one"),
        (lambda t, d: t.batch(["a"], max_len=1), "max_len must leave room"),
        (lambda t, d: WordPiece.train("one text", 50), "corpus must be an iterable of texts"),
        (lambda t, d: WordPiece.train(["\x00", "[MASK]"], 50), "corpus must hold at least one word"),
        (lambda t, d: WordPiece.train(["some words"], 9), "vocab_size must be at least"),
        (lambda t, d: WordPiece([*SPECIALS, "a", "b", "a"]), "vocabulary must not repeat a token, got 'a'"),
        (lambda t, d: WordPiece(["[PAD]", "[UNK]", "a"]), r"vocabulary must hold .* none that is \[CLS\]"),
        (lambda t, d: WordPiece.load(d / "no.json"), "path must be a file written by WordPiece.save"),
        (lambda t, d: WordPiece.load(d / "list.json"), "path must be a file written by WordPiece.save"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(small, tmp_path, call, message):
    (tmp_path / "no.json").write_text("[PAD]\n[UNK]\n")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=message):
        call(small, tmp_path)


@pytest.mark.slow
def test_training_does_not_depend_on_the_order_of_hashes(tmp_path):
    program = "import sys; from tests.test_text import *; WordPiece.train(corpus(), 2500).save(sys.argv[1])"
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program, str(tmp_path / seed)]
        subprocess.run(command, env=environment, cwd=FOLDER.parent, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
