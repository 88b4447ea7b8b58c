"""Crowds: scenes of two to four objects, some of them twins, with a phrase for each that is true of it alone.

    name       a guitar                     the only one of its name
    place      a dog left of the middle     one of two dogs, which lie on different sides of the middle
    relation   a dog above a guitar         one of two dogs, by an object that is the only one of its name

A phrase of the last two kinds begins with a name that two objects share, so whoever finds dogs, but reads no
further, is right half of the time. The objects lie in different quarters of the picture.

Sources: Yu et al. 2016 (RefCOCO), section 3: phrases that refer to one of several objects of a kind.
Left out: phrases about the looks of an object, and more than two of a kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from minivlp.core.require import fail
from minivlp.data import RELATIONS, Concept, EmojiVL, Scene, Scenes
from minivlp.data.scenes import choice, integer, shuffled, with_article

KINDS = ("name", "place", "relation")


@dataclass(frozen=True)
class Phrase:
    """What refers to one object of a scene: its kind, its text, and the object's row in the scene's boxes."""

    kind: str
    text: str
    row: int


class Crowds(Scenes):
    """An endless list of such scenes; arguments and errors as for Scenes.

    Every object but the first two is a twin of one of them, or a third concept that may meet both. The
    caption names all objects.
    """

    def __init__(
        self,
        emojivl: EmojiVL,
        nouns: Sequence[Concept] | None = None,
        artists: Sequence[str] | None = None,
        canvas: int = 48,
        pairs: str = "train",
        sizes: tuple[float, float] = (0.32, 0.48),
        seed: int = 0,
    ):
        # One object a quarter of the picture, as where objects are counted.
        super().__init__(emojivl, nouns, artists, canvas, {"count": 1}, pairs, sizes, seed)
        if not self._pairs:
            fail("pairs", "must leave at least one pair of these nouns", repr(pairs))

    def _count(self, rng: Random) -> Scene:
        pair = shuffled(rng, choice(rng, self._pairs))
        chosen, thirds = list(pair), self._thirds(*pair)
        for _ in range(integer(rng, 0, 2)):
            single = [c for c in pair if chosen.count(c) == 1]
            if thirds and rng.random() < 0.5:
                chosen.append(self.emojivl.concepts[choice(rng, thirds)])
                thirds = []
            elif single:
                chosen.append(choice(rng, single))
        half, squares = self.canvas // 2, []
        for cell in shuffled(rng, range(4))[: len(chosen)]:
            side = self._side(rng, "count")
            x, y = integer(rng, 0, half - side), integer(rng, 0, half - side)
            squares.append((x + half * (cell % 2), y + half * (cell // 2), side))
        frame = " and ".join(["{}"] * len(chosen))
        return self._compose(rng, "crowd", frame, [with_article(c) for c in chosen], chosen, squares)


def phrases(scene: Scene) -> list[Phrase]:
    """Every phrase that is true of exactly one object of the scene, those of an object together."""
    found = []
    for row, (name, concept) in enumerate(zip(scene.slots, scene.objects, strict=True)):
        twins = [k for k, other in enumerate(scene.objects) if other == concept and k != row]
        if not twins:
            found.append(Phrase("name", name, row))
        elif len(twins) == 1:
            found += [Phrase("place", text, row) for text in _places(scene, row, twins[0])]
            found += [Phrase("relation", text, row) for text in _relations(scene, row, twins[0])]
    return found


def _places(scene: Scene, row: int, twin: int) -> list[str]:
    """The sides of the middle on which the one object lies wholly, and its twin wholly on the other."""
    middle = np.tile(np.array(scene.image.shape[1::-1]) / 2, 2)
    lies = {k: _sides(scene.boxes[k], middle) for k in (row, twin)}
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return [
        f"{scene.slots[row]} {relation} the middle"
        for relation in RELATIONS
        if relation in lies[row] and back[relation] in lies[twin]
    ]


def _relations(scene: Scene, row: int, twin: int) -> list[str]:
    """How the object lies to one that is the only one of its name, where its twin does not lie so at all."""
    texts = []
    for k, landmark in enumerate(scene.objects):
        if scene.objects.count(landmark) == 1:
            mine, other = (_sides(scene.boxes[one], scene.boxes[k]) for one in (row, twin))
            off = np.abs(_centre(scene.boxes[row]) - _centre(scene.boxes[k]))
            for relation in mine - other:
                axis = RELATIONS[relation][0]
                if 2 * off[1 - axis] <= off[axis]:  # the dominant direction, as in the other scenes
                    texts.append(f"{scene.slots[row]} {relation} {scene.slots[k]}")
    return sorted(texts)


def _sides(box: np.ndarray, other: np.ndarray) -> set[str]:
    """The relations in which a box lies wholly to another (x1 y1 x2 y2)."""
    return {
        relation
        for relation, (axis, first) in RELATIONS.items()
        if (box[axis + 2] <= other[axis] if first else other[axis + 2] <= box[axis])
    }


def _centre(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2
