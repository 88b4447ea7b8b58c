"""Laws of patch embedding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import patch
from tests.held import held, keeps_no_matrix, same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes


@st.composite
def cases(draw):
    """images (B, C, rows·p, columns·p), weight (D, C, p, p), bias (D,): rows ≠ columns on purpose."""
    B, C, D, p, rows, columns = (draw(sizes(3)) for _ in range(6))
    return (
        draw(arrays(B, C, rows * p, columns * p)),
        draw(arrays(D, C, p, p)),
        draw(arrays(D)),
    )


@law(
    "patch_embed",
    hint="Patch n is row n // columns, column n % columns; inside a patch the order is (C, p, p).",
)
@given(case=cases())
def equals_the_slow_loop(f, case):
    images, weight, bias = case
    p, columns = weight.shape[-1], images.shape[-1] // weight.shape[-1]
    out = f(*case)
    for b, n, d in np.ndindex(out.shape):
        r, c = divmod(n, columns)
        square = images[b, :, r * p : (r + 1) * p, c * p : (c + 1) * p]
        close(out[b, n, d], (square * weight[d]).sum() + bias[d])


@law(
    "patch_embed", hint="Each gradient is the upstream gradient times the other factor, summed over the rest."
)
@given(case=cases(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    upstream = np.random.default_rng(seed).standard_normal(f(*case).shape)
    for which, gradient in enumerate(f.grads(*case, grad=upstream)):
        close(gradient, central_differences(f, case, which, grad=upstream), rtol=1e-6, atol=1e-7)


@law(
    "to_patches", hint="Axes of the grid first: (B, rows, columns, C, p, p), then flatten rows with columns."
)
@given(case=cases())
def cuts_squares_row_by_row(f, case):
    images, p = case[0], case[1].shape[-1]
    columns = images.shape[-1] // p
    patches = f(images, p)
    assert patches.shape[1] == images.shape[2] // p * columns, f"{patches.shape[1]} patches"
    for b, n in np.ndindex(patches.shape[:2]):
        r, c = divmod(n, columns)
        close(patches[b, n], images[b, :, r * p : (r + 1) * p, c * p : (c + 1) * p].ravel())


@law("to_patches", hint="A tensor has permute where an array has transpose with several axes.")
@given(case=cases())
def takes_tensors_too(f, case):
    images, p = case[0], case[1].shape[-1]
    patches = f(torch.from_numpy(images), p)
    assert isinstance(patches, torch.Tensor), "a tensor came in, something else came out"
    close(patches, f(images, p))


@law("patch_embed", hint="float32 comes in, float32 goes out.")
@given(case=cases())
def float32_is_enough(f, case):
    same_in_float32(f, case, near=1e-5)


@law("patch_embed", hint="Read the pixels where they lie: a window that slides by p copies no patch.")
def no_patch_is_copied(f):
    rng = np.random.default_rng(0)
    images, weight, bias = case = tuple(rng.standard_normal(n) for n in ((2, 3, 64, 64), (4, 3, 8, 8), (4,)))
    most = 2 * (weight.size + bias.size)
    if keeps_no_matrix(f, case, {}, images.size, "the pixels", most):
        made = held(f.function, *case).forward
        assert made < images.size // 4, f"makes an array of {made:,} numbers; the pixels are {images.size:,}"


test_laws = obeys(patch)

x, w, b = np.ones((1, 3, 4, 6)), np.ones((5, 3, 2, 2)), np.ones(5)
test_refusals = refuses(
    patch,
    [
        ("patch_embed", "height off the grid", (np.ones((1, 3, 5, 6)), w, b), {}, "images must have height"),
        ("patch_embed", "channels differ", (np.ones((1, 2, 4, 6)), w, b), {}, "weight must have shape"),
        ("patch_embed", "bias too long", (x, w, np.ones(4)), {}, "bias must have shape"),
        ("patch_embed", "integer images", (x.astype(int), w, b), {}, "images must have a floating dtype"),
        ("patch_embed", "NaN", (x * np.nan, w, b), {}, "images must not contain NaN"),
    ],
)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_cutting_and_joining_are_inverse(kind):
    images = kind(np.random.default_rng(0).standard_normal((2, 3, 6, 8)))
    patches = patch.to_patches(images, 2)
    assert tuple(patches.shape) == (2, 12, 12)
    assert (patch.from_patches(patches, 2, 6, 8) == images).all()


def test_equals_a_strided_convolution():
    """Outside truth: torch's convolution with kernel and stride p, on which the fused rung stands."""
    images, weight, bias = torch.randn(2, 3, 8, 12), torch.randn(7, 3, 4, 4), torch.randn(7)
    expected = torch.nn.functional.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(patch.patch_embed(images, weight, bias), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", [patch.patch_embed, patch.patch_embed_fused])
def test_low_precision_errs_by_one_rounding_of_its_own(f, dtype):
    exact = [torch.randn(2, 3, 8, 12, dtype=torch.float64), torch.randn(7, 3, 4, 4, dtype=torch.float64)]
    exact.append(torch.randn(7, dtype=torch.float64))
    reference = patch.patch_embed(*exact)
    out = f(*(t.to(dtype) for t in exact))
    rounding = torch.finfo(dtype).eps
    most = patch.patch_embed(exact[0].abs(), exact[1].abs(), exact[2].abs())  # bounds the sum of all products
    assert out.dtype == dtype and bool(((out.double() - reference).abs() <= 4 * rounding * most).all())


def test_backward_twice_and_a_frozen_weight():
    images, weight = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 2, 2)
    out = patch.patch_embed(images, weight, torch.zeros(5)).square().sum()
    first, second = (torch.autograd.grad(out, images, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_is_patch_embed(bias):
    """Its core checks nothing, and gives the same numbers."""
    torch.manual_seed(0)
    module, images = patch.PatchEmbed(5, 4, channels=2, bias=bias), torch.randn(3, 2, 8, 12)
    b = torch.randn(5)
    if bias:
        module.bias.data = b
    expected = patch.patch_embed(images, module.weight, b if bias else torch.zeros(5))
    torch.testing.assert_close(module(images), expected)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.zeros(2, 4, 8, 8), r"pixels must have shape \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 8, 8, dtype=int), "pixels must have a floating dtype"),
        (torch.full((2, 3, 8, 8), torch.nan), "pixels must not contain NaN"),
        (torch.zeros(2, 3, 8, 6), "pixels must have height and width that are multiples of p=4, got 8 × 6"),
        (torch.zeros(2, 3, 0, 8), "pixels must have height and width"),
    ],
)
def test_pixels_are_checked_once_for_all_of_a_model(pixels, message):
    assert patch.check_pixels(torch.zeros(2, 3, 8, 12), 4) == (2, 8, 12)
    with pytest.raises(ValueError, match=message):
        patch.check_pixels(pixels, 4)
