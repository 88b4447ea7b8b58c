"""Train the ViLT that the learner built: chapters/exercises/build_vilt.py, by its own loop and optimisers.

A piece that is not written is the library's. A piece that is written must obey its laws first. Steps, data,
seed and starting values are those of `python -m minivlp train`; a run with fewer steps has single objects on
small pictures in place of pairs, because the curriculum of pairs shows nothing in a few seconds.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chapters.train import replace as put
from minivlp import build_vilt
from minivlp.data import CPU_NOUNS, Scene, Scenes, scene_pixels
from minivlp.models.vilt import Vilt
from minivlp.recipes.noun_contrast import noun_contrast
from minivlp.recipes.vilt import PRESETS, ViltRecipe, ViltSettings
from minivlp.recipes.vilt_batches import Part, SceneBatches, Stage, ViltBatch
from minivlp.training import loop
from minivlp.training.run import Run, run_folder
from minivlp.training.screen import Screen, progress_line
from minivlp.training.trained import Trained
from tests.course import ROOT, Exercise, exercises, fault, find, untouched
from tests.notebook import obeys
from tests.watched import load

# What the model and its loop are made of: the learner's one file, and what earlier chapters gave.
EARLIER = ("patch_embed", "attention", "layer_norm", "mlm_loss", "itm_loss")
LIBRARYS_RUN = ROOT / "chapters" / "main_run.json"  # the records of `python -m minivlp train --threads 1`
FULL = PRESETS["cpu"].steps
SINGLE = Part("one", 1.0, canvas=24, sizes=(0.5, 0.77))  # one object a picture
ITEMS = 2000  # of the evaluation of a full run: README's


class OwnVilt(Vilt):
    """A Vilt whose every product is made by the functions of build_vilt; `given` are the weights to take."""

    given: dict[str, Tensor] | None = None

    def __init__(self, config: Any):
        super().__init__(config)
        for number, block in enumerate(self.encoder.blocks):
            block.forward = partial(self._block, number)

    @property
    def w(self) -> dict[str, Tensor]:
        return dict(self.named_parameters()) if self.given is None else self.given

    def _block(self, number: int, z: Tensor, mask: Tensor | None = None) -> Tensor:
        part = build_vilt.under(self.w, f"encoder.blocks.{number}.")
        return build_vilt.block(z, part, self.config.heads, mask)

    def embed_text(self, ids: Tensor, text_mask: Tensor) -> Tensor:
        return build_vilt.embed_words(ids, self.w)

    def embed_image(self, pixels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        rows = build_vilt.embed_patches(pixels, self.w)
        return rows, torch.ones(rows.shape[:2], dtype=torch.bool)

    def encode(self, ids, text_mask, pixels, pixel_mask=None, image_type=1, first=None, writing=False):
        sizes = self.config.layers, self.config.heads
        text, image = build_vilt.encode(ids, text_mask, pixels, self.w, *sizes, writing)
        real = torch.ones(image.shape[:2], dtype=torch.bool)
        return {"text": text[:, :first], "image": image, "image_mask": real, "pooled": text[:, 0]}

    def mlm_hidden(self, text: Tensor) -> Tensor:
        return build_vilt.mlm_hidden(text, self.w)

    def mlm_logits(self, text: Tensor) -> Tensor:
        return self.mlm_hidden(text) @ self.w["mlm.weight"].T + self.w["mlm.bias"]

    def itm_logits(self, pooled: Tensor) -> Tensor:
        """`pooled` is the first state of the text: the pooler is part of the head here."""
        return build_vilt.itm_logits(pooled, self.w)


class OwnRecipe(ViltRecipe):
    """The main job with the learner's model."""

    Model = OwnVilt


