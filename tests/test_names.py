"""Captions of single drawings: names, keywords and phrases, and a vocabulary that has all their words."""

import numpy as np
import pytest

from minivlp.data import load_emojivl
from minivlp.data.names import PHRASES, PROMPTS, caption, name_tokenizer, named, words_of

EMOJIVL = load_emojivl()
TRAINED = [c for c in EMOJIVL.concepts if c.split == "train"]
TOKENIZERS = {language: name_tokenizer(TRAINED, language) for language in PROMPTS}


@pytest.mark.parametrize("language", PROMPTS)
def test_no_word_of_a_caption_is_unknown_and_none_is_too_long(language):
    rng, tokenizer = np.random.default_rng(0), TOKENIZERS[language]
    for concept in TRAINED:
        ids = tokenizer.encode(caption(concept, language, rng))
        assert ids and tokenizer.unk_id not in ids
    for prompt in PROMPTS[language]:
        assert all(len(tokenizer.encode(prompt.format(named(c, language)))) <= 22 for c in EMOJIVL.concepts)


@pytest.mark.parametrize("language", PROMPTS)
def test_half_of_the_captions_are_names_in_prompts(language):
    """And of the others a third keep the name, so two in three captions have it."""
    rng, concept = np.random.default_rng(0), next(c for c in TRAINED if c.noun == "hamburger")
    texts = [caption(concept, language, rng) for _ in range(3000)]
    name = named(concept, language)
    prompts = {prompt.format(name) for prompt in PROMPTS[language]}
    assert sum(text in prompts for text in texts) / 3000 == pytest.approx(0.5, abs=0.05)
    assert prompts < set(texts)
    rest = [text for text in texts if text not in prompts and text.startswith(name)]
    # A keyword may be the name itself.
    assert len(rest) / 3000 > 1 / 6 - 0.03
    phrased = [text for text in texts if text.startswith(PHRASES["food"])]
    assert bool(phrased) == (language == "en")


def test_captions_say_nothing_that_the_table_does_not():
    rng = np.random.default_rng(1)
    allowed = {w for text in (*PHRASES.values(), *PROMPTS["en"]) for w in text.split()} | {
        "with",
        "for",
        "and",
    }
    for concept in TRAINED[::7]:
        own = {w for text in (concept.name_en, *words_of(concept, "en")) for w in text.split()} | allowed
        for _ in range(20):
            assert {w.strip(",") for w in caption(concept, "en", rng).split()} <= {
                w.strip(",") for w in own
            } | {""}


def test_a_phrase_stands_only_for_its_keyword():
    rng = np.random.default_rng(2)
    for concept in TRAINED[::5]:
        texts = [caption(concept, "en", rng) for _ in range(30)]
        for word, phrase in PHRASES.items():
            if word not in concept.keywords and not any(
                phrase in PHRASES[k] for k in concept.keywords if k in PHRASES
            ):
                assert not any(
                    text.startswith(phrase + " ") for text in texts if phrase not in concept.name_en
                )


def test_plurals_are_read_as_singulars_and_an_s():
    tokenizer = TOKENIZERS["en"]
    for word in ("meatballs", "dogs", "guitars"):
        assert [tokenizer.tokens[i] for i in tokenizer.encode(word)] == [word[:-1], "##s"]
    assert tokenizer.encode("zebrine") == [tokenizer.unk_id]


def test_words_of_zero_shot_concepts_alone_are_unknown():
    tokenizer = TOKENIZERS["en"]
    assert tokenizer.encode("noodle") == [tokenizer.unk_id]


def test_another_language_is_refused():
    with pytest.raises(ValueError, match="language must be among en, zh, got 'de'"):
        named(TRAINED[0], "de")
