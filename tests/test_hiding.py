"""FLAVA's and MaskVLM's training, what a caption is worth by their evaluation, and their command line."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.evaluation.hidden import SHARES, costs, evaluate_hidden, hide_rows, mean_of, report_hidden
from minivlp.mlm import IGNORE
from minivlp.patch import to_patches
from minivlp.recipes import flava
from minivlp.recipes.base import load_trained
from minivlp.recipes.flava import FlavaRecipe, Pairs, Pictures, Texts
from minivlp.recipes.maskvlm import MaskVlmRecipe, matching_pairs
from minivlp.training.loop import optimizers, steps
from minivlp.training.run import Run
from tests.test_cli import SENTENCE, process
from tests.test_train import equal
from tests.tiny import FLAVA_SIZES, MASKVLM_SIZES, commands_with, trained

EMOJIVL = load_emojivl()
RECIPES = {"flava": (FlavaRecipe, FLAVA_SIZES), "maskvlm": (MaskVlmRecipe, MASKVLM_SIZES)}
both = pytest.mark.parametrize("name", RECIPES)
both_runs = pytest.mark.parametrize("name", ["flava", pytest.param("maskvlm", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def few_coded(monkeypatch):
    """K-means over the patches of a few pictures."""
    monkeypatch.setattr(flava, "CODED", 20)


def recipe(name: str, without: str | None = None, **changes):
    kind, sizes = RECIPES[name]
    changes = sizes | kind.changes({"without": without}) | changes
    return kind(replace(kind.presets["cpu"], **changes), {"model": name})


# Batches


@both
def test_batches_depend_on_seed_and_step_alone(name):
    one, two, other = recipe(name), recipe(name), recipe(name, seed=1)
    one.batch(3), one.batch(4)
    for step in (5, 6):
        for a, b, c in zip(one.batch(step), two.batch(step), other.batch(step), strict=True):
            for field, value in vars(a).items():
                assert torch.equal(value, vars(b)[field]) if torch.is_tensor(value) else value == step
            tensors = [field for field, value in vars(a).items() if torch.is_tensor(value)]
            assert not all(torch.equal(vars(a)[field], vars(c)[field]) for field in tensors)


def test_a_wrong_pair_has_another_picture_and_a_true_one_its_own():
    made = recipe("flava", batch=32, both=0.5)
    s = made.settings
    (pairs, _, _), n = made.batch(2), 32 + 2 * s.unpaired + 5
    drawn = [Scenes(EMOJIVL, made.nouns, canvas=48, seed=0)[2 * n + i] for i in range(n)]
    assert pairs.match.tolist() == [0] * 5 + [1] * 11 + [IGNORE] * 16
    assert torch.equal(pairs.pixels[5:], scene_pixels(drawn[5:32]))
    assert torch.equal(pairs.pixels[:5], scene_pixels(drawn[-5:]))
    words = [made.tokenizer.decode(row) for row in pairs.ids.numpy()]
    assert words == [scene.caption for scene in drawn[:32]]


def test_the_pairs_of_flava_hide_both_sides_or_patches_alone():
    made = recipe("flava", batch=64, both=0.5)
    covered = made.batch(0)[0]
    assert (covered.hidden[:32].sum(1) == round(0.4 * 36)).all() and covered.hidden[32:].all()
    pairs, pictures, texts = made.batch(made.settings.steps // 2)
    assert isinstance(pairs, Pairs) and isinstance(pictures, Pictures) and isinstance(texts, Texts)
    assert (pairs.hidden[:32].sum(1) == round(0.4 * 36)).all() and (pictures.hidden.sum(1) == 14).all()
    share = pairs.hidden[32:].float().mean(1)
    assert 0.3 < share.min() < 0.6 and 8 <= (share == 1).sum() <= 24
    asked = pairs.labels != IGNORE
    assert asked[:32].any() and not asked[32:].any() and (texts.labels != IGNORE).any()
    for i in range(64):
        read = pairs.masked[i][pairs.masked_mask[i]]
        if i >= 32 and i % 4 == 0:
            assert read.tolist() == [made.tokenizer.cls_id, made.tokenizer.sep_id]
        else:
            whole = pairs.ids[i][pairs.text_mask[i]]
            assert torch.equal(torch.where(asked[i][: len(read)], whole, read), whole)


def test_without_unpaired_batches_there_are_pairs_alone():
    made = recipe("flava", "unpaired")
    (pairs,) = made.batch(0)
    assert set(made.loss(made.model, [pairs])) == {"contrast", "itm", "mmm_image", "mmm_text"}


def test_maskvlm_hides_one_side_at_a_time_unless_it_is_told_otherwise():
    turns, at_once = recipe("maskvlm", batch=32), recipe("maskvlm", "turns", batch=32)
    (a,), (b,) = turns.batch(0), at_once.batch(0)
    assert torch.equal(a.masked, b.masked) and not torch.equal(a.masked, a.ids)
    for i in range(32):
        told = a.told[i][a.told_mask[i]]
        assert len(told) == 2 if i % 4 == 0 else torch.equal(told, a.ids[i][a.text_mask[i]])
        told = b.told[i][b.told_mask[i]]
        assert len(told) == 2 if i % 4 == 0 else torch.equal(told, a.masked[i][a.text_mask[i]])
    seen = []
    for made, rows in ((turns, a), (at_once, b)):
        made.model.text_cross.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
        made.loss(made.model, [rows])
        whole, part = made.model.image_states(rows.pixels), made.model.image_states(rows.pixels, rows.hidden)
        read = seen[0] if len(seen[0]) == 32 else seen[1]
        assert torch.allclose(read, whole if made is turns else part, atol=1e-5)
        seen.clear()


def test_no_negative_of_maskvlm_is_true():
    made, seen = recipe("maskvlm", batch=24), 0
    for step in range(6):
        (rows,) = made.batch(step)
        x, y = torch.randn(2, 24, 8)
        text, picture, labels = matching_pairs(x, y, torch.tensor(5.0), rows, 0)
        assert labels.tolist() == [1] * 24 + [0] * 48 and torch.equal(text[:24], picture[:24])
        wrong = labels == 0
        assert (rows.same[text[wrong]] != rows.same[picture[wrong]]).all()
        seen += len({tuple(pair) for pair in zip(text.tolist(), picture.tolist(), strict=True)})
    assert seen > 6 * 60


# The loss


@both
def test_every_parameter_gets_a_gradient(name):
    made = recipe(name)
    terms = made.loss(made.model, made.batch(0))
    assert set(terms) == set(made.terms) and all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert [n for n, p in made.model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.slow
@both
def test_one_batch_can_be_learned(name):
    changes = {"both": 0.5} if name == "flava" else {}
    made = recipe(name, batch=8, lr=4e-3, mask=0.5, **changes)
    model, batches = made.model, made.batch(0)
    tuned, first = optimizers(model, made.matrices(model), made.settings), None
    for _ in range(40):
        terms = made.loss(model, batches)
        first = first or {k: float(v.detach()) for k, v in terms.items()}
        model.zero_grad()
        sum(terms.values()).backward()
        for optimizer in tuned:
            optimizer.step()
    last = {k: float(v.detach()) for k, v in terms.items()}
    assert all(last[k] < 0.7 * first[k] for k in last), (first, last)


def test_flava_begins_with_the_blocks_of_the_shipped_vilt():
    """Its first blocks are the two encoders', the third is the fusion encoder's; the types are added up."""
    made = FlavaRecipe(replace(FlavaRecipe.presets["cpu"], codes=4), {"model": "flava"})
    vilt, model = load_trained(None, "vilt"), made.model
    assert made.tokenizer.tokens == vilt.tokenizer.tokens
    mine, theirs = model.state_dict(), vilt.model.state_dict()
    for ours, block in (("image.blocks.1", 1), ("text.blocks.0", 0), ("fusion.blocks.0", 2)):
        for name, tensor in mine.items():
            if name.startswith(ours):
                assert torch.equal(tensor, theirs[name.replace(ours, f"encoder.blocks.{block}")])
    scenes = [Scenes(EMOJIVL, made.nouns, canvas=48, seed=3)[i] for i in range(2)]
    words, _, mask = map(torch.from_numpy, made.tokenizer.batch([scene.caption for scene in scenes]))
    inputs = []
    model.image.blocks[0].register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    model.text.blocks[0].register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    model.image_states(scene_pixels(scenes)), model.text_states(words, mask)
    assert torch.allclose(inputs[0], vilt.model.embed_image(scene_pixels(scenes))[0], atol=1e-5)
    assert torch.allclose(inputs[1], vilt.model.embed_text(words, mask), atol=1e-5)


def test_maskvlm_looks_across_as_the_shipped_vilt_looks_at_all():
    made = MaskVlmRecipe(MaskVlmRecipe.presets["cpu"], {"model": "maskvlm"})
    mine, theirs = made.model.state_dict(), load_trained(None, "vilt").model.state_dict()
    qkv = theirs["encoder.blocks.2.qkv.weight"]
    for stack in ("image_cross", "text_cross", "decoder"):
        before = f"{stack}.blocks.0."
        assert torch.equal(mine[before + "qkv.weight"], qkv)
        assert torch.equal(torch.cat([mine[before + "q.weight"], mine[before + "kv.weight"]]), qkv)
        for name in ("proj_cross.bias", "proj.bias"):
            assert torch.equal(mine[before + name], theirs["encoder.blocks.2.proj.bias"])
        for name in ("norm_cross.weight", "norm1.weight"):
            assert torch.equal(mine[before + name], theirs["encoder.blocks.2.norm1.weight"])


@both_runs
def test_a_run_that_stops_ends_in_the_same_weights(name, tmp_path):
    def finished(folder, stop=None):
        run = Run.resume(folder) if (folder / "checkpoint.pt").exists() else Run.begin(folder, {"train": {}})
        made = recipe(name, steps=5, save_every=2, batch=6)
        made.check = lambda model: {}

        def until(step):
            if step == stop:
                raise KeyboardInterrupt
            return made.batches(step)

        made.batch = until
        list(steps(made, run))
        return run.load()["model"]

    expected = finished(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finished(tmp_path / "cut", stop=4)
    assert equal(finished(tmp_path / "cut"), expected)


# What a caption is worth


def test_patches_are_hidden_to_the_exact_share():
    hidden = hide_rows([0.3, 0.85, 1.0], 6, np.random.default_rng(0))
    assert hidden.dtype == torch.bool and hidden.sum(1).tolist() == [11, 31, 36]


def test_the_mean_and_its_clustered_interval_by_a_slow_loop():
    values, clusters = np.array([1.0, 2.0, 4.0, 9.0, 5.0]), ["a", "a", "b", "c", "c"]
    found = mean_of(values, clusters)
    sums = [sum(v - 4.2 for v, c in zip(values, clusters, strict=True) if c == one) for one in "abc"]
    reach = 1.96 * np.sqrt(3 / 2 * sum(s**2 for s in sums)) / 5
    assert found["value"] == pytest.approx(4.2) and found["high"] - 4.2 == pytest.approx(reach)
    assert found["low"] + found["high"] == pytest.approx(8.4) and found["clusters"] == 3


def test_the_gain_is_what_the_own_caption_saves_and_another_costs():
    """A cost that is known: 1 nat a hidden patch, half of it with the own caption, 3 with another's."""
    made = recipe("flava")
    known = {}
    for split in ("seen_artists", "unseen_artists"):
        scenes = Scenes(EMOJIVL, made.nouns, getattr(EMOJIVL, split), 48, pairs="held_out", seed=1)
        for scene in (scenes[i] for i in range(20)):
            ids = made.tokenizer.batch([scene.caption])[0][0]
            known[scene_pixels([scene]).numpy().tobytes()] = ids[ids != made.tokenizer.pad_id].tolist()

    def cost(pixels, hidden, ids, mask):
        rate = []
        for one, row, real in zip(pixels, ids, mask, strict=True):
            own = known[one[None].numpy().tobytes()]
            rate.append(1.0 if real.sum() == 2 else 0.5 if row[real].tolist() == own else 3.0)
        return hidden.sum(1) * torch.tensor(rate)

    told = []
    what = (made.tokenizer, EMOJIVL, made.nouns, 48, 8, 20, 1, lambda *now: told.append(now))
    results = evaluate_hidden(cost, *what)
    assert told[-1] == (160, 160) and set(results["seen"]) == {"gain_30", "gain_60", "gain_85", "gain_100"}
    for split in ("seen", "unseen"):
        for share, (name, found) in zip(SHARES, results["details"][split].items(), strict=True):
            n = round(36 * share)
            assert results[split][name] == found["value"] == found["low"] == 0.5 * n
            assert (found["own"], found["none"], found["other"]) == (0.5 * n, n, 3 * n)
    report = report_hidden(results, "nats")
    assert "| hidden: 85 % | 15.500 | 15.500 to 15.500 | 15.500 | 31.000 | 93.000 |" in report
    with pytest.raises(ValueError, match="items must be at least 2"):
        evaluate_hidden(cost, *what[:5], 1, *what[6:])


