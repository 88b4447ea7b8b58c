"""A new recipe is a small thing: forty lines beside a model, and it can do all that the command line does."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minivlp import recipes
from minivlp.__main__ import MODELS, main
from minivlp.data import CPU_NOUNS, Scenes, scene_pixels
from minivlp.recipes import RECIPES, recipe_class
from minivlp.recipes.base import Batch, Recipe, Settings, load_trained
from minivlp.training.loop import optimizers, steps
from minivlp.training.run import Run
from minivlp.training.workers import ONE_PROCESS
from tests.course import ROOT
from tests.test_repo import code_lines
from tests.tiny import (
    BRIDGE_SIZES,
    CHAMELEON_SIZES,
    COCA_SIZES,
    DENOISER_SIZES,
    DUAL_SIZES,
    FLAVA_SIZES,
    MASKVLM_SIZES,
    QFORMER_SIZES,
    SIZES,
    XVLM_SIZES,
)

# A model, and its recipe


@dataclass(frozen=True)
class GlanceConfig:
    image_size: int
    answers: int


class Glance(nn.Module):
    """Which object is in the picture? A linear map of all its pixels."""

    def __init__(self, config: GlanceConfig):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(3 * config.image_size**2, config.answers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.linear(pixels.flatten(1))


@dataclass(frozen=True)
class GlanceSettings(Settings):
    canvas: int = 24
    nouns: tuple[str, ...] = CPU_NOUNS[:4]
    vocab_size: int = 64
    steps: int = 80
    report_every: int = 20


@dataclass(frozen=True)
class Glances(Batch):
    pixels: Tensor  # (B, 3, H, W)
    answers: Tensor  # (B,)


class GlanceRecipe(Recipe):
    Settings, Config, Model = GlanceSettings, GlanceConfig, Glance
    presets = {"cpu": GlanceSettings()}  # noqa: RUF012
    terms = ("name",)
    chance = {"named": 1 / 4}  # noqa: RUF012

    def new_model(self):
        return Glance(GlanceConfig(self.settings.canvas, len(self.nouns)))

    def glances(self, seed: int, first: int, n: int) -> Glances:
        numbers = {concept.id: k for k, concept in enumerate(self.nouns)}
        scenes = Scenes(self.emojivl, self.nouns, canvas=self.settings.canvas, kinds={"one": 1}, seed=seed)
        drawn = [scenes[i] for i in range(first, first + n)]
        return Glances(scene_pixels(drawn), torch.tensor([numbers[s.objects[0]] for s in drawn]))

    def batch(self, step):
        return [self.glances(self.settings.seed, step * self.settings.batch, self.settings.batch)]

    def loss(self, model, batches, workers=ONE_PROCESS):
        return {"name": cross_entropy(model(batches[0].pixels), batches[0].answers)}

    def check(self, model, seed=1, items=64):
        asked = self.glances(seed, 0, items).to(next(model.parameters()).device)
        return {"named": float((model(asked.pixels).argmax(1) == asked.answers).float().mean())}

    def evaluate(self, trained, items, seed, progress):
        return {"seen": self.check(trained.model, seed, items), "details": {"items": items}}

    def report(self, results):
        return f"named {results['seen']['named']:.3f} of {results['details']['items']} pictures"

    def demo(self, trained, query, folder, device, screen):
        answers = torch.tensor([[c.noun for c in self.nouns].index(query)])
        screen.say(f"{query} is answer {int(answers)} of {trained.model.config.answers}")


# What it can do


@pytest.fixture
def glance(monkeypatch, tmp_path) -> Callable[..., int]:
    """`glance("train", …)` runs a command with the new recipe among the others, in an empty folder."""
    monkeypatch.setitem(RECIPES, "glance", f"{__name__}:GlanceRecipe")
    monkeypatch.setattr("minivlp.__main__.MODELS", (*MODELS, "glance"))
    monkeypatch.chdir(tmp_path)
    return lambda job, *flags: main([job, *map(str, flags), "--threads", "1"])


def test_a_recipe_has_at_most_forty_lines():
    parts = (GlanceSettings, Glances, GlanceRecipe)
    assert sum(code_lines(inspect.getsource(part)) for part in parts) <= 40


def test_a_new_recipe_trains_evaluates_draws_and_demonstrates(glance, tmp_path, capsys):
    folder = tmp_path / "runs" / "glance"
    assert glance("train", "--model", "glance", "--items", 200) == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [20, 40, 60, 80]
    assert records[-1]["name"] < 0.8 * records[0]["name"]
    results = json.loads((folder / "eval.json").read_text())
    assert results["seen"]["named"] > 0.5 and records[-1]["named"] > 0.5  # by chance 0.25
    report = f"named {results['seen']['named']:.3f} of 200 pictures"
    assert (folder / "report.md").read_text() == report and report in capsys.readouterr().out
    assert (folder / "curves.png").stat().st_size > 10_000

    assert glance("eval", "--run", folder, "--items", 200, "--out", "again.json") == 0
    assert json.loads((tmp_path / "again.json").read_text()) == results
    drawn = (folder / "curves.png").read_bytes()
    (folder / "curves.png").unlink()
    assert glance("figures", "--run", folder) == 0 and (folder / "curves.png").read_bytes() == drawn
    capsys.readouterr()
    for source in (("--run", folder / "glance_tiny.safetensors"), ("--model", "glance")):
        assert glance("demo", "guitar", *source) == 0
        assert capsys.readouterr().out == "guitar is answer 1 of 4\n"


def test_a_new_recipe_goes_on_as_if_it_had_not_stopped(glance, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GlanceRecipe, "presets", {"cpu": replace(GlanceSettings(), save_every=10)})
    assert glance("train", "--model", "glance", "--items", 4, "--name", "whole") == 0
    real = GlanceRecipe.batch

    def interrupted(self, step):
        if step == 17:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(GlanceRecipe, "batch", interrupted)
    assert glance("train", "--model", "glance", "--items", 4, "--name", "cut") == 130
    assert "go on with: python -m minivlp train --resume --name cut" in capsys.readouterr().err
    assert load_trained(tmp_path / "runs" / "cut").step == 10
    monkeypatch.setattr(GlanceRecipe, "batch", real)
    assert glance("train", "--resume", "--items", 4, "--name", "cut") == 0
    whole, cut = (load_trained(tmp_path / "runs" / name).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in cut.items())


class Mute(GlanceRecipe):
    """A recipe without what a recipe can be without."""

    evaluate, report, demo = Recipe.evaluate, Recipe.report, Recipe.demo
    check, chance = Recipe.check, Recipe.chance


def test_what_a_recipe_leaves_out_has_a_default(glance, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "glance", f"{__name__}:Mute")
    assert glance("train", "--model", "glance", "--items", 4) == 0
    assert json.loads((tmp_path / "runs" / "glance" / "eval.json").read_text()) == {"details": {}}
    assert glance("demo", "guitar", "--model", "glance") == 2
    assert capsys.readouterr().err == "minivlp: --model must have a demo, got glance\n"


@pytest.mark.parametrize("missing", ["batch", "loss"])
def test_what_a_recipe_must_have_is_asked_for_by_name(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(GlanceRecipe, missing, getattr(Recipe, missing))
    recipe, run = GlanceRecipe(GlanceSettings()), Run.begin(tmp_path / "run", {})
    with pytest.raises(TypeError, match=f"GlanceRecipe must have .*{missing}"):
        list(steps(recipe, run))


def test_flags_of_other_recipes_are_refused(glance, capsys):
    for flag, needs in ((("--language", "zh"), "a dual encoder"), (("--without", "boxes"), "--model vilt")):
        assert glance("train", "--model", "glance", *flag) == 2
        assert re.fullmatch(
            rf"minivlp: {flag[0]} must come with {needs}.*, got glance\n", capsys.readouterr().err
        )


# Which weights have which optimizer


class Plain(Glance):
    """Without a bias there is nothing but a matrix."""

    def __init__(self, config: GlanceConfig):
        super().__init__(config)
        self.linear.bias = None


@pytest.mark.parametrize("matrices", [False, True])
def test_a_model_without_matrices_or_of_nothing_else_trains(matrices, tmp_path):
    """By AdamW alone, or by Muon alone; both runs can be opened again."""
    recipe = GlanceRecipe(replace(GlanceSettings(), save_every=30))
    if matrices:
        torch.manual_seed(0)
        recipe.model = Plain(GlanceConfig(24, 4))
        recipe.matrices = lambda model: [model.linear.weight]
    (only,) = optimizers(recipe.model, recipe.matrices(recipe.model), recipe.settings)
    assert isinstance(only, torch.optim.Muon if matrices else torch.optim.AdamW)
    kept = [p for group in only.param_groups for p in group["params"]]
    assert {id(p) for p in kept} == {id(p) for p in recipe.model.parameters()}
    records = list(steps(recipe, Run.begin(tmp_path / "run", {})))
    assert records[-1]["name"] < 0.9 * records[0]["name"]
    assert list(steps(recipe, Run.resume(tmp_path / "run"))) == []


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_large_gradients_are_clipped_with_and_without_decay(weight_decay, tmp_path, monkeypatch):
    recipe = GlanceRecipe(replace(GlanceSettings(), steps=1, weight_decay=weight_decay))
    loss, norms = recipe.loss, []
    recipe.loss = lambda *args: {name: 1e3 * term for name, term in loss(*args).items()}
    real = torch.optim.AdamW.step

    def step(self, *args, **more):
        norms.append([float(p.grad.norm()) for group in self.param_groups for p in group["params"]])
        return real(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    list(steps(recipe, Run.begin(tmp_path / "run", {})))
    (weight, bias) = norms[0]
    assert weight == pytest.approx(1, abs=1e-3) and bias > 1  # vectors are not clipped


# One family at a time

TRAIN = """
import json, sys
from dataclasses import replace
from minivlp.__main__ import main
from minivlp.recipes import recipe_class

