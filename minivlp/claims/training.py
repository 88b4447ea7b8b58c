"""Train one model of an experiment, in a folder of its own that lasts until the experiment has its result."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from minivlp.training.loop import Trainable, steps
from minivlp.training.run import Run


def train(recipe: Trainable, folder: Path, about: dict[str, Any]) -> nn.Module:
    """The recipe's model, trained and in eval mode.

    about: what decides the result; a training that was stopped goes on if it began with the same, and starts
    anew otherwise.
    """
    run = _begun(folder, json.loads(json.dumps(about)))  # as it is read back
    for _ in steps(recipe, run):
        pass
    return recipe.model.eval()


def _begun(folder: Path, about: dict[str, Any]) -> Run:
    if (folder / "config.json").is_file():
        run = Run.resume(folder)
        if run.settings == about:
            return run
        shutil.rmtree(folder)
    return Run.begin(folder, about)
