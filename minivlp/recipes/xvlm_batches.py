"""What one step of X-VLM sees: regions with phrases, or whole pictures with captions, in one form.

A region batch holds crowds and a phrase for every object, an image batch holds pairs and their captions; a
caption's region is the whole picture. Steps of both kinds alternate at random. The rows of a step depend on
(seed, step) alone.

A wrong pair must be wrong. So only names are compared across regions ("a dog left of the middle" is true of
a dog in another picture too), each name once a batch, and to match, one region a picture: then neither a
region of the same picture nor one of an equal name can be drawn as a negative.

Sources: Zeng, Zhang and Li 2022 (X-VLM), sections 3.2 and 3.3: batches of regions and of images.
Left out: random crops around a box.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minivlp.boxes import xyxy_to_cxcywh
from minivlp.data import Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.crowds import Crowds, phrases
from minivlp.data.probes import meaning
from minivlp.mlm import mask_tokens
from minivlp.recipes.base import Batch
from minivlp.regions import patches_touched
from minivlp.text import WordPiece


@dataclass(frozen=True)
class RegionBatch(Batch):
    """R texts, each with its region of one of B pictures."""

    ids: Tensor  # (R, L) the texts
    hidden: Tensor  # (R, L) the texts with words masked
    labels: Tensor  # (R, L) the masked ids, −100 elsewhere
    text_mask: Tensor  # (R, L) bool
    pixels: Tensor  # (B, 3, H, W) in [−1, 1]
    picture: Tensor  # (R,) which of them
    inside: Tensor  # (R, N) bool, the patches of the region
    boxes: Tensor  # (R, 4) cxcywh in [0, 1]
    located: Tensor  # (R,) bool, False for captions of whole pictures: no phrase asks for their box
    contrast: Tensor  # (R,) bool, rows whose texts differ in meaning, all of them
    match: Tensor  # (R,) bool, rows of different pictures
    same: Tensor  # (R,) integers, equal where a text is true of the other's region
    step: int  # of the run


class RegionBatches:
    """`batches(step)` → one RegionBatch.

    pictures: a step; regions: share of the steps that are region batches; mask: probability of hiding a word.
    """

    def __init__(
        self,
        emojivl: EmojiVL,
        nouns: Sequence[Concept],
        tokenizer: WordPiece,
        canvas: int,
        patch: int,
        pictures: int,
        regions: float,
        mask: float,
        seed: int,
    ):
        self.tokenizer, self.patch, self.pictures = tokenizer, patch, pictures
        self.regions, self.mask, self.seed = regions, mask, seed
        self._crowds = Crowds(emojivl, nouns, canvas=canvas, seed=seed)
        self._pairs = Scenes(emojivl, nouns, canvas=canvas, seed=seed)

    def __call__(self, step: int) -> list[RegionBatch]:
        rng = np.random.default_rng((self.seed, step))
        of_regions = rng.random() < self.regions
        source = self._crowds if of_regions else self._pairs
        scenes = [source[step * self.pictures + i] for i in range(self.pictures)]
        return [self._regions(scenes, step, rng) if of_regions else self._captions(scenes, step, rng)]

    def _regions(self, scenes: Sequence[Scene], step: int, rng: np.random.Generator) -> RegionBatch:
        """One phrase for every object: of the kinds that it has, each equally likely."""
        picture, texts, boxes, names = [], [], [], []
        for b, scene in enumerate(scenes):
            of_row: dict[int, dict[str, list[str]]] = {}
            for phrase in phrases(scene):
                of_row.setdefault(phrase.row, {}).setdefault(phrase.kind, []).append(phrase.text)
            for row, kinds in of_row.items():
                kind = sorted(kinds)[int(rng.integers(len(kinds)))]
                texts.append(kinds[kind][int(rng.integers(len(kinds[kind])))])
                picture.append(b)
                boxes.append(scene.boxes[row])
                names.append(scene.objects[row] if kind == "name" else None)
        order = rng.permutation(len(texts))  # no object is always the first of its name
        contrast, match = (np.zeros(len(texts), bool) for _ in range(2))
        contrast[first_of_each([names[i] for i in order], order)] = True
        named = [i for i in order if names[i] is not None]
        match[first_of_each([picture[i] for i in named], named)] = True
        same = np.array([-1 if name is None else name for name in names])
        located = np.ones(len(texts), bool)
        return self._rows(scenes, texts, picture, np.array(boxes), located, contrast, match, same, step, rng)

    def _captions(self, scenes: Sequence[Scene], step: int, rng: np.random.Generator) -> RegionBatch:
        n, (H, W) = len(scenes), scenes[0].image.shape[:2]
        meanings = [meaning(scene) for scene in scenes]
        same = np.unique(meanings, axis=0, return_inverse=True)[1].ravel()
        contrast = np.zeros(n, bool)
        contrast[first_of_each(meanings, range(n))] = True
        boxes, texts = np.tile([0, 0, W, H], (n, 1)), [scene.caption for scene in scenes]
        nowhere, all_of_them = np.zeros(n, bool), np.ones(n, bool)
        return self._rows(scenes, texts, range(n), boxes, nowhere, contrast, all_of_them, same, step, rng)

    def _rows(self, scenes, texts, picture, boxes, located, contrast, match, same, step, rng) -> RegionBatch:
        t, (H, W) = self.tokenizer, scenes[0].image.shape[:2]
        ids, word_ids, text_mask = t.batch(texts)
        hidden, labels = mask_tokens(ids, word_ids, rng, len(t), t.mask_id, t.special_ids, self.mask)
        arrays = dict(
            ids=ids,
            hidden=hidden,
            labels=labels,
            text_mask=text_mask,
            picture=np.array(picture),
            inside=patches_touched(boxes, self.patch, H, W),
            boxes=(xyxy_to_cxcywh(boxes.astype(np.float64)) / [W, H, W, H]).astype(np.float32),
            located=located,
            contrast=contrast,
            match=match,
            same=same,
        )
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return RegionBatch(**tensors, pixels=scene_pixels(scenes), step=step)


def first_of_each(keys: Sequence[Hashable], rows: Sequence[int]) -> list[int]:
    """The row at the first appearance of each key but None."""
    first: dict[Hashable, int] = {}
    for key, row in zip(keys, rows, strict=True):
        if key is not None:
            first.setdefault(key, int(row))
    return list(first.values())
