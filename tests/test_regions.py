"""Laws of regions: which patches a box touches, and the tokens that stand for it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import regions
from minivlp.regions import patches_touched, region_mask, region_tokens
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes


@st.composite
def boxes_on_a_picture(draw, smallest=1):
    """Boxes (R, 4) with whole corners and sides of at least `smallest`, patch, height, width."""
    R, patch = draw(sizes(4)), draw(st.integers(2, 4))
    height, width = (patch * draw(sizes(4, 2)) for _ in range(2))
    rng, ends = np.random.default_rng(draw(st.integers(0, 9999))), np.array([width, height])
    low = rng.integers(0, ends + 1 - smallest, (R, 2))
    high = rng.integers(low + smallest, ends + 1) if smallest else low
    return np.concatenate([low, high], 1), patch, height, width


@law("patches_touched", hint="Columns floor(x1/p) to ceil(x2/p) − 1, rows likewise, rows of patches first.")
@given(case=boxes_on_a_picture())
def a_patch_is_touched_when_it_shares_a_pixel(f, case):
    boxes, patch, height, width = case
    wanted = []
    for x1, y1, x2, y2 in boxes:
        pixels = np.zeros((height, width), bool)
        pixels[y1:y2, x1:x2] = True
        cells = pixels.reshape(height // patch, patch, width // patch, patch)
        wanted.append(cells.any((1, 3)).ravel())
    close(f(*case).astype(int), np.array(wanted).astype(int))


@law("patches_touched", hint="A box without area still lies in one patch, at the far edge in the last one.")
@given(case=boxes_on_a_picture(smallest=0))
def a_box_without_area_touches_the_patch_it_lies_in(f, case):
    boxes, patch, height, width = case
    columns, rows = width // patch, height // patch
    column, row = (np.minimum(boxes[:, k] // patch, n - 1) for k, n in ((0, columns), (1, rows)))
    wanted = np.arange(rows * columns) == (row * columns + column)[:, None]
    close(f(*case).astype(int), wanted.astype(int))


@st.composite
def patches_and_regions(draw):
    R, N, D = draw(sizes(4)), draw(sizes()), draw(sizes(3))
    inside = np.random.default_rng(draw(st.integers(0, 9999))).random((R, N)) < 0.5
    inside[np.arange(R), draw(st.integers(0, N - 1))] = True
    return draw(arrays(R, N, D)), inside


@law("region_tokens", hint="The mean of the patches inside, then these in order, then zeros.")
@given(case=patches_and_regions())
def equals_the_slow_loop(f, case):
    patches, inside = case
    R, N, D = patches.shape
    wanted = np.zeros((R, 1 + max(int(row.sum()) for row in inside), D))
    for r in range(R):
        place = 0
        for n in range(N):
            if inside[r, n]:
                place += 1
                wanted[r, place] = patches[r, n]
        for d in range(D):
            wanted[r, 0, d] = sum(patches[r, n, d] for n in range(N) if inside[r, n]) / place
    close(f(*case), wanted)


@law("region_tokens", hint="A patch inside feels its own place, and one n-th of the mean of n patches.")
@given(case=patches_and_regions(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    upstream = np.random.default_rng(seed).standard_normal(f(*case).shape)
    (gradient,) = f.grads(*case, grad=upstream)
    close(gradient, central_differences(f, case, 0, grad=upstream), rtol=1e-6, atol=1e-7)


test_laws = obeys(regions)

box, some = np.array([[0, 0, 4, 4]]), np.ones((1, 4, 2))
real = np.ones((1, 4), bool)
test_refusals = refuses(
    regions,
    [
        ("patches_touched", "three numbers", (box[:, :3], 4, 8, 8), {}, "boxes must have shape"),
        (
            "patches_touched",
            "off the grid",
            (box, 4, 8, 9),
            {},
            "patch must divide the height and width 8 × 9",
        ),
        ("patches_touched", "no patch", (box, 0, 8, 8), {}, "patch must divide"),
        ("patches_touched", "outside", (box + 5, 4, 8, 8), {}, "boxes must have 0 ≤ x1 ≤ x2 ≤ 8"),
        ("patches_touched", "swapped", (box[:, ::-1], 4, 8, 8), {}, "boxes must have 0 ≤ x1 ≤ x2 ≤ 8"),
        ("patches_touched", "NaN", (box * np.nan, 4, 8, 8), {}, "boxes must have 0 ≤ x1 ≤ x2 ≤ 8"),
        ("region_tokens", "lengths differ", (some, real[:, :3]), {}, "inside must have shape"),
        ("region_tokens", "numbers", (some, real.astype(float)), {}, "inside must be bool"),
        ("region_tokens", "nothing inside", (some, ~real), {}, "inside must have a True in every row"),
        ("region_tokens", "NaN", (some * np.nan, real), {}, "patches must not contain NaN"),
        ("region_tokens", "integers", (some.astype(int), real), {}, "patches must have a floating dtype"),
    ],
)


def test_fractions_of_a_pixel():
    """Whatever a box touches, however little: floor and ceil, not rounding."""
    inside = patches_touched(np.array([[3.9, 0.0, 4.1, 4.0], [4.0, 0.0, 8.0, 4.0]]), 4, 4, 12)
    assert inside.tolist() == [[True, True, False], [False, True, False]]


def test_the_whole_picture_is_its_mean_and_all_patches():
    patches = torch.randn(2, 6, 3)
    inside = torch.from_numpy(patches_touched(np.array([[0, 0, 12, 8]] * 2), 4, 8, 12))
    tokens = region_tokens(patches, inside)
    assert torch.equal(tokens[:, 1:], patches) and region_mask(inside).all()
    assert torch.allclose(tokens[:, 0], patches.mean(1))


def test_one_patch_is_its_own_mean():
    patches, inside = torch.randn(1, 4, 3), torch.tensor([[False, False, True, False]])
    assert torch.equal(region_tokens(patches, inside)[0], patches[0, [2, 2]])


def test_the_mask_is_true_up_to_the_last_patch():
    inside = torch.tensor([[True, False, True], [False, True, False]])
    assert region_mask(inside).tolist() == [[True, True, True], [True, True, False]]


def test_no_region():
    none = torch.zeros(0, 4, dtype=torch.bool)
    assert region_tokens(torch.zeros(0, 4, 2), none).shape == (0, 1, 2) and region_mask(none).shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_strides(dtype):
    patches, inside = torch.randn(3, 2, 5, dtype=dtype).permute(1, 2, 0), torch.rand(2, 5) < 0.7
    inside[:, 1] = True
    tokens = region_tokens(patches, inside)
    assert tokens.dtype == dtype
    exact = region_tokens(patches.double(), inside)
    assert (tokens - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() * 4


def test_backward_twice():
    patches, inside = torch.randn(1, 3, 2, requires_grad=True), torch.tensor([[True, False, True]])
    loss = region_tokens(patches, inside).square().sum()
    loss.backward(retain_graph=True)
    once = patches.grad.clone()
    loss.backward()
    assert torch.equal(patches.grad, 2 * once) and not once[0, 1].any()
