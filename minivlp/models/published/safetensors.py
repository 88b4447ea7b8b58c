"""Weight files: read them without running the code a file may carry, and write them whole or not at all.

A safetensors file is three parts: the header's length as an unsigned 64-bit little-endian number, the header
in JSON, and one block of raw little-endian numbers. The header gives every tensor's place in that block,

    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …},

beside an optional "__metadata__" of texts, and the places must tile the block: no gap, no overlap, nothing
left over. So a reader can check all of it before it believes any of it. A torch file (.bin, .ckpt) is a
pickle, read here with `weights_only=True`, which builds tensors and plain containers and nothing else.

Sources: the format section of the safetensors documentation; the dtype names are its own.
Left out: writing shards, mapping a file into memory, and machines whose own numbers are big-endian.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minivlp.core import require
from minivlp.core.files import whole_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Module = TypeVar("Module", bound=nn.Module)
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WHOLE, INDEX = ("model.safetensors", "pytorch_model.bin"), ".index.json"
LONGEST_HEADER = 100_000_000  # the format's own limit, in bytes


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
):
    """Write named tensors and, if given, a dictionary of texts; the file is replaced whole or not at all.

    Raises ValueError for a dtype that the format does not have.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    # Widest numbers first: every tensor then starts at a multiple of its own item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in NAMES:
            require.fail(name, f"must have one of the dtypes {', '.join(DTYPES)}", tensor.dtype)
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # spaces align the block
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, on CPU. Raises ValueError when the file breaks the format."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        _need(
            size >= 8 and length <= min(LONGEST_HEADER, size - 8), path, "have a header that fits in the file"
        )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must have a header in JSON, got {error}") from error
        _need(isinstance(header, dict), path, "have a header that is a JSON object")
        header.pop("__metadata__", None)
        places = sorted(
            (_place(path, name, entry) for name, entry in header.items()), key=lambda p: (p[0], p[1])
        )
        reached, tensors = 0, {}
        for begin, end, _, _, name in places:
            _need(
                begin == reached, path, f"hold tensors without gap or overlap, but {name!r} starts at {begin}"
            )
            reached = end
        _need(reached == size - 8 - length, path, f"end where its last tensor ends, {reached} bytes of data")
        for begin, end, dtype, shape, name in places:
            buffer = bytearray(end - begin)  # a buffer of its own: tensors stay aligned, and free one by one
            _need(file.readinto(buffer) == len(buffer), path, f"hold all of {name!r}")
            numbers = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
            tensors[name] = numbers.reshape(shape)
    return tensors


def _need(rule_holds: bool, path: str | os.PathLike, rule: str) -> None:
    if not rule_holds:
        require.fail(str(path), f"must {rule}", "a broken safetensors file")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _place(path: str | os.PathLike, name: str, entry: Any) -> tuple[int, int, torch.dtype, list[int], str]:
    """(begin, end, dtype, shape, name) of one header entry, checked in itself."""
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    _need(whole, path, f"give {name!r} a known dtype, a shape and two offsets")
    _need(end - begin == math.prod(shape) * dtype.itemsize, path, f"give {name!r} as many bytes as its shape")
    return begin, end, dtype, shape, name


def load_state(source: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a model's tensors and its config.json: `(state, config)`, the config {} where there is none.

    source: a state dict; a `.safetensors`, `.bin`, `.ckpt`, `.pt` or `.pth` file; or a folder with
    `model.safetensors` or `pytorch_model.bin`, whole or in shards with an index. A config.json beside the
    file is read. A training checkpoint that keeps its model under "state_dict" or "model" is unwrapped, and
    the names lose what DDP and torch.compile put before them. Raises ValueError when the source is none of
    these or does not load.
    """
    if isinstance(source, Mapping):
        return _tensors(source), {}
    path = Path(source)
    if path.is_dir():
        known = [name + end for name in WHOLE for end in ("", INDEX)]
        found = [path / name for name in known if (path / name).exists()]
        if not found:
            require.fail("source", f"must be a folder with {' or '.join(WHOLE)}", f"{path} without")
        path = found[0]
    state = _shards(path) if path.name.endswith(INDEX) else _one_file(path)
    return _tensors(state), _json_object(path.parent / "config.json")


def _one_file(path: Path) -> Any:
    if not path.is_file():
        require.fail("source", "must be a state dict, a file or a folder", f"{path}, which does not exist")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix not in (".bin", ".ckpt", ".pt", ".pth"):
        require.fail("source", "must end in .safetensors, .bin, .ckpt, .pt or .pth", path.name)
    try:
        with warnings.catch_warnings(action="ignore"):  # what it may warn of is an error here
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds
        rule = "must be a torch file of tensors that loads with weights_only=True"
        raise ValueError(f"source {rule}, got {path}{_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What torch found in a file, without its advice to run what it found."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    if foreign := re.search(r"GLOBAL (\S+)", text):  # as Lightning, whose callbacks are keyed by their class
        once = 'torch.save(torch.load(path, weights_only=False)["state_dict"], "weights.bin")'
        return f" with {foreign[1]} in it; where you trust the file, make one without by {once}"
    told = re.search(r"WeightsUnpickler error: (.*)", text) or re.match(r"\s*(.*)", text)
    reason = told[1].split(". ")[0].strip()
    return f": {reason if ' ' in reason else type(error).__name__}"


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names; they lie beside it."""
    places = _json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in places.values()
    ):
        require.fail(str(index), "must give each tensor's file beside it in a weight_map", "another form")
    held = {file: _one_file(index.with_name(file)) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in held[file]:
            require.fail(file, f"must hold {name}, as {index.name} says", "a file without it")
    return {name: held[file][name] for name, file in places.items()}


def _json_object(path: Path) -> dict[str, Any]:
    """What a JSON file says; {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        require.fail(str(path), "must be a JSON object", type(content).__name__)
    return content


def save_state(folder: str | os.PathLike, state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write `model.safetensors` and `config.json` to a folder, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())
    write_safetensors(folder / "model.safetensors", state, {"format": "pt"})


def filled(new: Callable[[], Module], tensors: Mapping[str, Tensor], spelling: Mapping[str, str]) -> Module:
    """A new model, on CPU, with these tensors for its weights; `spelling` is what their source calls them.

    Raises ValueError on a wrong shape.
    """
    with torch.device("meta"):  # shapes only: no random numbers are drawn for weights that are replaced
        model = new()
    for name, empty in model.state_dict().items():
        if tensors[name].shape != empty.shape:
            require.fail(spelling[name], f"must have shape {tuple(empty.shape)}", tuple(tensors[name].shape))
    model.to_empty(device="cpu").load_state_dict(tensors)
    return model


def _tensors(state: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not state or not all(isinstance(t, Tensor) for t in state.values()):
        require.fail("source", "must hold named tensors", type(state).__name__)
    plain = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): tensor for name, tensor in state.items()}
    if all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    if len(plain) < len(state):
        require.fail("source", "must hold each tensor under one name", "some with and without _orig_mod.")
    return plain