family, sizes, folder, whole = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
recipe = recipe_class(family)
recipe.presets, recipe.checked = {"cpu": replace(recipe.presets["cpu"], **sizes)}, 4
for name, module in list(sys.modules.items()):
    for number in ("CHECKED", "CANDIDATES"):
        if name.startswith("minivlp.") and hasattr(module, number):
            setattr(module, number, 4)
if not whole:  # which take longer than all the rest
    recipe.evaluate, recipe.report = lambda *what: {}, lambda *what: ""
    recipe.draw = lambda *what: []
flags = ["--model", family, "--name", folder, "--steps", "2", "--items", "4", "--threads", "1"]
assert main(["train", *flags]) == 0
print(json.dumps([name for name in sys.modules if name.startswith("minivlp.")]))
"""
# family → what is its own, by the beginning of its name
OWN = {
    "vilt": (
        *("models.vilt", "models.published.vilt", "recipes.vilt", "recipes.noun_contrast"),
        *("evaluation.vilt", "evaluation.rank", "pictures.demo", "pictures.gallery"),
    ),
    "clip": (
        *("models.dual", "models.published.clip_siglip", "recipes.dual", "evaluation.dual"),
        *("evaluation.match", "pictures.search", "data.drawings", "infonce", "sigmoid", "hinge"),
    ),
    "xvlm": (
        *("models.xvlm", "recipes.xvlm", "evaluation.xvlm", "data.crowds"),
        *("boxes", "regions", "infonce"),
    ),
    "coca": ("models.coca", "models.published.coca", "recipes.coca", "evaluation.captions", "decoder"),
    "chameleon": (
        *("models.chameleon", "models.published.chameleon", "recipes.chameleon"),
        *("evaluation.chameleon", "decoder", "vq"),
    ),
    "flava": (
        *("models.flava", "models.published.flava", "recipes.flava", "recipes.hiding"),
        *("models.published.start", "evaluation.hidden", "pictures.filled", "vq", "targets", "infonce"),
    ),
    "denoiser": (
        *("models.denoiser", "recipes.denoiser", "evaluation.denoiser"),
        *("diffusion", "data.drawings"),
    ),
    "maskvlm": (
        *("models.maskvlm", "recipes.maskvlm", "recipes.hiding", "evaluation.hidden"),
        *("models.published.start", "pictures.filled", "targets", "infonce"),
    ),
}
OWN["qformer"] = ("models.qformer", "models.published.qformer", "recipes.qformer")
OWN["bridge"] = (
    *("models.bridge", "recipes.bridge", "recipes.listlm", "data.lists", "evaluation.prefix"),
    *("pooling", "lora"),
)
HIDING = (
    *("infonce", "targets", "models.published.start"),
    *("recipes.hiding", "evaluation.hidden", "pictures.filled"),
)
# Most compare vectors by InfoNCE, two hide patches, two write.
SHARED = {
    "vilt": ("targets",), "clip": ("infonce", "data.drawings"), "xvlm": ("infonce",),
    "coca": ("infonce", "targets", "decoder"),
    "chameleon": ("targets", "decoder", "vq"), "flava": (*HIDING, "vq"), "maskvlm": HIDING,
    "denoiser": ("data.drawings",),
    "qformer": (*OWN["vilt"], "evaluation.captions", "decoder", "targets", "infonce"),
    "bridge": (
        *(*OWN["vilt"], "evaluation.captions", "decoder", "targets", "infonce"),
        *("models.qformer", "models.published.qformer"),
    ),
}  # fmt: skip
NEVER = ("claims", "bench", "recipes.captions", "recipes.tasks")


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", ["vilt", *(pytest.param(f, marks=pytest.mark.slow) for f in OWN if f != "vilt")]
)
def test_a_training_imports_no_other_family(family, whole, tmp_path):
    """Neither in its steps, nor, `whole`, in its evaluation and its drawings."""
    sizes = {
        "vilt": SIZES, "clip": DUAL_SIZES, "xvlm": XVLM_SIZES, "flava": FLAVA_SIZES, "maskvlm": MASKVLM_SIZES,
        "coca": COCA_SIZES, "chameleon": CHAMELEON_SIZES, "denoiser": DENOISER_SIZES,
        "bridge": BRIDGE_SIZES, "qformer": QFORMER_SIZES,
    }[family]  # fmt: skip
    flags = [family, json.dumps(sizes), str(tmp_path / "run"), str(whole)]
    done = subprocess.run([sys.executable, "-c", TRAIN, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.removeprefix("minivlp.") for name in json.loads(done.stdout.splitlines()[-1])}
    assert {name for name in loaded if name.startswith(NEVER)} == set()
    for other, own in OWN.items():
        found = {name for name in loaded if name.startswith(own)}
        if other == family:
            assert all(any(name.startswith(one) for name in found) for one in own)  # no name is out of date
        else:
            assert [name for name in found if not name.startswith(SHARED[family])] == [], other


def test_help_imports_no_family():
    code = "import sys; from minivlp.__main__ import parser; parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" not in loaded and {n for n in loaded if n.startswith("minivlp.recipes.")} == set()


def test_every_recipe_is_where_its_name_leads():
    for name in recipes.RECIPES:
        assert issubclass(recipe_class(name), Recipe)
        assert recipe_class(name).__module__.startswith("minivlp.recipes.")
