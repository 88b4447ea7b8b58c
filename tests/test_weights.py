"""Weight files: the safetensors format against its own package, broken files, writes that fail half-way."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp.core.files import whole_file
from minivlp.models.published import safetensors as weights
from minivlp.models.published.safetensors import DTYPES, load_state, read_safetensors, write_safetensors


def tensors(dtypes=DTYPES):
    """One tensor a dtype; among them a scalar, an empty one and a view with permuted strides."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (), (4, 0), (5,), (1, 1, 7)]
    out = {}
    for i, name in enumerate(dtypes):
        numbers = torch.randint(0, 100, shapes[i % len(shapes)], generator=generator)
        out[f"layer.{i}.ünïcode {name}"] = numbers.to(DTYPES[name])
    out["a view"] = torch.arange(6.0).view(2, 3).T
    return out


def same(a, b):
    """Equal names, dtypes, shapes and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name])]
        assert torch.equal(*bits), name
    return True


def test_round_trip(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", tensors(), {"format": "pt"})
    assert same(read_safetensors(tmp_path / "w.safetensors"), tensors())
    write_safetensors(tmp_path / "w.safetensors", {})  # replaces, and may hold nothing
    assert read_safetensors(tmp_path / "w.safetensors") == {}


def test_special_numbers_keep_their_bits(tmp_path):
    special = {"x": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, 3.4e38])}
    write_safetensors(tmp_path / "w.safetensors", special)
    assert same(read_safetensors(tmp_path / "w.safetensors"), special)


def test_the_package_reads_what_we_write(tmp_path):
    """Outside truth: the safetensors package."""
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "w.safetensors"
    write_safetensors(path, tensors(), {"format": "pt", "note": "π"})
    assert same(library.load_file(path), tensors())
    with pytest.importorskip("safetensors").safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "π"}


def test_we_read_what_the_package_writes(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    plain = {name: tensor.contiguous() for name, tensor in tensors().items()}
    library.save_file(plain, tmp_path / "w.safetensors", {"format": "pt"})
    assert same(read_safetensors(tmp_path / "w.safetensors"), plain)


def test_tensors_of_one_file_are_writable_and_apart(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2), "b": torch.ones(2)})
    read = read_safetensors(tmp_path / "w.safetensors")
    read["a"] += 1
    assert torch.equal(read["b"], torch.ones(2))


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x must have one of the dtypes F64, .* got torch\.complex64"):
        write_safetensors(tmp_path / "w.safetensors", {"x": torch.ones(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def raw(header, block, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + block


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


EIGHT = bytes(8)
BROKEN = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "header longer than the file": raw({}, b"", length=100),
    "header length absurd": raw({}, b"", length=2**63),
    "not JSON": raw(b"{a}", b""),
    "not UTF-8": raw(b'{"\xff": 1}', b""),
    "nested without end": raw(b"[" * 100_000, b""),
    "a list": raw([], b""),
    "name twice": raw(b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), EIGHT),
    "unknown dtype": raw({"a": entry(dtype="F31")}, EIGHT),
    "no shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "entry is a number": raw({"a": 3}, EIGHT),
    "three offsets": raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, EIGHT),
    "fractional offset": raw({"a": entry(0.0, 8.0)}, EIGHT),
    "boolean shape": raw({"a": entry(0, 4, (True,))}, bytes(4)),
    "negative shape": raw({"a": entry(0, 8, (-1, -2))}, EIGHT),
    "too few bytes for the shape": raw({"a": entry(0, 4)}, bytes(4)),
    "end before begin": raw({"a": entry(8, 0)}, EIGHT),
    "starts before the block": raw({"a": entry(-8, 0)}, EIGHT),
    "ends after the file": raw({"a": entry(0, 8)}, bytes(7)),
    "overlap": raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "same bytes twice": raw({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT),
    "gap": raw({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "bytes left over": raw({"a": entry(0, 8)}, bytes(9)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_refused(tmp_path, what):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[what])
    with pytest.raises(ValueError, match=r"broken\.safetensors must ") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)
    library = pytest.importorskip("safetensors", reason="safetensors is not installed")
    if what != "name twice":  # which the format forbids, and the package lets pass
        with pytest.raises(library.SafetensorError), library.safe_open(path, "pt"):
            pass


def test_the_smallest_good_file_is_not_broken(tmp_path):
    """The builder of the broken files above makes good ones too; entries need no order."""
    path = tmp_path / "good.safetensors"
    path.write_bytes(raw({"b": entry(8, 16), "a": entry(0, 8)}, EIGHT + struct.pack("<2f", 1.5, -2)))
    assert read_safetensors(path)["b"].tolist() == [1.5, -2]


@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_byte_never_crashes(tmp_path_factory, place, value):
    """Whatever one byte becomes, the answer is tensors or a ValueError."""
    path = tmp_path_factory.mktemp("damage") / "w.safetensors"
    write_safetensors(path, tensors(["F32", "I64", "BF16"]))
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    try:
        read_safetensors(path)
    except ValueError as error:
        assert str(path) in str(error)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_safetensors(path, {"a": torch.zeros(2)})
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert torch.equal(read_safetensors(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "x.bin"
    with whole_file(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    if os.name == "posix":  # and is as readable as any other file
        (tmp_path / "y.bin").write_bytes(b"")
        assert path.stat().st_mode == (tmp_path / "y.bin").stat().st_mode


def test_load_state_prefers_safetensors_and_reads_the_config(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    state, config = load_state(tmp_path)
    assert state["a"] == 1 and config == {}
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    assert load_state(tmp_path / "pytorch_model.bin")[1] == {"hidden_size": 3}
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json must be a JSON object"):
        load_state(tmp_path)
    same_again, config = load_state({"state_dict": state})
    assert same_again == state and config == {}


class Callback:
    """Stands for what training libraries put into their checkpoints."""


def test_a_foreign_class_in_a_checkpoint_is_named_with_what_to_do(tmp_path):
    """As Lightning's callbacks, which are keyed by their class."""
    path = tmp_path / "last.ckpt"
    torch.save({"callbacks": {Callback: 1}, "state_dict": {"a": torch.ones(1)}}, path)
    with pytest.raises(
        ValueError, match=r"with tests\.test_weights\.Callback in it; where you trust"
    ) as told:
        load_state(path)
    assert "\n" not in str(told.value) and "\x1b" not in str(told.value) and len(str(told.value)) < 500
    advice = str(told.value).partition("by torch")[2]
    exec(
        f"torch{advice.replace('weights.bin', str(tmp_path / 'weights.bin'))}", {"torch": torch, "path": path}
    )
    assert same(load_state(tmp_path / "weights.bin")[0], {"a": torch.ones(1)})


