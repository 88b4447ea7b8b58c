"""Hard inputs, one table: every rung of every idea × what breaks numbers and autograd.

A cell is right when the rung gives the value and the gradients of float64 on the same rounded inputs, or
refuses with one ValueError that names an argument, the rule and what it got; and when all rungs of a family
agree on which. "Gives" is the 2× rule: an error of at most twice what rounding the inputs to their dtype does
to the exact answer, and a few roundings of the result.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from minivlp import (
    attention,
    bayes,
    boxes,
    build_vilt,
    chamfer,
    decoder,
    diffusion,
    filip,
    hinge,
    infonce,
    information,
    ipot,
    itm,
    lora,
    masks,
    mlm,
    nce,
    patch,
    pooling,
    regions,
    sigmoid,
    sinkhorn,
    targets,
    transformer,
    vq,
)

IDEAS = [
    attention, bayes, boxes, build_vilt, chamfer, decoder, diffusion, filip, hinge, infonce, information,
    ipot, itm, lora, masks, mlm, nce, patch, pooling, regions, sigmoid, sinkhorn, transformer, vq,
]  # fmt: skip
RUNGS = {family: ladder for idea in IDEAS for family, ladder in idea.RUNGS.items() if "torch" in ladder}
del RUNGS["nearest"]  # it has no gradient, and vq calls it


def in_one(function: Callable) -> Callable:
    """vq with its two values in one vector: the quantised numbers, then the loss."""

    def of_arrays(z, codes, grad=None):
        grad = None if grad is None else (grad[:-1].reshape(z.shape), grad[-1])
        (quantised, loss), gradients = function(z, codes, grad=grad)
        return np.append(quantised, np.asarray(loss, quantised.dtype)), gradients

    def of_tensors(z, codes):
        quantised, loss = function(z, codes)
        return torch.cat([quantised.flatten(), loss[None]])

    return of_arrays if function is vq.vq_np else of_tensors


RUNGS["vq"] = {rung: in_one(function) for rung, function in RUNGS["vq"].items()}


def in_a_row(function: Callable) -> Callable:
    """rate_distortion with its three values in one vector: rate, mean distortion, the column marginal."""

    def of_arrays(distortion, p, **settings):
        rate, mean, q = function(distortion, p, **settings)
        return np.append(q, [rate, mean])

    def of_tensors(distortion, p, **settings):
        rate, mean, q = function(distortion, p, **settings)
        return torch.cat([q, rate[None], mean[None]])

    return of_tensors if function is information.rate_distortion else of_arrays


np_turns, torch_turns = map(in_a_row, RUNGS["rate_distortion"].values())
RUNGS["rate_distortion"] = {"np": np_turns, "torch": torch_turns}
CELLS = [(family, rung) for family, ladder in RUNGS.items() for rung in ladder]


class Case(NamedTuple):
    """Arrays in float64 that are differentiated, then scalars, then masks, labels and settings."""

    arrays: tuple[np.ndarray, ...]
    scalars: tuple[float, ...] = ()
    settings: dict[str, Any] = {}  # noqa: RUF012, never changed

    def times(self, *factors: float) -> "Case":
        """Its arrays multiplied; the last factor serves all that are left."""
        factors = (*factors, *[factors[-1]] * len(self.arrays))
        return self._replace(arrays=tuple(x * f for x, f in zip(self.arrays, factors, strict=False)))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def masked(case: Case, **masks: np.ndarray) -> Case:
    return case._replace(settings=case.settings | masks)


def case_of(family: str, n: int = 5, D: int = 6) -> Case:
    """A small case: n rows here, n + 2 there, of width D."""
    m, labels = n + 2, np.arange(n)
    words, patches = np.arange(m) < [[m], [2]], np.arange(n) < [[3], [n]]
    corners = np.concatenate([-np.abs(numbers(n, 2)), np.abs(numbers(n, 3)[:, :2])], 1)
    squares = 1 / (1 + np.exp(-numbers(n, 4)))
    inside = numbers(2, n) > -0.5
    inside[:, 0] = True
    return {
        "attention": Case((numbers(2, 1, n, D), numbers(2, 1, m, D), numbers(2, 1, m, D + 1)[..., :D])),
        "attention_blocks": Case(
            tuple(numbers(2, 1, n, D + k)[..., :D] for k in range(3)),
            settings={"lengths": (2, n - 2), "sees": masks.PREFIX, "causal": (1,)},
        ),
        "attention_pool": masked(Case((numbers(n, D), numbers(2, m, D))), mask=words),
        "multi_head": Case(
            (numbers(2, n, D), numbers(3 * D, D), numbers(3 * D), numbers(D, D), numbers(D)),
            settings={"heads": 2},
        ),
        "layer_norm": Case((numbers(n, D), numbers(D), numbers(D + 1)[:D])),
        "rms_norm": Case((numbers(n, D), numbers(D))),
        "rotary": Case((numbers(2, 1, n, D),), settings={"positions": labels * 7}),
        "vq": Case((2 * numbers(n, D), numbers(m, D))),
        "lora": Case((numbers(n, D), numbers(m, D), numbers(3, D), numbers(m, 3)), (1.5,)),
        "patch_embed": Case((numbers(2, 3, 4, 6), numbers(D, 3, 2, 2), numbers(D))),
        "mlm_loss": Case(
            (numbers(n, D), numbers(m, D), numbers(m)),
            settings={"targets": np.where(labels % 3 == 1, -100, labels)},
        ),
        "itm_loss": Case((numbers(n, 2),), settings={"labels": labels % 2}),
        "posterior": Case((3 * numbers(n, m), numbers(m))),
        "rate_distortion": Case(
            (np.abs(numbers(4, m)), np.array([2, 3, 1, 2]) / 8), settings={"beta": 1.5, "steps": 5}
        ),
        "noisy": Case((numbers(n, D), numbers(n, D + 1)[:, 1:], labels / (n + 1))),
        "nce": Case((numbers(n), numbers(n, m), numbers(n) - 1, numbers(n, m) - 1)),
        "infonce": Case((numbers(n, D), numbers(D, n).T), (1.5,)),
        "sigmoid_loss": Case((numbers(n, D), numbers(D, n).T), (1.5, -2.0)),
        "hinge": Case((numbers(n, D), numbers(D, n).T)),
        "late_interaction": masked(Case((numbers(2, n, D), numbers(2, m, D))), x_mask=patches, y_mask=words),
        "filip": masked(
            Case((numbers(2, n, D), numbers(2, m, D)), (3.0,)), image_mask=patches, text_mask=words
        ),
        "sinkhorn": Case((np.abs(numbers(n, m)),), settings={"eps": 0.5, "iters": 10}),
        "sinkhorn_cost": Case((numbers(n, D), numbers(m, D)), settings={"eps": 0.5, "iters": 10}),
        "ipot": Case((np.abs(numbers(n, m)),), settings={"iters": 10}),
        "wpa": masked(
            Case((numbers(2, m, D), numbers(2, n, D)), settings={"iters": 10}),
            word_mask=words,
            patch_mask=patches,
        ),
        "chamfer": masked(Case((numbers(2, n, D), numbers(2, m, D))), x_mask=patches, y_mask=words),
        "giou": Case((corners, corners[::-1] * 1.5)),
        "box_loss": Case((squares, squares[::-1])),
        "region_tokens": Case((numbers(2, n, D),), settings={"inside": inside}),
    }[family]


def tensor(x: Any, dtype: torch.dtype | None = None) -> Any:
    return torch.from_numpy(np.array(x, order="C")).to(dtype) if isinstance(x, np.ndarray) else x


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The case with its arrays rounded to `dtype`, in float64 again."""
    return case._replace(arrays=tuple(tensor(x, dtype).double().numpy() for x in case.arrays))


