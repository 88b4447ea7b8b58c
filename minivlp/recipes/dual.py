"""Dual encoders: pictures and their texts, each batch one matrix of similarities and one loss of it.

    clip      InfoNCE            siglip    the sigmoid loss, SigLIP's towers
    vse       max of hinges      filip     InfoNCE of late interaction, token by token

A batch holds every concept at most once, and none beside one that looks the same (column `near`), so that no
negative is a false one: two artists' dogs never meet. Scenes of two objects, of training pairs only, come as
a second batch in the same step.

Sources: Radford et al. 2021 (CLIP), section 2; Zhai et al. 2023 (SigLIP); Faghri et al. 2018 (VSE++), whose
hardest negatives begin only after `settle` of the run, for from random values they collapse; Yao et al. 2022
(FILIP).
Left out: own captions and fine-tuning, which ViLT has; late interaction and hinges over several processes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import TRAINING_ARTISTS, Concept, EmojiVL, Scenes, scene_pixels, trained_concepts
from minivlp.data.drawings import Portraits, Variation
from minivlp.data.names import caption, name_tokenizer, named
from minivlp.data.scenes import SCENE_SIZES
from minivlp.evaluation.dual import CANDIDATES, evaluate_dual, report_dual
from minivlp.evaluation.match import Matcher, padded, ranks, similarities
from minivlp.filip import filip
from minivlp.hinge import hinge
from minivlp.infonce import infonce, infonce_gathered
from minivlp.models.dual import Dual, DualConfig, small_init
from minivlp.models.published import clip_siglip as names
from minivlp.pictures.search import DrawingIndex, search
from minivlp.pictures.sheets import contact_sheet
from minivlp.recipes.base import Batch, Recipe, Settings
from minivlp.sigmoid import sigmoid_loss, sigmoid_loss_ring
from minivlp.text import WordPiece
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers

CHECKED, CHECK_SEED = 256, 1  # drawings named twenty times during training, and what draws them
QUERIES = ("something to eat", "an animal with stripes", "music", "love", "cold weather", "a red fruit")


@dataclass(frozen=True)
class DualSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    language: str = "en"
    canvas: int = 28
    patch: int = 28  # the whole picture: a cut-out drawing is compared as a whole, pixel by pixel
    embed: int = 128
    dim: int = 192
    layers: int = 2
    heads: int = 4
    hidden: int = 384
    text_dim: int = 96
    text_layers: int = 1
    text_heads: int = 3
    text_hidden: int = 192
    steps: int = 1200
    batch: int = 512  # pictures of single objects a step, half of all names: most meet their rivals
    scenes: int = 64  # pictures of two objects a step, if the language is English
    lr: float = 1.6e-3
    matrix_lr: float = 0.013
    weight_decay: float = 0.05
    cooldown: float = 0.6
    settle: float = 0.3  # the first share of the run, in which every hinge counts
    margin: float = 0.2  # of the hinges
    unknown: float = 0.1  # probability that a word is read as [UNK], as words of later queries will be


@dataclass(frozen=True)
class PairBatch(Batch):
    """Row i of one belongs to row i of the other."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L) bool
    pixels: Tensor  # (B, 3, H, W) in [−1, 1]
    share: float  # of the run that is over, in [0, 1)

    def part(self, rank: int, size: int) -> "PairBatch":
        """The `rank`-th of `size` equal parts. Raises ValueError when the rows cannot be shared equally."""
        b, rest = divmod(len(self.ids), size)
        if rest:
            fail("the batch", f"must be a multiple of the {size} processes", len(self.ids))
        own = slice(rank * b, (rank + 1) * b)
        return replace(self, **{name: tensor[own] for name, tensor in self._tensors().items()})


