"""Train a dual encoder: pictures and their texts, each batch one matrix of similarities and one loss of it.

    clip      InfoNCE            siglip    the sigmoid loss, SigLIP's towers
    vse       max of hinges      filip     InfoNCE of late interaction, token by token

A batch holds every concept at most once, and none beside one that looks the same (column `near`), so that no
negative is a false one: two artists' dogs never meet. Scenes of two objects, of training pairs only, come as
a second batch in the same step. The sizes and rates of a run are a DualTrain; fit.py has the loop.

Sources: Radford et al. 2021 (CLIP), section 2; Zhai et al. 2023 (SigLIP); Faghri et al. 2018 (VSE++), whose
hardest negatives begin only after `settle` of the run, for from random values they collapse; Yao et al. 2022
(FILIP).
Left out: late interaction and hinges over several processes; InfoNCE and the sigmoid loss have both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import TRAINING_ARTISTS, Concept, EmojiVL, Scenes, scene_pixels, trained_concepts
from minivlp.data.drawings import Portraits, Variation
from minivlp.data.names import caption
from minivlp.data.scenes import SCENE_SIZES
from minivlp.evaluation.match import padded
from minivlp.filip import filip
from minivlp.hinge import hinge
from minivlp.infonce import infonce, infonce_gathered
from minivlp.models.dual import Dual, DualConfig, small_init
from minivlp.sigmoid import sigmoid_loss, sigmoid_loss_ring
from minivlp.text import WordPiece
from minivlp.training.workers import ALONE, Workers


@dataclass(frozen=True)
class DualTrain:
    """Everything that decides a run's weights, besides the data. Rates are per step, sizes in pixels."""

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
    max_text_len: int = 24
    steps: int = 1200
    batch: int = 512  # pictures of single objects a step, half of all names: most meet their rivals
    scenes: int = 64  # pictures of two objects a step, if the language is English
    lr: float = 1.6e-3  # AdamW: embeddings, norms, biases, heads
    matrix_lr: float = 0.013  # Muon: matrices
    weight_decay: float = 0.05
    warmup: int = 30  # steps
    cooldown: float = 0.6  # the last share of the run, in which the rates fall to zero
    settle: float = 0.3  # the first share of the run, in which every hinge counts
    margin: float = 0.2  # of the hinges
    unknown: float = 0.1  # probability that a word is read as [UNK], as words of later queries will be
    save_every: int = 200  # steps
    report_every: int = 50
    seed: int = 0


PRESETS = {"cpu": DualTrain()}
# FILIP: tokens to compare, and room for all their cosines.
SMALLER = {"batch": 64, "scenes": 32, "steps": 2400, "lr": 1.2e-3, "matrix_lr": 0.01}
OF_MODEL = {"filip": {"patch": 7} | SMALLER}
OBJECTIVES = ("clip", "siglip", "vse", "filip")