def upstream(shape: tuple[int, ...]) -> np.ndarray:
    """The gradient from above: 1 for a loss, else a number for each value, exact in every dtype."""
    return np.asarray(1 + (np.arange(np.prod(shape, dtype=int)) ** 2 % 7 / 8).reshape(shape))


Answer = list[np.ndarray] | str


def ask(family: str, rung: str, case: Case, dtype: torch.dtype = torch.float64, change=lambda z: z) -> Answer:
    """[value, *gradients] in float64, or the words of the ValueError; `change` alters the arrays given."""
    function = RUNGS[family][rung]
    try:
        with np.errstate(all="ignore"):
            return _ask(function, rung, case, dtype, change)
    except ValueError as error:
        assert "\n" not in str(error) and ", got " in str(error), error
        return str(error)


def _ask(function: Callable, rung: str, case: Case, dtype: torch.dtype, change: Callable) -> list[np.ndarray]:
    if rung == "np":
        arrays = [change(tensor(x, dtype)).numpy() for x in case.arrays]
        settings = dict(case.settings)
        if "grad" in inspect.signature(function).parameters:
            settings["grad"] = upstream(np.shape(function(*arrays, *case.scalars, **settings)[0]))
        found = function(*arrays, *case.scalars, **settings)
        value, gradients = found if isinstance(found, tuple) else (found, ())
        parts = (np.asarray(z, dtype=np.float64) for z in (value, *gradients))
        return [tensor(z, dtype).double().numpy() for z in parts]
    leaves = [tensor(x, dtype) for x in case.arrays]
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in leaves]
    scalars = [torch.tensor(s, dtype=dtype, requires_grad=True) for s in case.scalars]
    settings = {name: tensor(x) for name, x in case.settings.items()}
    value = function(*map(change, leaves), *scalars, **settings)
    gradients = ()
    if value.requires_grad:
        wanted = [x for x in (*leaves, *scalars) if x.requires_grad]
        weight = tensor(upstream(value.shape), dtype)
        gradients = torch.autograd.grad(value, wanted, weight, allow_unused=True, materialize_grads=True)
    assert value.dtype == dtype and all(g.dtype == x.dtype for g, x in zip(gradients, leaves, strict=False))
    return [z.detach().double().numpy() for z in (value, *gradients)]


