"""The kernels against the NumPy rungs in float64, on a GPU, or on the CPU under Triton's interpreter.

test_kernels.py runs this file in a process of its own, because Triton decides when it is imported which of
the two it is. By hand: `TRITON_INTERPRET=1 pytest tests/kernel_checks.py`, or without the variable on a GPU.
"""

import functools
import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: see tests/requirements-peers.txt")

from minivlp import chamfer, infonce, ipot, sigmoid, stream
from minivlp.kernels import losses, walks, wpa

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's on log 0 at padding, which is meant
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

# Largest error of a number, relative to the largest of its array: products of 16 bits round G and the rows
# once more. The interpreter, which has no product of bfloat16, converts it to float32.
BFLOAT16 = 3e-6 if INTERPRETED else 2e-2
ROUNDING = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: BFLOAT16}
# Pairs, width, scale: a single pair; more than a tile, D off 16 and off powers of two; saturated softmaxes.
SIZES = [(1, 5, 10.0), (18, 20, 100.0)]
every_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
every_size = pytest.mark.parametrize(("B", "D", "scale"), SIZES)


def rows(*shape: int, dtype: torch.dtype, unit: bool = False) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return (torch.nn.functional.normalize(x, dim=-1) if unit else x).to(DEVICE, dtype)


def exact(*tensors: torch.Tensor) -> list[np.ndarray]:
    """The same numbers for a NumPy rung."""
    return [t.detach().cpu().double().numpy() if t.is_floating_point() else t.cpu().numpy() for t in tensors]


def near(got, wanted, dtype: torch.dtype, floor: float = 1e-6, slack: float = 1.0) -> None:
    """Value and gradients alike. Errors are divided by `floor` at least; gradients have some `slack`."""
    for name, g, w in zip(
        ["value", *map(str, range(9))], [got[0], *got[1]], [wanted[0], *wanted[1]], strict=False
    ):
        w = np.asarray(w)
        assert tuple(g.shape) == w.shape, f"{name} has shape {tuple(g.shape)}, expected {w.shape}"
        error = np.abs(g.detach().cpu().double().numpy() - w).max() / max(np.abs(w).max(), floor)
        allowed = ROUNDING[dtype] * (1 if name == "value" else slack)
        assert error <= allowed, f"{name} is off by {error:.1e} of its largest entry"


@every_dtype
@every_size
def test_infonce(B, D, scale, dtype):
    x, y = rows(2, B, D, dtype=dtype, unit=True)
    near(losses.infonce(x, y, scale), infonce.infonce_np(*exact(x, y), scale), dtype)


@every_dtype
@every_size
def test_sigmoid(B, D, scale, dtype):
    x, y = rows(2, B, D, dtype=dtype, unit=True)
    wanted = sigmoid.sigmoid_loss_np(*exact(x, y), scale, -3.0)
    near(losses.sigmoid_loss(x, y, scale, -3.0), wanted, dtype)


def test_the_sigmoid_loss_keeps_the_digits_of_easy_negatives():
    """A bias of −20 makes the softplus of a negative 2e-9, which 1 + e^s would round away."""
    x, y = rows(2, 5, 16, dtype=torch.float32, unit=True)
    loss, gradients = losses.sigmoid_loss(x, -x, 1.0, -20.0)
    wanted, by_hand = sigmoid.sigmoid_loss_np(*exact(x, -x), 1.0, -20.0)
    near((loss, gradients), (wanted, by_hand), torch.float32, floor=0)
    only_negatives = walks.accumulate(
        walks.sigmoid, walks.side(x), walks.side(y, 1.0, -20.0, torch.full((5,), 7))
    )
    softplus = np.logaddexp(0, np.subtract(*exact(x @ y.T, torch.tensor(20.0)))).sum(1)
    near((only_negatives[1][1, 0], ()), (softplus, ()), torch.float32, floor=0)


@every_dtype
@pytest.mark.parametrize(("L", "N", "D"), [(1, 3, 5), (18, 18, 24)])
def test_word_patch_alignment(L, N, D, dtype):
    words, patches = rows(2, L, D, dtype=dtype), rows(2, N, D, dtype=dtype)
    word_mask, patch_mask = (
        torch.arange(L) < torch.tensor([[1], [L]]),
        torch.arange(N) % 3 < torch.tensor([[1], [2]]),
    )
    masks = word_mask.to(DEVICE), patch_mask.to(DEVICE)
    wanted = ipot.wpa_np(*exact(words, patches, *masks), iters=5)
    # The gradient's plan is exp(t/β · cos + …), so that an error of a cosine counts t/β times.
    near(wpa.wpa(words, patches, *masks, iters=5), wanted, dtype, slack=5 / 0.5)


