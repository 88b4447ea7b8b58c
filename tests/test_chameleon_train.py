"""Training a Chameleon: what a step sees, its loss, what a run leaves, draws, writes and refuses."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minivlp.data import CPU_NOUNS, Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import true_captions
from minivlp.evaluation import chameleon as evaluation
from minivlp.mlm import mlm_loss
from minivlp.models.chameleon import Chameleon
from minivlp.recipes.base import load_trained
from minivlp.recipes.chameleon import ChameleonRecipe, ChameleonSettings
from minivlp.targets import next_words
from minivlp.training.loop import optimizers
from tests.test_cli import SENTENCE, process, same_run
from tests.test_train import equal
from tests.tiny import CHAMELEON_SIZES, commands_with, trained

CONFIG = replace(ChameleonSettings(), **CHAMELEON_SIZES)


@pytest.fixture(scope="module")
def recipe() -> ChameleonRecipe:
    return ChameleonRecipe(CONFIG)


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


def refused(capsys, code: int, message: str) -> None:
    err = capsys.readouterr().err
    assert code == 2 and SENTENCE.fullmatch(err) and message in err


# What a step sees, and its loss


def test_batches_depend_on_seed_and_step_alone(recipe):
    (one,), (again,), (other,) = recipe.batch(3), ChameleonRecipe(CONFIG).batch(3), recipe.batch(4)
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(again).values(), strict=True))
    assert not torch.equal(one.pixels, other.pixels)
    assert int(one.image_first.sum()) == round(0.4 * CONFIG.batch)
    texts = [recipe.tokenizer.decode(ids[mask]) for ids, mask in zip(one.text, one.text_mask, strict=True)]
    scenes = [recipe._scenes[3 * CONFIG.batch + i] for i in range(CONFIG.batch)]
    assert texts == [scene.caption for scene in scenes]


def test_the_terms_are_cross_entropies_of_words_and_of_codes(recipe):
    """By the loss of masked words, on each kind of label alone."""
    model, (b,) = recipe.model, recipe.batch(0)
    terms = recipe.loss(model, [b])
    image, c = model.tokenise(b.pixels), model.config
    states = model.encode(b.text, b.text_mask, image, b.image_first).flatten(0, 1)
    words = next_words(b.text, b.text_mask)
    nothing = torch.full((len(words), 1), -100)
    zero, none = torch.zeros(c.vocab_size), torch.full((len(words), 37), -100)
    for name, labels in (
        ("words", torch.cat([words, none], 1)),
        ("codes", torch.cat([words * 0 - 100, image, nothing], 1)),
    ):
        wanted = mlm_loss(states, model.head.weight, zero, labels.flatten())
        torch.testing.assert_close(terms[name], (0.5 if name == "words" else 1) * wanted)
    told = torch.cat([words, image, nothing], 1).flatten() != -100
    z = model.scores(states[told]).logsumexp(1)
    torch.testing.assert_close(terms["z"], CONFIG.z_weight * z.square().mean())


def test_every_parameter_gets_a_gradient_and_matrices_are_muons(recipe):
    model = ChameleonRecipe(CONFIG).model
    sum(recipe.loss(model, recipe.batch(0)).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    muon, adam = optimizers(model, recipe.matrices(model), CONFIG)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    ends = {name.split(".", 2)[2] for name in taken}
    assert ends == {"qkv.weight", "proj.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"}
    assert len(taken) + sum(len(group["params"]) for group in adam.param_groups) == len(names)


def test_the_codes_are_the_seeds(recipe):
    """The same again, whatever was drawn before; another seed, other codes; all are used."""
    again, other = ChameleonRecipe(CONFIG).model, ChameleonRecipe(replace(CONFIG, seed=1)).model
    assert torch.equal(ChameleonRecipe(CONFIG).model.codebook, again.codebook)
    assert equal(dict(again.state_dict()), dict(ChameleonRecipe(CONFIG).model.state_dict()))
    assert not torch.equal(other.codebook, again.codebook)
    ids = again.tokenise(torch.cat([recipe.batch(step)[0].pixels for step in range(8)]))
    assert len(ids.unique()) == CONFIG.codes


@pytest.mark.slow
def test_two_hundred_and_fifty_six_codes_keep_the_pictures():
    recipe = ChameleonRecipe(ChameleonSettings())
    for artists in (None, recipe.emojivl.unseen_artists):
        scenes = Scenes(recipe.emojivl, recipe.nouns, artists, pairs="held_out", seed=1)
        assert evaluation.psnr(recipe.model, scene_pixels([scenes[i] for i in range(200)])) >= 21.5


# What it measures


def test_nats_are_a_chain_of_conditional_probabilities(recipe):
    """Each kind alone sums to one; the four orders of a batch are read row by row."""
    model, (b,) = recipe.model, recipe.batch(0)
    image = model.tokenise(b.pixels)
    with torch.no_grad():
        told = model.nats(b.text, b.text_mask, image, b.image_first)
        states = model.encode(b.text, b.text_mask, image, b.image_first)
    row, begin, L = 2, model.config.begin, b.text.shape[1]
    scores = model.scores(states[row])
    n = int(b.text_mask[row].sum())
    words = sum(-scores[i, :begin].log_softmax(0)[b.text[row, i + 1]] for i in range(n - 1))
    codes = sum(-scores[L + i, begin + 1 :].log_softmax(0)[image[row, i] - begin - 1] for i in range(36))
    torch.testing.assert_close(told[row], torch.stack([words, codes]))


def test_scores_of_a_set_do_not_depend_on_its_order(recipe):
    scenes = [recipe._scenes[i] for i in range(6)]
    captions, pixels = [scene.caption for scene in scenes], scene_pixels(scenes)
    for first in (True, False):
        one = evaluation.nats(recipe.model, recipe.tokenizer, captions, pixels, first)
        two = evaluation.nats(recipe.model, recipe.tokenizer, captions[::-1], pixels.flip(0), first)
        np.testing.assert_allclose(one, two[::-1], rtol=1e-5)


def test_both_sentences_about_a_pair_are_true_of_it():
    emojivl = load_emojivl()
    for i in range(8):
        scene = Scenes(emojivl, emojivl.nouns(CPU_NOUNS))[i]
        both = true_captions(scene)
        assert scene.caption in both and len(both) == 2
        (other,) = both - {scene.caption}
        first, second = scene.slots
        assert other.startswith(second) and other.endswith(first)


# What a run leaves


def test_a_run_leaves_its_results():
    folder = trained("chameleon")
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "report.md", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names | {
        "drawings.png", "chameleon_tiny.safetensors", "chameleon_tiny.json",
    }  # fmt: skip
    results = json.loads((folder / "eval.json").read_text())
    assert set(evaluation.NAMES) == set(results["seen"]) == set(results["unseen"])
    assert {"caption", "code", "psnr"} <= set(results["details"]["nats"]["seen"])
    assert "nats a caption with its picture" in (folder / "report.md").read_text()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"words", "codes", "z", "order_written", "order_drawn"} <= set(records[-1])
    small = load_trained(folder / "chameleon_tiny.safetensors")
    assert equal(load_trained(folder).model.state_dict(), small.model.state_dict())
    assert isinstance(small.model, Chameleon) and small.kind == "chameleon"


def test_it_is_measured_and_drawn_again(command, tmp_path):
    shutil.copytree(trained("chameleon"), tmp_path / "run")
    drawn = (tmp_path / "run" / "drawings.png").read_bytes()
    (tmp_path / "run" / "drawings.png").unlink()
    assert command("eval", "--run", tmp_path / "run", "--items", 16, "--out", tmp_path / "again.json") == 0
    again, first = (json.loads(p.read_text()) for p in (tmp_path / "again.json", tmp_path / "run/eval.json"))
    assert again == first
    assert command("figures", "--run", tmp_path / "run") == 0
    assert (tmp_path / "run" / "drawings.png").read_bytes() == drawn


def test_the_demo_draws_a_sentence_and_reads_its_drawings(command, tmp_path, capsys):
    run = trained("chameleon")
    assert command("demo", "A dog left of a guitar", "--run", run, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "12 drawings, and how the model itself reads them:" in out and "wrote" in out
    assert (tmp_path / "demo.png").stat().st_size > 1000


def test_the_demo_writes_about_a_picture(command, tmp_path, capsys):
    Image.new("RGBA", (90, 70), (200, 30, 30, 128)).save(tmp_path / "some.png")
    assert command("demo", tmp_path / "some.png", "--run", trained("chameleon"), "--out", tmp_path) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("the likeliest: ") and len(out) == 5
    assert not (tmp_path / "demo.png").exists()


def test_other_queries_are_refused(command, tmp_path, capsys):
    run, flags = trained("chameleon"), ("--out", tmp_path)
    refused(capsys, command("demo", "a zebra", "--run", run, *flags), "caption must be made of words")
    refused(
        capsys, command("demo", "a dog " * 9, "--run", run, *flags), "texts must fit the model's 16 tokens"
    )
    (tmp_path / "no.png").write_text("no picture")
    refused(
        capsys,
        command("demo", tmp_path / "no.png", "--run", run, *flags),
        "a sentence or a file with a picture",
    )
    for flag, value in (("--without", "boxes"), ("--preset", "gpu"), ("--language", "zh")):
        code = command("train", "--model", "chameleon", "--name", tmp_path / "run", flag, value)
        refused(capsys, code, flag)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(command, tmp_path):
    flags = ("train", "--model", "chameleon", "--name", tmp_path / "run", "--items", 16)
    victim = process("-m", "tests.tiny", *flags, "--threads", 1, cwd=tmp_path, kill="chameleon 7")
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    assert load_trained(tmp_path / "run").step == 4
    assert command("train", "--resume", "--name", tmp_path / "run", "--items", 16) == 0
    assert same_run(tmp_path / "run", trained("chameleon"))
