"""What the demos on scenes ask of a caption that somebody types, and whose drawings they show."""

import re
from collections.abc import Sequence

from minivlp.core.require import fail
from minivlp.data import Concept, EmojiVL
from minivlp.data.names import scene_texts
from minivlp.text import split_words


def check_words(words: Sequence[str], nouns: Sequence[Concept]) -> None:
    """Raise ValueError, naming them, when words of a caption occur in no scene of these nouns."""
    texts = scene_texts(nouns)
    known = {word for text in texts for word in split_words(text)}
    if not words:
        fail("caption", "must hold at least one word", "none")
    if unknown := [word for word in words if word not in known]:
        examples = ", ".join(c.noun for c in nouns[:40]) + (", …" if len(nouns) > 40 else "")
        rule = f'must be made of words the model has read, as in "{texts[0]}" (its nouns: {examples})'
        fail("caption", rule, ", ".join(map(repr, unknown)))


def named_in(caption: str, nouns: Sequence[Concept]) -> list[Concept]:
    """The concepts that a caption names; "a hot dog" names no dog."""
    concepts = []
    for concept in sorted(nouns, key=lambda c: -len(c.noun)):
        names = "|".join(re.escape(" ".join(split_words(name))) for name in (concept.plural, concept.noun))
        caption, times = re.subn(rf"\b(?:{names})\b", "", caption)
        concepts += [concept] * bool(times)
    return concepts


def shown_artists(emojivl: EmojiVL) -> tuple[str, ...]:
    """The artists whose drawings a demo shows: unseen ones where there are any."""
    return emojivl.unseen_artists or tuple(emojivl.sheets)
