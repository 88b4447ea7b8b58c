"""Train one model of an experiment, in a folder of its own that lasts until the experiment has its result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from minivlp.text import WordPiece
from minivlp.training.fit import Loss, Rates, fit
from minivlp.training.run import Run


def train(
    model: nn.Module,
    source: Callable[[int], Any],
    loss: Loss,
    config: Rates,
    tokenizer: WordPiece,
    folder: Path,
    about: dict[str, Any],
) -> nn.Module:
    """The model, trained and in eval mode; on from a checkpoint that was begun with the same `about`."""
    about = json.loads(json.dumps(about))  # as it is read back
    run = _begun(folder, about)
    for _ in fit(model, source, loss, config, run, tokenizer):
        pass
    return model.eval()


def _begun(folder: Path, about: dict[str, Any]) -> Run:
    if (folder / "config.json").is_file():
        run = Run.resume(folder)
        if run.settings == about:
            return run
        shutil.rmtree(folder)
    return Run.begin(folder, about)
