"""Fine-tuning: what it keeps of the start, what it may see, and what its two blind baselines lack."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from minivlp.__main__ import main
from minivlp.data import CPU_NOUNS, TRAINING_ARTISTS, load_emojivl
from minivlp.data.names import scene_tokenizer
from minivlp.data.questions import questions, statements
from minivlp.data.scenes import held_out
from minivlp.recipes import TASKS, recipe_class, tasks
from minivlp.recipes.base import load_trained
from minivlp.recipes.tasks import TaskRecipe, with_head
from minivlp.recipes.vilt import ViltSettings
from minivlp.recipes.vqa import VqaRecipe
from minivlp.text import WordPiece
from minivlp.training.loop import TEST_SEED
from minivlp.training.run import load_checkpoint
from tests.test_train import equal, timeless
from tests.tiny import commands_with, told, trained

EMOJIVL = load_emojivl()
NOUNS = EMOJIVL.nouns(CPU_NOUNS)
TOKENIZER = scene_tokenizer(NOUNS, 512)
FOLDERS = (".", "image_blind", "text_blind")


def recipe(name: str, settings: ViltSettings = ViltSettings(), blind: str | None = None) -> TaskRecipe:  # noqa: B008
    return recipe_class(name)(settings, {"blind": blind}, TOKENIZER.tokens)


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


@pytest.fixture(scope="module")
def start():
    return load_trained(trained())


@pytest.mark.parametrize("name", TASKS)
def test_everything_is_kept_and_the_head_is_new(name, start):
    task = recipe(name)
    model = with_head(start.model, task.heads(), seed=3)
    old, new = start.model.state_dict(), model.state_dict()
    for key, tensor in old.items():
        assert torch.equal(new[key][: len(tensor)], tensor)
    assert {key.split(".")[0] for key in set(new) - set(old)} == {name}
    again, other = (with_head(start.model, task.heads(), seed).state_dict() for seed in (3, 4))
    assert equal(new, again) and not torch.equal(new[f"{name}.0.weight"], other[f"{name}.0.weight"])
    types = new["modality.weight"]
    assert len(types) == (2 if name == "vqa" else 3) and torch.equal(types[-1], types[1])


def test_a_second_task_keeps_what_the_first_taught(start):
    both = {"nlvr2": True, "image_types": 2}
    first = with_head(start.model, both, seed=0)
    with torch.no_grad():
        first.modality.weight[2] += 1
    second = with_head(first, {"num_answers": 37}, seed=1)
    assert equal(
        first.state_dict(), {k: v for k, v in second.state_dict().items() if not k.startswith("vqa")}
    )


@pytest.mark.parametrize("name", TASKS)
def test_training_items_are_of_training_pairs_and_artists_and_no_test_items(name):
    task = recipe(name)
    asked = task.items(32, "train", 10_000)
    scenes = [s for item in asked for s in (item.scenes if name == "nlvr2" else (item.scene,))]
    assert not any(held_out(*s.objects) for s in scenes if s.kind == "pair")
    drawn = (statements if name == "nlvr2" else questions)(
        EMOJIVL, NOUNS, 48, 32, TRAINING_ARTISTS, "train", 10_000
    )
    assert [item.text for item in asked] == [item.text for item in drawn]
    for seed in (TEST_SEED, tasks.CHECK_SEED):
        assert seed < tasks.FIRST_TRAINING_SEED


def test_a_batch_depends_on_the_seed_and_the_step_alone(monkeypatch):
    monkeypatch.setattr(tasks, "POOL", 32)
    settings = ViltSettings(steps=8, batch=16, seed=1)
    task, again = recipe("vqa", settings), recipe("vqa", settings)
    texts = [[item.text for item in task.drawn(step)] for step in range(8)]
    assert all([item.text for item in again.drawn(step)] == texts[step] for step in (5, 0, 7))
    for step in range(8):  # a pool serves two steps
        drawn = {item.text for item in task.items(32, "train", 20_000 + step // 2)}
        assert set(texts[step]) <= drawn and len(set(texts[step])) > 5
    other = recipe("vqa", replace(settings, seed=2)).drawn(0)
    assert texts[0] != texts[1] and texts[0] != [item.text for item in other]
    assert torch.equal(task.batch(5)[0].pixels, again.batch(5)[0].pixels)


def test_the_lessons_of_statements():
    """First the ending decides alone, then a threshold on the pictures with the fact, then their parity."""
    task = recipe("nlvr2", ViltSettings(steps=40, batch=64))

    def seen(step: int) -> set[tuple]:
        """(first ending?, pictures that show the fact, truth) of the items of a step."""
        found = set()
        for item in task.drawn(step):
            fact, ending = item.text.split(" in ", 1)
            shown = sum(told(fact, scene) for scene in item.scenes)
            found.add((ending == "one picture only", shown, item.truth))
        return found

    assert seen(0) == seen(5) == {(True, 1, True), (False, 1, False)}
    threshold = {(True, 0, False), (True, 1, True), (False, 1, False), (False, 2, True)}
    assert seen(6) == seen(15) == threshold
    assert seen(16) == seen(39) == threshold | {(True, 2, False), (False, 0, True)}


def test_the_loss_of_a_task(start):
    for name in TASKS:
        task = recipe(name)
        model = with_head(start.model, task.heads(), 0)
        batch = task.collate(task.items(16, "train", 5))
        terms = task.loss(model, [batch])
        loss = terms.pop(name)
        if name == "vqa":
            assert not terms
            logits = task.logits(model, batch)
            p = torch.where(batch.targets > 0, logits.sigmoid(), 1 - logits.sigmoid())
            assert torch.allclose(loss, -p.log().sum(1).mean(), rtol=1e-4)
        else:
            p = task.logits(model, batch).softmax(1)
            assert torch.allclose(loss, -p[range(16), batch.targets].log().mean(), rtol=1e-4)
            pooled = task.pooled(model, batch)
            p = torch.stack([model.itm_logits(one).softmax(1) for one in pooled])  # (2, B, 2)
            right = p.gather(2, batch.shown.T[..., None])
            assert set(terms) == {"itm"} and torch.allclose(terms["itm"], -right.log().mean(), rtol=1e-4)


def test_a_blind_batch_lacks_a_half():
    items = recipe("nlvr2").items(16, "train", 5)
    image, text = (recipe("nlvr2", blind=half).collate(items) for half in ("image", "text"))
    assert not image.pixels.any() and text.pixels.any()
    assert text.ids.shape[1] == 2 and image.ids.shape[1] > 2


def test_the_sizes_are_those_of_the_start_and_the_flags_win(start):
    settings = VqaRecipe.begin({"start": str(trained()), "steps": 9, "seed": 4})
    config, began = settings["train"], start.settings["train"]
    assert {k: config[k] for k in ("dim", "canvas", "patch", "nouns")} == {
        k: began[k] for k in ("dim", "canvas", "patch", "nouns")
    }
    assert (config["steps"], config["seed"], config["batch"]) == (9, 4, tasks.OVERRIDES["batch"])
    assert settings["start"] == str(trained())


def test_a_start_with_hundreds_of_nouns_is_asked_about_the_small_presets(start, monkeypatch):
    many = replace(start, settings=start.settings | {"train": start.settings["train"] | {"nouns": None}})
    monkeypatch.setattr(tasks, "load_trained", lambda source: many)
    assert VqaRecipe.begin({})["train"]["nouns"] == CPU_NOUNS


def test_a_start_that_cannot_read_the_questions_is_refused(start, monkeypatch):
    letters = WordPiece([*TOKENIZER.tokens[:5], "a"])
    monkeypatch.setattr(tasks, "load_trained", lambda source: replace(start, tokenizer=letters))
    with pytest.raises(
        ValueError, match="--start must be a run whose vocabulary holds the words of the questions, got '"
    ):
        VqaRecipe.begin({})


def test_another_task_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--task", "snli"])
    assert re.search(
        "--task: invalid choice: 'snli' .choose from '?vqa'?, '?nlvr2'?", capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of each task."""
    home = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        run = commands_with(patch)
        for name in TASKS:
            assert (
                run("train", "--task", name, "--start", trained(), "--name", home / name, "--items", 16) == 0
            )
    return home