def test_alignment_keeps_to_what_the_chip_can_hold():
    """Otherwise the tiles take the pairs, and say why."""
    few, many, patches = (torch.zeros(1, n, 4, device=DEVICE) for n in (40, 65, 240))
    ask = functools.partial(stream.choose_backend, unfit=wpa.unfit)
    assert ask(few, patches)[0] == "kernels"
    assert ask(many, patches) == (
        "tiles",
        "65 words and 240 patches exceed a plan of 16384 entries on the chip",
    )
    assert ask(few, patches, None, None, 0.01) == ("tiles", "beta 0.01 is below 0.03125")


@every_dtype
def test_best_partners(dtype):
    x, y = rows(2, 18, 20, dtype=dtype), rows(2, 35, 20, dtype=dtype)
    y[:, 30] = y[:, 3] = x[:, 0]  # the best partner of row 0 stands in two tiles: the first wins
    veto = torch.zeros(2, 35, device=DEVICE)
    veto[0, 17:] = -torch.inf
    best, partner, y_best, y_partner = losses.best_partners(x, y, 0.0, veto)
    unit = [t / np.linalg.norm(t, axis=-1, keepdims=True) for t in exact(x, y)]
    S = unit[0] @ unit[1].swapaxes(1, 2)
    seen = S + exact(veto)[0][:, None]
    near((best, [y_best]), (seen.max(2), [S.max(1)]), dtype)
    assert (partner.cpu().numpy() == seen.argmax(2)).all()
    assert (y_partner.cpu().numpy() == S.argmax(1)).all()


def test_a_plan_of_potentials_and_two_runs_alike():
    """accumulate with M ≠ N in a batch, v = −inf at a column, and the same bits when it is run again."""
    x, y = rows(2, 18, 20, dtype=torch.float32), rows(2, 35, 20, dtype=torch.float32)
    r, u, v = (
        rows(2, 18, dtype=torch.float32),
        rows(2, 18, dtype=torch.float32),
        rows(2, 35, dtype=torch.float32),
    )
    v[:, 4] = -torch.inf
    dx, sums = walks.accumulate(walks.plan, walks.side(x, r, u), walks.side(y, 0.5, v))
    X, Y, R, U, V = exact(x, y, r, u, v)
    G = np.exp(0.5 * R[..., None] * (X @ Y.swapaxes(1, 2)) + U[..., None] + V[:, None])
    wanted = 0.5 * R[..., None] * (G @ Y)
    near((dx[..., :20], [sums[0]]), (wanted, [G.sum(2)]), torch.float32)
    again = walks.accumulate(walks.plan, walks.side(x, r, u), walks.side(y, 0.5, v))
    assert torch.equal(dx, again[0]) and torch.equal(sums, again[1])


def test_a_frozen_side_is_not_computed():
    x, y = rows(2, 5, 16, dtype=torch.float32)
    (dx, dy, dscale) = losses.infonce(x, y, 2.0, (False, True, False))[1]
    assert dx is None and dscale is None and dy is not None
    assert losses.sigmoid_loss(x, y, 2.0, 0.0, (True, False, True, True))[1][1] is None
    assert wpa.wpa(x[None], y[None], iters=2, wanted=(False, False))[1] == [None, None]


FUSED = {
    "infonce": (infonce.infonce_fused, infonce.infonce_np, [(19, 20), (19, 20)], [torch.tensor(3.0)]),
    "sigmoid_loss": (
        sigmoid.sigmoid_loss_fused, sigmoid.sigmoid_loss_np,
        [(19, 20), (19, 20)], [torch.tensor(3.0), torch.tensor(-2.0)],
    ),
    "chamfer": (chamfer.chamfer_fused, chamfer.chamfer_np, [(2, 18, 20), (2, 5, 20)], []),
    "wpa": (ipot.wpa_fused, ipot.wpa_np, [(2, 18, 20), (2, 5, 20)], []),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_rungs_take_the_kernels(name, monkeypatch):
    """End to end through autograd, upstream gradient 3, twice backward; then the first input frozen."""
    fused, by_hand, shapes, scalars = FUSED[name]
    slack = 50 / 0.5 if name == "wpa" else 1.0  # as above, t/β
    arrays = [rows(*shape, dtype=torch.float32, unit=True).roll(k, -2) for k, shape in enumerate(shapes)]
    assert stream.choose_backend(arrays[0])[0] == "kernels"
    assert stream.choose_backend(arrays[0].double())[0] == "tiles"
    monkeypatch.setattr(stream, "fold", None)  # the tiles of stream.py are not touched
    monkeypatch.setattr(stream, "accumulate", None)
    inputs = [t.clone().requires_grad_() for t in [*arrays, *scalars]]
    value = fused(*inputs)
    wanted, gradients = by_hand(*exact(*arrays), *map(float, scalars))
    for _ in range(2):
        found = torch.autograd.grad(3 * value.sum(), inputs, retain_graph=True)
        near((value, found), (wanted, [3 * g for g in gradients]), torch.float32, slack=slack)
    inputs[0] = arrays[0]
    (dy,) = torch.autograd.grad(fused(*inputs).sum(), inputs[1])
    near((0 * value, [dy]), (0 * wanted, [gradients[1]]), torch.float32, slack=slack)
