"""A denoiser on composed scenes and single drawings: a caption helps to tell a picture from the noise on it.

    loss = mean |v̂(x_t, t, caption) − v|² = mean |ε̂ − ε|² / signal(t)²,       t² even over [0, 1]

Little noise can be told from a picture without its caption, so levels and weights favour much noise. A third
of the rows are single drawings, "a dog". Of the scenes most are pairs, and some show one object and say where
it lies. A tenth of the rows have no caption, for guidance.

Sources: Ho, Jain and Abbeel 2020 (DDPM), algorithm 1; Salimans and Ho 2022 for the weight; Ho and Salimans
2022 for captions left out; Kingma et al. 2021, appendix I, for levels spread evenly over a batch.
Left out: an average of the weights over steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data import CPU_NOUNS, Scenes, scene_pixels
from minivlp.data.drawings import Portraits
from minivlp.data.names import read_caption
from minivlp.data.probes import swapped
from minivlp.diffusion import noisy, signal
from minivlp.evaluation.denoiser import (
    CLASSES,
    alone,
    caption_errors,
    draw,
    drawings,
    evaluate_denoiser,
    name_errors,
    report_denoiser,
)
from minivlp.evaluation.reading import fitting_rows
from minivlp.evaluation.splits import Progress
from minivlp.models.denoiser import Denoiser, DenoiserConfig, small_init
from minivlp.pictures.sheets import Sheet, contact_sheet
from minivlp.recipes.base import Batch, Recipe, Settings, Terms
from minivlp.training.run import need_writable
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers

SHOWN, DRAWN, SEED = 12, 6, 7  # pictures of a demo; of each caption of a run; of their draws
FAINT = 0.1  # the least signal that a weight of the loss divides by


@dataclass(frozen=True)
class DenoiserSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    canvas: int = 24
    patch: int = 4
    max_text_len: int = 16
    dim: int = 80
    layers: int = 4
    heads: int = 4
    hidden: int = 160
    vocab_size: int = 512
    single: float = 1 / 3  # share of the rows that are drawings of one object
    place: float = 0.2  # share of the scenes, "a dog left of the middle"; the others are pairs
    unsaid: float = 0.1  # share of the rows without a caption
    lr: float = 3e-3
    matrix_lr: float = 0.02
    steps: int = 2200


@dataclass(frozen=True)
class DrownedBatch(Batch):
    """B captions with their pictures, and the noise that they drown in."""

    ids: Tensor  # (B, L)
    text_mask: Tensor  # (B, L) bool
    pixels: Tensor  # (B, 3, H, W) in [−1, 1]
    noise: Tensor  # (B, 3, H, W) of unit variance
    level: Tensor  # (B,) in [0, 1]


class DenoiserRecipe(Recipe):
    """A denoiser of pairs of objects and of single ones."""

    Settings, Config, Model = DenoiserSettings, DenoiserConfig, Denoiser
    presets = {"cpu": DenoiserSettings()}
    terms = ("noise",)
    checked = 64

    @cached_property
    def _scenes(self) -> Scenes:
        s = self.settings
        kinds = {"pair": 1 - s.place, "place": s.place}
        return Scenes(self.emojivl, self.nouns, canvas=s.canvas, kinds=kinds, seed=s.seed)

    @cached_property
    def _portraits(self) -> Portraits:
        return Portraits(self.emojivl, self.settings.canvas)

    def new_model(self) -> Denoiser:
        return small_init(super().new_model())

    def batch(self, step: int) -> list[DrownedBatch]:
        s, rng = self.settings, np.random.default_rng((self.settings.seed, step))
        singles = round(s.single * s.batch)
        pairs = s.batch - singles
        scenes = [self._scenes[step * pairs + i] for i in range(pairs)]
        which, drawn = drawings(self._portraits, self.nouns, self.emojivl.seen_artists, singles, rng)
        captions = [scene.caption for scene in scenes] + [alone(self.nouns[i]) for i in which]
        said = rng.random(s.batch) >= s.unsaid
        texts = [text if told else "" for text, told in zip(captions, said, strict=True)]
        rows = map(torch.from_numpy, fitting_rows(self.tokenizer, texts, s.max_text_len))
        pixels = torch.cat([scene_pixels(scenes), drawn])
        noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))
        level = np.sqrt((rng.permutation(s.batch) + rng.random(s.batch)) / s.batch)
        return [DrownedBatch(*rows, pixels, noise, torch.from_numpy(level).float())]

    def loss(self, model: Denoiser, batches: Sequence[DrownedBatch], workers: Workers = ONE_PROCESS) -> Terms:
        (b,) = batches
        found = model(noisy(b.pixels, b.noise, b.level), b.level, b.ids, b.text_mask)
        weight = signal(b.level).clamp_min(FAINT) ** -2  # (B,)
        return {"noise": (weight * (found - b.noise).square().flatten(1).mean(1)).mean()}

    @property
    def chance(self) -> dict[str, float]:
        return {"order": 1 / 2, "named": 1 / len(self.nouns[:CLASSES])}

    def check(self, model: Denoiser) -> dict[str, float]:
        """Nouns exchanged, on pairs that training never shows; and single drawings, by their errors."""
        captions, tokenizer = [[s.caption, swapped(s)] for s in self.fresh], self.tokenizer
        told = caption_errors(model, tokenizer, captions, scene_pixels(self.fresh))
        rng, classes = np.random.default_rng(self.settings.seed + 1), self.nouns[:CLASSES]
        which, pixels = drawings(self._portraits, classes, self.emojivl.seen_artists, self.checked, rng)
        guessed = name_errors(model, tokenizer, classes, pixels, T=2).argmin(1)
        return {"order": float((told[:, 0] < told[:, 1]).mean()), "named": float((guessed == which).mean())}

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        what = (trained.tokenizer, self.emojivl, self.nouns, trained.canvas, items, seed, progress)
        return evaluate_denoiser(trained.model, *what)

    report = staticmethod(report_denoiser)

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """curves.png, and drawings.png: what the model draws for captions of pairs it never saw together."""
        captions = list(dict.fromkeys(scene.caption for scene in self.fresh))[:4]
        contact_sheet(folder / "drawings.png", [_drawn(trained, caption, DRAWN) for caption in captions])
        return [*super().draw(trained, folder, records), folder / "drawings.png"]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        """Draw pictures for a sentence. Raises ValueError for a word that the model has never read."""
        caption, _ = read_caption(query, self.nouns)
        need_writable(folder / "demo.png", make_folder=True)
        trained.model.to(device)
        contact_sheet(folder / "demo.png", [_drawn(trained, caption, SHOWN)])
        screen.say(f"wrote {folder / 'demo.png'}")


def _drawn(trained: Trained, caption: str, n: int) -> Sheet:
    """A sheet of n drawings."""
    pixels = draw(trained.model, trained.tokenizer, caption, n, np.random.default_rng(SEED))
    images = pixels.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return caption, [(image, "", False) for image in images]
