"""X-VLM: contrast, matching and masked words on regions and on pictures, and a box for each phrase.

A region batch holds crowds and a phrase for every object, an image batch holds pairs and their captions; a
caption's region is the whole picture. Steps of both kinds alternate at random. The loss of either is

    loss = InfoNCE(regions, texts) + matching + masked words + box loss,        all weights 1,

each the mean over its rows. The box of a phrase is read from the whole picture, the other terms from its
region. Matching has three pairs a row: the true one, its text with a hard wrong region and its region with a
hard wrong text, drawn by the similarities of the contrastive term (itm.py). A batch without boxes has a box
loss of 0.

A wrong pair must be wrong. So only names are compared across regions ("a dog left of the middle" is true of
a dog in another picture too), each name once a batch, and to match, one region a picture: then neither a
region of the same picture nor one of an equal name can be drawn as a negative.

Sources: Zeng, Zhang and Li 2022 (X-VLM), sections 3.2 and 3.3: batches of regions and of images.
Left out: random crops around a box, spans of hidden words, gathering negatives from several processes, and
own captions, which have no boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.boxes import box_loss, xyxy_to_cxcywh
from minivlp.core.require import fail
from minivlp.data import CPU_NOUNS, Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.crowds import Crowds, Phrase, phrases
from minivlp.data.names import read_caption
from minivlp.data.probes import first_of_each, meaning
from minivlp.evaluation.splits import Progress
from minivlp.evaluation.xvlm import (
    ask_phrases,
    best_guess,
    evaluate_xvlm,
    iou,
    predict_boxes,
    report_xvlm,
    true_boxes,
)
from minivlp.infonce import infonce
from minivlp.itm import hard_negatives, itm_loss
from minivlp.mlm import IGNORE, mask_tokens, mlm_loss
from minivlp.models.xvlm import Xvlm, XvlmConfig, small_init, whole_picture
from minivlp.pictures.sheets import grounding_sheet
from minivlp.recipes.base import Batch, Recipe, Settings, Terms
from minivlp.regions import patches_touched, region_mask, region_tokens
from minivlp.text import WordPiece, split_words
from minivlp.training.run import need_writable
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers

CHECKED, CHECK_SEED = 128, 1  # phrases of each kind asked about twenty times during training
DRAWN, DRAWN_SEED = 15, 7  # phrases whose boxes are drawn
SHOWN, DEMO_SEED = 10, 11  # pictures of the demo
TRIES = 2000  # scenes looked through for those that a phrase is true of
OTHERS = 4  # nouns that may lie beside those of the phrase
# What `--without` changes, to see what it is good for.
ABLATIONS = {"boxes": {"box_weight": 0.0}, "regions": {"regions": 0.0}}


@dataclass(frozen=True)
class XvlmSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    dim: int = 96
    image_layers: int = 3
    text_layers: int = 1
    cross_layers: int = 2
    heads: int = 3
    hidden: int = 192
    embed: int = 96
    vocab_size: int = 512
    steps: int = 3000
    batch: int = 16  # pictures a step
    regions: float = 0.8  # share of the steps that show regions; the others show captions of whole pictures
    box_weight: float = 1.0
    mask: float = 0.25  # probability of hiding a word


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
    """`batches(step)` → one RegionBatch. The rows of a step depend on (seed, step) alone."""

    def __init__(
        self, emojivl: EmojiVL, nouns: Sequence[Concept], tokenizer: WordPiece, settings: XvlmSettings
    ):
        self.tokenizer, self.settings = tokenizer, settings
        drawn = {"canvas": settings.canvas, "seed": settings.seed}
        self._crowds, self._pairs = Crowds(emojivl, nouns, **drawn), Scenes(emojivl, nouns, **drawn)

    def __call__(self, step: int) -> list[RegionBatch]:
        s, rng = self.settings, np.random.default_rng((self.settings.seed, step))
        of_regions = rng.random() < s.regions
        source = self._crowds if of_regions else self._pairs
        scenes = [source[step * s.batch + i] for i in range(s.batch)]
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
        rows = {"located": np.ones(len(texts), bool), "contrast": contrast, "match": match, "same": same}
        return self._rows(scenes, texts, picture, np.array(boxes), step, rng, **rows)

    def _captions(self, scenes: Sequence[Scene], step: int, rng: np.random.Generator) -> RegionBatch:
        n, (H, W) = len(scenes), scenes[0].image.shape[:2]
        meanings = [meaning(scene) for scene in scenes]
        same = np.unique(meanings, axis=0, return_inverse=True)[1].ravel()
        contrast = np.zeros(n, bool)
        contrast[first_of_each(meanings, range(n))] = True
        boxes, texts = np.tile([0, 0, W, H], (n, 1)), [scene.caption for scene in scenes]
        rows = {"located": np.zeros(n, bool), "contrast": contrast, "match": np.ones(n, bool), "same": same}
        return self._rows(scenes, texts, range(n), boxes, step, rng, **rows)

    def _rows(self, scenes, texts, picture, boxes, step, rng, **arrays) -> RegionBatch:
        t, (H, W) = self.tokenizer, scenes[0].image.shape[:2]
        ids, word_ids, text_mask = t.batch(texts)
        hidden, labels = mask_tokens(ids, word_ids, rng, len(t), t.mask_id, t.special_ids, self.settings.mask)
        arrays |= {"ids": ids, "hidden": hidden, "labels": labels, "text_mask": text_mask}
        arrays |= {"picture": np.array(picture), "inside": patches_touched(boxes, self.settings.patch, H, W)}
        arrays["boxes"] = (xyxy_to_cxcywh(boxes.astype(np.float64)) / [W, H, W, H]).astype(np.float32)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return RegionBatch(**tensors, pixels=scene_pixels(scenes), step=step)


class XvlmRecipe(Recipe):
    """X-VLM on regions of crowds and on pairs with their captions."""

    Settings, Config, Model = XvlmSettings, XvlmConfig, Xvlm
    presets = {"cpu": XvlmSettings()}
    terms = ("itc", "itm", "mlm", "box")
    ablations = ABLATIONS

    @cached_property
    def batches(self) -> RegionBatches:
        return RegionBatches(self.emojivl, self.nouns, self.tokenizer, self.settings)

    def new_model(self) -> Xvlm:
        return small_init(super().new_model())

    def matrices(self, model: Xvlm) -> list[nn.Parameter]:
        return [*super().matrices(model), model.mlm.dense.weight]

    def loss(self, model: Xvlm, batches: Sequence[RegionBatch], workers: Workers = ONE_PROCESS) -> Terms:
        return xvlm_loss(model, batches, self.settings)

    @cached_property
    def _asked(self) -> dict[str, list]:
        """Phrases of every kind with scenes of seen and of unseen artists."""
        groups = {"seen": None, "unseen": self.emojivl.unseen_artists}
        return {split: self._phrases(a, CHECK_SEED) for split, a in groups.items() if a != ()}

    def _phrases(self, artists: Sequence[str] | None, seed: int) -> list:
        """Phrases of all kinds in turn, each with its scene."""
        source = Crowds(self.emojivl, self.nouns, artists, self.settings.canvas, pairs="held_out", seed=seed)
        return [item for trio in zip(*ask_phrases(source, CHECKED).values(), strict=True) for item in trio]

    @torch.inference_mode()
    def check(self, model: Xvlm) -> dict[str, float]:
        """Grounding for some phrases."""
        values = {}
        for split, items in self._asked.items():
            right = iou(predict_boxes(model, self.tokenizer, items), true_boxes(items)) >= 0.5
            values[f"grounding_{split}"] = float(right.mean())
        return values

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        what = (trained.tokenizer, self.emojivl, self.nouns, trained.canvas, items, seed, progress)
        return evaluate_xvlm(trained.model, *what)

    report = staticmethod(report_xvlm)

    @cached_property
    def _drawn(self) -> list:
        return self._phrases(self.emojivl.shown_artists, DRAWN_SEED)

    @property
    def chance(self) -> dict[str, float]:
        chance = best_guess(true_boxes(self._drawn))
        return dict.fromkeys(("grounding_seen", "grounding_unseen"), chance)

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """curves.png, and grounding.png with the boxes found for phrases in unseen scenes."""
        items = self._drawn[:DRAWN]
        with torch.inference_mode():
            boxes = predict_boxes(trained.model, trained.tokenizer, items)
        _draw_boxes(folder / "grounding.png", items, boxes)
        return [*super().draw(trained, folder, records), folder / "grounding.png"]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        """Find a phrase in ten pictures by artists that training never showed, where the data has some.

        A name is asked for among other objects, a place or a relation among twins: "a dog left of the
        middle", "a dog above a guitar". Prints, and writes demo.png into the folder. Raises ValueError for a
        word that the model has never read, and for what is no phrase about one object.
        """
        phrase, named = read_caption(query, self.nouns)
        need_writable(folder / "demo.png", make_folder=True)
        few, artists = named + [c for c in self.nouns if c not in named][:OTHERS], self.emojivl.shown_artists
        source, items = Crowds(self.emojivl, few, artists, trained.canvas, pairs="all", seed=DEMO_SEED), []
        for scene in map(source.__getitem__, range(TRIES)):
            items += [(scene, p) for p in phrases(scene) if " ".join(split_words(p.text)) == phrase]
            if len(items) >= SHOWN:
                break
        if not items:
            example = '"a dog", "a dog left of the middle" or "a dog above a guitar"'
            fail("caption", f"must be a phrase about one object, as {example}", repr(phrase))
        boxes = predict_boxes(trained.model.to(device), trained.tokenizer, items)
        overlaps = iou(boxes, true_boxes(items))
        right = int((overlaps >= 0.5).sum())
        screen.say(f"{len(items)} pictures by {', '.join(artists)}; {right} boxes right (IoU at least 0.5)")
        screen.say(" IoU  the picture shows")
        for (scene, _), overlap in zip(items, overlaps, strict=True):
            screen.say(f"{overlap:.2f}  {scene.caption}")
        _draw_boxes(folder / "demo.png", items, boxes)
        screen.say(f"wrote {folder / 'demo.png'}")


def _draw_boxes(path: Path, items: Sequence[tuple[Scene, Phrase]], found: np.ndarray) -> None:
    rows = [(s.image, p.text, s.boxes[p.row], box) for (s, p), box in zip(items, found, strict=True)]
    grounding_sheet(path, rows)


def xvlm_loss(model: Xvlm, batches: Sequence[RegionBatch], settings: XvlmSettings) -> Terms:
    """The terms of one step, each the mean over its rows, summed over the batches, already weighted."""
    terms: Terms = {}
    for batch in batches:
        for name, term in _terms(model, batch, settings).items():
            terms[name] = terms.get(name, 0) + term
    return terms


def _terms(model: Xvlm, batch: RegionBatch, settings: XvlmSettings) -> Terms:
    patches = model.image_patches(batch.pixels)  # (B, N, D): the image encoder runs once
    words = model.text_words(batch.ids, batch.text_mask)  # (R, L, D)
    regions, real = region_tokens(patches[batch.picture], batch.inside), region_mask(batch.inside)
    x, y = model.image_vector(regions[:, 0]), model.text_vector(words)  # (R, embed)
    terms = {}
    if batch.contrast.any():
        terms["itc"] = infonce(x[batch.contrast], y[batch.contrast], model.scale)
    text, region, labels = matching_pairs(x, y, model.scale, batch, settings.seed)
    if len(labels):
        fused = model.fuse(words[text], batch.text_mask[text], regions[region], real[region])
        terms["itm"] = itm_loss(model.itm_logits(fused[:, 0]), labels)
    masked_rows = (batch.labels != IGNORE).any(1)  # (R,)
    if masked_rows.any():
        hidden = model.text_words(batch.hidden[masked_rows], batch.text_mask[masked_rows])
        fused = model.fuse(hidden, batch.text_mask[masked_rows], regions[masked_rows], real[masked_rows])
        masked = batch.labels[masked_rows] != IGNORE  # (R', L)
        states = model.mlm_hidden(fused[masked])
        terms["mlm"] = mlm_loss(states, model.mlm_weight, model.mlm_bias, batch.labels[masked_rows][masked])
    if settings.box_weight:
        at = batch.located
        everywhere = whole_picture(patches)[batch.picture[at]]  # (R', 1+N, D)
        all_real = everywhere.new_ones(everywhere.shape[:2]) > 0
        fused = model.fuse(words[at], batch.text_mask[at], everywhere, all_real)
        terms["box"] = settings.box_weight * box_loss(model.boxes(fused[:, 0]), batch.boxes[at])
    return terms


def matching_pairs(
    x: Tensor, y: Tensor, scale: Tensor, batch: RegionBatch, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of texts, rows of regions, labels (3M,): M true pairs, M with wrong regions, M with wrong texts.

    x, y (R, embed) unit regions and texts. The wrong ones are drawn by (seed, step). Empty when all texts of
    the batch mean the same.
    """
    true = batch.match.nonzero()[:, 0]  # (M,)
    same = batch.same[true]
    if not len(true) or bool((same == same[0]).all()):
        none = true[:0]
        return none, none, none
    rng = np.random.default_rng((seed, batch.step, 1))
    S = (scale * y[true] @ x[true].T).detach().cpu().double().numpy()  # (M, M), texts by regions
    ids = same.cpu().numpy()
    region, text = (torch.from_numpy(hard_negatives(s, rng, ids)).to(true.device) for s in (S, S.T))
    labels = torch.zeros(3 * len(true), dtype=torch.long, device=true.device)
    labels[: len(true)] = 1
    return torch.cat([true, true, true[text]]), torch.cat([true, true[region], true]), labels
