"""What a recipe is. A family of models is a model file and a recipe; everything else is common to all.

training/loop.py trains a recipe: it asks for a step's batches, their loss, and which weights are matrices.
The commands ask it to evaluate, draw and demonstrate what was trained. All methods but `batch` and `loss`
have a default here or may stay away: a recipe without `demo` has no demo.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.core.files import packaged
from minivlp.core.require import fail
from minivlp.data import Concept, EmojiVL, Scene, Scenes, load_emojivl
from minivlp.data.names import scene_tokenizer
from minivlp.evaluation.splits import Progress
from minivlp.pictures.figures import curves
from minivlp.recipes import NUMBERS, recipe_class, recipe_name
from minivlp.text import WordPiece
from minivlp.training.loop import Rates
from minivlp.training.run import Run
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained, read_trained, write_trained
from minivlp.training.workers import ONE_PROCESS, Workers
from minivlp.transformer import Block

WEIGHTS = packaged("weights")  # of the shipped models
Terms = dict[str, Tensor]  # of a loss, scalars, already weighted


@dataclass(frozen=True)
class Settings(Rates):
    """Rates, and the sizes that every family has; a recipe adds its own. Sizes are in pixels."""

    canvas: int = 48
    patch: int = 8
    max_text_len: int = 24  # tokens

    @classmethod
    def read(cls, run: Mapping[str, Any]) -> "Settings":
        """What a run began with. Raises ValueError when its settings are none of this version."""
        try:
            return cls(**run["train"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the settings of the run are not of this version ({error})") from error

    def shared_with(self, config: type) -> dict[str, Any]:
        """Those fields that a model's configuration class has too."""
        names = {field.name for field in fields(config)}
        return {name: value for name, value in vars(self).items() if name in names}


@dataclass(frozen=True)
class Batch:
    """Examples that share a forward pass; each tensor has one row an example, and None stands for nothing."""

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def part(self, rank: int, size: int) -> "Batch":
        """Every `size`-th example, beginning with `rank`: so each kind of example is shared evenly."""
        return replace(self, **{name: tensor[rank::size] for name, tensor in self._tensors().items()})


