"""Scenes: every caption is true, every box tight, every draw fair and repeatable."""

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest

from minivlp.data import CPU_NOUNS, TRAINING_ARTISTS, EmojiVL, Scenes, held_out, load_emojivl
from minivlp.data.emojivl import FOLDER

KINDS = ("one", "place", "pick", "pair", "count", "between")
ALL = dict.fromkeys(KINDS, 1)
# From the second thing to the first, y downwards. Written out once more, not imported, on purpose.
DIRECTION = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@pytest.fixture(scope="module")
def emojivl():
    return load_emojivl()


def scenes(n, emojivl, **settings):
    made = Scenes(emojivl, **settings)
    return [made[i] for i in range(n)]


def repainted(emojivl, paint):
    """The data set with the small preset's drawings of artist a replaced by `paint(a, drawings)`."""
    ids, sheets = [c.id for c in emojivl.nouns(CPU_NOUNS)], {}
    for artist, sheet in emojivl.sheets.items():
        sheets[artist] = np.zeros_like(sheet)
        sheets[artist][ids] = paint(artist, sheet[ids])
    return EmojiVL(emojivl.concepts, sheets)


def filled(colour, alpha=None):
    """Paint every drawing in one colour; alpha None leaves its outline alone, a number fills the tile."""

    def paint(_, drawings):
        drawings[..., :3] = colour
        if alpha is not None:
            drawings[..., 3] = alpha
        return drawings

    return paint


def fair(draws, outcomes):
    """Every outcome occurs, none off its share by more than five standard deviations."""
    counts, p = np.array(list(Counter(draws).values())), 1 / outcomes
    assert len(counts) == outcomes
    assert abs(counts - counts.sum() * p).max() < 5 * (counts.sum() * p * (1 - p)) ** 0.5, counts


# Captions and boxes ----------------------------------------------------------------------------------------


