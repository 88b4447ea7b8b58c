"""The run folder: what a training run leaves behind, written so that it cannot be lost.

    config.json      the settings, as resolved      checkpoint.pt      weights, optimizers, step, vocabulary
    metrics.jsonl    one line a report              eval.json, report.md and pictures, at the end

A checkpoint is written beside its place, flushed to the disk and renamed, so at every moment the folder holds
a whole one. It holds tensors and plain values only and loads with `weights_only=True`.

Left out: a lock. Two runs that write to one folder at the same time spoil each other's metrics.
"""

import io
import json
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minivlp.core.files import whole_file, write_text
from minivlp.core.require import fail
from minivlp.training.workers import Workers

FORMAT = "minivlp-1"
WRITTEN = ("config.json", "metrics.jsonl", "eval.json", "report.md")


class Run:
    """A run folder; `settings` is what the run began with. Open one with `begin` or `resume`."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder, self.settings = Path(folder), dict(settings)

    @classmethod
    def begin(cls, folder: str | Path, settings: Mapping[str, Any]) -> "Run":
        """A new run. Raises FileExistsError rather than overwrite one, OSError for an unwritable folder."""
        run = cls(folder, settings)
        run.need_new()
        need_writable(run.folder / "config.json", make_folder=True)
        run._sweep()
        (run.folder / "metrics.jsonl").unlink(missing_ok=True)
        write_json(run.folder / "config.json", {"format": FORMAT} | run.settings)
        return run

    @classmethod
    def resume(cls, folder: str | Path) -> "Run":
        """The run in this folder, which may have been stopped before its first checkpoint.

        Raises FileNotFoundError when nothing began here, ValueError when it is no run of minivlp, and OSError
        for an unwritable folder.
        """
        run = cls(folder, {})
        config = run.folder / "config.json"
        if run.checkpoint.exists():
            run.settings = run.load()["settings"]
        elif config.is_file():
            if not _is_settings(config):
                fail(str(config), "must be the settings of a run of minivlp", "another file")
            run.settings = read_json(config)
            run.settings.pop("format", None)
        else:
            raise FileNotFoundError(
                f"nothing to resume: {run.folder} holds no run; begin one without --resume"
            )
        need_writable(config)
        run._sweep()
        return run

    def _sweep(self) -> None:
        """Remove what a kill in the middle of a write left beside the whole files."""
        for name in ("checkpoint.pt", "config.json", "metrics.jsonl", "eval.json"):
            for leftover in self.folder.glob(f".{name}.*"):
                leftover.unlink()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def need_new(self) -> None:
        """Raise FileExistsError when the folder holds a run, or others' files that a run would replace."""
        if self.checkpoint.exists():
            hint = "go on with it by --resume, choose another --name, or delete the folder"
            raise FileExistsError(f"{self.folder} already holds a run: {hint}")
        theirs = [name for name in WRITTEN if (self.folder / name).exists()]
        if theirs and not _is_settings(self.folder / "config.json"):
            raise FileExistsError(f"{self.folder} holds {theirs[0]} of something else: choose another --name")

    def need_space(self, checkpoint_bytes: int) -> None:
        """Raise OSError unless the disk has room for two checkpoints of this size."""
        free = shutil.disk_usage(self.folder).free
        if free < 2 * checkpoint_bytes:
            raise OSError(
                f"run folder {self.folder} has {free / 1e6:.1f} MB free, and two checkpoints need "
                f"{2 * checkpoint_bytes / 1e6:.1f} MB"
            )

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint whole, or leave the last one as it was and raise OSError."""
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "settings": self.settings} | state, buffer)
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
        """Append one line to metrics.jsonl. Raises OSError, naming the file, when it cannot be written."""
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a line that is none, as a kill may cut it short, is left out."""
        path, records = self.folder / "metrics.jsonl", []
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            with suppress(ValueError):
                record = json.loads(line)
                records += [record] if isinstance(record, dict) and "step" in record else []
        return records

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will do again."""
        kept = [json.dumps(r) + "\n" for r in self.records() if r["step"] <= step]
        write_text(self.folder / "metrics.jsonl", "".join(kept))


class ReadOnlyRun(Run):
    """The run as a process sees it that must not write: another writes for it."""

    need_space = save = log = forget_after = lambda self, *_: None


def open_run(folder: Path, settings: Mapping[str, Any] | None, workers: Workers, resume: bool = False) -> Run:
    """A new run with these settings; the one that is there, for None or where it is to be resumed.

    Of several processes the first opens the run, and the others see it without writing.
    """
    if workers.rank:
        run = ReadOnlyRun(folder, {})
    elif settings is None or resume:
        run = Run.resume(folder)
    else:
        run = Run.begin(folder, settings)
    run.settings = workers.broadcast(run.settings)
    return run


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint. Raises FileNotFoundError when absent, ValueError when it is not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with warnings.catch_warnings(action="ignore"):  # what it may warn of is an error here
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds; each means: not a checkpoint
        raise ValueError(
            f"{path} is not a checkpoint of minivlp, or is damaged ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of minivlp (it lacks the mark {FORMAT!r})")
    return state


def run_folder(name: str) -> Path:
    """runs/<name> in the current folder, or an absolute path as it is. Raises ValueError for no name."""
    if not name.strip() or ".." in Path(name).parts:
        fail("--name", "must be a name or an absolute path", repr(name))
    return Path("runs") / name


def need_writable(path: Path, make_folder: bool = False) -> None:
    """Raise OSError, in one sentence, unless a file can be written here. Nothing is left behind."""
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe = path.with_name(f"{path.name}.probe")
        with whole_file(probe) as file:
            file.write(b"{}")
        probe.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError, naming the file, when it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        fail(str(path), "must hold a JSON object", type(content).__name__)
    return content


def _is_settings(path: Path) -> bool:
    """Is this the config.json of a run?"""
    try:
        settings = read_json(path)
        return settings.get("format") == FORMAT or {"command", "train"} <= settings.keys()
    except (OSError, ValueError):
        return False


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0
