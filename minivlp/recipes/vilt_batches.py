"""What one training step sees: scenes, or your own captioned pictures, as rows of ids, labels and pixels.

A row is one forward pass of one text with one picture, and serves one objective: masked words (a true pair
with words hidden) or matching (whole words, a true or a wrong pair; true and random pairs also serve the
alignment). The rows of a step depend on (seed, step) alone, so a run that stops can go on as if it had not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from minivlp.data import Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.augment import rand_augment
from minivlp.data.own import Captions
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
from minivlp.mlm import IGNORE, mask_tokens
from minivlp.models.published.pixels import vilt_pixels
from minivlp.recipes.curriculum import Part, Stage, stage_at
from minivlp.text import WordPiece

TRUE_PAIR, RANDOM_PAIR, OTHER = 1.0, -1.0, 0.0  # what the alignment does with a row: pull, push, leave alone


@dataclass(frozen=True)
class Rows:
    """Rows whose pictures have one size.

    ids, labels (B, L) and text_mask (B, L) bool; labels −100 where nothing is to be predicted. pixels
    (B, 3, H, W) in [−1, 1], pixel_mask (B, H, W) bool or None. match (B,) is 1 for a true pair, 0 for a
    wrong one, −1 for a row that does not serve matching; align (B,) is +1, −1 or 0: pull together, push
    apart, leave alone. Where words and patches are also read apart, captions (B, L') holds what is true of
    each picture with one noun shown, caption_mask (B, L') its real words, and noun (B, L') that noun, in the
    rows so read.
    """

    ids: Tensor
    text_mask: Tensor
    labels: Tensor
    match: Tensor
    align: Tensor
    pixels: Tensor
    pixel_mask: Tensor | None = None
    captions: Tensor | None = None
    caption_mask: Tensor | None = None
    noun: Tensor | None = None

    def to(self, device: torch.device | str) -> "Rows":
        moved = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)

    def part(self, rank: int, size: int) -> "Rows":
        """Every `size`-th row, beginning with `rank`: so each kind of row is shared evenly."""
        return replace(self, **{k: v[rank::size] for k, v in vars(self).items() if v is not None})


class SceneRows:
    """The main job's rows: `rows(step)` → one Rows per size of picture in the stage at this step."""

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
        parts = {part for stage in stages for part in stage.parts}
        self._scenes = {
            part: Scenes(
                emojivl,
                nouns,
                canvas=part.canvas,
                kinds={part.kind: 1},
                sizes=part.sizes,
                seed=seed,
            )
            for part in parts
        }

    def __call__(self, step: int) -> list[Rows]:
        rng = np.random.default_rng((self.seed, step))
        by_size: dict[int, list[tuple]] = {}  # pictures of one size share a forward pass
        stage = stage_at(self.stages, step / self.steps)
        for part in stage.parts:
            by_size.setdefault(part.canvas, []).append(self._drawn(part, step, rng))
        groups = [(self._joined(drawn), _shown(drawn)) for drawn in by_size.values()]
        if not stage.apart:
            return [rows for rows, _ in groups]
        return [replace(rows, **self._captions(shown, stage.apart, rng)) for rows, shown in groups]

    def _drawn(self, part: Part, step: int, rng: np.random.Generator) -> tuple:
        """One part: scenes, texts, ids under the masks, match, align, and the picture of each row."""
        n = max(1, round(part.share * self.batch))
        scenes = [self._scenes[part][step * self.batch + i] for i in range(n)]
        texts, answers = [], []
        match, align, picture = np.full(n, -1), np.zeros(n, np.float32), np.arange(n)
        matching = round(part.matching * n)
        other = derangement(matching, rng) if matching > 1 else np.arange(matching)
        for i, scene in enumerate(scenes):
            text, hidden = scene.caption, ()
            if i >= matching:
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
        return scenes, texts, answers, match, align, picture

    def _false_caption(self, part: Part, scene: Scene, rng: np.random.Generator) -> str | None:
        """A caption that is false of a scene of two objects, or None for the picture of another scene."""
        if len(scene.objects) < 2:
            return None
        places, relation, noun = np.cumsum(part.wrong)
        draw = rng.random()
        if draw < places:
            return misplaced(scene)
        if draw < relation:
            return misrelated(scene, rng)
        return misnamed(scene, self._scenes[part], rng) if draw < noun else None

    def _joined(self, drawn: list[tuple]) -> Rows:
        _, texts, answers, match, align, _ = zip(*drawn, strict=True)
        ids, mask, labels = text_rows(self.tokenizer, list(chain(*texts)), list(chain(*answers)))
        match, align = torch.from_numpy(np.concatenate(match)), torch.from_numpy(np.concatenate(align))
        return Rows(ids, mask, labels, match, align, scene_pixels(_shown(drawn)))

    def _captions(self, scenes: Sequence[Scene], apart: float, rng: np.random.Generator) -> dict[str, Tensor]:
        """What is true of these pictures: captions that show one noun, caption_mask, and where it stands.

        Of two nouns, one would find the picture for both, and the other would not learn what its object looks
        like. The share that is read apart has its noun marked.
        """
        shown = [int(rng.integers(len(scene.slots))) for scene in scenes]
        texts = [self._showing(scene, slot) for scene, slot in zip(scenes, shown, strict=True)]
        ids, _, mask = self.tokenizer.batch(texts)
        noun = np.zeros_like(mask)
        for row in rng.permutation(len(scenes))[: math.ceil(apart * len(scenes))]:
            noun[row, noun_spans(scenes[row], self.tokenizer)[shown[row]]] = True  # a [MASK] a hidden piece
        arrays = {"captions": ids, "caption_mask": mask, "noun": noun}
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


def _shown(drawn: list[tuple]) -> list[Scene]:
    """The scene whose picture each row of these parts shows: a fresh gather, no picture is overwritten."""
    return [scenes[i] for scenes, *_, picture in drawn for i in picture]


class CaptionRows:
    """Rows of your own captioned pictures: ViLT's own recipe, whole-word masking and half of the pairs wrong.

    size: the shorter side in pixels; augment: RandAugment(2, 9) on every picture.
    """

    def __init__(
        self,
        captions: Captions,
        tokenizer: WordPiece,
        size: int,
        patch: int,
        max_text_len: int,
        batch: int,
        seed: int,
        p: float = 0.15,
        augment: bool = True,
    ):
        self.captions, self.tokenizer, self.size, self.patch = captions, tokenizer, size, patch
        self.max_text_len, self.batch, self.seed, self.p, self.augment = max_text_len, batch, seed, p, augment

    def __call__(self, step: int) -> list[Rows]:
        rng = np.random.default_rng((self.seed, step))
        n = min(self.batch, len(self.captions))
        items = [self.captions[int(i)] for i in rng.choice(len(self.captions), n, replace=False)]
        images = [rand_augment(item.image, rng) if self.augment else item.image for item in items]
        pixels, pixel_mask = vilt_pixels(images, self.size, self.patch)
        ids, word_ids, mask = self.tokenizer.batch([item.caption for item in items], self.max_text_len)
        t = self.tokenizer
        hidden, labels = mask_tokens(ids, word_ids, rng, len(t), t.mask_id, t.special_ids, self.p)
        picture, match = np.arange(n), np.ones(n, np.int64)
        if n > 1:
            wrong = rng.permutation(n)[: n // 2]
            picture[wrong], match[wrong] = derangement(n, rng)[wrong], 0
            # Two captions of one picture, or one caption twice, are no wrong pair.
            for i in wrong:
                j = picture[i]
                if items[i].caption == items[j].caption or np.array_equal(items[i].image, items[j].image):
                    picture[i], match[i] = i, 1
        nothing, unused = np.full_like(labels, IGNORE), np.full(n, -1)
        # An empty caption has no word to align.
        align = np.where(match == 1, TRUE_PAIR, RANDOM_PAIR) * (word_ids >= 0).any(1)
        masked = (hidden, mask, labels, unused, np.zeros(n), np.arange(n))
        matched = (ids, mask, nothing, match, align, picture)
        both = [torch.from_numpy(np.concatenate([a, b])) for a, b in zip(masked, matched, strict=True)]
        ids, mask, labels, match, align, picture = both
        return [Rows(ids, mask, labels, match, align.float(), pixels[picture], pixel_mask[picture])]
