"""A denoiser: what it sees, what its numbers mean, its training, and what a run leaves, draws and refuses."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from minivlp.data import scene_pixels
from minivlp.diffusion import deviation, errors, even_levels, noisy
from minivlp.diffusion import signal as signal_of
from minivlp.evaluation import denoiser as evaluation
from minivlp.models.denoiser import Denoiser, DenoiserConfig, small_init
from minivlp.recipes.base import load_trained
from minivlp.recipes.denoiser import DenoiserRecipe, DenoiserSettings
from minivlp.training.loop import optimizers
from tests.test_cli import SENTENCE, process, same_run
from tests.test_train import equal
from tests.tiny import DENOISER_SIZES, commands_with, trained

CONFIG = replace(DenoiserSettings(), **DENOISER_SIZES)
SIZES = dict(vocab_size=20, max_text_len=5, image_size=8, patch=4, dim=16, layers=2, heads=2, hidden=32)


@pytest.fixture(scope="module")
def recipe() -> DenoiserRecipe:
    return DenoiserRecipe(CONFIG)


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


def refused(capsys, code: int, message: str) -> None:
    err = capsys.readouterr().err
    assert code == 2 and SENTENCE.fullmatch(err) and message in err


# The model


def tiny() -> Denoiser:
    """A small model whose parameters all matter: near 0, where they start, mistakes hide."""
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(**SIZES)).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.2
    return model.double().requires_grad_(False)


def case():
    """Noisy pictures, levels, and texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    ids = torch.randint(1, 20, (3, 5), generator=generator) * mask
    return x, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), ids, mask


def test_what_it_gives_is_the_noise_that_belongs_to_v():
    """v = signal · ε − deviation · x of the picture that ε̂ implies: with v̂ = 0, x̂ = signal · x_t."""
    x_t, level, ids, mask = case()
    still = small_init(Denoiser(DenoiserConfig(**SIZES)).double())
    found = still(x_t, level, ids, mask)
    t = level.view(-1, 1, 1, 1)
    torch.testing.assert_close((x_t - deviation(t) * found) / signal_of(t), signal_of(t) * x_t)
    model = tiny()
    found = model(x_t, level, ids, mask)
    picture = (x_t - deviation(t) * found) / signal_of(t)
    v = signal_of(t) * found - deviation(t) * picture
    torch.testing.assert_close(found, deviation(t) * x_t + signal_of(t) * v)
    torch.testing.assert_close(model(x_t, torch.ones(3).double(), ids, mask), x_t)  # all of it is noise


def test_every_patch_sees_every_patch_and_every_word_but_no_padding():
    model, (x_t, level, ids, mask) = tiny(), case()
    found = model(x_t, level, ids, mask)
    torch.testing.assert_close(model(x_t, level, ids + 3 * ~mask, mask), found, rtol=0, atol=0)
    for word in range(3):  # of the second text
        other = ids.clone()
        other[1, word] = (ids[1, word] + 1) % 20
        changed = (model(x_t, level, other, mask) - found).abs().amax((1,)).view(3, 2, 4, 2, 4).amax((2, 4))
        assert (changed[1] > 1e-6).all() and not changed[[0, 2]].any()
    other = x_t.clone()
    other[0, :, 0, 0] += 1
    moved = (model(other, level, ids, mask) - found).abs().amax(1).view(3, 2, 4, 2, 4).amax((2, 4))
    assert (moved[0] > 1e-6).all() and not moved[1:].any()


def test_level_and_order_of_the_words_matter():
    model, (x_t, level, ids, mask) = tiny(), case()
    found = model(x_t, level, ids, mask)
    back = ids.clone()
    back[0] = ids[0].flip(0)
    assert (model(x_t, level, back, mask) - found)[0].abs().max() > 1e-3
    # At two levels the same x_t means other noise beyond what the two factors say.
    half = torch.full((3,), 0.5, dtype=torch.float64)
    v = [
        (model(x_t, t, ids, mask) - deviation(t).view(-1, 1, 1, 1) * x_t) / signal_of(t).view(-1, 1, 1, 1)
        for t in (half, half / 2)
    ]
    assert (v[0] - v[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x_t=torch.zeros(3, 3, 12, 12)), "x_t must be 8 × 8"),
        (dict(x_t=torch.full((3, 3, 8, 8), torch.nan)), "pixels must"),
        (dict(level=torch.tensor([0.0, 0.5, 1.5])), "level must lie in"),
        (dict(level=torch.zeros(2)), "level must have shape"),
        (dict(ids=torch.full((3, 5), 20)), "ids must lie in"),
        (dict(text_mask=torch.zeros(3, 5, dtype=torch.bool)), "text_mask must"),
    ],
)
def test_refuses_what_it_cannot_read(change, message):
    model = tiny().float()
    x_t, level, ids, mask = case()
    good = dict(x_t=x_t.float(), level=level.float(), ids=ids, text_mask=mask)
    model(**good)
    with pytest.raises(ValueError, match=message):
        model(**good | change)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch=5"):
        DenoiserConfig(patch=5)


