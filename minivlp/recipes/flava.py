"""FLAVA: pictures alone, texts alone and pairs, all with something hidden; codes in place of pixels.

A step has three batches. Their six terms have weight 1 (models/flava.py):

    pictures    pairs of objects without their captions, patches hidden                 mim
    texts       captions without their pictures, words hidden                           mlm
    pairs       a quarter with both sides hidden in part, a third of these wrong        mmm, itm, contrast
                the others with a share of the patches hidden, from a third to all, of
                two in three all, and at first all of them; every fourth reads an empty
                caption                                                                 mmm_image, contrast

The codes of patches are the K centres of k-means over the patches of training pictures, made before the first
step and kept in the model. The larger part of the pairs is ours. It lets one model say what it knows of a
hidden patch with a caption and without one, at every share (evaluation/hidden.py). Where all is hidden there
is nothing to read but the caption: that is what makes it read. In the first 40 % of the run all is hidden in
all of these rows: without that one seed of two never came to read captions.

The blocks of the shipped ViLT are the first values: its first two are those of the picture and of the text
encoder, its third is the fusion encoder's.

Sources: Singh et al. 2022 (FLAVA), sections 3.2 and 3.3.
Left out: FLAVA's discrete VAE (k-means on raw patches gives better pictures here, in seconds); its share of
hidden words, 15 %, which leaves half of our short captions whole; own captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minivlp.data import CPU_NOUNS, Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.evaluation.hidden import Cost, hide_rows
from minivlp.mlm import IGNORE, mask_tokens
from minivlp.models.flava import Flava, FlavaConfig
from minivlp.models.published.start import block, towers
from minivlp.patch import to_patches
from minivlp.pictures.filled import Fill
from minivlp.recipes.base import Batch, Settings, Terms
from minivlp.recipes.hiding import HidingRecipe, same_projections
from minivlp.text import WordPiece
from minivlp.training.workers import ONE_PROCESS, Workers
from minivlp.vq import kmeans

CODED, ROUNDS = 600, 20  # pictures whose patches are clustered, and in how many rounds
# What `--without` changes, to see what it is good for.
ABLATIONS = {"unpaired": {"unpaired": 0}}


@dataclass(frozen=True)
class FlavaSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    dim: int = 96
    tower_layers: int = 2  # of the picture encoder, and of the text encoder
    fusion_layers: int = 1
    heads: int = 3
    hidden: int = 192
    embed: int = 96
    vocab_size: int = 512
    codes: int = 256
    steps: int = 1200
    batch: int = 64  # pairs a step
    unpaired: int = 24  # pictures, and as many texts, that come alone; 0 = none
    both: float = 0.25  # share of the pairs with both sides hidden in part
    wrong: float = 1 / 3  # share of the pairs, both sides hidden, that do not match
    blocks: float = 0.4  # share of the patches hidden, in blocks of 2 × 2, where words are hidden too
    mask: float = 0.3  # probability of hiding a word
    covered: float = 0.4  # first share of the run, in which all patches are hidden where no word is


@dataclass(frozen=True)
class Pairs(Batch):
    """Pictures with texts; of wrong pairs the picture is another's."""

    ids: Tensor  # (B, L) the whole texts
    text_mask: Tensor  # (B, L) bool
    masked: Tensor  # (B, L') what the fusion encoder reads of them: some words masked, or no word
    masked_mask: Tensor  # (B, L') bool
    labels: Tensor  # (B, L') the masked ids, −100 elsewhere
    pixels: Tensor  # (B, 3, H, W) in [−1, 1]
    hidden: Tensor  # (B, N) bool, patches that are not seen
    match: Tensor  # (B,) 1 = a true pair, 0 = a wrong one, −100 = a true one that matching leaves alone


@dataclass(frozen=True)
class Pictures(Batch):
    """Pictures without texts."""

    pixels: Tensor  # (B, 3, H, W)
    hidden: Tensor  # (B, N) bool


@dataclass(frozen=True)
class Texts(Batch):
    """Texts without pictures."""

    masked: Tensor  # (B, L)
    text_mask: Tensor  # (B, L) bool
    labels: Tensor  # (B, L)


