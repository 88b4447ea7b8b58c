"""CLIP's and SigLIP's published files: their names, their traps, and the way back to Hugging Face."""

import json

import pytest
import torch

from minivlp.models.dual import Dual, DualConfig, load_clip, load_siglip, save_clip, save_siglip
from minivlp.models.published.clip_siglip import CLIP, SIGLIP, to_hugging_face
from minivlp.models.published.safetensors import write_safetensors
from tests.test_dual import FORMS, SMALL, batch, clip, compare, siglip, tiny

LOAD, SAVE = {"clip": load_clip, "siglip": load_siglip}, {"clip": save_clip, "siglip": save_siglip}
THEIRS = {"clip": clip, "siglip": siglip}
EPS = {"clip": 1e-5, "siglip": 1e-6}
ACTIVATION = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}


def ours(form, **changes):
    """A Dual of the form as published: with the activation and the eps that no weights tell."""
    return tiny(form, **{"activation": ACTIVATION[form], "eps": EPS[form]} | changes)


def face_names(form, **changes):
    """Our model as a Hugging Face state dict."""
    return to_hugging_face({"clip": CLIP, "siglip": SIGLIP}[form], ours(form, **changes).state_dict())


def zeros(form, **changes):
    """A state dict of a large model that costs no memory."""
    with torch.device("meta"):
        shapes = Dual(DualConfig(**SMALL | FORMS[form] | changes)).state_dict()
    nothing = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}
    return to_hugging_face({"clip": CLIP, "siglip": SIGLIP}[form], nothing)


