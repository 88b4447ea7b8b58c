"""A trained model with what it needs to be used, and the two forms in which it lies on the disk.

A run folder holds it as checkpoint.pt; a shipped model is a .safetensors file with a .json beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minivlp.core.files import write_text
from minivlp.data import Concept, EmojiVL
from minivlp.models.published.safetensors import read_safetensors, write_safetensors
from minivlp.text import WordPiece
from minivlp.training.run import load_checkpoint, read_json


@dataclass(frozen=True)
class Trained:
    """A model in eval mode on the CPU, and how it was made."""

    model: nn.Module
    tokenizer: WordPiece
    settings: Mapping[str, Any]  # the run's config.json
    step: int  # how many were trained
    folder: Path  # where it was read from, or trained

    @property
    def kind(self) -> str:
        """What --model was."""
        return self.settings["model"]

    @property
    def canvas(self) -> int:
        """Pixels a side of the images that it was trained on."""
        return self.settings["train"]["canvas"]

    def nouns(self, emojivl: EmojiVL) -> tuple[Concept, ...]:
        """The concepts that it was trained on."""
        return emojivl.nouns(self.settings["train"]["nouns"])


def read_trained(path: Path) -> dict[str, Any]:
    """The parts of a trained model: "settings", "model_config", "tokens", "step" and "model", its tensors.

    path: a run folder, a checkpoint.pt, or a .safetensors file. Raises FileNotFoundError and ValueError.
    """
    if path.suffix == ".safetensors":
        return read_json(path.with_suffix(".json")) | {"model": read_safetensors(path)}
    return load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)


def write_trained(
    trained: Trained, path: Path, numbers: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write `tensors` and, beside them, a .json of sizes, vocabulary, settings and the `numbers` reached."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": trained.settings["command"],
        "step": trained.step,
        "numbers": dict(numbers),
        "settings": dict(trained.settings),
        "model_config": asdict(trained.model.config),
        "tokens": trained.tokenizer.tokens,
    }
    write_text(path.with_suffix(".json"), json.dumps(about, ensure_ascii=False) + "\n")
    write_safetensors(path, tensors, {"format": "pt"})
