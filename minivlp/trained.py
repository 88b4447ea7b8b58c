"""A trained model with what it needs to be used: vocabulary, nouns, canvas, and how it was made."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minivlp.atomic import whole_file
from minivlp.data import Concept, EmojiVL
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.models.vilt_weights import from_published, to_hugging_face
from minivlp.runs import HOME, existing, load_checkpoint, read_json
from minivlp.text import WordPiece
from minivlp.weights import read_safetensors, write_safetensors

SHIPPED = HOME / "chapters" / "weights" / "vilt_tiny.safetensors"


@dataclass(frozen=True)
class Trained:
    """model, in eval mode on CPU; tokenizer; settings, the run's config.json; step, how many were trained."""

    model: Vilt
    tokenizer: WordPiece
    settings: Mapping[str, Any]
    step: int

    @property
    def canvas(self) -> int:
        """Pixels."""
        return self.settings["train"]["canvas"]

    def nouns(self, emojivl: EmojiVL) -> tuple[Concept, ...]:
        """The concepts it was trained on."""
        return emojivl.nouns(self.settings["train"]["nouns"])


def load_trained(source: str | Path | None = None) -> Trained:
    """Read a run folder, a checkpoint.pt, or a shipped .safetensors with its .json beside it.

    None takes runs/vilt when it has a checkpoint, else the shipped model. Raises FileNotFoundError when there
    is none, and ValueError when it is not one of ours.
    """
    if source is None:
        own = HOME / "runs" / "vilt"
        source = own if (own / "checkpoint.pt").is_file() else SHIPPED
    path = existing(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no trained model {source}: make one by python -m minivlp train")
    if path.suffix == ".safetensors":
        state = read_json(path.with_suffix(".json"))
    else:
        path = path / "checkpoint.pt" if path.is_dir() else path
        state = load_checkpoint(path)
    try:
        if path.suffix == ".safetensors":
            state["model"] = from_published(read_safetensors(path)).tensors
        model = Vilt(ViltConfig(**state["model_config"])).eval()
        model.load_state_dict(state["model"])
        return Trained(model, WordPiece(state["tokens"]), state["settings"], state["step"])
    except (KeyError, TypeError, RuntimeError) as error:  # a part is missing, or of another size
        raise ValueError(f"{path} does not hold a trained model of this version ({error})") from error


def ship(trained: Trained, path: str | Path, numbers: Mapping[str, Any]) -> None:
    """Write weights with Hugging Face's names, and beside them a .json that `load_trained` reads too.

    The .json holds sizes, vocabulary, settings with the command and the seed, and the `numbers` reached.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": trained.settings["command"],
        "step": trained.step,
        "numbers": dict(numbers),
        "settings": dict(trained.settings),
        "model_config": asdict(trained.model.config),
        "tokens": trained.tokenizer.tokens,
    }
    with whole_file(path.with_suffix(".json")) as file:
        file.write((json.dumps(about, ensure_ascii=False) + "\n").encode())
    write_safetensors(path, to_hugging_face(trained.model.state_dict()), {"format": "pt"})
