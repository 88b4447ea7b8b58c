"""Fine-tuning: a trained ViLT learns a task on questions whose answers are known (vqa.py, nlvr2.py).

Everything is kept and a head on the pooled vector is new; a second picture gets a modality vector of its own,
which starts as a copy of the first's. Beside the real model two blind ones are trained, in the same number of
steps from the same start: one sees mid-grey pictures, one reads empty texts. The test is fair when both stay
at what guessing gives.

Sources: Kim, Son and Kim 2021 (ViLT), section 4.3.
Left out: ViLT's ten times larger rate for the VQA head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import CPU_NOUNS, load_emojivl, scene_pixels
from minivlp.data.questions import WORDS
from minivlp.evaluation.interval import measured
from minivlp.evaluation.reading import equal_lengths, fitting_rows
from minivlp.evaluation.splits import artists_by_split
from minivlp.models.vilt import Vilt
from minivlp.recipes.base import NUMBERS, Batch, Recipe, load_trained, ship
from minivlp.recipes.vilt import ViltRecipe, ViltSettings
from minivlp.text import WordPiece
from minivlp.training.trained import Trained

BLIND = {"image_blind": "image", "text_blind": "text"}  # folder of a control → what it does not get
POOL = 8192  # items drawn at once, a multiple of 16
MOST_NOUNS = 64  # two statements must meet in their facts, so there cannot be hundreds of nouns
CHECKED = 256  # items asked about during training
CHECK_SEED, FIRST_TRAINING_SEED = 2, 10_000
NOTE = (
    "Held-out pairs of objects; intervals are clustered by them. *Chance* is what half of the input can",
    "reach: of all items, the pictures alone; of one kind, the text alone. *Objects alone* is the ceiling",
    "for one who knows which objects a picture shows, and how many, but not where. The blind models were",
    "trained in as many steps, and tested, without the pictures, or without the texts.",
)
OVERRIDES = {"batch": 64, "matrix_lr": 4e-3, "warmup": 50}  # of the start's settings


@dataclass(frozen=True)
class TaskBatch(Batch):
    """Texts with their pictures, and what is to be said of them."""

    ids: Tensor  # (B, L)
    text_mask: Tensor  # (B, L) bool
    pixels: Tensor  # (B, 3, H, W); for two pictures (B, 2, 3, H, W)
    targets: Tensor  # (B, answers) or (B,)
    shown: Tensor | None = None  # (B, 2), for statements: 1 where a picture shows the fact


class TaskRecipe(ViltRecipe):
    """A task on pictures. Each task adds

    heads()                         the fields of ViltConfig that it needs
    items(n, pairs, seed, artists)  n items (a multiple of 16); pairs, seed and artists as in `Scenes`
    collate(items)                  a TaskBatch, without what the model is blind to
    loss(model, batches, workers)   as of any recipe
    right(model, batch)             which answers are right, (B,) bool
    kinds(items)                    the kind and the cluster of each item; by kind what half of the input can
                                    reach, and what one can who knows the objects but not where they are
    """

    overrides: Mapping[str, float] = {}  # of the start's settings, for this task
    # Until this share of the run, the places in a block of eight items from which a batch is drawn.
    lessons: tuple[tuple[float, tuple[int, ...]], ...] = ((1.0, tuple(range(8))),)
    chance = {"accuracy": 1 / 2}
    several_processes = False

    @classmethod
    def begin(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of a fine-tuning run are those of the run it starts from."""
        start = load_trained(flags.get("start"))
        if start.kind != "vilt":
            fail("--start", "must be a run of ViLT", start.kind)
        settings = ViltSettings.read(start.settings)
        nouns = settings.nouns if settings.nouns and len(settings.nouns) <= MOST_NOUNS else CPU_NOUNS
        check_words(start.tokenizer)
        load_emojivl().nouns(nouns)
        changes = {**OVERRIDES, **cls.overrides} | {name: flags[name] for name in NUMBERS if name in flags}
        settings = replace(settings, nouns=tuple(nouns), **changes)
        return {"start": flags.get("start"), "train": asdict(settings)}

    @cached_property
    def blind(self) -> str | None:
        """What this control does not get, "image" or "text"; None for the real model."""
        return self.about.get("blind")

    @cached_property
    def start(self) -> Trained:
        """The model to begin with. The run keeps a copy, so that it can go on when the first one is gone."""
        if self.folder is None or self.blind:
            return load_trained(self.about["start"])
        copy = self.folder / "start.safetensors"
        if not copy.is_file():
            ship(load_trained(self.about["start"]), copy, {})
        return load_trained(copy)

    def vocabulary(self) -> WordPiece:
        return self.start.tokenizer

    def new_model(self) -> Vilt:
        return with_head(self.start.model, self.heads(), self.settings.seed)

    def controls(self) -> dict[str, dict[str, Any]]:
        if self.blind:
            return {}
        start = str(self.folder / "start.safetensors")
        return {name: self.about | {"blind": blind, "start": start} for name, blind in BLIND.items()}

    def inputs(self, texts: Sequence[str], pictures: Sequence[Sequence]) -> tuple[Tensor, Tensor, Tensor]:
        """ids, text_mask, pixels (B, k, 3, H, W) of texts with k scenes each: `pictures` are k lists of B."""
        if self.blind not in (None, "image", "text"):
            fail("blind", 'must be None, "image" or "text"', repr(self.blind))
        texts = [""] * len(texts) if self.blind == "text" else texts
        ids, mask = fitting_rows(self.tokenizer, texts, self.settings.max_text_len)
        pixels = torch.stack([scene_pixels(scenes) for scenes in pictures], 1)
        if self.blind == "image":
            pixels = torch.zeros_like(pixels)
        return torch.from_numpy(ids), torch.from_numpy(mask), pixels

    @property
    def pool_size(self) -> int:
        return min(POOL, 16 * -(-self.settings.steps * self.settings.batch // 16))

    @cached_property
    def _pool(self) -> Callable[[int], list]:
        """Pool k of training items, by training artists about training pairs; the last one is kept."""
        first = FIRST_TRAINING_SEED * (self.settings.seed + 1)
        return lru_cache(maxsize=1)(lambda k: self.items(self.pool_size, "train", first + k))

    def drawn(self, step: int) -> list:
        """The items of a step: places of blocks of its pool, as the lessons allow."""
        s = self.settings
        pool = self._pool(step * s.batch // self.pool_size)
        lesson = next(places for until, places in self.lessons if step < until * s.steps)
        rng = np.random.default_rng((s.seed, step))
        blocks, places = rng.integers(self.pool_size // 8, size=s.batch), rng.choice(lesson, s.batch)
        return [pool[8 * block + place] for block, place in zip(blocks, places, strict=True)]

    def batch(self, step: int) -> list[TaskBatch]:
        return [self.collate(self.drawn(step))]

    @torch.inference_mode()
    def accuracy(self, model: Vilt, items: Sequence) -> dict[str, dict]:
        """By kind of item, and for "all": {"value", "low", "high", "chance", "objects", …}.

        chance: for "all", 1/2, what the pictures alone can reach by construction (the text alone reaches no
        more); for one kind, what the text alone can reach. objects: the ceiling for one who knows which
        objects a picture shows and how many, but not where.
        """
        hits, device = np.zeros(len(items)), next(model.parameters()).device
        for rows, _ in equal_lengths(
            self.tokenizer, [item.text for item in items], self.settings.max_text_len
        ):
            hits[rows] = self.right(model, self.collate([items[i] for i in rows]).to(device)).cpu().numpy()
        kinds, clusters, chances, ceilings = self.kinds(items)
        by_kind = {}
        for kind in chances:
            which = [i for i, one in enumerate(kinds) if kind in ("all", one)]
            own = [clusters[i] for i in which]
            by_kind[kind] = measured(hits[which], own, chance=chances[kind], objects=ceilings[kind])
        return by_kind

    @cached_property
    def _asked(self) -> list:
        return self.items(CHECKED, "held_out", CHECK_SEED)

    def check(self, model: Vilt) -> dict[str, float]:
        return {"accuracy": self.accuracy(model, self._asked)["all"]["value"]}

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Callable) -> dict[str, Any]:
        """The accuracy of a fine-tuned run, and of its controls that are there, on held-out pairs.

        items, rounded up to a multiple of 16. Returns, ready for JSON, {"task", "seen": {"accuracy",
        "image_blind", "text_blind"}, "unseen": {…}, "details": {"seen": {"accuracy": {kind: {"value", "low",
        "high", "chance", "objects", …}}, …}, …}}. A split without artists in the data is {}.
        """
        asked_by = {"accuracy": (self, trained.model)}
        device = next(trained.model.parameters()).device
        for name, blind in BLIND.items():
            if (trained.folder / name / "checkpoint.pt").is_file():
                control = type(self)(self.settings, {"blind": blind}, self.tokenizer.tokens, self.data)
                asked_by[name] = control, load_trained(trained.folder / name).model.to(device)
        artists = artists_by_split(self.emojivl)
        details = {"artists": artists, "canvas": trained.canvas, "seed": seed, "step": trained.step}
        splits = [split for split in artists if artists[split]]
        done, total = 0, len(splits) * len(asked_by)
        for split in artists:
            details[split] = {}
            if split not in splits:
                continue
            asked = self.items(16 * -(-items // 16), "held_out", seed, artists[split])
            for name, (recipe, model) in asked_by.items():
                details[split][name] = recipe.accuracy(model, asked)
                progress(done := done + 1, total)
        values = {s: {name: m["all"]["value"] for name, m in details[s].items()} for s in artists}
        return {"task": self.about["task"]} | values | {"details": details}

    def report(self, results: Mapping[str, Any]) -> str:
        """One table a split."""
        details, lines = results["details"], [f"# {results['task']}", ""]
        for split, artists in details["artists"].items():
            lines += [f"## {split.capitalize()} artists: {', '.join(artists) or 'none in the data'}", ""]
            if not details[split]:
                continue
            blind = [name for name in BLIND if name in details[split]]
            heads = ["items", "value", "95 % interval", "chance", "objects alone", "number"]
            heads += [name.replace("_", "-") for name in blind]
            lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            for kind, m in details[split]["accuracy"].items():
                row = (
                    "| {} | {value:.3f} | {low:.3f} to {high:.3f} | {chance:.3f} | {objects:.3f} | {items} |"
                )
                controls = (details[split][name][kind] for name in blind)
                beside = " {value:.3f} ({low:.3f} to {high:.3f}) |"
                lines.append(row.format(kind, **m) + "".join(beside.format(**b) for b in controls))
            lines.append("")
        return "\n".join([*lines, *NOTE, ""])

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        return Recipe.draw(self, trained, folder, records)


def check_words(tokenizer: WordPiece) -> None:
    """Raise ValueError for a vocabulary that cannot read the questions."""
    for text in WORDS:
        if tokenizer.unk_id in tokenizer.encode(text):
            fail("--start", "must be a run whose vocabulary holds the words of the questions", repr(text))


def with_head(start: Vilt, heads: Mapping[str, Any], seed: int) -> Vilt:
    """A copy of `start` with other fields of its ViltConfig; what is new is drawn from the seed.

    A modality vector of a second picture starts as that of the first.
    """
    torch.manual_seed(seed)
    model = Vilt(replace(start.config, **heads))
    state = model.state_dict() | start.state_dict()
    types = state["modality.weight"]
    more = 1 + model.config.image_types - len(types)
    state["modality.weight"] = torch.cat([types, types[1:2].expand(more, -1)])
    model.load_state_dict(state)
    return model
