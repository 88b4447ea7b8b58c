"""A bridge from a frozen picture encoder to a language model that has never seen a picture.

    loss = cross-entropy of the next token of the sentence that stands behind a picture's prefix

The pictures' states are those of the shipped ViLT's first blocks, read apart and normalised; the language
model is the shipped reader of lists (listlm.py). Both are frozen, so that only the connector learns, through
the language model; `--reader lora` and `--reader tuned` let the reader learn as well, and then it is measured
what became of its lists.

Sources: Tsimpoukelli et al. 2021 (Frozen), section 3, for the two controls: a reader of random weights
(`--without reading`), and no picture at all (`--without picture`).
Left out: stages, instructions, and learning of the picture encoder.
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
from minivlp.data import Scene, Scenes, scene_pixels
from minivlp.data.lists import COLON, Layouts
from minivlp.data.probes import meaning, true_captions
from minivlp.evaluation.captions import evaluate_captions, report_captions
from minivlp.evaluation.interval import measured
from minivlp.evaluation.prefix import PrefixWriter
from minivlp.evaluation.reading import fitting_rows
from minivlp.evaluation.splits import Progress
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.bridge import Bridge, BridgeConfig, LanguageModel
from minivlp.pictures.sheets import contact_sheet
from minivlp.recipes.base import WEIGHTS, Batch, Terms, load_trained
from minivlp.recipes.listlm import ListRecipe, ListSettings
from minivlp.recipes.looking import LookingRecipe
from minivlp.targets import next_words
from minivlp.text import WordPiece
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers

DRAWN, DRAWN_SEED = 18, 7  # pictures that are written about


@dataclass(frozen=True)
class BridgeSettings(ListSettings):
    """Everything that decides a run's weights, besides the data; the reader's sizes are those of its run."""

    connector: str = "resampler"
    reader: str = "frozen"
    queries: int = 9
    bridge_layers: int = 2
    rank: int = 8
    image_layers: int = 2  # blocks of the ViLT that a picture passes
    blind: bool = False  # are all pictures the same?
    random: bool = False  # has the reader never read?
    steps: int = 1000
    lr: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class BridgeBatch(Batch):
    """B sentences with the states of their pictures."""

    ids: Tensor  # (B, L) [CLS], ":", the sentence, [SEP]; the prefix stands behind [CLS]
    text_mask: Tensor  # (B, L) bool
    labels: Tensor  # (B, L) the next id from the colon on, −100 elsewhere
    image: Tensor  # (B, N, I)


class BridgeRecipe(LookingRecipe):
    """A bridge on pairs of objects."""

    Settings, Config, Model = BridgeSettings, BridgeConfig, Bridge
    presets = {"cpu": BridgeSettings()}
    terms = ("next",)
    ablations = {"picture": {"blind": True}, "reading": {"random": True}}

    @classmethod
    def changes(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        return super().changes(flags) | {k: flags[k] for k in ("connector", "reader") if k in flags}

    @cached_property
    def taught(self) -> Trained:
        """The shipped reader of lists."""
        return load_trained(WEIGHTS / "listlm_tiny.safetensors")

    def vocabulary(self) -> WordPiece:
        return self.taught.tokenizer

    def new_model(self) -> Bridge:
        s, read = self.settings, vars(self.taught.model.config)
        sizes = s.shared_with(BridgeConfig) | read
        sizes |= {"image_dim": self.eye.config.dim, "grid": self.eye.config.grid}
        model = Bridge(BridgeConfig(**sizes))
        if not s.random:
            begin_with(model, self.taught.model)
        return model

    def matrices(self, model: Bridge) -> list[nn.Parameter]:
        return [
            p
            for part in (model.connector, *model.reader.blocks)
            for name, p in part.named_parameters()
            if p.ndim == 2 and p.requires_grad and not name.endswith(("queries", "query"))
        ]

    @cached_property
    def _scenes(self) -> Scenes:
        return Scenes(self.emojivl, self.nouns, canvas=self.settings.canvas, seed=self.settings.seed)

    def look(self, pixels: Tensor) -> Tensor:
        states = super().look(pixels)
        return torch.zeros_like(states) if self.settings.blind else states

    def batch(self, step: int) -> list[BridgeBatch]:
        s = self.settings
        scenes = [self._scenes[step * s.batch + i] for i in range(s.batch)]
        texts = [f"{COLON} {scene.caption}" for scene in scenes]
        ids, mask = fitting_rows(self.tokenizer, texts, s.max_text_len)
        labels = next_words(ids, mask)
        labels[:, 0] = IGNORE
        return [BridgeBatch(*map(torch.from_numpy, (ids, mask, labels)), self.look(scene_pixels(scenes)))]

    def loss(self, model: Bridge, batches: Sequence[BridgeBatch], workers: Workers = ONE_PROCESS) -> Terms:
        (b,) = batches
        told = b.labels != IGNORE
        states, table = model.encode(b.ids, b.text_mask, b.image)[told], model.reader.head.weight
        return {"next": mlm_loss(states, table, table.new_zeros(len(table)), b.labels[told])}

    def writer(self, model: Bridge) -> PrefixWriter:
        """One who is told of scenes by their pictures."""
        device = next(model.parameters()).device

        def prefix(scenes: Sequence[Scene]) -> Tensor:
            return model.prefix(self.look(scene_pixels(scenes).to(device)))

        return PrefixWriter(model.reader, self.tokenizer, prefix)

    @torch.inference_mode()
    def check(self, model: Bridge) -> dict[str, float]:
        """The share of true sentences about pictures of pairs that training never shows."""
        written = zip(self.writer(model).write(self.fresh), self.fresh, strict=True)
        return {"true": float(np.mean([text in true_captions(scene) for text, scene in written]))}

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        """As of captions.py; and what the reader now says of lists of pairs that no training showed."""
        model, s = trained.model, self.settings
        what = (self.emojivl, self.nouns, trained.canvas, items, seed, progress)
        results = evaluate_captions(self.writer(model), *what)
        source = Layouts(self.emojivl, self.nouns, canvas=s.canvas, pairs="held_out", seed=seed)
        scenes = [source[i] for i in range(items)]
        lists = ListRecipe(s, tokens=self.tokenizer.tokens)
        said = zip(lists.writer(model.reader).write(scenes), scenes, strict=True)
        true = [text in true_captions(scene) for text, scene in said]
        results["details"]["lists"] = measured(true, [meaning(scene)[:2] for scene in scenes])
        return results

    def report(self, results: Mapping[str, Any]) -> str:
        lists = results["details"]["lists"]
        said = "{value:.3f} ({low:.3f} to {high:.3f})".format(**lists)
        return report_captions(results) + f"\nOf lists of held-out pairs the reader says {said} truly.\n"

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """curves.png, and captions.png with what is written about pictures by unseen artists."""
        artists = self.emojivl.shown_artists
        about = {"canvas": trained.canvas, "pairs": "held_out", "seed": DRAWN_SEED}
        source = Scenes(self.emojivl, self.nouns, artists, **about)
        scenes = [source[i] for i in range(DRAWN)]
        written = self.writer(trained.model).write(scenes)
        rows = [(s.image, text, text in true_captions(s)) for s, text in zip(scenes, written, strict=True)]
        contact_sheet(
            folder / "captions.png",
            [(f"pictures by {', '.join(artists)}; green: the sentence is true", rows)],
        )
        return [*super().draw(trained, folder, records), folder / "captions.png"]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        """Write about a picture file. Raises ValueError for a file that is no picture."""
        model = trained.model.to(device)
        prefix = model.prefix(self.look(square_pixels(query, trained.canvas).to(device)))
        (text, log_p), *_ = self.writer(model).sentences(prefix)
        screen.say(f"{text}   (log probability {log_p:.2f})")

    @staticmethod
    def to_published(model: Bridge) -> dict[str, Tensor]:
        """In float16; what is the shipped reader's, tensor by tensor, is left out."""
        known = {f"reader.{name}": tensor for name, tensor in shipped_reader().state_dict().items()}
        state = model.state_dict().items()
        return {k: v.half() for k, v in state if k not in known or not torch.equal(v, known[k])}

    @staticmethod
    def from_published(model: Bridge, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        known = {f"reader.{k}": v for k, v in shipped_reader().state_dict().items()}
        return {k: known[k] for k in model.state_dict() if k in known} | tensors  # a LoRA has other names


def shipped_reader() -> LanguageModel:
    """The language model that reads lists, as it ships."""
    return load_trained(WEIGHTS / "listlm_tiny.safetensors").model


def begin_with(model: Bridge, reader: LanguageModel) -> None:
    """Give the bridge's reader the weights of one that has learned to read, in place; a LoRA goes on top."""
    wanted = model.reader.state_dict()
    for name, tensor in reader.state_dict().items():
        based = name.replace("qkv.", "qkv.base.").replace("proj.", "proj.base.")
        wanted[based if based in wanted else name].copy_(tensor)
