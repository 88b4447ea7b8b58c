"""`python -m tests.tiny train …` is `python -m minivlp train …` with sizes that train in a second, for tests.

MINIVLP_KILL="rename 2" makes such a process send itself SIGKILL, the second time it comes to that place.
"""

import atexit
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from minivlp.__main__ import main
from minivlp.data import EmojiVL, Scene, emojivl, load_emojivl
from minivlp.evaluation import dual as dual_evaluation
from minivlp.evaluation import vilt as vilt_evaluation
from minivlp.recipes import DUAL, dual, flava, tasks, vilt, xvlm
from minivlp.recipes.base import Recipe
from minivlp.recipes.bridge import BridgeRecipe
from minivlp.recipes.captions import CaptionsRecipe
from minivlp.recipes.chameleon import ChameleonRecipe
from minivlp.recipes.coca import CocaRecipe
from minivlp.recipes.denoiser import DenoiserRecipe
from minivlp.recipes.dual import DualRecipe, Filip
from minivlp.recipes.flava import FlavaRecipe
from minivlp.recipes.listlm import ListRecipe
from minivlp.recipes.maskvlm import MaskVlmRecipe
from minivlp.recipes.qformer import QformerRecipe
from minivlp.recipes.tasks import Nlvr2Recipe, VqaRecipe
from minivlp.recipes.vilt import ViltRecipe
from minivlp.recipes.xvlm import XvlmRecipe
from minivlp.training.run import Run

SIZES = dict(dim=16, layers=1, heads=2, hidden=32, steps=12, batch=16, warmup=2, save_every=4, report_every=3)

DUAL_SIZES = SIZES | {f"text_{name}": SIZES[name] for name in ("dim", "layers", "heads", "hidden")}
DUAL_SIZES |= dict(embed=16, scenes=8, canvas=28, patch=14)
XVLM_SIZES = {name: size for name, size in SIZES.items() if name != "layers"}
XVLM_SIZES |= dict(image_layers=1, text_layers=1, cross_layers=1, embed=16)
CHAMELEON_SIZES = SIZES | dict(codes=8, clustered=4)
DENOISER_SIZES = SIZES
COCA_SIZES = XVLM_SIZES | dict(image_dim=16, image_heads=2, image_hidden=32, layers=1, pool_heads=2)
del COCA_SIZES["cross_layers"], COCA_SIZES["embed"]
# These begin with the trained ViLT, whose width they have.
MASKVLM_SIZES = {name: SIZES[name] for name in ("steps", "batch", "warmup", "save_every", "report_every")}
MASKVLM_SIZES |= dict(tower_layers=1)
LIST_SIZES = SIZES
# Its reader is the shipped one, as it is its ViLT.
QFORMER_SIZES = SIZES | dict(queries=3, embed=16)
BRIDGE_SIZES = {name: SIZES[name] for name in ("steps", "batch", "warmup", "save_every", "report_every")}
FLAVA_SIZES = MASKVLM_SIZES | dict(codes=16, unpaired=4)
DRAW = ViltRecipe.draw


@cache
def few() -> EmojiVL:
    """Every thirteenth concept, nouns and zero-shot ones among them, drawn by noto, twemoji and fluent."""
    whole, artists = load_emojivl(), ("noto", "twemoji", "fluent")
    concepts = tuple(replace(c, artists=() if c.id % 13 else artists) for c in whole.concepts)
    blank = np.array([bool(c.id % 13) for c in concepts])[:, None, None, None]
    return EmojiVL(concepts, {a: np.where(blank, np.uint8(0), whole.sheets[a]) for a in artists})