class SingleObjects(ViltRecipe):
    """A short run: eight nouns, one object a picture of 24 × 24 pixels."""

    @property
    def batches(self) -> Callable[[int], list[ViltBatch]]:
        s = self.settings
        return SceneBatches(
            self.emojivl, self.nouns, self.tokenizer, (Stage(1.0, (SINGLE,)),), s.steps, s.batch, s.seed
        )

    @property
    def fresh(self) -> list[Scene]:
        drawn = dict(canvas=24, kinds={"one": 1}, sizes=SINGLE.sizes, seed=1)
        scenes = Scenes(self.emojivl, self.nouns, self.emojivl.unseen_artists, **drawn)
        return [scenes[i] for i in range(96)]

    @property
    def chance(self) -> dict[str, float]:
        return {"named": 1 / len(self.nouns)}

    @torch.inference_mode()
    def check(self, model: Vilt) -> dict[str, float]:
        """How many objects of an unseen artist are named."""
        said = name_them(model, self.tokenizer, self.fresh).argmax(-1)
        right = [self.tokenizer.encode(scene.caption)[-1] for scene in self.fresh]
        return {"named": float(np.mean([a == b for a, b in zip(said.tolist(), right, strict=True)]))}


class OwnSingleObjects(SingleObjects):
    Model = OwnVilt


def name_them(model: Vilt, tokenizer: Any, scenes: list[Scene]) -> Tensor:
    """The probability of each token for the hidden word of "a [MASK]", (scenes, V)."""
    ids, _, mask = map(torch.from_numpy, tokenizer.batch(["a [MASK]"] * len(scenes)))
    states = model.encode(ids, mask, scene_pixels(scenes))["text"]
    return model.mlm_logits(states[ids == tokenizer.mask_id]).softmax(-1)


def pieces() -> tuple[list[Exercise], list[Exercise]]:
    """(the learner's, those that the library stands in for). Raises ValueError for one that breaks a law."""
    wanted = [find(name) for name in EARLIER]
    wanted += [one for one in exercises("build_vilt") if one.rung != "np"]
    own = [one for one in wanted if not (fault(one) is None and untouched(one))]
    for one in own:
        if not obeys(one):
            raise ValueError(
                f"{one.where} {one.name} does not obey its laws yet: see pytest tests/test_{one.concept}.py"
            )
    return own, [one for one in wanted if one not in own]


def train(steps: int | None, threads: int | None) -> int:
    """Train the learner's file and draw its curve over the library's; 0, or what is raised.

    steps: None for the main job. Raises ValueError when a piece breaks a law.
    """
    torch.set_num_threads(threads or 1)
    own, librarys = pieces()
    screen = Screen()
    screen.say(f"yours: {', '.join(one.name for one in own) or 'nothing yet'}")
    screen.say(f"the library's: {', '.join(one.name for one in librarys) or 'nothing'}")
    full = steps is None or steps == FULL
    if full:
        kind, settings = OwnRecipe, PRESETS["cpu"]
    else:
        kind = OwnSingleObjects
        settings = small_settings(steps)
    number = next(n for n in range(1, 10_000) if not run_folder(f"learner-{n}").exists())
    run = Run.begin(run_folder(f"learner-{number}"), about(settings, full))
    undo = [place for one in own for place in put(one, load(one))]
    try:
        recipe = kind(settings, run.settings)
        trained, records = _train(recipe, run, screen)
        others = _librarys_records(settings, full, screen)
        if full:
            loop.finish(recipe, run, trained, ITEMS, screen)
        else:
            draw_named(run.folder / "named.png", trained.model, recipe)
            screen.say(f"wrote {run.folder / 'named.png'}")
        draw_beside(run.folder / "beside_the_library.png", records, others, recipe.chance)
        screen.say(f"wrote {run.folder / 'beside_the_library.png'}")
    finally:
        for module, attribute, function in undo:
            setattr(module, attribute, function)
    return 0


