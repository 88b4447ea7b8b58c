"""The command line: one sentence and exit code 2 for what cannot be, and runs that nothing can spoil."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minivlp.__main__ import main
from minivlp.data import CPU_NOUNS, RELATIONS, emojivl, load_emojivl
from minivlp.data.names import read_caption
from minivlp.data.own import captions_folder, split
from minivlp.evaluation.vilt import MEASURES
from minivlp.pictures import demo
from minivlp.recipes import base, vilt
from minivlp.recipes.base import load_trained, ship
from minivlp.training import loop
from minivlp.training import run as runs
from minivlp.training.run import Run, load_checkpoint
from tests.test_train import equal, timeless
from tests.tiny import SIZES, commands_with, told, trained

REPOSITORY = Path(__file__).parent.parent
EMOJIVL = load_emojivl()
NOUNS = EMOJIVL.nouns(CPU_NOUNS)
SENTENCE = re.compile(r"minivlp: [^\n]+\n")


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


def process(*words: str, cwd: Path, kill: str | None = None, **settings) -> subprocess.Popen:
    """A python process of its own, in another folder, that ends in `words`."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)} | ({"MINIVLP_KILL": kill} if kill else {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=env, **pipes | settings)


def records(folder: Path) -> list[dict]:
    return timeless(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def same_run(a: Path, b: Path) -> bool:
    """The same weights, optimizers and metrics, bit for bit."""
    one, two = (load_checkpoint(folder / "checkpoint.pt") for folder in (a, b))
    return records(a) == records(b) and all(equal(one[k], two[k]) for k in ("model", "optimizers", "step"))


# Help, and what is refused before any time is spent


@pytest.mark.parametrize("job", ["", "train", "eval", "demo", "figures", "bench"])
def test_help_answers_at_once_from_any_folder(job, tmp_path):
    code = "import sys; from minivlp.__main__ import main; main(sys.argv[1:])"
    started = time.perf_counter()
    asked = process("-X", "importtime", "-c", code, *([job, "--help"] if job else []), cwd=tmp_path)
    out, err = asked.communicate()
    assert asked.returncode == 0 and time.perf_counter() - started < 5  # 0.1 s on an idle machine
    assert ("example: python -m minivlp " + job in out) if job else "train | eval | demo | figures" in out
    assert "argparse" in err and not re.search(r"\b(torch|numpy|tqdm)\b", err)


@pytest.mark.parametrize(
    "line, message",
    [
        ("train --preset tpu", "--preset: invalid choice: 'tpu' (choose from"),
        ("train --steps 0", "--steps: must be a whole number from 1 to 1000000000, got '0'"),
        ("train --steps many", "--steps: must be a whole number from 1 to 1000000000, got 'many'"),
        ("train --batch 1", "--batch: must be a whole number from 2 to 1000000, got '1'"),
        ("train --seed -1", "--seed: must be a whole number from 0 to 4294967295, got '-1'"),
        ("train --seed 4294967296", "--seed: must be a whole number from 0 to 4294967295, got '4294967296'"),
        ("train --captions=", "--captions: must not be empty, got ''"),
        ("train --lr nan", "--lr: must be a finite number > 0, got 'nan'"),
        ("train --threads 0", "--threads: must be a whole number from 1 to 256, got '0'"),
        ("train --threads 100000", "--threads: must be a whole number from 1 to 256, got '100000'"),
        ("train --seed 99999999999999999999", "--seed: must be a whole number from 0 to 4294967295, got '99"),
        ("train --name=", "--name: must not be empty, got ''"),
        ("train --device tpu", "--device: invalid choice: 'tpu'"),
        ("train --task snli", "--task: invalid choice: 'snli'"),
        ("train --nam x", "unrecognized arguments: --nam x"),
        ("eval --items 7", "--items: must be a multiple of 2 from 4 to 1000000, got '7'"),
        ("demo", "the following arguments are required: caption"),
        ("paint", "invalid choice: 'paint'"),
        ("train --device mps", "--device must be one that torch finds on this machine, got mps"),
        ("train --name ../up", "--name must be a name or an absolute path, got '../up'"),
        ("train --preset captions", "--preset must be cpu or gpu for this model, got captions"),
        ("train --start runs/vilt", "--start must come with --task, got vilt"),
        ("train --images here", "--images must come with --captions, got vilt"),
        ("train --on-error stop", "--on-error must come with --captions, got vilt"),
        ("train --task vqa --preset cpu", "--task must come alone: it starts from a trained run"),
        ("train --captions nowhere", "--captions must be a folder with captions.jsonl, or a COCO JSON file"),
        (
            "train --captions nowhere.json",
            "--captions must be a folder with captions.jsonl, or a COCO JSON file",
        ),
        ("train --task vqa --start nowhere", "there is no trained model HERE/nowhere: make one by"),
        ("eval --run nowhere", "there is no trained model nowhere"),
        ("eval --run README.md", "README.md is not a checkpoint of minivlp"),
        ("eval --out nowhere/out.json", "nowhere/out.json cannot be written: No such file or directory"),
        ("figures --run nowhere", "nothing to resume: "),
        ("demo a --run nowhere", "there is no trained model nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(line, message, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no checkpoint")
    job, *flags = line.split()
    try:
        code = command(job, *flags)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    message = message.replace("HERE", str(tmp_path))
    assert code == 2 and SENTENCE.fullmatch(err) and message in err and out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["README.md"]


def test_a_run_needs_its_folder_its_disk_and_its_data(command, tmp_path, monkeypatch, capsys):
    def refused(message: str, *flags) -> None:
        assert command("train", *flags) == 2
        assert message in capsys.readouterr().err

    (tmp_path / "file").write_text("in the way")
    refused("config.json cannot be written: ", "--name", tmp_path / "file")
    refused(f"nothing to resume: {tmp_path / 'new'} holds no run", "--name", tmp_path / "new", "--resume")
    refused("vilt already holds a run: go on with it by --resume, choose another --name", "--name", trained())
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 9))
        refused("MB free, and two checkpoints need", "--name", tmp_path / "full")
        assert not (tmp_path / "full" / "checkpoint.pt").exists()
    for name, text in (("other", "pretrained"), ("cut", None)):
        shutil.copytree(trained(), tmp_path / name)
        path = tmp_path / name / "checkpoint.pt"
        path.write_bytes(text.encode() if text else path.read_bytes()[:1000])
        refused("is not a checkpoint of minivlp, or is damaged", "--name", tmp_path / name, "--resume")
    shutil.copytree(emojivl.FOLDER, tmp_path / "data", ignore=shutil.ignore_patterns("LICENSES"))
    first = tmp_path / "data" / json.loads((emojivl.FOLDER / "meta.json").read_text())["vendors"][0]["file"]
    first.write_bytes(first.read_bytes()[:-1])
    monkeypatch.setattr(emojivl, "_default", lambda: load_emojivl(tmp_path / "data"))
    refused(f"{first.name} is damaged: its SHA-256 is not the one", "--name", tmp_path / "x")
    first.unlink()
    refused(f"{first.name} is missing", "--name", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_eval_refuses_a_damaged_data_folder(command, tmp_path, capsys):
    for text, message in (("{}", "is not that of an EmojiVL folder"), ("[", "is not valid JSON")):
        (tmp_path / "meta.json").write_text(text)
        (tmp_path / "concepts.tsv").write_text("noun\n")
        assert command("eval", "--run", trained(), "--data", tmp_path) == 2
        assert f"meta.json {message}" in capsys.readouterr().err


def test_weights_of_another_kind_are_refused(command, tmp_path, capsys):
    model = load_trained(trained())
    path = tmp_path / "small.safetensors"
    ship(model, path, {})
    about = json.loads(path.with_suffix(".json").read_text())
    for change, message in (
        (
            {"model_config": about["model_config"] | {"dim": 32}},
            "does not hold a trained model of this version",
        ),
        ({"model_config": {"depth": 3}}, "does not hold a trained model of this version"),
        ({"tokens": ["dog"]}, r"vocabulary must hold"),
    ):
        path.with_suffix(".json").write_text(json.dumps(about | change))
        assert command("eval", "--run", path) == 2 and message in capsys.readouterr().err
    path.with_suffix(".json").unlink()
    assert command("eval", "--run", path) == 2 and SENTENCE.fullmatch(capsys.readouterr().err)


# What a run leaves, and what the other commands make of it


def test_a_run_leaves_its_results():
    folder = trained()
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "report.md"}
    names |= {f"{name}.png" for name in ("curves", "masked_words", "retrieval", "alignment")}
    assert {path.name for path in folder.iterdir()} == names | {"vilt_tiny.safetensors", "vilt_tiny.json"}
    results = json.loads((folder / "eval.json").read_text())
    assert all(set(results[split]) == set(MEASURES) for split in ("seen", "unseen"))
    settings = json.loads((folder / "config.json").read_text())
    assert settings["threads"] == 1 and settings["device"] == "cpu" and settings["train"]["dim"] == 16
    assert settings["command"] == f"python -m minivlp train --name {folder} --items 16 --threads 1"


def test_the_small_model_is_the_run(tmp_path):
    run, small = load_trained(trained()), load_trained(trained() / "vilt_tiny.safetensors")
    assert equal(run.model.state_dict(), small.model.state_dict())
    assert (run.canvas, run.step, run.tokenizer.tokens) == (small.canvas, small.step, small.tokenizer.tokens)
    about = json.loads((trained() / "vilt_tiny.json").read_text())
    assert about["numbers"]["seen"].keys() == set(MEASURES) and about["settings"]["train"]["seed"] == 0
    assert about["command"].startswith("python -m minivlp train")


def test_resume_of_a_finished_run_evaluates_again(command, tmp_path, capsys):
    folder = tmp_path / "vilt"
    shutil.copytree(trained(), folder)
    before = json.loads((folder / "eval.json").read_text())
    (folder / "eval.json").unlink(), (folder / "report.md").unlink()
    flags = ("train", "--name", folder, "--items", 16, "--resume")
    for flag, value, began in (
        ("--steps", 99, 12),
        ("--seed", 2, 0),
        ("--preset", "gpu", "cpu"),
        ("--task", "vqa", None),
    ):
        assert command(*flags, flag, value) == 2
        message = (
            f"{flag} must be left out with --resume, or be what the run began with ({began}), got {value}"
        )
        assert message in capsys.readouterr().err
    assert command(*flags, "--steps", 12) == 0
    assert json.loads((folder / "eval.json").read_text()) == before and (folder / "report.md").exists()
    assert same_run(folder, trained())


def test_resume_keeps_the_threads_of_the_run(tmp_path, monkeypatch):
    folder, seen = tmp_path / "vilt", []
    shutil.copytree(trained(), folder)
    monkeypatch.setattr(loop, "train", lambda *a: None)
    monkeypatch.setattr(loop, "finish", lambda *a: None)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    assert main(["train", "--name", str(folder), "--resume"]) == 0 and seen[-1] == 1
    assert main(["train", "--name", str(folder), "--resume", "--threads", "3"]) == 0 and seen[-1] == 3


def test_eval_measures_another_folder_of_sheets(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    shutil.copytree(emojivl.FOLDER, data, ignore=shutil.ignore_patterns("fluent*", "LICENSES"))
    meta = json.loads((data / "meta.json").read_text())
    meta["vendors"] = [v for v in meta["vendors"] if v["name"] != "fluent"]
    (data / "meta.json").write_text(json.dumps(meta))
    flags = ("--run", trained(), "--items", 16)
    assert command("eval", *flags, "--data", "data", "--out", "out.json") == 0
    results, run = (json.loads(p.read_text()) for p in (Path("out.json"), trained() / "eval.json"))
    assert results["unseen"] == {} and results["seen"] == run["seen"]
    assert "## No unseen artists" in capsys.readouterr().out
    assert command("eval", *flags, "--seed", 5, "--out", "out.json") == 0
    assert json.loads(Path("out.json").read_text())["details"]["seed"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out.json"]


@pytest.mark.slow
def test_figures_draws_a_run_again(tmp_path, capsys):
    shutil.copytree(trained(), tmp_path / "vilt", ignore=shutil.ignore_patterns("*.png"))
    capsys.readouterr()  # what a training may have said, if this is the first test to need it
    assert main(["figures", "--run", str(tmp_path / "vilt"), "--threads", "1"]) == 0
    for path in (tmp_path / "vilt").glob("*.png"):
        assert path.read_bytes() == (trained() / path.name).read_bytes()
    assert capsys.readouterr().out.count("wrote ") == 4 == len(list((tmp_path / "vilt").glob("*.png")))


# The demo


def test_the_demo_ranks_and_draws_into_the_current_folder(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("demo", "A dog left of a guitar", "--run", trained()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"64 pictures by fluent; the caption is true of \d+ of them", lines[0])
    scores = [float(line.split()[1]) for line in lines[2:7]]
    assert scores == sorted(scores, reverse=True) and [line.split()[0] for line in lines[2:7]] == list(
        "12345"
    )
    assert lines[7] == "wrote demo.png and demo_alignment.png" and len(lines) == 8
    assert {p.name for p in tmp_path.iterdir()} == {"demo.png", "demo_alignment.png"}
    assert command("demo", "a dog", "--run", trained(), "--out", tmp_path / "new") == 0
    assert (tmp_path / "new" / "demo.png").exists()


@pytest.mark.parametrize(
    "caption, unknown",
    [
        ("a zebra left of a dog", "'zebra'"),
        ("a dog on a guitar.", "'on', '.'"),
        ("ein Hund", "'ein', 'hund'"),
    ],
)
def test_the_demo_names_words_it_has_never_read(caption, unknown, command, tmp_path, capsys):
    assert command("demo", caption, "--run", trained(), "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert SENTENCE.fullmatch(err) and err.endswith(f"got {unknown}\n") and "its nouns: dog, guitar" in err
    assert command("demo", " ", "--run", trained()) == 2 and "at least one word" in capsys.readouterr().err


@pytest.mark.parametrize(
    "caption, least",
    [
        ("a dog left of a guitar", 4),
        ("a guitar above a dog", 4),
        ("a dog", 8),
        ("a dog below the middle", 2),
        ("three dogs", 2),
        ("a dog between a guitar and a key", 2),
    ],
)
def test_the_demo_knows_which_pictures_are_right(caption, least):
    scenes, right = demo.candidates(EMOJIVL, NOUNS, 48, caption)
    assert len(scenes) == 64 and least <= len(right) < 40
    assert right == {i for i, scene in enumerate(scenes) if told(caption, scene)}


def test_the_demo_frames_nothing_when_no_scene_says_that():
    assert demo.candidates(EMOJIVL, NOUNS, 48, "a dog left of a dog")[1] == set()
    every = EMOJIVL.nouns()
    dogs = read_caption("a hot dog above two dogs", every)[1]
    assert {c.noun for c in dogs} == {"hot dog", "dog"} and read_caption("a hot dog", every)[1][
        0
    ].noun == "hot dog"
    assert len(read_caption("a hot dog", every)[1]) == 1


def test_one_right_picture_is_put_in_where_there_would_be_none(monkeypatch):
    monkeypatch.setattr(demo, "PICTURES", 2)
    put_in = 0
    for relation in RELATIONS:
        caption = f"a dog {relation} a guitar"
        scenes, right = demo.candidates(EMOJIVL, NOUNS, 48, caption)
        assert (
            len(scenes) == 2
            and right == {i for i, scene in enumerate(scenes) if told(caption, scene)} != set()
        )
        put_in += scenes[0].caption == caption
    assert put_in >= 2


# It cannot be lost


def test_a_nan_stops_with_the_step_and_the_term(command, tmp_path, monkeypatch, capsys):
    real, calls = vilt.itm_loss, []

    def broken(logits, labels):
        calls.append(None)
        return real(logits, labels) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(vilt, "itm_loss", broken)
    assert command("train", "--name", tmp_path / "vilt") == 2
    err = capsys.readouterr().err
    assert SENTENCE.fullmatch(err) and re.search(
        r"step \d: loss term itm is nan; the checkpoint of step 4 is kept", err
    )
    assert load_trained(tmp_path / "vilt").step == 4
    monkeypatch.setattr(vilt, "itm_loss", real)
    assert command("train", "--name", tmp_path / "vilt", "--resume", "--items", 16) == 0
    assert same_run(tmp_path / "vilt", trained())


def test_a_write_that_fails_in_the_middle_keeps_the_last_checkpoint(command, tmp_path, monkeypatch, capsys):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(None)
        if len(calls) > 4:  # probe, settings, step 0, step 4
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert command("train", "--name", tmp_path / "vilt") == 2
    assert (
        "checkpoint.pt could not be written (No space left on device); the one before it is kept"
        in capsys.readouterr().err
    )
    assert load_trained(tmp_path / "vilt").step == 4


def killed_and_resumed(kill: str, folder: Path, command) -> None:
    """Kill a real process with SIGKILL, resume here, and compare with the run that was not killed."""
    flags = ("train", "--name", folder, "--items", 16)
    victim = process("-m", "tests.tiny", *flags, "--threads", 1, cwd=folder.parent, kill=kill)
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    assert command(*flags, "--resume") == 0
    assert same_run(folder, trained()) and not list(folder.glob(".*"))
    assert json.loads((folder / "eval.json").read_text()) == json.loads((trained() / "eval.json").read_text())


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(command, tmp_path):
    killed_and_resumed("rename 2", tmp_path / "vilt", command)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        "rename 1",
        "renamed 1",
        "renamed 3",
        "written 3",
        "written 5",
        "logged 1",
        "logged 4",
        "step 3",
        "step 12",
    ],
)
def test_a_run_killed_at_any_place_resumes_to_the_same_weights(kill, command, tmp_path):
    killed_and_resumed(kill, tmp_path / "vilt", command)


@pytest.mark.slow
def test_a_run_killed_again_and_again_at_any_time_resumes_to_the_same_weights(tmp_path):
    """On two threads, with the real sizes: from outside, at random times."""
    flags = ("--items", 4, "--threads", 2, "--steps", 120)
    code = (
        "import sys; from dataclasses import replace;"
        "from minivlp import __main__; from minivlp.evaluation import vilt as evaluation;"
        "from minivlp.recipes import vilt; from minivlp.recipes.base import Recipe;"
        "evaluation.CANDIDATES = 4; Recipe.checked = 16;"
        "vilt.PRESETS['cpu'] = replace(vilt.PRESETS['cpu'], batch=16, save_every=7, report_every=5);"
        "vilt.ViltRecipe.draw = lambda *run: []; sys.exit(__main__.main())"
    )

    def start(folder: Path, *more) -> subprocess.Popen:
        return process("-c", code, "train", "--name", folder, *flags, *more, cwd=tmp_path)

    whole = start(tmp_path / "whole")
    assert whole.communicate() and whole.returncode == 0
    folder, steps, rng = tmp_path / "killed", [], np.random.default_rng(0)
    for _ in range(4):
        victim = start(folder, *(["--resume"] if folder.exists() else []))
        wanted = (steps or [0])[-1] + 10
        while not any(r["step"] >= wanted for r in Run(folder, {}).records()):
            assert victim.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        victim.kill()
        victim.communicate()
        steps.append(Run.resume(folder).load()["step"])
    last = start(folder, "--resume")
    assert last.communicate() and last.returncode == 0 and 0 < steps[0] < steps[-1] < 120
    assert same_run(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_how_to_go_on(sent, command, tmp_path):
    folder = tmp_path / "vilt"
    victim = process("-m", "tests.tiny", "train", "--name", folder, "--steps", 9999, cwd=tmp_path)
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    victim.send_signal(sent)
    _, err = victim.communicate()
    assert victim.returncode == 130 and "Traceback" not in err
    assert err == f"stopped; go on with: python -m minivlp train --resume --name {folder}\n"
    assert Run.resume(folder).load()["step"] % SIZES["save_every"] == 0


def test_ctrl_c_before_there_is_a_run_says_only_that(command, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "load_emojivl", interrupted)
    assert command("train", "--name", tmp_path / "vilt") == 130
    assert capsys.readouterr().err == "stopped\n" and not (tmp_path / "vilt").exists()


# Own captions


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Forty pictures of several sizes with captions, and six bad lines."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for i in range(40):
        size = rng.integers(20, 90, 2)
        colour = ("red", "green", "blue")[i % 3]
        pixels = np.full((*size, 3), 40, np.uint8)
        pixels[..., i % 3] = 200
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"a {colour} picture number {i}"}))
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    Image.new("RGB", (900, 3)).save(folder / "narrow.png")
    bad = (
        '{"image": "gone.png", "caption": "a"}',
        "no json",
        '{"image": "1.png"}',
        '{"image": "2.png", "caption": ""}',
    )
    lines[5:5] = [
        *bad,
        *(json.dumps({"image": f"{n}.png", "caption": "a line"}) for n in ("broken", "narrow")),
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_own_captions_from_end_to_end(command, pictures, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "captions"
    monkeypatch.chdir(tmp_path)
    assert command("train", "--captions", "pictures", "--name", folder, "--steps", 10) == 0
    out = capsys.readouterr().out
    skipped = re.findall("skipped: (.*)", out)
    assert len(skipped) == 6
    for line, problem in (
        (6, "does not exist"),
        (7, "JSON"),
        (8, "'caption'"),
        (9, "is empty"),
        (10, "cannot be read"),
    ):
        assert any(s.startswith(f"captions.jsonl line {line}:") and problem in s for s in skipped)
    narrow = "captions.jsonl line 11: image 'narrow.png' does not fit (images must keep 16 pixels a side"
    assert narrow in skipped[-1]
    kept = int(re.search(r"(\d+) kept back", out)[1])
    assert f"{40 - kept} captions to train on" in out and f"on {kept} kept-back captions" in out
    results = json.loads((folder / "eval.json").read_text())
    assert (
        set(results["kept_back"]) == {"masked_word", "itm_random"} and results["details"]["captions"] == kept
    )
    assert {"checkpoint.pt", "config.json", "metrics.jsonl", "curves.png"} <= {
        p.name for p in folder.iterdir()
    }

    # Another folder to call from; pictures that came later change nothing that was decided.
    monkeypatch.chdir("/")
    with open(pictures / "captions.jsonl", "a") as file:
        trains = split(captions_folder(pictures))[0].names[0]
        file.write("\n" + json.dumps({"image": trains, "caption": "entirely new words"}))
    assert command("train", "--name", folder, "--resume") == 0
    assert command("eval", "--run", folder, "--out", tmp_path / "again.json") == 0
    assert json.loads((tmp_path / "again.json").read_text()) == results
    assert command("figures", "--run", folder) == 0
    assert "do not compare" not in capsys.readouterr().out
    with open(pictures / "captions.jsonl", "a") as file:
        kept_back = split(captions_folder(pictures))[1].names[0]
        file.write("\n" + json.dumps({"image": kept_back, "caption": "a question that was not asked"}))
    assert command("eval", "--run", folder) == 0
    told_of = f"the kept-back captions are not those of {folder / 'eval.json'}: the numbers do not compare"
    assert told_of in capsys.readouterr().out.splitlines()
    assert command("eval", "--run", folder, "--data", emojivl.FOLDER) == 2
    assert command("demo", "a red picture", "--run", folder) == 2
    assert "own captions" in capsys.readouterr().err


def test_a_bad_line_can_stop_the_run_before_it_begins(command, pictures, tmp_path, capsys):
    assert command("train", "--captions", pictures, "--on-error", "stop", "--name", tmp_path / "c") == 2
    assert "captions.jsonl line 6: image 'gone.png' does not exist" in capsys.readouterr().err


def test_coco_captions_from_end_to_end(command, pictures, tmp_path, capsys):
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(12)]
    annotations = [{"image_id": i % 12, "caption": f"picture number {i % 12}"} for i in range(24)]
    coco = {"images": images, "annotations": [*annotations, {"image_id": 99, "caption": "of nothing"}]}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(coco))
    flags = ("--captions", path, "--images", pictures, "--steps", 3, "--name", tmp_path / "coco")
    assert command("train", *flags) == 0
    out = capsys.readouterr().out
    assert "skipped: captions.json annotations[24]: image_id 99 is not among the images" in out
    assert json.loads((tmp_path / "coco" / "eval.json").read_text())["details"]["pictures"] >= 1
    assert command("train", "--captions", path, "--images", tmp_path / "no") == 2
    assert "--images must be a folder" in capsys.readouterr().err
    assert command("train", "--captions", pictures, "--images", pictures) == 2
    assert "--images must come with a COCO JSON file" in capsys.readouterr().err


def test_very_few_pictures(command, pictures, tmp_path, capsys):
    lines = (pictures / "captions.jsonl").read_text().splitlines()
    for n, code in ((2, 0), (1, 2)):
        (pictures / "captions.jsonl").write_text("\n".join(lines[:n]))
        assert command("train", "--captions", pictures, "--steps", 2, "--name", tmp_path / str(n)) == code
    out, err = capsys.readouterr()
    assert "matching is not measured: no wrong pair can be made" in out
    assert "must hold at least two different images to be split, got 1" in err
    assert "itm_random" not in json.loads((tmp_path / "2" / "eval.json").read_text())["kept_back"]
