"""Train the real model with the learner's functions in place of the library's.

A function is put wherever a module of the library has the library's own, whichever rung that is. It must obey
its laws first, and the training must call it: that is looked at during the first half of the run.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from minivlp import __main__ as minivlp_cli
from minivlp.recipes import recipe_class
from minivlp.training.run import run_folder
from tests.course import Exercise, exercises, find
from tests.notebook import obeys
from tests.watched import load

ITEMS = 64  # of the evaluation after the run
NAME = "attempt"  # results go to runs/attempt-<model>-<number>


def train(names: list[str], steps: int, threads: int | None) -> int:
    """A short run of each model that uses some of these functions; the exit code of the first that fails.

    Raises ValueError for a name that is no exercise, that no training calls, or that breaks a law.
    """
    chosen = [find(name.strip()) for name in names]
    if len({one.family for one in chosen}) < len(chosen):
        raise ValueError("--use takes one rung of a function, not two")
    for one in chosen:
        if not model_of(one):
            raise ValueError(f"{one.name} is called by no training: it can be checked, but not trained with")
    for one in chosen:
        if not obeys(one):
            raise ValueError(
                f"{one.where} {one.name} does not obey its laws yet: see pytest tests/test_{one.concept}.py"
            )
    for model in dict.fromkeys(model_of(one) for one in chosen):
        ours = [one for one in chosen if model_of(one) == model]
        print(f"{model} with your {', '.join(one.name for one in ours)}, {steps} steps", flush=True)
        if code := _run(model, ours, steps, threads):
            return code
    return 0


def model_of(one: Exercise) -> str:
    """The model whose training calls some rung of this function, or nothing."""
    rungs = [other for other in exercises(one.concept) if other.family == one.family]
    return next((other.trains for other in rungs if other.trains), "")


def _run(model: str, ours: list[Exercise], steps: int, threads: int | None) -> int:
    number = next(n for n in range(1, 10_000) if not run_folder(f"{NAME}-{model}-{n}").exists())
    name = f"{NAME}-{model}-{number}"
    recipe_class(model)  # imports all that the training calls, so that functions in it can be replaced
    calls: Counter[str] = Counter()

    taken = 0

    def look(*_: Any) -> None:
        """Some terms come later than others: the main job begins with the next word alone."""
        nonlocal taken
        taken += 1
        idle = [one.name for one in ours if not calls[one.name]]
        if not idle:
            step.remove()
        elif taken >= steps:  # two optimisers: half of the run
            step.remove()
            raise ValueError(f"the training of {model} never called {', '.join(idle)} in half of its steps")

    step = register_optimizer_step_post_hook(look)
    undo = [put for one in ours for put in replace(one, _counted(one, calls))]
    flags = ["train", "--model", model, "--steps", str(steps), "--items", str(ITEMS), "--name", name]
    try:
        code = minivlp_cli.main([*flags, *(["--threads", str(threads)] if threads else [])])
    finally:
        step.remove()
        for module, attribute, function in undo:
            setattr(module, attribute, function)
    if code:
        shutil.rmtree(run_folder(name), ignore_errors=True)  # nothing in it was trained as asked
    else:
        print("calls: " + ", ".join(f"{one.name} {calls[one.name]}" for one in ours))
    return code


def _counted(one: Exercise, calls: Counter) -> Callable:
    """The learner's function, whose calls are counted."""
    attempt = load(one)
    usable = by_hand(attempt) if one.rung == "np" else attempt

    @wraps(attempt)
    def counted(*args: Any, **settings: Any) -> Any:
        calls[one.name] += 1
        return usable(*args, **settings)

    return counted


def replace(one: Exercise, function: Callable) -> list[tuple[Any, str, Callable]]:
    """Put a function in place of every rung of this exercise but NumPy's; returns what was there."""
    ladder = vars(sys.modules[f"minivlp.{one.concept}"])["RUNGS"].get(one.family, {})
    library = [rung_of for rung, rung_of in ladder.items() if rung != "np"]
    library += [vars(sys.modules[f"minivlp.{one.concept}"])[one.name]]
    cores = vars(sys.modules[f"minivlp.{one.concept}"]).get("CORES", {})
    library += [cores[one.family]] if one.family in cores else []  # what the models call
    places = [place for theirs in dict.fromkeys(library) for place in _named(theirs)]
    for module, attribute, _ in places:
        setattr(module, attribute, function)
    # A plain function that may call the replaced one, as wpa calls ipot, stands in for its fused rung.
    for family, others in vars(sys.modules[f"minivlp.{one.concept}"])["RUNGS"].items():
        if family != one.family and "fused" in others:
            stand_ins = [
                (m, a, v) for m, a, v in _named(others["fused"]) if m.__name__ != f"minivlp.{one.concept}"
            ]
            for module, attribute, _ in stand_ins:
                setattr(module, attribute, others["torch"])
            places += stand_ins
    return places


def _named(function: Callable) -> list[tuple[Any, str, Callable]]:
    """(module, name, function) wherever a module of the library has this function."""
    return [
        (module, attribute, value)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "minivlp"
        for attribute, value in list(vars(module).items())
        if value is function
    ]


def by_hand(function: Callable) -> Callable:
    """A NumPy function `(value, gradients)` as one that PyTorch trains with, by these gradients."""

    def torch_function(*args: Any, **settings: Any) -> Tensor:
        settings = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in settings.items()}
        return _ByHand.apply(function, settings, *args)

    return torch_function


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable, settings: dict, *args: Any) -> Tensor:
        floats = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
        ctx.like = [a if is_float else None for a, is_float in zip(args, floats, strict=True)]
        arrays = [a.detach().double().numpy() if f else _plain(a) for a, f in zip(args, floats, strict=True)]
        arrays = [float(a) if f and a.ndim == 0 else a for a, f in zip(arrays, floats, strict=True)]
        out = function(*arrays, **settings)
        ctx.again = lambda upstream: function(*arrays, **settings, grad=upstream)[1]
        value, ctx.grads = out if isinstance(out, tuple) else (out, None)
        first = next(a for a in ctx.like if a is not None)
        return torch.as_tensor(np.asarray(value), dtype=first.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        if ctx.grads is None:  # a plan: held fixed
            return None, None, *[None] * len(ctx.like)
        scalar = upstream.ndim == 0
        grads = iter(ctx.grads if scalar else ctx.again(upstream.double().numpy()))
        found = [
            None if a is None else torch.as_tensor(np.asarray(next(grads)), dtype=a.dtype) for a in ctx.like
        ]
        return None, None, *(g if g is None or not scalar else upstream * g for g in found)


def _plain(a: Any) -> Any:
    return a.numpy() if isinstance(a, Tensor) else a
