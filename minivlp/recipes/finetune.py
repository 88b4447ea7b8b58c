"""Fine-tuning: a trained ViLT learns to answer questions (VQA) or to judge statements (NLVR2).

Everything is kept and a head on the pooled vector is new; NLVR2's second picture gets a modality vector of
its own, which starts as a copy of the first's. Beside the real model two blind ones are trained, in the same
number of steps from the same start: one sees mid-grey pictures, one reads empty texts. The test is fair when
both stay at what guessing gives.

Sources: Kim, Son and Kim 2021 (ViLT), section 4.3; Suhr et al. 2019 (NLVR2); Goyal et al. 2017 (VQA v2).
Left out: ViLT's ten times larger rate for the VQA head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from minivlp.core.require import fail
from minivlp.data import CPU_NOUNS, TRAINING_ARTISTS, Concept, EmojiVL, load_emojivl
from minivlp.models.vilt import Vilt
from minivlp.pictures.gallery import draw_curves
from minivlp.recipes import questions
from minivlp.recipes.train import TrainConfig, train_config
from minivlp.text import WordPiece
from minivlp.training.fit import fit
from minivlp.training.run import Run, existing, write_json
from minivlp.training.screen import Screen, progress_line
from minivlp.training.trained import load_trained, ship
from minivlp.training.workers import Workers

TASKS = ("vqa", "nlvr2")
BLIND = {"image_blind": "image", "text_blind": "text"}  # folder of a baseline → what it does not get
POOL = 8192  # items drawn at once, a multiple of 16
MOST_NOUNS = 64  # two statements must meet in their facts, so there cannot be hundreds of nouns
GLANCE = 256  # items asked about during training
# NLVR2's truth is the parity of three facts: is F in the first picture, in the second, and which ending has
# the statement? One fact alone, or two, tell nothing, so there is no first step to learn. Lessons (until this
# share of the run; places in a block of eight, see questions.py) make some: first F is in one of the two
# pictures, and the ending decides; then it is never in both with the first ending, never in none with the
# second, and the number of pictures with F decides, against a threshold that the ending sets; then all.
# Measured: without lessons and matching loss 0.50 after 800 steps, with both 0.80 after 600 (512 test items).
ALL = (0, 1, 2, 3, 4, 5, 6, 7)
LESSONS = {"vqa": ((1.0, ALL),), "nlvr2": ((0.15, (2, 3, 4, 5)), (0.4, (2, 4, 6, 6, 3, 5, 1, 1)), (1.0, ALL))}
TEST_SEED, GLANCE_SEED, FIRST_TRAINING_SEED = 1, 2, 10_000
CHANGES = {"batch": 64, "matrix_lr": 4e-3, "warmup": 50}  # of the start's settings
OF_TASK = {"vqa": {"steps": 1600, "lr": 5e-4}, "nlvr2": {"steps": 800, "lr": 2e-3}}


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, which questions.py moves to its device, and targets: (B, answers) or (B,).

    shown (2, B), for statements: 1 where the first, the second picture shows the fact.
    """

    inputs: Any
    targets: Tensor
    shown: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        shown = None if self.shown is None else self.shown.to(device)
        return replace(self, targets=self.targets.to(device), shown=shown)


