"""Refuse bad input with one clear sentence: which argument, which rule, and what it got.

The functions take NumPy arrays and torch tensors alike, return nothing, and raise ValueError.
A shape is written as in the docstrings, "B N D": the first array that uses a letter fixes it, "…" stands for
any leading axes, and a number stands for itself.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist


class NotFinite(ValueError):
    """Raised where an array holds NaN, so that a training loop can tell this fault from others."""


def fail(argument: str, rule: str, got: object) -> None:
    """Raise the ValueError that every public function of the library uses."""
    raise ValueError(f"{argument} {rule}, got {got}")


def shapes(**arrays: tuple[Any, str]) -> dict[str, int]:
    """Check `name=(array, "B D")` pairs against one another; return the size of every letter."""
    sizes: dict[str, int] = {}
    for name, (array, pattern) in arrays.items():
        if not hasattr(array, "shape"):
            fail(name, "must be an array", type(array).__name__)
        shape, letters = tuple(array.shape), pattern.split()
        any_leading = letters[0] == "…"
        if any_leading:
            letters = letters[1:]
        core = shape[len(shape) - len(letters) :] if any_leading else shape
        expected = ["…"] * any_leading + [
            f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters
        ]
        rule = f"must have shape ({', '.join(expected)})"
        if len(core) != len(letters):
            fail(name, rule, shape)
        for letter, size in zip(letters, core, strict=True):
            wanted = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if wanted != size:
                fail(name, rule, shape)
    return sizes


def floats(**arrays: Any) -> None:
    """Every array must hold floating-point numbers, none of them NaN."""
    for name, array in arrays.items():
        if "float" not in str(array.dtype):
            fail(name, "must have a floating dtype", array.dtype)
        # One cheap pass: the sum is NaN when an entry is. It is NaN for inf − inf too, hence the second look.
        total = array.sum()
        if total != total and bool((array != array).any()):
            raise NotFinite(f"{name} must not contain NaN, got {int((array != array).sum())} NaN entries")


def integers(**arrays: Any) -> None:
    """Every array must hold integers (bool is not one)."""
    for name, array in arrays.items():
        if "int" not in str(array.dtype):
            fail(name, "must have an integer dtype", array.dtype)


def mask(name: str, array: Any, whole_rows: bool = False) -> None:
    """A mask is bool, True = real; `whole_rows` refuses a row that is all False."""
    if "bool" not in str(array.dtype):
        fail(name, "must be bool with True = real", array.dtype)
    if whole_rows and not bool(array.any(-1).all()):
        fail(name, "must have a True in every row", "an all-False row")


def axis(name: str, array: Any, leading: tuple[int, ...], length: int) -> None:
    """A mask or weight vector must be (…, length), or (length,) for the whole batch."""
    shape = tuple(array.shape) if hasattr(array, "shape") else type(array).__name__
    if shape not in ((*leading, length), (length,)):
        fail(name, f"must have shape {(*leading, length)} or {(length,)}", shape)


def token_mask(name: str, array: Any, leading: tuple[int, ...], length: int) -> None:
    """A mask of tokens must fit its axis, be bool and leave a token in every row; None is no mask."""
    if array is not None:
        axis(name, array, leading, length)
        mask(name, array, whole_rows=True)


def tokens(*sets: tuple) -> None:
    """Token sets `(name, tokens (…, M, D), name of the mask, mask)` must be comparable.

    Each holds a token at least, floats without NaN, of the dtype of the first set; its mask fits it.
    """
    for name, rows, mask_name, real in sets:
        floats(**{name: rows})
        if rows.shape[-2] == 0:
            fail(name, "must hold at least one token", tuple(rows.shape))
        if rows.dtype != sets[0][1].dtype:
            fail(name, f"must have the dtype {sets[0][1].dtype} of {sets[0][0]}", rows.dtype)
        token_mask(mask_name, real, tuple(rows.shape[:-2]), rows.shape[-2])


def positive(**scalars: Any) -> None:
    """Every scalar must be finite and > 0."""
    for name, value in scalars.items():
        number = _number(name, value)
        if not (number > 0 and math.isfinite(number)):
            fail(name, "must be a finite number > 0", number)


def finite(**scalars: Any) -> None:
    """Every scalar must be finite."""
    for name, value in scalars.items():
        if not math.isfinite(_number(name, value)):
            fail(name, "must be finite", _number(name, value))


def generator(rng: Any) -> None:
    """Random choices take a NumPy Generator; a seed or the old global state is no substitute."""
    if not isinstance(rng, np.random.Generator):
        fail("rng", "must be a numpy.random.Generator", type(rng).__name__)


def _number(name: str, value: Any) -> float:
    """A scalar, Python's or an array without axes, as a Python float."""
    if tuple(getattr(value, "shape", ())) != ():
        fail(name, "must be a scalar", f"shape {tuple(value.shape)}")
    return float(value.detach() if hasattr(value, "detach") else value)


def on_every_rank(check: Callable[[], object], name: str, array: Any, group: Any = None) -> None:
    """Run `check` on every rank and compare the shape of one array: all ranks raise, or none does.

    A rank that raised alone would leave the others waiting for it in the next collective.
    """
    fault = None
    try:
        check()
    except ValueError as error:
        fault = str(error)
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (fault, tuple(getattr(array, "shape", ()))), group=group)
    for rank, (message, _) in enumerate(reports):
        if message:
            raise ValueError(f"rank {rank}: {message}")
    if len({shape for _, shape in reports}) > 1:
        fail(name, "must have the same shape on every rank", [shape for _, shape in reports])
