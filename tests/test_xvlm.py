"""X-VLM: what must not change its states, where its attention may go, and that every part of it learns."""

import math

import pytest
import torch

from minivlp.boxes import box_loss
from minivlp.models.parts import sine_cosine_positions
from minivlp.models.xvlm import Xvlm, XvlmConfig, small_init, whole_picture
from minivlp.regions import patches_touched, region_mask, region_tokens
from minivlp.transformer import CrossBlock

SIZES = dict(
    vocab_size=60, max_text_len=12, dim=32, image_layers=2, text_layers=1, cross_layers=2, heads=4,
    hidden=48, embed=16, patch=8, image_size=32,
)  # fmt: skip


def tiny(**changes) -> Xvlm:
    """A small model whose parameters all matter: near 0, where they start, mistakes hide."""
    torch.manual_seed(0)
    model = Xvlm(XvlmConfig(**SIZES | changes))
    for name, parameter in model.named_parameters():
        if name != "contrast.log_scale":
            parameter.data += torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.15)
    return model


def batch():
    """Three texts of different lengths, three pictures and a region of each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 60, (3, 9), generator=generator)
    text_mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    boxes = torch.tensor([[0, 0, 32, 32], [8, 3, 17, 9], [24, 24, 32, 32]]).numpy()
    return ids, text_mask, pixels, torch.from_numpy(patches_touched(boxes, 8, 32, 32))


def states(model, ids, text_mask, pixels, inside):
    """Fused words of texts and regions, with what they are made of."""
    patches = model.image_patches(pixels)
    words, tokens, mask = (
        model.text_words(ids, text_mask),
        region_tokens(patches, inside),
        region_mask(inside),
    )
    return model.fuse(words, text_mask, tokens, mask), patches, words, tokens, mask


def test_shapes():
    model, (ids, text_mask, pixels, inside) = tiny(), batch()
    fused, patches, words, tokens, mask = states(model, ids, text_mask, pixels, inside)
    assert patches.shape == (3, 16, 32) and words.shape == fused.shape == (3, 9, 32)
    assert tokens.shape == (3, 17, 32) and mask.sum(1).tolist() == [17, 5, 2]
    x, y = model.image_vector(tokens[:, 0]), model.text_vector(words)
    assert x.shape == y.shape == (3, 16)
    assert torch.allclose(x.norm(dim=1), torch.ones(3)) and torch.allclose(y.norm(dim=1), torch.ones(3))
    boxes = model.boxes(fused[:, 0])
    assert boxes.shape == (3, 4) and ((boxes > 0) & (boxes < 1)).all()
    assert model.itm_logits(fused[:, 0]).shape == (3, 2) and model.mlm_logits(fused).shape == (3, 9, 60)
    assert model.scale.item() == pytest.approx(1 / 0.07)


def test_padding_changes_nothing():
    """A padded word and a padded region token: a row in the batch gives what it gives alone."""
    model, (ids, text_mask, pixels, inside) = tiny(), batch()
    fused, *_ = states(model, ids, text_mask, pixels, inside)
    other = torch.where(text_mask, ids, (ids + 7) % 60)
    assert torch.allclose(
        states(model, other, text_mask, pixels, inside)[0][text_mask], fused[text_mask], atol=1e-5
    )
    for b, L in enumerate(text_mask.sum(1).tolist()):
        row = slice(b, b + 1)
        alone, _, _, tokens, mask = states(model, ids[row, :L], text_mask[row, :L], pixels[row], inside[row])
        assert mask.all() and tokens.shape[1] == 1 + int(inside[b].sum())
        assert torch.allclose(fused[b, :L], alone[0], atol=1e-5)


def test_patches_outside_the_box_have_no_weight():
    """Between image encoder and cross-modal encoder nothing of them is left: not a bit, nor a gradient."""
    model, (ids, text_mask, pixels, inside) = tiny(), batch()
    words = model.text_words(ids, text_mask)
    patches = model.image_patches(pixels).detach().requires_grad_()
    moved = patches.detach() + 9.0 * ~inside[..., None]

    def fused(z):
        return model.fuse(words, text_mask, region_tokens(z, inside), region_mask(inside))

    out = fused(patches)
    assert torch.equal(out, fused(moved))
    (gradient,) = torch.autograd.grad(out.square().sum(), patches)
    assert not gradient[~inside].any() and gradient[inside].abs().sum(-1).min() > 0


def test_the_whole_picture_is_the_region_of_its_own_box():
    model, (ids, text_mask, pixels, _) = tiny(), batch()
    everything = torch.ones(3, 16, dtype=torch.bool)
    fused, patches, *_ = states(model, ids, text_mask, pixels, everything)
    encoded = model.encode(ids, text_mask, pixels)
    assert torch.equal(encoded["image"], whole_picture(patches)) and encoded["image_mask"].all()
    assert torch.equal(encoded["text"], fused) and torch.equal(encoded["pooled"], fused[:, 0])
    assert torch.allclose(encoded["image"][:, 0], patches.mean(1))


def test_cross_attention_by_a_slow_loop():
    """Self-attention, then for each head and word a softmax over the real others, then the MLP."""
    torch.manual_seed(0)
    block = CrossBlock(8, 2, 12)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.4
    x, others, mask = torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.tensor([[True, False, True, True]])
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    z = block.attend(x)
    q = block.q(block.norm_cross(z))[0]
    k, v = block.kv(others)[0].split(8, 1)
    mixed = torch.zeros(3, 8)
    for head in (slice(0, 4), slice(4, 8)):
        for i in range(3):
            score = torch.tensor(
                [math.exp(float(q[i, head] @ k[j, head]) / 2) * bool(mask[0, j]) for j in range(4)]
            )
            mixed[i, head] = sum(score[j] / score.sum() * v[j, head] for j in range(4))
    expected = block.transform(z + block.proj_cross(mixed))
    assert torch.allclose(block(x, others, None, mask[:, None, None]), expected, atol=1e-5)


def test_masked_words_first_gives_the_same_logits():
    model, text = tiny(), torch.randn(3, 5, 32)
    logits = model.mlm_hidden(text[1, 2:4]) @ model.mlm_weight.T + model.mlm_bias
    assert torch.allclose(model.mlm_logits(text)[1, 2:4], logits, atol=1e-5)


def test_pictures_of_another_size():
    model = tiny()
    assert model.image_patches(torch.randn(2, 3, 16, 40)).shape == (2, 10, 32)


@pytest.mark.parametrize("start", [lambda model: model, small_init])
def test_every_parameter_learns(start):
    model, (ids, text_mask, pixels, inside) = start(tiny()), batch()
    fused, _, words, tokens, _ = states(model, ids, text_mask, pixels, inside)
    pooled, x, y = fused[:, 0], model.image_vector(tokens[:, 0]), model.text_vector(words)
    (
        model.mlm_logits(fused).square().mean()
        + model.itm_logits(pooled)[:, 0].sum()
        + box_loss(model.boxes(pooled), torch.full((3, 4), 0.5))
        + model.contrast(x, y)
    ).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_it_starts_with_queries_like_keys_and_places_of_unit_size():
    model = small_init(tiny())
    for block in model.image.blocks:
        assert torch.equal(block.qkv.weight[:32], block.qkv.weight[32:64])
    for block in (*model.text.blocks, *model.cross.blocks):
        assert torch.allclose(block.proj.weight @ block.qkv.weight[64:], torch.eye(32), atol=1e-5)
    for block in model.cross.blocks:
        assert torch.equal(block.q.weight, block.kv.weight[:32])
        assert torch.allclose(block.proj_cross.weight @ block.kv.weight[32:], torch.eye(32), atol=1e-5)
    assert torch.equal(model.image_project.weight, model.text_project.weight)
    assert torch.equal(model.position, sine_cosine_positions(4, 32))


def test_bfloat16():
    model, (ids, text_mask, pixels, _) = tiny(), batch()
    expected = model.encode(ids, text_mask, pixels)["pooled"]
    found = model.bfloat16().encode(ids, text_mask, pixels.bfloat16())["pooled"]
    assert found.dtype == torch.bfloat16 and (found.float() - expected).abs().mean() < 0.05


REFUSED = {
    "text too long": (
        dict(ids=torch.zeros(2, 13, dtype=int), text_mask=torch.ones(2, 13) > 0), "ids must have 1 to 12",
    ),
    "outside the vocabulary": (dict(ids=torch.full((2, 4), 60)), r"ids must lie in \[0, 60\), got 60 to 60"),
    "float ids": (dict(ids=torch.zeros(2, 4)), "ids must have an integer dtype"),
    "mask too short": (dict(text_mask=torch.ones(2, 3) > 0), "text_mask must have shape"),
    "no word": (dict(text_mask=torch.tensor([[True] * 4, [False] * 4])), "text_mask must have a True in"),
    "one image": (dict(pixels=torch.zeros(1, 3, 32, 32)), "pixels must hold one image per text"),
    "off the grid": (dict(pixels=torch.zeros(2, 3, 32, 36)), "height and width that are multiples of p=8"),
    "NaN": (dict(pixels=torch.full((2, 3, 32, 32), torch.nan)), "must not contain NaN"),
    "a pixel mask": (dict(pixel_mask=torch.ones(2, 32, 32) > 0), "pixel_mask must be None"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(change, message):
    good = dict(
        ids=torch.zeros(2, 4, dtype=int), text_mask=torch.ones(2, 4) > 0, pixels=torch.zeros(2, 3, 32, 32)
    )
    tiny().encode(**good)
    with pytest.raises(ValueError, match=message):
        tiny().encode(**good | change)


def test_tokens_that_do_not_fit_are_refused():
    model, words, mask = tiny(), torch.randn(2, 4, 32), torch.ones(2, 4) > 0
    with pytest.raises(ValueError, match="tokens must have shape"):
        model.fuse(words, mask, torch.randn(3, 5, 32), torch.ones(3, 5) > 0)
    with pytest.raises(ValueError, match="must have a True in every row"):
        model.fuse(words, mask, torch.randn(2, 5, 32), torch.zeros(2, 5) > 0)


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="image_size must be a multiple of patch=8, got 36"):
        tiny(image_size=36)
    with pytest.raises(ValueError, match="heads must divide dim=32"):
        tiny(heads=5)