def gives(got: list[np.ndarray], case: Case, family: str, dtype: torch.dtype) -> None:
    """The 2× rule, against float64 on the same rounded inputs."""
    exact, before = ask(family, "torch", rounded(case, dtype)), ask(family, "torch", case)
    limits = torch.finfo(dtype)
    for i, (g, wanted, unrounded) in enumerate(zip(got, exact, before, strict=False)):
        what = f"gradient {i - 1}" if i else "value"
        assert g.shape == wanted.shape, f"{what} has shape {g.shape}, expected {wanted.shape}"
        too_large = np.abs(wanted) > limits.max  # rounds to ∞
        assert (np.isinf(g) == too_large).all(), f"{what} is {g[~np.isfinite(g)]}, expected {wanted}"
        # A loss near 0 is a difference of numbers near 1; so are the gradients of a plan and of attention of
        # the size of their parts.
        floor = float(i == 0)
        if i and family == "sinkhorn":
            floor = np.abs(exact[0]).max(initial=0)
        if i and family.startswith("attention"):
            floor = np.prod([np.abs(x).max(initial=0) for j, x in enumerate(case.arrays) if j != i - 1])
        if i and family == "multi_head":  # both factors of the scores are made of z and w_qkv
            z, w_qkv, _, w_out, _ = (np.abs(x).max(initial=0) for x in case.arrays)
            floor = z * w_qkv**2 * w_out * max(z, w_qkv) * max(z, w_qkv, 1) * max(z, 1)
        size = max(np.abs(wanted).max(initial=0, where=~too_large), floor)
        allowed = 2 * np.abs(wanted - unrounded).max(initial=0, where=~too_large)
        work = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        allowed += (8 * limits.eps + 256 * work) * size + 16 * limits.tiny
        error = np.abs(g - wanted).max(initial=0, where=~too_large)
        assert error <= allowed, f"{what} is off by {error:.2g}, allowed are {allowed:.2g} of {size:.2g}"


def check(family: str, case: Case, dtype: torch.dtype, may_refuse: bool = False, change=lambda z: z) -> None:
    """Every rung gives float64's answer, or, if it may, all refuse in the same words."""
    ladder = [rung for rung in RUNGS[family] if rung != "np" or dtype != torch.bfloat16]
    answers = {rung: ask(family, rung, case, dtype, change) for rung in ladder}
    refusals = {rung: words for rung, words in answers.items() if isinstance(words, str)}
    if refusals:
        assert may_refuse, refusals
        names = {words.split(" must ")[0] for words in refusals.values()}
        assert len(refusals) == len(answers) and len(names) == 1, f"rungs differ: {answers}"
        return
    for rung, got in answers.items():
        try:
            gives(got, case, family, dtype)
        except AssertionError as wrong:
            raise AssertionError(f"{rung}: {wrong}") from None


every_family = pytest.mark.parametrize("family", RUNGS)
HALVES = [torch.float16, torch.bfloat16]

# Float16 and bfloat16


