"""What learns: a frozen weight and, beside it, a product of two thin ones; and how a module is frozen.

A weight W (O, D) that stays as it is learns a change of rank r through A (r, D) and B (O, r):

    h = x Aᵀ,        y = x Wᵀ + s h Bᵀ = x (W + s B A)ᵀ,        s = α / r.

r (O + D) numbers learn in place of O · D. B starts at 0, so that training begins at the model as it was, and
A at random: with both at 0 neither would ever have a gradient. Afterwards W + s B A is one weight again.

Gradient, with G = dL/dy: dB = s Gᵀ h, dh = s G B, dA = dhᵀ x, dx = G W + dh A; and, where they learn,
dW = Gᵀ x and ds = ⟨G B, h⟩.

Frozen is a word for three things. No optimiser moves a weight: weights whose gradient is set to 0 still
decay in AdamW, weights without one do not. Gradients flow through it, or nothing below would learn:
`torch.no_grad` is something else. And it stays in evaluation mode, or dropout and running means would change
what it says. `freeze` sees to all of them.

Rungs (products of x with M rows, numbers beside the arguments):
    lora_np       M · O · D + M · r (O + D) products; h; gradients by hand
    lora          the same in PyTorch; autograd keeps h
    lora_fused    one product with W + s B A, O · D (M + r); nothing is kept, W + s B A is made and dropped

Sources: Hu et al. 2022 (LoRA), eq. 3 and section 4.1.
Left out: dropout before A, which merged weights cannot have; s = α / √r; changes of convolutions and of
embeddings.
"""

from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working, working_np

Module = TypeVar("Module", bound=nn.Module)


def _check(library, x, weight, down, up, scale) -> None:
    """Refuse other than x (M, D), weight (O, D), down (r, D), up (O, r), scale > 0, and changes too large."""
    require.shapes(library, x=(x, "M D"), weight=(weight, "O D"), down=(down, "r D"), up=(up, "O r"))
    require.floats(x=x, weight=weight, down=down, up=up)
    require.positive(library, scale=scale)
    # W + s B A must be a weight of this dtype, also where it is not made; r · max|B| · max|A| bounds B A.
    A, B = (working if library is Tensor else working_np)(down, up)
    if min(A.shape) and min(B.shape):
        require.held(len(A) * abs(B).max() * abs(A).max(), "change of the weight", "up", A.dtype)


def lora_np(x: np.ndarray, weight: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float, grad=None):
    """The product and its gradients by hand.

    x (M, D), weight W (O, D), down A (r, D), up B (O, r), scale s > 0; grad (M, O) the upstream gradient
    (None = ones). Returns `(y (M, O), (dx, dweight, ddown, dup, dscale))`. Raises ValueError on bad shapes,
    mixed dtypes, NaN, infinities, scale ≤ 0 and results or changes of the weight that overflow.
    """
    _check(np.ndarray, x, weight, down, up, scale)
    dtype = x.dtype
    x, weight, down, up = working_np(x, weight, down, up)
    h = x @ down.T  # (M, r)
    out = x @ weight.T + scale * (h @ up.T)  # (M, O)
    require.held(out, "result", "x", dtype)
    G = np.ones_like(out) if grad is None else grad
    GB = G @ up  # (M, r)
    # y = x Wᵀ + s h Bᵀ: B is felt through h; h by s G B; A through h by x.
    dup = scale * (G.T @ h)
    dh = scale * GB
    ddown = dh.T @ x
    # x goes both ways, through the frozen weight and through A.
    dx = G @ weight + dh @ down
    return out, (dx, G.T @ x, ddown, dup, (GB * h).sum())


def lora(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float | Tensor) -> Tensor:
    """x Wᵀ + s (x Aᵀ) Bᵀ: x (M, D), weight (O, D), down (r, D), up (O, r) → (M, O).

    Errors as in `lora_np`. Half precisions are added up in float32, also under autocast.
    """
    _check(Tensor, x, weight, down, up, scale)
    with at_least_float32(x, weight, down, up) as (z, W, A, B):
        out = (z @ W.T + scale * (z @ A.T @ B.T)).to(x.dtype)
    require.held(out, "result", "x", x.dtype)
    return out


class Lora(nn.Module):
    """A Linear, frozen, beside a change of rank `rank` that learns, scale = alpha / rank; → (…, O).

    down is normal with deviation D^−½, drawn from `rng`, up is 0: at first the output is the Linear's own.
    Raises ValueError when base is no Linear, for rank < 1, alpha ≤ 0 and what is no Generator.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, rng: np.random.Generator):
        super().__init__()
        if not isinstance(base, nn.Linear):
            require.fail("base", "must be a Linear", type(base).__name__)
        if rank < 1:
            require.fail("rank", "must be at least 1", rank)
        require.positive(alpha=alpha)
        require.generator(rng)
        self.base, self.scale = freeze(base), alpha / rank
        down = rng.standard_normal((rank, base.in_features)) * base.in_features**-0.5
        self.down = nn.Parameter(torch.from_numpy(down).to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, O), unchecked."""
        return self.base(x) + self.scale * linear(linear(x, self.down), self.up)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A new Linear with the weight W + s B A and the base's bias, which learns like any other."""
        W = self.base.weight
        merged = nn.Linear(*W.shape[::-1], self.base.bias is not None, W.device, W.dtype)
        merged.weight.copy_(torch.addmm(W, self.up, self.down, alpha=self.scale))
        if self.base.bias is not None:
            merged.bias.copy_(self.base.bias)
        return merged


def freeze(module: Module) -> Module:
    """Freeze `module`, in place, and return it: its weights get no gradient, its inputs do.

    It is in evaluation mode and stays in it, and so does every part of it, whatever calls `.train()`.
    """
    module.eval().requires_grad_(False)
    for part in module.modules():
        part.train = partial(_stay, part)  # in place of the method, which a parent calls
    return module


def _stay(part: nn.Module, mode: bool = True) -> nn.Module:
    return part


def lora_fused(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float | Tensor) -> Tensor:
    """`lora` by the merged weight; arguments and errors as there, differentiable once.

    The rows of x meet one matrix in place of three, and the backward pass makes h anew, M · r numbers, so
    that nothing is kept. Where W does not learn, the backward pass makes no array of its size.
    """
    _check(Tensor, x, weight, down, up, scale)
    out = stream.differentiable(_Fused, x, weight, down, up, scale)
    require.held(out, "result", "x", x.dtype)
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, down, up, scale):
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = float(scale)
        z, W, A, B = working(x, weight, down, up)
        return (z @ torch.addmm(W, B, A, alpha=ctx.scale).T).to(x.dtype)

    @staticmethod
    def backward(ctx, upstream):
        stream.refuse_create_graph()
        arrays, s = ctx.saved_tensors, ctx.scale
        x, W, A, B, G = working(*arrays, upstream)
        wanted, h, GB = ctx.needs_input_grad, x @ A.T, G @ B  # (M, r) both
        grads = (
            torch.addmm(G @ W, GB, A, alpha=s) if wanted[0] else None,
            G.T @ x if wanted[1] else None,
            s * (GB.T @ x) if wanted[2] else None,
            s * (G.T @ h) if wanted[3] else None,
        )
        cast = (g if g is None else g.to(a.dtype) for g, a in zip(grads, arrays, strict=True))
        return *cast, (GB * h).sum() if wanted[4] else None


RUNGS = {
    "lora": {"np": lora_np, "torch": lora, "fused": lora_fused},
    "adapter": {"plain": Lora},
    "freeze": {"plain": freeze},
}
