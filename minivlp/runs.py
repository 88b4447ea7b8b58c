"""The run folder: what a training run leaves behind, written so that it cannot be lost.

    config.json      the settings, as resolved             checkpoint.pt  model, optimizers, step, vocabulary
    metrics.jsonl    one line a report                      eval.json, report.md and pictures, at the end

A checkpoint is written beside its place, flushed to the disk and renamed, so at every moment the folder holds a
whole one. It holds tensors and plain values only and loads with `weights_only=True`.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from minivlp.weights import whole_file


class Run:
    """A run folder, opened for training.

    Raises FileExistsError when a new run would overwrite another, FileNotFoundError when there is nothing to
    resume, and OSError when the folder cannot be written; nothing is changed in these cases.
    """

    def __init__(self, folder: str | Path, resume: bool = False):
        self.folder = Path(folder)
        if resume and not self.checkpoint.is_file():
            raise FileNotFoundError(f"nothing to resume: {self.checkpoint} does not exist")
        if not resume and self.checkpoint.is_file():
            raise FileExistsError(
                f"{self.folder} already holds a run: go on with it by --resume, or choose another --name"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self.folder / "config.json.probe") as file:
                file.write(b"{}")
            (self.folder / "config.json.probe").unlink()
        except OSError as error:
            raise OSError(f"run folder {self.folder} cannot be written: {error.strerror}") from error

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def need_space(self, bytes_needed: int) -> None:
        """Raise OSError unless the disk has room for two checkpoints of this size."""
        free = shutil.disk_usage(self.folder).free
        if free < 2 * bytes_needed:
            raise OSError(
                f"run folder {self.folder} has {free / 1e6:.1f} MB free, and two checkpoints need "
                f"{2 * bytes_needed / 1e6:.1f} MB"
            )

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint whole, or leave the last one as it was and raise OSError."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        try:
            with whole_file(self.checkpoint) as file:
                file.write(buffer.getbuffer())
        except OSError as error:
            kept = "the one before it is kept" if self.checkpoint.exists() else "there was none before it"
            reason = error.strerror or error
            raise OSError(f"checkpoint {self.checkpoint} could not be written ({reason}); {kept}") from error

    def load(self) -> dict[str, Any]:
        return load_checkpoint(self.checkpoint)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a line that a kill cut short is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will do again."""
        kept = [json.dumps(r) + "\n" for r in self.records() if r["step"] <= step]
        with whole_file(self.folder / "metrics.jsonl") as file:
            file.write("".join(kept).encode())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint. Raises FileNotFoundError when absent, ValueError when it is not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means: not a checkpoint
        raise ValueError(f"{path} is not a checkpoint of minivlp ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != "minivlp-1":
        raise ValueError(f"{path} is not a checkpoint of minivlp (it lacks the format mark)")
    return state


def default_folder(name: str) -> Path:
    """runs/<name> beside the package, whatever folder the command is called from."""
    return Path(__file__).parent.parent / "runs" / name


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0
