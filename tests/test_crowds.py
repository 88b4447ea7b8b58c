"""Crowds: each phrase is true of exactly one object, the held-out pairs stay apart, and all is repeatable."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from minivlp.data import RELATIONS, held_out, load_emojivl
from minivlp.data.crowds import KINDS, Crowds, phrases

EMOJIVL = load_emojivl()
CROWDS = Crowds(EMOJIVL, seed=3)
SCENES = [CROWDS[i] for i in range(300)]
MIDDLE = np.array([24.0, 24.0])


def lies(box, relation, other) -> bool:
    """Does a box lie so to another (or to a point)? Wholly, and mostly in this direction."""
    axis, first = RELATIONS[relation]
    mine, theirs = box.reshape(2, 2), np.broadcast_to(np.reshape(other, (-1, 2)), (2, 2))  # two corners each
    apart = mine[1, axis] <= theirs[0, axis] if first else theirs[1, axis] <= mine[0, axis]
    off = np.abs(mine.mean(0) - theirs.mean(0))
    return bool(apart and (len(other) == 2 or 2 * off[1 - axis] <= off[axis]))


def meant(text, scene) -> list[int]:
    """The rows of the objects that a phrase is true of, read word by word."""
    for relation in RELATIONS:
        name, found, rest = text.partition(f" {relation} ")
        if found:
            rows = [k for k, slot in enumerate(scene.slots) if slot == name]
            named = zip(scene.slots, scene.boxes, strict=True)
            marks = [MIDDLE] if rest == "the middle" else [box for slot, box in named if slot == rest]
            assert len(marks) == 1, "the landmark is the only one of its name"
            return [k for k in rows if lies(scene.boxes[k], relation, marks[0])]
    return [k for k, slot in enumerate(scene.slots) if slot == text]


def test_every_phrase_is_true_of_one_object_alone():
    kinds = Counter()
    for scene in SCENES:
        for phrase in phrases(scene):
            assert meant(phrase.text, scene) == [phrase.row], (phrase, scene.boxes)
            kinds[phrase.kind] += 1
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 20


def test_only_twins_need_more_than_a_name():
    for scene in SCENES:
        for phrase in phrases(scene):
            alone = scene.objects.count(scene.objects[phrase.row]) == 1
            assert alone == (phrase.kind == "name")


def test_two_to_four_objects_in_different_quarters():
    assert {len(scene.objects) for scene in SCENES} == {2, 3, 4}
    for scene in SCENES:
        assert max(Counter(scene.objects).values()) <= 2 and len(set(scene.objects)) >= 2
        quarters = {tuple(box[:2] // 24) for box in scene.boxes}
        assert len(quarters) == len(scene.boxes)
        assert all((box[:2] // 24 == (box[2:] - 1) // 24).all() for box in scene.boxes)
        assert scene.caption == " and ".join(scene.slots)


@pytest.mark.parametrize("pairs", ["train", "held_out"])
def test_only_pairs_that_may_meet_do(pairs):
    source = Crowds(EMOJIVL, pairs=pairs, seed=4)
    for i in range(100):
        for a, b in combinations(sorted(set(source[i].objects)), 2):
            assert held_out(a, b) == (pairs == "held_out")


def test_a_scene_depends_on_seed_and_index_alone():
    again = Crowds(EMOJIVL, seed=3)
    assert (again[7].image == SCENES[7].image).all() and again[7].slots == SCENES[7].slots
    assert (Crowds(EMOJIVL, seed=5)[7].image != SCENES[7].image).any()


def test_nothing_to_draw_is_refused():
    low, high = next((a, b) for a, b in combinations(EMOJIVL.nouns(), 2) if held_out(a.id, b.id))
    with pytest.raises(ValueError, match="pairs must leave at least one pair"):
        Crowds(EMOJIVL, [low, high], pairs="train")
