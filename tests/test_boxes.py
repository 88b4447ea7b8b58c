"""Laws of GIoU and of the box loss."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minivlp import boxes
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes


def giou_by_counting(a, b, side=9):
    """GIoU of two boxes with whole corners, from the sets of unit cells that they cover; 0/0 is 0."""

    def cells(x1, y1, x2, y2):
        return {(x, y) for x in range(side) for y in range(side) if x1 <= x < x2 and y1 <= y < y2}

    A, B = cells(*a), cells(*b)
    around = cells(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    overlap = len(A & B) / len(A | B) if A | B else 0.0
    return overlap - (len(around - (A | B)) / len(around) if around else 0.0)


@st.composite
def whole_boxes(draw, smallest=1):
    """Two arrays of boxes (n, 4) with whole corners in 0..8 and sides of at least `smallest`."""
    n = draw(sizes(4))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    low = rng.integers(0, 6, (2, n, 2))
    size = rng.integers(smallest, 4, (2, n, 2))
    return np.concatenate([low, np.minimum(low + size, 8)], -1).astype(float)


@st.composite
def loose_boxes(draw):
    """Two arrays of boxes (2, n, 4) of which no two corners share a coordinate."""
    n = draw(sizes(4))
    ends = draw(arrays(n, 2, 4, gap=0.01))  # per box and axis: both ends of a, both of b, all different
    ends = ends - ends.min()
    a, b = np.sort(ends[..., :2], -1), np.sort(ends[..., 2:], -1)
    return tuple(np.concatenate([z[..., 0], z[..., 1]], -1)[None] for z in (a, b))


@law(
    "giou",
    hint="Count cells: I/U − (C − U)/C with C the smallest box around both. Disjoint boxes do not overlap.",
)
@given(case=whole_boxes())
def equals_counting_cells(f, case):
    a, b = case
    close(f(a, b), [giou_by_counting(*pair) for pair in zip(a, b, strict=True)])


@law(
    "giou", hint="A box without area has 0/0 := 0, and it changes neither value nor gradient of another box."
)
@given(case=whole_boxes(smallest=0), seed=st.integers(0, 99))
def a_box_without_area_spoils_only_itself(f, case, seed):
    a, b = (np.concatenate([z, np.ones((1, 4))]) for z in case)  # the last pair is two equal points
    close(f(a, b), [giou_by_counting(*pair) for pair in zip(a, b, strict=True)])
    whole = f.grads(a, b)
    for k in range(len(a)):
        for gradient, alone in zip(whole, f.grads(a[k : k + 1], b[k : k + 1]), strict=True):
            assert np.isfinite(gradient).all(), "the gradient must be finite"
            close(gradient[k : k + 1], alone)


@law(
    "giou",
    hint="A corner moves its own area, and the intersection or the enclosing box where it bounds them.",
)
@given(case=loose_boxes(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    upstream = np.random.default_rng(seed).standard_normal(case[0].shape[:-1])
    for which, gradient in enumerate(f.grads(*case, grad=upstream)):
        close(gradient, central_differences(f, case, which, grad=upstream), rtol=1e-5, atol=1e-6)


@law(
    "giou", hint="Cut off each extent of every area at 0: a box with swapped corners has no area of its own."
)
@given(case=whole_boxes(smallest=-3))
def swapped_corners_enclose_nothing(f, case):
    a, b = case
    close(f(a, b), [giou_by_counting(*pair) for pair in zip(a, b, strict=True)])


@law("giou", hint="An extent that is cut off at 0 has no slope, one beside it has.")
@given(case=loose_boxes(), seed=st.integers(0, 99))
def gradients_of_swapped_corners_are_the_slopes(f, case, seed):
    rng = np.random.default_rng(seed)
    case = tuple(z.copy() for z in case)
    for z in case:
        for axis in (0, 1):
            swapped = rng.random(z.shape[:-1]) < 0.5
            z[..., [axis, axis + 2]] = np.where(
                swapped[..., None], z[..., [axis + 2, axis]], z[..., [axis, axis + 2]]
            )
    for which, gradient in enumerate(f.grads(*case)):
        close(gradient, central_differences(f, case, which), rtol=1e-5, atol=1e-6)


@law("giou", hint="A shared edge is the corner of one box or of the other, and is moved once, not twice.")
@given(case=whole_boxes(), seed=st.integers(0, 9999))
def a_shared_edge_counts_once(f, case, seed):
    a, b = (np.round(z, 0) for z in case)
    shared = np.random.default_rng(seed).random(a.shape) < 0.5
    b = np.where(shared, a, b)
    assume((b[..., 2:] > b[..., :2]).all())
    assume((a[:, :2] != b[:, 2:]).all() and (b[:, :2] != a[:, 2:]).all())  # touching is another kink
    da, db = f.grads(a, b)
    for edge in range(4):  # moved in both boxes together, where they share it, there is no kink
        moved = np.zeros(4)
        moved[edge] = 1e-6
        slope = (f(a + moved, b + moved) - f(a - moved, b - moved)) / 2e-6
        both = a[:, edge] == b[:, edge]
        close((da + db)[:, edge][both], slope[both], rtol=1e-5, atol=1e-6)
    # Nothing changes when both boxes move together.
    for axis in (0, 1):
        total = (da + db)[:, axis] + (da + db)[:, axis + 2]
        close(total, total * 0, atol=1e-9)


@law("giou", hint="float32 comes in, float32 goes out.")
@given(case=loose_boxes())
def float32_is_enough(f, case):
    same_in_float32(f, case, near=1e-4)


@st.composite
def fractions(draw, smallest=1):
    """pred and target (n, 4), centre and size in [0, 1], from whole boxes."""
    corners = draw(whole_boxes(smallest)) / 8
    low, high = corners[..., :2], corners[..., 2:]
    return np.concatenate([(low + high) / 2, high - low], -1)


def loss_of_one(pred, target):
    """The definition for one pair: four absolute differences and 1 − GIoU of the corners."""
    corners = [
        [z[0] - z[2] / 2, z[1] - z[3] / 2, z[0] + z[2] / 2, z[1] + z[3] / 2] for z in (pred * 8, target * 8)
    ]
    return np.abs(pred - target).sum() + 1 - giou_by_counting(*corners)


@law(
    "box_loss",
    hint="Mean over boxes of the sum of four absolute differences plus 1 − GIoU, taken on corners.",
)
@given(case=fractions())
def equals_the_definition(f, case):
    pred, target = case
    close(f(pred, target), np.mean([loss_of_one(p, t) for p, t in zip(pred, target, strict=True)]))


@law("box_loss", hint="A box without area costs what it costs, and leaves the terms of the others alone.")
@given(case=fractions(smallest=0))
def is_the_mean_of_the_losses_of_single_boxes(f, case):
    pred, target = (np.concatenate([z, np.full((1, 4), [[0.5, 0.5, 0, 0]])]) for z in case)
    alone = [f(p[None], t[None]) for p, t in zip(pred, target, strict=True)]
    close(alone[-1], 1.0)  # two equal points: no difference, and a GIoU of 0/0 := 0
    close(f(pred, target), np.mean(alone))


@law("box_loss", hint="No box, no loss: 0 and not the mean of nothing, which is NaN.")
@given(st.just(np.ones((0, 4))))
def no_box_costs_nothing(f, none):
    close(f(none, none), 0.0)
    assert all(gradient.shape == (0, 4) for gradient in f.grads(none, none))


@law("box_loss", hint="The sign of each difference, plus the slope of GIoU through centre ∓ size/2, over n.")
@given(case=loose_boxes())
def gradients_are_the_slopes_of_the_loss(f, case):
    largest = max(z.max() for z in case)
    case = tuple(boxes.xyxy_to_cxcywh(z[0] / largest) for z in case)
    for which, gradient in enumerate(f.grads(*case)):
        close(gradient, central_differences(f, case, which, step=1e-6), rtol=1e-4, atol=1e-5)


@law("box_loss", hint="Where a number is right already its difference has no slope: sign(0) = 0.")
@given(case=loose_boxes(), seed=st.integers(0, 99))
def equal_numbers_have_no_difference(f, case, seed):
    largest = max(z.max() for z in case)
    pred, target = (boxes.xyxy_to_cxcywh(z[0] / largest) for z in case)
    rng, rows = np.random.default_rng(seed), np.arange(len(pred))
    for axis in (0, 1):  # the centre or the size is right, not both: then no corners meet
        right = axis + 2 * rng.integers(0, 2, len(pred))
        pred[rows, right] = target[rows, right]
    low, high = (np.concatenate([z[:, :2] + s * z[:, 2:] / 2 for z in (pred, target)], 1) for s in (-1, 1))
    ends = np.sort(np.concatenate([low, high], 1)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1, 2, 4), -1)
    assume(np.diff(ends).min() > 1e-3)
    for which, gradient in enumerate(f.grads(pred, target)):
        slope = central_differences(f, (pred, target), which, step=1e-6)  # |±step| is the same on both sides
        close(gradient, slope, rtol=1e-4, atol=1e-5)


@law("box_loss", hint="float32 comes in, float32 goes out.")
@given(case=loose_boxes())
def float32_is_enough_for_the_loss(f, case):
    largest = max(z.max() for z in case)
    same_in_float32(f, tuple(boxes.xyxy_to_cxcywh(z[0] / largest) for z in case), near=1e-4)


test_laws = obeys(boxes)

box = np.array([[0.0, 0.0, 1.0, 1.0]])
test_refusals = refuses(
    boxes,
    [
        ("giou", "three numbers", (box[:, :3], box[:, :3]), {}, "a must have shape"),
        ("giou", "lengths differ", (box, np.repeat(box, 2, 0)), {}, "b must have the shape"),
        ("giou", "integers", (box.astype(int), box), {}, "a must have a floating dtype"),
        ("giou", "NaN", (box, box * np.nan), {}, "b must not contain NaN"),
        ("box_loss", "a single box", (box[0], box[0]), {}, "pred must have shape"),
        ("box_loss", "lengths differ", (box, np.repeat(box, 2, 0)), {}, "target must have shape"),
        ("box_loss", "pixels", (box, box * 64), {}, "target must be fractions of the image"),
        ("box_loss", "NaN", (box * np.nan, box), {}, "pred must not contain NaN"),
    ],
)


def random_boxes(n=50, seed=0):
    corners = np.sort(np.random.default_rng(seed).random((2, n, 2, 2)), -2)  # (2, n, corner, axis)
    return corners.reshape(2, n, 4)


def test_equals_hugging_face():
    """Outside truth: the pairwise GIoU of transformers, of which ours is the diagonal."""
    detection = pytest.importorskip(
        "transformers.loss.loss_for_object_detection", reason="needs transformers"
    )
    a, b = (torch.from_numpy(z) for z in random_boxes())
    expected = detection.generalized_box_iou(a, b).diagonal()
    assert torch.allclose(boxes.giou(a, b), expected, atol=1e-12)
    pred, target = boxes.xyxy_to_cxcywh(a), boxes.xyxy_to_cxcywh(b)
    loss = torch.nn.functional.l1_loss(pred, target, reduction="sum") / len(a) + (1 - expected).mean()
    assert torch.allclose(boxes.box_loss(pred, target), loss, atol=1e-12)


def test_known_values():
    a = np.array([[0.0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 1, 1], [0, 0, 1, 1]])
    b = np.array([[2.0, 0, 3, 1], [1, 1, 3, 3], [0, 0, 2, 2], [1, 1, 1, 1], [1, 0, 2, 1]])
    assert np.allclose(boxes.giou_np(a, b)[0], [-1 / 3, 1 / 7 - 2 / 9, 1, 0, 0], atol=1e-15)


def test_bounds_symmetry_and_units():
    a, b = random_boxes()
    value = boxes.giou_np(a, b)[0]
    assert ((value > -1) & (value < 1)).all()
    assert np.allclose(value, boxes.giou_np(b, a)[0], atol=1e-15)
    assert np.allclose(value, boxes.giou_np(640 * a + 7, 640 * b + 7)[0], atol=1e-9)
    assert np.allclose(boxes.giou_np(a, a)[0], 1, atol=1e-15)
    far = boxes.giou_np(np.array([0.0, 0, 1, 1]), np.array([1e6, 1e6, 1e6 + 1, 1e6 + 1]))[0]
    assert -1 <= far < -0.999


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_two_notations_are_inverse(kind):
    a = kind(random_boxes()[0])
    assert abs(boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(a)) - a).max() < 1e-15
    assert boxes.cxcywh_to_xyxy(kind(np.array([0.5, 0.25, 1.0, 0.5]))).tolist() == [0, 0, 1, 0.5]


def test_rungs_agree_where_corners_coincide():
    """Whole pixels share corners: every way in which two boxes can, swapped corners too."""
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 4), -1).reshape(-1, 4)
    a, b = (z.reshape(-1, 4) for z in np.broadcast_arrays(grid[:, None], grid[None]))
    value, (da, db) = boxes.giou_np(a, b)
    ta, tb = (torch.from_numpy(z.copy()).requires_grad_() for z in (a, b))
    out = boxes.giou(ta, tb)
    out.sum().backward()
    for got, wanted in ((out, value), (ta.grad, da), (tb.grad, db)):
        assert np.abs(got.detach().numpy() - wanted).max() < 1e-12
    assert np.isfinite(da).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_costs_one_rounding(dtype):
    """Box by box against float64 on the same rounded boxes: C − U cancels, so it is worked out in float32."""
    corners = [torch.tensor(z).to(dtype) for z in random_boxes()]
    centres = [torch.tensor(boxes.xyxy_to_cxcywh(z)).to(dtype).requires_grad_() for z in random_boxes()]
    rounding = 4 * max(torch.finfo(dtype).eps / 4, torch.finfo(torch.float32).eps)
    exact, _ = boxes.giou_np(*(z.double().numpy() for z in corners))
    assert boxes.giou(*corners).dtype == dtype
    assert np.abs(boxes.giou(*corners).double().numpy() - exact).max() < rounding
    for k in range(20):
        pred, target = (z[k : k + 1] for z in centres)
        value = boxes.box_loss(pred, target)
        expected, _ = boxes.box_loss_np(*(z.detach().double().numpy() for z in (pred, target)))
        assert value.dtype == dtype
        assert abs(value.item() / expected - 1) < rounding
        value.backward()
    assert all(torch.isfinite(z.grad).all() for z in centres)


def test_autograd_habits():
    """Backward twice, a frozen target, a non-contiguous prediction, and no box at all."""
    pred, target = (torch.from_numpy(boxes.xyxy_to_cxcywh(z)) for z in random_boxes())
    pred = pred.T.contiguous().T.requires_grad_()
    loss = boxes.box_loss(pred, target)
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, pred)[0])
    none = torch.ones(0, 4, requires_grad=True)
    (boxes.box_loss(none, none.detach()) + pred.sum()).backward()
    assert none.grad.shape == (0, 4)