class PairBatches:
    """`batches(step)` → two PairBatches, single drawings and scenes; they depend on (seed, step) alone."""

    def __init__(
        self,
        emojivl: EmojiVL,
        tokenizer: WordPiece,
        settings: DualSettings,
        fixed: bool = False,
        variation: Variation = Variation(),  # noqa: B008
        artists: Sequence[str] = TRAINING_ARTISTS,
    ):
        self.tokenizer, self.settings, self.fixed, self.variation = tokenizer, settings, fixed, variation
        self.artists = [a for a in artists if a in emojivl.sheets]
        self.concepts = trained_concepts(emojivl, self.artists)
        self.portraits = Portraits(emojivl, settings.canvas)
        self._drawn_by = {c.id: [a for a in self.artists if a in c.artists] for c in self.concepts}
        self._scenes = None
        if settings.scenes and settings.language == "en":  # their captions are English
            about = {"canvas": settings.canvas, "sizes": SCENE_SIZES, "seed": settings.seed}
            self._scenes = Scenes(emojivl, emojivl.nouns(), self.artists, **about)

    def __call__(self, step: int) -> list[PairBatch]:
        c, rng = self.settings, np.random.default_rng((self.settings.seed, step))
        chosen = self._different(rng)
        texts = [caption(concept, c.language, rng) for concept in chosen]
        drawn = [rng.permutation(self._drawn_by[concept.id]).tolist() for concept in chosen]
        ids, first, second = [x.id for x in chosen], [d[0] for d in drawn], [d[-1] for d in drawn]
        pixels = self.portraits.varied(ids, first, second, rng, self.variation)
        pairs = [self._pairs(texts, pixels, step)]
        self._forget(pairs[0], rng)
        if self._scenes:
            scenes = [self._scenes[step * c.scenes + i] for i in range(c.scenes)]
            pairs.append(self._pairs([scene.caption for scene in scenes], scene_pixels(scenes), step))
        return pairs

    def _different(self, rng: np.random.Generator) -> list[Concept]:
        """At most `batch` concepts, none twice and none beside one that looks the same."""
        chosen, banned = [], set()
        for i in rng.permutation(len(self.concepts)):
            concept = self.concepts[i]
            if concept.id not in banned:
                chosen.append(concept)
                banned.update(concept.near)
            if len(chosen) == self.settings.batch:
                break
        return chosen

    def _forget(self, pairs: PairBatch, rng: np.random.Generator) -> None:
        """Replace some words by [UNK]; a text of one word keeps it."""
        several = pairs.mask.sum(1, keepdim=True) > 3  # with [CLS] and [SEP]
        word = ~torch.isin(pairs.ids, torch.tensor(self.tokenizer.special_ids))
        lost = torch.from_numpy(rng.random(pairs.ids.shape)) < self.settings.unknown
        pairs.ids[lost & several & word] = self.tokenizer.unk_id

    def _pairs(self, texts: Sequence[str], pixels: Tensor, step: int) -> PairBatch:
        length = self.settings.max_text_len
        ids, _, mask = self.tokenizer.batch(texts, length)  # a text that is too long loses its last pieces
        ids, mask = padded(ids, mask, length, self.tokenizer, self.fixed)
        return PairBatch(ids, mask, pixels, step / self.settings.steps)


