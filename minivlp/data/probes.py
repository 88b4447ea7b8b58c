"""Questions with exact answers, made from scenes: what to hide, what is false, which pictures compete.

A number means something only when the question cannot be answered without the thing it is about. So here no
question gives its answer away by its form, and each says what the text alone, or the names of the objects
alone, would reach:

    hide_relation   a dog [MASK] a guitar            one mask for the whole phrase: neither its length nor the
                                                     word "of" tells left from above; text alone 1/4
    hide_slots      a [MASK] left of a guitar        always "a": the article does not tell an egg from a key
    hide_nouns      a [MASK] left of a [MASK]        the same of any caption
    swapped         a guitar left of a dog           the same words in another order: only places refute it
    false_captions  each caption once with its picture and once with a picture that it is false of, so that
                    neither the captions nor the pictures alone tell true from false
    retrieval_sets  64 pictures and their captions, each caption true of exactly one picture

Sources: Yuksekgonul et al. 2023 (ARO) for swapped order; Thrush et al. 2022 (Winoground) for pictures that
differ in the order of the same words.
Left out: attributes (every object has its artist's colours) and paraphrases (one frame per kind).
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import RELATIONS, Concept, Scene, Scenes
from minivlp.data.scenes import OPPOSITE
from minivlp.mlm import IGNORE
from minivlp.text import WordPiece, split_words

MASK = "[MASK]"
ARTICLES = ("a", "an")


def text_rows(
    tokenizer: WordPiece, texts: Sequence[str], answers: Sequence[Sequence[int]]
) -> tuple[Tensor, ...]:
    """Texts with [MASK]s and the ids under them → ids, text_mask, labels, each (B, L)."""
    ids, _, mask = tokenizer.batch(texts)
    labels = np.full_like(ids, IGNORE)
    for row, hidden in enumerate(answers):
        labels[row, ids[row] == tokenizer.mask_id] = hidden
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


def hide_relation(scene: Scene) -> tuple[str, str]:
    """A pair or a place with its whole relation phrase as one [MASK] → (text, first word of the phrase).

    Raises ValueError for a scene without a relation.
    """
    _check(scene, bool(scene.relation), "have a relation (a pair or a place)")
    return scene.frame.replace(scene.relation, MASK, 1).format(*scene.slots), scene.relation.split()[0]


def hide_slots(scene: Scene, which: Iterable[int], tokenizer: WordPiece) -> tuple[str, list[int]]:
    """The nouns of the slots in `which` (0-based), each as one [MASK] a piece → (text, ids under the masks).

    The ids stand in the order of the text. The article before a hidden noun is written "a". Raises ValueError
    when a slot does not exist or none is named.
    """
    which = set(which)
    if not which or not which <= set(range(len(scene.slots))):
        fail("which", f"must name at least one of the slots 0 to {len(scene.slots) - 1}", sorted(which))
    slots, answers = list(scene.slots), []
    for i in sorted(which):
        article, noun = article_and_noun(scene.slots[i])
        pieces = tokenizer.encode(noun)
        slots[i] = " ".join((["a"] if article else []) + [MASK] * len(pieces))
        answers += pieces
    return scene.frame.format(*slots), answers


def hide_nouns(caption: str, nouns: Iterable[Concept], tokenizer: WordPiece) -> tuple[str, list[int]]:
    """Every name of `nouns` in a caption, one or many of it, as one [MASK] a piece → (text, ids under them).

    "a hot dog" hides no dog, and the article before a hidden noun is written "a", as in `hide_slots`.
    """
    names = {" ".join(split_words(name)) for c in nouns for name in (c.noun, c.plural)}
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    answers = []

    def mask(found: re.Match) -> str:
        pieces = tokenizer.encode(found["name"])
        answers.extend(pieces)
        return " ".join((["a"] if found["article"] else []) + [MASK] * len(pieces))

    phrase = rf"\b(?P<article>an? )?(?P<name>{longest_first})\b"
    return re.sub(phrase, mask, " ".join(split_words(caption))), answers


def article_and_noun(slot: str) -> tuple[str, str]:
    """Split a slot: "a dog" → ("a", "dog"); "dogs" → ("", "dogs")."""
    first, _, rest = slot.partition(" ")
    return (first, rest) if rest and first in ARTICLES else ("", slot)


def swapped(scene: Scene) -> str:
    """The caption of a pair with its two nouns exchanged: the same words, false of the picture.

    Raises ValueError when the scene is not a pair.
    """
    _check(scene, scene.kind == "pair", "be a pair")
    return scene.frame.format(*scene.slots[::-1])


def misplaced(scene: Scene) -> str:
    """A caption that only places refute: a pair's with its nouns exchanged, a pick's about the other object.

    Raises ValueError for other kinds.
    """
    return scene.frame.format(*scene.unnamed) if scene.unnamed else swapped(scene)


def misrelated(scene: Scene, rng: np.random.Generator) -> str:
    """The caption with another relation, drawn from the three others.

    Raises ValueError for a scene without a relation.
    """
    _check(scene, bool(scene.relation), "have a relation (a pair or a place)")
    others = [relation for relation in RELATIONS if relation != scene.relation]
    false = others[int(rng.integers(len(others)))]
    return scene.frame.replace(scene.relation, false, 1).format(*scene.slots)


def misnamed(scene: Scene, scenes: Scenes, rng: np.random.Generator) -> str:
    """The caption of a scene of two objects with one noun that is not in the picture, all else being true.

    The new noun is drawn from those that may meet the remaining object in `scenes`: training then reads no
    pair of nouns that it is not to see. Raises ValueError for other scenes.
    """
    _check(scene, len(scene.objects) == 2, "have two objects")
    slot = int(rng.integers(len(scene.slots)))
    kept = scene.objects[1 - slot]
    absent = [i for i in scenes.partners(kept) if i not in scene.objects]
    if not absent:
        fail("scenes", f"must have another noun that may meet concept {kept}", "none")
    noun = scenes.emojivl.concepts[absent[int(rng.integers(len(absent)))]]
    slots = list(scene.slots)
    slots[slot] = f"{noun.article} {noun.noun}"
    return scene.frame.format(*slots)


def noun_spans(scene: Scene, tokenizer: WordPiece) -> list[slice]:
    """Where the pieces of each slot's noun stand in the row of `tokenizer.batch([scene.caption])`."""
    spans, before = [], ""
    for part, slot in zip(scene.frame.split("{}"), scene.slots, strict=False):
        # A slot ends at a space or at the end, and no word crosses a space. The 1 is [CLS].
        before += part + slot
        stop = 1 + len(tokenizer.encode(before))
        spans.append(slice(stop - len(tokenizer.encode(article_and_noun(slot)[1])), stop))
    return spans


