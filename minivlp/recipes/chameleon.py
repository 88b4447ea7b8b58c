"""Chameleon on composed scenes: the next token of either kind, in both orders, from nothing.

    loss = ½ next words + next codes + 1e-5 · (log normaliser)²,        each the mean over its tokens

Words and codes share one softmax over one vocabulary. The means are taken apart because a picture has 36
codes and a caption 8 words, of which the codes would take most of the gradient. In some rows the words see
the picture, in the others the picture sees the words. The last term, the z-loss, keeps the shared softmax
from growing. Codes are the k-means of patches of the first scenes, made once from the seed.

Sources: Chameleon team 2024, sections 2.2 and 2.3, z-loss of 1e-5; Aghajanyan et al. 2022 (CM3) and Yu et al.
2023 (CM3Leon) for pictures and text in one stream.
Left out: CM3's spans moved to the end; a VQ-VAE in place of k-means; starting from another model's weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.core.images import square_pixels
from minivlp.data import CPU_NOUNS, Scenes, scene_pixels
from minivlp.data.names import read_caption
from minivlp.data.probes import swapped
from minivlp.decoder import DecoderBlock
from minivlp.evaluation.chameleon import draw, evaluate_chameleon, nats, report_chameleon, write
from minivlp.evaluation.reading import fitting_rows
from minivlp.evaluation.splits import Progress
from minivlp.mlm import IGNORE
from minivlp.models.chameleon import Chameleon, ChameleonConfig, small_init
from minivlp.patch import to_patches
from minivlp.pictures.sheets import Sheet, contact_sheet
from minivlp.recipes.base import Batch, Recipe, Settings, Terms
from minivlp.targets import next_words
from minivlp.training.run import need_writable
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers
from minivlp.vq import kmeans

SHOWN, DRAWN, SEED = 12, 6, 7  # pictures of a demo; of each caption of a run; of their draws


@dataclass(frozen=True)
class ChameleonSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    dim: int = 96
    layers: int = 4
    heads: int = 3
    hidden: int = 192
    vocab_size: int = 512  # of words at most
    max_text_len: int = 16
    places: bool = True
    codes: int = 256
    clustered: int = 500  # scenes whose patches make the codes
    image_first: float = 0.4  # share of the rows in which the words see the picture
    words_weight: float = 0.5
    z_weight: float = 1e-5
    steps: int = 1500


@dataclass(frozen=True)
class PairBatch(Batch):
    """B captions with their pictures."""

    text: Tensor  # (B, L) with [CLS] before and [SEP] behind the words
    text_mask: Tensor  # (B, L) bool
    pixels: Tensor  # (B, 3, H, W) in [−1, 1]
    image_first: Tensor  # (B,) bool


class ChameleonRecipe(Recipe):
    """Chameleon on pairs of objects."""

    Settings, Config, Model = ChameleonSettings, ChameleonConfig, Chameleon
    presets = {"cpu": ChameleonSettings()}
    terms = ("words", "codes", "z")

    @cached_property
    def _scenes(self) -> Scenes:
        return Scenes(self.emojivl, self.nouns, canvas=self.settings.canvas, seed=self.settings.seed)

    def new_model(self) -> Chameleon:
        s = self.settings
        sizes = s.shared_with(ChameleonConfig) | {"image_size": s.canvas}
        sizes["vocab_size"] = len(self.tokenizer) + 1 + s.codes
        model = Chameleon(ChameleonConfig(**sizes))
        pixels = scene_pixels([self._scenes[i] for i in range(s.clustered)])
        patches = to_patches(pixels, s.patch).flatten(0, 1)  # (scenes · N, 3·p·p)
        model.codebook.copy_(kmeans(patches, s.codes, np.random.default_rng(s.seed)))
        return small_init(model)

    def matrices(self, model: Chameleon) -> list[nn.Parameter]:
        blocks = [module for module in model.modules() if isinstance(module, DecoderBlock)]
        return [p for block in blocks for p in block.parameters() if p.ndim == 2]

    def batch(self, step: int) -> list[PairBatch]:
        s = self.settings
        scenes = [self._scenes[step * s.batch + i] for i in range(s.batch)]
        rows = fitting_rows(self.tokenizer, [scene.caption for scene in scenes], s.max_text_len)
        image_first = torch.arange(s.batch) < round(s.image_first * s.batch)  # scenes come in no order
        return [PairBatch(*map(torch.from_numpy, rows), scene_pixels(scenes), image_first)]

    def loss(self, model: Chameleon, batches: Sequence[PairBatch], workers: Workers = ONE_PROCESS) -> Terms:
        (b,) = batches
        image = model.tokenise(b.pixels)
        states = model.encode(b.text, b.text_mask, image, b.image_first)  # (B, L + N + 1, D)
        last = torch.full_like(image[:, :1], IGNORE)  # after the last code comes nothing
        labels = torch.cat([next_words(b.text, b.text_mask), image, last], 1)  # (B, L + N + 1)
        told = labels != IGNORE
        scores, labels = model.scores(states[told]), labels[told]  # (tokens, V)
        normaliser = scores.logsumexp(1)
        surprise = normaliser - scores.gather(1, labels[:, None])[:, 0]  # (tokens,) nats
        word = labels < model.config.begin
        return {
            "words": self.settings.words_weight * surprise[word].mean(),
            "codes": surprise[~word].mean(),
            "z": self.settings.z_weight * normaliser.square().mean(),
        }

    @property
    def chance(self) -> dict[str, float]:
        return {"order_written": 1 / 2, "order_drawn": 1 / 2}

    def check(self, model: Chameleon) -> dict[str, float]:
        """Nouns exchanged, by both probabilities, on pairs that training never shows."""
        scenes = self.fresh
        texts, pixels = [[s.caption for s in scenes], [swapped(s) for s in scenes]], scene_pixels(scenes)
        found = {}
        for name, column in (("order_written", 0), ("order_drawn", 1)):
            own, other = (nats(model, self.tokenizer, t, pixels, not column)[:, column] for t in texts)
            found[name] = float((own < other).mean())
        return found

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        what = (trained.tokenizer, self.emojivl, self.nouns, trained.canvas, items, seed, progress)
        return evaluate_chameleon(trained.model, *what)

    report = staticmethod(report_chameleon)

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """curves.png, and drawings.png: what the model draws for captions of pairs it never saw together."""
        captions = list(dict.fromkeys(scene.caption for scene in self.fresh))[:4]
        contact_sheet(folder / "drawings.png", [_drawn(trained, caption, DRAWN)[0] for caption in captions])
        return [*super().draw(trained, folder, records), folder / "drawings.png"]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        """Draw pictures for a sentence, with the model's own reading of each; or caption a picture file.

        Raises ValueError for a word that the model has never read, and for a file that is no picture.
        """
        trained.model.to(device)
        if Path(query).is_file():
            rule = "must be a sentence or a file with a picture"
            pixels = square_pixels(query, trained.canvas, rule).to(device)
            screen.say(f"the likeliest: {write(trained.model, trained.tokenizer, pixels)[0]}")
            rng = np.random.default_rng(SEED)
            for text in write(trained.model, trained.tokenizer, pixels.expand(4, -1, -1, -1), rng):
                screen.say(f"drawn:         {text}")
            return
        caption, _ = read_caption(query, self.nouns)
        need_writable(folder / "demo.png", make_folder=True)
        sheet, readings = _drawn(trained, caption, SHOWN)
        screen.say(f"{SHOWN} drawings, and how the model itself reads them:")
        for text in sorted(set(readings), key=readings.count, reverse=True):
            screen.say(f"{readings.count(text):4d}  {text}")
        contact_sheet(folder / "demo.png", [sheet])
        screen.say(f"wrote {folder / 'demo.png'}")


def _drawn(trained: Trained, caption: str, n: int) -> tuple[Sheet, list[str]]:
    """A sheet of n drawings with the model's readings, framed where they are the caption; the readings."""
    model, tokenizer = trained.model, trained.tokenizer
    pixels = draw(model, tokenizer, caption, n, np.random.default_rng(SEED))
    readings = write(model, tokenizer, pixels)
    images = pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    cells = [(image, text, text == caption) for image, text in zip(images, readings, strict=True)]
    return (caption, cells), readings
