"""CoCa's recipe and commands: no false partners, the two terms, a blind control, what a run leaves."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from minivlp.data import load_emojivl
from minivlp.data.probes import meaning, true_captions
from minivlp.data.scenes import Scenes
from minivlp.evaluation.captions import FLOOR, blind_nats, evaluate_captions, named_objects
from minivlp.models.coca import Captioner
from minivlp.recipes.base import load_trained, recipe_of
from minivlp.recipes.coca import CocaRecipe, CocaSettings, CocaWriter
from tests.test_cli import SENTENCE, process
from tests.test_train import equal
from tests.tiny import COCA_SIZES, commands_with, trained

EMOJIVL = load_emojivl()


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


def recipe(**changes) -> CocaRecipe:
    return CocaRecipe(CocaSettings(**COCA_SIZES | changes), {"model": "coca"})


def scenes(n: int, pairs: str = "held_out") -> list:
    source = Scenes(EMOJIVL, canvas=48, pairs=pairs, seed=3)
    return [source[i] for i in range(n)]


def test_a_batch_has_the_next_words_and_no_false_partner():
    mine = recipe(batch=300)
    (batch,) = mine.batch(5)
    assert batch.labels.shape == batch.ids.shape == batch.text_mask.shape
    for ids, mask, labels in zip(batch.ids, batch.text_mask, batch.labels, strict=True):
        n = int(mask.sum())
        assert labels[: n - 1].tolist() == ids[1:n].tolist() and (labels[n - 1 :] == -100).all()
        assert ids[0] == mine.tokenizer.cls_id and ids[n - 1] == mine.tokenizer.sep_id
    source = Scenes(EMOJIVL, mine.nouns, canvas=48, seed=0)
    meanings = [meaning(source[5 * 300 + i]) for i in range(300)]
    kept = [m for m, row in zip(meanings, batch.contrast, strict=True) if row]
    assert len(set(kept)) == len(kept) == len(set(meanings)) < 300


@pytest.mark.parametrize(
    "without, terms", [(None, {"contrast", "caption"}), ("contrast", {"caption"}), ("captions", {"contrast"})]
)
def test_the_terms_are_those_of_the_flags(without, terms):
    flags = {"without": without} if without else {}
    settings = CocaRecipe.begin(flags)
    mine = recipe(**{k: v for k, v in settings["train"].items() if k.endswith("_weight")})
    found = mine.loss(mine.model, mine.batch(0))
    assert set(found) == terms and all(torch.isfinite(term) for term in found.values())
    assert bool(mine.controls()) == (without != "captions")


def test_a_blind_model_is_told_nothing_by_pictures():
    mine = recipe()
    blind = CocaRecipe(mine.settings, {"model": "coca", "blind": True})
    a, b = scenes(4), scenes(8)[4:]
    assert torch.equal(blind.pixels(a), blind.pixels(b)) and not torch.equal(mine.pixels(a), mine.pixels(b))
    captions = [scene.caption for scene in a]
    of = CocaWriter(blind, mine.model.eval())
    assert np.array_equal(of.log_p(captions, a), of.log_p(captions, b))
    assert set(blind.loss(blind.model, blind.batch(0))) == {"caption"} and not blind.controls()


def test_log_p_is_the_sum_over_words_and_decode_agrees():
    mine = recipe()
    writer, (scene,) = CocaWriter(mine, mine.model.eval()), scenes(1)
    _, tokens = mine.model.encode_image(mine.pixels([scene]))
    words = writer.words(scene.caption, tokens)
    assert [w for w, _ in words][-1] == "[SEP]"
    assert sum(v for _, v in words) == pytest.approx(writer.log_p([scene.caption], [scene])[0], abs=1e-4)
    ((greedy, log_p),) = writer.sentences(tokens)
    ((_, best_p),) = writer.sentences(tokens, beams=6)
    assert best_p >= log_p - 1e-6 and writer.write([scene]) == [greedy]
    assert writer.sentences(tokens, rng=np.random.default_rng(1)) == writer.sentences(
        tokens, rng=np.random.default_rng(1)
    )


def test_beams_keep_their_own_pictures():
    """Two pictures at once are written as each alone."""
    mine = recipe()
    torch.manual_seed(3)
    for parameter in mine.model.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.2
    writer = CocaWriter(mine, mine.model.eval())
    _, tokens = mine.model.encode_image(mine.pixels(scenes(2)))
    both = writer.sentences(tokens.detach(), beams=3)
    alone = [writer.sentences(tokens[i : i + 1].detach(), beams=3)[0] for i in range(2)]
    assert [text for text, _ in both] == [text for text, _ in alone] and both[0][0] != both[1][0]
    assert [p for _, p in both] == pytest.approx([p for _, p in alone], abs=1e-4)
    scores, _ = Captioner(mine.model, tokens).next_scores(torch.zeros(6, 1, dtype=torch.long), None)
    assert scores.shape == (6, len(mine.tokenizer))


class Knows:
    """Says the caption, or the same in the other order; with `wrong`, with its nouns exchanged."""

    def __init__(self, wrong=False):
        self.wrong = wrong

    def log_p(self, captions, pictures):
        right = [c in true_captions(s) for c, s in zip(captions, pictures, strict=True)]
        return np.where(right, -FLOOR, -20.0)

    def write(self, pictures):
        order = -1 if self.wrong else 1
        return [s.frame.format(*s.slots[::order]) for s in pictures]


@pytest.mark.parametrize("wrong, true", [(False, 1.0), (True, 0.0)])
def test_one_who_knows_pays_the_floor(wrong, true):
    results = evaluate_captions(Knows(wrong), EMOJIVL, EMOJIVL.nouns(CocaSettings().nouns), 48, 20)
    assert results["seen"] == {"true": true, "objects": 1.0, "order": 1.0, "axis": 1.0}
    nats = results["details"]["nats"]["seen"]
    assert nats["own"] == pytest.approx(np.log(2)) and nats["ceiling"] == pytest.approx(np.log(2 * 55 * 4))


def test_entropies_of_captions_are_counted():
    """Against an enumeration of the grammar: pairs, which noun first, relation, all alike likely."""
    source = Scenes(EMOJIVL, EMOJIVL.nouns(CocaSettings().nouns), canvas=48)
    assert blind_nats(source) == pytest.approx(np.log(2 * 441 * 4)) == pytest.approx(8.168, abs=1e-3)
    first = np.array([len(source.partners(c.id)) for c in source.nouns]) / (2 * 441)
    second = float((first * np.log([len(source.partners(c.id)) for c in source.nouns])).sum())
    assert -(first * np.log(first)).sum() + second + np.log(4) == pytest.approx(blind_nats(source))


def test_both_orders_are_true_and_no_other():
    (scene,) = scenes(1)
    a, b = scene.slots
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.relation]
    assert true_captions(scene) == {f"{a} {scene.relation} {b}", f"{b} {back} {a}"}
    assert named_objects(f"{a} {back} {b}", scene) == 2 and named_objects(f"{a} of {a}", scene) == 1
    assert named_objects("doggy", scene) == 0


def test_a_run_leaves_its_results():
    folder = trained("coca")
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "report.md", "curves.png", "blind"}
    assert {path.name for path in folder.iterdir()} == names | {
        "captions.png", "coca_tiny.safetensors", "coca_tiny.json",
    }  # fmt: skip
    results = json.loads((folder / "eval.json").read_text())
    assert {"true", "order", "order_contrast", "first_of_64"} <= set(results["unseen"])
    assert {"training_pairs", "ceiling"} == set(results["details"]["blind"])
    assert "nats" in (folder / "report.md").read_text()
    run, small = load_trained(folder), load_trained(folder / "coca_tiny.safetensors")
    assert equal(run.model.state_dict(), small.model.state_dict()) and small.kind == "coca"
    blind = load_trained(folder / "blind")
    assert recipe_of(blind).blind and blind.step < run.step


def test_the_demo_writes_about_a_picture(command, tmp_path, capsys):
    Image.fromarray(scenes(1)[0].image).save(tmp_path / "picture.png")
    assert command("demo", tmp_path / "picture.png", "--run", trained("coca"), "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "log probability" in out and "[SEP]" in out and "beams" in out


@pytest.mark.parametrize("query", ["a dog left of a guitar", "/nowhere/picture.png"])
def test_the_demo_refuses_what_is_no_picture(query, command, tmp_path, capsys):
    code = command("demo", query, "--run", trained("coca"), "--out", tmp_path)
    err = capsys.readouterr().err
    assert code == 2 and SENTENCE.fullmatch(err) and "picture must be a file with a picture" in err


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["logged 2", "logged 5"])  # in the run, and in its blind control
def test_a_killed_run_resumes_to_the_same_weights(kill, command, tmp_path):
    flags = ("train", "--name", tmp_path / "coca", "--items", 16)
    started = ("-m", "tests.tiny", *flags, "--model", "coca", "--threads", 1)
    victim = process(*started, cwd=tmp_path, kill=kill)
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    assert command(*flags, "--resume") == 0
    for part in ("", "blind"):
        one, other = (load_trained(folder / part).model for folder in (tmp_path / "coca", trained("coca")))
        assert equal(one.state_dict(), other.state_dict())
    first, second = (json.loads((f / "eval.json").read_text()) for f in (tmp_path / "coca", trained("coca")))
    assert first == second
