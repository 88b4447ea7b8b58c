"""BLIP-2's first stage: one Q-Former learns to compare, to judge and to tell, by three tables of one stack.

    loss = contrast by the best query + captions from the queries alone + matching with wrong pairs

The pictures' states are those of the shipped ViLT's first blocks, frozen. Matching has two pairs a picture:
its own caption, and a wrong one, which is the caption with its nouns exchanged for every other picture and
for the rest another caption, drawn by its similarity (itm.py).

Sources: Li et al. 2023 (BLIP-2), section 3.1 and figure 2.
Left out: smoothed labels, and wrong pictures beside the wrong captions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.core.images import square_pixels
from minivlp.data import CPU_NOUNS, Scene, Scenes, scene_pixels
from minivlp.data.probes import first_of_each, meaning, swapped
from minivlp.decoder import decode
from minivlp.evaluation.captions import evaluate_captions, report_captions
from minivlp.evaluation.reading import BATCH, fitting_rows
from minivlp.evaluation.splits import Progress
from minivlp.itm import hard_negatives, itm_loss
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.qformer import Captioner, Qformer, QformerConfig, small_init
from minivlp.recipes.base import WEIGHTS, Batch, Settings, Terms, load_trained
from minivlp.recipes.looking import LookingRecipe
from minivlp.targets import next_words
from minivlp.text import WordPiece
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers


@dataclass(frozen=True)
class QformerSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    queries: int = 8
    dim: int = 96
    layers: int = 3
    heads: int = 3
    hidden: int = 192
    every: int = 1
    embed: int = 96
    eps: float = 1e-6
    image_layers: int = 2  # blocks of the ViLT that a picture passes
    steps: int = 900
    lr: float = 4e-3


@dataclass(frozen=True)
class QformerBatch(Batch):
    """B captions with the states of their pictures, and B wrong ones with the nouns exchanged."""

    ids: Tensor  # (B, L)
    text_mask: Tensor  # (B, L) bool
    exchanged: Tensor  # (B, L)
    exchanged_mask: Tensor  # (B, L) bool
    image: Tensor  # (B, N, I)
    contrast: Tensor  # (B,) bool, rows of different meanings
    same: Tensor  # (B,) integers, equal where captions mean the same
    step: int  # of the run


class QformerRecipe(LookingRecipe):
    """A Q-Former on pairs of objects."""

    Settings, Config, Model = QformerSettings, QformerConfig, Qformer
    presets = {"cpu": QformerSettings()}
    terms = ("contrast", "captions", "matching")

    def vocabulary(self) -> WordPiece:
        return load_trained(WEIGHTS / "vilt_tiny.safetensors").tokenizer

    def new_model(self) -> Qformer:
        sizes = self.settings.shared_with(QformerConfig)
        sizes |= {"vocab_size": len(self.tokenizer), "image_dim": self.eye.config.dim}
        return small_init(Qformer(QformerConfig(**sizes)))

    def matrices(self, model: Qformer) -> list[nn.Parameter]:
        return [p for layer in model.layers for p in layer.parameters() if p.ndim == 2]

    @cached_property
    def _scenes(self) -> Scenes:
        return Scenes(self.emojivl, self.nouns, canvas=self.settings.canvas, seed=self.settings.seed)

    def batch(self, step: int) -> list[QformerBatch]:
        s, B = self.settings, self.settings.batch
        scenes = [self._scenes[step * B + i] for i in range(B)]
        texts = [scene.caption for scene in scenes] + [swapped(scene) for scene in scenes]
        ids, mask = map(torch.from_numpy, fitting_rows(self.tokenizer, texts, s.max_text_len))
        contrast = torch.zeros(B, dtype=torch.bool)
        contrast[first_of_each([meaning(scene) for scene in scenes], range(B))] = True
        same = np.unique([meaning(scene) for scene in scenes], axis=0, return_inverse=True)[1].ravel()
        image = self.look(scene_pixels(scenes))
        return [
            QformerBatch(ids[:B], mask[:B], ids[B:], mask[B:], image, contrast, torch.from_numpy(same), step)
        ]

    def loss(self, model: Qformer, batches: Sequence[QformerBatch], workers: Workers = ONE_PROCESS) -> Terms:
        (b,) = batches
        queries, kept = model.read(b.image)
        words = model.read_words(b.ids, b.text_mask)
        told, labels = model.write(b.ids, b.text_mask, kept)[0], next_words(b.ids, b.text_mask)
        asked = labels != IGNORE
        hidden = model.mlm_hidden(told[asked])
        S = (model.scale * model.similarity(queries, words)).detach().double().cpu().numpy()
        rng = np.random.default_rng((self.settings.seed, b.step))
        other = torch.from_numpy(hard_negatives(S, rng, b.same.cpu().numpy())).to(b.ids.device)
        every_other = (torch.arange(len(b.ids), device=b.ids.device) % 2 == 0)[:, None]
        wrong = torch.where(every_other, b.exchanged, b.ids[other])
        wrong_mask = torch.where(every_other, b.exchanged_mask, b.text_mask[other])
        texts = torch.cat([b.ids, wrong]), torch.cat([b.text_mask, wrong_mask])
        asking, _ = model.encode(*texts, b.image.repeat(2, 1, 1), "matching")
        match = torch.arange(2, device=b.ids.device).flip(0).repeat_interleave(len(b.ids))
        return {
            "contrast": model.contrast_loss(queries[b.contrast], words[b.contrast]),
            "captions": mlm_loss(hidden, model.mlm_weight, model.mlm_bias, labels[asked]),
            "matching": itm_loss(model.itm_logits(asking), match),
        }

    @property
    def chance(self) -> dict[str, float]:
        return {"order": 1 / 2, "order_match": 1 / 2, "order_contrast": 1 / 2}

    @torch.inference_mode()
    def check(self, model: Qformer) -> dict[str, float]:
        """Nouns exchanged, by the three tables, on pairs that training never shows."""
        scenes, writer = self.fresh, QformerWriter(self, model)
        captions, exchanged = [s.caption for s in scenes], [swapped(s) for s in scenes]
        own, other = (writer.contrast(texts, scenes).diagonal() for texts in (captions, exchanged))
        return {
            "order": float((writer.log_p(captions, scenes) > writer.log_p(exchanged, scenes)).mean()),
            "order_match": float((writer.match(captions, scenes) > writer.match(exchanged, scenes)).mean()),
            "order_contrast": float((own > other).mean()),
        }

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        writer = QformerWriter(self, trained.model)
        what = (self.emojivl, self.nouns, trained.canvas, items, seed, progress)
        return evaluate_captions(writer, *what, contrast=writer.contrast, match=writer.match)

    def report(self, results: Mapping[str, Any]) -> str:
        return report_captions(results)

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        """Write about a picture file. Raises ValueError for a file that is no picture."""
        writer = QformerWriter(self, trained.model.to(device))
        image = self.look(square_pixels(query, trained.canvas).to(device))
        (text, log_p), *_ = writer.sentences(image)
        screen.say(f"{text}   (log probability {log_p:.2f})")

    @staticmethod
    def to_published(model: Qformer) -> dict[str, Tensor]:
        """In float16."""
        return {name: tensor.half() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class QformerWriter:
    """A Q-Former that reads scenes with its recipe's eyes and tokenizer, by one of its three tables."""

    recipe: QformerRecipe
    model: Qformer

    def _parts(self, captions: Sequence[str], scenes: Sequence[Scene]) -> Any:
        """Batches of ids, masks and picture states."""
        device, longest = self.model.query.device, self.recipe.settings.max_text_len
        ids, mask = map(torch.from_numpy, fitting_rows(self.recipe.tokenizer, captions, longest))
        for rows in torch.arange(len(captions)).split(BATCH):
            image = self.recipe.look(scene_pixels([scenes[i] for i in rows]).to(device))
            yield ids[rows].to(device), mask[rows].to(device), image

    @torch.inference_mode()
    def log_p(self, captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray:
        """The log probability of caption i with its end, given picture i: (n,), nats."""
        found = []
        for ids, mask, image in self._parts(captions, scenes):
            told, _ = self.model.write(ids, mask, self.model.read(image)[1])
            log_p, labels = self.model.mlm_logits(told).log_softmax(-1), next_words(ids, mask)
            of_words = log_p.gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels != IGNORE)
            found.append(of_words.sum(1).double().cpu())
        return torch.cat(found).numpy()

    @torch.inference_mode()
    def match(self, captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray:
        """The log odds that caption i belongs to picture i: (n,), nats."""
        odds = [
            self.model.itm_logits(self.model.encode(*part, "matching")[0]).diff(dim=1)[:, 0].cpu()
            for part in self._parts(captions, scenes)
        ]
        return torch.cat(odds).double().numpy()

    @torch.inference_mode()
    def contrast(self, captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray:
        """The largest cosine of a query with every caption's vector, (captions, scenes)."""
        parts = list(self._parts(captions, scenes))
        queries = torch.cat([self.model.read(image)[0] for _, _, image in parts])
        words = torch.cat([self.model.read_words(ids, mask)[:, :1] for ids, mask, _ in parts])
        return self.model.similarity(queries, words).T.double().cpu().numpy()

    @torch.inference_mode()
    def write(self, scenes: Sequence[Scene]) -> list[str]:
        """The most probable word after each, until the end."""
        pixels = [scene_pixels(scenes[i : i + BATCH]) for i in range(0, len(scenes), BATCH)]
        images = (self.recipe.look(part.to(self.model.query.device)) for part in pixels)
        return [text for image in images for text, _ in self.sentences(image)]

    @torch.inference_mode()
    def sentences(self, image: Tensor, **how: Any) -> list[tuple[str, float]]:
        """A sentence and its log probability for each picture's states; how: of `decoder.decode`."""
        t, kept = self.recipe.tokenizer, self.model.read(image)[1]
        places = self.recipe.settings.max_text_len - 1
        allowed = torch.ones(places, len(t), dtype=torch.bool, device=image.device)
        allowed[:, [i for i in t.special_ids if i != t.sep_id]] = False
        begin = torch.full((len(image), 1), t.cls_id, device=image.device)
        ids, log_p = decode(Captioner(self.model, kept), begin, allowed, end=t.sep_id, **how)
        return [(t.decode(row), value) for row, value in zip(ids.tolist(), log_p.tolist(), strict=True)]
