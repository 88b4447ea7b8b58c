"""CoCa on composed scenes: a contrast of picture and caption, and the caption word by word, in one pass.

    loss = 1 · InfoNCE(x, y) + 2 · cross-entropy of the next word

No curriculum: a step draws pairs of objects from the first on. Rows of equal meaning are not contrasted, for
neither would be a wrong partner. Beside the model a blind one is trained, on grey pictures and by the second
term alone; what it pays for a caption is the entropy of captions, or the sentences give pictures away.

Sources: Yu et al. 2022 (CoCa), section 3.2, for the two terms and their weights.
Left out: several processes, own captions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.core.images import square_pixels
from minivlp.data import CPU_NOUNS, Scene, Scenes, scene_pixels
from minivlp.data.probes import first_of_each, meaning, swapped, true_captions
from minivlp.decoder import decode
from minivlp.evaluation.captions import evaluate_captions, report_captions
from minivlp.evaluation.reading import BATCH, equal_lengths, fitting_rows
from minivlp.evaluation.splits import Progress
from minivlp.infonce import infonce
from minivlp.mlm import mlm_loss
from minivlp.models.coca import Captioner, Coca, CocaConfig, small_init
from minivlp.pictures.sheets import contact_sheet
from minivlp.recipes.base import Batch, Recipe, Settings, Terms, load_trained
from minivlp.targets import next_words
from minivlp.text import WordPiece
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers

DRAWN, DRAWN_SEED = 18, 7  # pictures whose captions are drawn
BLIND_STEPS = 0.6  # of the run's


@dataclass(frozen=True)
class CocaSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    image_dim: int = 96
    image_layers: int = 3
    image_heads: int = 3
    image_hidden: int = 192
    dim: int = 96
    heads: int = 3
    hidden: int = 192
    text_layers: int = 1
    layers: int = 2
    queries: int = 1
    pool_heads: int = 3
    vocab_size: int = 512
    steps: int = 1600
    contrast_weight: float = 1.0
    caption_weight: float = 2.0


@dataclass(frozen=True)
class CaptionBatch(Batch):
    """B captions with their pictures."""

    ids: Tensor  # (B, L) with [CLS] before and [SEP] behind the words
    text_mask: Tensor  # (B, L) bool
    labels: Tensor  # (B, L) the next id, −100 where there is none
    pixels: Tensor  # (B, 3, H, W) in [−1, 1]
    contrast: Tensor  # (B,) bool, rows of different meanings


class CocaRecipe(Recipe):
    """CoCa on pairs of objects."""

    Settings, Config, Model = CocaSettings, CocaConfig, Coca
    presets = {"cpu": CocaSettings()}
    terms = ("contrast", "caption")
    ablations = {"contrast": {"contrast_weight": 0.0}, "captions": {"caption_weight": 0.0}}

    @property
    def blind(self) -> bool:
        return bool(self.about.get("blind"))

    def controls(self) -> dict[str, dict[str, Any]]:
        if self.blind or not self.settings.caption_weight:
            return {}
        steps = max(1, round(BLIND_STEPS * self.settings.steps))
        return {"blind": self.about | {"blind": True, "train": asdict(self.settings) | {"steps": steps}}}

    def new_model(self) -> Coca:
        return small_init(super().new_model())

    @cached_property
    def _scenes(self) -> Scenes:
        s = self.settings
        return Scenes(self.emojivl, self.nouns, canvas=s.canvas, seed=s.seed)

    def batch(self, step: int) -> list[CaptionBatch]:
        s = self.settings
        scenes = [self._scenes[step * s.batch + i] for i in range(s.batch)]
        ids, mask = fitting_rows(self.tokenizer, [scene.caption for scene in scenes], s.max_text_len)
        contrast = np.zeros(len(scenes), bool)
        contrast[first_of_each([meaning(scene) for scene in scenes], range(len(scenes)))] = True
        arrays = {"ids": ids, "text_mask": mask, "labels": next_words(ids, mask), "contrast": contrast}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return [CaptionBatch(pixels=self.pixels(scenes), **tensors)]

    def pixels(self, scenes: Sequence[Scene]) -> Tensor:
        """What the model sees of scenes, (B, 3, H, W); a blind one sees grey."""
        pixels = scene_pixels(scenes)
        return torch.zeros_like(pixels) if self.blind else pixels

    def loss(self, model: Coca, batches: Sequence[CaptionBatch], workers: Workers = ONE_PROCESS) -> Terms:
        s, (b,) = self.settings, batches
        x, tokens = model.encode_image(b.pixels[:1] if self.blind else b.pixels)
        tokens = tokens.expand(len(b.ids), -1, -1)  # grey pictures are all alike
        y, words = model.encode_text(b.ids, b.text_mask)
        terms = {}
        if s.contrast_weight and not self.blind:
            terms["contrast"] = s.contrast_weight * infonce(x[b.contrast], y[b.contrast], model.scale)
        if s.caption_weight:
            table = model.vocabulary.weight
            hidden, none = model.hidden(words, tokens).flatten(0, 1), table.new_zeros(len(table))
            terms["caption"] = s.caption_weight * mlm_loss(hidden, table, none, b.labels.flatten())
        return terms

    @property
    def chance(self) -> dict[str, float]:
        return {"order": 1 / 2, "order_contrast": 1 / 2}

    @torch.inference_mode()
    def check(self, model: Coca) -> dict[str, float]:
        """Three of the evaluation's measures on pairs that training never shows."""
        if self.blind:
            return {}
        scenes, writer = self.fresh, CocaWriter(self, model)
        captions, exchanged = [s.caption for s in scenes], [swapped(s) for s in scenes]
        written = zip(writer.write(scenes), scenes, strict=True)
        own, other = (writer.contrast(texts, scenes).diagonal() for texts in (captions, exchanged))
        return {
            "true": float(np.mean([text in true_captions(scene) for text, scene in written])),
            "order": float((writer.log_p(captions, scenes) > writer.log_p(exchanged, scenes)).mean()),
            "order_contrast": float((own > other).mean()),
        }

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        writer, blind = CocaWriter(self, trained.model), None
        if (trained.folder / "blind" / "checkpoint.pt").is_file():
            control = type(self)(self.settings, {"blind": True}, self.tokenizer.tokens, self.data)
            blind = CocaWriter(control, load_trained(trained.folder / "blind").model)
        what = (self.emojivl, self.nouns, trained.canvas, items, seed, progress)
        return evaluate_captions(writer, *what, contrast=writer.contrast, blind=blind)

    report = staticmethod(report_captions)

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """curves.png, and captions.png with what is written about pictures by unseen artists."""
        artists = self.emojivl.shown_artists
        about = {"canvas": trained.canvas, "pairs": "held_out", "seed": DRAWN_SEED}
        source = Scenes(self.emojivl, self.nouns, artists, **about)
        scenes = [source[i] for i in range(DRAWN)]
        written = CocaWriter(self, trained.model).write(scenes)
        rows = [(s.image, text, text in true_captions(s)) for s, text in zip(scenes, written, strict=True)]
        title = f"pictures by {', '.join(artists)}; green: the sentence is true"
        contact_sheet(folder / "captions.png", [(title, rows)])
        return [*super().draw(trained, folder, records), folder / "captions.png"]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        """Write about a picture file: the likeliest sentence word by word, then what beams and chance find.

        Raises ValueError for a file that is no picture.
        """
        pixels = square_pixels(query, trained.canvas)
        writer = CocaWriter(self, trained.model.to(device))
        with torch.inference_mode():
            _, tokens = trained.model.encode_image(pixels.to(device))
        (text, log_p), *_ = writer.sentences(tokens)
        screen.say(f"{text}   (log probability {log_p:.2f})")
        for word, value in writer.words(text, tokens):
            screen.say(f"  {value:7.3f}  {word}")
        screen.say("by beams of 8, and drawn at random:")
        drawn = (writer.sentences(tokens, rng=np.random.default_rng(i)) for i in range(3))
        for row in (writer.sentences(tokens, beams=8), *drawn):
            screen.say(f"  {row[0][1]:7.3f}  {row[0][0]}")