class Task:
    """One of TASKS over some nouns: its items, batches, loss and accuracy."""

    def __init__(self, name: str, nouns: Sequence[Concept], tokenizer: WordPiece):
        if name not in TASKS:
            fail("--task", f"must be one of {', '.join(TASKS)}", repr(name))
        self.name, self.nouns, self.tokenizer = name, tuple(nouns), tokenizer
        self.answers = questions.answers(nouns)
        for text in questions.WORDS:
            if tokenizer.unk_id in tokenizer.encode(text):
                fail("--start", "must be a run whose vocabulary holds the words of the questions", repr(text))

    def heads(self) -> dict[str, Any]:
        """The fields of ViltConfig that the task needs."""
        return {"num_answers": len(self.answers)} if self.name == "vqa" else {"nlvr2": True, "image_types": 2}

    def draw(self, emojivl: EmojiVL, canvas: int, n: int, pairs: str, seed: int, artists=None) -> list:
        """n items (a multiple of 16), as `questions.questions` and `questions.statements`."""
        make = questions.questions if self.name == "vqa" else questions.statements
        return make(emojivl, self.nouns, canvas, n, artists, pairs, seed)

    def batch(self, items: Sequence, longest: int, blind: str | None = None) -> Batch:
        if self.name == "vqa":
            return Batch(*questions.vqa_batch(items, self.tokenizer, self.answers, blind, longest))
        shown = torch.tensor([item.shown for item in items]).T.long()  # (2, B)
        return Batch(*questions.nlvr2_batch(items, self.tokenizer, blind, longest), shown)

    def loss(self, model: Vilt, groups: Sequence[Batch]) -> dict[str, Tensor]:
        """VQA: the sum over answers of one binary cross-entropy each; NLVR2: cross-entropy, and matching.

        Matching asks of each picture whether it shows the fact, so that the pooled vectors go on telling it.
        """
        (batch,) = groups
        if self.name == "nlvr2":
            pooled = questions.nlvr2_pooled(model, batch.inputs)  # 2 × (B, D)
            matching = cross_entropy(model.itm_logits(torch.cat(pooled)), batch.shown.flatten())
            return {"nlvr2": cross_entropy(model.nlvr2_logits(*pooled), batch.targets), "itm": matching}
        logits = questions.vqa_logits(model, batch.inputs)  # (B, answers)
        return {"vqa": len(self.answers) * binary_cross_entropy_with_logits(logits, batch.targets)}

    def accuracy(self, model: Vilt, items: Sequence, blind: str | None = None) -> dict[str, dict]:
        """By kind of item, as `questions.vqa_accuracy` and `questions.nlvr2_accuracy`."""
        if self.name == "vqa":
            return questions.vqa_accuracy(model, self.tokenizer, items, self.answers, blind)
        return questions.nlvr2_accuracy(model, self.tokenizer, items, blind)