def large(family: str) -> Case:
    """Sizes and lengths at which sums, squares and products leave float16, though the answer does not."""
    n = 300
    rows = (200 * numbers(n, 8), 200 * numbers(8, n).T)
    words, patches = 200 * numbers(2, 40, 8), 200 * numbers(2, 60, 8)
    z = case_of(family)
    return {
        "attention": Case((30 * numbers(1, 1, 40, 64), 30 * numbers(1, 1, 60, 64), numbers(1, 1, 60, 64))),
        "attention_blocks": Case(
            (30 * numbers(1, 1, 60, 64), 30 * numbers(1, 1, 60, 65)[..., 1:], numbers(1, 1, 60, 64)),
            settings={"lengths": (20, 40), "sees": masks.PREFIX, "causal": (1,)},
        ),
        "multi_head": Case(
            (30 * numbers(1, 20, 64), numbers(192, 64) / 8, numbers(192), numbers(64, 64) / 8, numbers(64)),
            settings={"heads": 2},
        ),
        "attention_pool": Case((30 * numbers(7, 64), numbers(2, 60, 64))),
        "layer_norm": Case((200 * numbers(5, 2000), numbers(2000), numbers(2000))),
        "rms_norm": Case((200 * numbers(5, 2000), numbers(2000))),
        "rotary": Case((200 * numbers(1, 1, 9, 64),), settings={"positions": np.arange(9) * 5000}),
        "posterior": Case((numbers(9, 4000), numbers(4000))),
        "rate_distortion": Case(
            (np.abs(numbers(4, 9000)), np.array([2, 3, 1, 2]) / 8), settings={"beta": 1.5, "steps": 2}
        ),
        "vq": Case((60 * numbers(40, 300), 60 * numbers(50, 300)[:, ::-1])),
        "lora": Case(
            (200 * numbers(9, 300), numbers(7, 300), 9 * numbers(5, 300), numbers(7, 5) / 50), (2.0,)
        ),
        "patch_embed": Case((60 + numbers(1, 3, 32, 32), 1 + numbers(6, 3, 16, 16), numbers(6))),
        "mlm_loss": Case(
            (300 * numbers(9, 40), numbers(6500, 40) / 3000, numbers(6500)),
            settings={"targets": np.arange(9)},
        ),
        "itm_loss": Case((20 * numbers(5000, 2),), settings={"labels": np.arange(5000) % 2}),
        "noisy": Case((200 * numbers(3, 5000), numbers(3, 5001)[:, 1:], np.array([0.25, 0.5, 0.75]))),
        "nce": Case((numbers(2), numbers(2, 9000) - 2, numbers(2), numbers(2, 9000))),
        "infonce": Case(rows, (1e-4,)),
        "sigmoid_loss": Case(rows, (1e-4, -2.0)),
        "hinge": Case(tuple(x / 2000 for x in rows), settings={"hardest": False}),
        "late_interaction": Case((words, patches)),
        "filip": Case((words, patches), (3.0,)),
        "sinkhorn": Case((np.abs(numbers(40, 60)),), settings={"eps": 0.5, "iters": 10}),
        "sinkhorn_cost": Case((words[0], patches[0]), settings={"eps": 0.5, "iters": 10}),
        "ipot": Case((np.abs(numbers(40, 60)),), settings={"iters": 10}),
        "wpa": Case((words, patches), settings={"iters": 10}),
        "chamfer": Case((words, patches)),
        "giou": z.times(300.0),
        "box_loss": Case(tuple(np.tile(x, (400, 1)) for x in z.arrays)),
        "region_tokens": Case(
            (400 + numbers(2, 196, 8),), settings={"inside": np.ones((2, 196), dtype=bool)}
        ),
    }[family]


@pytest.mark.parametrize("dtype", HALVES)
@every_family
def test_half_precision_where_its_own_sums_overflow(family, dtype):
    check(family, large(family), dtype)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@every_family
def test_small_cases_in_every_dtype(family, dtype):
    check(family, case_of(family), dtype)


@every_family
def test_zero_rows_in_half_precision(family):
    case = case_of(family)
    arrays = [x.copy() for x in case.arrays]
    arrays[0][0] = 0
    check(family, case._replace(arrays=tuple(arrays)), torch.float16)


# Ends of the range


