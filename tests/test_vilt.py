"""ViLT against Hugging Face's, and what must not change its states: batches, padding, the patches' order."""

import pytest
import torch

from minivlp import attention, patch, transformer
from minivlp.core import require
from minivlp.models.vilt import Vilt, ViltConfig, load_vilt, resize_positions

TINY = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    image_size=32, patch_size=8, max_position_embeddings=12, layer_norm_eps=1e-12,
)  # fmt: skip
BASE = dict(vocab_size=30522)  # Hugging Face's defaults are ViLT-B/32
CLASSES = {
    "ViltModel": {},
    "ViltForMaskedLM": {},
    "ViltForQuestionAnswering": {"num_labels": 7},
    "ViltForImagesAndTextClassification": {"num_images": 2, "modality_type_vocab_size": 3},
    "ViltForImageAndTextRetrieval": {},
}


def hugging_face(name, **config):
    """A random Hugging Face ViLT whose parameters all matter: near 0, where theirs start, mistakes hide."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = getattr(transformers, name)(transformers.ViltConfig(**config | CLASSES[name])).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        small = parameter.ndim == 1  # biases and norms
        parameter.data = parameter.data + 0.3 * noise if small else noise / noise[0].numel() ** 0.5
    return model


def batch(vocab=60, patch=8, longest=12, cut=0):
    """Three texts of different lengths, three images of different shapes, their masks `cut` pixels short."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (3, longest - 3), generator=generator)
    text_mask = torch.arange(longest - 3) < torch.tensor([[longest - 3], [4], [1]])
    sizes = [(5 * patch, 3 * patch), (2 * patch, 6 * patch), (patch, 4 * patch)]
    pixels, pixel_mask = torch.zeros(3, 3, 5 * patch, 6 * patch), torch.zeros(3, 5 * patch, 6 * patch) > 0
    for b, (h, w) in enumerate(sizes):
        pixels[b, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        pixel_mask[b, : h - cut, : w - cut] = True
    return ids, text_mask, pixels, pixel_mask


def tiny(**changes):
    """A small Vilt of our own, its parameters spread out."""
    torch.manual_seed(0)
    fields = dict(
        vocab_size=60, max_text_len=12, dim=32, layers=2, heads=4, hidden=48, patch=8, image_size=32
    )
    model = Vilt(ViltConfig(**fields | changes))
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.15)
    return model


