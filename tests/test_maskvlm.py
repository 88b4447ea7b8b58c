"""MaskVLM: what the hidden side may say, where the other side comes in, and that every part learns."""

import pytest
import torch

from minivlp.models.maskvlm import MaskVlm, MaskVlmConfig
from minivlp.patch import to_patches

SIZES = dict(
    vocab_size=60, max_text_len=12, dim=32, tower_layers=2, cross_layers=2,
    heads=4, hidden=48, embed=16, patch=8, image_size=32,
)  # fmt: skip
N = 16


def tiny(kind: type[MaskVlm] = MaskVlm, **changes) -> MaskVlm:
    """A small model whose parameters all matter: near 0, where they start, mistakes hide."""
    torch.manual_seed(0)
    model = kind(MaskVlmConfig(**SIZES | changes))
    for name, parameter in model.named_parameters():
        if name != "contrast.log_scale":
            parameter.data += torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.15)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 60, (3, 9), generator=generator)
    text_mask = torch.arange(9) < torch.tensor([[9], [4], [2]])
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    hidden = torch.rand(3, N, generator=generator) < 0.6
    return ids, text_mask, pixels, hidden


def of_patches(gradient: torch.Tensor) -> torch.Tensor:
    """Gradients of pixels (B, 3, 32, 32) → their size in each patch (B, N)."""
    return to_patches(gradient, 8).abs().sum(-1)


class Leaking(MaskVlm):
    """A mistake: the pixels are filled in by a picture encoder that has seen what was hidden."""

    def image_states(self, pixels, hidden=None):
        return super().image_states(pixels)


class Deaf(MaskVlm):
    """A mistake: the decoder and the cross stack look at the text's [CLS] alone, cut off from its words."""

    def fill(self, image, text, text_mask):
        return super().fill(image, text.detach(), text_mask)


def flow(kind: type[MaskVlm]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of what is filled in at the hidden patches: at the pixels under them, and at the words."""
    model, (ids, text_mask, pixels, hidden) = tiny(kind), batch()
    pixels.requires_grad_()
    words = []
    model.word.register_forward_hook(lambda module, inputs, out: words.append(out))
    text = model.text_states(ids, text_mask)
    filled = model.fill(model.image_states(pixels, hidden), text, text_mask)
    found = torch.autograd.grad(
        filled[hidden].square().sum(), [pixels, *words], allow_unused=True, materialize_grads=True
    )
    return of_patches(found[0])[hidden], found[1][text_mask].abs().sum(-1)


def test_nothing_flows_from_hidden_pixels_and_something_from_every_word():
    pixels, words = flow(MaskVlm)
    assert not pixels.any() and (words > 0).all()


def test_the_law_breaks_where_the_hidden_sides_original_is_read():
    pixels, words = flow(Leaking)
    assert (pixels > 0).all() and (words > 0).all()
    pixels, words = flow(Deaf)
    assert not pixels.any() and not words.any()


def test_the_error_of_a_patch_is_that_of_its_own_colours():
    """With the true ones filled in it is 0."""
    model, (ids, text_mask, pixels, hidden) = tiny(), batch()
    text = model.text_states(ids, text_mask)
    errors = model.colour_errors(pixels, hidden, text, text_mask)
    filled = model.fill(model.image_states(pixels, hidden), text, text_mask)
    assert errors.shape == (3, N) and filled.shape == (3, N, 192)
    patches = to_patches(pixels, 8)
    for b in range(3):
        for n in range(N):
            assert torch.allclose(errors[b, n], (filled[b, n] - patches[b, n]).abs().mean(), atol=1e-6)
    model.fill = lambda image, text, text_mask: to_patches(pixels, 8)
    assert not model.colour_errors(pixels, hidden, text, text_mask).any()


def test_masked_words_are_read_with_the_whole_picture():
    model, (ids, text_mask, pixels, _) = tiny(), batch()
    pixels.requires_grad_()
    words = model.read(model.text_states(ids, text_mask), text_mask, model.image_states(pixels))
    (gradient,) = torch.autograd.grad(model.mlm_logits(words)[0, 1].square().sum(), pixels)
    assert (of_patches(gradient)[0] > 0).all() and not gradient[1:].any()


def test_padding_changes_nothing():
    model, (ids, text_mask, pixels, hidden) = tiny(), batch()
    text, image = model.text_states(ids, text_mask), model.image_states(pixels, hidden)
    filled, match = model.fill(image, text, text_mask), model.itm_logits(image, text, text_mask)
    read = model.read(text, text_mask, image)
    for b, L in enumerate(text_mask.sum(1).tolist()):
        row, mask = slice(b, b + 1), torch.ones(1, L) > 0
        alone = model.text_states(ids[row, :L], mask)
        assert torch.allclose(filled[row], model.fill(image[row], alone, mask), atol=1e-5)
        assert torch.allclose(match[row], model.itm_logits(image[row], alone, mask), atol=1e-5)
        assert torch.allclose(read[row, :L], model.read(alone, mask, image[row]), atol=1e-5)


def test_every_parameter_learns():
    model, (ids, text_mask, pixels, hidden) = tiny(), batch()
    text, image = model.text_states(ids, text_mask), model.image_states(pixels)
    (
        model.contrast(model.image_vector(image), model.text_vector(text))
        + model.itm_logits(image, text, text_mask)[:, 0].sum()
        + model.mlm_logits(model.read(text, text_mask, image)).square().mean()
        + model.colour_errors(pixels, hidden, text, text_mask)[hidden].mean()
    ).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


REFUSED = {
    "text too long": (
        dict(ids=torch.zeros(2, 13, dtype=int), text_mask=torch.ones(2, 13) > 0), "ids must have 1 to 12",
    ),
    "no word": (dict(text_mask=torch.tensor([[True] * 4, [False] * 4])), "text_mask must have a True in"),
    "another size": (dict(pixels=torch.zeros(2, 3, 32, 40)), r"pixels must be 32 × 32, got \(2, 3, 32, 40\)"),
    "NaN": (dict(pixels=torch.full((2, 3, 32, 32), torch.nan)), "must not contain NaN"),
    "too few hidden": (dict(hidden=torch.ones(2, 9) > 0), r"hidden must have shape \(B, N\) = \(2, 16\)"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(change, message):
    def fill(ids, text_mask, pixels, hidden):
        model = tiny()
        return model.colour_errors(pixels, hidden, model.text_states(ids, text_mask), text_mask)

    good = dict(
        pixels=torch.zeros(2, 3, 32, 32), hidden=torch.ones(2, 16) > 0, ids=torch.zeros(2, 4, dtype=int),
        text_mask=torch.ones(2, 4) > 0,
    )  # fmt: skip
    fill(**good)
    with pytest.raises(ValueError, match=message):
        fill(**good | change)


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="image_size must be a multiple of patch=8, got 36"):
        tiny(image_size=36)
