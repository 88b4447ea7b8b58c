"""What one step of ViLT sees: which scenes are drawn, and what is asked of each.

An example is one forward pass of one text with one picture, and serves one objective: masked words (a true
pair with words hidden), matching (whole words, a true or a wrong pair; true and random pairs also serve the
alignment), or the next word (a true pair; no word sees a later one). The batches of a step depend on (seed,
step) alone, so a run that stops can go on as if it had not.

First the captions of pairs are written, word after word, and only then filled in and matched. Writing asks at
every word what the picture shows there, and after "a dog left of" it asks for what is right of the dog. A
match is one bit for a whole caption, and a model that begins with it learns the order of two nouns last, if
at all: then it takes a curriculum of easier scenes (chapters/main_job.md). Some pictures of two objects have
a caption that speaks of one alone, "a dog left of the middle". In all stages nouns also have to find their
pictures (noun_contrast.py), which takes half a forward pass: in the longer stage half of the examples do so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from minivlp.data import Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.probes import (
    hide_relation,
    hide_slots,
    misnamed,
    misplaced,
    misrelated,
    noun_spans,
    text_rows,
)
from minivlp.itm import derangement
from minivlp.mlm import IGNORE
from minivlp.recipes.base import Batch
from minivlp.targets import next_words
from minivlp.text import WordPiece

TRUE_PAIR, RANDOM_PAIR, OTHER = 1.0, -1.0, 0.0  # what the alignment does with a pair: pull, push, leave alone


@dataclass(frozen=True)
class Wrong:
    """How wrong pairs with two objects are made: shares; the rest has the picture of another scene."""

    places: float = 0.0  # the right nouns in the wrong places
    relation: float = 0.0  # the wrong relation
    noun: float = 0.0  # one wrong noun


@dataclass(frozen=True)
class Part:
    """A share of a batch. Shares and probabilities lie in [0, 1]; sizes are shares of the canvas."""

    kind: str  # of scene
    share: float  # of the batch
    canvas: int = 48  # pixels
    sizes: tuple[float, float] = (0.32, 0.48)  # side of an object
    matching: float = 0.5  # share of examples that serve matching; the others have masked words
    relations: float = 0.5  # probability that the relation phrase is what is hidden
    all_nouns: float = 0.5  # probability that every noun is hidden, not one
    wrong: Wrong = Wrong(places=0.5)


class Written(Part):
    """A part whose captions are to be written, word after word."""


@dataclass(frozen=True)
class Stage:
    """Parts that make up every batch until the given share of the run is over."""

    until: float
    parts: tuple[Part, ...]
    contrast: float = 0.0  # share of the examples whose noun has to find its picture (noun_contrast.py)


def stage_at(stages: Sequence[Stage], share: float) -> Stage:
    """The stage after `share` of the run, in [0, 1)."""
    return next(stage for stage in stages if share < stage.until)


CPU_STAGES = (
    Stage(0.3, (Written("pair", 1.0, matching=0.0),), contrast=1.0),
    Stage(1.0, (Part("pick", 0.15), Part("pair", 0.85, wrong=Wrong(0.3, 0.1, 0.3))), contrast=0.5),
)
# The same scenes at twice the size.
GPU_STAGES = tuple(
    replace(stage, parts=tuple(replace(part, canvas=2 * part.canvas) for part in stage.parts))
    for stage in CPU_STAGES
)
STAGES = {"cpu": CPU_STAGES, "gpu": GPU_STAGES}


@dataclass(frozen=True)
class ViltBatch(Batch):
    """Examples whose pictures have one size, and whose words are all to be written or all to be filled in."""

    ids: Tensor  # (B, L) words, some of them [MASK]
    text_mask: Tensor  # (B, L) bool, True = a word
    labels: Tensor  # (B, L) the words under the masks, or the next ones; −100 where nothing is predicted
    match: Tensor  # (B,) 1 = a true pair, 0 = a wrong one, −1 = does not serve matching
    align: Tensor  # (B,) +1 = pull together, −1 = push apart, 0 = leave alone
    pixels: Tensor  # (B, 3, H, W) in [−1, 1]
    pixel_mask: Tensor | None = None  # (B, H, W) bool, None = all real
    contrast_ids: Tensor | None = None  # (B, L') what is true of each picture, one noun shown
    contrast_mask: Tensor | None = None  # (B, L') its real words
    noun: Tensor | None = None  # (B, L') that noun, in the examples whose noun has to find its picture
    written: bool = False

    @property
    def hidden(self) -> Tensor:
        """(B, L) bool, where a word is predicted."""
        return self.labels != IGNORE

    @property
    def paired(self) -> Tensor:
        """(B,) bool, the examples that serve matching."""
        return self.match >= 0

    @property
    def contrasted(self) -> int:
        """The number of examples whose noun has to find its picture."""
        return 0 if self.noun is None else int(self.noun.any(1).sum())


@dataclass(frozen=True)
class Drawn:
    """The examples of one part, in order."""

    scenes: list[Scene]
    texts: list[str]  # with [MASK]s
    answers: list[Sequence[int]]  # the ids under them
    match: np.ndarray  # (n,) as in ViltBatch
    align: np.ndarray  # (n,)
    picture: np.ndarray  # (n,) whose picture the example shows

    @property
    def shown(self) -> list[Scene]:
        return [self.scenes[i] for i in self.picture]


class SceneBatches:
    """The main job's examples: `batches(step)` → a ViltBatch for each size of picture in the stage."""

    def __init__(
        self,
        emojivl: EmojiVL,
        nouns: Sequence[Concept],
        tokenizer: WordPiece,
        stages: Sequence[Stage],
        steps: int,
        batch: int,
        seed: int,
    ):
        self.tokenizer, self.stages, self.steps, self.batch, self.seed = tokenizer, stages, steps, batch, seed
        self._scenes = {
            part: Scenes(
                emojivl, nouns, canvas=part.canvas, kinds={part.kind: 1}, sizes=part.sizes, seed=seed
            )
            for part in {part for stage in stages for part in stage.parts}
        }

    def __call__(self, step: int) -> list[ViltBatch]:
        rng = np.random.default_rng((self.seed, step))
        stage = stage_at(self.stages, step / self.steps)
        passes: dict[tuple, list[Drawn]] = {}  # pictures of one size share a forward pass
        for part in stage.parts:
            key = (part.canvas, isinstance(part, Written))
            passes.setdefault(key, []).append(self._drawn(part, step, rng))
        batches = [self._joined(parts, written) for (_, written), parts in passes.items()]
        if not stage.contrast:
            return batches
        shown = [list(chain(*(part.shown for part in parts))) for parts in passes.values()]
        both = zip(batches, shown, strict=True)
        return [replace(batch, **self._contrast(scenes, stage.contrast, rng)) for batch, scenes in both]

    def sizes(self, stage: Stage) -> dict[int, int]:
        """The examples of the stage's batches, by their canvas."""
        sizes: dict[int, int] = {}
        for part in stage.parts:
            sizes[part.canvas] = sizes.get(part.canvas, 0) + self._examples(part)
        return sizes

    def _examples(self, part: Part) -> int:
        return max(1, round(part.share * self.batch))

    def _drawn(self, part: Part, step: int, rng: np.random.Generator) -> Drawn:
        n = self._examples(part)
        scenes = [self._scenes[part][step * self.batch + i] for i in range(n)]
        texts, answers = [], []
        match, align, picture = np.full(n, -1), np.zeros(n, np.float32), np.arange(n)
        matching = round(part.matching * n)
        other = derangement(matching, rng) if matching > 1 else np.arange(matching)
        for i, scene in enumerate(scenes):
            text, hidden = scene.caption, ()
            if isinstance(part, Written):
                pass
            elif i >= matching:
                text, hidden = self._masked(part, scene, rng)
            else:
                match[i], align[i] = 1, TRUE_PAIR
                if rng.random() < 0.5:
                    if false := self._false_caption(part, scene, rng):
                        text, match[i], align[i] = false, 0, OTHER
                    elif scenes[other[i]].caption != scene.caption:
                        picture[i], match[i], align[i] = other[i], 0, RANDOM_PAIR
            texts.append(text)
            answers.append(hidden)
        return Drawn(scenes, texts, answers, match, align, picture)

    def _false_caption(self, part: Part, scene: Scene, rng: np.random.Generator) -> str | None:
        """A caption that is false of a scene of two objects, or None for the picture of another scene."""
        if len(scene.objects) < 2:
            return None
        places, relation, noun = np.cumsum([part.wrong.places, part.wrong.relation, part.wrong.noun])
        draw = rng.random()
        if draw < places:
            return misplaced(scene)
        if draw < relation:
            return misrelated(scene, rng)
        return misnamed(scene, self._scenes[part], rng) if draw < noun else None

    def _joined(self, parts: Sequence[Drawn], written: bool = False) -> ViltBatch:
        texts, answers, shown = (
            list(chain(*(getattr(p, name) for p in parts))) for name in ("texts", "answers", "shown")
        )
        match, align = (np.concatenate([getattr(p, name) for p in parts]) for name in ("match", "align"))
        served = torch.from_numpy(match), torch.from_numpy(align)
        rows = text_rows(self.tokenizer, texts, answers)
        if written:
            rows = (*rows[:2], next_words(*rows[:2]))
        return ViltBatch(*rows, *served, scene_pixels(shown), written=written)

    def _contrast(self, scenes: Sequence[Scene], share: float, rng: np.random.Generator) -> dict[str, Tensor]:
        """What is true of these pictures: captions that show one noun, and where it stands.

        Of two nouns, one would find the picture for both, and the other would not learn what its object looks
        like. The noun is marked in the `share` of the examples that are to find their pictures.
        """
        shown = [int(rng.integers(len(scene.slots))) for scene in scenes]
        texts = [self._showing(scene, slot) for scene, slot in zip(scenes, shown, strict=True)]
        ids, _, mask = self.tokenizer.batch(texts)
        noun = np.zeros_like(mask)
        for row in rng.permutation(len(scenes))[: math.ceil(share * len(scenes))]:
            noun[row, noun_spans(scenes[row], self.tokenizer)[shown[row]]] = True  # a [MASK] a hidden piece
        arrays = {"contrast_ids": ids, "contrast_mask": mask, "noun": noun}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _showing(self, scene: Scene, slot: int) -> str:
        """The caption with all nouns hidden but one."""
        others = set(range(len(scene.slots))) - {slot}
        return hide_slots(scene, others, self.tokenizer)[0] if others else scene.caption

    def _masked(self, part: Part, scene: Scene, rng: np.random.Generator) -> tuple[str, Sequence[int]]:
        """Hide the relation phrase, or one noun, or all nouns."""
        if scene.relation and rng.random() < part.relations:
            text, word = hide_relation(scene)
            return text, self.tokenizer.encode(word)
        which = range(len(scene.slots))
        if len(scene.slots) > 1 and rng.random() >= part.all_nouns:
            which = [int(rng.integers(len(scene.slots)))]
        return hide_slots(scene, which, self.tokenizer)