def compare(name, config, data, heads=None):
    """One Hugging Face class against ours, in all that the random order of its patches leaves alone."""
    theirs = hugging_face(name, **config)
    ours = load_vilt(theirs.state_dict(), heads=heads)
    ids, text_mask, pixels, pixel_mask = data
    inputs = dict(input_ids=ids, attention_mask=text_mask.long())
    with torch.no_grad():
        if name == "ViltForImagesAndTextClassification":
            pair = torch.stack([pixels, pixels.flip(0)], 1), torch.stack([pixel_mask, pixel_mask.flip(0)], 1)
            expected = theirs(**inputs, pixel_values=pair[0], pixel_mask=pair[1].long()).logits
            a = ours.encode(ids, text_mask, pixels, pixel_mask, image_type=1)["pooled"]
            b = ours.encode(ids, text_mask, pixels.flip(0), pixel_mask.flip(0), image_type=2)["pooled"]
            assert torch.allclose(ours.nlvr2_logits(a, b), expected, atol=1e-5)
            return
        inputs |= dict(pixel_values=pixels, pixel_mask=pixel_mask.long())
        body = theirs if name == "ViltModel" else theirs.vilt
        expected, states = body(**inputs), ours.encode(ids, text_mask, pixels, pixel_mask)
        text = expected.last_hidden_state[:, : ids.shape[1]]
        assert text.std() > 0.5
        assert torch.allclose(states["text"], text, atol=1e-5)
        assert torch.allclose(states["pooled"], expected.pooler_output, atol=1e-5)
        if name == "ViltModel":
            return
        logits = {
            "ViltForMaskedLM": lambda: ours.mlm_logits(states["text"]),
            "ViltForQuestionAnswering": lambda: ours.vqa_logits(states["pooled"]),
            "ViltForImageAndTextRetrieval": lambda: ours.rank_logits(states["pooled"]),
        }[name]()
        assert torch.allclose(logits, theirs(**inputs).logits, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_equals_hugging_face(name):
    compare(name, TINY, batch(), heads=4)
    compare(name, TINY, batch(cut=3), heads=4)  # a patch that is real in part is real


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_equals_hugging_face_at_the_published_size(name):
    compare(name, BASE, batch(vocab=30522, patch=32, longest=40))


def test_the_published_model_has_the_published_size():
    """111,595,008 parameters without a head; 87.4 million, as the paper counts, in patches and blocks."""
    with torch.device("meta"):
        model = Vilt(ViltConfig(mlm=False, itm=False))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sum(p.numel() for p in model.parameters()) == 111_595_008
    assert counts["patch"] + sum(p.numel() for p in model.encoder.blocks.parameters()) == 87_414_528


def test_batching_with_other_shapes_changes_nothing():
    """Masks and each image's own positions: alone or in a batch, an example gives the same states."""
    model, (ids, text_mask, pixels, pixel_mask) = tiny(), batch()
    pixels = pixels + 9.0 * ~pixel_mask[:, None]  # whatever numbers stand under the padding
    together = model.encode(ids, text_mask, pixels, pixel_mask)
    for b, (h, w) in enumerate([(40, 24), (16, 48), (8, 32)]):
        L = int(text_mask[b].sum())
        alone = model.encode(ids[b : b + 1, :L], text_mask[b : b + 1, :L], pixels[b : b + 1, :, :h, :w])
        assert torch.allclose(together["text"][b, :L], alone["text"][0], atol=1e-5)
        assert torch.allclose(together["pooled"][b], alone["pooled"][0], atol=1e-5)
        real = together["image"][b][together["image_mask"][b]]  # row-major: the real ones are in order
        assert torch.allclose(real, alone["image"][0], atol=1e-5)
    # The same where the images alone are padded, and their batch is a full one.
    full = torch.ones_like(text_mask)
    together = model.encode(ids, full, pixels, pixel_mask)
    alone = model.encode(ids[:1], full[:1], pixels[:1, :, :40, :24])
    assert torch.allclose(together["pooled"][0], alone["pooled"][0], atol=1e-5)


def test_the_order_of_the_patches_changes_nothing():
    """Positions ride on the tokens, so shuffling the embedded image tokens moves no text state."""
    model, seen = tiny(), {}
    hook = model.encoder.register_forward_pre_hook(
        lambda module, inputs: seen.update(x=inputs[0], mask=inputs[1])
    )
    ids, *rest = batch()
    states = model.encode(ids, *rest)
    hook.remove()
    L, total = ids.shape[1], seen["x"].shape[1]
    order = torch.cat([torch.arange(L), L + torch.randperm(total - L)])
    shuffled = model.encoder(seen["x"][:, order], seen["mask"][..., order])
    assert torch.allclose(shuffled[:, :L], states["text"], atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_the_short_way_for_full_images_is_exact(size):
    """With no padding there is no mask and one set of positions; an all-True mask takes the same way."""
    model = tiny()
    ids, text_mask = torch.randint(0, 60, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    pixels = torch.randn(2, 3, *size)
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    short = model.encode(ids, text_mask, pixels)
    masked = model.encode(ids, text_mask, pixels, torch.ones(2, *size, dtype=torch.bool))
    assert seen == [None, None]
    assert short["image_mask"].all() and short["image_mask"].shape == short["image"].shape[:2]
    assert all(torch.equal(short[key], masked[key]) for key in short)
    # The long way, forced by one smaller image beside them, agrees to rounding.
    wide = torch.cat([pixels, torch.zeros(1, 3, *size)])
    mask = torch.ones(3, *size, dtype=torch.bool)
    mask[2, 8:] = False
    ids, text_mask = torch.cat([ids, ids[:1]]), torch.ones(3, 5, dtype=torch.bool)
    assert torch.allclose(model.encode(ids, text_mask, wide, mask)["image"][:2], short["image"], atol=1e-5)


@pytest.mark.parametrize("first", [1, 4, 9])
def test_the_first_words_alone_are_the_same(first):
    """Who reads no patch spares the last block: the states and the pooled vector stay what they were."""
    model, data = tiny(), batch()
    some, everything = model.encode(*data, first=first), model.encode(*data)
    assert "image" not in some and torch.equal(some["image_mask"], everything["image_mask"])
    assert torch.allclose(some["text"], everything["text"][:, :first], atol=1e-5)
    assert torch.allclose(some["pooled"], everything["pooled"], atol=1e-5)


def test_writing_hides_later_words_from_words_and_words_from_patches():
    """By changing one input at a time, through both layers; padding is seen by nobody, as always."""
    model, (ids, text_mask, pixels, pixel_mask) = tiny(), batch()
    with torch.no_grad():
        before = model.encode(ids, text_mask, pixels, pixel_mask, writing=True)
        for place in range(ids.shape[1]):
            other = ids.clone()
            other[:, place] = (ids[:, place] + 1) % 60
            after = model.encode(other, text_mask, pixels, pixel_mask, writing=True)
            moved = (after["text"] - before["text"]).abs().amax(-1) > 1e-6  # (B, L)
            later = torch.arange(ids.shape[1]) >= place
            assert torch.equal(moved[text_mask], (later & text_mask[:, place, None])[text_mask])
            assert torch.equal(after["image"][before["image_mask"]], before["image"][before["image_mask"]])
        patched = pixels.clone()
        patched[:, :, 0, 0] += 1
        after = model.encode(ids, text_mask, patched, pixel_mask, writing=True)
        assert ((after["text"] - before["text"]).abs().amax(-1) > 1e-6)[text_mask].all()
        short = model.encode(ids, text_mask, pixels, pixel_mask, first=4, writing=True)["text"]
    assert torch.allclose(short[:2], before["text"][:2, :4], atol=1e-5)


def test_a_batch_is_looked_at_once(monkeypatch):
    """No check stands in a block: their number is the same for one layer and for three."""
    checks = []
    for name in ("shapes", "floats", "mask", "integers"):
        one = getattr(require, name)
        monkeypatch.setattr(
            require, name, lambda *a, one=one, name=name, **k: (checks.append(name), one(*a, **k))[1]
        )
    counts = []
    for layers in (1, 3):
        checks.clear()
        tiny(layers=layers).encode(*batch())
        counts.append(list(checks))
    assert counts[0] == counts[1] and counts[0].count("floats") == 1  # NaN is looked for in the pixels


@pytest.mark.parametrize(
    "family, concept, caller", [("attention", attention, transformer), ("patch_embed", patch, patch)]
)
def test_the_models_call_the_cores(family, concept, caller, monkeypatch):
    """`chapters train --use` puts a learner's function in the place of a core: the model then calls it."""
    core, calls = concept.CORES[family], []
    assert getattr(caller, core.__name__) is core
    monkeypatch.setattr(caller, core.__name__, lambda *a, **k: (calls.append(a), core(*a, **k))[1])
    ids, mask, pixels, _ = batch()
    tiny(layers=3).encode(ids, mask, pixels)
    assert len(calls) == {"attention": 3, "patch_embed": 1}[family]


def test_resized_positions_keep_their_corners():
    grid = torch.randn(3, 3, 4, dtype=torch.float64)
    bigger = resize_positions(grid, 5, 9)
    assert torch.allclose(bigger[::4, ::8], grid[::2, ::2])
    assert torch.allclose(bigger[0, 4], grid[0, 1])
    assert torch.allclose(bigger[1, 0], (grid[0, 0] + grid[1, 0]) / 2)
    assert resize_positions(grid, 3, 3) is grid


def test_masked_words_first_gives_the_same_logits():
    """Training takes the masked rows, then the decoder's weight and bias; tied, the weight is the words'."""
    for tied in (False, True):
        model = tiny(mlm_tied=tied)
        text = torch.randn(3, 5, 32)
        hidden = model.mlm_hidden(text[1, 2:4])
        logits = hidden @ model.mlm_weight.T + model.mlm_bias
        assert torch.allclose(model.mlm_logits(text)[1, 2:4], logits, atol=1e-5)
        assert (model.mlm_weight is model.word.weight) == tied


def test_every_parameter_learns():
    model, (ids, text_mask, pixels, pixel_mask) = tiny(), batch()
    states = model.encode(ids, text_mask, pixels, pixel_mask)
    (
        model.mlm_logits(states["text"]).square().mean() + model.itm_logits(states["pooled"])[:, 0].sum()
    ).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_bfloat16():
    model, (ids, text_mask, pixels, pixel_mask) = tiny(), batch()
    expected = model.encode(ids, text_mask, pixels, pixel_mask)["pooled"]
    states = model.bfloat16().encode(ids, text_mask, pixels.bfloat16(), pixel_mask)
    assert states["pooled"].dtype == torch.bfloat16
    assert (states["pooled"].float() - expected).abs().mean() < 0.03


@pytest.mark.parametrize("head", ["mlm", "itm", "vqa", "nlvr2", "rank"])
def test_an_absent_head_is_refused(head):
    model = tiny(mlm=False, itm=False)
    states = [torch.randn(2, 32)] * (2 if head == "nlvr2" else 1)
    with pytest.raises(ValueError, match=f"must have the {head} head"):
        getattr(model, f"{head}_logits")(*states)


def off_corner(mask):
    mask[0, 0] = False
    return mask


def with_hole(mask):
    mask[0, 8:16, 8:16] = False
    return mask


REFUSED = {
    "text too long": (
        dict(ids=torch.zeros(2, 13, dtype=int), text_mask=torch.ones(2, 13) > 0), "ids must have 1 to 12",
    ),
    "outside the vocabulary": (dict(ids=torch.full((2, 4), 60)), r"ids must lie in \[0, 60\), got 60 to 60"),
    "float ids": (dict(ids=torch.zeros(2, 4)), "ids must have an integer dtype"),
    "mask too short": (dict(text_mask=torch.ones(2, 3) > 0), "text_mask must have shape"),
    "no word": (dict(text_mask=torch.tensor([[True] * 4, [False] * 4])), "text_mask must have a True in"),
    "integer mask": (dict(text_mask=torch.ones(2, 4, dtype=int)), "text_mask must be bool"),
    "one image": (dict(pixels=torch.zeros(1, 3, 32, 32)), "pixels must hold one image per text"),
    "off the grid": (dict(pixels=torch.zeros(2, 3, 32, 36)), "height and width that are multiples of p=8"),
    "NaN": (dict(pixels=torch.full((2, 3, 32, 32), torch.nan)), "must not contain NaN"),
    "pixel mask shape": (dict(pixel_mask=torch.ones(2, 4, 4) > 0), "pixel_mask must have shape"),
    "integer pixel mask": (dict(pixel_mask=torch.ones(2, 32, 32)), "pixel_mask must be bool"),
    "no pixel": (dict(pixel_mask=torch.zeros(2, 32, 32) > 0), "pixel_mask must be a rectangle"),
    "no corner": (dict(pixel_mask=off_corner(torch.ones(2, 32, 32) > 0)), "pixel_mask must be a rectangle"),
    "a hole": (dict(pixel_mask=with_hole(torch.ones(2, 32, 32) > 0)), "pixel_mask must be a rectangle"),
    "no word wanted": (dict(first=0), r"first must lie in \[1, 4\], got 0"),
    "more words than there are": (dict(first=5), r"first must lie in \[1, 4\], got 5"),
    "image type": (dict(image_type=2), r"image_type must lie in \[1, 1\], got 2"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(change, message):
    good = dict(
        ids=torch.zeros(2, 4, dtype=int), text_mask=torch.ones(2, 4) > 0, pixels=torch.zeros(2, 3, 32, 32)
    )
    tiny().encode(**good)
    with pytest.raises(ValueError, match=message):
        tiny().encode(**good | change)


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="image_size must be a multiple of patch=8, got 36"):
        tiny(image_size=36)
    with pytest.raises(ValueError, match="image_types must be at least 2"):
        tiny(nlvr2=True)
