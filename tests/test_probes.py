"""Tasks: every answer is checked against the boxes, by a reading of captions that is not that of tasks.py."""

import re

import numpy as np
import pytest

from minivlp.data import RELATIONS, Scene, Scenes, held_out, load_emojivl
from minivlp.data import probes as tasks
from minivlp.text import WordPiece

EMOJIVL = load_emojivl()
FEW = EMOJIVL.nouns(["dog", "guitar", "key", "bear", "egg"])


def stands(first: np.ndarray, second: np.ndarray) -> str:
    """How one box stands to another, from their centres alone: left of, right of, above or below."""
    x, y = (first[:2] + first[2:] - second[:2] - second[2:]) / 2
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"


def holds(caption: str, scene: Scene) -> bool:
    """Is this caption of a pair true of this scene of a pair?"""
    first, relation, second = re.fullmatch(f"(.+) ({'|'.join(RELATIONS)}) (.+)", caption).groups()
    if {first, second} != set(scene.slots):
        return False
    a, b = (scene.boxes[scene.slots.index(slot)] for slot in (first, second))
    return stands(a, b) == relation


@pytest.fixture(scope="module")
def pairs() -> list[Scene]:
    scenes = Scenes(EMOJIVL, FEW, pairs="all", seed=3)
    return [scenes[i] for i in range(150)]


@pytest.fixture(scope="module")
def tokenizer(pairs) -> WordPiece:
    """A vocabulary so small that most nouns take several pieces."""
    return WordPiece.train([scene.caption for scene in pairs], 45)


def test_a_hidden_relation_leaves_no_trace(pairs):
    for scene in pairs:
        text, answer = tasks.hide_relation(scene)
        assert text == f"{scene.slots[0]} [MASK] {scene.slots[1]}"
        assert answer == stands(*scene.boxes).split()[0]


def test_a_place_has_a_relation_too():
    scene = Scenes(EMOJIVL, FEW, kinds={"place": 1})[0]
    assert tasks.hide_relation(scene)[0] == f"{scene.slots[0]} [MASK] the middle"


def test_hidden_nouns_come_back_from_their_pieces(pairs, tokenizer):
    lengths = set()
    for scene in pairs:
        for which in ([0], [1], [1, 0]):
            text, ids = tasks.hide_slots(scene, which, tokenizer)
            assert text.count("[MASK]") == len(ids)
            pieces, filled = iter(ids), tokenizer.batch([text])[0][0]
            filled = [next(pieces) if i == tokenizer.mask_id else int(i) for i in filled]
            caption = tokenizer.decode(filled)
            for slot in which:  # the article of a hidden noun is always "a"
                noun = scene.slots[slot].split()[-1]
                assert f"a {noun}" in caption
                caption = caption.replace(f"a {noun}", scene.slots[slot])
            assert caption == scene.caption
            lengths.add(len(ids))
    assert len(lengths) > 2, "the vocabulary should cut nouns into several pieces"


def test_a_visible_noun_keeps_its_article(pairs, tokenizer):
    scene = next(s for s in pairs if s.slots[0] == "an egg")
    assert tasks.hide_slots(scene, [1], tokenizer)[0].startswith("an egg ")
    assert tasks.hide_slots(scene, [0], tokenizer)[0].startswith("a [MASK] ")


def test_counted_nouns_have_no_article(tokenizer):
    scenes = Scenes(EMOJIVL, FEW, kinds={"count": 1})
    scene = next(scenes[i] for i in range(99) if len(scenes[i].objects) == 3)
    text, ids = tasks.hide_slots(scene, [0], tokenizer)
    assert text == "three" + " [MASK]" * len(ids)


def test_the_nouns_of_any_caption_can_be_hidden(pairs, tokenizer):
    """As the slots of a scene are; the longest name wins, and a part of a word is no name."""
    for scene in pairs:
        text, ids = tasks.hide_nouns(scene.caption, FEW, tokenizer)
        slots = tasks.hide_slots(scene, [0, 1], tokenizer)
        assert (tokenizer.encode(text), ids) == (tokenizer.encode(slots[0]), slots[1])
    some = [*EMOJIVL.nouns(["dog", "hot dog"]), *FEW]
    for caption, text, names in (
        ("A hot dog above a dog", "a {} above a {}", ["hot dog", "dog"]),
        ("an egg and two keys", "a {} and two {}", ["egg", "keys"]),
        ("a keyboard, bearded", "a keyboard , bearded", []),
    ):
        pieces = [tokenizer.encode(name) for name in names]
        masks = [" ".join(["[MASK]"] * len(one)) for one in pieces]
        expected = text.format(*masks), [piece for one in pieces for piece in one]
        assert tasks.hide_nouns(caption, some, tokenizer) == expected


def test_spans_cover_the_nouns(pairs, tokenizer):
    several = EMOJIVL.nouns(["teddy bear", "fire engine", "egg"])
    scenes = Scenes(EMOJIVL, several, pairs="all", kinds={"pair": 1, "between": 1, "place": 1, "one": 1})
    for scene in [*pairs, *(scenes[i] for i in range(30))]:
        ids = tokenizer.batch([scene.caption], 99)[0][0]
        spans = tasks.noun_spans(scene, tokenizer)
        assert len(spans) == len(scene.slots)
        for span, slot in zip(spans, scene.slots, strict=True):
            assert ids[span].tolist() == tokenizer.encode(slot.split(" ", 1)[1])
            assert ids[: span.start].tolist()[-1:] == tokenizer.encode(slot.split()[0])[-1:]


def test_captions_are_true_and_swapped_captions_false(pairs):
    for scene in pairs:
        other = tasks.swapped(scene)
        assert holds(scene.caption, scene) and not holds(other, scene)
        assert sorted(other.split()) == sorted(scene.caption.split())