@pytest.mark.parametrize("factors", [(1e20,), (1e-20,), (1e20, 1e-20), (1e-20, 1e20), (1e20, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@every_family
def test_lengths_at_the_ends_of_the_range(family, dtype, factors):
    """1e±20 leaves float32 when it is squared, 1e±200 float64."""
    if family.startswith("attention") and factors == (1e-20, 1e20) and dtype != torch.float64:
        pytest.skip("its scores are near 1, but its gradient is 1e40")
    check(family, case_of(family).times(*factors), dtype, may_refuse=family not in COSINES)


COSINES = ("late_interaction", "filip", "sinkhorn_cost", "wpa", "chamfer", "giou", "itm_loss")


@pytest.mark.parametrize("family", ["late_interaction", "filip", "sinkhorn_cost", "wpa", "chamfer", "giou"])
def test_lengths_whose_squares_leave_float64(family):
    """A cosine does not ask for lengths, nor GIoU for the unit of boxes."""
    exact, case = ask(family, "torch", case_of(family)), case_of(family)
    for rung in RUNGS[family]:
        for factor in (1e200, 1e-200) if family == "giou" else (1e200,):
            value, *gradients = ask(family, rung, case.times(factor))
            np.testing.assert_allclose(value, exact[0], rtol=1e-12)
            for got, wanted in zip(gradients, exact[1:], strict=False):
                wanted = wanted / (factor if wanted.ndim else 1)
                np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-11 * np.abs(wanted).max())


def check_any_unit(rung: str) -> None:
    """Around 0, where low and high corners cancel, and with one box far larger than the other."""
    a, b = np.array([[-1.0, -2, 1, 2]]), np.array([[-1.0, -2, 0.5, 1]])
    value, *gradients = ask("giou", rung, Case((a, b)))
    np.testing.assert_allclose(value, [9 / 16], rtol=1e-12)
    for unit in (2.0**600, 2.0**-600):
        got, *slopes = ask("giou", rung, Case((a * unit, b * unit)))
        np.testing.assert_allclose(got, value, rtol=1e-12)
        for one, two in zip(slopes, gradients, strict=True):
            np.testing.assert_allclose(one * unit, two, rtol=1e-12, atol=1e-14)
    corner = np.array([[0.0, 0, 1, 1]])
    for far, overlap in ((2.0**300, 2.0**-600), (2.0**600, 0.0)):
        for pair in ((corner, corner * far), (corner * far, corner)):
            found = ask("giou", rung, Case(pair))
            np.testing.assert_allclose(found[0], overlap, rtol=1e-12)
            assert all(np.isfinite(z).all() for z in found)


def check_equal_boxes(rung: str) -> None:
    """Of two equal corners the first box's is moved, in the intersection and around both: it comes to 0."""
    box = np.array([[0.5, 1, 2, 4], [-1, -1, 3, 1]])
    value, *gradients = ask("giou", rung, Case((box, box.copy())))
    np.testing.assert_allclose(value, 1.0, rtol=1e-14)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-14)


def check_unit_rows(unit_rows: Callable) -> None:
    x = numbers(5, 6)
    for factor in (1.0, 1e200):
        rows, length = unit_rows(x * factor)
        np.testing.assert_allclose(rows, x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-14)
        np.testing.assert_allclose(length / factor, np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-14)


@pytest.mark.parametrize("rung", RUNGS["giou"])
def test_giou_in_any_unit_and_of_equal_boxes(rung):
    check_any_unit(rung)
    check_equal_boxes(rung)


def test_rows_of_any_length_become_unit_rows():
    check_unit_rows(sinkhorn.unit_np)


@pytest.mark.parametrize("what", [np.inf, -np.inf])
@every_family
def test_an_infinite_entry_is_refused(family, what):
    """But where it means something: a log-density of −∞, and rows of hidden states that are not predicted."""
    case = case_of(family)
    for i in range(len(case.arrays)):
        arrays = [x.copy() for x in case.arrays]
        arrays[i].flat[0] = what
        answers = [ask(family, rung, case._replace(arrays=tuple(arrays))) for rung in RUNGS[family]]
        if family == "nce":
            check(family, case._replace(arrays=tuple(arrays)), torch.float64, may_refuse=True)
            continue
        assert all("must be finite, got " in str(words) for words in answers), answers
        assert len(set(answers)) == 1


# Types


@every_family
def test_mixed_dtypes_are_refused(family):
    case = case_of(family)
    for i in range(len(case.arrays)) if len(case.arrays) > 1 else ():
        for dtype in (torch.float64, torch.float16):
            for rung in RUNGS[family]:
                places = iter(range(9))
                change = partial(
                    lambda z, i, dtype, places: z.to(dtype) if next(places) == i else z,
                    i=i,
                    dtype=dtype,
                    places=places,
                )
                words = ask(family, rung, case, torch.float32, change)
                assert isinstance(words, str) and "must have the dtype" in words, (rung, words)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@every_family
def test_numbers_that_are_not_real_are_refused(family, dtype):
    case = case_of(family)
    answers = [ask(family, rung, case, change=lambda z: z.detach().to(dtype)) for rung in RUNGS[family]]
    assert len({words.replace("torch.", "") for words in answers}) == 1
    assert " must have a floating dtype, got " in answers[0]


@pytest.mark.parametrize("axis", range(-4, 0))
@every_family
def test_an_axis_of_no_entries(family, axis):
    """Of one array, or of all: a value or a refusal, of all rungs alike."""
    case = case_of(family)
    for chosen in [*({i} for i in range(len(case.arrays))), set(range(len(case.arrays)))]:
        arrays = [
            np.delete(x, slice(None), axis) if i in chosen and x.ndim >= -axis else x
            for i, x in enumerate(case.arrays)
        ]
        answers = [ask(family, rung, case._replace(arrays=tuple(arrays))) for rung in RUNGS[family]]
        refusals = {a.split(" must ")[0] for a in answers if isinstance(a, str)}
        assert len(refusals) <= 1 and (not refusals or all(isinstance(a, str) for a in answers)), answers


@pytest.mark.parametrize(
    "wrong", [0.0, -1.0, np.inf, np.nan, "a", None, np.ones(2), "an array of the other kind"]
)
@pytest.mark.parametrize("family", [f for f in RUNGS if case_of(f).scalars])
def test_scalars(family, wrong):
    case = case_of(family)
    settings = {name: tensor(x) for name, x in case.settings.items()}
    for rung, function in RUNGS[family].items():
        scalar = wrong
        if isinstance(wrong, str) and wrong != "a":
            scalar = torch.tensor(2.0) if rung == "np" else np.array(2.0)
        arrays = case.arrays if rung == "np" else map(tensor, case.arrays)
        with pytest.raises(ValueError, match=r"^scale must be a (finite number > 0|number|scalar), got "):
            function(*arrays, scalar, *case.scalars[1:], **(case.settings if rung == "np" else settings))


@pytest.mark.parametrize("iters", [0, -1, 1.5, "x", None, True], ids=str)
@pytest.mark.parametrize("family", ["sinkhorn", "sinkhorn_cost", "ipot", "wpa"])
def test_iterations(family, iters):
    case = case_of(family)
    for rung in RUNGS[family]:
        words = ask(family, rung, masked(case, iters=iters))
        assert words == f"iters must be a whole number ≥ 1, got {iters}"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("family", ["mlm_loss", "itm_loss"])
def test_integers_of_any_width(family, dtype):
    """156 is −100 in eight bits, and 300 words are more than eight bits hold."""
    case, top = case_of(family), 100 if dtype == torch.int8 else 156
    if family == "mlm_loss":
        targets = np.array([top, 1, 2, top, 0])
        case = Case((numbers(5, 6), numbers(300, 6), numbers(300)), settings={"targets": targets})
    ((name, labels),) = case.settings.items()
    for rung in RUNGS[family]:
        narrow = tensor(labels, dtype)
        narrow = narrow.numpy() if rung == "np" else narrow
        got = ask(family, rung, case._replace(settings={name: narrow}))
        gives(got, case, family, torch.float64)


@every_family
def test_arrays_of_the_other_library_are_refused(family):
    """Tensors for a NumPy rung, arrays for a torch rung, and one of each."""
    case = case_of(family)
    arrays, settings = [*case.arrays, *case.scalars], case.settings
    tensors = [*map(tensor, case.arrays), *case.scalars]
    other = {name: tensor(x) for name, x in settings.items()}
    for rung, function in RUNGS[family].items():
        ours, theirs = (arrays, tensors) if rung == "np" else (tensors, arrays)
        kept, changed = (settings, other) if rung == "np" else (other, settings)
        tries = [(theirs, changed), *((ours, kept | {name: changed[name]}) for name in kept)]
        tries += [([*ours[:i], theirs[i], *ours[i + 1 :]], kept) for i in range(len(case.arrays))]
        for given, named in tries:
            if all(x is y for x, y in zip(given, ours, strict=True)) and all(
                type(named[name]) is type(kept[name]) for name in kept
            ):
                continue  # a number is no array
            with pytest.raises(ValueError, match=r" must be a (NumPy array|tensor), got "):
                function(*given, **named)


# Shapes and strides


@every_family
def test_an_empty_batch(family):
    """No row at all: a sum over nothing, or a refusal, of all rungs alike."""
    case = case_of(family)
    keep = {
        "mlm_loss": (1, 2),
        "layer_norm": (1, 2),
        "rms_norm": (1,),
        "vq": (1,),
        "patch_embed": (1, 2),
    }.get(family, ())
    arrays = tuple(x if i in keep else x[:0] for i, x in enumerate(case.arrays))
    rowwise = {n: x[:0] if isinstance(x, np.ndarray) else x for n, x in case.settings.items()}
    check(family, case._replace(arrays=arrays, settings=rowwise), torch.float64, may_refuse=True)


def test_functions_without_a_gradient_take_no_examples():
    """Nothing in, nothing out, of the right shape; or one sentence."""
    none, few = torch.zeros(0, 3), torch.zeros(2, 3)
    no_ids = torch.zeros(0, dtype=torch.long)
    levels, noise = torch.tensor([0.5]), torch.zeros(1, 0, 3)
    assert vq.nearest(none, few).shape == vq.nearest_fused(none, few).shape == (0,)
    assert diffusion.errors(lambda x, t, c: x, none, torch.arange(5), levels, noise).shape == (0, 5)
    assert diffusion.back(none, none, levels[:0], levels[:0], none).shape == (0, 3)
    assert regions.patches_touched(np.zeros((0, 4)), 2, 4, 6).shape == (0, 6)
    assert regions.region_mask(torch.zeros(0, 6, dtype=torch.bool)).shape[0] == 0
    assert patch.to_patches(np.zeros((0, 3, 4, 4)), 2).shape == (0, 4, 12)
    assert bayes.pmi(none).shape == bayes.debias(none, torch.zeros(3), 0.5).shape == (0, 3)
    assert targets.next_words(no_ids.reshape(0, 4), torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"z must hold a row for a dead code, got \(0, 3\)"):
        vq.restart_dead(few, no_ids, none, np.random.default_rng(0))


def spread(z: torch.Tensor) -> torch.Tensor:
    """The same numbers with another number behind each, and axes in the reverse order in memory."""
    order = list(range(z.ndim))[::-1]
    wide = torch.stack([z, torch.full_like(z, 7)], -1)  # (…, 2)
    return wide.permute(*order, z.ndim).contiguous().permute(*order, z.ndim)[..., 0]


@pytest.mark.parametrize("change", [spread, lambda z: z[:1].expand_as(z)], ids=["spread", "expanded"])
@every_family
def test_strides(family, change):
    case = case_of(family)
    if family in ("giou", "box_loss", "hinge") and change is not spread:
        case = case._replace(arrays=(case.arrays[0], case.arrays[1] * 0.9))
    for rung in RUNGS[family]:
        got = ask(family, rung, case, change=change)
        plain = ask(family, "torch", case, change=lambda z: change(z).contiguous())
        assert not isinstance(got, str), got
        for g, wanted in zip(got, plain, strict=False):
            if rung == "np" and wanted.ndim and g is not got[0]:
                continue  # by hand there is no way back through a view
            np.testing.assert_allclose(g, wanted, rtol=1e-9, atol=1e-11)


# Autograd and its surroundings

TORCH_CELLS = [(family, rung) for family, rung in CELLS if rung != "np"]
every_cell = pytest.mark.parametrize("family, rung", TORCH_CELLS)


@every_cell
def test_autocast_changes_nothing(family, rung):
    """A loss is made in float32 at least, whatever autocast would round; backward is called outside."""
    case = case_of(family)
    before = ask(family, rung, case, torch.float32)
    function = RUNGS[family][rung]

    def shielded(*args, **settings):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*args, **settings)

    after = _ask(shielded, rung, case, torch.float32, lambda z: z)
    for one, two in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("family", [f for f in RUNGS if len(case_of(f).arrays) > 1])
