"""Fine-tuning: a trained ViLT learns a task on questions whose answers are known.

    vqa      a question about one picture, answered by one of the words that are answers
    nlvr2    a statement about two pictures, judged true or false

Everything is kept and a head on the pooled vector is new; a second picture gets a modality vector of its own,
which starts as a copy of the first's. Beside the real model two blind ones are trained, in the same number of
steps from the same start: one sees mid-grey pictures, one reads empty texts. The test is fair when both stay
at what guessing gives.

Sources: Kim, Son and Kim 2021 (ViLT), section 4.3; Goyal et al. 2017 (VQA v2); Suhr et al. 2019 (NLVR2).
Left out: ViLT's ten times larger rate for the VQA head.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from minivlp.core.require import fail
from minivlp.data import CPU_NOUNS, load_emojivl, scene_pixels
from minivlp.data.questions import WORDS, Question, Statement, answers, questions, statements
from minivlp.evaluation.interval import measured
from minivlp.evaluation.reading import equal_lengths, fitting_rows
from minivlp.evaluation.splits import Progress, Tick, artists_by_split, evaluate_splits
from minivlp.evaluation.tables import CELL, INTERVAL, OBJECTS, tables
from minivlp.models.vilt import Vilt
from minivlp.recipes import NUMBERS
from minivlp.recipes.base import Batch, Recipe, Terms, load_trained, ship
from minivlp.recipes.vilt import ViltRecipe, ViltSettings
from minivlp.text import WordPiece
from minivlp.training.trained import Trained
from minivlp.training.workers import ONE_PROCESS, Workers

BLIND = {"image_blind": "image", "text_blind": "text"}  # folder of a control → what it does not get
POOL = 8192  # items drawn at once, a multiple of 16
MOST_NOUNS = 64  # two statements must meet in their facts, so there cannot be hundreds of nouns
CHECKED = 256  # items asked about during training
CHECK_SEED, FIRST_TRAINING_SEED = 2, 10_000
NOTE = """\
Held-out pairs of objects; intervals are clustered by them. *Chance* is what half of the input can
reach: of all items, the pictures alone; of one kind, the text alone. *Objects alone* is the ceiling
for one who knows which objects a picture shows, and how many, but not where. The blind models were
trained in as many steps, and tested, without the pictures, or without the texts.
"""
OVERRIDES = {"batch": 64, "matrix_lr": 4e-3, "warmup": 50}  # of the start's settings
# Places in a block of eight statements (data/questions.py): both pictures in four ways, each with both
# endings.
ONE_SHOWS_IT = (2, 3, 4, 5)
BY_THRESHOLD = (2, 4, 6, 6, 3, 5, 1, 1)  # a place twice is drawn twice as often
ALL = (0, 1, 2, 3, 4, 5, 6, 7)


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

    ask                             what makes its items, of data/questions.py
    heads()                         the fields of ViltConfig that it needs
    collate(items)                  a TaskBatch, without what the model is blind to
    loss(model, batches, workers)   as of any recipe
    right(model, batch)             which answers are right, (B,) bool
    kinds(items)                    the kind and the cluster of each item; by kind what half of the input can
                                    reach, and what one can who knows the objects but not where they are
    """

    ask: Callable[..., list]
    overrides: Mapping[str, float] = {}  # of the start's settings, for this task
    # Until this share of the run, the places in a block of eight items from which a batch is drawn.
    lessons: tuple[tuple[float, tuple[int, ...]], ...] = ((1.0, ALL),)
    chance = {"accuracy": 1 / 2}
    several_processes = False
    draw = Recipe.draw

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

    def items(self, n: int, pairs: str, seed: int, artists: Sequence[str] | None = None) -> list:
        """n items, a multiple of 16; pairs, seed and artists as in `Scenes`."""
        scenes = {"artists": artists, "pairs": pairs, "seed": seed}
        return self.ask(self.emojivl, self.nouns, self.settings.canvas, n, **scenes)

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
        texts = [item.text for item in items]
        for rows, _ in equal_lengths(self.tokenizer, texts, self.settings.max_text_len):
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

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
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

        def measure(split: str, tick: Tick) -> dict[str, dict]:
            asked, measures = self.items(16 * -(-items // 16), "held_out", seed, artists[split]), {}
            for name, (recipe, model) in asked_by.items():
                measures[name] = recipe.accuracy(model, asked)
                tick(1)
            return measures

        about = {"canvas": trained.canvas, "seed": seed, "step": trained.step}
        results = evaluate_splits(
            artists, measure, len(asked_by), progress, lambda kinds: kinds["all"]["value"], **about
        )
        return {"task": self.about["task"]} | results

    def report(self, results: Mapping[str, Any]) -> str:
        """One table a split, with the controls beside."""
        details, rows = results["details"], {}
        blind = [name for name in BLIND if any(name in details[split] for split in details["artists"])]
        for split in details["artists"]:
            rows[split] = {
                kind: numbers | {name: CELL.format(**details[split][name][kind]) for name in blind}
                for kind, numbers in details[split].get("accuracy", {}).items()
            }
        columns = INTERVAL | OBJECTS | {name.replace("_", "-"): f"{{{name}}}" for name in blind}
        about = f"{details['canvas']} pixels square."
        return f"# {results['task']}\n\n" + tables(details | rows, lambda split: about, str, columns, NOTE)


class VqaRecipe(TaskRecipe):
    """ViLT learns to answer questions."""

    ask = staticmethod(questions)
    terms = ("vqa",)
    overrides = {"steps": 1600, "lr": 5e-4}

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """All answers, in the order of the logits."""
        return answers(self.nouns)

    def heads(self) -> dict[str, Any]:
        return {"num_answers": len(self.answers)}

    def collate(self, items: Sequence[Question]) -> TaskBatch:
        """Targets (B, answers) of 0 and 1. Raises ValueError for an answer that is not among the answers."""
        number = {answer: k for k, answer in enumerate(self.answers)}
        targets = torch.zeros(len(items), len(self.answers))
        for row, item in zip(targets, items, strict=True):
            if item.answer not in number:
                fail("answers", "must hold the answer of every question", repr(item.answer))
            row[number[item.answer]] = 1
        ids, mask, pixels = self.inputs([q.text for q in items], [[q.scene for q in items]])
        return TaskBatch(ids, mask, pixels[:, 0], targets)

    def logits(self, model: Vilt, batch: TaskBatch) -> Tensor:
        """(B, answers)."""
        return model.vqa_logits(model.encode(batch.ids, batch.text_mask, batch.pixels)["pooled"])

    def loss(self, model: Vilt, batches: Sequence[TaskBatch], workers: Workers = ONE_PROCESS) -> Terms:
        """The sum over answers of one binary cross-entropy each, a mean over questions."""
        (batch,) = batches
        loss = binary_cross_entropy_with_logits(self.logits(model, batch), batch.targets)
        return {"vqa": len(self.answers) * loss}

    def right(self, model: Vilt, batch: TaskBatch) -> Tensor:
        return self.logits(model, batch).argmax(-1) == batch.targets.argmax(-1)

    def kinds(self, items: Sequence[Question]) -> tuple[list[str], list[Hashable], dict, dict]:
        chances = {"all": 1 / 2, "how many": 1 / 4, "what is shown": 1 / len(self.nouns), "where": 1 / 2}
        ceilings = {"all": 3 / 4, "how many": 1, "what is shown": 1, "where": 1 / 2}
        clusters = [tuple(sorted(set(item.scene.objects))) for item in items]
        return [item.kind for item in items], clusters, chances, ceilings


class Nlvr2Recipe(TaskRecipe):
    """ViLT learns to judge statements.

    The truth is the parity of three facts: is F in the first picture, in the second, and which ending has the
    statement? One fact alone, or two, tell nothing, so there is no first step to learn. The lessons make
    some. First F is in one of the two pictures, and the ending decides. Then it is never in both with the
    first ending and never in none with the second, and the number of pictures with F decides, against a
    threshold that the ending sets. Then all. Matching asks of each picture whether it shows the fact, so that
    the pooled vectors go on telling it. Measured: without lessons and matching 0.50 after 800 steps, with
    both 0.80 after 600 (512 test items).
    """

    ask = staticmethod(statements)
    terms = ("nlvr2", "itm")
    overrides = {"steps": 800, "lr": 2e-3}
    lessons = ((0.15, ONE_SHOWS_IT), (0.4, BY_THRESHOLD), (1.0, ALL))

    def heads(self) -> dict[str, Any]:
        return {"nlvr2": True, "image_types": 2}

    def collate(self, items: Sequence[Statement]) -> TaskBatch:
        """Targets (B,) int64, 1 = true."""
        scenes = [[s.scenes[k] for s in items] for k in (0, 1)]
        ids, mask, pixels = self.inputs([s.text for s in items], scenes)
        truth, shown = (torch.tensor([getattr(s, name) for s in items]).long() for name in ("truth", "shown"))
        return TaskBatch(ids, mask, pixels, truth, shown)

    def pooled(self, model: Vilt, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The statement read with the first and with the second picture, (B, D) each."""
        read = partial(model.encode, batch.ids, batch.text_mask)
        return tuple(read(batch.pixels[:, k], image_type=k + 1)["pooled"] for k in (0, 1))

    def logits(self, model: Vilt, batch: TaskBatch) -> Tensor:
        """(B, 2), column 1 = true."""
        return model.nlvr2_logits(*self.pooled(model, batch))

    def loss(self, model: Vilt, batches: Sequence[TaskBatch], workers: Workers = ONE_PROCESS) -> Terms:
        (batch,) = batches
        pooled = self.pooled(model, batch)  # 2 × (B, D)
        matching = cross_entropy(model.itm_logits(torch.cat(pooled)), batch.shown.T.flatten())
        return {"nlvr2": cross_entropy(model.nlvr2_logits(*pooled), batch.targets), "itm": matching}

    def right(self, model: Vilt, batch: TaskBatch) -> Tensor:
        return self.logits(model, batch).argmax(-1) == batch.targets

    def kinds(self, items: Sequence[Statement]) -> tuple[list[str], list[Hashable], dict, dict]:
        chances = dict.fromkeys(("all", "other objects", "same objects"), 1 / 2)
        ceilings = {"all": 3 / 4, "other objects": 1, "same objects": 1 / 2}
        return [item.kind for item in items], [item.pair for item in items], chances, ceilings


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
