"""The command line with X-VLM: what a run leaves, what the other commands make of it, refusals."""

import json
import shutil

import pytest

from minivlp.recipes.base import load_trained
from tests.test_cli import SENTENCE
from tests.test_train import equal
from tests.tiny import commands_with, trained


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


def refused(capsys, code: int, message: str) -> None:
    err = capsys.readouterr().err
    assert code == 2 and SENTENCE.fullmatch(err) and message in err


def test_a_run_leaves_its_results():
    folder = trained("xvlm")
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "report.md", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names | {
        "grounding.png", "xvlm_tiny.safetensors", "xvlm_tiny.json",
    }  # fmt: skip
    results = json.loads((folder / "eval.json").read_text())
    assert {"grounding", "ground_relation", "naming", "pointing"} <= set(results["unseen"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"itc", "grounding_seen", "grounding_unseen"} <= set(records[-1])
    assert any("box" in record for record in records)


def test_the_small_model_is_the_run():
    folder = trained("xvlm")
    run, small = load_trained(folder), load_trained(folder / "xvlm_tiny.safetensors")
    assert equal(run.model.state_dict(), small.model.state_dict())
    assert small.kind == "xvlm" and small.canvas == 48


def test_it_is_measured_again(command, tmp_path):
    folder = trained("xvlm")
    assert command("eval", "--run", folder, "--items", 16, "--out", tmp_path / "again.json") == 0
    again, first = (json.loads(p.read_text()) for p in (tmp_path / "again.json", folder / "eval.json"))
    assert again == first


def test_its_pictures_are_drawn_again(command, tmp_path, capsys):
    shutil.copytree(trained("xvlm"), tmp_path / "run")
    (tmp_path / "run" / "grounding.png").unlink()
    assert command("figures", "--run", tmp_path / "run") == 0
    assert (tmp_path / "run" / "grounding.png").exists() and "grounding.png" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_a_finished_one_is_refused(command, capsys):
    folder = trained("xvlm")
    refused(capsys, command("train", "--model", "xvlm", "--name", folder), "already holds a run")
    refused(
        capsys, command("train", "--resume", "--name", folder, "--model", "clip"), "--model must be left out"
    )
    refused(capsys, command("train", "--resume", "--name", folder, "--batch", 4), "--batch must be left out")


@pytest.mark.parametrize("phrase", ["A dog", "a dog left of the middle", "a dog above a guitar"])
def test_the_demo_draws_boxes(phrase, command, tmp_path, capsys):
    run = trained("xvlm")
    assert command("demo", phrase, "--run", run, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "pictures by fluent" in out and (tmp_path / "demo.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "phrase, message",
    [
        ("a zebra", "caption must be made of words the model has read"),
        ("two dogs", "caption must be a phrase about one object"),
        ("", "caption must hold at least one word"),
    ],
)
def test_other_phrases_are_refused(phrase, message, command, tmp_path, capsys):
    refused(capsys, command("demo", phrase, "--run", trained("xvlm"), "--out", tmp_path), message)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--language", "zh"], "--language must come with a dual encoder"),
        (["--task", "vqa"], "--task must come with --model vilt"),
        (["--captions", "pictures"], "--captions must come with --model vilt"),
        (["--preset", "gpu"], "--preset must be cpu for this model, got gpu"),
    ],
)
def test_flags_of_other_models_are_refused(flags, message, command, tmp_path, capsys):
    refused(capsys, command("train", "--model", "xvlm", "--name", tmp_path / "run", *flags), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what, field", [("boxes", "box_weight"), ("regions", "regions")])
def test_a_run_without_boxes_or_regions_has_no_box_loss(what, field, command, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ("--model", "xvlm", "--name", folder, "--items", 8)
    assert command("train", *flags, "--without", what) == 0
    settings = json.loads((folder / "config.json").read_text())
    assert settings["without"] == what and settings["train"][field] == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(record.get("box", 0) == 0 for record in records)
    other = {"boxes": "regions", "regions": "boxes"}[what]
    code = command("train", "--resume", "--name", folder, "--without", other)
    refused(capsys, code, "--without must be left out")
    code = command("train", "--without", what, "--name", tmp_path / "vilt")
    refused(capsys, code, f"--without must be contrast for this model, got {what}")
