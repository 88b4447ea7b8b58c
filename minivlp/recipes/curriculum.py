"""The curriculum of the main job: which scenes a step draws, and which questions it asks of them.

Words attach to patches and to places long before they attach to pairs of patches, so easy scenes come
first: single objects on a small canvas (few patches, many scenes a second; ViLT reads any size), then one
object and where it lies ("a dog left of the middle"), then the same with another object in the picture,
so that the word has to find its own, and only then pairs ("a dog left of a guitar"). Without the third
stage the relation stays at one in two: the axis is learned and the order is not. Earlier kinds keep a share
of every batch, because what is not seen is forgotten; single objects, whose canvas needs a forward pass of
its own, leave when pairs come. Words and patches are also read apart (apart.py), which takes half a forward
pass: in the last and longest stage, those of half the rows. The model stays the same throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Part:
    """A share of a batch. Shares of rows and probabilities lie in [0, 1]; sizes are shares of the canvas."""

    kind: str  # of scene
    share: float  # of the batch
    canvas: int = 48  # pixels
    sizes: tuple[float, float] = (0.32, 0.48)  # side of an object
    matching: float = 0.5  # share of rows that serve matching; the others have masked words
    relations: float = 0.5  # probability that the relation phrase is what is hidden
    all_nouns: float = 0.5  # probability that every noun is hidden, not one
    # Of the wrong pairs with two objects, the shares whose caption has the right nouns in the wrong places,
    # the wrong relation, and one wrong noun (tasks.py); all others have the picture of another scene.
    wrong: tuple[float, float, float] = (0.5, 0.0, 0.0)


@dataclass(frozen=True)
class Stage:
    """Parts that make up every batch until the given share of the run is over."""

    until: float
    parts: tuple[Part, ...]
    apart: float = 0.0  # share of the rows whose words and patches are also read apart (apart.py)


def stage_at(stages: Sequence[Stage], share: float) -> Stage:
    """The stage after `share` of the run, in [0, 1)."""
    return next(stage for stage in stages if share < stage.until)


SINGLE = Part("one", 1.0, canvas=24, sizes=(0.5, 0.77), matching=0.5)
CPU_STAGES = (
    Stage(0.11, (replace(SINGLE, matching=0.6),), apart=1.0),
    Stage(0.21, (replace(SINGLE, share=0.2), Part("place", 0.8, relations=0.4)), apart=1.0),
    Stage(0.4, (replace(SINGLE, share=0.1), Part("place", 0.1), Part("pick", 0.8)), apart=1.0),
    Stage(1.0, (Part("pick", 0.15), Part("pair", 0.85, wrong=(0.3, 0.1, 0.3))), apart=0.5),
)
# The same scenes at twice the size.
GPU_STAGES = tuple(
    replace(stage, parts=tuple(replace(part, canvas=2 * part.canvas) for part in stage.parts))
    for stage in CPU_STAGES
)
STAGES = {"cpu": CPU_STAGES, "gpu": GPU_STAGES}
