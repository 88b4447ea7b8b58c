"""FLAVA: Hugging Face's numbers, what a hidden patch may say, which pairs ask, and that every part learns."""

import copy

import pytest
import torch

from minivlp.infonce import infonce
from minivlp.mlm import IGNORE
from minivlp.models.flava import Flava, FlavaConfig, contrast_of_true, load_flava

SIZES = dict(
    vocab_size=60, max_text_len=12, dim=32, image_layers=2, text_layers=3, fusion_layers=2, heads=4,
    hidden=48, embed=16, patch=8, image_size=32, codes=20,
)  # fmt: skip
N = 16


def moved(model):
    """A model whose parameters all matter: near 0, where they start, mistakes hide."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if not name.endswith(("log_scale", "logit_scale")):
            parameter.data += torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.15)
    return model.eval()


def tiny(**changes) -> Flava:
    torch.manual_seed(0)
    return moved(Flava(FlavaConfig(**SIZES | changes)))


def batch() -> dict:
    """Five pairs of which two are wrong, with words and patches hidden."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (5, 9), generator=generator)
    text_mask = torch.arange(9) < torch.tensor([[9], [4], [7], [9], [2]])
    asked = (torch.rand(5, 9, generator=generator) < 0.4) & text_mask
    asked[:, 0], asked[0, 1] = False, True
    hidden = torch.rand(5, N, generator=generator) < 0.4
    return dict(
        ids=ids, masked=torch.where(asked, 3, ids), text_mask=text_mask,
        labels=torch.where(asked, ids, IGNORE), pixels=torch.randn(5, 3, 32, 32, generator=generator),
        hidden=hidden, codes=torch.randint(0, 20, (5, N), generator=generator),
        match=torch.tensor([1, 0, 1, 1, 0]),
    )  # fmt: skip