class Recipe:
    """One way of training. Data, vocabulary and model are made when they are first asked for."""

    Settings: type[Settings] = Settings
    Config: type  # a dataclass of the model's sizes
    Model: type[nn.Module]
    presets: Mapping[str, Settings] = {}  # the first is the default
    terms: tuple[str, ...] = ()  # of the loss, in the order in which they are drawn
    ablations: Mapping[str, Mapping[str, Any]] = {}  # what --without may be → what it changes in a preset
    several_processes = False
    checked = 128  # scenes of `fresh`

    def __init__(
        self,
        settings: Settings,
        about: Mapping[str, Any] | None = None,
        tokens: Sequence[str] | None = None,
        data: str | Path | None = None,
        folder: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        """The recipe of these sizes and rates.

        about: the other settings of the run; tokens: its vocabulary, None = a new one; data: a folder of
        sheets in place of EmojiVL's; folder: the run's; say: is told what is left out of the data.
        """
        self.settings, self.about, self.tokens = settings, dict(about or {}), tokens
        self.data, self.folder, self.say = data, folder, say

    @classmethod
    def of(cls, run: Mapping[str, Any], **parts: Any) -> "Recipe":
        """The recipe of a run's settings. Raises ValueError when they are none of this version."""
        return cls(cls.Settings.read(run), run, **parts)

    @classmethod
    def begin(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a new run, from the flags that were given. Raises ValueError for what cannot be."""
        preset = flags.get("preset", next(iter(cls.presets)))
        if preset not in cls.presets:
            fail("--preset", f"must be {' or '.join(cls.presets)} for this model", preset)
        load_emojivl()  # read once a process; refuses a damaged file before the run begins
        changes = cls.changes(flags) | {name: flags[name] for name in NUMBERS if name in flags}
        begun = {"preset": preset, "train": asdict(replace(cls.presets[preset], **changes))}
        return begun | ({"without": flags.get("without")} if cls.ablations else {})

    @classmethod
    def changes(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        """What the recipe, or a flag of its own, changes in a preset."""
        without = flags.get("without")
        if without and without not in cls.ablations:
            fail("--without", f"must be {' or '.join(cls.ablations)} for this model", without)
        return cls.ablations.get(without, {})

    @cached_property
    def emojivl(self) -> EmojiVL:
        return load_emojivl(self.data)

    @cached_property
    def nouns(self) -> tuple[Concept, ...]:
        return self.emojivl.nouns(self.settings.nouns)

    @cached_property
    def tokenizer(self) -> WordPiece:
        return WordPiece(self.tokens) if self.tokens else self.vocabulary()

    @cached_property
    def model(self) -> nn.Module:
        """A fresh model; its values come from the seed, which is set for torch's default generator."""
        torch.manual_seed(self.settings.seed)
        return self.new_model()

    def vocabulary(self) -> WordPiece:
        """A new vocabulary, by default of the captions of scenes."""
        return scene_tokenizer(self.nouns, self.settings.vocab_size)

    def new_model(self) -> nn.Module:
        """A model of these settings, by default with the sizes that settings and configuration share."""
        sizes = self.settings.shared_with(self.Config)
        sizes |= {"vocab_size": len(self.tokenizer), "image_size": self.settings.canvas}
        return self.Model(self.Config(**sizes))

    @cached_property
    def fresh(self) -> list[Scene]:
        """Scenes of pairs of nouns that training never shows together, for `check`."""
        s = self.settings
        scenes = Scenes(self.emojivl, self.nouns, canvas=s.canvas, pairs="held_out", seed=s.seed + 1)
        return [scenes[i] for i in range(self.checked)]

    @property
    def name(self) -> str:
        """Its name in RECIPES."""
        return recipe_name(self.about)

    @property
    def summary(self) -> str:
        """What is trained on, in a few words."""
        return f"{len(self.nouns)} nouns"

    @property
    def chance(self) -> dict[str, float]:
        """The accuracies of `check`, with what guessing gives."""
        return {}

    @cached_property
    def batches(self) -> Callable[[int], list[Batch]]:
        """What composes the batches of a step. They depend on (seed, step) alone."""
        raise TypeError(f"{type(self).__name__} must have batches, or a batch(step)")

    def batch(self, step: int) -> list[Batch]:
        """The batches of a step."""
        return self.batches(step)

    def loss(self, model: nn.Module, batches: Sequence[Batch], workers: Workers = ONE_PROCESS) -> Terms:
        """The weighted terms of a step, scalars."""
        raise TypeError(f"{type(self).__name__} must have a loss")

    def sizes_of_batches(self) -> set[int]:
        """The numbers of examples of the batches of the run, where they are known before its first step."""
        return set()

    def matrices(self, model: nn.Module) -> list[nn.Parameter]:
        """The weights that Muon updates: by default the matrices inside blocks."""
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        inside = {id(p) for block in blocks for p in block.parameters() if p.ndim == 2}
        return [p for p in model.parameters() if id(p) in inside and p.requires_grad]

    def check(self, model: nn.Module) -> dict[str, float]:
        """Accuracies on what is not trained on, quick enough to be asked twenty times a run."""
        return {}

    def controls(self) -> dict[str, dict[str, Any]]:
        """Further runs that are trained after this one, to compare: name of their folder → their settings."""
        return {}

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        """The measures of a trained model, ready for JSON; progress(done, total) is told how far it is."""
        return {"details": {}}

    def report(self, results: Mapping[str, Any]) -> str:
        """The results of `evaluate` as Markdown."""
        return ""

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """Draw into the folder, from the records of the run; the paths of the pictures."""
        chance = {name: value for name, value in self.chance.items() if any(name in r for r in records)}
        curves(folder / "curves.png", records, self.terms, chance)
        return [folder / "curves.png"]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        """Show what the model does with a query. Raises ValueError where there is nothing to show."""
        fail("--model", "must have a demo", self.name)

    # Names of tensors in files that others read.

    @staticmethod
    def to_published(model: nn.Module) -> dict[str, Tensor]:
        """The tensors of a model under the names in which it is shipped."""
        return model.state_dict()

    @staticmethod
    def from_published(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same under our names."""
        return tensors


def load_trained(source: str | Path | None = None, kind: str = "vilt") -> Trained:
    """Read a run folder, a checkpoint.pt, or a shipped .safetensors with its .json beside it, of any kind.

    None takes runs/<kind> when it has a checkpoint, else the shipped model of that kind. Raises
    FileNotFoundError when there is none, and ValueError when it is not one of ours.
    """
    path = Path(f"runs/{kind}" if source is None else source)
    if source is None and not (path / "checkpoint.pt").is_file():
        path = WEIGHTS / f"{kind}_tiny.safetensors"
    if not path.exists():
        command = "python -m minivlp train" + ("" if kind == "vilt" else f" --model {kind}")
        raise FileNotFoundError(f"there is no trained model {path}: make one by {command}")
    state = read_trained(path)
    try:
        recipe = recipe_class(recipe_name(state["settings"]))
        model, tensors = recipe.Model(recipe.Config(**state["model_config"])), state["model"]
        if path.suffix == ".safetensors":
            tensors = recipe.from_published(model, tensors)
        model.load_state_dict(tensors)
        folder = path if path.is_dir() else path.parent
        return Trained(model.eval(), WordPiece(state["tokens"]), state["settings"], state["step"], folder)
    except (KeyError, TypeError, RuntimeError) as error:  # a part is missing, or of another size
        raise ValueError(f"{path} does not hold a trained model of this version ({error})") from error


def ship(trained: Trained, path: str | Path, numbers: Mapping[str, Any]) -> None:
    """Write a trained model as one small file, with published names, and a .json beside it."""
    tensors = recipe_class(recipe_name(trained.settings)).to_published(trained.model)
    write_trained(trained, Path(path), numbers, tensors)


def recipe_of(trained: Trained, **parts: Any) -> Recipe:
    """The recipe by which a model was trained, with its vocabulary."""
    kind, tokens = recipe_class(recipe_name(trained.settings)), trained.tokenizer.tokens
    return kind.of(trained.settings, tokens=tokens, folder=trained.folder, **parts)


def open_recipe(run: Run, say: Callable[[str], None] = lambda text: None) -> Recipe:
    """The recipe of a run, with the vocabulary of its checkpoint when there is one."""
    tokens = run.load()["tokens"] if run.checkpoint.exists() else None
    return recipe_class(recipe_name(run.settings)).of(run.settings, tokens=tokens, folder=run.folder, say=say)