# What a step sees, and its loss


def test_batches_depend_on_seed_and_step_alone(recipe):
    (one,), (again,), (other,) = recipe.batch(3), DenoiserRecipe(CONFIG).batch(3), recipe.batch(4)
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(again).values(), strict=True))
    assert not torch.equal(one.pixels, other.pixels) and not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise, DenoiserRecipe(replace(CONFIG, seed=1)).batch(3)[0].noise)


def test_every_kind_of_row_meets_every_level(recipe):
    """Squares of levels are even over a batch, and those of single drawings, the last rows, are no others."""
    batches = [recipe.batch(step)[0] for step in range(40)]
    B = CONFIG.batch
    for batch in batches:
        assert (batch.level.double().square() * B).floor().long().sort().values.tolist() == list(range(B))
    singles = torch.cat([batch.level[-round(CONFIG.single * B) :] for batch in batches])
    assert abs(float(singles.mean()) - 2 / 3) < 0.1 and singles.std() > 0.15


def test_most_rows_are_told_what_they_show(recipe):
    texts = [
        recipe.tokenizer.decode(ids[mask])
        for step in range(20)
        for (b,) in [recipe.batch(step)]
        for ids, mask in zip(b.ids, b.text_mask, strict=True)
    ]
    B, singles = CONFIG.batch, round(CONFIG.single * CONFIG.batch)
    empty = np.mean([text == "" for text in texts])
    assert 0.04 < empty < 0.2
    names = {evaluation.alone(noun) for noun in recipe.nouns}
    for i, text in enumerate(texts):
        kind = i % B >= B - singles
        assert not text or (text in names) == kind


def test_the_loss_is_that_of_v(recipe):
    """Where the signal is not faint, |ε̂ − ε| = signal · |v̂ − v|."""
    model, (b,) = tiny_of(recipe), recipe.batch(0)
    b = replace(b, level=b.level * 0.9)
    t = b.level.view(-1, 1, 1, 1)
    x_t = signal_of(t) * b.pixels + deviation(t) * b.noise
    found = (model(x_t, b.level, b.ids, b.text_mask) - deviation(t) * x_t) / signal_of(t)
    v = signal_of(t) * b.noise - deviation(t) * b.pixels
    torch.testing.assert_close(recipe.loss(model, [b])["noise"], (found - v).square().mean())


def tiny_of(recipe) -> Denoiser:
    model = DenoiserRecipe(recipe.settings).model
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    return model


def test_every_parameter_gets_a_gradient_and_matrices_are_muons(recipe):
    model = tiny_of(recipe)
    sum(recipe.loss(model, recipe.batch(0)).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    muon, adam = optimizers(model, recipe.matrices(model), CONFIG)
    assert sum(len(group["params"]) for group in muon.param_groups) == 4 * CONFIG.layers
    total = sum(len(group["params"]) for tuned in (muon, adam) for group in tuned.param_groups)
    assert total == len(list(model.parameters()))


# What it measures


def test_captions_of_a_picture_share_their_noises(recipe):
    """By `diffusion.errors` of one picture at a time; the same caption twice ties exactly."""
    model, scenes = tiny_of(recipe), [recipe._scenes[i] for i in range(3)]
    captions = [[s.caption, "a dog", s.caption] for s in scenes]
    pixels = scene_pixels(scenes)
    told = evaluation.caption_errors(model, recipe.tokenizer, captions, pixels, T=2, seed=3)
    assert (told[:, 0] == told[:, 2]).all() and (told[:, 0] != told[:, 1]).all()
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((2, *pixels.shape), np.float32))
    for i, texts in enumerate(captions):
        ids, _, mask = recipe.tokenizer.batch(texts)
        given = model.given(torch.from_numpy(ids), torch.from_numpy(mask))
        with torch.no_grad():
            wanted = errors(given, pixels[i : i + 1], torch.arange(3), even_levels(2), noise[:, i : i + 1])
        np.testing.assert_allclose(told[i], wanted[0], rtol=1e-5)