class Pools:
    """Training items, by training artists about training pairs: a batch depends on (seed, step) alone.

    They are drawn a pool at a time, and a batch takes from its pool what LESSONS allow at this step.
    """

    def __init__(self, task: Task, emojivl: EmojiVL, config: TrainConfig):
        self.task, self.emojivl, self.config = task, emojivl, config
        self.size = min(POOL, 16 * -(-config.steps * config.batch // 16))
        self._pool = lru_cache(maxsize=1)(self._draw)

    def batch(self, step: int) -> list:
        c = self.config
        pool = self._pool(step * c.batch // self.size)
        lesson = next(places for until, places in LESSONS[self.task.name] if step < until * c.steps)
        rng = np.random.default_rng((c.seed, step))
        blocks, places = rng.integers(self.size // 8, size=c.batch), rng.choice(lesson, c.batch)
        return [pool[8 * block + place] for block, place in zip(blocks, places, strict=True)]

    def _draw(self, k: int) -> list:
        seed = FIRST_TRAINING_SEED * (self.config.seed + 1) + k
        return self.task.draw(self.emojivl, self.config.canvas, self.size, "train", seed)


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


def task_settings(task: str, start: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a new fine-tuning run: its sizes are those of the run it starts from."""
    trained = load_trained(start)
    if trained.kind != "vilt":
        fail("--start", "must be a run of ViLT", trained.kind)
    config = train_config(trained.settings)
    names = config.nouns if config.nouns and len(config.nouns) <= MOST_NOUNS else CPU_NOUNS
    Task(task, load_emojivl().nouns(names), trained.tokenizer)  # can it ask about them?
    where = None if start is None else str(existing(start).absolute())
    changed = replace(config, nouns=tuple(names), **(OF_TASK[task] | CHANGES | given))
    return {"task": task, "start": where, "train": asdict(changed)}


def train_task(run: Run, device: str, items: int, screen: Screen, workers: Workers) -> None:
    """In one process: train the model and its two blind baselines, evaluate, and draw the curves."""
    copy = run.folder / "start.safetensors"  # so that the run can go on when the first one is gone
    if not copy.is_file():
        ship(load_trained(run.settings["start"]), copy, {})
    start, emojivl, config = load_trained(copy), load_emojivl(), train_config(run.settings)
    task = Task(run.settings["task"], emojivl.nouns(config.nouns), start.tokenizer)
    pools = Pools(task, emojivl, config)
    asked = task.draw(emojivl, config.canvas, GLANCE, "held_out", GLANCE_SEED)
    longest = start.model.config.max_text_len

    def rows(step: int, blind: str | None) -> list[Batch]:
        return [task.batch(pools.batch(step), longest, blind)]

    def check(model: Vilt, blind: str | None) -> dict[str, float]:
        return {"accuracy": task.accuracy(model, asked, blind)["all"]["value"]}

    for name, blind in {"accuracy": None, **BLIND}.items():
        one = run if blind is None else _baseline(run, name)
        model = with_head(start.model, task.heads(), config.seed)
        what = f"{task.name}, {blind}-blind" if blind else task.name
        screen.say(f"{what}: {config.steps} steps of {config.batch} items, in {one.folder}")
        job = (config, one, start.tokenizer, partial(check, blind=blind), device)
        with screen.bar(what) as tick:
            for record in fit(model, partial(rows, blind=blind), task.loss, *job, tick):
                screen.say(progress_line(record, config.steps))
    results = evaluate_task(run.folder, emojivl, items, TEST_SEED, device, screen)
    write_json(run.folder / "eval.json", results)
    (run.folder / "report.md").write_text(report_task(results), encoding="utf-8")
    screen.say(report_task(results))
    screen.say(f"wrote {draw_curves(run.folder, run.records(), ('vqa', 'nlvr2'))}")


def _baseline(run: Run, name: str) -> Run:
    folder = run.folder / name
    began = (folder / "config.json").is_file()
    return Run.resume(folder) if began else Run.begin(folder, run.settings | {"blind": BLIND[name]})


def evaluate_task(
    folder: Path, emojivl: EmojiVL, items: int, seed: int, device: str, screen: Screen
) -> dict[str, Any]:
    """The accuracy of a fine-tuned run, and of its baselines that are there, on held-out pairs.

    items, rounded up to a multiple of 16. Returns, ready for JSON, {"task", "seen": {"accuracy",
    "image_blind", "text_blind"}, "unseen": {…}, "details": {"seen": {"accuracy": {kind: {"value", "low",
    "high", "chance", "objects", …}}, …}, …}}. A split without artists in the data is {}.
    """
    trained = load_trained(folder)
    task = Task(trained.settings["task"], trained.nouns(emojivl), trained.tokenizer)
    models = {"accuracy": (trained.model, None)}
    for name, blind in BLIND.items():
        if (folder / name / "checkpoint.pt").is_file():
            models[name] = load_trained(folder / name).model, blind
    seen = [artist for artist in emojivl.sheets if artist in TRAINING_ARTISTS]
    artists = {"seen": seen, "unseen": list(emojivl.unseen_artists)}
    details = {"artists": artists, "canvas": trained.canvas, "seed": seed, "step": trained.step}
    n = 16 * -(-items // 16)
    with screen.bar("evaluating", lines=True) as tick:
        for i, split in enumerate(artists):
            details[split] = {}
            if not artists[split]:
                continue
            asked = task.draw(emojivl, trained.canvas, n, "held_out", seed, artists[split])
            for j, (name, (model, blind)) in enumerate(models.items(), start=1):
                details[split][name] = task.accuracy(model.to(device), asked, blind)
                tick(i * len(models) + j, len(artists) * len(models))
    values = {s: {name: m["all"]["value"] for name, m in details[s].items()} for s in artists}
    return {"task": task.name} | values | {"details": details}


def report_task(results: Mapping[str, Any]) -> str:
    """The results of `evaluate_task` as Markdown, one table a split."""
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
            cells = [kind, f"{m['value']:.3f}", f"{m['low']:.3f} to {m['high']:.3f}", f"{m['chance']:.3f}"]
            cells += [f"{m['objects']:.3f}", f"{m['items']}"]
            for name in blind:
                b = details[split][name][kind]
                cells.append(f"{b['value']:.3f} ({b['low']:.3f} to {b['high']:.3f})")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "Held-out pairs of objects; intervals are clustered by them. *Chance* is what half of the input",
        "can reach: of all items, the pictures alone; of one kind, the text alone. *Objects alone* is the",
        "ceiling for one who knows which objects a picture shows, and how many, but not where. The blind",
        "models were trained in as many steps, and tested, without the pictures, or without the texts.",
    ]
    return "\n".join([*lines, ""])
