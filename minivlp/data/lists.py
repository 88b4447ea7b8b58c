"""Lists of facts: what is where in a scene, as text that needs no picture.

    2 5 dog 4 0 guitar : a dog left of a guitar

A fact is the row and the column of an object's middle, each counted from 0 in BINS bins from the top left,
and its noun. The facts come in any order. A language model that has read such lists can be told of a scene by
words alone, and whoever puts something else in the place of the facts has to say the same.

Left out: sizes, and more than two objects.
"""

from collections.abc import Sequence
from random import Random

import numpy as np

from minivlp.core.require import fail
from minivlp.data.emojivl import Concept
from minivlp.data.names import scene_texts
from minivlp.data.probes import article_and_noun
from minivlp.data.scenes import Scene, Scenes, shuffled
from minivlp.text import WordPiece

BINS = 8  # rows, and columns
COLON = ":"  # between the facts and what is said of them


class Layouts(Scenes):
    """Scenes of pairs that nobody paints: without a picture, and with whole squares for boxes."""

    def _compose(self, rng, kind, frame, slots, concepts, squares, relation="") -> Scene:
        boxes = np.array([(x, y, x + side, y + side) for x, y, side in squares])
        nothing = np.zeros((0, 0, 3), np.uint8)
        return Scene(nothing, kind, frame, tuple(slots), boxes, tuple(c.id for c in concepts), relation)


def facts(scene: Scene, canvas: int, rng: Random) -> str:
    """What stands where in a scene of `canvas` pixels a side, in an order drawn by rng."""
    told = []
    for slot, (x1, y1, x2, y2) in zip(scene.slots + scene.unnamed, scene.boxes.tolist(), strict=True):
        row, column = ((low + high) * BINS // (2 * canvas) for low, high in ((y1, y2), (x1, x2)))
        told.append(f"{row} {column} {article_and_noun(slot)[1]}")
    return " ".join(shuffled(rng, told))


def list_tokenizer(nouns: Sequence[Concept], vocab_size: int) -> WordPiece:
    """The vocabulary of captions and lists. Raises ValueError when a noun is not one token of it."""
    numbers = " ".join(map(str, range(BINS)))
    tokenizer = WordPiece.train([*scene_texts(nouns), f"{numbers} {COLON}"], vocab_size, min_count=1)
    broken = [c.noun for c in nouns if len(tokenizer.encode(c.noun)) > 1]
    if broken:
        fail(
            "vocab_size",
            "must hold every noun as one token, for lists of one length",
            f"{broken[0]} in parts",
        )
    return tokenizer
