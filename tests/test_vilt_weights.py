"""ViLT's published files: both sets of names, every trap that they hold, and the way back to Hugging Face."""

import json
import re

import pytest
import torch

from minivlp.models.published.safetensors import write_safetensors
from minivlp.models.published.vilt import to_hugging_face
from minivlp.models.vilt import load_vilt, save_vilt
from tests.test_vilt import CLASSES, batch, tiny

# Written down from the original's state dict, apart from the loader's own table.
ORIGINAL = [
    (r"word\.", "text_embeddings.word_embeddings."),
    (r"text_position\.", "text_embeddings.position_embeddings."),
    (r"segment\.", "text_embeddings.token_type_embeddings."),
    (r"text_norm\.", "text_embeddings.LayerNorm."),
    (r"modality\.", "token_type_embeddings."),
    (r"cls$", "transformer.cls_token"),
    (r"position$", "transformer.pos_embed"),
    (r"patch\.", "transformer.patch_embed.proj."),
    (r"encoder\.norm\.", "transformer.norm."),
    (r"encoder\.blocks\.(\d+)\.norm", r"transformer.blocks.\1.norm"),
    (r"encoder\.blocks\.(\d+)\.(qkv|proj)", r"transformer.blocks.\1.attn.\2"),
    (r"encoder\.blocks\.(\d+)\.fc", r"transformer.blocks.\1.mlp.fc"),
    (r"pooler\.", "pooler.dense."),
    (r"mlm\.dense\.", "mlm_score.transform.dense."),
    (r"mlm\.norm\.", "mlm_score.transform.LayerNorm."),
    (r"mlm\.weight", "mlm_score.decoder.weight"),
    (r"mlm\.bias", "mlm_score.bias"),
    (r"itm\.", "itm_score.fc."),
    (r"vqa\.", "vqa_classifier."),
    (r"nlvr2\.", "nlvr2_classifier."),
    (r"rank\.", "rank_output."),
]


def original_names(model):
    """A state dict as the original code would have saved it."""
    state = {}
    for name, tensor in model.state_dict().items():
        rules = [(rule, theirs) for rule, theirs in ORIGINAL if re.match(rule, name)]
        assert len(rules) == 1, name
        shape = {"cls": (1, 1, -1), "position": (1, *tensor.shape)}.get(name, tensor.shape)
        state[re.sub("^" + rules[0][0], rules[0][1], name)] = tensor.reshape(shape).clone()
    state["text_embeddings.position_ids"] = torch.arange(12)[None]
    return state


def same_weights(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


EVERYTHING = dict(image_types=2, nlvr2=True, rank=True, num_answers=7)


@pytest.mark.parametrize("heads", [{}, EVERYTHING, {"mlm": False, "itm": False}, {"mlm_tied": True}])
def test_original_names_load(heads):
    model = tiny(**heads)
    loaded = load_vilt(original_names(model), heads=4)
    assert loaded.config == model.config  # with the original's eps: 1e-6 in the blocks, 1e-12 around the text
    assert same_weights(loaded, model)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".safetensors"])
