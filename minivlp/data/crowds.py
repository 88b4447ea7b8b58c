"""Crowds: scenes of two to four objects, some of them twins, with a phrase for each that is true of it alone.

    name       a guitar                     the only one of its name
    place      a dog left of the middle     one of two dogs, which lie on different sides of the middle
    relation   a dog above a guitar         one of two dogs, by an object that is the only one of its name

A phrase of the last two kinds begins with a name that two objects share, so whoever finds dogs, but reads no
further, is right half of the time. The objects lie in different quarters of the picture.

Sources: Yu et al. 2016 (RefCOCO), section 3: phrases that refer to one of several objects of a kind.
Left out: phrases about the looks of an object, and more than two of a kind.
"""

from dataclasses import dataclass

import numpy as np

from minivlp.data import RELATIONS, Scene, Scenes
from minivlp.data.scenes import OPPOSITE

KINDS = ("name", "place", "relation")


@dataclass(frozen=True)
class Phrase:
    """What refers to one object of a scene: its kind, its text, and the object's row in the scene's boxes."""

    kind: str
    text: str
    row: int


class Crowds(Scenes):
    """An endless list of such scenes, whose captions name all objects; arguments and errors as for Scenes."""

    usual = "crowd"


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
    mine, other = (_sides(scene.boxes[k], middle) for k in (row, twin))
    apart = [relation for relation in RELATIONS if relation in mine and OPPOSITE[relation] in other]
    return [f"{scene.slots[row]} {relation} the middle" for relation in apart]


def _relations(scene: Scene, row: int, twin: int) -> list[str]:
    """How the object lies to one that is the only one of its name, where its twin does not lie so at all."""
    texts = []
    for k, landmark in enumerate(scene.objects):
        if scene.objects.count(landmark) == 1:
            mine, other = (_sides(scene.boxes[one], scene.boxes[k]) for one in (row, twin))
            # Twice the distance of the centres, along x and along y.
            off = np.abs((scene.boxes[row] - scene.boxes[k]).reshape(2, 2).sum(0))
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
