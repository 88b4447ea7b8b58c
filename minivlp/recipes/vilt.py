"""The main job: ViLT on composed scenes, by masked words + matching + 0.1 · word-patch alignment.

The first part of a run is by the next word, which ViLT does not have: written captions teach the order of two
nouns, which matching alone learns late or never. A further term, not ViLT's either, lets nouns find their
pictures (noun_contrast.py). Without it words come to point at their own object in one run and not in the
next.

Sources: Kim, Son and Kim 2021 (ViLT), section 3.2.
Left out: ViLT's own sizes (models/vilt.py's defaults), for which no laptop is enough.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.data import CPU_NOUNS
from minivlp.data.probes import false_captions, hide_relation, hide_slots, swapped
from minivlp.evaluation.rank import match_odds
from minivlp.evaluation.splits import Progress
from minivlp.evaluation.vilt import CANDIDATES, evaluate, found, report
from minivlp.ipot import alignment_masks, wpa_fused
from minivlp.itm import itm_loss
from minivlp.mlm import mlm_loss
from minivlp.models.published import vilt as names
from minivlp.models.vilt import Vilt, ViltConfig, small_init
from minivlp.pictures.demo import demo
from minivlp.pictures.gallery import draw_answers
from minivlp.recipes.base import Batch, Recipe, Settings, Terms
from minivlp.recipes.noun_contrast import noun_contrast
from minivlp.recipes.vilt_batches import STAGES, SceneBatches, ViltBatch
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers


@dataclass(frozen=True)
class ViltSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    dim: int = 96
    layers: int = 4
    heads: int = 3
    hidden: int = 192
    vocab_size: int = 512
    steps: int = 2800
    wpa_weight: float = 0.1
    mask: float = 0.15  # probability of hiding a word of one's own captions
    contrast: bool = True  # does a noun have to find its picture?


PRESETS = {
    "cpu": ViltSettings(),
    "gpu": ViltSettings(
        nouns=None, canvas=96, patch=16, dim=256, layers=6, heads=4, hidden=1024, vocab_size=2048,
        steps=30_000, batch=256, lr=1e-3, matrix_lr=0.005, warmup=300,
    ),
}  # fmt: skip


class ViltRecipe(Recipe):
    """ViLT on scenes; other recipes train the same model on other data."""

    Settings, Config, Model = ViltSettings, ViltConfig, Vilt
    presets = PRESETS
    terms = ("next", "mlm", "itm", "wpa", "apart")
    ablations = {"contrast": {"contrast": False}}
    several_processes = True

    @cached_property
    def batches(self) -> Callable[[int], list[ViltBatch]]:
        s, stages = self.settings, STAGES[self.about.get("preset", "cpu")]
        if not s.contrast:
            stages = tuple(replace(stage, contrast=0.0) for stage in stages)
        return SceneBatches(self.emojivl, self.nouns, self.tokenizer, stages, s.steps, s.batch, s.seed)

    def sizes_of_batches(self) -> set[int]:
        return {size for stage in self.batches.stages for size in self.batches.sizes(stage).values()}

    def loss(self, model: Vilt, batches: Sequence[Batch], workers: Workers = ONE_PROCESS) -> Terms:
        return pretraining_loss(model, batches, self.settings.wpa_weight, workers)

    def new_model(self) -> Vilt:
        return small_init(super().new_model())

    def matrices(self, model: Vilt) -> list[nn.Parameter]:
        more = (model.pooler.weight, *([model.mlm.dense.weight] if model.mlm else []))
        chosen = {id(p) for p in (*super().matrices(model), *more)}
        return [p for p in model.parameters() if id(p) in chosen and p.requires_grad]

    @property
    def chance(self) -> dict[str, float]:
        relation = {"masked_relation": 1 / 4, "itm_random": 1 / 2, "itm_swapped": 1 / 2}
        return {"masked_object": 1 / (len(self.nouns) - 1)} | relation

    @torch.inference_mode()
    def check(self, model: Vilt) -> dict[str, float]:
        """Four of the evaluation's measures, in [0, 1], on pairs that training never shows."""
        scenes, tokenizer = self.fresh, self.tokenizer

        def fills(hidden: Sequence[tuple]) -> float:
            return float(torch.cat(found(model, tokenizer, hidden, scenes)).float().mean())

        def accepts(captions: Sequence[str]) -> float:
            return float((match_odds(model, tokenizer, captions, scenes) > 0).mean())

        others = false_captions(scenes, np.random.default_rng(self.settings.seed + 1))
        relation = [(text, tokenizer.encode(word)) for text, word in map(hide_relation, scenes)]
        true = accepts([scene.caption for scene in scenes])
        random, order = accepts([scenes[j].caption for j in others]), accepts([swapped(s) for s in scenes])
        return {
            "masked_object": fills([hide_slots(scene, [i % 2], tokenizer) for i, scene in enumerate(scenes)]),
            "masked_relation": fills(relation),
            "itm_random": (true + 1 - random) / 2,
            "itm_swapped": (true + 1 - order) / 2,
        }

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        """items: of each measure; retrieval has a set of 64 captions for every 128 of them."""
        what = (trained.tokenizer, self.emojivl, self.nouns, trained.canvas, items)
        return evaluate(trained.model, *what, -(-items // (2 * CANDIDATES)), seed, progress)

    report = staticmethod(report)

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        return super().draw(trained, folder, records) + draw_answers(folder, trained, self.emojivl)

    demo = staticmethod(demo)

    @staticmethod
    def to_published(model: Vilt) -> dict[str, Tensor]:
        return names.to_hugging_face(model.state_dict())

    @staticmethod
    def from_published(model: Vilt, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return names.from_published(tensors).tensors


def pretraining_loss(
    model: Vilt, batches: Sequence[ViltBatch], wpa_weight: float, workers: Workers = ONE_PROCESS
) -> Terms:
    """The weighted terms of one step: means over its predicted words, matching pairs and contrasted nouns.

    Of several workers each has its part of the examples, and the mean of what they return is the whole.
    """
    sizes = [(int(b.hidden.sum()), int(b.paired.sum()), b.contrasted) for b in batches]
    words, pairs, nouns = zip(*sizes, strict=True)
    counts = workers.mean((sum(words), sum(pairs), *nouns), batches[0].ids.device)
    all_words, all_pairs, *all_nouns = (max(n, 1) for n in counts)
    terms: Terms = defaultdict(float)
    for b, n_words, n_pairs, n_nouns in zip(batches, words, pairs, all_nouns, strict=True):
        out = model.encode(b.ids, b.text_mask, b.pixels, b.pixel_mask, writing=b.written)
        states = model.mlm_hidden(out["text"][b.hidden])  # (predicted words, D)
        loss = mlm_loss(states, model.mlm_weight, model.mlm_bias, b.labels[b.hidden])
        terms["next" if b.written else "mlm"] += n_words / all_words * loss
        if n_pairs:
            itm = itm_loss(model.itm_logits(out["pooled"][b.paired]), b.match[b.paired])
            terms["itm"] += n_pairs / all_pairs * itm
        aligned = b.align != 0
        if wpa_weight and aligned.any():
            real, image_real = alignment_masks(b.text_mask[aligned]), out["image_mask"][aligned, 1:]
            cost = wpa_fused(out["text"][aligned], out["image"][aligned, 1:], real, image_real)  # (B',)
            # As in ViLT: true pairs pulled together, wrong pairs pushed apart, over all matching pairs.
            terms["wpa"] += wpa_weight * (b.align[aligned] * cost).sum() / all_pairs
        if b.noun is not None:
            terms["apart"] += n_nouns / sum(all_nouns) * noun_contrast(model, b, workers)
    return dict(terms)