def test_autocast_lets_half_precision_meet_float32(family):
    """What a layer returns under autocast is bfloat16, what a weight holds is float32."""
    case = case_of(family)
    first = rounded(case, torch.bfloat16).arrays[0]
    case = case._replace(arrays=(first, *rounded(case, torch.float32).arrays[1:]))
    exact = ask(family, "torch", case)
    settings = {name: tensor(x) for name, x in case.settings.items()}
    leaves = [tensor(x, torch.float32) for x in case.arrays]
    leaves = [x.to(torch.bfloat16) if i == 0 else x for i, x in enumerate(leaves)]
    for rung in RUNGS[family]:
        if rung == "np":
            continue
        inputs = [x.clone().requires_grad_() for x in leaves]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = RUNGS[family][rung](*inputs, *case.scalars, **settings)
        weight = tensor(upstream(value.shape), value.dtype)
        gradients = torch.autograd.grad(value, inputs, weight, allow_unused=True, materialize_grads=True)
        for got, wanted in zip((value, *gradients), exact, strict=False):
            error = np.abs(got.detach().double().numpy() - wanted).max()
            assert error <= 2**-6 * max(np.abs(wanted).max(), 1e-6), (rung, error)


@every_cell
def test_activation_checkpointing(family, rung):
    case = case_of(family)
    function = RUNGS[family][rung]
    again = _ask(
        lambda *args, **s: checkpoint(function, *args, use_reentrant=False, **s),
        rung,
        case,
        torch.float64,
        lambda z: z,
    )
    for one, two in zip(ask(family, rung, case), again, strict=True):
        np.testing.assert_array_equal(one, two)