@both
def test_a_cost_is_of_hidden_patches_alone_and_of_the_text_that_is_read(name):
    made = recipe(name)
    scenes = [Scenes(EMOJIVL, made.nouns, canvas=48, seed=4)[i] for i in range(3)]
    texts, hidden = [scene.caption for scene in scenes], hide_rows([0.5] * 3, 6, np.random.default_rng(0))
    for parameter in made.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    own = costs(made.cost(made.model), made.tokenizer, scenes, texts, hidden)
    other = costs(made.cost(made.model), made.tokenizer, scenes, texts[::-1], hidden)
    assert own.shape == (3,) and (own > 0).all() and own[0] != other[0] and own[1] == pytest.approx(other[1])
    pixels = scene_pixels(scenes)
    ids, _, mask = map(torch.from_numpy, made.tokenizer.batch(texts))
    with torch.inference_mode():
        model, slow = made.model, 0.0
        if name == "flava":
            log_p, codes = model.filled(pixels, hidden, ids, mask).log_softmax(-1), model.codes(pixels)
            for n in hidden[0].nonzero()[:, 0]:
                slow -= float(log_p[0, n, codes[0, n]])
        else:
            image, text = model.image_states(pixels, hidden), model.text_states(ids, mask)
            wrong = 127.5 * (model.fill(image, text, mask) - to_patches(pixels, 8)).abs()
            slow = float(wrong[0, hidden[0]].mean())
    assert own[0] == pytest.approx(slow, rel=1e-4)


