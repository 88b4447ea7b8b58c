"""The tile loop, and what every loss on it must be: the plain one, with less memory and no product wasted."""

import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import tests.test_chamfer
import tests.test_infonce
import tests.test_mlm
import tests.test_sigmoid  # noqa: F401  (these four register the laws)
from minivlp import chamfer, infonce, mlm, sigmoid, stream
from tests.laws import LAWS, Subject

SHAPES = [(1, 1), (7, 5), (3, 8), (6, 4)]
TILES = [(3, 2), (2, 100), (1, 1), None]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers with permuted strides."""
    x = torch.randn(*shape[::-1], generator=torch.Generator().manual_seed(seed + sum(shape)))
    return x.to(dtype).permute(*range(len(shape))[::-1])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("lead", [(), (1,), (4,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_fold_shows_every_entry_once(shape, lead, tile):
    x, y, bias = numbers(*lead, shape[0], 6), numbers(*lead, shape[1], 6), numbers(shape[1])
    seen, times = torch.zeros(2, *lead, *shape, dtype=torch.float64)

    def step(S, scratch, rows, columns, seen, times):
        assert S.is_contiguous() and scratch.shape == S.shape
        assert scratch.untyped_storage().data_ptr() == S.untyped_storage().data_ptr()
        scratch.fill_(math.nan)  # must not reach S, nor the next tile
        seen[(*rows, columns[-1])] = S
        times[(*rows, columns[-1])] += 1
        S.fill_(math.nan)

    for added in (bias, -1.5, 0.0):
        stream.fold(step, x, y, seen, times, scale=2.0, bias=added, tile=tile)
        torch.testing.assert_close(seen, 2 * x @ y.mT + added)
    assert bool((times == 3).all())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("lead", [(), (1,), (4,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_accumulate_makes_the_gradients_of_autograd(shape, lead, tile):
    """L = −5 Σ cos S, so G = 5 sin S; any product may be left out."""
    x, y = (numbers(*lead, n, 6).requires_grad_() for n in shape)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(-5 * (scale * x @ y.mT + 0.3).cos().sum(), (x, y, scale))
    for wanted in np.ndindex(2, 2, 2):
        found = stream.accumulate(
            lambda S, *_: S.sin_(),
            x.detach(),
            y.detach(),
            scale=0.7,
            bias=0.3,
            tile=tile,
            weight=5.0,
            wanted=wanted,
        )
        for one, exact, needed in zip(found, expected, wanted, strict=True):
            assert (one is not None) == bool(needed)
            if needed:
                torch.testing.assert_close(one, exact)


def test_the_backend_can_be_asked():
    assert stream.choose_backend(torch.zeros(1)) == ("tiles", "x is on cpu")


# From here on: the losses that stand on the loop.

SEEN_BY = {  # laws that look at every entry
    "infonce": ["equals_the_slow_loop", "gradients_are_the_slopes"],
    "sigmoid_loss": ["equals_the_slow_loop", "gradients_are_the_slopes"],
    "chamfer": ["padding_never_counts", "gradients_are_the_slopes", "the_first_of_equal_partners_wins"],
    "mlm_loss": ["equals_the_slow_loop", "gradients_are_the_slopes"],
}
FUSED = {
    "infonce": infonce.infonce_fused,
    "sigmoid_loss": sigmoid.sigmoid_loss_fused,
    "chamfer": chamfer.chamfer_fused,
    "mlm_loss": mlm.mlm_loss_fused,
}
PLAIN = {
    "infonce": infonce.infonce,
    "sigmoid_loss": sigmoid.sigmoid_loss,
    "chamfer": chamfer.chamfer,
    "mlm_loss": mlm.mlm_loss,
}


def arguments(name: str, M: int, D: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Leaves for `name`, then what has no gradient. N differs from M where it may; scale as CLIP ends."""
    N = M + 3 if name in ("chamfer", "mlm_loss") else M
    x, y = numbers(M, D, dtype=dtype), numbers(N, D, seed=1, dtype=dtype)
    if name in ("infonce", "sigmoid_loss"):
        x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
    scalars = [torch.tensor(s, dtype=dtype) for s in (100.0, -10.0)]
    leaves = {
        "infonce": [x, y, scalars[0]],
        "sigmoid_loss": [x, y, *scalars],
        "chamfer": [x, y],
        "mlm_loss": [x, y, numbers(N, dtype=dtype)],
    }[name]
    targets = torch.arange(M) % N
    targets[1::3] = mlm.IGNORE
    return [*(t.requires_grad_() for t in leaves), *([targets] if name == "mlm_loss" else [])]


