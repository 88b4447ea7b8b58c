"""A language model that learns to read lists of facts, from text alone; a bridge will write lists for it.

    loss = cross-entropy of the next token of what stands behind the colon

    2 5 dog 4 0 guitar : a dog left of a guitar

In the first part of a run a sentence says where one of two objects is ("a dog left of the middle"): it can be
said from that object's numbers alone, which a reader has to find by its noun. Which of two numbers is larger
comes after.

A caption never says a thing twice, so the next word of captions can be learned without a look back at what
was said. Here the sentence says again what the list says, and pairs of nouns that training never shows are
said by the same reading.

Sources: Tsimpoukelli et al. 2021 (Frozen), for a language model that is trained before it meets a picture.
Left out: a loss on the facts, which come in any order and at any place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.core.require import fail
from minivlp.data import CPU_NOUNS, Scene
from minivlp.data.lists import BINS, COLON, Layouts, facts, list_tokenizer
from minivlp.data.probes import true_captions
from minivlp.decoder import DecoderBlock
from minivlp.evaluation.captions import evaluate_captions, report_captions
from minivlp.evaluation.prefix import PrefixWriter
from minivlp.evaluation.reading import fitting_rows
from minivlp.evaluation.splits import Progress
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.bridge import LanguageConfig, LanguageModel, small_init
from minivlp.recipes.base import Batch, Recipe, Settings, Terms
from minivlp.targets import next_words
from minivlp.text import WordPiece
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers


@dataclass(frozen=True)
class ListSettings(Settings):
    """Everything that decides a run's weights, besides the data."""

    nouns: tuple[str, ...] = CPU_NOUNS
    dim: int = 96
    layers: int = 3
    heads: int = 3
    hidden: int = 384
    vocab_size: int = 512
    picks: float = 0.4  # first share of the run, in which a sentence is about one of two objects
    steps: int = 700
    lr: float = 4e-3
    seed: int = 1


@dataclass(frozen=True)
class ListBatch(Batch):
    """B lists with their sentences."""

    ids: Tensor  # (B, L) [CLS], the facts, ":", the sentence, [SEP]
    text_mask: Tensor  # (B, L) bool
    labels: Tensor  # (B, L) the next id from the colon on, −100 elsewhere


class ListRecipe(Recipe):
    """A language model on lists."""

    Settings, Config, Model = ListSettings, LanguageConfig, LanguageModel
    presets = {"cpu": ListSettings()}
    terms = ("next",)

    def vocabulary(self) -> WordPiece:
        return list_tokenizer(self.nouns, self.settings.vocab_size)

    def new_model(self) -> LanguageModel:
        sizes = self.settings.shared_with(LanguageConfig) | {"vocab_size": len(self.tokenizer)}
        model = small_init(LanguageModel(LanguageConfig(**sizes)))
        numbers = self.tokenizer.encode(" ".join(map(str, range(BINS))))
        here, along = torch.randn(2, model.config.dim)
        steps = torch.linspace(-1.5, 1.5, BINS)[:, None]
        with torch.no_grad():  # numbers begin in a row; without an order they are compared much later
            model.word.weight[numbers] = here / 2 + steps * along
        return model

    def matrices(self, model: nn.Module) -> list[nn.Parameter]:
        blocks = [module for module in model.modules() if isinstance(module, DecoderBlock)]
        return [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]

    @cached_property
    def _layouts(self) -> dict[str, Layouts]:
        about = {"canvas": self.settings.canvas, "seed": self.settings.seed}
        return {
            kind: Layouts(self.emojivl, self.nouns, kinds={kind: 1}, **about) for kind in ("pick", "pair")
        }

    def batch(self, step: int) -> list[ListBatch]:
        s = self.settings
        layouts = self._layouts["pick" if step < s.picks * s.steps else "pair"]
        rng, scenes = Random(f"{s.seed}-{step}"), [layouts[step * s.batch + i] for i in range(s.batch)]
        texts = [f"{facts(scene, s.canvas, rng)} {COLON} {scene.caption}" for scene in scenes]
        ids, mask = fitting_rows(self.tokenizer, texts, s.max_text_len)
        colon = (ids == self.tokenizer.encode(COLON)[0]).argmax(1)  # (B,)
        labels = np.where(np.arange(ids.shape[1]) < colon[:, None], IGNORE, next_words(ids, mask))
        return [ListBatch(*map(torch.from_numpy, (ids, mask, labels)))]

    def loss(
        self, model: LanguageModel, batches: Sequence[ListBatch], workers: Workers = ONE_PROCESS
    ) -> Terms:
        (b,) = batches
        told = b.labels != IGNORE
        states = model.encode(b.ids, b.text_mask)[told]  # (tokens, D)
        table = model.head.weight
        return {"next": mlm_loss(states, table, table.new_zeros(len(table)), b.labels[told])}

    def writer(self, model: LanguageModel) -> PrefixWriter:
        """One who is told of scenes by lists."""
        return PrefixWriter(model, self.tokenizer, lambda scenes: self.told(model, scenes))

    def told(self, model: LanguageModel, scenes: Sequence[Scene]) -> Tensor:
        """The embedded lists of scenes, (n, FACTS, D)."""
        rng = Random(self.settings.seed)
        lists = [self.tokenizer.encode(facts(scene, self.settings.canvas, rng)) for scene in scenes]
        return model.word(torch.tensor(lists, device=model.word.weight.device))

    def check(self, model: LanguageModel) -> dict[str, float]:
        """The share of lists of held-out pairs that are said truly."""
        s = self.settings
        fresh = Layouts(self.emojivl, self.nouns, canvas=s.canvas, pairs="held_out", seed=s.seed + 1)
        scenes = [fresh[i] for i in range(self.checked)]
        written = zip(self.writer(model).write(scenes), scenes, strict=True)
        return {"true": float(np.mean([text in true_captions(scene) for text, scene in written]))}

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        what = (self.emojivl, self.nouns, trained.canvas, items, seed, progress)
        return evaluate_captions(self.writer(trained.model), *what)

    def report(self, results: Mapping[str, Any]) -> str:
        return "What is said here of a picture is said of the list of its facts.\n\n" + report_captions(
            results
        )

    def demo(self, trained: Trained, query: str, folder: Any, device: str, screen: Screen) -> None:
        """Say what a list such as "2 5 dog 4 0 guitar" says. Raises ValueError for a word that is in none."""
        ids = self.tokenizer.encode(query)
        if self.tokenizer.unk_id in ids or not ids or len(ids) + 12 > self.settings.max_text_len:
            fail("query", 'must be a list of facts, as in "2 5 dog 4 0 guitar"', repr(query))
        model = trained.model.to(device)
        told = model.word(torch.tensor([ids], device=device))
        (text, log_p), *_ = self.writer(model).sentences(told)
        screen.say(f"{text}   (log probability {log_p:.2f})")

    @staticmethod
    def to_published(model: nn.Module) -> dict[str, Tensor]:
        """In float16."""
        return {name: tensor.half() for name, tensor in model.state_dict().items()}