def test_another_relation_is_false_and_each_of_the_three_is_drawn(pairs):
    rng, drawn = np.random.default_rng(0), set()
    for scene in pairs:
        other = tasks.misrelated(scene, rng)
        first, relation, second = re.fullmatch(f"(.+) ({'|'.join(RELATIONS)}) (.+)", other).groups()
        assert (first, second) == scene.slots and not holds(other, scene)
        drawn.add((scene.relation, relation))
    assert len(drawn) == 4 * 3


@pytest.mark.parametrize("kind", ["pair", "pick"])
def test_another_noun_is_absent_and_makes_no_pair_that_is_held_out(kind):
    scenes, rng, slots = Scenes(EMOJIVL, kinds={kind: 1}), np.random.default_rng(0), set()
    named = {f"{noun.article} {noun.noun}": noun.id for noun in scenes.nouns}
    for i in range(150):
        scene = scenes[i]
        other = tasks.misnamed(scene, scenes, rng)
        parts = re.fullmatch(f"(.+) ({'|'.join(RELATIONS)}) (.+)", other).groups()
        assert parts[1] == scene.relation
        changed = [k for k, slot in enumerate(scene.slots) if parts[2 * k] != slot]
        assert len(changed) == 1
        new, kept = named[parts[2 * changed[0]]], scene.objects[1 - changed[0]]
        assert new not in scene.objects and not held_out(new, kept)
        slots.add(changed[0])
    assert slots == set(range(len(scene.slots)))


def test_a_false_noun_needs_two_objects_and_a_third_noun():
    rng, single = np.random.default_rng(0), Scenes(EMOJIVL, FEW, kinds={"one": 1})
    with pytest.raises(ValueError, match="scene must have two objects"):
        tasks.misnamed(single[0], single, rng)
    with pytest.raises(ValueError, match="scene must have a relation"):
        tasks.misrelated(single[0], rng)
    two = Scenes(EMOJIVL, FEW[:2], pairs="all")
    with pytest.raises(ValueError, match="scenes must have another noun that may meet"):
        tasks.misnamed(two[0], two, rng)


def test_equal_meaning_is_mutual_truth(pairs):
    for one in pairs[:60]:
        for other in pairs:
            assert holds(one.caption, other) == (tasks.meaning(one) == tasks.meaning(other))


def test_false_captions_are_false_and_each_is_used_once(pairs):
    order = tasks.false_captions(pairs, np.random.default_rng(0))
    assert sorted(order) == list(range(len(pairs)))
    assert not any(holds(pairs[j].caption, scene) for j, scene in zip(order, pairs, strict=True))
    assert (order == tasks.false_captions(pairs, np.random.default_rng(0))).all()
    assert (order != tasks.false_captions(pairs, np.random.default_rng(1))).any()


def test_false_captions_with_half_of_one_meaning(pairs):
    one = pairs[0]
    others = [s for s in pairs if tasks.meaning(s) != tasks.meaning(one)][:4]
    assert (tasks.false_captions([one] * 4 + others, np.random.default_rng(0))[:4] > 3).all()
    with pytest.raises(ValueError, match="more than half"):
        tasks.false_captions([one] * 5 + others, np.random.default_rng(0))


def test_in_a_retrieval_set_each_caption_is_true_of_one_picture():
    sets = tasks.retrieval_sets(Scenes(EMOJIVL, pairs="held_out", seed=5), 2)
    assert [len(one) for one in sets] == [64, 64]
    hard = 0
    for one in sets:
        for i, scene in enumerate(one):
            assert [j for j, other in enumerate(one) if holds(scene.caption, other)] == [i]
            hard += sum(set(scene.objects) == set(other.objects) for other in one) - 1
    assert hard > 0, "the same two objects in another relation should occur"


def test_retrieval_sets_take_scenes_in_order_and_never_twice():
    source = Scenes(EMOJIVL, pairs="held_out", seed=5)
    scenes = [source[i] for i in range(60)]
    sets = tasks.retrieval_sets(scenes, 3, 8)
    number = {id(scene): i for i, scene in enumerate(scenes)}
    taken = [[number[id(scene)] for scene in one] for one in sets]
    assert all(one == sorted(one) for one in taken)
    assert len({i for one in taken for i in one}) == 24


def test_too_few_meanings_are_refused():
    two = Scenes(EMOJIVL, FEW[:2], pairs="all")  # one pair, four meanings
    assert len(tasks.retrieval_sets(two, 1, 4)[0]) == 4
    with pytest.raises(ValueError, match="5 different meanings"):
        tasks.retrieval_sets(two, 1, 5)


def test_a_word_under_one_mask_must_be_one_piece(tokenizer):
    whole = WordPiece([*tokenizer.tokens, "zebra"])
    assert whole.tokens[tasks.single_piece_id("zebra", whole)] == "zebra"
    for word in ("zebra", "?"):
        with pytest.raises(ValueError, match="as one piece"):
            tasks.single_piece_id(word, tokenizer)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda one, tokenizer: tasks.hide_relation(one), "must have a relation"),
        (lambda one, tokenizer: tasks.swapped(one), "must be a pair"),
        (lambda one, tokenizer: tasks.meaning(one), "must be a pair"),
        (lambda one, tokenizer: tasks.hide_slots(one, [1], tokenizer), "at least one of the slots 0 to 0"),
        (lambda one, tokenizer: tasks.hide_slots(one, [], tokenizer), "at least one of the slots"),
    ],
)
def test_scenes_of_another_kind_are_refused(call, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        call(Scenes(EMOJIVL, FEW, kinds={"one": 1})[0], tokenizer)