def shrink(put=setattr) -> None:
    """Make every preset, the checks during training and the candidates of the evaluation small."""
    families = {ViltRecipe: SIZES, CaptionsRecipe: SIZES, DualRecipe: DUAL_SIZES, XvlmRecipe: XVLM_SIZES}
    families |= {ChameleonRecipe: CHAMELEON_SIZES, CocaRecipe: COCA_SIZES}
    families |= {DenoiserRecipe: DENOISER_SIZES, ListRecipe: LIST_SIZES, BridgeRecipe: BRIDGE_SIZES}
    families |= {QformerRecipe: QFORMER_SIZES}
    families |= {FlavaRecipe: FLAVA_SIZES, MaskVlmRecipe: MASKVLM_SIZES}
    for recipe, sizes in families.items():
        put(recipe, "presets", {name: replace(preset, **sizes) for name, preset in recipe.presets.items()})
    put(Filip, "overrides", {"patch": 7})
    put(flava, "CODED", 20)
    put(tasks, "OVERRIDES", {"batch": 16, "warmup": 2})
    for recipe in (VqaRecipe, Nlvr2Recipe):
        put(recipe, "overrides", {**recipe.overrides, "steps": 6})
    put(Recipe, "checked", 16)
    put(DenoiserRecipe, "checked", 16)
    for module in (tasks, dual, xvlm):
        put(module, "CHECKED", 16)
    for module in (vilt, vilt_evaluation, dual, dual_evaluation):
        put(module, "CANDIDATES", 4)


def commands_with(patch: pytest.MonkeyPatch, draw: bool = False) -> Callable[..., int]:
    """`run("train", "--name", …)` → the exit code of a command with small sizes, on one thread.

    Without `draw` a training run draws no pictures, which takes longer than all the rest.
    """
    shrink(patch.setattr)
    patch.setattr(ViltRecipe, "draw", DRAW if draw else lambda *run: [])
    return lambda job, *flags: main([job, *map(str, flags), "--threads", "1"])


@cache
def trained(model: str = "vilt", *flags: str) -> Path:
    """A run folder of a model, trained once a process; a dual encoder on `few` drawings."""
    home = Path(tempfile.mkdtemp(prefix="minivlp-test-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        command, flags = commands_with(patch, draw=True), ("--name", home / model, "--items", 16, *flags)
        if model in DUAL:
            use_few(patch)
        if model != "vilt":
            flags = ("--model", model, *flags)
        assert command("train", *flags) == 0
    return home / model


def use_few(patch: pytest.MonkeyPatch) -> None:
    """Let every command find `few` drawings as its data."""
    small = few()
    patch.setattr(emojivl, "_default", lambda: small)


def told(caption: str, scene: Scene) -> bool:
    """Is the caption true of the scene, by what the scene's own caption says?"""
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    if match := re.fullmatch("(.*) (left of|right of|above|below) (.*)", scene.caption):
        one, relation, two = match.groups()
        return caption in (scene.caption, f"{two} {back[relation]} {one}", *scene.slots)
    if match := re.fullmatch("(.*) between (.*) and (.*)", scene.caption):
        middle, one, two = match.groups()
        return caption in (scene.caption, f"{middle} between {two} and {one}")
    return caption == scene.caption


def kill_at(place: str, times: int) -> None:
    """Patch one function so that this process kills itself before, or after, the call of this number."""
    owner, name, after, chosen = {
        "written": (os, "fsync", False, lambda *a: True),  # all bytes of some file are in its draft
        "rename": (os, "replace", False, lambda old, new: new.name == "checkpoint.pt"),
        "renamed": (os, "replace", True, lambda old, new: new.name == "checkpoint.pt"),
        "logged": (Run, "log", True, lambda *a: True),
        "step": (vilt, "pretraining_loss", False, lambda *a: True),
        "chameleon": (ChameleonRecipe, "loss", False, lambda *a: True),
        "denoiser": (DenoiserRecipe, "loss", False, lambda *a: True),
    }[place]
    real, seen = getattr(owner, name), 0

    def deadly(*args, **settings):
        nonlocal seen
        seen += chosen(*args)
        if seen >= times and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **settings)
        if seen >= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    shrink()
    if "MINIVLP_KILL" in os.environ and os.environ.get("RANK") != "0":  # of several processes, not the first
        where, number = os.environ["MINIVLP_KILL"].split()
        kill_at(where, int(number))
    sys.exit(main())