def dual_config(settings: Mapping[str, Any]) -> DualTrain:
    """What a run began with. Raises ValueError when its settings are none of this version."""
    try:
        return DualTrain(**settings["train"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the settings of the run are not of this version ({error})") from error


def new_dual(objective: str, config: DualTrain, tokenizer: WordPiece) -> Dual:
    """A dual encoder of this size with fresh values from the seed (set for torch's default generator)."""
    torch.manual_seed(config.seed)
    sizes = {name: getattr(config, name) for name in ("embed", "patch", "max_text_len")}
    sizes |= {
        f"text_{name}": getattr(config, f"text_{name}") for name in ("dim", "layers", "heads", "hidden")
    }
    sizes |= {f"image_{name}": getattr(config, name) for name in ("dim", "layers", "heads", "hidden")}
    if objective == "siglip":  # whose images have no projection
        sizes |= {"image_pool": "map", "text_pool": "last", "embed": config.dim}
        sizes |= {"init_scale": 10.0, "init_bias": -10.0}
    else:
        sizes["eot"] = tokenizer.sep_id
    return small_init(Dual(DualConfig(len(tokenizer), image_size=config.canvas, **sizes)))


@dataclass(frozen=True)
class Pairs:
    """Row i of one belongs to row i of the other: ids, mask (B, L), pixels (B, 3, H, W) in [−1, 1].

    share: of the run that is over, in [0, 1).
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor
    share: float

    def to(self, device: torch.device | str) -> "Pairs":
        moved = {k: getattr(self, k).to(device) for k in ("ids", "mask", "pixels")}
        return replace(self, **moved)

    def part(self, rank: int, size: int) -> "Pairs":
        """The `rank`-th of `size` equal parts. Raises ValueError when the rows cannot be shared equally."""
        b, rest = divmod(len(self.ids), size)
        if rest:
            fail("the batch", f"must be a multiple of the {size} processes", len(self.ids))
        own = slice(rank * b, (rank + 1) * b)
        return replace(self, **{k: getattr(self, k)[own] for k in ("ids", "mask", "pixels")})


class PairSource:
    """`source(step)` → the step's Pairs: single drawings, then scenes; it depends on (seed, step) alone."""

    def __init__(
        self,
        emojivl: EmojiVL,
        tokenizer: WordPiece,
        config: DualTrain,
        fixed: bool = False,
        variation: Variation = Variation(),  # noqa: B008
        artists: Sequence[str] = TRAINING_ARTISTS,
    ):
        self.tokenizer, self.config, self.fixed, self.variation = tokenizer, config, fixed, variation
        self.artists = [a for a in artists if a in emojivl.sheets]
        self.concepts = trained_concepts(emojivl, self.artists)
        self.portraits = Portraits(emojivl, config.canvas)
        self._drawn_by = {c.id: [a for a in self.artists if a in c.artists] for c in self.concepts}
        self._scenes = None
        if config.scenes and config.language == "en":  # their captions are English
            about = {"canvas": config.canvas, "sizes": SCENE_SIZES, "seed": config.seed}
            self._scenes = Scenes(emojivl, emojivl.nouns(), self.artists, **about)

    def __call__(self, step: int) -> list[Pairs]:
        c, rng = self.config, np.random.default_rng((self.config.seed, step))
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
            if len(chosen) == self.config.batch:
                break
        return chosen

    def _forget(self, pairs: Pairs, rng: np.random.Generator) -> None:
        """Replace some words by [UNK]; a text of one word keeps it."""
        several = pairs.mask.sum(1, keepdim=True) > 3  # with [CLS] and [SEP]
        word = ~torch.isin(pairs.ids, torch.tensor(self.tokenizer.special_ids))
        lost = torch.from_numpy(rng.random(pairs.ids.shape)) < self.config.unknown
        pairs.ids[lost & several & word] = self.tokenizer.unk_id

    def _pairs(self, texts: Sequence[str], pixels: Tensor, step: int) -> Pairs:
        length = self.config.max_text_len
        ids, _, mask = self.tokenizer.batch(texts, length)  # a text that is too long loses its last pieces
        ids, mask = padded(ids, mask, length, self.tokenizer, self.fixed)
        return Pairs(ids, mask, pixels, step / self.config.steps)


def dual_loss(
    model: Dual, groups: Sequence[Pairs], objective: str, config: DualTrain, workers: Workers = ALONE
) -> dict[str, Tensor]:
    """The loss of one step: of single drawings and, weighted by their number, of scenes.

    Of several workers, each with its part of the rows, all receive the loss of the whole batch.
    """
    model.clamp_scale()  # left over from the last update: CLIP's limit of 100
    rows = sum(len(pairs.ids) for pairs in groups)
    terms = {}
    for name, pairs in zip(("names", "scenes"), groups, strict=False):
        terms[name] = len(pairs.ids) / rows * _loss(model, pairs, objective, config, workers)
    return terms


def _loss(model: Dual, pairs: Pairs, objective: str, config: DualTrain, workers: Workers) -> Tensor:
    if objective == "filip":
        (x, x_mask), (y, y_mask) = model.image_tokens(pairs.pixels), model.text_tokens(pairs.ids, pairs.mask)
        return filip(x, y, model.scale, x_mask, y_mask)
    x, y = model.encode_image(pairs.pixels), model.encode_text(pairs.ids)  # (B, embed)
    if objective == "vse":
        return hinge(x, y, config.margin, hardest=pairs.share >= config.settle) / len(x)
    numbers = (model.scale, model.bias) if objective == "siglip" else (model.scale,)
    if workers.size > 1:  # the gradients of the numbers come already summed: their mean is right
        spread = sigmoid_loss_ring if objective == "siglip" else infonce_gathered
        return spread(workers.amplified(x), workers.amplified(y), *numbers)
    return (sigmoid_loss if objective == "siglip" else infonce)(x, y, *numbers)