def value_and_grads(loss, args, upstream=1.0):
    leaves = [t for t in args if t.requires_grad]
    value = loss(*args)
    return value.detach(), torch.autograd.grad(upstream * value, leaves)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(stream, "TILE", (3, 2))
    monkeypatch.setattr(mlm, "PANEL", 2)


@pytest.mark.parametrize(("name", "law"), [(name, one) for name, laws in SEEN_BY.items() for one in laws])
def test_laws_hold_across_tiles(name, law, small_tiles):
    LAWS[name][law].check(Subject(FUSED[name], "fused"))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("M", [1, 15, 16, 17, 40])
def test_equals_the_plain_rung_at_any_size(name, M, monkeypatch):
    """Below, on and above the edges of tiles; with an upstream gradient that is not 1."""
    monkeypatch.setattr(stream, "TILE", (16, 8))
    monkeypatch.setattr(mlm, "PANEL", 16)
    args = arguments(name, M, 5)
    (value, grads), (expected, slopes) = (value_and_grads(r[name], args, -2.5) for r in (FUSED, PLAIN))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for gradient, slope in zip(grads, slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUSED)
def test_low_precision(name, dtype, monkeypatch):
    """No worse than twice the plain rung in the same precision, and a rounding of the result."""
    monkeypatch.setattr(stream, "TILE", (32, 16))
    args = arguments(name, 70, 24, dtype)
    exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    expected, slopes = value_and_grads(PLAIN[name], exact)
    (value, grads), (rough, rough_grads) = (value_and_grads(r[name], args) for r in (FUSED, PLAIN))
    assert value.dtype == dtype and all(g.dtype == dtype for g in grads)
    for got, plain, wanted in zip((value, *grads), (rough, *rough_grads), (expected, *slopes), strict=True):
        error, allowed = ((t.double() - wanted).abs().max() for t in (got, plain))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("name", FUSED)
def test_backward_again_and_again(name):
    """.grad adds up: what backward hands out must not be what it keeps for the next time."""
    args = arguments(name, 6, 4)
    leaves = [t for t in args if t.requires_grad]
    _, once = value_and_grads(PLAIN[name], args)
    loss = FUSED[name](*args)
    for _ in range(2):
        loss.backward(retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 6 * gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FUSED)
def test_one_argument_learns_alone(name):
    args = arguments(name, 6, 4)
    _, grads = value_and_grads(PLAIN[name], args)
    for which, gradient in enumerate(grads):
        alone = [
            a.detach().requires_grad_(i == which) if a.is_floating_point() else a for i, a in enumerate(args)
        ]
        torch.testing.assert_close(value_and_grads(FUSED[name], alone)[1], (gradient,), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FUSED)
def test_scalars_may_be_plain_numbers(name):
    args = [a.item() if a.ndim == 0 else a for a in arguments(name, 6, 4)]
    torch.testing.assert_close(FUSED[name](*args), PLAIN[name](*args))


# Products of 2·M·N·D flops: with all gradients, with those of x alone, with none.
PRODUCTS = {"infonce": (4, 3, 1), "sigmoid_loss": (3, 2, 1), "chamfer": (1, 1, 1), "mlm_loss": (3, 2, 1)}


@pytest.mark.parametrize("name", FUSED)
def test_no_product_is_wasted(name, small_tiles):
    args = arguments(name, 6, 4)
    first = [args[0], *(a.detach() for a in args[1:])]
    one = (
        2 * 6 * 4 * len(args[1]) if name != "mlm_loss" else 2 * 4 * 4 * len(args[1])
    )  # 4 of the 6 are masked
    with FlopCounterMode(display=False) as all_of_them:
        value_and_grads(FUSED[name], args)
    with FlopCounterMode(display=False) as of_x:
        value_and_grads(FUSED[name], first)
    with FlopCounterMode(display=False) as none, torch.no_grad():
        assert not FUSED[name](*args).requires_grad
    # What else is counted are dot products of rows, at most 10 for each token.
    found = [counter.get_total_flops() / one for counter in (all_of_them, of_x, none)]
    for got, wanted in zip(found, PRODUCTS[name], strict=True):
        assert wanted <= got < wanted + 0.9, f"{got:.2f} products, not {wanted}"


