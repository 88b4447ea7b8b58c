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


def whole(model: str) -> tuple[str, str]:
    """The rules that unexpected and missing names break; model: what the source must hold, as "a FLAVA"."""
    return f"must hold {model} and nothing else", f"must hold {model} and every tensor of it"


SCALE = "contrast.log_scale"  # a scalar, which some files write with an axis of 1


def read(
    rows: Rows, state: Mapping[str, Tensor], rules: tuple[str, str], leading: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """The tensors of a state dict in our names and shapes, one for each row.

    leading: our name → how many axes of 1 theirs has in front. Raises ValueError, in the words of `rules`,
    when a tensor is unexpected or missing, and when the scale is no single number.
    """
    wanted = {part for _, theirs in rows for part in parts(theirs)}
    refuse("unexpected", sorted(set(state) - wanted), rules[0])
    refuse("missing", sorted(wanted - set(state)), rules[1])
    found = {}
    for ours, theirs in rows:
        pieces, axes = [state[part] for part in parts(theirs)], (leading or {}).get(ours, 0)
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if ours == SCALE:
            if tensor.numel() != 1:
                require.fail(theirs, "must hold one number", tuple(tensor.shape))
            tensor = tensor.reshape(())
        if tensor.shape[:axes] != (1,) * axes:
            require.fail(theirs, f"must have {axes} leading axes of size 1", tuple(tensor.shape))
        found[ours] = tensor[(0,) * axes]
    return found


def write(rows: Rows, state: Mapping[str, Tensor], leading: Mapping[str, int]) -> dict[str, Tensor]:
    """The inverse of `read`, of the rows that our state dict has."""
    found: dict[str, Tensor] = {}
    for ours, theirs in rows:
        if ours in state:
            tensor, names = state[ours][(None,) * leading.get(ours, 0)], parts(theirs)
            found |= zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True)
    return found


def one_spelling(state: dict[str, Tensor], theirs: str, other: str) -> None:
    """Call a tensor of the state dict `theirs` where it is called `other`, in place; refuse two values."""
    if other in state and not torch.equal(state.setdefault(theirs, state[other]), state.pop(other)):
        require.fail("source", f"must spell {theirs} one way or with equal values", "two values")


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