class FlavaBatches:
    """`batches(step)` → Pairs and, where some come alone, Pictures and Texts; of (seed, step) alone."""

    def __init__(
        self, emojivl: EmojiVL, nouns: Sequence[Concept], tokenizer: WordPiece, settings: FlavaSettings
    ):
        self.tokenizer, self.settings = tokenizer, settings
        self.side = settings.canvas // settings.patch
        self._scenes = Scenes(emojivl, nouns, canvas=settings.canvas, seed=settings.seed)

    def __call__(self, step: int) -> list[Batch]:
        s, rng = self.settings, np.random.default_rng((self.settings.seed, step))
        n = s.batch + 2 * s.unpaired + round(s.wrong * s.both * s.batch)
        scenes = [self._scenes[step * n + i] for i in range(n)]
        pairs, rest = scenes[: s.batch], scenes[s.batch :]
        batches: list[Batch] = []
        if s.unpaired:
            pictures, rest = rest[: s.unpaired], rest[s.unpaired :]
            texts, rest = rest[: s.unpaired], rest[s.unpaired :]
            hidden = hide_rows([s.blocks] * s.unpaired, self.side, rng, block=2)
            batches = [
                Pictures(scene_pixels(pictures), hidden),
                Texts(*self._masked([scene.caption for scene in texts], rng)),
            ]
        return [self._pairs(pairs, rest, rng, step < s.covered * s.steps), *batches]

    def _pairs(
        self, scenes: Sequence[Scene], others: Sequence[Scene], rng: np.random.Generator, covered: bool
    ) -> Pairs:
        """The first half with both sides hidden in part, the others' pictures in the first of these."""
        texts = [scene.caption for scene in scenes]
        half, n = round(self.settings.both * len(texts)), len(texts)
        read = [t if i < half or i % 4 else "" for i, t in enumerate(texts)]
        masked, masked_mask, labels = self._masked(read, rng)
        whole, _, _ = self.tokenizer.batch(read)
        masked[half:], labels[half:] = torch.from_numpy(whole)[half:], IGNORE
        match = torch.full((n,), IGNORE)
        match[:half] = 1
        match[: len(others)] = 0
        shares = (
            [self.settings.blocks] * half,
            rng.uniform(1 if covered else 1 / 3, 7 / 3, n - half).clip(max=1),
        )
        hidden = [hide_rows(shares[0], self.side, rng, 2), hide_rows(shares[1], self.side, rng)]
        ids, _, mask = self.tokenizer.batch(texts)
        pixels = scene_pixels([*others, *scenes[len(others) :]])
        whole = torch.from_numpy(ids), torch.from_numpy(mask)
        return Pairs(*whole, masked, masked_mask, labels, pixels, torch.cat(hidden), match)

    def _masked(self, texts: Sequence[str], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        t = self.tokenizer
        ids, word_ids, mask = t.batch(texts)
        masked, labels = mask_tokens(ids, word_ids, rng, len(t), t.mask_id, t.special_ids, self.settings.mask)
        return torch.from_numpy(masked), torch.from_numpy(mask), torch.from_numpy(labels)


class FlavaRecipe(HidingRecipe):
    """FLAVA on pairs, and on pictures and captions that come alone."""

    Settings, Config, Model = FlavaSettings, FlavaConfig, Flava
    presets = {"cpu": FlavaSettings()}
    terms = ("contrast", "itm", "mmm_image", "mmm_text", "mim", "mlm")
    ablations = ABLATIONS
    unit = "nats, summed over the hidden patches of a picture"

    @cached_property
    def batches(self) -> FlavaBatches:
        return FlavaBatches(self.emojivl, self.nouns, self.tokenizer, self.settings)

    def new_model(self) -> Flava:
        """A model that begins with what the shipped ViLT has of it, and a codebook of other pictures."""
        s = self.settings
        sizes = s.shared_with(FlavaConfig) | {"vocab_size": len(self.tokenizer), "image_size": s.canvas}
        sizes |= {"image_layers": s.tower_layers, "text_layers": s.tower_layers}
        model = Flava(FlavaConfig(**sizes, eps=1e-6, codebook=True))
        vilt, n = self.vilt["model"], s.tower_layers
        start = towers(vilt, n)
        start |= {f"mmm_text.{name[4:]}": x for name, x in start.items() if name.startswith("mlm.")}
        for i in range(s.fusion_layers):
            start |= block(vilt, n + i, f"fusion.blocks.{i}.")
        model.load_state_dict(start, strict=False)
        nn.init.zeros_(model.segment.weight)  # the words' positions have it already
        nn.init.eye_(model.image_to_fusion.weight), nn.init.eye_(model.text_to_fusion.weight)
        same_projections(model)
        scenes = Scenes(self.emojivl, self.nouns, canvas=s.canvas, seed=s.seed + 1)
        patches = to_patches(scene_pixels([scenes[i] for i in range(CODED)]), s.patch).flatten(0, 1)
        model.codebook.copy_(kmeans(patches, s.codes, np.random.default_rng(s.seed), ROUNDS))
        return model

    def matrices(self, model: Flava) -> list[nn.Parameter]:
        heads = [head.dense for head in (model.mim, model.mlm, model.mmm_image, model.mmm_text)]
        linear = (*heads, model.image_to_fusion, model.text_to_fusion, model.pooler)
        return [*super().matrices(model), *(layer.weight for layer in linear)]

    def loss(self, model: Flava, batches: Sequence[Batch], workers: Workers = ONE_PROCESS) -> Terms:
        terms: Terms = {}
        for b in batches:
            if isinstance(b, Texts):
                terms["mlm"] = model.mlm_loss(b.masked, b.text_mask, b.labels)
                continue
            codes = model.codes(b.pixels)  # (B, N)
            if isinstance(b, Pictures):
                terms["mim"] = model.mim_loss(b.pixels, b.hidden, codes)
            else:
                texts = (b.ids, b.masked, b.text_mask, b.labels)
                terms |= model.pair_losses(*texts, b.pixels, b.hidden, codes, b.match, b.masked_mask)
        return terms

    def fill(self, model: Flava) -> Fill:
        def fill(pixels: Tensor, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return model.codebook[model.filled(pixels, hidden, ids, mask).argmax(-1)]

        return fill

    def cost(self, model: Flava) -> Cost:
        def cost(pixels: Tensor, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            logits = model.filled(pixels, hidden, ids, mask).transpose(1, 2)  # (B, K, N)
            nats = cross_entropy(logits, model.codes(pixels), reduction="none")  # (B, N)
            return (nats * hidden).sum(1)

        return cost