def kept_bytes(loss, args) -> int:
    """Bytes of the storages that the graph holds for the backward pass, inputs included."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = loss(*args)
    assert held.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", FUSED)
def test_keeps_rows_for_backward_never_S(name, monkeypatch):
    """At most dx and dy and 8 numbers a row, O((M + N) · D). The plain rungs keep an S at least, but for
    Chamfer's, which keeps indices: its S and the gradient of it come and go, as the next test sees.
    """
    monkeypatch.setattr(stream, "TILE", (64, 32))
    M, D = 300, 4
    args = arguments(name, M, D)
    allowed = 8 * (len(args[0]) + len(args[1])) * (D + 8)
    S = 8 * M * len(args[1])
    rows = M if name != "mlm_loss" else 200
    assert kept_bytes(FUSED[name], args) <= allowed
    assert name == "chamfer" or kept_bytes(PLAIN[name], args) >= S * rows / M > 2 * allowed


class Largest(TorchFunctionMode):
    """Notes the numbers in the largest tensor that is made while it is active, memory of its own or not."""

    numbers = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


@pytest.mark.parametrize("name", FUSED)
def test_never_holds_S(name, monkeypatch):
    """Nothing larger than two tiles or the inputs, forward and backward."""
    monkeypatch.setattr(stream, "TILE", (16, 32))
    monkeypatch.setattr(mlm, "PANEL", 4)
    args = arguments(name, 150, 3)
    panel = 4 * len(args[1]) if name == "mlm_loss" else 16 * 32
    with Largest() as largest:
        value_and_grads(FUSED[name], args)
    assert largest.numbers <= max(2 * panel, max(a.numel() for a in args[:2]))
    with Largest() as largest:
        value_and_grads(PLAIN[name], args)
    assert largest.numbers >= 100 * len(args[1])  # the same count sees S where there is one


@pytest.mark.parametrize("name", FUSED)
def test_a_second_derivative_is_refused(name):
    args = arguments(name, 4, 3)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(FUSED[name](*args), args[0], create_graph=True)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ["infonce", "sigmoid_loss"])
def test_scores_far_apart(name, spread, small_tiles):
    """float32 with scores up to about spread²: nothing overflows, and rows far below others count too."""
    x, y = (torch.randn(9, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    heights = torch.linspace(0.01, 1, 9)[:, None] * spread**0.5
    args = [
        (x * heights).requires_grad_(),
        (y * heights).requires_grad_(),
        torch.tensor(spread),
        torch.tensor(0.5),
    ]
    args = args[: 3 if name == "infonce" else 4]
    exact = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
    (value, grads), (expected, slopes) = (
        value_and_grads(FUSED[name], args),
        value_and_grads(PLAIN[name], exact),
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, slope in zip(grads, slopes, strict=True):
        assert (gradient.double() - slope).abs().max() <= 1e-4 * slope.abs().max()


def test_chamfer_takes_any_leading_axes():
    x, y = numbers(2, 3, 4, 5), numbers(2, 3, 6, 5)
    y_mask = torch.tensor([True] * 4 + [False] * 2)
    torch.testing.assert_close(chamfer.chamfer_fused(x, y, None, y_mask), chamfer.chamfer(x, y, None, y_mask))
    torch.testing.assert_close(chamfer.chamfer_fused(x[0, 0], y[0, 0]), chamfer.chamfer(x[0, 0], y[0, 0]))
    zero = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    chamfer.chamfer_fused(zero, y[0, 0]).backward()
    found, zero.grad = zero.grad, None
    chamfer.chamfer(zero, y[0, 0]).backward()
    torch.testing.assert_close(found, zero.grad)


@pytest.mark.parametrize("name", FUSED)
def test_autocast_changes_nothing(name):
    """A float32 tile stays one: rounding scores of 100 to bfloat16 would move them by a half."""
    args = arguments(name, 20, 6, torch.float32)
    value, grads = value_and_grads(FUSED[name], args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, regrads = value_and_grads(FUSED[name], args)
    torch.testing.assert_close((again, regrads), (value, grads), rtol=0, atol=0)