def test_files_load(tmp_path, suffix):
    model = tiny()
    state, path = original_names(model), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        write_safetensors(path, state)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".ckpt" else state, path)
    assert same_weights(load_vilt(path, heads=4), model)
    assert same_weights(load_vilt(str(path), heads=4), model)
    if suffix != ".ckpt":
        folder = tmp_path / "folder"
        folder.mkdir()
        path.rename(folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"))
        assert same_weights(load_vilt(folder, heads=4), model)


HEADS = {
    "ViltModel": dict(mlm=False, itm=False),
    "ViltForMaskedLM": dict(itm=True),
    "ViltForQuestionAnswering": dict(mlm=False, itm=False, num_answers=7),
    "ViltForImagesAndTextClassification": dict(mlm=False, itm=False, image_types=2, nlvr2=True),
    "ViltForImageAndTextRetrieval": dict(mlm=False, itm=False, rank=True),
}


@pytest.mark.parametrize("name", CLASSES)
def test_hugging_face_loads_what_we_save(tmp_path, name):
    """Saved, read by Hugging Face with nothing missing, saved by it, and read back: the same bits."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = tiny(eps=1e-12, **HEADS[name])
    save_vilt(model, tmp_path / "ours")
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert report["unexpected_keys"] == ({"itm_score.fc.weight", "itm_score.fc.bias"} if model.itm else set())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [name]
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_vilt(tmp_path / "theirs")
    state = {key: t for key, t in model.state_dict().items() if not key.startswith("itm.")}
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[key]) for key, t in back.state_dict().items())
    if name == "ViltForMaskedLM":
        ids, text_mask, pixels, pixel_mask = batch()
        logits = model.mlm_logits(model.encode(ids, text_mask, pixels, pixel_mask)["text"])
        inputs = dict(input_ids=ids, attention_mask=text_mask, pixel_values=pixels, pixel_mask=pixel_mask)
        assert torch.allclose(theirs(**inputs).logits, logits, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"mlm_tied": True}, {"eps": 1e-5, "text_eps": 1e-7}])
def test_what_we_save_loads_whole(tmp_path, changes):
    """All of the configuration comes back, also what Hugging Face has no word for; a second save replaces."""
    model = tiny(**changes)
    save_vilt(tiny(layers=1), tmp_path)
    save_vilt(model, tmp_path)
    loaded = load_vilt(tmp_path)
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def face_names(**changes):
    """Our model as a Hugging Face state dict."""
    return to_hugging_face(tiny(**changes).state_dict())


def test_trap_bias_of_the_decoder_in_two_spellings():
    """Recent Hugging Face: mlm_score.decoder.bias. Older files: mlm_score.bias, or both."""
    new = face_names()
    old = {k.replace("mlm_score.decoder.bias", "mlm_score.bias"): t for k, t in new.items()}
    for state in (new, old, new | old):
        assert torch.equal(load_vilt(state, heads=4).mlm_bias, new["mlm_score.decoder.bias"])
    with pytest.raises(ValueError, match=r"must spell mlm_score\.decoder\.bias one way or with equal values"):
        load_vilt(new | old | {"mlm_score.bias": old["mlm_score.bias"] + 1}, heads=4)


@pytest.mark.parametrize("name", ["vilt.embeddings.text_embeddings.position_ids", "transformer.head.weight"])
def test_trap_tensors_that_mean_nothing(name):
    """The buffer of positions and the ImageNet classifier are passed over."""
    state = face_names() if name.startswith("vilt.") else original_names(tiny())
    assert same_weights(load_vilt(state | {name: torch.ones(1, 12)}, heads=4), tiny())


def test_trap_tied_or_not():
    """The flag follows the numbers: tied is no decoder, or one equal to the words' matrix; no other is."""
    untied, tied = face_names(), face_names(mlm_tied=True)
    assert "mlm_score.decoder.weight" not in tied
    both = tied | {"mlm_score.decoder.weight": tied["vilt.embeddings.text_embeddings.word_embeddings.weight"]}
    assert [load_vilt(s, heads=4).config.mlm_tied for s in (untied, tied, both)] == [False, True, True]
    loaded = load_vilt(untied, heads=4)
    assert torch.equal(loaded.mlm_weight, untied["mlm_score.decoder.weight"])
    assert not torch.equal(loaded.mlm_weight, loaded.word.weight)


def test_trap_eps():
    """1e-12 for Hugging Face; 1e-6 in the original's blocks and 1e-12 around its text; or as asked."""
    face, original = face_names(), original_names(tiny())
    for state, asked, expected in [
        (face, None, (1e-12, 1e-12)),
        (original, None, (1e-6, 1e-12)),
        (face, 1e-3, (1e-3, 1e-3)),
        (original, 1e-3, (1e-3, 1e-3)),
    ]:
        model = load_vilt(state, heads=4, eps=asked)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        blocks = {norm.eps for norm in norms if norm not in (model.text_norm, model.mlm.norm)}
        assert (blocks, model.text_norm.eps, model.mlm.norm.eps) == ({expected[0]}, expected[1], expected[1])
    with pytest.raises(ValueError, match="eps must be a finite number > 0"):
        load_vilt(face, heads=4, eps=0.0)


def test_trap_heads():
    """The weights do not tell: the argument, else config.json, else a head for every 64."""
    assert load_vilt(face_names(dim=128)).config.heads == 2
    with pytest.raises(ValueError, match="heads must be given, as D=32 is not a multiple of 64"):
        load_vilt(face_names())
    with pytest.raises(ValueError, match="heads must divide dim=32, got 5"):
        load_vilt(face_names(), heads=5)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin"])
def test_trap_config_beside(tmp_path, name):
    """A config.json beside the weights gives heads and eps, and must belong to them."""
    if name.endswith(".bin"):
        torch.save(face_names(), tmp_path / name)
    else:
        write_safetensors(tmp_path / name, face_names())
    beside = {"model_type": "vilt", "num_attention_heads": 8, "layer_norm_eps": 1e-4}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    config = load_vilt(tmp_path / name).config
    assert (config.heads, config.eps, config.text_eps) == (8, 1e-4, 1e-4)
    assert load_vilt(tmp_path / name, heads=2, eps=1e-5).config.heads == 2
    for wrong in ({"model_type": "clip"}, {"hidden_size": 64}, {"hidden_act": "quick_gelu"}):
        (tmp_path / "config.json").write_text(json.dumps(beside | wrong))
        with pytest.raises(ValueError, match=f"config.json must have {next(iter(wrong))} = "):
            load_vilt(tmp_path / name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be"):
        load_vilt(tmp_path / name)


def test_trap_another_grid_of_positions():
    """Asked for another image size, the stored grid is resized once, as it would be for every image."""
    state = face_names()
    model, larger = load_vilt(state, heads=4), load_vilt(state, heads=4, image_size=48)
    assert larger.position.shape == (37, 32)
    assert torch.equal(larger.position[0], model.position[0])
    ids, text_mask, pixels = torch.ones(2, 4, dtype=int), torch.ones(2, 4) > 0, torch.randn(2, 3, 48, 48)
    expected = model.encode(ids, text_mask, pixels)["image"]
    assert torch.allclose(larger.encode(ids, text_mask, pixels)["image"], expected, atol=1e-5)
    for impossible in (50, 4, 0):
        with pytest.raises(ValueError, match=f"image_size must be a multiple of patch=8, got {impossible}"):
            load_vilt(state, heads=4, image_size=impossible)


@pytest.mark.parametrize("types", [1, 2])
def test_trap_two_or_three_modality_rows(types):
    assert load_vilt(face_names(image_types=types), heads=4).config.image_types == types


def test_trap_one_name_for_two_classifiers():
    """Hugging Face says "classifier" for VQA and NLVR2: their shapes tell them apart."""
    vqa, pair = face_names(num_answers=7), face_names(nlvr2=True, image_types=2)
    assert {name for name in vqa if "classifier" in name} == {name for name in pair if "classifier" in name}
    assert load_vilt(vqa, heads=4).config.num_answers == 7
    loaded = load_vilt(pair, heads=4).config
    assert loaded.nlvr2 and not loaded.num_answers
    # As many answers as classes, or as the width, changes nothing.
    assert load_vilt(face_names(num_answers=2), heads=4).config.num_answers == 2


def test_half_precision_files_load_as_float32():
    state = {name: tensor.half() for name, tensor in face_names().items()}
    assert {p.dtype for p in load_vilt(state, heads=4).parameters()} == {torch.float32}


def test_loading_draws_no_random_number_and_shares_no_memory():
    state = face_names()
    before = torch.random.get_rng_state()
    model = load_vilt(state, heads=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    model.cls.data += 1
    assert not torch.equal(model.cls, state["vilt.embeddings.cls_token"].flatten())


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


def test_missing_and_unexpected_tensors_are_named():
    face, original = face_names(), original_names(tiny())
    for name in [
        "vilt.layernorm.bias",
        "vilt.encoder.layer.0.attention.attention.key.bias",
        "vilt.pooler.dense.weight",
    ]:
        with pytest.raises(ValueError, match=f"missing {name}"):
            load_vilt(without(face, name), heads=4)
    for name in [
        "transformer.blocks.1.attn.qkv.weight",
        "mlm_score.transform.dense.bias",
        "token_type_embeddings.weight",
    ]:
        with pytest.raises(ValueError, match=f"missing {name}"):
            load_vilt(without(original, name), heads=4)
    with pytest.raises(ValueError, match=r"nothing else, got unexpected mpp_score\.bias"):
        load_vilt(original | {"mpp_score.bias": torch.ones(3)}, heads=4)
    with pytest.raises(ValueError, match=r"missing .* and \d+ more"):
        load_vilt({k: t for k, t in face.items() if "layer.0." not in k}, heads=4)


def test_shapes_that_do_not_fit_are_refused():
    face, name = face_names(), "vilt.encoder.layer.1.output.dense.weight"
    with pytest.raises(ValueError, match=rf"{name} must have shape \(32, 48\), got \(32, 47\)"):
        load_vilt(face | {name: torch.ones(32, 47)}, heads=4)
    with pytest.raises(ValueError, match="cls_token must have 2 leading axes of size 1"):
        load_vilt(face | {"vilt.embeddings.cls_token": torch.ones(2, 1, 32)}, heads=4)
    with pytest.raises(ValueError, match=r"must hold 1 \+ g · g positions, got 16"):
        load_vilt(face | {"vilt.embeddings.position_embeddings": torch.ones(1, 16, 32)}, heads=4)


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_wrong_files_are_refused_in_one_sentence(tmp_path, suffix, capsys):
    path = tmp_path / f"wrong{suffix}"
    with pytest.raises(ValueError, match="source must be a state dict, a file or a folder"):
        load_vilt(path)
    path.write_bytes(b"not weights at all, only a few words")
    with pytest.raises(ValueError, match="must") as caught:
        load_vilt(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="must"):
        load_vilt(path)
    if suffix == ".ckpt":
        torch.save({"state_dict": {"a": torch.ones(1)}, "hook": Code()}, path)
        with pytest.raises(ValueError, match="loads with weights_only=True"):
            load_vilt(path)
        assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"must be a folder with model\.safetensors"):
        load_vilt(tmp_path)
    (tmp_path / "weights.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        load_vilt(tmp_path / "weights.txt")
    with pytest.raises(ValueError, match=r"must hold a ViLT .* got visual\.proj, …"):
        load_vilt({"visual.proj": torch.ones(2)})
    with pytest.raises(ValueError, match="source must hold named tensors"):
        load_vilt({"step": 3})