@every_cell
def test_torch_func_grad(family, rung):
    """The plain rungs have it; a fused rung has it or says in one sentence that the plain one does."""
    case = case_of(family)
    tensors = [*map(tensor, case.arrays), *(torch.tensor(s, dtype=torch.float64) for s in case.scalars)]
    settings = {name: tensor(x) for name, x in case.settings.items()}

    def weighted(*args):
        value = RUNGS[family][rung](*args, **settings)
        return (value * tensor(upstream(value.shape))).sum()

    slope = torch.func.grad(weighted, tuple(range(len(tensors))))
    _, *wanted = ask(family, "torch", case)
    if not wanted:
        return
    try:
        found = slope(*tensors)
    except ValueError as error:
        assert rung == "fused" and "torch.func" in str(error) and "\n" not in str(error)
        return
    for got, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got.numpy(), exact, rtol=1e-9, atol=1e-11)


@every_cell
def test_vmap_is_refused_in_one_sentence(family, rung):
    """The functions look at the numbers before they take them, and take batches themselves."""
    case = case_of(family)
    settings = {name: tensor(x) for name, x in case.settings.items()}
    batch = [tensor(x)[None].expand(2, *x.shape) for x in case.arrays]
    with pytest.raises(
        ValueError, match=r" must hold entries that can be read, which torch\.func\.vmap hides"
    ):
        torch.func.vmap(lambda *args: RUNGS[family][rung](*args, *case.scalars, **settings))(*batch)


@pytest.mark.slow
@every_cell
def test_compiled(family, rung):
    """torch.compile may break the graph; the answer is the same."""
    case = case_of(family)
    torch._dynamo.reset()
    compiled = torch.compile(RUNGS[family][rung], backend="eager")
    with_it = _ask(compiled, rung, case, torch.float64, lambda z: z)
    for one, two in zip(ask(family, rung, case), with_it, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)
    for grad in (torch.no_grad(), torch.inference_mode()):
        with grad:
            tensors = [*map(tensor, case.arrays), *case.scalars]
            settings = {name: tensor(x) for name, x in case.settings.items()}
            value = compiled(*tensors, **settings)
        np.testing.assert_allclose(value.double().numpy(), ask(family, rung, case)[0], rtol=1e-12)


# Processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of one process."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SHARED = {"infonce": infonce.infonce_gathered, "sigmoid_loss": sigmoid.sigmoid_loss_ring}


