"""MaskVLM: words filled in by the whole picture, pixels by the whole text; one side at a time.

    loss = InfoNCE + matching + masked words + 4 · mean |x − x̂| over the hidden pixels

Matching has three pairs a row: the true one, its text with a hard wrong picture and its picture with a hard
wrong text, drawn by the similarities of the contrastive term (itm.py). The share of hidden patches is drawn
anew for every picture, from a third to all, of every second all, and in the first 40 % of the run of every
one all. Every fourth picture is filled in without a caption. So one model says what it knows with a caption
and without, at every share (evaluation/hidden.py).

Sources: Kwon et al. 2023 (MaskVLM), sections 3.2 and 3.3 and, for both sides at once, their ablation.
Left out: a fixed share of 60 %; weights of 1, with which the small error of colours is hardly felt; masks on
all hidden words, of which 80 % have one, as everywhere here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.data import CPU_NOUNS, Concept, EmojiVL, Scenes, scene_pixels
from minivlp.data.probes import meaning
from minivlp.evaluation.hidden import Cost, hide_rows
from minivlp.infonce import infonce
from minivlp.itm import hard_negatives, itm_loss
from minivlp.mlm import IGNORE, mask_tokens, mlm_loss
from minivlp.models.maskvlm import MaskVlm, MaskVlmConfig
from minivlp.models.published.start import cross_block, towers
from minivlp.pictures.filled import Fill
from minivlp.recipes.base import Batch, Settings, Terms
from minivlp.recipes.hiding import HidingRecipe, same_projections
from minivlp.text import WordPiece
from minivlp.training.workers import ONE_PROCESS, Workers

# What `--without` changes, to see what it is good for.
ABLATIONS = {"turns": {"turns": False}}


@dataclass(frozen=True)
class MaskVlmSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    dim: int = 96
    tower_layers: int = 2  # of the picture encoder, and of the text encoder
    heads: int = 3
    hidden: int = 192
    embed: int = 96
    vocab_size: int = 512
    steps: int = 1200
    batch: int = 48  # pairs a step
    block: int = 2  # patches a side of what is hidden at once
    mask: float = 0.3  # probability of hiding a word
    pixel_weight: float = 4.0  # of the error of a colour, whose range is 2
    covered: float = 0.4  # first share of the run, in which all patches are hidden
    turns: bool = True  # is the other side whole? False: both sides are hidden at once, as in FLAVA


@dataclass(frozen=True)
class Pairs(Batch):
    """Pictures with their texts."""

    ids: Tensor  # (B, L) the whole texts
    text_mask: Tensor  # (B, L) bool
    masked: Tensor  # (B, L) the texts with words masked
    labels: Tensor  # (B, L) the masked ids, −100 elsewhere
    told: Tensor  # (B, L') what the pixels are filled in by: the text, or no word
    told_mask: Tensor  # (B, L') bool
    pixels: Tensor  # (B, 3, H, W) in [−1, 1]
    hidden: Tensor  # (B, N) bool, patches that are not seen
    same: Tensor  # (B,) integers, equal where texts mean the same
    step: int  # of the run


class MaskVlmBatches:
    """`batches(step)` → one Pairs, of (seed, step) alone."""

    def __init__(
        self, emojivl: EmojiVL, nouns: Sequence[Concept], tokenizer: WordPiece, settings: MaskVlmSettings
    ):
        self.tokenizer, self.settings = tokenizer, settings
        self._scenes = Scenes(emojivl, nouns, canvas=settings.canvas, seed=settings.seed)

    def __call__(self, step: int) -> list[Pairs]:
        s, t, rng = self.settings, self.tokenizer, np.random.default_rng((self.settings.seed, step))
        scenes = [self._scenes[step * s.batch + i] for i in range(s.batch)]
        ids, word_ids, text_mask = t.batch([scene.caption for scene in scenes])
        masked, labels = mask_tokens(ids, word_ids, rng, len(t), t.mask_id, t.special_ids, s.mask)
        alone = np.arange(s.batch) % 4 == 0  # filled in without a caption: [CLS] and [SEP] are left
        read = ["" if a else scene.caption for a, scene in zip(alone, scenes, strict=True)]
        told, _, told_mask = t.batch(read)
        if not s.turns:  # what is hidden of the text is hidden from the picture too
            told[~alone] = masked[~alone, : told.shape[1]]
        least = 1 if step < s.covered * s.steps else 1 / 3
        shares = rng.uniform(least, 5 / 3, s.batch).clip(max=1)
        hidden = hide_rows(shares, s.canvas // s.patch, rng, s.block)
        same = np.unique([meaning(scene) for scene in scenes], axis=0, return_inverse=True)[1].ravel()
        arrays = map(torch.from_numpy, (ids, text_mask, masked, labels, told, told_mask))
        return [Pairs(*arrays, scene_pixels(scenes), hidden, torch.from_numpy(same), step)]


class MaskVlmRecipe(HidingRecipe):
    """MaskVLM on pairs."""

    Settings, Config, Model = MaskVlmSettings, MaskVlmConfig, MaskVlm
    presets = {"cpu": MaskVlmSettings()}
    terms = ("contrast", "itm", "mlm", "pixels")
    ablations = ABLATIONS
    unit = "levels of 255: the mean absolute error of a hidden colour"

    @cached_property
    def batches(self) -> MaskVlmBatches:
        return MaskVlmBatches(self.emojivl, self.nouns, self.tokenizer, self.settings)

    def new_model(self) -> MaskVlm:
        """A model that begins with what the shipped ViLT has of it."""
        s, vilt = self.settings, self.vilt["model"]
        sizes = s.shared_with(MaskVlmConfig) | {"vocab_size": len(self.tokenizer), "image_size": s.canvas}
        model = MaskVlm(MaskVlmConfig(**sizes))
        start = towers(vilt, s.tower_layers)
        for stack in ("image_cross", "text_cross", "decoder"):
            start |= cross_block(vilt, s.tower_layers, f"{stack}.blocks.0.")
        model.load_state_dict(start, strict=False)
        same_projections(model)
        return model

    def matrices(self, model: MaskVlm) -> list[nn.Parameter]:
        return [*super().matrices(model), model.mlm.dense.weight]

    def loss(self, model: MaskVlm, batches: Sequence[Pairs], workers: Workers = ONE_PROCESS) -> Terms:
        (b,) = batches
        image, text = model.image_states(b.pixels), model.text_states(b.ids, b.text_mask)
        x, y = model.image_vector(image), model.text_vector(text)
        seen = image if self.settings.turns else model.image_states(b.pixels, b.hidden)
        masked = b.labels != IGNORE  # (B, L)
        words = model.read(model.text_states(b.masked, b.text_mask), b.text_mask, seen)[masked]
        errors = model.colour_errors(b.pixels, b.hidden, model.text_states(b.told, b.told_mask), b.told_mask)
        rows, columns, match = matching_pairs(x, y, model.scale, b, self.settings.seed)
        matched = model.itm_logits(image[columns], text[rows], b.text_mask[rows])
        return {
            "contrast": infonce(x, y, model.scale),
            "itm": itm_loss(matched, match),
            "mlm": mlm_loss(model.mlm_hidden(words), model.mlm_weight, model.mlm_bias, b.labels[masked]),
            "pixels": self.settings.pixel_weight * errors[b.hidden].mean(),
        }

    def fill(self, model: MaskVlm) -> Fill:
        def fill(pixels: Tensor, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return model.fill(model.image_states(pixels, hidden), model.text_states(ids, mask), mask)

        return fill

    def cost(self, model: MaskVlm) -> Cost:
        def cost(pixels: Tensor, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            errors = model.colour_errors(pixels, hidden, model.text_states(ids, mask), mask)  # (B, N)
            return 127.5 * (errors * hidden).sum(1) / hidden.sum(1)

        return cost


def matching_pairs(
    x: Tensor, y: Tensor, scale: Tensor, batch: Pairs, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of texts, rows of pictures, labels (3B,): true pairs, wrong pictures, wrong texts.

    x, y (B, embed) unit pictures and texts; the wrong ones are drawn by (seed, step).
    """
    rng, rows = np.random.default_rng((seed, batch.step, 1)), torch.arange(len(x))
    S = (scale * y @ x.T).detach().cpu().double().numpy()  # (B, B), texts by pictures
    picture, text = (torch.from_numpy(hard_negatives(s, rng, batch.same.cpu().numpy())) for s in (S, S.T))
    labels = (torch.arange(3 * len(x)) < len(x)).long()
    where = (torch.cat([rows, rows, text]), torch.cat([rows, picture, rows]), labels)
    return tuple(index.to(x.device) for index in where)
