"""What a fused rung holds: numbers kept for the backward pass, and the largest array that it makes.

The rung runs at sizes well above a tile, with every operation of PyTorch watched, so that neither a list, nor
the attributes of a context, nor a forward pass repeated in the backward pass hides an array. NumPy's memory
is watched as a whole. A rung that is not fused may hold what it likes.
"""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minivlp import stream
from minivlp.core import transport
from tests.laws import _setting, _tensor, central_differences, close

TILE = (128, 128)


@contextmanager
def tiles(rows: int = TILE[0], columns: int = TILE[1]) -> Iterator[None]:
    """Tiles of this size for what walks by minivlp.stream; blocks of the size that the library gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "TILE", (rows, columns))
        patch.setattr(transport, "BLOCK", 2**16)
        yield


@dataclass(frozen=True)
class Held:
    """Numbers: kept for the backward pass, and in the largest array made in the forward and backward pass."""

    kept: int
    forward: int
    backward: int
    backward_calls: frozenset[str]  # operations of the backward pass, as `mul`


class _Watch(TorchDispatchMode):
    """The storages that operations make, those of the arguments left out."""

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.given = {z.untyped_storage()._cdata for z in given}
        self.largest, self.calls, self.made = 0, set(), {}

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.calls.add(op.overloadpacket.__name__.removesuffix("_"))
        for z in tree_leaves(out):
            if isinstance(z, torch.Tensor) and z.untyped_storage()._cdata not in self.given:
                size = z.untyped_storage().nbytes() // z.element_size()
                self.largest = max(self.largest, size)
                self.made[z.untyped_storage()._cdata] = StorageWeakRef(z.untyped_storage()), size
        return out


def held(function: Callable, *args: Any, **settings: Any) -> Held:
    """What one call of a PyTorch rung holds; float arrays among `args` are differentiated."""
    tensors = [_tensor(a) for a in args]
    settings = {k: _setting(a) for k, a in settings.items()}
    wanted = [z.requires_grad_() for z in tensors if isinstance(z, torch.Tensor) and z.is_floating_point()]
    given = [z for z in (*tensors, *settings.values()) if isinstance(z, torch.Tensor)]
    _warm_up()
    tracemalloc.start()
    try:
        forward, backward = _Watch(given), _Watch(given)
        with forward:
            out = function(*tensors, **settings)
        in_numpy = tracemalloc.get_traced_memory()[1] // 8
        own = {z.untyped_storage()._cdata for z in (out,)}
        kept = sum(n for place, (ref, n) in forward.made.items() if place not in own and not ref.expired())
        with backward:
            torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)
        in_numpy_back = tracemalloc.get_traced_memory()[1] // 8
    finally:
        tracemalloc.stop()
    largest = (max(a, b) for a, b in ((forward.largest, in_numpy), (backward.largest, in_numpy_back)))
    return Held(kept, *largest, frozenset(backward.calls))


@cache
def _warm_up() -> None:
    """What PyTorch imports when it is first watched is no array of anybody's."""
    x = torch.ones(1, requires_grad=True)
    with _Watch([]):
        torch.autograd.grad((x * 2).sum(), x)


def keeps_no_matrix(
    f: Any, args: tuple, settings: dict, whole: int, matrix: str, most: int, tile: int | None = None
) -> Held | None:
    """Refuse a fused rung that keeps more than `most` numbers; `whole` is how many its `matrix` has."""
    __tracebackhide__ = True
    if f.rung != "fused":
        return None
    f.grads(*args, **settings)  # so that a report can name the call
    found = held(f.function, *args, **settings)
    told = f"; a tile has {tile:,}" if tile else f"; {most:,} are enough"
    assert found.kept <= most, (
        f"keeps {found.kept:,} numbers for the backward pass, {_share(found.kept, whole)} of {matrix}{told}"
    )
    return found


