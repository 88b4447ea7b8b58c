"""The command line with a dual encoder: what a run leaves, what the other commands make of it, refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest

from minivlp.models.dual import load_clip, load_siglip
from minivlp.recipes import base, dual
from minivlp.recipes.base import load_trained, ship
from tests.test_cli import SENTENCE, same_run
from tests.test_train import equal
from tests.tiny import commands_with, few, trained, use_few


@pytest.fixture
def command(monkeypatch):
    use_few(monkeypatch)
    return commands_with(monkeypatch)


def refused(capsys, code: int, message: str) -> None:
    err = capsys.readouterr().err
    assert code == 2 and SENTENCE.fullmatch(err) and message in err


def test_a_run_leaves_its_results():
    folder = trained("clip")
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "report.md", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names | {
        "search.png", "clip_tiny.safetensors", "clip_tiny.json",
    }  # fmt: skip
    results = json.loads((folder / "eval.json").read_text())
    assert {"classification_r1", "text_to_image_r10", "zeroshot_r1", "scenes_r1"} <= set(results["unseen"])
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model"] == "clip" and settings["train"]["language"] == "en"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"names", "scenes", "name_seen", "name_unseen"} <= set(records[-1])


@pytest.mark.parametrize("model", ["siglip", "vse", "filip"])
@pytest.mark.slow
def test_every_model_runs_to_its_end(model):
    folder = trained(model)
    assert load_trained(folder).kind == model and (folder / "report.md").exists()
    assert load_trained(folder / f"{model}_tiny.safetensors").kind == model


def rounded(model) -> dict:
    return {name: tensor.half().float() for name, tensor in model.state_dict().items()}


def test_the_small_model_is_the_run_rounded_and_is_published_clip():
    folder = trained("clip")
    run, small = load_trained(folder), load_trained(folder / "clip_tiny.safetensors")
    assert equal(rounded(run.model), small.model.state_dict()) and small.canvas == 28
    eot = small.tokenizer.sep_id
    published = load_clip(folder / "clip_tiny.safetensors", heads=2, activation="gelu", eot=eot)
    assert equal(published.state_dict(), small.model.state_dict())
    siglip = trained("siglip")
    published = load_siglip(siglip / "siglip_tiny.safetensors", heads=2)
    assert equal(published.state_dict(), rounded(load_trained(siglip).model))


@pytest.mark.slow
def test_chinese_names(command, tmp_path, capsys):
    assert (
        command("train", "--model", "clip", "--language", "zh", "--name", tmp_path / "zh", "--items", 8) == 0
    )
    results = json.loads((tmp_path / "zh" / "eval.json").read_text())
    assert results["details"]["language"] == "zh" and "scenes_r1" not in results["unseen"]
    first = next(c for c in few().concepts if c.artists and c.split == "train")
    assert command("demo", first.name_zh, "--run", tmp_path / "zh", "--out", tmp_path) == 0
    assert (tmp_path / "demo.png").exists() and (tmp_path / "zh" / "search.png").exists()


@pytest.mark.slow
def test_resume_of_a_finished_run_evaluates_again_and_refuses_other_settings(command, tmp_path, capsys):
    folder = tmp_path / "clip"
    shutil.copytree(trained("clip"), folder)
    before = json.loads((folder / "eval.json").read_text())
    (folder / "eval.json").unlink()
    flags = ("train", "--name", folder, "--items", 16, "--resume")
    for flag, value, began in (("--steps", 99, 12), ("--language", "zh", "en"), ("--model", "vse", "clip")):
        code = command(*flags, flag, value)
        refused(
            capsys, code, f"{flag} must be left out with --resume, or be what the run began with ({began})"
        )
    assert command(*flags) == 0
    assert json.loads((folder / "eval.json").read_text()) == before and same_run(folder, trained("clip"))


def test_eval_and_figures_do_it_again(command, tmp_path, capsys):
    folder = tmp_path / "clip"
    shutil.copytree(trained("clip"), folder, ignore=shutil.ignore_patterns("*.png"))
    assert command("eval", "--run", folder, "--items", 16, "--out", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads((folder / "eval.json").read_text())
    assert (folder / "report.md").read_text() in capsys.readouterr().out
    assert command("figures", "--run", folder) == 0
    for path in folder.glob("*.png"):
        assert path.read_bytes() == (trained("clip") / path.name).read_bytes()
    assert len(list(folder.glob("*.png"))) == 2


def test_the_demo_ranks_every_drawing_of_the_unseen_artist(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    concept = next(c for c in few().concepts if c.artists and c.split == "train")
    assert command("demo", f"{concept.name_en} zebrine", "--run", trained("clip")) == 0
    lines = capsys.readouterr().out.splitlines()
    drawn = sum(bool(c.artists) for c in few().concepts)
    assert lines[0] == f"{drawn} drawings by fluent"
    assert lines[1] == "never read in training, so passed over: zebrine"
    scores = [float(line.split()[1]) for line in lines[3:8]]
    assert scores == sorted(scores, reverse=True) and lines[8] == "wrote demo.png"
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


@pytest.mark.parametrize("query, got", [("zebrine", "'zebrine'"), (" ", "none")])
def test_the_demo_needs_a_word_it_knows(query, got, command, tmp_path, capsys):
    code = command("demo", query, "--run", trained("clip"), "--out", tmp_path)
    refused(capsys, code, f"caption must hold at least one word the model has read, got {got}")


def test_the_models_own_run_comes_before_the_shipped_one(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "WEIGHTS", tmp_path)
    code = command("demo", "dog", "--model", "clip")
    refused(capsys, code, "make one by python -m minivlp train --model clip")
    ship(load_trained(trained("clip")), tmp_path / "clip_tiny.safetensors", {})
    assert load_trained(kind="clip").step == 12
    shutil.copytree(trained("vse"), tmp_path / "runs" / "clip")
    assert load_trained(kind="clip").kind == "vse", "a run is what its settings say"


@pytest.mark.parametrize(
    "line, message",
    [
        ("train --model blip", "--model: invalid choice: 'blip'"),
        ("train --model clip --language de", "--language: invalid choice: 'de'"),
        ("train --language zh", "--language must come with a dual encoder, as in --model clip, got vilt"),
        ("train --model clip --task vqa", "--task must come with --model vilt, got clip"),
        ("train --model clip --captions here", "--captions must come with --model vilt, got clip"),
        ("train --model clip --preset gpu", "--preset must be cpu for this model, got gpu"),
        ("train --task vqa --start CLIP", "--start must be a run of ViLT, got clip"),
    ],
)
def test_what_cannot_be_is_refused(line, message, command, tmp_path, capsys):
    words = [str(trained("clip")) if word == "CLIP" else word for word in line.split()]
    try:
        code = command(words[0], *words[1:], "--name", tmp_path / "run")
    except SystemExit as exit:
        code = exit.code
    refused(capsys, code, message)
    assert not (tmp_path / "run").exists()


def test_a_killed_run_resumes_to_the_same_weights(command, tmp_path, monkeypatch):
    """Stopped at the fifth step, after a checkpoint at the fourth."""
    real, calls = dual.DualRecipe.loss, []

    def stopped(*args, **settings):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(dual.DualRecipe, "loss", stopped)
    flags = ("train", "--model", "clip", "--name", tmp_path / "clip", "--items", 16)
    assert command(*flags) == 130
    monkeypatch.setattr(dual.DualRecipe, "loss", real)
    assert command(*flags, "--resume") == 0 and same_run(tmp_path / "clip", trained("clip"))


def test_report_is_markdown_of_one_width_a_table():
    tables = re.split(r"\n\n", (trained("clip") / "report.md").read_text())
    for table in tables:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


@pytest.mark.slow
def test_the_run_folder_is_named_after_the_model(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command("train", "--model", "vse", "--items", 8) == 0
    assert (tmp_path / "runs" / "vse" / "eval.json").is_file() and Path(tmp_path / "runs").is_dir()
