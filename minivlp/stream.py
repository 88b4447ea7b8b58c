"""The one tile loop: every objective here is a reduction of S = scale · X Yᵀ + bias, and S need not be held.

S has M × N entries where X and Y have (M + N) × D. Two walks over its tiles serve every objective, each with
a step function, which is all that an objective adds:

    fold          a tile of S arrives, the step folds it into a small state of each row and each column:
                  a running logsumexp (InfoNCE), a maximum and its place (Chamfer), a weighted sum (attention)
    accumulate    a tile of S arrives, the step turns it in place into a tile of G = dL/dS, and the walk adds
                  it up into the gradients dX = scale · G Y, dY = scale · Gᵀ X and
                  dscale = ⟨G, X Yᵀ⟩ = ⟨X, G Y⟩ = ⟨X, dX⟩ / scale

When G needs no state (sigmoid loss, or rows that fit a tile whole) one accumulate does everything: 3 products
of 2·M·N·D flops each. When it needs row and column sums first (InfoNCE), a fold comes before: 4 products,
because S is made twice. When G is sparse (Chamfer) the fold is enough: 1 product.

A step is a plain function `step(S, scratch, rows, columns, *state)`:

    S          the tile (m, n), or (b, m, n) in a batch, contiguous; the step may overwrite it
    scratch    a second tile of the same shape to write into
    rows       where its rows are: `state[rows]` is their part of a state (M,) or (B, M), `x[rows]` of x
    columns    the same for its columns, in states (N,) or (B, N) and y
    *state     what the caller gave, updated in place

Memory: two tiles beside what the caller holds, however large M and N are.

Sources: Milakov and Gimelshein 2018 (the running normaliser of a softmax); Rabe and Staats 2021 and Dao et
al. 2022 (FlashAttention), who walk over tiles of attention's S; Cheng et al. 2024 (Inf-CL), of InfoNCE's.
Left out: gradients of gradients, which need a third walk; the plain rungs have them.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minivlp.core.precision import without_autocast
from minivlp.core.require import fail

# Rows and columns of a tile: two tiles of float32 are 4 MB. Larger ones leave the caches before the step has
# read them, smaller ones slow the products down.
TILE = (512, 1024)

Index = tuple[slice, ...]
Step = Callable[..., None]


def fold(
    step: Step,
    x: Tensor,
    y: Tensor,
    *state: Tensor,
    scale: float = 1.0,
    bias: float | Tensor = 0.0,
    tile: tuple[int, int] | None = None,
) -> None:
    """Call `step(S, scratch, rows, columns, *state)` on every tile of S = scale · x yᵀ + bias.

    x (M, D) and y (N, D), or x (B, M, D) and y (B, N, D), for which S is (B, M, N). Rows of tiles are walked
    from first to last, in each the columns from first to last. `bias` is a number, or (N,), one for each
    column; `tile` is the largest (rows, columns), None = TILE.
    """
    for S, scratch, rows, columns in _tiles(x, y, scale, bias, tile):
        step(S, scratch, rows, columns, *state)


def accumulate(
    step: Step,
    x: Tensor,
    y: Tensor,
    *state: Tensor,
    scale: float = 1.0,
    bias: float | Tensor = 0.0,
    tile: tuple[int, int] | None = None,
    weight: float = 1.0,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same walk for a step that turns each S into G in place: returns (dx like x, dy like y, dscale).

    `weight` multiplies all three, so that a step may leave a constant factor out of G. A gradient that is not
    `wanted` is None, and its product is not made. Other arguments as in `fold`.
    """
    needs_x = wanted[0] or (wanted[2] and not wanted[1])  # dscale comes from one of the two
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None  # (…, M, D)
    dy = torch.zeros_like(y, memory_format=torch.contiguous_format) if wanted[1] else None  # (…, N, D)
    for G, scratch, rows, columns in _tiles(x, y, scale, bias, tile):
        step(G, scratch, rows, columns, *state)
        if needs_x:
            _product(dx[rows], G, y[columns], scale * weight, add=True)
        if wanted[1]:
            _product(dy[columns], G.mT, x[rows], scale * weight, add=True)
    dscale = None
    if wanted[2]:
        dscale = row_dots(*((x, dx) if needs_x else (y, dy))).sum() / scale
    return dx if wanted[0] else None, dy, dscale