def holds_tiles_only(
    f: Any, args: tuple, settings: dict, whole: int, matrix: str, most: int, tile: int = TILE[0] * TILE[1]
) -> None:
    """Refuse also one that makes an array of more than a quarter of the matrix, forwards or backwards."""
    __tracebackhide__ = True
    with tiles():
        found = keeps_no_matrix(f, args, settings, whole, matrix, most, tile)
    if found:
        for size, way in ((found.forward, "forward"), (found.backward, "backward")):
            assert size <= whole // 4, (
                f"makes an array of {size:,} numbers in the {way} pass, {_share(size, whole)} of {matrix}; "
                f"a tile has {tile:,}"
            )


def _share(size: int, whole: int) -> str:
    if size >= 1.5 * whole:
        return f"{size / whole:.0f} times the whole"
    return "the whole" if size >= 0.9 * whole else f"{size / whole:.0%}"


def enough(*arrays: np.ndarray, tokens: int = 0) -> int:
    """What a fused rung may keep: each argument twice, and four numbers for each of so many tokens."""
    return 2 * sum(a.size for a in arrays) + 4 * tokens


def misplaced(G: np.ndarray, wanted: np.ndarray, tile: tuple[int, int] | None) -> str | None:
    """Of a gradient by the scores (B, B): which score is wrongly taken for a right pair, or is not taken.

    A right pair has 1/B less than a wrong one. None when G is right, or wrong in another way. Tiles of an
    unknown size (None) are taken to begin at the first such score.
    """
    extra = (G - wanted) * len(G)  # −1 where a pair is taken for right, +1 where a right pair is not
    off = np.argwhere(np.abs(np.abs(extra) - 1) < 1e-4)
    if not len(off):
        return None
    i, j = (int(n) for n in min(off.tolist(), key=lambda place: place[0] == place[1]))
    row, column = (i // tile[0] * tile[0], j // tile[1] * tile[1]) if tile else (i, j)
    said = "is taken for a right pair" if i != j else "is not taken for a right pair"
    return (
        f"S[{i}, {j}] {said}; in a tile that begins at row {row} and column {column} "
        f"the diagonal of S has the offset {row} − {column} = {row - column}"
    )


def right_pairs(f: Any, settings: tuple, slopes: Callable) -> None:
    """Read G = dL/dS entry by entry, off scores scale · x whose texts are the identity, and look for pairs.

    `settings` are the arguments after images and texts, the scale first; `slopes(S)` is the true G of S.
    """
    for B, tile in ((7, (2, 3)), (300, None)):
        x = np.random.default_rng(B).standard_normal((B, B)) / 4
        args = x, np.eye(B), *settings
        with tiles(*(tile or TILE)):
            found = [f.grads(*args)[0]]
            if tile:
                found.append(central_differences(f, args, 0))
        for dx in found:
            wrong = misplaced(dx / settings[0], slopes(x), tile)
            assert not wrong, wrong


def same_in_float32(
    f: Any,
    args: tuple,
    settings: dict | None = None,
    relative: float = 1e-3,
    near: float = 1e-6,
    gradients: bool = True,
) -> None:
    """In float32 the value and the gradients are those of float64 up to rounding, and have that dtype.

    The largest entry of each array sets its scale; `near` is what all may be off besides.
    """
    __tracebackhide__ = True
    settings = settings or {}
    single = [a.astype(np.float32) if is_float_array(a) else a for a in args]
    double = [a.astype(np.float64) if is_float_array(a) else a for a in single]
    if f.rung in ("torch", "fused"):
        masks = {k: _setting(a) for k, a in settings.items()}
        dtype = f.function(*map(_tensor, single), **masks).dtype
        assert dtype == torch.float32, f"float32 came in, {str(dtype).removeprefix('torch.')} came out"
    pairs = [(f(*single, **settings), f(*double, **settings))]
    if gradients:
        pairs += zip(f.grads(*single, **settings), f.grads(*double, **settings), strict=True)
    for got, wanted in pairs:
        largest = float(np.abs(wanted).max(initial=0))
        close(got, wanted, rtol=0, atol=relative * largest + near)


def is_float_array(a: Any) -> bool:
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"