class DualRecipe(Recipe):
    """A dual encoder on single drawings and scenes.

    A subclass adds compare(model, batch, workers), the loss of one batch; of several workers, each with its
    part, all receive that of the whole batch.
    """

    Settings, Config, Model = DualSettings, DualConfig, Dual
    presets = {"cpu": DualSettings()}
    terms = ("names", "scenes")
    overrides: Mapping[str, float] = {}  # of a preset, for this loss
    by_token = False  # are tokens compared, not sums?

    @classmethod
    def changes(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        return {**cls.overrides} | {name: flags[name] for name in ("language",) if name in flags}

    @cached_property
    def concepts(self) -> list[Concept]:
        return trained_concepts(self.emojivl, TRAINING_ARTISTS)

    @property
    def summary(self) -> str:
        return f"{len(self.concepts)} concepts"

    @property
    def chance(self) -> dict[str, float]:
        return dict.fromkeys(("name_seen", "name_unseen"), 1 / len(self.concepts))

    def vocabulary(self) -> WordPiece:
        return name_tokenizer(self.concepts, self.settings.language)

    def sizes(self) -> dict[str, Any]:
        """The fields of DualConfig in which the losses differ."""
        return {"eot": self.tokenizer.sep_id}

    def new_model(self) -> Dual:
        s, tower = self.settings, ("dim", "layers", "heads", "hidden")
        sizes = {"vocab_size": len(self.tokenizer), "image_size": s.canvas} | s.shared_with(DualConfig)
        sizes |= {f"image_{name}": getattr(s, name) for name in tower}
        return small_init(Dual(DualConfig(**sizes | self.sizes())))

    @cached_property
    def batches(self) -> PairBatches:
        fixed = self.model.config.text_pool == "last"
        return PairBatches(self.emojivl, self.tokenizer, self.settings, fixed)

    def sizes_of_batches(self) -> set[int]:
        return {len(batch.ids) for batch in self.batch(0)}

    def loss(
        self, model: Dual, batches: Sequence[PairBatch], workers: Workers = ONE_PROCESS
    ) -> dict[str, Tensor]:
        """The loss of single drawings and, weighted by their number, of scenes."""
        model.clamp_scale()  # the last update may have left CLIP's limit of 100
        rows = sum(len(batch.ids) for batch in batches)
        return {
            name: len(batch.ids) / rows * self.compare(model, batch, workers)
            for name, batch in zip(self.terms, batches, strict=False)
        }

    @cached_property
    def _asked(self) -> dict[str, tuple[Tensor, np.ndarray]]:
        """Some drawings by training artists and by unseen ones: pixels, and which name is right (A, C)."""
        rng, portraits = np.random.default_rng(CHECK_SEED), Portraits(self.emojivl, self.settings.canvas)
        groups = {"seen": [a for a in self.emojivl.sheets if a in TRAINING_ARTISTS]}
        asked = {}
        for split, artists in (groups | {"unseen": self.emojivl.unseen_artists}).items():
            drawings = [(i, a) for i, c in enumerate(self.concepts) for a in artists if a in c.artists]
            chosen = [drawings[k] for k in rng.permutation(len(drawings))[:CHECKED]]
            if chosen:
                right = np.array([i for i, _ in chosen])[:, None] == np.arange(len(self.concepts))
                pixels = portraits.plain([self.concepts[i].id for i, _ in chosen], [a for _, a in chosen])
                asked[split] = pixels, right
        return asked

    def check(self, model: Dual) -> dict[str, float]:
        """R@1 of names for some drawings of the training artists and of the unseen ones."""
        matcher = Matcher(model, self.tokenizer, self.by_token)
        texts = matcher.texts([named(concept, self.settings.language) for concept in self.concepts])
        values = {}
        for split, (pixels, right) in self._asked.items():
            scores = similarities(matcher.pictures(pixels), texts)
            values[f"name_{split}"] = float((ranks(scores, right) < 1).mean())
        return values

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Callable) -> dict[str, Any]:
        """items: of scenes, rounded up to a multiple of 64."""
        matcher = Matcher(trained.model, trained.tokenizer, self.by_token)
        sets = -(-items // CANDIDATES)
        return evaluate_dual(matcher, self.emojivl, self.settings.language, sets, seed, progress)

    def report(self, results: Mapping[str, Any]) -> str:
        return report_dual(results)

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """curves.png, and search.png with the best drawings for some queries."""
        index = DrawingIndex(trained, self.emojivl, tokens=self.by_token)
        if index.language == "en":
            sheets = [index.sheet(query, 6) for query in QUERIES]
        else:  # names of concepts that training never showed
            new = [c for c in index.concepts if c.split != "train"][: len(QUERIES)]
            sheets = [index.sheet(named(c, index.language), 6, c.name_en) for c in new]
        contact_sheet(folder / "search.png", sheets)
        return [*super().draw(trained, folder, records), folder / "search.png"]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        search(query, DrawingIndex(trained, self.emojivl, device, self.by_token), folder, screen)

    @classmethod
    def to_published(cls, model: Dual) -> dict[str, Tensor]:
        """Rounded to float16, as most of a small dual encoder is its vocabulary."""
        tensors = names.to_hugging_face(names.form_of(model.config), model.state_dict())
        return {name: tensor.half() for name, tensor in tensors.items()}

    @classmethod
    def from_published(cls, model: Dual, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return names.from_published(names.form_of(model.config), tensors)[0]


class Clip(DualRecipe):
    """InfoNCE, with CLIP's towers."""

    several_processes = True

    def compare(self, model: Dual, batch: PairBatch, workers: Workers) -> Tensor:
        images, texts = model.encode_image(batch.pixels), model.encode_text(batch.ids)  # (B, embed)
        if workers.size == 1:
            return infonce(images, texts, model.scale)
        # The scale's gradient comes already summed, so DDP's mean of it is right.
        return infonce_gathered(workers.scale_gradient(images), workers.scale_gradient(texts), model.scale)


class Siglip(DualRecipe):
    """The sigmoid loss, with SigLIP's towers, whose images have no projection."""

    several_processes = True

    def sizes(self) -> dict[str, Any]:
        pools = {"image_pool": "map", "text_pool": "last", "embed": self.settings.dim}
        return pools | {"init_scale": 10.0, "init_bias": -10.0}

    def compare(self, model: Dual, batch: PairBatch, workers: Workers) -> Tensor:
        images, texts = model.encode_image(batch.pixels), model.encode_text(batch.ids)
        if workers.size == 1:
            return sigmoid_loss(images, texts, model.scale, model.bias)
        images, texts = workers.scale_gradient(images), workers.scale_gradient(texts)
        return sigmoid_loss_ring(images, texts, model.scale, model.bias)


class Vse(DualRecipe):
    """Hinges: all of them at first, then the hardest one of each row."""

    def compare(self, model: Dual, batch: PairBatch, workers: Workers) -> Tensor:
        images, texts = model.encode_image(batch.pixels), model.encode_text(batch.ids)
        hardest = batch.share >= self.settings.settle
        return hinge(images, texts, self.settings.margin, hardest=hardest) / len(images)


class Filip(DualRecipe):
    """InfoNCE of late interaction: every patch against every word."""

    # Tokens to compare, and room for all their cosines.
    overrides = {"patch": 7, "batch": 64, "scenes": 32, "steps": 2400, "lr": 1.2e-3, "matrix_lr": 0.01}
    by_token = True

    def compare(self, model: Dual, batch: PairBatch, workers: Workers) -> Tensor:
        images, image_mask = model.image_tokens(batch.pixels)
        texts, text_mask = model.text_tokens(batch.ids, batch.mask)
        return filip(images, texts, model.scale, image_mask, text_mask)
