"""The run folder: written whole or not at all, refused in one sentence, and never overwritten."""

import errno
import json
import os
import pickle
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from minivlp.core import files as core_files
from minivlp.core.files import packaged
from minivlp.recipes.base import load_trained
from minivlp.training import run as runs
from minivlp.training.run import Run, load_checkpoint, need_writable, read_json, run_folder, tensor_bytes

SETTINGS = {"command": "python -m minivlp train", "train": {"steps": 3, "nouns": ("dog", "key")}}
STATE = {"step": 3, "tokens": ["[PAD]", "dog"], "model": {"weight": torch.arange(6.0)}}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.begin(tmp_path / "new" / "vilt", SETTINGS)


def files(run: Run) -> set[str]:
    return {path.name for path in run.folder.iterdir()}


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_checkpoint_comes_back_as_it_was(run):
    run.save(STATE)
    found = run.load()
    assert torch.equal(found.pop("model")["weight"], STATE["model"]["weight"])
    assert found == {"format": runs.FORMAT, "settings": SETTINGS, "step": 3, "tokens": STATE["tokens"]}
    assert files(run) == {"config.json", "checkpoint.pt"}


def test_a_checkpoint_needs_no_code_to_load(run):
    run.save(STATE)
    assert torch.load(run.checkpoint, weights_only=True)["step"] == 3


def test_a_run_is_not_overwritten(run):
    run.save(STATE)
    before = run.checkpoint.read_bytes()
    with pytest.raises(
        FileExistsError, match="already holds a run: go on with it by --resume, choose another"
    ):
        Run.begin(run.folder, {})
    assert run.checkpoint.read_bytes() == before and read_json(run.folder / "config.json") != {}


@pytest.mark.parametrize("name", runs.WRITTEN)
def test_files_of_something_else_are_not_overwritten(name, tmp_path):
    theirs = tmp_path / name
    theirs.write_text('{"model_type": "vilt"}')
    with pytest.raises(FileExistsError, match=f"holds {name} of something else: choose another --name"):
        Run.begin(tmp_path, SETTINGS)
    with pytest.raises((ValueError, FileNotFoundError)):
        Run.resume(tmp_path)
    assert theirs.read_text() == '{"model_type": "vilt"}' and files(Run(tmp_path, {})) == {name}


def test_a_run_that_stopped_before_its_first_checkpoint_can_begin_again_or_go_on(run):
    run.log({"step": 1})
    assert Run.resume(run.folder).settings["command"] == SETTINGS["command"]
    assert Run.begin(run.folder, SETTINGS).records() == []


def test_resume_takes_the_settings_of_the_checkpoint(run):
    run.save(STATE)
    (run.folder / "config.json").write_text('{"command": "changed by hand"}')
    assert Run.resume(run.folder).settings == SETTINGS


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: .*vilt holds no run"):
        Run.resume(tmp_path / "vilt")
    assert list(tmp_path.iterdir()) == []


def test_drafts_left_by_a_kill_are_swept(run):
    run.save(STATE)
    draft, other = run.folder / ".checkpoint.pt.0a1b2c3d", run.folder / ".mine"
    draft.touch(), other.touch()
    Run.resume(run.folder)
    assert files(run) == {"config.json", "checkpoint.pt", ".mine"}


@pytest.mark.parametrize("begin", [True, False], ids=["begin", "resume"])
def test_an_unwritable_folder_is_refused(begin, run, monkeypatch):
    run.save(STATE)
    if begin:
        run.checkpoint.unlink()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"config\.json cannot be written: No space left on device"):
        Run.begin(run.folder, SETTINGS) if begin else Run.resume(run.folder)
    assert files(run) == {"config.json"} | ({"checkpoint.pt"} if not begin else set())


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "vilt").write_text("a file")
    for folder in (tmp_path / "vilt", tmp_path / "vilt" / "below"):
        with pytest.raises(OSError, match=r"config.json cannot be written: (File exists|Not a directory)"):
            Run.begin(folder, SETTINGS)
    assert (tmp_path / "vilt").read_text() == "a file"