def damaged_files(folder):
    torch.save({"a": torch.ones(4)}, folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "script.pt")
    yield folder / "script.pt"
    for name, content in {
        "cut": whole[:-99],
        "junk": b"hello there",
        "empty": b"",
        "text": b"\x80\x04.",
    }.items():
        (folder / f"{name}.pt").write_bytes(content)
        yield folder / f"{name}.pt"


def test_a_damaged_torch_file_is_one_sentence_and_no_warning(tmp_path, recwarn):
    for path in damaged_files(tmp_path):
        with pytest.raises(ValueError, match=f"loads with weights_only=True, got {path}: [A-Za-z]") as told:
            load_state(path)
        assert "\n" not in str(told.value) and "\x1b" not in str(told.value)
    assert not [w for w in recwarn if "torch" in str(w.message) and "deprecated" not in str(w.message)]


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("under", [None, "state_dict", "model"])
def test_what_wrappers_put_before_the_names_is_taken_off(before, under):
    plain = {"a.weight": torch.ones(1), "module.b": torch.zeros(1)}
    wrapped = {before + name: tensor for name, tensor in plain.items()}
    assert same(load_state({under: wrapped, "step": 3} if under else wrapped)[0], plain)
    inner = {"a._orig_mod.weight": torch.ones(1), "module.b": torch.zeros(1)}  # one layer was compiled
    assert same(load_state(inner)[0], plain)
    with pytest.raises(ValueError, match="source must hold each tensor under one name"):
        load_state(plain | {"_orig_mod.a.weight": torch.ones(1)})


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_shards_loads(tmp_path, name):
    stem, _, end = name.partition(".")
    parts = [{"a": torch.ones(2)}, {"b": torch.zeros(1), "c": torch.ones(())}]
    files = [f"{stem}-0000{i + 1}-of-00002.{end}" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        write_safetensors(tmp_path / file, part) if end == "safetensors" else torch.save(
            part, tmp_path / file
        )
    places = {tensor: file for file, part in zip(files, parts, strict=True) for tensor in part}
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": places}))
    assert same(load_state(tmp_path)[0], parts[0] | parts[1])
    for wrong, message in [
        (places | {"d": files[0]}, rf"{files[0]} must hold d, as {name}\.index\.json says"),
        (places | {"a": "../a.bin"}, r"index\.json must give each tensor's file beside it in a weight_map"),
        (places | {"a": f"gone.{end}"}, rf"gone\.{end}, which does not exist"),
        ([], "index.json must give each tensor's file"),
    ]:
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=message):
            load_state(tmp_path)


def test_numbers_match_numpy(tmp_path):
    """The block is raw little-endian numbers, at the offsets that the header says."""
    x = torch.randn(3, 4, dtype=torch.float64)
    write_safetensors(tmp_path / "w.safetensors", {"x": x})
    content = (tmp_path / "w.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    begin, end = json.loads(content[8 : 8 + length])["x"]["data_offsets"]
    found = np.frombuffer(content[8 + length :][begin:end], dtype="<f8").reshape(3, 4)
    assert np.array_equal(found, x.numpy())
    assert length % 8 == 0


def test_every_tensor_starts_on_a_multiple_of_its_item_size(tmp_path):
    """So a reader may map the file; shapes here are odd, and the names are in the other order."""
    odd = {f"{i} {name}": torch.ones(3).to(dtype) for i, (name, dtype) in enumerate(reversed(DTYPES.items()))}
    write_safetensors(tmp_path / "w.safetensors", odd)
    content = (tmp_path / "w.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert all(header[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in odd.items())