def same_weights(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_of_theirs_has_a_place(form):
    """Loaded and written back: the same names, shapes and bits as Hugging Face's own state dict."""
    state = THEIRS[form]().state_dict()
    back = to_hugging_face({"clip": CLIP, "siglip": SIGLIP}[form], LOAD[form](state, heads=4).state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("form", FORMS)
def test_hugging_face_loads_what_we_save(tmp_path, form):
    """Saved, read by Hugging Face with nothing missing or left over, saved by it, and read back."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = ours(form, eot=59 if form == "clip" else None, image_heads=2, text_heads=3)
    SAVE[form](model, tmp_path / "ours")
    name = {"clip": "CLIPModel", "siglip": "SiglipModel"}[form]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [name]
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    compare(theirs.eval(), model, *batch())
    theirs.save_pretrained(tmp_path / "theirs")
    back = LOAD[form](tmp_path / "theirs")
    assert back.config == model.config
    assert same_weights(back, model)


@pytest.mark.parametrize(
    "form, changes",
    [
        ("clip", {}),
        ("clip", {"eot": 7, "activation": "gelu", "eps": 1e-4}),
        ("clip", {"embed": 16, "image_layers": 1, "patch": 4}),
        ("siglip", {}),
        ("siglip", {"activation": "gelu", "text_layers": 3, "image_heads": 8, "text_heads": 2}),
    ],
)
def test_what_we_save_loads_whole(tmp_path, form, changes):
    """All of the configuration comes back; a second save replaces the first."""
    model = ours(form, **changes)
    SAVE[form](ours(form, image_layers=3), tmp_path)
    SAVE[form](model, tmp_path)
    loaded = LOAD[form](tmp_path)
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_files_load(tmp_path, form, suffix):
    model, path = ours(form), tmp_path / f"weights{suffix}"
    state = face_names(form)
    write_safetensors(path, state) if suffix == ".safetensors" else torch.save(state, path)
    assert same_weights(LOAD[form](path, heads=4), model)
    assert same_weights(LOAD[form](str(path), heads=4), model)
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"))
    assert same_weights(LOAD[form](folder, heads=4), model)


def test_without_config_json_the_form_decides():
    """quick_gelu and 1e-5 for CLIP, tanh and 1e-6 for SigLIP; the largest id ends CLIP's texts."""
    assert load_clip(face_names("clip"), heads=4).config == ours("clip").config
    assert load_siglip(face_names("siglip"), heads=4).config == ours("siglip").config
    asked = load_clip(face_names("clip"), heads=(2, 3), activation="gelu", eot=5).config
    assert (asked.image_heads, asked.text_heads, asked.activation, asked.eot) == (2, 3, "gelu", 5)


def test_trap_heads():
    """The weights do not tell: the argument, else config.json, else a head for every 64, at most 16."""
    wide = dict(image_dim=128, embed=128, text_dim=192)
    for form in FORMS:
        config = LOAD[form](face_names(form, **wide)).config
        assert (config.image_heads, config.text_heads) == (2, 3)
        with pytest.raises(ValueError, match="heads must be given, as D=32 is not a multiple of 64"):
            LOAD[form](face_names(form))
        with pytest.raises(ValueError, match="heads must divide dim=32, got 5"):
            LOAD[form](face_names(form), heads=5)
    # SigLIP-SO400M is 1152 wide with 16 heads a tower; CLIP-bigG has 16 of 104 and, for texts, 20 of 64.
    one = dict(image_layers=1, text_layers=1, image_heads=16)
    so400m = zeros("siglip", image_dim=1152, embed=1152, text_dim=1152, text_heads=16, **one)
    big = zeros("clip", image_dim=1664, text_dim=1280, text_heads=20, **one)
    for config, heads in [(load_siglip(so400m).config, 16), (load_clip(big).config, 20)]:
        assert (config.image_heads, config.text_heads) == (16, heads)


def test_trap_the_end_of_text_in_config_json(tmp_path):
    """2 stands for the largest id, another number for itself; the argument overrules both."""
    save_clip(ours("clip"), tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    for written, asked, read in [(2, None, None), (9, None, 9), (9, 4, 4), (2, 2, 2)]:
        settings["text_config"]["eos_token_id"] = written
        file.write_text(json.dumps(settings))
        assert load_clip(tmp_path, eot=asked).config.eot == read
    with pytest.raises(ValueError, match="eot must not be 2"):
        save_clip(ours("clip", eot=2), tmp_path)


def test_trap_config_json_leaves_out_its_defaults(tmp_path):
    """An absent key is the library's default, not what the weights suggest: 8 heads on 192, not 3."""
    wide = dict(text_dim=192, text_heads=8, image_dim=192, image_heads=12)
    model = ours("clip", vocab_size=49408, eot=49407, **wide)
    save_clip(model, tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    for tower in ("text_config", "vision_config"):
        for key in ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id"):
            settings[tower].pop(key, None)
    file.write_text(json.dumps(settings))
    assert load_clip(tmp_path).config == model.config


def test_trap_a_second_dictionary_overrules_the_first(tmp_path):
    save_clip(ours("clip"), tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    settings["text_config_dict"] = {"hidden_act": "gelu", "num_attention_heads": 2}
    settings["vision_config_dict"] = {"hidden_act": "gelu"}
    file.write_text(json.dumps(settings))
    config = load_clip(tmp_path).config
    assert (config.activation, config.text_heads, config.image_heads) == ("gelu", 2, 4)


def test_trap_config_beside(tmp_path):
    """config.json must belong to the weights, and its two towers must agree in what ours share."""
    save_siglip(ours("siglip"), tmp_path)
    file = tmp_path / "config.json"
    right = file.read_text()
    for where, key, wrong in [
        (None, "model_type", "clip"),
        ("text_config", "hidden_size", 64),
        ("text_config", "num_hidden_layers", 1),
        ("vision_config", "patch_size", 16),
    ]:
        settings = json.loads(right)
        (settings if where is None else settings[where])[key] = wrong
        file.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"{where or 'config.json'} must have {key} = "):
            load_siglip(tmp_path)
    for key, wrong in [("hidden_act", "gelu"), ("layer_norm_eps", 1e-3)]:
        settings = json.loads(right)
        settings["text_config"][key] = wrong
        file.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"config.json must have one {key} in both towers"):
            load_siglip(tmp_path)
    settings = json.loads(right)
    settings["text_config"]["eos_token_id"] = 49407  # SigLIP's files have one and do not read it
    file.write_text(json.dumps(settings))
    assert load_siglip(tmp_path).config == ours("siglip").config


def test_trap_buffers_of_older_files():
    extra = {f"{t}_model.embeddings.position_ids": torch.arange(12)[None] for t in ("text", "vision")}
    for form in FORMS:
        assert same_weights(LOAD[form](face_names(form) | extra, heads=4), ours(form))


def test_half_precision_files_load_as_float32():
    state = {name: tensor.half() for name, tensor in face_names("clip").items()}
    assert {p.dtype for p in load_clip(state, heads=4).parameters()} == {torch.float32}


@pytest.mark.parametrize("form", FORMS)
def test_loading_draws_no_random_number_and_shares_no_memory(form):
    state = face_names(form)
    before, copy = torch.random.get_rng_state(), {name: t.clone() for name, t in state.items()}
    model = LOAD[form](state, heads=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for parameter in model.parameters():
        parameter.data += 1
    assert state.keys() == copy.keys() and all(torch.equal(state[name], copy[name]) for name in copy)


def without(state, name):
    assert name in state
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize("form", FORMS)
def test_missing_and_unexpected_tensors_are_named(form):
    state, name = face_names(form), {"clip": "CLIP", "siglip": "SigLIP"}[form]
    own = {
        "clip": ["vision_model.pre_layrnorm.bias", "visual_projection.weight", "logit_scale"],
        "siglip": ["vision_model.head.probe", "text_model.head.bias", "logit_bias"],
    }[form]
    for key in [
        *own,
        "text_model.final_layer_norm.weight",
        "text_model.encoder.layers.1.self_attn.k_proj.bias",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
    ]:
        with pytest.raises(ValueError, match=f"must hold a {name} and every tensor of it, got missing {key}"):
            LOAD[form](without(state, key), heads=4)
    with pytest.raises(ValueError, match=r"nothing else, got unexpected classifier\.bias"):
        LOAD[form](state | {"classifier.bias": torch.ones(3)}, heads=4)
    with pytest.raises(ValueError, match=r"missing .* and \d+ more"):
        LOAD[form]({k: t for k, t in state.items() if "vision_model.encoder.layers.0" not in k}, heads=4)


def test_the_wrong_form_and_another_model_are_refused():
    with pytest.raises(ValueError, match="must hold a CLIP and nothing else, got unexpected logit_bias"):
        load_clip(face_names("siglip"), heads=4)
    with pytest.raises(ValueError, match="a SigLIP and nothing else, got unexpected text_projection"):
        load_siglip(face_names("clip"), heads=4)
    with pytest.raises(ValueError, match=r"a CLIP with its Hugging Face names, got visual\.proj, …"):
        load_clip({"visual.proj": torch.ones(2)})
    with pytest.raises(ValueError, match="source must hold named tensors"):
        load_siglip({"step": 3})


def test_shapes_that_do_not_fit_are_refused():
    state, name = face_names("siglip"), "vision_model.head.mlp.fc2.weight"
    with pytest.raises(ValueError, match=rf"{name} must have shape \(32, 48\), got \(32, 47\)"):
        load_siglip(state | {name: torch.ones(32, 47)}, heads=4)
    with pytest.raises(ValueError, match=r"head\.probe must have 2 leading axes of size 1"):
        load_siglip(state | {"vision_model.head.probe": torch.ones(2, 1, 32)}, heads=4)
    name = "vision_model.embeddings.position_embedding.weight"
    for form, count, rule in [("clip", 16, "g · g positions and one"), ("siglip", 17, "g · g positions")]:
        with pytest.raises(ValueError, match=f"must hold {rule}, got {count}"):
            LOAD[form](face_names(form) | {name: torch.ones(count, 32)}, heads=4)


@pytest.mark.parametrize("form", FORMS)
def test_the_scale_and_the_bias_load_with_an_axis_and_without(form):
    state = face_names(form)
    names = [name for name in ("logit_scale", "logit_bias") if name in state]
    for shape in ((), (1,)):
        model = LOAD[form](state | {name: state[name].reshape(shape) for name in names}, heads=4)
        assert same_weights(model, ours(form))
    with pytest.raises(ValueError, match="logit_scale must have"):
        LOAD[form](state | {"logit_scale": torch.ones(2)}, heads=4)


def test_only_a_model_of_the_form_is_saved(tmp_path):
    with pytest.raises(ValueError, match="image_pool must be 'cls' to be saved as CLIP, got map"):
        save_clip(ours("siglip"), tmp_path)
    with pytest.raises(ValueError, match="image_pool must be 'map' to be saved as SigLIP, got cls"):
        save_siglip(ours("clip"), tmp_path)
    with pytest.raises(ValueError, match="text_pool must be 'eot' to be saved as CLIP, got last"):
        save_clip(ours("clip", text_pool="last"), tmp_path)
    with pytest.raises(ValueError, match="init_bias must be None to be saved as CLIP, got -5"):
        save_clip(ours("clip", init_bias=-5.0), tmp_path)
    with pytest.raises(ValueError, match="init_bias must be a number to be saved as SigLIP, got None"):
        save_siglip(ours("siglip", init_bias=None), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_our_own_comes_back(tmp_path, form):
    """What a training run keeps: the state dict, which loads into a model of the same configuration."""
    model = ours(form)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    fresh = Dual(DualConfig(**SMALL | FORMS[form] | {"activation": model.config.activation}))
    fresh.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert same_weights(fresh, model)
