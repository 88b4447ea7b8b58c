"""A trained model with what it needs to be used: vocabulary, nouns, canvas, and how it was made.

Of every kind (vilt, clip, siglip, vse, filip, xvlm) a run at runs/<kind> and a shipped model are looked for.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlp.core.files import whole_file
from minivlp.data import Concept, EmojiVL
from minivlp.models.dual import Dual, DualConfig
from minivlp.models.published import clip_siglip as dual_weights
from minivlp.models.published import vilt as vilt_weights
from minivlp.models.published.safetensors import read_safetensors, write_safetensors
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.models.xvlm import Xvlm, XvlmConfig
from minivlp.text import WordPiece
from minivlp.training.run import HOME, existing, load_checkpoint, read_json

WEIGHTS = HOME / "chapters" / "weights"


@dataclass(frozen=True)
class Trained:
    """model, in eval mode on CPU; tokenizer; settings, the run's config.json; step, how many were trained."""

    model: Vilt | Dual | Xvlm
    tokenizer: WordPiece
    settings: Mapping[str, Any]
    step: int

    @property
    def kind(self) -> str:
        """What --model was."""
        return self.settings["model"]

    @property
    def canvas(self) -> int:
        """Pixels."""
        return self.settings["train"]["canvas"]

    def nouns(self, emojivl: EmojiVL) -> tuple[Concept, ...]:
        """The concepts it was trained on."""
        return emojivl.nouns(self.settings["train"]["nouns"])


def load_trained(source: str | Path | None = None, kind: str = "vilt") -> Trained:
    """Read a run folder, a checkpoint.pt, or a shipped .safetensors with its .json beside it, of any kind.

    None takes runs/<kind> when it has a checkpoint, else the shipped model of that kind. Raises
    FileNotFoundError when there is none, and ValueError when it is not one of ours.
    """
    if source is None:
        own = HOME / "runs" / kind
        source = own if (own / "checkpoint.pt").is_file() else WEIGHTS / f"{kind}_tiny.safetensors"
    path = existing(source)
    if not path.exists():
        flags = "" if kind == "vilt" else f" --model {kind}"
        raise FileNotFoundError(
            f"there is no trained model {source}: make one by python -m minivlp train{flags}"
        )
    if path.suffix == ".safetensors":
        state = read_json(path.with_suffix(".json"))
    else:
        path = path / "checkpoint.pt" if path.is_dir() else path
        state = load_checkpoint(path)
    try:
        model = _empty(state["settings"]["model"], state["model_config"])
        if path.suffix == ".safetensors":
            state["model"] = _our_names(model, read_safetensors(path))
        model.load_state_dict(state["model"])
        return Trained(model.eval(), WordPiece(state["tokens"]), state["settings"], state["step"])
    except (KeyError, TypeError, RuntimeError) as error:  # a part is missing, or of another size
        raise ValueError(f"{path} does not hold a trained model of this version ({error})") from error


def _empty(kind: str, config: Mapping[str, Any]) -> Vilt | Dual | Xvlm:
    """A model of these sizes with values that are to be replaced."""
    if kind == "xvlm":
        return Xvlm(XvlmConfig(**config))
    return Vilt(ViltConfig(**config)) if kind == "vilt" else Dual(DualConfig(**config))


def _form(model: Dual) -> dual_weights.Form:
    return dual_weights.SIGLIP if model.config.text_pool == "last" else dual_weights.CLIP


def _our_names(model: Vilt | Dual | Xvlm, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model, Xvlm):
        return state
    if isinstance(model, Vilt):
        return vilt_weights.from_published(state).tensors
    return dual_weights.from_published(_form(model), state)[0]


def _hugging_face_names(model: Vilt | Dual | Xvlm) -> dict[str, Tensor]:
    if isinstance(model, Xvlm):  # there is none at Hugging Face: the names stay
        return model.state_dict()
    if isinstance(model, Vilt):
        return vilt_weights.to_hugging_face(model.state_dict())
    return dual_weights.to_hugging_face(_form(model), model.state_dict())


def ship(trained: Trained, path: str | Path, numbers: Mapping[str, Any]) -> None:
    """Write weights with Hugging Face's names, and beside them a .json that `load_trained` reads too.

    The .json holds sizes, vocabulary, settings with the command and the seed, and the `numbers` reached. A
    dual encoder, most of which is its vocabulary, is rounded to float16; its numbers are of before that.
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
    state = _hugging_face_names(trained.model)
    if isinstance(trained.model, Dual):
        state = {name: tensor.half() for name, tensor in state.items()}
    write_safetensors(path, state, {"format": "pt"})