def test_drawing_with_the_true_noise_finds_the_picture(recipe):
    """A model that knows the picture leads every start to it, with the caption's picture guided beyond."""
    image = torch.linspace(-0.9, 0.9, 3 * CONFIG.canvas**2).view(1, 3, CONFIG.canvas, CONFIG.canvas)

    class Knows:
        config = recipe.model.config
        parameters = recipe.model.parameters

        def given(self, ids, mask):
            def guess(x_t, level, c):
                t = level.view(-1, 1, 1, 1)
                picture = torch.where((c == 0).view(-1, 1, 1, 1), image, image / 2)  # 1 is no caption
                return (x_t - signal_of(t) * picture) / deviation(t)

            return guess

    rng = np.random.default_rng(0)
    for guidance, wanted in ((1.0, image), (0.0, image / 2), (2.0, (1.5 * image).clamp(-1, 1))):
        found = evaluation.draw(Knows(), recipe.tokenizer, "a dog", 2, rng, steps=10, guidance=guidance)
        torch.testing.assert_close(found, wanted.expand(2, -1, -1, -1), rtol=0, atol=1e-4)


def test_no_level_is_drowned_before_it_is_seen():
    x, noise = torch.ones(1, 2), torch.full((1, 2), 3.0)
    assert torch.equal(noisy(x, noise, torch.zeros(1)), x)


# What a run leaves


def test_a_run_leaves_its_results():
    folder = trained("denoiser")
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "report.md", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names | {
        "drawings.png", "denoiser_tiny.safetensors", "denoiser_tiny.json",
    }  # fmt: skip
    results = json.loads((folder / "eval.json").read_text())
    assert set(evaluation.NAMES) == set(results["seen"]) == set(results["unseen"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"noise", "order", "named"} <= set(records[-1])
    small = load_trained(folder / "denoiser_tiny.safetensors")
    assert equal(load_trained(folder).model.state_dict(), small.model.state_dict())
    assert isinstance(small.model, Denoiser) and small.kind == "denoiser"


def test_it_is_measured_and_drawn_again(command, tmp_path):
    shutil.copytree(trained("denoiser"), tmp_path / "run")
    drawn = (tmp_path / "run" / "drawings.png").read_bytes()
    (tmp_path / "run" / "drawings.png").unlink()
    assert command("eval", "--run", tmp_path / "run", "--items", 16, "--out", tmp_path / "again.json") == 0
    again, first = (json.loads(p.read_text()) for p in (tmp_path / "again.json", tmp_path / "run/eval.json"))
    assert again == first
    assert command("figures", "--run", tmp_path / "run") == 0
    assert (tmp_path / "run" / "drawings.png").read_bytes() == drawn


def test_the_demo_draws_a_sentence(command, tmp_path, capsys):
    run = trained("denoiser")
    assert command("demo", "A dog left of a guitar", "--run", run, "--out", tmp_path) == 0
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "demo.png").stat().st_size > 1000


def test_other_queries_are_refused(command, tmp_path, capsys):
    run, flags = trained("denoiser"), ("--out", tmp_path)
    refused(capsys, command("demo", "a zebra", "--run", run, *flags), "caption must be made of words")
    refused(capsys, command("demo", "a dog " * 9, "--run", run, *flags), "texts must fit the model's 16")
    for flag, value in (("--without", "boxes"), ("--preset", "gpu"), ("--language", "zh")):
        code = command("train", "--model", "denoiser", "--name", tmp_path / "run", flag, value)
        refused(capsys, code, flag)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(command, tmp_path):
    flags = ("train", "--model", "denoiser", "--name", tmp_path / "run", "--items", 16)
    victim = process("-m", "tests.tiny", *flags, "--threads", 1, cwd=tmp_path, kill="denoiser 7")
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    assert load_trained(tmp_path / "run").step == 4
    assert command("train", "--resume", "--name", tmp_path / "run", "--items", 16) == 0
    assert same_run(tmp_path / "run", trained("denoiser"))