def dominates(a, b, direction):
    """Is a on that side of b, with centres at most half as far apart across the direction as along it?"""
    (dx, dy), (x, y) = np.array(direction), (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    along, across = dx * x + dy * y, abs(dy * x) + abs(dx * y)
    return along > 0 and across <= along / 2


def apart(a, b, direction):
    """Does a end before b begins, along that direction?"""
    axis, ahead = int(direction[0] == 0), sum(direction) > 0
    return b[axis + 2] <= a[axis] if ahead else a[axis + 2] <= b[axis]


@pytest.mark.parametrize("settings", [{}, {"canvas": 61, "sizes": (0.12, 0.5)}], ids=["default", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_true_of_the_boxes(emojivl, kind, settings):
    for scene in scenes(250, emojivl, kinds={kind: 1}, **settings):
        things = [emojivl.concepts[i] for i in scene.objects]
        names = [f"{c.article} {c.noun}" for c in things]
        boxes, canvas = scene.boxes, scene.image.shape[0]
        assert scene.kind == kind and len(boxes) == len(things)
        assert (scene.relation != "") == (kind in ("place", "pick", "pair"))
        assert scene.unnamed == ((names[1],) if kind == "pick" else ())
        if kind == "one":
            assert scene.caption == names[0] and len(things) == 1
        elif kind == "place":
            assert scene.caption == f"{names[0]} {scene.relation} the middle" and len(things) == 1
            assert dominates(boxes[0], np.array([0, 0, canvas, canvas]), DIRECTION[scene.relation])
        elif kind == "pick":
            named, other, middle = *boxes, np.full(4, canvas / 2)
            direction = np.array(DIRECTION[scene.relation])
            assert scene.caption == f"{names[0]} {scene.relation} the middle" and things[0] != things[1]
            for box, way in ((named, direction), (other, -direction)):
                assert dominates(box, middle, way) and apart(box, middle, way)
        elif kind == "pair":
            direction = DIRECTION[scene.relation]
            assert scene.caption == f"{names[0]} {scene.relation} {names[1]}" and things[0] != things[1]
            assert dominates(boxes[0], boxes[1], direction) and apart(boxes[0], boxes[1], direction)
        elif kind == "count":
            n = len(things)
            noun = things[0].noun if n == 1 else things[0].plural
            assert scene.caption == f"{('one', 'two', 'three', 'four')[n - 1]} {noun}"
            assert len(set(things)) == 1
            assert all(any(apart(a, b, d) for d in DIRECTION.values()) for a, b in combinations(boxes, 2))
        else:
            assert scene.caption == f"{names[0]} between {names[1]} and {names[2]}" and len(set(things)) == 3
            middle, one, other = boxes
            assert any(
                dominates(one, middle, d)
                and apart(one, middle, d)
                and dominates(middle, other, d)
                and apart(middle, other, d)
                for d in DIRECTION.values()
            )


def test_frame_and_slots_make_the_caption(emojivl):
    for scene in scenes(50, emojivl, kinds=ALL):
        assert scene.caption == scene.frame.format(*scene.slots)
        assert scene.frame.count("{}") == len(scene.slots)


@pytest.mark.parametrize("canvas", [48, 97])
def test_boxes_hold_all_that_is_drawn_and_touch_it_on_four_sides(emojivl, canvas):
    """Drawings in black and the same drawings in white differ where there is a drawing, and nowhere else."""
    black, white = (scenes(100, repainted(emojivl, filled(v)), kinds=ALL, canvas=canvas) for v in (0, 255))
    for one, other in zip(black, white, strict=True):
        assert (one.boxes == other.boxes).all() and one.boxes.dtype == np.int64
        assert one.image.shape == (canvas, canvas, 3) and one.image.dtype == np.uint8
        drawn = (one.image != other.image).any(-1)
        for x1, y1, x2, y2 in one.boxes:
            assert 0 <= x1 < x2 <= canvas and 0 <= y1 < y2 <= canvas
            inside = drawn[y1:y2, x1:x2]
            across, down = inside.any(0), inside.any(1)
            # A faint outermost line may round to nothing: one pixel of grace on each side.
            assert across[:2].any() and across[-2:].any() and down[:2].any() and down[-2:].any()
            drawn[y1:y2, x1:x2] = False
        assert not drawn.any()


def test_backgrounds_are_mid_tones_without_any_repeated(emojivl):
    corners, levels = set(), []
    for scene in scenes(200, emojivl, sizes=(0.2, 0.25)):
        for x1, y1, x2, y2 in scene.boxes:
            scene.image[y1:y2, x1:x2] = 0
        background = scene.image[scene.image.any(-1)]
        assert background.min() >= 35 and background.max() <= 215
        levels.append(background.mean())
        corners.add(tuple(scene.image[0, 0]))
    assert 100 < np.mean(levels) < 150 and np.std(levels) > 10
    assert len(corners) > 180


def test_nothing_is_mirrored_and_each_channel_has_its_gain(emojivl):
    """Quarters in red, green, blue and grey keep their places; the grey ones show the gains."""

    def quarters(_, sheet):
        sheet[..., :3], sheet[..., 3] = 0, 255
        sheet[:, :32, :32, 0] = sheet[:, :32, 32:, 1] = sheet[:, 32:, :32, 2] = 255
        sheet[:, 32:, 32:, :3] = 150
        return sheet

    gains = []
    for scene in scenes(200, repainted(emojivl, quarters), kinds=ALL):
        for x1, y1, x2, y2 in scene.boxes:
            near, far = (3 * x1 + x2) // 4, (x1 + 3 * x2) // 4
            top, bottom = (3 * y1 + y2) // 4, (y1 + 3 * y2) // 4
            for pixel, channel in (((top, near), 0), ((top, far), 1), ((bottom, near), 2)):
                assert scene.image[pixel].argmax() == channel
            gains.append(scene.image[bottom, far] / 150)
    gains = np.array(gains)
    assert gains.min() > 0.78 and gains.max() < 1.22
    assert (gains.std(0) > 0.08).all()
    assert (abs(np.corrcoef(gains.T) - np.eye(3)) < 0.25).all()


def test_a_drawing_covers_the_background_by_its_alpha(emojivl):
    """Half transparent lies half way between hardly visible and opaque."""
    opacities = {1: [], 128: [], 255: []}
    for alpha, pictures in opacities.items():
        for scene in scenes(60, repainted(emojivl, filled((150, 120, 180), alpha)), kinds=ALL):
            pictures.append(scene.image.astype(int))
    faint, half, full = (np.array(pictures) for pictures in opacities.values())
    assert abs(half - (faint + full) / 2).max() <= 2 and abs(full - faint).max() > 100


def test_a_thin_drawing_keeps_its_shape(emojivl):
    """The scale is the same both ways, and a line of one pixel does not vanish."""

    def line(_, sheet):
        sheet[:] = 0
        sheet[:, 5:53, 20:21] = 255
        return sheet

    for scene in scenes(50, repainted(emojivl, line)):
        assert ((scene.boxes[:, 2:] - scene.boxes[:, :2])[:, 0] <= 2).all()


# Draws -----------------------------------------------------------------------------------------------------


def digest(scene):
    content = (scene.caption, scene.boxes.tolist(), scene.objects, scene.relation)
    return hashlib.sha256(repr(content).encode() + scene.image.tobytes()).hexdigest()


def test_a_scene_depends_on_seed_and_index_alone(emojivl):
    forward = [digest(scene) for scene in scenes(60, emojivl, kinds=ALL, seed=7)]
    jumping = Scenes(emojivl, kinds=ALL, seed=7)
    assert [digest(jumping[i]) for i in reversed(range(60))] == forward[::-1]
    other_seed = [digest(scene) for scene in scenes(60, emojivl, kinds=ALL, seed=8)]
    assert len({*forward, *other_seed}) == 120


@pytest.mark.slow
def test_another_process_makes_the_same_scenes(emojivl):
    """Also with another salt of Python's hash, so that no order of a set can matter."""
    here = [digest(scene) for scene in scenes(20, emojivl, kinds=ALL, seed=3)]
    program = (
        "from minivlp.data import load_emojivl\nfrom tests.test_scenes import ALL, digest, scenes\n"
        "print(*map(digest, scenes(20, load_emojivl(), kinds=ALL, seed=3)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=FOLDER.parent,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == here


@pytest.mark.parametrize("pairs", ["train", "held_out", "all"])
def test_only_pairs_of_the_chosen_part_meet(emojivl, pairs):
    found = set()
    for scene in scenes(500, emojivl, kinds={"pick": 1, "pair": 1, "between": 1}, pairs=pairs):
        found |= {held_out(a, b) for a, b in combinations(scene.objects, 2)}
    assert found == {"train": {False}, "held_out": {True}, "all": {False, True}}[pairs]


def test_a_tenth_of_the_pairs_is_held_out(emojivl):
    for nouns in (emojivl.nouns(), emojivl.nouns(CPU_NOUNS)):
        kept = [held_out(a.id, b.id) for a, b in combinations(nouns, 2)]
        assert abs(np.mean(kept) - 0.1) < 0.005 + 3 * (0.09 / len(kept)) ** 0.5
    assert all(held_out(a, b) == held_out(b, a) for a, b in combinations(range(40), 2))


def test_every_pair_occurs_in_both_orders_and_all_relations(emojivl):
    few = emojivl.nouns(CPU_NOUNS[:6])
    made = scenes(2000, emojivl, nouns=few)
    allowed = [ids for ids in permutations([c.id for c in few], 2) if not held_out(*ids)]
    fair([(scene.relation, scene.objects) for scene in made], 4 * len(allowed))
    assert 20 < len(allowed) <= 30
    centres = np.array([scene.boxes[:, :2] + scene.boxes[:, 2:] for scene in made]) / 2
    assert (abs(centres.mean((0, 1)) - 24) < 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_nouns_are_drawn_evenly_and_none_is_zero_shot(emojivl, kind):
    """All pairs may meet here, for otherwise a noun is as frequent as its partners are many."""
    seen = np.concatenate([s.objects[:1] for s in scenes(640, emojivl, kinds={kind: 1}, pairs="all")])
    fair(seen, len(CPU_NOUNS))
    assert {emojivl.concepts[i].noun for i in seen} == set(CPU_NOUNS)
    everything = scenes(100, emojivl, kinds={kind: 1}, nouns=emojivl.nouns())
    assert all(emojivl.concepts[i].split == "train" for scene in everything for i in scene.objects)


def test_kinds_follow_their_weights(emojivl):
    made = [scene.kind for scene in scenes(600, emojivl, kinds={"one": 1, "place": 0, "count": 3})]
    assert set(made) == {"one", "count"}
    assert abs(made.count("one") / 600 - 1 / 4) < 5 * (3 / 16 / 600) ** 0.5


def test_sizes_places_and_numbers_are_drawn_evenly(emojivl):
    squares = repainted(emojivl, filled(255, 255))
    boxes = np.array([scene.boxes[0] for scene in scenes(1500, squares, kinds={"one": 1})])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides[:, 0] == sides[:, 1]).all()
    assert sides.min() == int(1.25 * 0.32 * 48) and sides.max() == int(1.25 * 0.48 * 48)
    fair(sides[:, 0], 10)
    room = 48 - sides
    assert (boxes[:, :2].min(0) == 0).all() and (boxes[:, 2:].max(0) == 48).all()
    share = (boxes[:, :2] + 0.5) / (room + 1)  # of the room + 1 places for the corner: uniform in [0, 1]
    assert (abs(share.mean(0) - 0.5) < 0.03).all() and (abs(share.std(0) - 12**-0.5) < 0.02).all()

    made = scenes(1000, emojivl, kinds={"count": 1})
    fair([len(scene.boxes) for scene in made], 4)
    quarter = [
        (x1 + x2 > 48, y1 + y2 > 48) for s in made if len(s.boxes) == 1 for x1, y1, x2, y2 in s.boxes.tolist()
    ]
    fair([2 * right + low for right, low in quarter], 4)

    made = scenes(500, emojivl, kinds={"between": 1})
    fair([np.ptp(s.boxes[:, 1]) > np.ptp(s.boxes[:, 0]) for s in made], 2)  # one above the other, or not
    fair([tuple(s.boxes[1, :2]) < tuple(s.boxes[2, :2]) for s in made], 2)
    fair([s.relation for s in scenes(500, emojivl, kinds={"place": 1})], 4)


def test_artists_are_drawn_evenly_and_the_unseen_one_never(emojivl):
    """Each artist gets a colour, so that the picture tells who drew."""
    colours = {a: [255 * (i >> bit & 1) for bit in range(3)] for i, a in enumerate(emojivl.sheets)}
    assert emojivl.unseen_artists == ("fluent",)

    signed = repainted(emojivl, lambda artist, drawings: filled(colours[artist], 255)(artist, drawings))

    def who(settings):
        names = []
        for scene in scenes(500, signed, kinds=ALL, **settings):
            for x1, y1, x2, y2 in scene.boxes:
                pixel = scene.image[(y1 + y2) // 2, (x1 + x2) // 2] > 127
                names.append(next(a for a, colour in colours.items() if (pixel * 255 == colour).all()))
        return names

    names = who({})
    fair(names, 5)
    assert set(names) == set(TRAINING_ARTISTS)
    assert set(who({"artists": ["fluent"]})) == {"fluent"}


def test_only_those_draw_who_know_the_concept(emojivl):
    """Many nouns are not drawn by all five artists; an empty drawing could not be cut out."""
    partly = [c for c in emojivl.nouns() if not set(TRAINING_ARTISTS) <= set(c.artists)]
    made = scenes(200, emojivl, kinds={"one": 1}, nouns=partly)
    assert len({scene.objects for scene in made}) > 50
    by_blob = Scenes(emojivl, nouns=partly, artists=["blob"]).nouns
    assert by_blob == tuple(c for c in partly if "blob" in c.artists) and 0 < len(by_blob) < len(partly)


def test_layouts_of_a_seed_never_change(emojivl):
    """Published results name a seed; these scenes were written down when the layout was settled."""
    written_down = {
        "one": ("a pushpin", [[13, 4, 34, 25]]),
        "place": ("a pushpin right of the middle", [[30, 10, 47, 27]]),
        "pick": ("a snowflake left of the middle", [[7, 20, 23, 36], [28, 12, 41, 29]]),
        "pair": ("a snowflake left of a clipboard", [[3, 16, 19, 32], [27, 13, 45, 35]]),
        "count": ("two pushpins", [[1, 27, 21, 47], [25, 11, 38, 24]]),
        "between": (
            "a tulip between a clipboard and a snowflake",
            [[23, 15, 29, 25], [25, 1, 35, 15], [25, 35, 37, 47]],
        ),
    }
    for kind, (caption, boxes) in written_down.items():
        scene = Scenes(emojivl, kinds={kind: 1}, seed=0)[0]
        assert (scene.caption, scene.boxes.tolist()) == (caption, boxes)


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"artists": ["noto", "rembrandt"]}, r"artists must be among .*, got \['rembrandt'\]"),
        ({"kinds": {"pair": 1, "trio": 1}}, r"kinds must be among .*, got \['trio'\]"),
        ({"kinds": {}}, "kinds must have finite weights"),
        ({"kinds": {"one": 0}}, "kinds must have finite weights"),
        ({"kinds": {"one": -1}}, "kinds must have finite weights"),
        ({"kinds": {"one": float("nan")}}, "kinds must have finite weights"),
        ({"pairs": "test"}, "pairs must be train, held_out or all, got 'test'"),
        ({"sizes": (0.3, 0.7)}, "sizes must satisfy"),
        ({"sizes": (0.5, 0.3)}, "sizes must satisfy"),
        ({"sizes": (0.3, 0.6), "kinds": {"count": 1}}, "sizes must satisfy"),
        ({"sizes": (0.3, 0.52), "kinds": {"between": 1}}, "sizes must satisfy"),
        ({"canvas": 8}, "canvas must leave 4 pixels"),
        ({"artists": []}, "nouns must hold at least two nouns drawn by"),
        ({"nouns": ["dog"]}, "nouns must hold at least two nouns drawn by"),
        ({"nouns": ["dog", "dog"]}, "nouns must be distinct countable concepts"),
        ({"nouns": ["dog", "guitar"], "pairs": "held_out"}, "pairs must leave at least one pair"),
        ({"nouns": ["dog", "guitar"], "kinds": {"between": 1}}, "pairs must leave three nouns"),
    ],
    ids=str,
)
def test_scenes_refuse(emojivl, settings, message):
    if "nouns" in settings:
        settings = {**settings, "nouns": emojivl.nouns(settings["nouns"])}
    with pytest.raises(ValueError, match=message):
        Scenes(emojivl, **settings)


def test_scenes_refuse_what_cannot_be_named_or_indexed(emojivl):
    face = next(c for c in emojivl.concepts if c.tier == "face")
    with pytest.raises(ValueError, match="nouns must be distinct countable concepts"):
        Scenes(emojivl, nouns=[face, *emojivl.nouns(["dog"])])
    with pytest.raises(ValueError, match="index must be ≥ 0, got -1"):
        Scenes(emojivl)[-1]
    with pytest.raises(TypeError):
        Scenes(emojivl)[0.5]


# Time ------------------------------------------------------------------------------------------------------


def test_composing_is_far_from_slow(emojivl):
    """Training eats some hundred scenes a second; 2 ms each is a bound that a busy machine keeps, too."""
    made = Scenes(emojivl)
    for i in range(300):
        made[i]
    start = time.process_time()
    for i in range(300, 600):
        made[i]
    assert (time.process_time() - start) / 300 < 2e-3
