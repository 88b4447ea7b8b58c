"""Every size of every experiment, in one place: FULL, and QUICK for a first look in minutes.

An experiment is done again when its part of these settings is not the one that its stored result was made
with, so a number changed here costs the experiments that it belongs to and no others.
"""

from dataclasses import dataclass, replace

from minivlp.data import TRAINING_ARTISTS
from minivlp.recipes.base import Settings as Sizes
from minivlp.recipes.chameleon import ChameleonSettings
from minivlp.recipes.coca import CocaSettings
from minivlp.recipes.dual import DualSettings
from minivlp.recipes.vilt import ViltSettings
from minivlp.recipes.vilt_batches import Part, Stage, Wrong
from minivlp.recipes.xvlm import XvlmSettings

# Eight things of different colour and shape.
NOUNS = ("dog", "guitar", "tomato", "key", "sunflower", "candle", "cloud", "trophy")
SIZES = (0.42, 0.5)  # of objects that share a picture, as shares of its side
ALONE = (0.34, 0.4)  # of one that is alone, which data/scenes.py enlarges by 1.25: the same size in pixels


def curriculum(canvas: int) -> tuple[Stage, ...]:
    """The stages of recipes/vilt_batches.py in pictures of one size, which a dual encoder needs.

    Wrong captions with two objects: half in the wrong places, the others with a wrong relation, a wrong noun,
    or another picture.
    """
    places = {"canvas": canvas, "sizes": SIZES, "relations": 0.5, "wrong": Wrong(0.5, 0.1, 0.2)}
    pick = Part("pick", 1.0, **places)
    return (
        Stage(0.15, (Part("one", 1.0, canvas, ALONE, matching=0.6),)),
        Stage(0.4, (Part("place", 1.0, **places | {"relations": 0.4}),)),
        Stage(0.75, (pick,)),
        Stage(1.0, (replace(pick, share=0.2), Part("pair", 0.8, **places))),
    )


@dataclass(frozen=True)
class WorldSize:
    """The world of eight objects; `items` pictures a question, retrieval in `sets` of `candidates`."""

    train: ViltSettings = ViltSettings(  # noqa: RUF009
        nouns=NOUNS, canvas=32, patch=8, dim=96, layers=4, heads=3, hidden=192, max_text_len=24,
        vocab_size=512, steps=2000, batch=48, wpa_weight=0.1, mask=0.2, save_every=1000, report_every=1000,
    )  # fmt: skip
    stages: tuple[Stage, ...] = curriculum(32)
    artists: tuple[str, ...] = ("noto",)
    pieces: int = 70  # tokens of the vocabulary in which most nouns fall to pieces
    items: int = 512
    sets: int = 8
    candidates: int = 16


@dataclass(frozen=True)
class NamingSize:
    """Dual encoders that name drawings: one training a loss and a batch size, all of equally many steps."""

    train: DualSettings = DualSettings(  # noqa: RUF009
        scenes=0, embed=64, dim=96, layers=2, heads=2, hidden=192, text_dim=64, text_heads=2, text_hidden=128,
        steps=1000, batch=256, lr=3e-3, matrix_lr=0.02, save_every=1000, report_every=1000,
    )  # fmt: skip
    every: int = 9  # concept is learned, about a hundred
    artists: tuple[str, ...] = ("noto", "twemoji", "emojione")
    batches: tuple[int, ...] = (6, 20, 60)


@dataclass(frozen=True)
class RegionsSize:
    """X-VLM, with regions and without, in the world's eight objects but drawn by all training artists."""

    train: XvlmSettings = XvlmSettings(  # noqa: RUF009
        nouns=NOUNS, canvas=32, patch=8, dim=64, image_layers=2, text_layers=1, cross_layers=1, heads=2,
        hidden=128, embed=64, steps=2000, batch=16, save_every=1000, report_every=1000,
    )  # fmt: skip
    items: int = 512


@dataclass(frozen=True)
class ClockSize:
    """The archetypes' parts against the clock, at sizes whose work is more than the cost of calling it."""

    dim: int = 192
    blocks: int = 4
    heads: int = 6
    patch: int = 16
    image_size: int = 160  # pixels
    words: int = 12  # tokens of a text
    batch: int = 8
    seconds: float = 20.0  # to repeat, after the first four repetitions


@dataclass(frozen=True)
class ChunksSize:
    """The sigmoid loss of `batch` rows of width `dim`, whole, in `blocks` of so many rows, and tiled."""

    batch: int = 192
    dim: int = 64
    blocks: tuple[int, ...] = (1, 7, 64, 192)
    draws: int = 8


@dataclass(frozen=True)
class Small:
    """A training of less than a minute; `items` test pictures, and retrieval in `sets` of `candidates`."""

    train: Sizes
    artists: tuple[str, ...] = TRAINING_ARTISTS
    items: int = 512
    sets: int = 8
    candidates: int = 16


WORLD = {"nouns": NOUNS[:4], "canvas": 32, "save_every": 10_000, "report_every": 10_000}
CAPTIONS = CocaSettings(**WORLD, image_layers=1, layers=1, steps=700)
CODES = ChameleonSettings(**WORLD, dim=32, steps=300, batch=32)
SCORES = ChameleonSettings(**WORLD, dim=64, layers=2, heads=2, hidden=128, codes=64, clustered=200, steps=200,
                           batch=32, lr=1e-2, matrix_lr=0.05, cooldown=0.0)  # fmt: skip
WRITING = ChameleonSettings(**WORLD, dim=64, layers=2, heads=2, hidden=128, codes=64, steps=2000, batch=32,
                            image_first=0.25)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a run of all claims is made of; `seeds` at least 2, or there is no interval."""

    seeds: int = 3
    many: int = 5  # seeds of the experiments whose training takes less than a minute
    world: WorldSize = WorldSize()
    naming: NamingSize = NamingSize()
    regions: RegionsSize = RegionsSize()
    clock: ClockSize = ClockSize()
    chunks: ChunksSize = ChunksSize()
    captions: Small = Small(CAPTIONS)
    codes: Small = Small(CODES)
    scores: Small = Small(SCORES, items=256)
    writing: Small = Small(WRITING)


FULL = Settings()
QUICK = Settings(
    seeds=2,
    many=2,
    world=replace(FULL.world, train=replace(FULL.world.train, steps=600), items=256, sets=4),
    naming=replace(FULL.naming, train=replace(FULL.naming.train, steps=250)),
    regions=replace(FULL.regions, train=replace(FULL.regions.train, steps=300), items=256),
    clock=replace(FULL.clock, seconds=6.0),
)