@dataclass(frozen=True)
class CocaWriter:
    """A Coca that reads scenes with its recipe's eyes and tokenizer."""

    recipe: CocaRecipe
    model: Coca

    @property
    def tokenizer(self) -> WordPiece:
        return self.recipe.tokenizer

    @cached_property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _pictures(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        parts = [self.recipe.pixels(scenes[i : i + BATCH]) for i in range(0, len(scenes), BATCH)]
        x, tokens = zip(*(self.model.encode_image(pixels.to(self._device)) for pixels in parts), strict=True)
        return torch.cat(x), torch.cat(tokens)

    @torch.inference_mode()
    def log_p(self, captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray:
        """The log probability of caption i with its end, given picture i: (n,), nats."""
        _, tokens = self._pictures(scenes)
        scores = np.zeros(len(captions))
        for rows, ids in equal_lengths(self.tokenizer, captions, self.model.config.max_text_len):
            words = torch.from_numpy(ids).to(self._device)
            mask = torch.ones_like(words, dtype=torch.bool)
            _, states = self.model.encode_text(words, mask)
            log_p = self.model.next_logits(states[:, :-1], tokens[torch.from_numpy(rows)]).log_softmax(-1)
            scores[rows] = log_p.gather(2, words[:, 1:, None]).sum((1, 2)).double().cpu()
        return scores

    @torch.inference_mode()
    def write(self, scenes: Sequence[Scene]) -> list[str]:
        """The most probable word after each, until the end."""
        return [text for text, _ in self.sentences(self._pictures(scenes)[1])]

    def sentences(self, tokens: Tensor, **how: Any) -> list[tuple[str, float]]:
        """A sentence and its log probability for each picture's tokens; how: of `decoder.decode`."""
        t, places = self.tokenizer, self.model.config.max_text_len - 1
        allowed = torch.ones(places, len(t), dtype=torch.bool, device=tokens.device)
        allowed[:, [i for i in t.special_ids if i != t.sep_id]] = False
        begin = torch.full((len(tokens), 1), t.cls_id, device=tokens.device)
        ids, log_p = decode(Captioner(self.model, tokens), begin, allowed, end=t.sep_id, **how)
        return [(t.decode(row), value) for row, value in zip(ids.tolist(), log_p.tolist(), strict=True)]

    @torch.inference_mode()
    def words(self, text: str, tokens: Tensor) -> list[tuple[str, float]]:
        """The pieces of a text and its end, each with its log probability, for one picture's tokens."""
        ids, mask = map(
            torch.from_numpy, fitting_rows(self.tokenizer, [text], self.model.config.max_text_len)
        )
        _, states = self.model.encode_text(ids.to(self._device), mask.to(self._device))
        log_p = self.model.next_logits(states, tokens)[0].log_softmax(-1)
        following = ids[0, 1:].tolist()
        return [(self.tokenizer.tokens[i], log_p[at, i].item()) for at, i in enumerate(following)]

    @torch.inference_mode()
    def contrast(self, captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray:
        """The cosine of every caption with every picture, (captions, scenes)."""
        x, _ = self._pictures(scenes)
        ids, mask = fitting_rows(self.tokenizer, captions, self.model.config.max_text_len)
        y, _ = self.model.encode_text(*(torch.from_numpy(a).to(self._device) for a in (ids, mask)))
        return (y @ x.T).float().cpu().numpy()
