"""What the tables of published names share: rows of two names, layers, reports, axes of 1, grids.

A table has one row (ours, theirs) a tensor. A name that ends in "." stands for its weight and its bias, and
{query,key,value} in theirs stands for three tensors that are stacked in ours, in this order.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minivlp.core import require

Rows = list[tuple[str, str]]


def both(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows, of which those whose names end in "." are two: their weights and their biases."""
    ends = (("weight", "bias") if row[0].endswith(".") else ("",) for row in rows)
    return [tuple(name + end for name in row) for row, some in zip(rows, ends, strict=True) for end in some]


def parts(theirs: str) -> list[str]:
    """The names that a row's name stands for: those in braces, each in its place, or the name itself."""
    braces = re.search(r"\{(.*?)\}", theirs)
    return [theirs.replace(braces[0], part) for part in braces[1].split(",")] if braces else [theirs]


def count_layers(names: Iterable[str], before: str) -> int:
    """One more than the largest number that follows `before` in the names, at least 1."""
    found = [re.match(re.escape(before) + r"(\d+)\.", name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def refuse(what: str, names: Iterable[str], rule: str) -> None:
    """Refuse a source for names that are `what`, missing or unexpected, if there are any."""
    names = list(names)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        require.fail("source", rule, f"{what} {', '.join(names[:3])}{more}")


def read(
    model: str, rows: Rows, state: Mapping[str, Tensor], leading: Mapping[str, int]
) -> dict[str, Tensor]:
    """The tensors of a state dict in our names and shapes, of all rows; `leading` as of `without`.

    Raises ValueError when one is unexpected or missing; `model` is what the source must hold, as "a FLAVA".
    """
    wanted = {part for _, theirs in rows for part in parts(theirs)}
    refuse("unexpected", sorted(set(state) - wanted), f"must hold {model} and nothing else")
    refuse("missing", sorted(wanted - set(state)), f"must hold {model} and every tensor of it")
    found = {}
    for ours, theirs in rows:
        pieces = [state[part] for part in parts(theirs)]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        found[ours] = without(theirs, tensor, leading.get(ours, 0))
    return found


def without(theirs: str, tensor: Tensor, leading: int) -> Tensor:
    """The tensor without its `leading` axes, which must have size 1."""
    if tensor.shape[:leading] != (1,) * leading:
        require.fail(theirs, f"must have {leading} leading axes of size 1", tuple(tensor.shape))
    return tensor[(0,) * leading]


def agree(where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a part of config.json in which a key has another value than the weights say."""
    for key, value in wanted.items():
        if found.get(key, value) != value:
            require.fail(where, f"must have {key} = {value!r}, as the weights do", repr(found[key]))


def square(theirs: str, positions: int, cls: int = 1, rule: str = "must hold 1 + g · g positions") -> int:
    """g of a table of `positions` rows, of which `cls` are no patch and the others a g × g grid."""
    grid = math.isqrt(max(positions - cls, 0))
    if not grid or grid**2 != positions - cls:
        require.fail(theirs, rule, positions)
    return grid


def head_count(heads: int | None, dim: int) -> int:
    """The number of heads, by default D / 64."""
    if heads is None and dim % 64:
        require.fail("heads", f"must be given, as D={dim} is not a multiple of 64", "None")
    return dim // 64 if heads is None else heads