def small_settings(steps: int) -> ViltSettings:
    """A short run's sizes and rates."""
    return replace(
        PRESETS["cpu"], nouns=CPU_NOUNS[:8], canvas=24, layers=2, steps=steps, batch=24, matrix_lr=0.04,
        warmup=10, report_every=max(1, steps // 10),
    )  # fmt: skip


def about(settings: Any, full: bool) -> dict[str, Any]:
    """The settings of a run, as `minivlp train` writes them."""
    command = "python -m chapters train" + ("" if full else f" --steps {settings.steps}")
    told = {"command": command, "model": "vilt", "task": None, "captions": None, "preset": "cpu"}
    return told | {"train": vars(settings), "device": "cpu", "threads": torch.get_num_threads()}


def _train(recipe: ViltRecipe, run: Run, screen: Screen) -> tuple[Trained, list[dict[str, Any]]]:
    """All steps by build_vilt.train; the model that they make, and the records."""
    from time import perf_counter

    s, model = recipe.settings, recipe.model
    by_id = {id(p): name for name, p in model.named_parameters()}
    matrices = {by_id[id(p)] for p in recipe.matrices(model)}
    sizes, started = (model.config.layers, model.config.heads), perf_counter()
    records, means = [], {}
    often = max(s.report_every, s.steps // 20)

    def loss(w: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        model.given, terms = w, {}
        for batch in recipe.batch(step):
            terms |= build_vilt.pretraining_loss(batch, w, *sizes, s.wpa_weight)
            if batch.noun is not None:
                terms["apart"] = noun_contrast(model, batch)
        return terms

    def look(done: int, w: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        for name, term in terms.items():
            means.setdefault(name, []).append(float(term.detach()))
        if done % often and done != s.steps:
            return
        model.given = w
        record = {"step": done, "rows": done * s.batch, "seconds": perf_counter() - started}
        record |= {name: float(np.mean(values)) for name, values in means.items()} | recipe.check(model)
        means.clear()
        records.append(record)
        run.log(record)
        screen.say(progress_line(record, s.steps))

    model.train()
    w = build_vilt.train(
        dict(model.named_parameters()), loss, matrices, s.steps, s.lr, s.matrix_lr, s.weight_decay, s.warmup,
        s.cooldown, look,
    )  # fmt: skip
    model.given = None
    model.load_state_dict(w)
    return Trained(model.eval(), recipe.tokenizer, run.settings, s.steps, run.folder), records


def _librarys_records(settings: Any, full: bool, screen: Screen) -> list[dict[str, Any]]:
    """The library's curve: of the main job the one that ships, of a short run one that is run now."""
    if full:
        return json.loads(LIBRARYS_RUN.read_text(encoding="utf-8"))
    from minivlp.training.run import ReadOnlyRun

    screen.say("and once more with the library's own model, loop and optimisers")
    return list(loop.steps(SingleObjects(settings), ReadOnlyRun("nowhere", {})))


def draw_beside(path: Path, records: list[dict], others: list[dict], chance: dict[str, float]) -> None:
    """The learner's loss and accuracies over the library's."""
    from matplotlib.figure import Figure

    from minivlp.pictures.figures import COLOURS, GREY, WIDTH, save_figure

    figure = Figure(figsize=(WIDTH, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2)
    names = [name for name in ("next", "mlm", "itm", "apart") if any(name in r for r in others)]
    for ax, some in zip(axes, (names, list(chance)), strict=True):
        for name, colour in zip(some, COLOURS, strict=False):
            for rows, style in (
                (others, {"color": GREY, "linewidth": 3, "alpha": 0.4}),
                (records, {"color": colour}),
            ):
                seen = [(r["step"], r[name]) for r in rows if name in r]
                ax.plot(*np.transpose(seen), **style, label=name if rows is records else None)
        ax.set(xlabel="optimisation step", ylabel="loss (nats)" if ax is axes[0] else "accuracy")
        ax.legend(fontsize=8)
    figure.suptitle("yours in colour, the library's in grey beneath")
    save_figure(figure, path)


def draw_named(path: Path, model: Vilt, recipe: SingleObjects) -> None:
    """Twelve drawings of an artist whom training never showed, each with the name that the model gives it."""
    from matplotlib.figure import Figure

    from minivlp.pictures.figures import BLUE, VERMILION, WIDTH, save_figure

    scenes = recipe.fresh[:12]
    with torch.inference_mode():
        share, best = name_them(model, recipe.tokenizer, scenes).max(-1)
    figure = Figure(figsize=(WIDTH, 3.4), dpi=120, layout="constrained")
    for ax, scene, p, k in zip(
        figure.subplots(2, 6).flat, scenes, share.tolist(), best.tolist(), strict=True
    ):
        right = recipe.tokenizer.encode(scene.caption)[-1] == k
        ax.imshow(scene.image)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{recipe.tokenizer.tokens[k]} {p:.2f}", color=BLUE if right else VERMILION, fontsize=9)
    save_figure(figure, path)
