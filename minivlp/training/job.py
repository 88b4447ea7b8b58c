"""What every training job does once model, rows and loss stand: train, measure, write, draw.

Of several processes only process 0 goes on after training: the others have nothing to write.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minivlp.text import WordPiece
from minivlp.training.fit import Loss, Rates, fit
from minivlp.training.run import Run, write_json
from minivlp.training.screen import Screen, progress_line
from minivlp.training.trained import Trained, load_trained, ship
from minivlp.training.workers import Workers

Check = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """What `fit` needs of a job; `told` says in a few words what is trained on."""

    model: nn.Module
    source: Callable[[int], Sequence[Any]]
    loss: Loss
    config: Rates
    tokenizer: WordPiece
    check: Check
    told: str


def train_with(recipe: Recipe, run: Run, device: str, screen: Screen, workers: Workers) -> None:
    """Train to the end, on from the run's checkpoint, and tell of it."""
    r = recipe
    size = f"{sum(p.numel() for p in r.model.parameters()):,} parameters, {r.told}"
    screen.say(f"{size}, {r.config.steps} steps of {r.config.batch} rows, in {run.folder}")
    check = r.check if workers.rank == 0 else lambda model: {}
    with screen.bar("training") as tick:
        for record in fit(
            r.model, r.source, r.loss, r.config, run, r.tokenizer, check, device, tick, workers
        ):
            screen.say(progress_line(record, r.config.steps))


def measure_and_draw(
    run: Run,
    screen: Screen,
    measure: Callable[[Trained], Mapping],
    report: Callable[[Mapping], str],
    draw: Callable[[Path, Sequence[dict], Trained], Sequence[Path]],
) -> None:
    """Write eval.json, report.md, the model as one small file, and the pictures of a finished run."""
    trained = load_trained(run.folder)
    results = measure(trained)
    write_json(run.folder / "eval.json", results)
    (run.folder / "report.md").write_text(report(results), encoding="utf-8")
    ship(trained, run.folder / f"{trained.kind}_tiny.safetensors", results)
    for path in draw(run.folder, run.records(), trained):
        screen.say(f"wrote {path}")