@pytest.mark.parametrize("family", SHARED)
def test_shared_losses_are_their_plain_rungs_on_hard_inputs(alone, family):
    """Autocast, both at once, half precision, scores that overflow, an infinite entry, two dtypes."""
    shared, small = SHARED[family], case_of(family)

    def under_autocast(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return shared(*args)

    for loss in (shared, under_autocast):
        for case, dtype in ((small, torch.float32), (large(family), torch.float16), (small, torch.bfloat16)):
            gives(_ask(loss, "torch", case, dtype, lambda z: z), case, family, dtype)
    case = small._replace(arrays=(small.arrays[0] * np.inf, small.arrays[1]))
    for wrong, dtype in ((case, torch.float64), (small.times(1e20), torch.float32)):
        with pytest.raises(ValueError, match=", got "):
            _ask(shared, "torch", wrong, dtype, lambda z: z)
    x, y = map(tensor, small.arrays)
    with pytest.raises(ValueError, match="texts must have the dtype"):
        shared(x.float(), y, *small.scalars)
    with pytest.raises(ValueError, match="images must be a tensor, got ndarray"):
        shared(*small.arrays, *small.scalars)


# What draws or counts, and has no gradient


def test_choices_take_any_integers_and_arrays_alone():
    """Ids of eight bits with a vocabulary of thousands; tensors and lists are refused by name."""
    wide = np.array([[4, 9, 11, 12], [4, 100, 101, 0]])
    words = np.array([[-1, 0, 0, 1], [-1, 0, 1, -1]])

    def masks(ids, words):
        return mlm.mask_tokens(ids, words, np.random.default_rng(0), 30522, 3, (0, 1, 2, 3, 4), p=0.5)

    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint64):
        signed = words if np.issubdtype(dtype, np.unsignedinteger) else words.astype(dtype)
        for one, two in zip(masks(wide.astype(dtype), signed), masks(wide, words), strict=True):
            assert one.dtype == np.int64 and (one == two).all()
    for ids, other in ((tensor(wide), tensor(words)), (tensor(wide), words), (wide.tolist(), words)):
        with pytest.raises(ValueError, match=r"ids must be an? (NumPy )?array, got"):
            masks(ids, other)
    s, rng = numbers(4, 4), np.random.default_rng(0)
    for bad in (tensor(s), s.astype(np.int64)):
        with pytest.raises(ValueError, match="similarity must"):
            itm.hard_negatives(bad, rng)
    with pytest.raises(ValueError, match="ids must be a NumPy array, got Tensor"):
        itm.hard_negatives(s, rng, torch.arange(4))
    for dtype in (np.int8, np.uint8, np.uint64):
        found = itm.hard_negatives(s, np.random.default_rng(0), np.arange(4).astype(dtype))
        assert (found == itm.hard_negatives(s, np.random.default_rng(0))).all()
    drawn = itm.hard_negatives(s.astype(np.float16), np.random.default_rng(0))
    rounded_first = itm.hard_negatives(s.astype(np.float16).astype(np.float64), np.random.default_rng(0))
    assert (drawn == rounded_first).all()
    with pytest.raises(ValueError, match="boxes must be a NumPy array, got Tensor"):
        regions.patches_touched(torch.zeros(1, 4), 16, 32, 32)
    box = np.array([[0, 0, 33, 40]])
    for dtype in (np.uint8, np.int8, np.float16, np.float64):
        touched = regions.patches_touched(box.astype(dtype), 16, 4096, 4096)
        assert (touched == regions.patches_touched(box, 16, 4096, 4096)).all()


def test_baselines_in_half_precision():
    """`mismatched` adds up many similarities."""
    x, y = 300 * numbers(40, 3, 6), 300 * numbers(40, 5, 6)
    exact = chamfer.mismatched(*(tensor(z).half().double() for z in (x, y)))
    for z in (torch.float16, torch.bfloat16):
        x, y = (tensor(t, torch.float16).to(z) for t in (x, y)) if z == torch.float16 else (x, y)
        if z == torch.float16:
            assert abs(float(chamfer.mismatched(x, y)) - float(exact)) <= 4 * torch.finfo(z).eps
            x, y = x.double().numpy(), y.double().numpy()


def test_hidden_states_that_are_not_predicted_may_be_infinite_others_not():
    case = case_of("mlm_loss")
    hidden = case.arrays[0].copy()
    hidden[1] = np.inf
    skipped = case._replace(arrays=(hidden, *case.arrays[1:]))
    for rung in RUNGS["mlm_loss"]:
        for got, wanted in zip(ask("mlm_loss", rung, skipped), ask("mlm_loss", rung, case), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_scores_that_overflow_are_refused_by_name():
    x = torch.full((3, 4), 1e20)
    for loss in (infonce.infonce, infonce.infonce_fused):
        with pytest.raises(ValueError, match=r"images must give a loss that is finite in .*32, got nan"):
            loss(x, x, 10.0)
