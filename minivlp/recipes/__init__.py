"""Ways of training: what a step sees, its loss, and how the result is measured and drawn.

`RECIPES` is the one place that knows all of them. A recipe is imported when it is asked for, so a command
loads its own family alone, and `--help` loads none.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivlp.recipes.base import Recipe

# name → module, with a dot one of this folder, and class
RECIPES = {
    "vilt": ".vilt:ViltRecipe",
    "captions": ".captions:CaptionsRecipe",
    "vqa": ".tasks:VqaRecipe",
    "nlvr2": ".tasks:Nlvr2Recipe",
    "clip": ".dual:Clip",
    "siglip": ".dual:Siglip",
    "vse": ".dual:Vse",
    "filip": ".dual:Filip",
    "xvlm": ".xvlm:XvlmRecipe",
    "coca": ".coca:CocaRecipe",
    "chameleon": ".chameleon:ChameleonRecipe",
    "denoiser": ".denoiser:DenoiserRecipe",
    "flava": ".flava:FlavaRecipe",
    "maskvlm": ".maskvlm:MaskVlmRecipe",
    "qformer": ".qformer:QformerRecipe",
    "listlm": ".listlm:ListRecipe",
    "bridge": ".bridge:BridgeRecipe",
}
TASKS = ("vqa", "nlvr2")  # begin from a trained ViLT
MODELS = tuple(name for name in RECIPES if name not in (*TASKS, "captions"))
NUMBERS = ("steps", "batch", "lr", "seed")  # flags that stand in place of a preset's numbers
DUAL = ("clip", "siglip", "vse", "filip")
# flag of `train` → the recipes that take it, and what it must come with
FLAGS = {
    "start": (TASKS, "--task"),
    "images": (("captions",), "--captions"),
    "on_error": (("captions",), "--captions"),
    "language": (DUAL, "a dual encoder, as in --model clip"),
    "connector": (("bridge",), "--model bridge"),
    "reader": (("bridge",), "--model bridge"),
    "without": (
        ("vilt", "xvlm", "coca", "flava", "maskvlm", "bridge"),
        "--model vilt, xvlm, coca, flava, maskvlm or bridge, and no --task",
    ),
}


def recipe_name(settings: Mapping[str, Any]) -> str:
    """The name of the recipe of a run, from its settings "model", "task" and "captions"."""
    return settings.get("task") or ("captions" if settings.get("captions") else settings["model"])


def recipe_class(name: str) -> type["Recipe"]:
    """The recipe of this name, imported now."""
    module, _, kind = RECIPES[name].partition(":")
    return getattr(importlib.import_module(module, __name__), kind)
