"""The dual encoder against Hugging Face's CLIP and SigLIP, and what must not change its vectors."""

import json
import math

import pytest
import torch

from minivlp.filip import filip, late_interaction
from minivlp.hinge import hinge
from minivlp.infonce import infonce
from minivlp.models.dual import Dual, DualConfig, load_clip, load_siglip, save_clip, save_siglip
from minivlp.models.parts import MapPool
from minivlp.sigmoid import sigmoid_loss

TINY = {
    "text_config": dict(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=59,
    ),
    "vision_config": dict(
        hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=8,
    ),
}  # fmt: skip


def hugging_face(name, text=None, vision=None, sizes=TINY, **top):
    """A random CLIPModel or SiglipModel whose parameters all matter: near 0 mistakes hide."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    parts = {
        "text_config": sizes.get("text_config", {}) | (text or {}),
        "vision_config": sizes.get("vision_config", {}) | (vision or {}),
    }
    config = getattr(transformers, name.replace("Model", "Config"))(**parts, **top)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        small = parameter.ndim < 2  # biases, norms, the scale and the bias of the logits
        parameter.data = parameter.data + 0.3 * noise if small else noise / noise[0].numel() ** 0.5
    return model


def clip(act="quick_gelu", eos=59, vision=None, **settings):
    both = {"hidden_act": act}
    vision = both | (vision or {})
    return hugging_face("CLIPModel", both | {"eos_token_id": eos}, vision, projection_dim=24, **settings)


def siglip(**settings):
    return hugging_face("SiglipModel", {"projection_size": 48}, **settings)


def batch(vocab=60, L=12, size=32, eot=59):
    """Five texts of different lengths, each with its end-of-text id and padding behind, and five images."""
    generator = torch.Generator().manual_seed(1)
    last = torch.tensor([L - 1, 3, 1, L // 2, L - 2])[:, None]
    ids = torch.randint(3, vocab - 1, (5, L), generator=generator)
    ids = ids.where(torch.arange(L) < last, 1)
    ids = ids.scatter(1, last, eot)
    return ids, torch.arange(L) <= last, torch.randn(5, 3, size, size, generator=generator)


def compare(theirs, ours, ids, mask, pixels):
    """Features, logits and loss, to 1e-5 of their size."""
    with torch.no_grad():
        inputs = dict(input_ids=ids, attention_mask=None if mask is None else mask.long())
        expected = theirs(**inputs, pixel_values=pixels, return_loss=True)
        x, y = ours.encode_image(pixels), ours.encode_text(ids, mask)
        for got, wanted in [(x, expected.image_embeds), (y, expected.text_embeds)]:
            assert (wanted[0] - wanted[1]).abs().max() > 0.01  # the features tell the examples apart
            assert torch.allclose(got, wanted, atol=1e-5)
        assert torch.allclose(ours.scale, theirs.logit_scale.exp(), rtol=1e-6)
        logits = ours.logits(x, y)
        assert torch.allclose(logits, expected.logits_per_image, atol=1e-5, rtol=1e-5)
        if theirs.config.model_type == "clip":
            assert float(ours.bias) == 0
            loss = infonce(x, y, ours.scale)
        else:
            assert torch.equal(ours.bias, theirs.logit_bias[0])
            loss = sigmoid_loss(x, y, ours.scale, ours.bias)
        assert torch.allclose(loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_equals_hugging_face(act, masked):
    theirs = clip(act)
    ids, mask, pixels = batch()
    ours = load_clip(theirs.state_dict(), heads=4, activation=act, eot=59)
    compare(theirs, ours, ids, mask if masked else None, pixels)


@pytest.mark.parametrize("eot", [59, 7])
def test_clip_finds_the_end_as_hugging_face_does(eot):
    """The first of the end-of-text id, where padding repeats it and where it is not the largest id."""
    theirs, (ids, mask, pixels) = clip(eos=eot), batch(eot=eot)
    ours = load_clip(theirs.state_dict(), heads=4, eot=eot)
    compare(theirs, ours, ids.where(mask, eot), mask, pixels)


def test_clip_of_the_old_convention_reads_the_largest_id():
    """eos_token_id 2, which every published file had for a while, is no id: here 2 is a word."""
    theirs = clip(eos=2)
    ids, mask, pixels = batch()
    ids[0, 1] = 2
    compare(theirs, load_clip(theirs.state_dict(), heads=4), ids, mask, pixels)


@pytest.mark.parametrize("masked", [True, False])
def test_siglip_equals_hugging_face(masked):
    theirs = siglip()
    ids, mask, pixels = batch()
    compare(theirs, load_siglip(theirs.state_dict(), heads=4), ids, mask if masked else None, pixels)


def test_the_towers_may_have_different_heads():
    theirs = siglip(vision={"num_attention_heads": 6})
    compare(theirs, load_siglip(theirs.state_dict(), heads=(6, 4)), *batch())


@pytest.mark.parametrize("make, load", [(clip, load_clip), (siglip, load_siglip)])
@pytest.mark.parametrize("side, patch", [(32, 14), (33, 8), (31, 8), (17, 16)])
def test_a_side_that_is_no_multiple_of_the_patch(make, load, side, patch, tmp_path):
    """As 384 pixels in patches of 14: what lies beyond the last whole patch is not seen."""
    theirs = make(vision={"image_size": side, "patch_size": patch})
    ids, mask, pixels = batch(size=side)
    bare = load(theirs.state_dict(), heads=4, **({"eot": 59} if make is clip else {}))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert (ours.config.image_size, bare.config.image_size) == (side, side // patch * patch)
    for model in (bare, ours):
        compare(theirs, model, ids, mask, pixels)
    (save_clip if make is clip else save_siglip)(ours, tmp_path / "ours")
    assert load(tmp_path / "ours").config == ours.config
    with pytest.raises(ValueError, match=f"pixels must be {side} × {side}, got"):
        ours.encode_image(torch.zeros(1, 3, side + patch, side))
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    settings["vision_config"]["image_size"] = side + patch
    (tmp_path / "ours" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"vision_config must have an image_size of . patches of .*, got"):
        load(tmp_path / "ours")


BASE = {"vision_config": {"patch_size": 32}}  # Hugging Face's defaults are CLIP-ViT-B/32 and SigLIP-B/16


@pytest.mark.slow
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_equals_hugging_face_at_the_published_size(act):
    both = {"hidden_act": act}
    theirs = hugging_face("CLIPModel", both, both, sizes=BASE)
    ours = load_clip(theirs.state_dict(), activation=act, eot=49407)
    assert (ours.config.image_heads, ours.config.text_heads) == (12, 8)
    compare(theirs, ours, *batch(49408, 77, 224, 49407))


@pytest.mark.slow
def test_siglip_equals_hugging_face_at_the_published_size():
    theirs = hugging_face("SiglipModel", sizes=BASE)
    compare(theirs, load_siglip(theirs.state_dict()), *batch(32000, 64, 224, 1))


def test_the_published_models_have_the_published_sizes():
    """CLIP-ViT-B/32: 151,277,313 parameters; SigLIP-B/16 at 224: 203,155,970."""
    base = dict(
        image_size=224, image_dim=768, image_layers=12, image_heads=12, image_hidden=3072, text_layers=12
    )
    b32 = dict(patch=32, vocab_size=49408, max_text_len=77, embed=512, text_dim=512, text_hidden=2048)
    b16 = dict(
        patch=16, vocab_size=32000, max_text_len=64, embed=768, text_dim=768, text_hidden=3072,
        image_pool="map", text_pool="last", init_bias=-10.0,
    )  # fmt: skip
    for sizes, parameters in [(b32, 151_277_313), (b16, 203_155_970)]:
        with torch.device("meta"):
            model = Dual(DualConfig(**base | sizes))
        assert sum(p.numel() for p in model.parameters()) == parameters


FORMS = {"clip": {}, "siglip": dict(image_pool="map", text_pool="last", init_scale=10.0, init_bias=-10.0)}
SMALL = dict(
    vocab_size=60, max_text_len=12, image_size=32, embed=32, image_dim=32, image_layers=2, image_hidden=48,
    text_dim=24, text_layers=2, text_hidden=40,
)  # fmt: skip


def tiny(form="clip", **changes):
    """A small Dual of our own, its parameters spread out."""
    torch.manual_seed(0)
    model = Dual(DualConfig(**SMALL | FORMS[form] | changes))
    for name, parameter in model.named_parameters():
        if "log" not in name:
            parameter.data += torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.15)
    return model


def test_attention_pooling_equals_torch():
    """Outside truth: torch's MultiheadAttention, asked by the probe."""
    torch.manual_seed(0)
    pool = MapPool(12, 3, 20, 1e-3, torch.nn.functional.gelu)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    names |= {f"out_proj.{end}": f"proj.{end}" for end in ("weight", "bias")}
    state = pool.state_dict()
    theirs.load_state_dict({name: state[ours] for name, ours in names.items()})
    x = torch.randn(4, 5, 12)
    mixed = theirs(pool.probe.expand(4, 1, -1), x, x)[0][:, 0]
    expected = mixed + pool.fc2(torch.nn.functional.gelu(pool.fc1(pool.norm(mixed))))
    assert torch.allclose(pool(x), expected, atol=1e-6)
    assert torch.allclose(pool(x[:, torch.randperm(5)]), pool(x), atol=1e-6)  # a set, not a sequence


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_unit_and_each_is_its_own(form):
    """Alone or in a batch, an example has the same vector; images and texts never meet."""
    model, (ids, mask, pixels) = tiny(form), batch()
    x, y = model.encode_image(pixels), model.encode_text(ids, mask)
    tokens, real = model.image_tokens(pixels)
    words, same = model.text_tokens(ids, mask)
    assert x.shape == y.shape == (5, 32) and tokens.shape == (5, 16, 32) and words.shape == (5, 12, 32)
    assert real.all() and real.shape == (5, 16) and torch.equal(same, mask)
    assert model.text_tokens(ids)[1].all()
    for rows in (x, y, tokens, words):
        assert torch.allclose(rows.norm(dim=-1), torch.ones(rows.shape[:-1]), atol=1e-6)
    for b in range(5):
        assert torch.allclose(model.encode_image(pixels[b : b + 1])[0], x[b], atol=1e-5)
        assert torch.allclose(model.encode_text(ids[b : b + 1], mask[b : b + 1])[0], y[b], atol=1e-5)
        assert torch.allclose(model.image_tokens(pixels[b : b + 1])[0][0], tokens[b], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form):
    """Whatever ids stand under the mask; CLIP's texts may also be cut behind their end."""
    model, (ids, mask, _) = tiny(form), batch()
    y, words = model.encode_text(ids, mask), model.text_tokens(ids, mask)[0]
    other = ids.where(mask, 5)
    if form == "clip":
        assert torch.allclose(model.encode_text(other, mask), y, atol=1e-5)
        assert torch.allclose(model.encode_text(other), y, atol=1e-5)  # what follows the end is not seen
        assert torch.allclose(model.encode_text(ids[1:3, :4], mask[1:3, :4]), y[1:3], atol=1e-5)
    assert torch.allclose(model.text_tokens(other, mask)[0][mask], words[mask], atol=1e-5)