def single_piece_id(word: str, tokenizer: WordPiece) -> int:
    """The id of a word that must be one piece, to fit under one [MASK]. Raises ValueError when it is not."""
    ids = tokenizer.encode(word)
    if len(ids) != 1 or ids[0] == tokenizer.unk_id:
        fail("tokenizer", f"must hold {word!r} as one piece", [tokenizer.tokens[i] for i in ids])
    return ids[0]


def meaning(scene: Scene) -> tuple[int, int, int, bool]:
    """What the caption of a pair says: (lower id, higher id, axis, does the lower id come first along it).

    "a dog left of a guitar" and "a guitar right of a dog" have the same meaning. Of two pair scenes, the
    caption of one is true of the other exactly when their meanings are equal. Raises ValueError when it is
    not a pair.
    """
    _check(scene, scene.kind == "pair", "be a pair")
    (a, b), (axis, in_order) = scene.objects, RELATIONS[scene.relation]
    return (a, b, axis, in_order) if a < b else (b, a, axis, not in_order)


def true_captions(scene: Scene) -> set[str]:
    """Both sentences that say what a pair's caption says, in the tokenizer's spelling."""
    a, b = scene.slots
    both = f"{a} {scene.relation} {b}", f"{b} {OPPOSITE[scene.relation]} {a}"
    return {" ".join(split_words(text)) for text in both}


def first_of_each(keys: Sequence[Hashable], rows: Sequence[int]) -> list[int]:
    """Of rows with a key each, the first of every key but None."""
    first: dict[Hashable, int] = {}
    for key, row in zip(keys, rows, strict=True):
        if key is not None:
            first.setdefault(key, int(row))
    return list(first.values())


def false_captions(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """For each picture another scene's index (n,) whose caption is false of it; every caption is used once.

    A random permutation in which every entry that is true of its picture is exchanged with a random other one
    until none is left. Raises ValueError when more than half of the scenes have the same meaning.
    """
    meanings = np.unique([meaning(s) for s in scenes], axis=0, return_inverse=True)[1].ravel()
    if 2 * np.bincount(meanings).max() > len(meanings):
        fail("scenes", "must not be more than half of one meaning", np.bincount(meanings).max())
    order = rng.permutation(len(scenes))
    while (clashes := np.flatnonzero(meanings[order] == meanings)).size:
        for i in clashes:
            j = rng.integers(len(scenes))
            order[[i, j]] = order[[j, i]]
    return order


def retrieval_sets(scenes: Iterable[Scene], sets: int, size: int = 64) -> list[list[Scene]]:
    """`sets` lists of `size` pair scenes, all of different meaning within a list, from `scenes` in order.

    A scene goes to the first list with room and without its meaning. Pictures with the same two objects in
    another relation are not avoided: they are the hard distractors. `scenes` may be endless. Raises
    ValueError when (4 · sets + 30) · size of them do not suffice: plenty, if there are `size` meanings that
    are equally frequent.
    """
    filled: list[dict[tuple, Scene]] = [{} for _ in range(sets)]
    for scene in takes(scenes, (4 * sets + 30) * size, f"hold {size} different meanings"):
        key = meaning(scene)
        place = next((one for one in filled if len(one) < size and key not in one), None)
        if place is not None:
            place[key] = scene
            if all(len(one) == size for one in filled):
                break
    return [list(one.values()) for one in filled]


def takes(scenes: Iterable[Scene], most: int, rule: str) -> Iterator[Scene]:
    """The scenes one by one; a consumer that goes on after `most` of them meets a ValueError, `rule`."""
    yield from islice(scenes, most)
    fail("scenes", f"must {rule}", f"too few in {most} scenes or all there are")


def _check(scene: Scene, fits: bool, rule: str) -> None:
    if not fits:
        fail("scene", f"must {rule}", f"kind {scene.kind!r}")
