"""X-VLM: contrast, matching and masked words on regions and on pictures, and a box for each phrase.

    loss = InfoNCE(regions, texts) + matching + masked words + box loss,        all weights 1,

each the mean over its rows. The box of a phrase is read from the whole picture, the other terms from its
region. Matching has three pairs a row: the true one, its text with a hard wrong region and its region with a
hard wrong text, drawn by the similarities of the contrastive term (itm.py). A batch without boxes has a box
loss of 0.

Sources: Zeng, Zhang and Li 2022 (X-VLM), section 3.3.
Left out: spans of hidden words, gathering negatives from several processes, and own captions, which have no
boxes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.boxes import box_loss
from minivlp.data import CPU_NOUNS
from minivlp.data.crowds import Crowds
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
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.xvlm import Xvlm, XvlmConfig, small_init, whole_picture
from minivlp.pictures.ground import ground
from minivlp.pictures.sheets import grounding_sheet
from minivlp.recipes.base import Recipe, Settings
from minivlp.recipes.xvlm_batches import RegionBatch, RegionBatches
from minivlp.regions import region_mask, region_tokens
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers

CHECKED, CHECK_SEED = 128, 1  # phrases of each kind asked about twenty times during training
DRAWN, DRAWN_SEED = 15, 7  # phrases whose boxes are drawn
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


class XvlmRecipe(Recipe):
    """X-VLM on regions of crowds and on pairs with their captions."""

    Settings, Config, Model = XvlmSettings, XvlmConfig, Xvlm
    presets = {"cpu": XvlmSettings()}
    terms = ("itc", "itm", "mlm", "box")

    @classmethod
    def begin(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        return super().begin(flags) | {"without": flags.get("without")}

    @classmethod
    def changes(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        return ABLATIONS.get(flags.get("without"), {})

    @cached_property
    def batches(self) -> RegionBatches:
        s = self.settings
        return RegionBatches(
            self.emojivl, self.nouns, self.tokenizer, s.canvas, s.patch, s.batch, s.regions, s.mask, s.seed
        )

    def new_model(self) -> Xvlm:
        return small_init(super().new_model())

    def matrices(self, model: Xvlm) -> list[nn.Parameter]:
        return [*super().matrices(model), model.mlm.dense.weight]

    def loss(
        self, model: Xvlm, batches: Sequence[RegionBatch], workers: Workers = ONE_PROCESS
    ) -> dict[str, Tensor]:
        return xvlm_loss(model, batches, self.settings)

    @cached_property
    def _asked(self) -> dict[str, list]:
        """Phrases of every kind with scenes of seen and of unseen artists."""
        groups, asked = {"seen": None, "unseen": self.emojivl.unseen_artists}, {}
        for split, artists in groups.items():
            if artists is None or artists:
                asked[split] = self._phrases(artists, CHECK_SEED)
        return asked

    def _phrases(self, artists: Sequence[str] | None, seed: int) -> list:
        """Phrases of all kinds in turn, each with its scene."""
        source = Crowds(self.emojivl, self.nouns, artists, self.settings.canvas, "held_out", seed=seed)
        return [item for trio in zip(*ask_phrases(source, CHECKED).values(), strict=True) for item in trio]

    @torch.inference_mode()
    def check(self, model: Xvlm) -> dict[str, float]:
        """Grounding for some phrases."""
        values = {}
        for split, items in self._asked.items():
            right = iou(predict_boxes(model, self.tokenizer, items), true_boxes(items)) >= 0.5
            values[f"grounding_{split}"] = float(right.mean())
        return values

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Callable) -> dict[str, Any]:
        what = (trained.tokenizer, self.emojivl, self.nouns, trained.canvas, items, seed, progress)
        return evaluate_xvlm(trained.model, *what)

    def report(self, results: Mapping[str, Any]) -> str:
        return report_xvlm(results)

    @cached_property
    def _drawn(self) -> list:
        return self._phrases(self.emojivl.unseen_artists or tuple(self.emojivl.sheets), DRAWN_SEED)

    @property
    def chance(self) -> dict[str, float]:
        chance = best_guess(true_boxes(self._drawn))
        return dict.fromkeys(("grounding_seen", "grounding_unseen"), chance)

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """curves.png, and grounding.png with the boxes found for phrases in unseen scenes."""
        items = self._drawn[:DRAWN]
        with torch.inference_mode():
            boxes = predict_boxes(trained.model, trained.tokenizer, items)
        rows = [
            (scene.image, phrase.text, scene.boxes[phrase.row], box)
            for (scene, phrase), box in zip(items, boxes, strict=True)
        ]
        grounding_sheet(folder / "grounding.png", rows)
        return [*super().draw(trained, folder, records), folder / "grounding.png"]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        ground(query, trained, folder, device, screen)


def xvlm_loss(model: Xvlm, batches: Sequence[RegionBatch], settings: XvlmSettings) -> dict[str, Tensor]:
    """The terms of one step, each the mean over its rows, summed over the batches, already weighted."""
    terms: dict[str, Tensor] = {}
    for batch in batches:
        for name, term in _terms(model, batch, settings).items():
            terms[name] = terms.get(name, 0) + term
    return terms


def _terms(model: Xvlm, batch: RegionBatch, settings: XvlmSettings) -> dict[str, Tensor]:
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
        fused = model.fuse(
            words[at], batch.text_mask[at], everywhere, everywhere.new_ones(everywhere.shape[:2]) > 0
        )
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
