"""What a single drawing is called: its name in a prompt, its name with keywords, or keywords alone.

A model that reads names alone answers names alone. Keywords say what a thing is for and what belongs to it,
so a third of the captions have no name at all, as a person's query may have none:

    name            a drawing of spaghetti
    name and words  spaghetti, pasta, restaurant
    words           something to eat with meatballs and pasta

The phrases "something to eat", "something to wear" … stand for a keyword ("food", "clothing" …) and are
written by hand below. Chinese captions have the Chinese names and keywords, and no phrases.

Sources: Radford et al. 2021 (CLIP), section 3.1.4, for prompts and their ensemble.
Left out: articles and plurals; of emoji most have no plain noun.
"""

import re
from collections.abc import Sequence

import numpy as np

from minivlp.core.require import fail
from minivlp.data import RELATIONS, Concept
from minivlp.data.probes import ARTICLES
from minivlp.data.questions import WORDS
from minivlp.text import SPECIALS, WordPiece, split_words

PROMPTS = {
    "en": ("{}", "a drawing of {}", "a picture of {}", "an icon of {}", "{} on a plain background"),
    "zh": ("{}", "{}的图", "一张{}的图片", "{}的图标"),
}
PHRASES = {
    "food": "something to eat",
    "drink": "something to drink",
    "clothing": "something to wear",
    "animal": "an animal",
    "bird": "a bird",
    "fruit": "a fruit",
    "plant": "a plant",
    "tool": "something to work with",
    "game": "something to play with",
    "music": "something that makes music",
    "vehicle": "something to travel in",
    "car": "something to drive",
    "space": "something in the sky",
    "weather": "weather",
    "celebration": "something to celebrate with",
    "sport": "something for sport",
    "person": "someone",
    "face": "a face",
    "hand": "a hand",
    "heart": "a heart",
    "book": "something to read",
    "building": "a building",
}
JOINTS, COMMA = ("with", "for", "and", ","), "、"


def named(concept: Concept, language: str) -> str:
    """The concept's name. Raises ValueError for another language than en and zh."""
    if language not in PROMPTS:
        fail("language", f"must be among {', '.join(PROMPTS)}", repr(language))
    return concept.name_en if language == "en" else concept.name_zh


def words_of(concept: Concept, language: str) -> tuple[str, ...]:
    """The concept's keywords, and in English its noun: scenes have "a sheep" where the name is "ewe"."""
    if language == "zh":
        return concept.keywords_zh
    return tuple(dict.fromkeys((*concept.keywords, concept.noun or concept.name_en)))


def caption(concept: Concept, language: str, rng: np.random.Generator) -> str:
    """One of the three forms: half of the captions are names, a sixth have keywords too, a third no name."""
    name, words = named(concept, language), words_of(concept, language)
    form = rng.random()
    if form < 1 / 2:
        prompts = PROMPTS[language]
        return prompts[int(rng.integers(len(prompts)))].format(name)
    some = [words[i] for i in rng.permutation(len(words))[: 1 + int(rng.integers(3))]]
    if form < 2 / 3:
        return (COMMA if language == "zh" else ", ").join([name, *some])
    if language == "zh":
        return COMMA.join(some)
    phrases = [PHRASES[word] for word in words if word in PHRASES]
    if not phrases or rng.random() < 1 / 4:
        return " and ".join(some)
    phrase, joint = phrases[int(rng.integers(len(phrases)))], JOINTS[int(rng.integers(len(JOINTS)))]
    return f"{phrase} {joint} {' and '.join(some)}"


def name_tokenizer(concepts: Sequence[Concept], language: str) -> WordPiece:
    """One token for every word of these concepts' captions, so that captions are short; others are [UNK].

    A plural is its singular and "##s", so one that no caption has can be read too. In Chinese each ideograph
    is a word.
    """
    texts = [text for c in concepts for text in (named(c, language), *words_of(c, language))]
    texts += [prompt.format("") for prompt in PROMPTS[language]]
    texts += [*PHRASES.values(), *JOINTS, *ARTICLES, *RELATIONS] if language == "en" else [COMMA]
    singular = set()
    for word in sorted({word for text in texts for word in split_words(text)}, key=len):
        if not (word.endswith("s") and word[:-1] in singular):
            singular.add(word)
    return WordPiece([*SPECIALS, "##s", *sorted(singular)])


def scene_texts(nouns: Sequence[Concept]) -> list[str]:
    """Every noun in every frame of the scenes and of the questions about them."""
    frames = (
        *("{a} left of the middle", "{a} right of {a}", "{a} above {a}", "{a} below {a}"),
        *("{a} between {a} and {a}", "one {n}", "two {p}", "three {p}", "four {p}"),
    )
    filled = (f.format(a=f"{c.article} {c.noun}", n=c.noun, p=c.plural) for c in nouns for f in frames)
    return [*filled, *WORDS]


def read_caption(caption: str, nouns: Sequence[Concept]) -> tuple[str, list[Concept]]:
    """What somebody typed, in the tokenizer's spelling, and which of the nouns it names.

    "a hot dog" names no dog. Raises ValueError, naming them, for words that occur in no scene of these nouns.
    """
    texts, words = scene_texts(nouns), split_words(caption)
    known = {word for text in texts for word in split_words(text)}
    if not words:
        fail("caption", "must hold at least one word", "none")
    if unknown := [word for word in words if word not in known]:
        examples = ", ".join(c.noun for c in nouns[:40]) + (", …" if len(nouns) > 40 else "")
        rule = f'must be made of words the model has read, as in "{texts[0]}" (its nouns: {examples})'
        fail("caption", rule, ", ".join(map(repr, unknown)))
    rest, concepts = " ".join(words), []
    for concept in sorted(nouns, key=lambda c: -len(c.noun)):
        names = "|".join(re.escape(" ".join(split_words(name))) for name in (concept.plural, concept.noun))
        rest, times = re.subn(rf"\b(?:{names})\b", "", rest)
        concepts += [concept] * bool(times)
    return " ".join(words), concepts


def scene_tokenizer(nouns: Sequence[Concept], vocab_size: int) -> WordPiece:
    """A vocabulary learned from `scene_texts`."""
    return WordPiece.train(scene_texts(nouns), vocab_size, min_count=1)
