"""Refuse bad input with one clear sentence: which argument, which rule, and what it got.

The functions take NumPy arrays and torch tensors alike and raise ValueError.
A shape is written as in the docstrings, "B N D": the first array that uses a letter fixes it, "…" stands for
any leading axes, and a number stands for itself.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class NotFinite(ValueError):
    """Raised for NaN and infinities, so that a training loop can tell this fault from others."""


def fail(argument: str, rule: str, got: object) -> None:
    """Raise the ValueError that every public function of the library uses."""
    raise ValueError(f"{argument} {rule}, got {got}")


def shapes(library: type | None = None, /, **arrays: tuple[Any, str]) -> dict[str, int]:
    """Check `name=(array, "B D")` pairs against one another; return the size of every letter.

    `library` is Tensor or np.ndarray, what all of them must be; None leaves it open.
    """
    sizes: dict[str, int] = {}
    for name, (array, pattern) in arrays.items():
        if library is not None:
            of_library(library, name, array)
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


def of_library(library: type, name: str, array: Any) -> None:
    """A function of tensors does not take NumPy arrays, nor the reverse."""
    if not isinstance(array, library):
        fail(name, f"must be a {'tensor' if library is Tensor else 'NumPy array'}", type(array).__name__)


def floats(*, infinite: bool = False, **arrays: Any) -> None:
    """Every array must hold finite floating-point numbers, all of one dtype.

    With `infinite` only NaN is refused. Under autocast half precisions and float32 may meet, as a layer
    returns the one and a weight holds the other.
    """
    first = next(iter(arrays))
    for name, array in arrays.items():
        if "float" not in str(array.dtype) or "float8" in str(array.dtype):
            fail(name, "must have a floating dtype", array.dtype)
        if array.dtype != arrays[first].dtype and not _meet_under_autocast(array, arrays[first]):
            fail(name, f"must have the dtype {arrays[first].dtype} of {first}", array.dtype)
        # One cheap pass: the sum is not finite when an entry is not. Large entries may have such a sum too,
        # hence the second look.
        try:
            total = _total(array)
        except RuntimeError:
            rule = "must hold entries that can be read, which torch.func.vmap hides"
            fail(name, f"{rule}: batches are axes of the arrays", "a tensor inside vmap")
        if math.isfinite(total):
            continue
        if bool((array != array).any()):
            raise NotFinite(f"{name} must not contain NaN, got {int((array != array).sum())} NaN entries")
        endless = abs(array) == math.inf
        if not infinite and bool(endless.any()):
            raise NotFinite(f"{name} must be finite, got {int(endless.sum())} infinite entries")


def _total(array: Any) -> float:
    if isinstance(array, Tensor):
        return float(array.detach().sum())
    with np.errstate(all="ignore"):
        return float(array.sum())


def _meet_under_autocast(*tensors: Any) -> bool:
    """Are these half precisions and float32, under autocast?"""
    if not all(isinstance(t, Tensor) and torch.is_autocast_enabled(t.device.type) for t in tensors):
        return False
    return all(torch.finfo(t.dtype).bits <= 32 for t in tensors)


def integers(**arrays: Any) -> None:
    """Every array must hold integers (bool is not one)."""
    for name, array in arrays.items():
        if "int" not in str(array.dtype):
            fail(name, "must have an integer dtype", array.dtype)


def loss(value: Any, **source: Any) -> Any:
    """`value` in the dtype of an argument `name=array`, which must be finite there.

    It is not where scores overflow, and then no gradient means anything.
    """
    ((name, array),) = source.items()
    value = value.to(array.dtype) if isinstance(value, Tensor) else float(value)
    held(value, "loss", name, array.dtype)
    return value


def held(value: Any, what: str, name: str, dtype: Any) -> None:
    """Refuse argument `name` for a loss, or another thing that is made of it, that `dtype` cannot hold."""
    with np.errstate(all="ignore"):
        value = value if isinstance(value, Tensor) else np.asarray(value).astype(dtype)
    if not math.isfinite(_total(value)) and bool((abs(value) == math.inf).any() | (value != value).any()):
        endless = value[~(abs(value) < math.inf)]
        fail(name, f"must give a {what} that is finite in {dtype}", endless.reshape(-1)[0].item())


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


def token_mask(name: str, array: Any, rows: Any) -> None:
    """A mask of tokens `rows` (…, M, D) is bool, fits them and leaves one in each set; None is no mask."""
    if array is not None:
        of_library(Tensor if isinstance(rows, Tensor) else np.ndarray, name, array)
        axis(name, array, tuple(rows.shape[:-2]), rows.shape[-2])
        mask(name, array, whole_rows=True)


def tokens(*sets: tuple) -> None:
    """Token sets `(name, tokens (…, M, D), name of the mask, mask)` must be comparable.

    Each holds a token at least, finite floats of the dtype of the first set; its mask fits it.
    """
    floats(**{name: rows for name, rows, _, _ in sets})
    for name, rows, mask_name, real in sets:
        if rows.shape[-2] == 0:
            fail(name, "must hold at least one token", tuple(rows.shape))
        token_mask(mask_name, real, rows)


def positive(library: type | None = None, /, **scalars: Any) -> None:
    """Every scalar must be finite and > 0; beside NumPy arrays it is no tensor."""
    for name, value in scalars.items():
        number = _number(name, value, library)
        if not (number > 0 and math.isfinite(number)):
            fail(name, "must be a finite number > 0", number)


def finite(library: type | None = None, /, **scalars: Any) -> None:
    """Every scalar must be finite; beside NumPy arrays it is no tensor."""
    for name, value in scalars.items():
        number = _number(name, value, library)
        if not math.isfinite(number):
            fail(name, "must be finite", number)


def generator(rng: Any) -> None:
    """Random choices take a NumPy Generator; a seed or the old global state is no substitute."""
    if not isinstance(rng, np.random.Generator):
        fail("rng", "must be a numpy.random.Generator", type(rng).__name__)


OTHER = {np.ndarray: Tensor, Tensor: np.ndarray}


def _number(name: str, value: Any, library: type | None = None) -> float:
    """A scalar, Python's or an array without axes, as a Python float."""
    if tuple(getattr(value, "shape", ())) != ():
        fail(name, "must be a scalar", f"shape {tuple(value.shape)}")
    if not hasattr(value, "__float__") or isinstance(value, OTHER.get(library, ())):
        fail(name, "must be a number", type(value).__name__)
    return float(value.detach() if isinstance(value, Tensor) else value)


def on_every_rank(check: Callable[[], object], name: str, array: Any, group: Any = None) -> None:
    """Run `check` on every rank and compare shape and dtype of one array: all ranks raise, or none does.

    A rank that raised alone would leave the others waiting for it in the next collective.
    """
    fault = None
    try:
        check()
    except ValueError as error:
        fault = str(error)
    kind = tuple(getattr(array, "shape", ())), str(getattr(array, "dtype", ""))
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (fault, *kind), group=group)
    for rank, (message, *_) in enumerate(reports):
        if message:
            raise ValueError(f"rank {rank}: {message}")
    for place, what in ((1, "shape"), (2, "dtype")):
        found = [report[place] for report in reports]
        if len(set(found)) > 1:
            fail(name, f"must have the same {what} on every rank", found)