def test_a_place_for_a_file_is_tried_without_a_trace(tmp_path):
    need_writable(tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.json").mkdir()
    for path, reason in (("out.json", "it is a folder"), ("no/out.json", "No such file or directory")):
        with pytest.raises(OSError, match=f"{path} cannot be written: {reason}"):
            need_writable(tmp_path / path)


def test_two_checkpoints_must_fit_on_the_disk(run, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: usage(1_999_999))
    run.need_space(999_999)
    with pytest.raises(OSError, match=r"has 2.0 MB free, and two checkpoints need 2.0 MB"):
        run.need_space(1_000_000)


def test_a_write_that_fails_keeps_the_last_checkpoint(run, monkeypatch):
    run.save(STATE)
    before = run.checkpoint.read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        OSError, match=r"checkpoint.pt could not be written \(No space left on device\); the one before"
    ):
        run.save(STATE | {"step": 4})
    assert run.checkpoint.read_bytes() == before and files(run) == {"config.json", "checkpoint.pt"}


def test_metrics_survive_a_line_cut_short(run):
    for step in (1, 2, 3):
        run.log({"step": step, "mlm": step / 3})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "ml')
    assert [r["step"] for r in run.records()] == [1, 2, 3]
    run.forget_after(2)
    assert run.records() == [{"step": 1, "mlm": 1 / 3}, {"step": 2, "mlm": 2 / 3}]
    assert (run.folder / "metrics.jsonl").read_text().count("\n") == 2


class Foreign:
    """What a pickle could carry."""


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_bytes(b"not a checkpoint"), "is not a checkpoint of minivlp, or is damaged"),
        (lambda path: torch.save({"state_dict": {}}, path), "lacks the mark 'minivlp-1'"),
        (lambda path: torch.save([1, 2], path), "lacks the mark 'minivlp-1'"),
        (
            lambda path: path.write_bytes(pickle.dumps(Foreign())),
            "is not a checkpoint of minivlp, or is damaged",
        ),
        (lambda path: torch.save(Foreign(), path), r"or is damaged \(UnpicklingError\)"),
    ],
    ids=["text", "another program's", "a list", "a pickle", "a pickle of torch's"],
)
def test_what_is_no_checkpoint_is_refused(write, message, tmp_path):
    path = tmp_path / "checkpoint.pt"
    write(path)
    with pytest.raises(ValueError, match=f"checkpoint.pt .*{message}"):
        load_checkpoint(path)


def test_a_checkpoint_cut_short_is_refused(run):
    run.save(STATE)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:-40])
    with pytest.raises(ValueError, match="or is damaged"):
        Run.resume(run.folder)
    with pytest.raises(FileNotFoundError, match=r"other\.pt does not exist"):
        load_checkpoint(run.folder / "other.pt")


def test_names(tmp_path):
    assert run_folder("vilt") == Path("runs/vilt") and run_folder(str(tmp_path)) == tmp_path
    for name in ("", "  ", "../up", "a/../../up"):
        with pytest.raises(ValueError, match="--name must be a name or an absolute path"):
            run_folder(name)


def test_a_run_of_the_current_folder_comes_before_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_trained().folder == packaged("weights")
    Run.begin(run_folder("vilt"), SETTINGS).save(STATE)
    assert (tmp_path / "runs" / "vilt" / "checkpoint.pt").is_file()
    with pytest.raises(ValueError, match="runs/vilt does not hold a trained model of this version"):
        load_trained()


def test_what_is_packaged_is_found_from_any_folder(tmp_path, monkeypatch):
    """In an installation inside the package, in a clone beside it."""
    monkeypatch.chdir(tmp_path)
    assert (packaged("data") / "meta.json").is_file()
    assert (packaged("weights") / "vilt_tiny.safetensors").is_file()
    monkeypatch.setattr(core_files, "__file__", str(tmp_path / "minivlp" / "core" / "files.py"))
    assert packaged("data") == tmp_path / "data_tiny"
    for name in ("data", "weights"):
        (tmp_path / "minivlp" / f"packaged_{name}").mkdir(parents=True)
        assert packaged(name) == tmp_path / "minivlp" / f"packaged_{name}"


def test_json_that_is_no_object_is_refused(tmp_path):
    for text, message in (("[1]", "must hold a JSON object, got list"), ("{", "must be JSON")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=f"a.json {message}"):
            read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"é": 1}))
    assert read_json(tmp_path / "a.json") == {"é": 1}


def test_tensor_bytes():
    nested = {"a": [torch.zeros(3), (torch.zeros(2, dtype=torch.int64),)], "b": "text", "c": None}
    assert tensor_bytes(nested) == 3 * 4 + 2 * 8