@pytest.mark.parametrize("name", TASKS)
def test_a_run_leaves_results_beside_its_baselines(name, whole):
    results = json.loads((whole / name / "eval.json").read_text())
    assert results["task"] == name
    for split in ("seen", "unseen"):
        assert set(results[split]) == {"accuracy", "image_blind", "text_blind"}
        for measure, kinds in results["details"][split].items():
            assert kinds["all"]["value"] == results[split][measure]
            assert all(m["low"] <= m["value"] <= m["high"] and m["chance"] <= 0.5 for m in kinds.values())
        if name == "nlvr2":
            assert results[split]["image_blind"] == results[split]["text_blind"] == 0.5
    report = (whole / name / "report.md").read_text()
    assert "| image-blind | text-blind |" in report and report.count("| all |") == 2
    assert (whole / name / "curves.png").stat().st_size > 10_000
    weights = [load_checkpoint(whole / name / folder / "checkpoint.pt")["model"] for folder in FOLDERS]
    assert not equal(weights[0], weights[1]) and not equal(weights[1], weights[2])


def test_a_run_goes_on_within_its_baselines_without_its_start(command, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained(), tmp_path / "start")
    real = VqaRecipe.batch

    def interrupted(self, step):
        if self.blind == "image" and step == 5:  # after a checkpoint
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(VqaRecipe, "batch", interrupted)
    flags = ("--task", "vqa", "--name", tmp_path / "vqa", "--items", 16)
    assert command("train", *flags, "--start", tmp_path / "start") == 130
    assert (
        f"go on with: python -m minivlp train --resume --name {tmp_path / 'vqa'}" in capsys.readouterr().err
    )
    assert (tmp_path / "vqa" / "image_blind").exists() and not (tmp_path / "vqa" / "text_blind").exists()
    assert load_checkpoint(tmp_path / "vqa" / "image_blind" / "checkpoint.pt")["step"] == 4
    monkeypatch.setattr(VqaRecipe, "batch", real)
    shutil.rmtree(tmp_path / "start")
    assert command("train", *flags, "--resume") == 0
    for folder in FOLDERS:
        a, b = (load_checkpoint(home / "vqa" / folder / "checkpoint.pt") for home in (whole, tmp_path))
        assert equal(a["model"], b["model"]) and equal(a["optimizers"], b["optimizers"])
    lines = [(home / "vqa" / "metrics.jsonl").read_text().splitlines() for home in (whole, tmp_path)]
    assert timeless(map(json.loads, lines[0])) == timeless(map(json.loads, lines[1]))


def test_eval_measures_a_task_run_again(command, whole, tmp_path, capsys):
    assert command("eval", "--run", whole / "nlvr2", "--items", 16, "--out", tmp_path / "again.json") == 0
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(
        (whole / "nlvr2" / "eval.json").read_text()
    )
    shutil.copytree(whole / "nlvr2", tmp_path / "alone", ignore=shutil.ignore_patterns("*_blind"))
    assert command("eval", "--run", tmp_path / "alone" / "checkpoint.pt", "--items", 16) == 0
    assert "image-blind" not in capsys.readouterr().out.rpartition("# nlvr2")[2].split("Held-out")[0]


def test_a_task_can_be_learnt(start):
    """Sixteen questions by heart: the gradient reaches the head and the encoder."""
    task = recipe("vqa")
    model = with_head(start.model, task.heads(), 0).train()
    batch = task.collate(task.items(16, "train", 5))
    adam = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        adam.zero_grad()
        loss = task.loss(model, [batch])["vqa"]
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
