"""Picture-caption scenes, composed from EmojiVL drawings as they are asked for, with the box of every object.

A scene is a mid-tone background with one to four objects; its caption is true of it, has no verb, and follows
one frame per kind, so that neither frame nor article gives an answer away:

    one      a dog                       place    a dog left of the middle
    count    three dogs                  pair     a dog left of a guitar  (right of, above, below)
    pick     as place, but another       between  a dog between a drum and a kite
             object is there too         crowd    a dog and a guitar and a dog (crowds.py)

A named relation is the dominant direction: centres are at most half as far apart across it as along it, and
the objects of a pair do not overlap along it. A tenth of all pairs of nouns is held out of training, for
tests of composition. Nothing is mirrored, for left must stay left.

Scene i depends on (seed, i) alone, so that a run can stop and go on at any index.

Left out: perspective, occlusion and clutter. These are icons on plain backgrounds, not photographs.
"""

import hashlib
import operator
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data.emojivl import CPU_NOUNS, Concept, EmojiVL
from minivlp.data.painting import Painter, Square

NUMBERS = ("no", "one", "two", "three", "four")
# Relation → (axis, does the object named first come first along it); axis 0 is x, axis 1 is y downwards.
RELATIONS = {"left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# The more objects share the canvas, the smaller they are.
FACTORS = {"one": 1.25, "place": 1.0, "pick": 1.0, "pair": 1.0, "count": 0.9, "crowd": 0.9, "between": 0.65}
# How many lie side by side at most, which bounds `sizes`.
ABREAST = {"one": 1, "place": 1, "pick": 2, "pair": 2, "count": 2, "crowd": 2, "between": 3}
SCENE_SIZES = (0.4, 0.5)  # side of an object, as a share of the canvas


def held_out(a: int, b: int) -> bool:
    """Is the unordered pair of concept ids kept for testing? One in ten is, by a hash that never changes."""
    low, high = sorted((a, b))
    return hashlib.sha256(f"{low}-{high}".encode()).digest()[0] < 26  # of 256


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture with its caption.

    image (H, W, 3) uint8; boxes (n, 4) int64, x1 y1 x2 y2 in pixels (x2, y2 excluded), tight around each
    drawing, in the order in which the caption names the objects; objects, their concept ids; frame and slots,
    the caption in parts ("{} left of {}", ("a dog", "a guitar")); relation, the phrase of a pair, a place or
    a pick ('' otherwise); unnamed, what would fill the slots for the object of a pick that is not spoken of,
    whose box and id come last.
    """

    image: np.ndarray
    kind: str
    frame: str
    slots: tuple[str, ...]
    boxes: np.ndarray
    objects: tuple[int, ...]
    relation: str = ""
    unnamed: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        return self.frame.format(*self.slots)


class Scenes:
    """An endless list of scenes: `scenes[i]` for any i ≥ 0.

    nouns: the concepts to draw from (None = `emojivl.nouns(CPU_NOUNS)`); artists: who may draw, each object
    by its own artist (None = those of the five training artists that the folder has); canvas: side in
    pixels; kinds: weight of each kind of scene (None = pairs only); pairs: which pairs of nouns may meet in
    a scene, "train", "held_out" or "all"; sizes: smallest and largest side of an object, as shares of the
    canvas, to be multiplied by its kind's factor in FACTORS.
    Raises ValueError for an unknown name, and when these choices leave nothing to draw.
    """

    usual = "pair"  # the kind that is drawn where none is named

    def __init__(
        self,
        emojivl: EmojiVL,
        nouns: Sequence[Concept] | None = None,
        artists: Sequence[str] | None = None,
        canvas: int = 48,
        kinds: Mapping[str, float] | None = None,
        pairs: str = "train",
        sizes: tuple[float, float] = (0.32, 0.48),
        seed: int = 0,
    ):
        artists = emojivl.seen_artists if artists is None else tuple(artists)
        if unknown := set(artists) - set(emojivl.sheets):
            fail("artists", f"must be among {sorted(emojivl.sheets)}", sorted(unknown))
        kinds = {self.usual: 1.0} if kinds is None else {kind: w for kind, w in kinds.items() if w}
        if unknown := set(kinds) - set(FACTORS):
            fail("kinds", f"must be among {list(FACTORS)}", sorted(unknown))
        if not kinds or not all(0 < weight < float("inf") for weight in kinds.values()):
            fail("kinds", "must have finite weights ≥ 0, one of them > 0", kinds)
        if pairs not in ("train", "held_out", "all"):
            fail("pairs", "must be train, held_out or all", repr(pairs))
        most = min(1 / (FACTORS[kind] * ABREAST[kind]) for kind in kinds)
        if not 0 < sizes[0] <= sizes[1] <= most:
            fail("sizes", f"must satisfy 0 < smallest ≤ largest ≤ {most:.2f} for {list(kinds)}", sizes)
        if int(FACTORS["between"] * sizes[0] * canvas) < 4:
            fail("canvas", f"must leave 4 pixels for the smallest object of sizes {sizes}", canvas)
        nouns = emojivl.nouns(CPU_NOUNS) if nouns is None else tuple(nouns)
        if len({c.id for c in nouns}) < len(nouns) or not all(c.countable for c in nouns):
            fail("nouns", "must be distinct countable concepts", [c.name_en for c in nouns])
        self.nouns = tuple(c for c in nouns if set(c.artists) & set(artists))
        if len(self.nouns) < 2:
            fail("nouns", f"must hold at least two nouns drawn by {list(artists)}", len(self.nouns))
        self.emojivl, self.artists, self.canvas = emojivl, artists, canvas
        self.sizes, self.seed = sizes, operator.index(seed)
        self.kinds, self._weights = tuple(kinds), np.cumsum(list(kinds.values())).tolist()
        self._drawn_by = {c.id: [a for a in self.artists if a in c.artists] for c in self.nouns}
        self._meet(pairs)
        self._painter = Painter(emojivl, canvas, max(FACTORS[kind] for kind in kinds) * sizes[1] * canvas)

    def __getitem__(self, index: int) -> Scene:
        if operator.index(index) < 0:
            fail("index", "must be ≥ 0", index)
        # All choices go through random(), the one method whose numbers Python promises never to change.
        rng = Random(f"{self.seed}-{index}")
        kind = self.kinds[bisect(self._weights, rng.random() * self._weights[-1], hi=len(self.kinds) - 1)]
        return getattr(self, f"_{kind}")(rng)

    @property
    def pairs_of_nouns(self) -> int:
        """How many pairs of nouns may meet."""
        return len(self._pairs)

    def partners(self, concept_id: int) -> list[int]:
        """The ids of the nouns that may meet this one in a scene, ascending."""
        return sorted(self._partners[concept_id])

    def _meet(self, pairs: str) -> None:
        """List the pairs of nouns that may meet, and for each noun the set of its partners."""
        every, kept = combinations(self.nouns, 2), pairs == "held_out"
        self._pairs = [(a, b) for a, b in every if pairs == "all" or held_out(a.id, b.id) == kept]
        if {"pair", "pick", "crowd"} & set(self.kinds) and not self._pairs:
            fail("pairs", "must leave at least one pair of these nouns", repr(pairs))
        self._partners = {c.id: set() for c in self.nouns}
        for a, b in self._pairs:
            self._partners[a.id].add(b.id)
            self._partners[b.id].add(a.id)
        if "between" in self.kinds and not any(self._thirds(a, b) for a, b in self._pairs):
            fail("pairs", "must leave three nouns that may all meet", repr(pairs))

    def _thirds(self, a: Concept, b: Concept) -> list[int]:
        """The ids of the nouns that may meet both."""
        return sorted(self._partners[a.id] & self._partners[b.id])

    # The kinds: what is where, and how it is said.

    def _one(self, rng: Random) -> Scene:
        concept, side = choice(rng, self.nouns), self._side(rng, "one")
        square = (integer(rng, 0, self.canvas - side), integer(rng, 0, self.canvas - side), side)
        return self._compose(rng, "one", "{}", [with_article(concept)], [concept], [square])

    def _place(self, rng: Random) -> Scene:
        concept, side = choice(rng, self.nouns), self._side(rng, "place")
        relation = choice(rng, tuple(RELATIONS))
        axis, in_order = RELATIONS[relation]
        edge = integer(rng, 0, int(0.3 * (self.canvas - side)))
        square = self._off_middle(rng, axis, in_order, side, edge)
        frame = f"{{}} {relation} the middle"
        return self._compose(rng, "place", frame, [with_article(concept)], [concept], [square], relation)

    def _pick(self, rng: Random) -> Scene:
        named, other = shuffled(rng, choice(rng, self._pairs))
        relation = choice(rng, tuple(RELATIONS))
        axis, in_order = RELATIONS[relation]
        squares = []
        for low in (in_order, not in_order):  # on opposite sides of the middle, each wholly on its own
            side = self._side(rng, "pick")
            edge = integer(rng, 0, self.canvas // 2 - side)
            squares.append(self._off_middle(rng, axis, low, side, edge))
        frame = f"{{}} {relation} the middle"
        scene = self._compose(rng, "pick", frame, [with_article(named)], [named, other], squares, relation)
        return replace(scene, unnamed=(with_article(other),))

    def _pair(self, rng: Random) -> Scene:
        concepts = shuffled(rng, choice(rng, self._pairs))
        relation = choice(rng, tuple(RELATIONS))
        axis, in_order = RELATIONS[relation]
        squares = self._row(rng, axis, [self._side(rng, "pair") for _ in range(2)])
        if not in_order:
            squares.reverse()
        slots = [with_article(c) for c in concepts]
        return self._compose(rng, "pair", f"{{}} {relation} {{}}", slots, concepts, squares, relation)

    def _between(self, rng: Random) -> Scene:
        thirds = []
        while not thirds:  # _meet made sure that some pair has a third
            pair = choice(rng, self._pairs)
            thirds = self._thirds(*pair)
        concepts = shuffled(rng, (*pair, self.emojivl.concepts[choice(rng, thirds)]))
        axis = integer(rng, 0, 1)
        low, middle, high = self._row(rng, axis, [self._side(rng, "between") for _ in range(3)])
        squares = [middle, *shuffled(rng, (low, high))]
        slots = [with_article(c) for c in concepts]
        return self._compose(rng, "between", "{} between {} and {}", slots, concepts, squares)

    def _count(self, rng: Random) -> Scene:
        concept, n = choice(rng, self.nouns), integer(rng, 1, 4)
        squares = self._quarters(rng, "count", n)
        slot = concept.noun if n == 1 else concept.plural
        return self._compose(rng, "count", f"{NUMBERS[n]} {{}}", [slot], [concept] * n, squares)

    def _crowd(self, rng: Random) -> Scene:
        """Every object but the first two is a twin of one of them, or a third concept that may meet both."""
        pair = shuffled(rng, choice(rng, self._pairs))
        chosen, thirds = list(pair), self._thirds(*pair)
        for _ in range(integer(rng, 0, 2)):
            single = [c for c in pair if chosen.count(c) == 1]
            if thirds and rng.random() < 0.5:
                chosen.append(self.emojivl.concepts[choice(rng, thirds)])
                thirds = []
            elif single:
                chosen.append(choice(rng, single))
        squares, frame = self._quarters(rng, "crowd", len(chosen)), " and ".join(["{}"] * len(chosen))
        return self._compose(rng, "crowd", frame, [with_article(c) for c in chosen], chosen, squares)

    # Placing; painting.py does the rest.

    def _side(self, rng: Random, kind: str) -> int:
        low, high = (int(FACTORS[kind] * share * self.canvas) for share in self.sizes)
        return integer(rng, low, high)

    def _quarters(self, rng: Random, kind: str, n: int) -> list[Square]:
        """n squares, each in another quarter of the canvas."""
        half, squares = self.canvas // 2, []
        for cell in shuffled(rng, range(4))[:n]:
            side = self._side(rng, kind)
            x, y = integer(rng, 0, half - side), integer(rng, 0, half - side)
            squares.append((x + half * (cell % 2), y + half * (cell // 2), side))
        return squares

    def _off_middle(self, rng: Random, axis: int, low: bool, side: int, edge: int) -> Square:
        """A square `edge` pixels from the low or high border, at most half as far off the middle across."""
        room = self.canvas - side
        off = room - 2 * edge  # twice the distance of the centre from the middle
        across = integer(rng, -(-(2 * room - off) // 4), (2 * room + off) // 4)
        along = edge if low else room - edge
        return (along, across, side) if axis == 0 else (across, along, side)

    def _row(self, rng: Random, axis: int, sides: list[int]) -> list[Square]:
        """Squares in order along the axis, without overlap, near one line across it."""
        slack = self.canvas - sum(sides)
        gaps = sorted(integer(rng, 0, slack) for _ in sides)
        starts = [gap + sum(sides[:i]) for i, gap in enumerate(gaps)]
        centres = [start + side / 2 for start, side in zip(starts, sides, strict=True)]
        line = rng.uniform(max(sides) / 2, self.canvas - max(sides) / 2)
        squares = []
        for start, side, centre in zip(starts, sides, centres, strict=True):
            nearest = min(abs(centre - other) for other in centres if other != centre)
            # Two neighbours leave the line by at most a quarter of their distance each, rounding included.
            reach = nearest / 4 - 0.5
            across = round(line + rng.uniform(-reach, reach) - side / 2)
            across = min(max(across, 0), self.canvas - side)
            squares.append((start, across, side) if axis == 0 else (across, start, side))
        return squares

    def _compose(self, rng, kind, frame, slots, concepts, squares, relation="") -> Scene:
        """Paint the concepts, each in its square and by an artist of its own, and put the scene together."""
        picture = self._painter.background(rng)
        boxes, gains = [], self._painter.gains(rng, len(concepts))
        for concept, square, gain in zip(concepts, squares, gains, strict=True):
            artist = choice(rng, self._drawn_by[concept.id])
            boxes.append(self._painter.add(picture, concept.id, artist, square, gain))
        image, objects = self._painter.finished(picture), tuple(c.id for c in concepts)
        return Scene(image, kind, frame, tuple(slots), np.array(boxes), objects, relation)


def scene_pixels(scenes: Sequence[Scene]) -> Tensor:
    """Scenes of one canvas → pixels (B, 3, H, W) float32 in [−1, 1]: mean 0.5, deviation 0.5, as in ViLT."""
    images = np.stack([scene.image for scene in scenes])  # (B, H, W, 3)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def integer(rng: Random, low: int, high: int) -> int:
    """A uniform integer, both ends included."""
    return low + int(rng.random() * (high - low + 1))


def choice(rng: Random, items: Sequence):
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence) -> list:
    """The items in a random order."""
    return sorted(items, key=lambda _: rng.random())


def with_article(concept: Concept) -> str:
    """ "a dog", "an egg"."""
    return f"{concept.article} {concept.noun}"
