"""A trained model with what it needs to be used: its vocabulary, its nouns, its canvas, and how it was made."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minivlp.data import Concept, EmojiVL
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.models.vilt_weights import from_published, to_hugging_face
from minivlp.runs import default_folder, load_checkpoint
from minivlp.text import WordPiece
from minivlp.weights import read_safetensors, whole_file, write_safetensors

SHIPPED = Path(__file__).parent.parent / "chapters" / "weights" / "vilt_tiny.safetensors"


@dataclass(frozen=True)
class Trained:
    """model, in eval mode on CPU; tokenizer; settings, the run's config.json; step, how many were trained."""

    model: Vilt
    tokenizer: WordPiece
    settings: Mapping[str, Any]
    step: int

    @property
    def canvas(self) -> int:
        return self.settings["train"]["canvas"]

    def nouns(self, emojivl: EmojiVL) -> tuple[Concept, ...]:
        """The concepts it was trained on."""
        return emojivl.nouns(self.settings["train"]["nouns"])


def load_trained(source: str | Path | None = None) -> Trained:
    """Read a run folder, a checkpoint.pt or a shipped .safetensors with its .json beside it.

    None takes the run runs/vilt when there is one, else the shipped model. Raises FileNotFoundError or ValueError.
    """
    if source is None:
        own = default_folder("vilt")
        source = own if (own / "checkpoint.pt").is_file() else SHIPPED
    path = Path(source)
    if path.suffix != ".safetensors":
        state = load_checkpoint(path / "checkpoint.pt" if path.is_dir() or not path.suffix else path)
        tokens, settings, step = state["tokens"], state["settings"], state["step"]
        sizes, tensors = state["model_config"], state["model"]
    else:
        if not path.is_file():
            raise FileNotFoundError(f"weights {path} do not exist")
        beside = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tokens, settings, step, sizes = (beside[k] for k in ("tokens", "settings", "step", "model_config"))
        tensors = from_published(read_safetensors(path)).tensors
    model = Vilt(ViltConfig(**sizes)).eval()
    model.load_state_dict(tensors)
    return Trained(model, WordPiece(tokens), settings, step)


def ship(trained: Trained, path: str | Path, numbers: Mapping[str, Any]) -> None:
    """Write weights in Hugging Face's names, and beside them a .json: sizes, vocabulary, command, numbers reached."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, to_hugging_face(trained.model.state_dict()), {"format": "pt"})
    about = {
        "command": trained.settings["command"],
        "step": trained.step,
        "numbers": dict(numbers),
        "settings": trained.settings,
        "model_config": asdict(trained.model.config),
        "tokens": trained.tokenizer.tokens,
    }
    with whole_file(path.with_suffix(".json")) as file:
        file.write((json.dumps(about, ensure_ascii=False) + "\n").encode())