# The command line


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


def refused(capsys, code: int, message: str) -> None:
    err = capsys.readouterr().err
    assert code == 2 and SENTENCE.fullmatch(err) and message in err


@both_runs
def test_a_run_leaves_its_results(name, command, tmp_path):
    folder = trained(name)
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "report.md", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names | {
        "filled.png", f"{name}_tiny.safetensors", f"{name}_tiny.json",
    }  # fmt: skip
    results = json.loads((folder / "eval.json").read_text())
    assert {"gain_30", "gain_85", "gain_100"} <= set(results["unseen"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"contrast", "itm", "gain_85", "found"} <= set(records[-1])
    small, run = load_trained(folder / f"{name}_tiny.safetensors"), load_trained(folder)
    rounded = {key: tensor.half().float() for key, tensor in run.model.state_dict().items()}
    assert equal(rounded, small.model.state_dict()) and small.kind == name
    assert command("eval", "--run", folder, "--items", 16, "--out", tmp_path / "again.json") == 0
    assert json.loads((tmp_path / "again.json").read_text()) == results


@both_runs
def test_the_demo_fills_in_pictures(name, command, tmp_path, capsys):
    assert command("demo", "A dog left of a guitar", "--run", trained(name), "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "85% of their patches hidden" in out and (tmp_path / "demo.png").stat().st_size > 1000
    code = command("demo", "a dog", "--run", trained(name), "--out", tmp_path)
    refused(capsys, code, 'caption must be of two objects, as "a dog left of a guitar"')
    code = command("demo", "a zebra", "--run", trained(name), "--out", tmp_path)
    refused(capsys, code, "caption must be made of words the model has read")


@pytest.mark.parametrize(
    "model, without, message",
    [
        ("flava", "boxes", "--without must be unpaired for this model, got boxes"),
        ("maskvlm", "unpaired", "--without must be turns for this model, got unpaired"),
        ("xvlm", "turns", "--without must be boxes or regions for this model, got turns"),
        (
            "clip",
            "turns",
            "maskvlm or bridge, and no --task, got clip",
        ),
    ],
)
def test_an_ablation_of_another_model_is_refused(model, without, message, command, tmp_path, capsys):
    flags = ("--model", model, "--without", without, "--name", tmp_path / "run")
    refused(capsys, command("train", *flags), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, without", [("flava", "unpaired"), ("maskvlm", "turns")])
def test_a_run_without_a_part(name, without, command, tmp_path):
    folder = tmp_path / "run"
    assert command("train", "--model", name, "--without", without, "--name", folder, "--items", 8) == 0
    settings = json.loads((folder / "config.json").read_text())
    assert settings["without"] == without and not settings["train"][without]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not any({"mim", "mlm"} <= set(record) for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["rename 2", "written 3", "logged 4"])
@both
def test_a_killed_run_resumes_to_the_same_weights(name, kill, command, tmp_path):
    folder = tmp_path / name
    flags = ("train", "--name", folder, "--items", 16)
    started = ("-m", "tests.tiny", *flags, "--model", name, "--threads", 1)
    victim = process(*started, cwd=tmp_path, kill=kill)
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    assert command(*flags, "--resume") == 0
    assert equal(load_trained(folder).model.state_dict(), load_trained(trained(name)).model.state_dict())
    assert json.loads((folder / "eval.json").read_text()) == json.loads(
        (trained(name) / "eval.json").read_text()
    )