def test_the_largest_id_and_the_given_id_agree():
    ids, mask, _ = batch()
    assert torch.equal(tiny().encode_text(ids, mask), tiny(eot=59).encode_text(ids, mask))


def test_siglip_reads_the_last_position_and_its_words_see_both_ways():
    model, (ids, _, _) = tiny("siglip"), batch()
    words = model.text_tokens(ids)[0]
    assert torch.allclose(model.encode_text(ids), words[:, -1], atol=1e-6)
    later = ids.clone()
    later[:, -1] = 8
    assert not torch.allclose(model.text_tokens(later)[0][:, 0], words[:, 0], atol=1e-3)
    causal = tiny()
    assert torch.allclose(causal.text_tokens(later)[0][:, 0], causal.text_tokens(ids)[0][:, 0], atol=1e-6)


def test_tokens_are_the_pooling_of_one_token_alone():
    """SigLIP: each patch pooled with no other beside it. CLIP: the projection of [CLS] on each patch."""
    model, pixels = tiny("siglip"), batch()[2]
    states = model.image.states(pixels)
    one = torch.nn.functional.normalize(model.image.pool(states[:, 3:4]), dim=-1)
    assert torch.allclose(model.image_tokens(pixels)[0][:, 3], one, atol=1e-6)
    model = tiny()
    states = model.image.states(pixels)
    projected = torch.nn.functional.normalize(model.image.project(states), dim=-1)
    assert torch.allclose(model.encode_image(pixels), projected[:, 0], atol=1e-6)
    assert torch.allclose(model.image_tokens(pixels)[0], projected[:, 1:], atol=1e-6)