def _tiles(
    x: Tensor, y: Tensor, scale: float, bias: float | Tensor, tile: tuple[int, int] | None
) -> Iterator:
    """Every tile of S, each written over the one before: (S, scratch, rows, columns)."""
    M, N, batch, tile = x.shape[-2], y.shape[-2], x.shape[:-2], tile or TILE
    m, n = min(tile[0], M), min(tile[1], N)
    # Small S of a batch are made together, as many as fill a tile.
    many = min(max(1, tile[0] * tile[1] // max(1, m * n)), *batch) if batch else 1
    memory = x.new_empty(2, many * m * n)
    for place in _slices(batch[0], many) if batch else [()]:
        for row in _slices(M, m):
            for column in _slices(N, n):
                rows, columns = (*place, *row), (*place, *column)
                left, right = x[rows], y[columns].mT
                shape = (*left.shape[:-1], right.shape[-1])  # the last of a row or column may be smaller
                S, scratch = memory[:, : left.shape[:-1].numel() * right.shape[-1]].unflatten(1, shape)
                _product(S, left, right, scale)
                if isinstance(bias, Tensor):
                    S.add_(bias[column])
                elif bias:
                    S.add_(bias)
                yield S, scratch, rows, columns


def _slices(length: int, step: int) -> list[Index]:
    return [(slice(start, min(start + step, length)),) for start in range(0, length, max(1, step))]


def _product(into: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, add: bool = False) -> None:
    """into = scale · left right, or into += it, with no other memory; of matrices or of batches of them."""
    if into.ndim == 3 and len(into) == 1:  # a batch of one is a matrix
        into, left, right = into[0], left[0], right[0]
    multiply = torch.addmm if into.ndim == 2 else torch.baddbmm
    multiply(into, left, right, beta=float(add), alpha=scale, out=into)


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """⟨xᵢ, yᵢ⟩ (…,) of the rows of x and y (…, D), in their own precision also under autocast."""
    with without_autocast(x):
        return torch.linalg.vecdot(x, y)


def differentiable(function: type[torch.autograd.Function], *inputs: object) -> object:
    """What `function.apply(*inputs)` returns: how every fused rung calls its autograd function.

    Autocast is off inside, since it knows nothing of gradients made by hand. Under `torch.no_grad` no
    gradient is wanted, whatever the inputs say. Raises ValueError under the transforms of torch.func, which
    would differentiate what is made by hand.
    """
    if torch._C._are_functorch_transforms_active():
        fail("torch.func", "must be given the plain rung", "a fused one, whose gradient is made by hand")
    if not torch.is_grad_enabled():
        inputs = tuple(t.detach() if isinstance(t, Tensor) else t for t in inputs)
    with without_autocast(next(t for t in inputs if isinstance(t, Tensor))):
        return function.apply(*inputs)


class GradientsFromForward(torch.autograd.Function):
    """A scalar loss whose `forward` makes the gradients beside the value and saves them.

    Saved gradients match the first inputs, in their order; later inputs get None. A gradient that is not
    needed may be saved as None.
    """

    @staticmethod
    def backward(ctx, upstream):
        refuse_create_graph()
        # In loss.backward() the upstream gradient is 1, and the saved gradients need no multiplication. A GPU
        # is not asked whether it is 1: waiting for the answer would cost more than multiplying.
        is_one = upstream.is_cpu and upstream == 1
        saved = [*ctx.saved_tensors, *[None] * len(ctx.needs_input_grad)]
        return tuple(
            (gradient if is_one else upstream * gradient) if needed and gradient is not None else None
            for gradient, needed in zip(saved, ctx.needs_input_grad, strict=False)
        )


def refuse_create_graph() -> None:
    """For the backward pass of a fused rung, whose gradients are numbers without a graph of their own.

    Raises RuntimeError under `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a fused rung can be differentiated once: for create_graph use the plain one")


def dispatch(
    tiles: type[torch.autograd.Function],
    *inputs,
    kernel: Callable[[], Callable],
    unfit: Callable[..., str] | None = None,
) -> Tensor:
    """The loss of a fused rung, by `tiles` (PyTorch) or by a kernel (Triton), as `choose_backend` decides.

    `kernel()` imports and returns a function of `(*inputs, wanted=…)` that returns (value, gradients); it is
    called only when the kernel is chosen, because Triton may be absent. `unfit` is as in `choose_backend`.
    """
    if choose_backend(*inputs, unfit=unfit)[0] == "kernels":
        return differentiable(_OnKernels, kernel(), *inputs)
    return differentiable(tiles, *inputs)


class _OnKernels(GradientsFromForward):
    """A kernel makes the value and the gradients: a scalar, or (B,) with an upstream gradient for each."""

    @staticmethod
    def forward(ctx, kernel, *inputs):
        wanted = ctx.needs_input_grad[1:]
        value, gradients = kernel(*inputs, wanted=wanted)
        ctx.save_for_backward(
            *(
                g.to(t.dtype) if needed else None
                for g, t, needed in zip(gradients, inputs, wanted, strict=False)
            )
        )
        return value.to(inputs[0].dtype)

    @staticmethod
    def backward(ctx, upstream):
        refuse_create_graph()
        gradients = [
            None if g is None else upstream.reshape((*upstream.shape, *[1] * (g.ndim - upstream.ndim))) * g
            for g in ctx.saved_tensors
        ]
        return None, *gradients, *[None] * (len(ctx.needs_input_grad) - 1 - len(gradients))


def choose_backend(x: Tensor, *others, unfit: Callable[..., str] | None = None) -> tuple[str, str]:
    """Which code a fused rung runs for x, and why: ("tiles", …) is PyTorch, ("kernels", …) is Triton.

    The rule of InfoNCE, the sigmoid loss, Chamfer and word-patch alignment; other rungs have no kernel.
    `unfit(x, *others)` says why a kernel cannot take these inputs, "" when it can; it is asked last, so that
    it may import Triton. With TRITON_INTERPRET=1 in the environment kernels run on the CPU too, slowly, to be
    tested.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not x.is_cuda and not interpreted:
        return "tiles", f"x is on {x.device.type}"
    if x.dtype == torch.float64:
        return "tiles", "x is float64, the kernels add up in float32"
    if x.numel() == 0:
        return "tiles", "x is empty"
    if importlib.util.find_spec("triton") is None:
        return "tiles", "Triton is not installed"
    if unfit and (reason := unfit(x, *others)):
        return "tiles", reason
    return "kernels", "Triton interprets them" if interpreted else f"x is {x.dtype} on {x.device.type}"