def face():
    """Hugging Face's model of the same sizes."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    part = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48)
    config = transformers.FlavaConfig(
        image_config=part | dict(num_hidden_layers=2, image_size=32, patch_size=8, vocab_size=20),
        text_config=part | dict(num_hidden_layers=3, vocab_size=60, max_position_embeddings=12),
        multimodal_config=part | dict(num_hidden_layers=2),
        hidden_size=32, projection_dim=16, init_codebook=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return moved(transformers.FlavaForPreTraining(config))


# Hugging Face's numbers


@torch.no_grad()
def test_all_losses_and_logits_are_hugging_faces(tmp_path):
    theirs, b = face(), batch()
    theirs.save_pretrained(tmp_path)
    ours = load_flava(tmp_path)  # a folder: heads and eps from its config.json
    assert ours.config == FlavaConfig(**SIZES)
    texts = dict(input_ids_masked=b["masked"], attention_mask=b["text_mask"].long())
    hidden = dict(pixel_values=b["pixels"], bool_masked_pos=b["hidden"])
    labels = dict(mlm_labels=b["labels"], mim_labels=b["codes"].clone(), itm_labels=b["match"])
    out = theirs(input_ids=b["ids"], **texts, **hidden, **labels, return_loss=True)
    named = {"global_contrastive": "contrast", "mmm_text": "mmm_text", "mmm_image": "mmm_image", "itm": "itm"}
    found = ours.pair_losses(**b)
    for name, own in named.items():
        assert found[own].item() == pytest.approx(out.loss_info[name].item(), abs=1e-5), name

    fused = ours.fuse(
        ours.image_states(b["pixels"], b["hidden"]),
        ours.text_states(b["masked"], b["text_mask"]),
        b["text_mask"],
    )
    close(ours.itm_logits(fused), out.itm_logits)
    true = b["match"] != 0
    close(
        out.mmm_image_logits, ours.filled(*of(b, "pixels hidden masked text_mask"))[true][b["hidden"][true]]
    )
    words = ours.mmm_text.logits(fused[:, 2 + N :], ours.mmm_text.weight)
    close(out.mmm_text_logits, words[true][b["labels"][true] != IGNORE])
    x = ours.image_vector(ours.image_states(b["pixels"]))
    y = ours.text_vector(ours.text_states(b["ids"], b["text_mask"]))
    close(out.contrastive_logits_per_image, (ours.scale * x @ y.T)[true])
    close(out.contrastive_logits_per_text, (ours.scale * y @ x.T)[true])

    alone = theirs(**hidden, mim_labels=b["codes"].clone(), return_loss=True)
    assert ours.mim_loss(*of(b, "pixels hidden codes")).item() == pytest.approx(
        alone.loss_info.mim.item(), abs=1e-5
    )
    states = ours.image.norm(ours.image_states(b["pixels"], b["hidden"])[:, 1:])
    close(alone.mim_logits, ours.mim.logits(states[b["hidden"]], ours.mim.weight))
    alone = theirs(input_ids=b["ids"], **texts, mlm_labels=b["labels"], return_loss=True)
    assert ours.mlm_loss(*of(b, "masked text_mask labels")).item() == pytest.approx(
        alone.loss_info.mlm.item(), abs=1e-5
    )
    states = ours.text.norm(ours.text_states(b["masked"], b["text_mask"]))
    close(alone.mlm_logits, ours.mlm.logits(states[b["labels"] != IGNORE], ours.mlm.weight))


def close(a, b):
    assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def of(b: dict, names: str) -> list:
    return [b[name] for name in names.split()]


def test_a_bias_spelled_once_or_twice_is_one_bias():
    state, b = face().state_dict(), batch()
    expected = load_flava(state, heads=4).mim_loss(*of(b, "pixels hidden codes"))
    for absent in ("mim_head.bias", "mim_head.decoder.bias"):
        fewer = {name: tensor for name, tensor in state.items() if name != absent}
        assert torch.equal(load_flava(fewer, heads=4).mim_loss(*of(b, "pixels hidden codes")), expected)
    with pytest.raises(ValueError, match=r"must spell mim_head\.decoder\.bias one way"):
        load_flava(state | {"mim_head.bias": torch.ones(20)}, heads=4)


def test_other_files_are_refused_by_name():
    state = face().state_dict()
    load_flava(state | {"image_codebook.blocks.input.weight": torch.ones(1)}, heads=4)
    fewer = {name: tensor for name, tensor in state.items() if name != "flava.image_projection.bias"}
    for wrong, message in (
        ({"a": torch.ones(1)}, "must hold a FLAVA for pretraining with its Hugging Face names, got a"),
        (fewer, r"missing flava\.image_projection\.bias"),
        (state | {"head.weight": torch.ones(1)}, r"unexpected head\.weight"),
        (state | {"flava.image_model.embeddings.cls_token": torch.ones(32)}, "2 leading axes of size 1"),
        (state | {"flava.image_projection.weight": torch.ones(16, 31)}, "image_projection.weight must have"),
    ):
        with pytest.raises(ValueError, match=message):
            load_flava(wrong, heads=4)
    with pytest.raises(ValueError, match="heads must be given, as D=32 is not a multiple of 64"):
        load_flava(state)


def test_a_scale_with_an_axis_is_a_scale_and_two_are_none():
    state = dict(face().state_dict())
    wanted = load_flava(state, heads=4).scale
    state["flava.logit_scale"] = state["flava.logit_scale"].reshape(1)
    assert torch.equal(load_flava(state, heads=4).scale, wanted)
    state["flava.logit_scale"] = state["flava.logit_scale"].repeat(2)
    with pytest.raises(ValueError, match=r"flava.logit_scale must hold one number, got \(2,\)"):
        load_flava(state, heads=4)


def test_a_config_of_other_weights_is_refused(tmp_path):
    theirs = face()
    for change, message in (
        (lambda c: setattr(c.text_config, "num_hidden_layers", 4), "num_hidden_layers = 3, as the weights"),
        (lambda c: setattr(c.image_config, "num_attention_heads", 8), "one num_attention_heads in all"),
        (lambda c: setattr(c.multimodal_config, "layer_norm_eps", 1e-5), "one layer_norm_eps in all"),
    ):
        theirs.save_pretrained(tmp_path)
        config = copy.deepcopy(theirs.config)
        change(config)
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_flava(tmp_path)


# What is hidden stays hidden


def gradient_at(term, *inputs):
    return torch.autograd.grad(term, inputs, allow_unused=True)


def test_a_hidden_pixel_has_no_gradient_and_the_caption_has():
    model, b = tiny(), batch()
    b["pixels"].requires_grad_()
    words = []
    model.word.register_forward_hook(lambda module, inputs, out: words.append(out))
    term = model.pair_losses(**b)["mmm_image"]
    pixels, *texts = gradient_at(term, b["pixels"], *words)
    of_patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5)).flatten(1)  # (B, N)
    true = b["match"] != 0
    assert not of_patches[b["hidden"]].any() and (of_patches[true][~b["hidden"][true]] > 0).all()
    assert texts[0] is None and texts[1][true].abs().sum() > 0  # the masked words, not the whole ones
    (pixels,) = gradient_at(model.mim_loss(*of(b, "pixels hidden codes")), b["pixels"])
    of_patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5)).flatten(1)
    assert not of_patches[b["hidden"]].any() and (of_patches[~b["hidden"]] > 0).all()


def test_what_lies_under_a_hidden_patch_changes_no_masked_term():
    model, b = tiny(), batch()
    other = b["pixels"] + 7.0 * b["hidden"].view(5, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    before, after = model.pair_losses(**b), model.pair_losses(**b | {"pixels": other})
    assert all(torch.equal(before[name], after[name]) for name in ("mmm_text", "mmm_image", "itm"))
    assert not torch.equal(before["contrast"], after["contrast"])


# Which pairs ask


def test_another_picture_in_a_wrong_pair_changes_no_masked_term_but_the_contrast():
    model, b = tiny(), batch()
    pixels = b["pixels"].clone()
    pixels[1], pixels[4] = pixels[4], torch.randn(3, 32, 32)
    before, after = model.pair_losses(**b), model.pair_losses(**b | {"pixels": pixels})
    assert torch.equal(before["mmm_text"], after["mmm_text"])
    assert torch.equal(before["mmm_image"], after["mmm_image"])
    assert (before["contrast"] - after["contrast"]).abs() > 1e-3  # its column is still an answer


def test_a_true_pair_that_matching_leaves_alone_serves_all_other_terms():
    model, b = tiny(), batch()
    before, after = (
        model.pair_losses(**b),
        model.pair_losses(**b | {"match": torch.tensor([1, 0, -100, 1, 0])}),
    )
    assert all(torch.equal(before[name], after[name]) for name in ("contrast", "mmm_text", "mmm_image"))
    assert not torch.equal(before["itm"], after["itm"])


def test_contrast_is_infonce_where_all_pairs_are_true():
    x, y = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    scale, true = torch.tensor(7.0), torch.ones(6, dtype=torch.bool)
    assert torch.allclose(contrast_of_true(x, y, scale, true), infonce(x, y, scale))
    true[2] = False
    S = scale * x @ y.T
    rows = [i for i in range(6) if i != 2]
    slow = sum(S[i].logsumexp(0) + S[:, i].logsumexp(0) - 2 * S[i, i] for i in rows) / 10
    assert torch.allclose(contrast_of_true(x, y, scale, true), slow)


def test_nothing_asked_costs_nothing_and_the_callers_arrays_stay():
    model, b = tiny(), batch()
    b |= {
        "labels": torch.full_like(b["labels"], IGNORE), "hidden": torch.zeros_like(b["hidden"]),
        "match": torch.full_like(b["match"], IGNORE),
    }  # fmt: skip
    kept = copy.deepcopy(b)
    terms = model.pair_losses(**b)
    assert terms["mmm_text"] == terms["mmm_image"] == terms["itm"] == 0 and terms["contrast"] > 0
    assert model.mim_loss(*of(b, "pixels hidden codes")) == 0
    assert model.mlm_loss(*of(b, "masked text_mask labels")) == 0
    wrong = model.pair_losses(**batch() | {"match": torch.zeros(5, dtype=torch.long)})
    assert wrong["contrast"] == wrong["mmm_text"] == wrong["mmm_image"] == 0 and wrong["itm"] > 0
    (sum(terms.values()) + sum(wrong.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(b[name], tensor) for name, tensor in kept.items())


def test_labels_are_not_written_into_the_callers_codes():
    model, b = tiny(), batch()
    kept = b["codes"].clone()
    model.pair_losses(**b), model.mim_loss(*of(b, "pixels hidden codes"))
    assert torch.equal(b["codes"], kept)


# The rest


def test_padding_changes_nothing():
    model, b = tiny(), batch()
    image = model.image_states(b["pixels"])
    fused = model.fuse(image, model.text_states(b["ids"], b["text_mask"]), b["text_mask"])
    for i, L in enumerate(b["text_mask"].sum(1).tolist()):
        row, mask = slice(i, i + 1), torch.ones(1, L) > 0
        alone = model.fuse(image[row], model.text_states(b["ids"][row, :L], mask), mask)
        assert torch.allclose(fused[row, : 2 + N + L], alone, atol=1e-5)


def test_every_parameter_learns():
    model, b = tiny(), batch()
    terms = model.pair_losses(**b) | {
        "mim": model.mim_loss(*of(b, "pixels hidden codes")),
        "mlm": model.mlm_loss(*of(b, "masked text_mask labels")),
    }
    assert len(terms) == 6
    sum(terms.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_codes_are_the_nearest_patches():
    model = tiny(codebook=True)
    model.codebook.copy_(torch.randn(20, 192))
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, :, 8:16, 16:24] = model.codebook[7].view(3, 8, 8)
    codes = model.codes(pixels)
    nothing = int(model.codebook.square().sum(1).argmin())
    assert codes.shape == (1, N) and codes[0, 6] == 7 and set(codes[0].tolist()) == {7, nothing}
    with pytest.raises(ValueError, match="model must have a codebook"):
        tiny().codes(pixels)


REFUSED = {
    "text too long": (
        dict(ids=torch.zeros(2, 13, dtype=int), text_mask=torch.ones(2, 13) > 0), "ids must have 1 to 12",
    ),
    "outside the vocabulary": (dict(ids=torch.full((2, 4), 60)), r"ids must lie in \[0, 60\), got 60 to 60"),
    "no word": (dict(text_mask=torch.tensor([[True] * 4, [False] * 4])), "text_mask must have a True in"),
    "another size": (dict(pixels=torch.zeros(2, 3, 32, 40)), r"pixels must be 32 × 32, got \(2, 3, 32, 40\)"),
    "NaN": (dict(pixels=torch.full((2, 3, 32, 32), torch.nan)), "must not contain NaN"),
    "too few hidden": (dict(hidden=torch.ones(2, 9) > 0), r"hidden must have shape \(B, N\) = \(2, 16\)"),
    "hidden of numbers": (dict(hidden=torch.ones(2, 16)), "hidden must"),
    "one text": (
        dict(ids=torch.zeros(1, 4, dtype=int), text_mask=torch.ones(1, 4) > 0), "text must have shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(change, message):
    good = dict(
        pixels=torch.zeros(2, 3, 32, 32), hidden=torch.ones(2, 16) > 0, ids=torch.zeros(2, 4, dtype=int),
        text_mask=torch.ones(2, 4) > 0,
    )  # fmt: skip
    tiny().filled(**good)
    with pytest.raises(ValueError, match=message):
        tiny().filled(**good | change)


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="image_size must be a multiple of patch=8, got 36"):
        tiny(image_size=36)