def objective(name, model, ids, mask, pixels):
    """The loss of one batch under one of the four objectives."""
    if name == "filip":
        (x, x_mask), (y, y_mask) = model.image_tokens(pixels), model.text_tokens(ids, mask)
        return filip(x, y, model.scale, x_mask, y_mask)
    x, y = model.encode_image(pixels), model.encode_text(ids, mask)
    if name == "hinge":
        return hinge(x, y, hardest=False) / len(x)  # the hardest alone may collapse from random weights
    if name == "sigmoid":
        return sigmoid_loss(x, y, model.scale, model.bias)
    return infonce(x, y, model.scale)


OBJECTIVES = [("infonce", "clip"), ("hinge", "clip"), ("filip", "clip"), ("sigmoid", "siglip")]
OBJECTIVES += [("filip", "siglip"), ("infonce", "siglip")]


@pytest.mark.parametrize("name, form", OBJECTIVES)
@pytest.mark.slow
def test_every_objective_learns_a_batch_by_heart(name, form):
    """Sixty steps on five pairs: each image finds its text, and each text its image."""
    torch.manual_seed(0)
    model, (ids, mask, pixels) = Dual(DualConfig(**SMALL | FORMS[form])), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = float(objective(name, model, ids, mask, pixels).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(name, model, ids, mask, pixels)
        loss.backward()
        optimizer.step()
        model.clamp_scale()
    assert float(loss.detach()) < 0.2 * first
    with torch.no_grad():
        if name == "filip":
            S = late_interaction(*(t for t, _ in (model.image_tokens(pixels), model.text_tokens(ids, mask))))
        else:
            S = model.logits(model.encode_image(pixels), model.encode_text(ids, mask))
    assert torch.equal(S.argmax(1), torch.arange(5)) and torch.equal(S.argmax(0), torch.arange(5))


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_learns(form):
    model, (ids, mask, pixels) = tiny(form), batch()
    objective("infonce" if form == "clip" else "sigmoid", model, ids, mask, pixels).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_scale_and_bias_begin_as_configured_and_the_scale_is_pulled_back():
    model = Dual(DualConfig(init_scale=10.0, init_bias=-3.0))
    with torch.no_grad():
        assert abs(float(model.scale) - 10) < 1e-5 and float(model.bias) == -3
        plain = Dual(DualConfig())
        assert abs(float(plain.scale) - 1 / 0.07) < 1e-4 and float(plain.bias) == 0
    model.log_scale.data.fill_(7.0)
    model.clamp_scale()
    assert abs(model.log_scale.item() - math.log(100)) < 1e-6
    model.clamp_scale(2.0)
    model.logits(torch.eye(3, 128), torch.eye(3, 128)).sum().backward()
    assert abs(float(model.log_scale.grad) - 3 * 2.0) < 1e-5  # d Σ scale·cos / d log scale
    assert float(model.logit_bias.grad) == 9


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    model, (ids, mask, pixels) = tiny(form), batch()
    expected = model.encode_image(pixels), model.encode_text(ids, mask)
    model = model.bfloat16()
    states = model.encode_image(pixels.bfloat16()), model.encode_text(ids, mask)
    for got, wanted in zip(states, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).abs().mean() < 0.01


REFUSED_TEXT = {
    "too long": (dict(ids=torch.full((2, 13), 59)), "ids must have 1 to 12 words, got 13"),
    "outside the vocabulary": (dict(ids=torch.full((2, 4), 60)), r"ids must lie in \[0, 60\), got 60 to 60"),
    "float ids": (dict(ids=torch.zeros(2, 4)), "ids must have an integer dtype"),
    "no end": (dict(ids=torch.ones(2, 4, dtype=int)), "ids must hold the end-of-text id 59 in every row"),
    "mask too short": (dict(mask=torch.ones(2, 3) > 0), "mask must have shape"),
    "no word": (dict(mask=torch.tensor([[True] * 4, [False] * 4])), "mask must have a True in every row"),
    "integer mask": (dict(mask=torch.ones(2, 4, dtype=int)), "mask must be bool"),
}


@pytest.mark.parametrize("change, message", REFUSED_TEXT.values(), ids=REFUSED_TEXT)
def test_bad_texts_are_refused(change, message):
    good = dict(ids=torch.full((2, 4), 59), mask=torch.ones(2, 4) > 0)
    tiny(eot=59).encode_text(**good)
    with pytest.raises(ValueError, match=message):
        tiny(eot=59).encode_text(**good | change)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.zeros(2, 3, 40, 32), r"pixels must be 32 × 32, got \(2, 3, 40, 32\)"),
        (torch.zeros(2, 1, 32, 32), "pixels must have shape"),
        (torch.full((2, 3, 32, 32), torch.nan), "must not contain NaN"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "must have a floating dtype"),
    ],
)
def test_bad_images_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny().encode_image(pixels)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_pool": "mean"}, "image_pool must be one of cls, map, got mean"),
        ({"text_pool": "cls"}, "text_pool must be one of eot, last, got cls"),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_pytorch_tanh, quick_gelu, got relu"),
        ({"image_size": 7}, "image_size must be at least patch=8, got 7"),
        ({"image_pool": "map", "embed": 16}, "embed must be image_dim=32 with image_pool 'map', got 16"),
        ({"eot": 60}, r"eot must lie in \[0, 60\), got 60"),
        ({"init_scale": 0.0}, "init_scale must be a finite number > 0"),
        ({"text_heads": 5}, "heads must divide dim=24, got 5"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
