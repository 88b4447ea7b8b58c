"""The sigmoid loss: every image and every text answer yes or no as a pair; the loss that trains SigLIP.

With x (B, D) the images, y (B, D) their texts and scale = 1/τ, the scores S = scale · x yᵀ + bias are the
logits of B² yes-or-no questions, whose right answers are z = +1 on the diagonal and −1 elsewhere:

    L = 1/B Σ_ij softplus(−z_ij S_ij).

No score needs a normaliser, so the sum falls into blocks that never meet, which InfoNCE's does not. Negatives
outnumber positives B − 1 to 1: bias = −10 starts the negatives near zero cost. The divisor is B, not B².

Gradient, with σ the logistic function: G = dL/dS = −z σ(−z S) / B,
dx = scale · G y, dy = scale · Gᵀ x, dscale = ⟨G, x yᵀ⟩, dbias = Σ_ij G_ij.

Rungs (S has B² entries):
    sigmoid_loss_np     the formula and its gradients, a few arrays like S
    sigmoid_loss        the same in PyTorch: one product makes S, autograd keeps three arrays like it
    sigmoid_loss_fused  one walk over tiles of S makes the loss and the gradients: two tiles, dx and dy
Over R processes, each with b = B/R pairs:
    sigmoid_loss_ring   a block of S at a time on each rank: b² entries, however many ranks

Source: Zhai et al. 2023 (SigLIP), algorithm 1, and section 3.3 for the ring. The equation displayed in
section 3.2 subtracts the bias, so that −10 would start every negative at a cost of 10; the algorithm adds it.
Left out: normalising x and y, which is the model's affair; weights for the many negatives; rings that pass
shards both ways at once, which halve the waiting and not the traffic.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minivlp import stream
from minivlp.core import require


def _check(x, y, scale, bias) -> int:
    """Refuse what is not `x (B, D)`, `y (B, D)` with B ≥ 1, `scale` > 0 and a finite `bias`; return B."""
    sizes = require.shapes(x=(x, "B D"), y=(y, "B D"))
    if sizes["B"] < 1:
        require.fail("x", "must hold at least one pair", tuple(x.shape))
    require.floats(x=x, y=y)
    require.positive(scale=scale)
    require.finite(bias=bias)
    return sizes["B"]


def sigmoid_loss_np(x: np.ndarray, y: np.ndarray, scale: float, bias: float):
    """The sigmoid loss and its gradients by hand.

    x (B, D), y (B, D) with row i of one the partner of row i of the other, scale = 1/τ > 0, bias finite.
    Returns `(loss in nats, (dx, dy, dscale, dbias))`. Raises ValueError on bad shapes, dtypes, NaN, B = 0,
    scale ≤ 0 or a bias that is not finite.
    """
    B = _check(x, y, scale, bias)
    cosines = x @ y.T  # (B, B)
    S = scale * cosines + bias
    z = 2 * np.eye(B) - 1  # (B, B)
    # softplus(t) = log(1 + exp(t)) = logaddexp(0, t), which never forms exp of a large number.
    loss = np.logaddexp(0, -z * S).sum() / B
    # softplus' = σ, and σ(t) = exp(−softplus(−t)) keeps every digit of a small σ; −z S brings the −z.
    G = -z * np.exp(-np.logaddexp(0, z * S)) / B  # (B, B)
    # S_ij = scale Σ_d x_id y_jd + bias, so a factor's gradient is G times the other factors, summed over the
    # rest.
    dx = scale * G @ y  # (B, D)
    dy = scale * G.T @ x  # (B, D)
    dscale = (G * cosines).sum()
    dbias = G.sum()
    return float(loss), (dx, dy, dscale, dbias)


def sigmoid_loss(x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """The sigmoid loss: x (B, D), y (B, D), scale = 1/τ > 0, bias → scalar in nats.

    Raises ValueError on bad shapes, dtypes, NaN, B = 0, scale ≤ 0 or a bias that is not finite.
    """
    B = _check(x, y, scale, bias)
    S = scale * x @ y.T + bias  # (B, B)
    z = 2 * torch.eye(B, dtype=S.dtype, device=S.device) - 1  # (B, B)
    return -F.logsigmoid(z * S).sum() / B


# Above this softplus(s) = s to the last digit of float64, and e^s is still far from overflowing in float32.
LARGE = 80.0


def sigmoid_tile(S: Tensor, spare: Tensor, rows, columns, losses: Tensor, slopes: Tensor) -> None:
    """S becomes B · G; its rows' shares of B · loss and B · ΣG are added to losses (B,) and slopes (B,)."""
    positives = S.diagonal(rows[0].start - columns[0].start)  # a view, empty off the diagonal of the whole S
    own = positives.clone()
    positives.fill_(-math.inf)  # as a negative it costs nothing
    # A negative costs softplus(s) = log(1 + e^s), with slope σ(s) = e^s / (1 + e^s): one exp for both. What
    # exceeds LARGE is added as it is.
    losses[rows] += torch.sub(S, LARGE, out=spare).clamp_(min=0).sum(1)
    S.clamp_(max=LARGE).exp_()
    torch.log1p(S, out=spare)
    spare.diagonal(rows[0].start - columns[0].start).copy_(-F.logsigmoid(own))
    losses[rows] += spare.sum(1)
    S.div_(torch.add(S, 1, out=spare))
    positives.copy_(-torch.sigmoid(-own))
    slopes[rows] += S.sum(1)


def sigmoid_loss_fused(x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """`sigmoid_loss` without S: a tile gives its part of the loss and of the gradients, and is forgotten.

    The same 3 products, less traffic. In units of B² numbers read or written: the plain rung moves some 25 to
    and from memory, S, z and what autograd makes of them; this one moves rows of y and dy, 4 D/512 in all, as
    its tiles stay in the cache. It can be differentiated once. Arguments and errors as in `sigmoid_loss`.
    """
    _check(x, y, scale, bias)
    return stream.run(_Fused, "kernels.losses.sigmoid_loss", x, y, scale, bias)


class _Fused(stream.Ready):
    """One walk: no score needs another, so its part of G is known as soon as it is."""

    @staticmethod
    def forward(ctx, x, y, scale, bias):
        B, scale, bias = len(x), float(scale), float(bias)
        p, q = stream.working(x, y)
        losses, slopes = p.new_zeros(2, B)
        dx, dy, dscale = stream.accumulate(
            sigmoid_tile,
            p,
            q,
            losses,
            slopes,
            scale=scale,
            bias=bias,
            weight=1 / B,
            wanted=ctx.needs_input_grad,
        )
        ctx.save_for_backward(dx, dy, dscale, slopes.sum() / B)
        return (losses.sum() / B).to(x.dtype)


def sigmoid_loss_ring(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The sigmoid loss over the processes of `group`: local shards x (b, D), y (b, D) in, whole loss out.

    The batch is the shards in rank order; all ranks receive the same loss and must call backward on it alike.
    The gradients of x and y are this rank's rows of the one-process gradients; those of `scale` and `bias`,
    which must be equal on all ranks, are already summed over them. (Gradients of the towers are not: sum
    those over ranks.)
    Raises ValueError, on every rank, when any rank holds what `sigmoid_loss` refuses or shards differ in
    shape.
    """
    require.on_every_rank(lambda: _check(x, y, scale, bias), "x", x, group)
    return _Ring.apply(x, y, scale, bias, group)


class _Ring(torch.autograd.Function):
    """A block of S at a time on each rank. Gradients are made beside the loss, so that no block is kept."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, group):
        b, B = len(x), len(x) * dist.get_world_size(group)
        loss, dscale, dbias = x.new_zeros(3)
        dx = torch.zeros_like(x)  # (b, D)
        # A shard of texts travels together with its gradient, to which every rank adds its share.
        parcel = torch.stack([y, torch.zeros_like(y)])  # (2, b, D)
        z = 2 * torch.eye(b, dtype=x.dtype, device=x.device) - 1  # (b, b)
        for _ in range(dist.get_world_size(group)):
            texts, dtexts = parcel
            cosines = x @ texts.T  # (b, b)
            S = scale * cosines + bias
            loss -= F.logsigmoid(z * S).sum() / B
            # The gradient of sigmoid_loss_np, for one of its blocks.
            G = -z * torch.sigmoid(-z * S) / B  # (b, b)
            dx += scale * G @ texts
            dtexts += scale * G.T @ x
            dscale += (G * cosines).sum()
            dbias += G.sum()
            # Texts that come from another rank have no partner here: every pair is a negative.
            z = torch.full_like(z, -1)
            parcel = _pass_on(parcel, group)
        # After as many passes as ranks each parcel is home. The scalars are shares of a sum: add them up.
        totals = torch.stack([loss, dscale, dbias])
        dist.all_reduce(totals, group=group)
        loss, dscale, dbias = totals
        ctx.save_for_backward(dx, parcel[1], dscale, dbias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(upstream * gradient if needed else None for gradient, needed in wanted), None


def _pass_on(parcel: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Send the parcel to the next rank of the ring and return the one that arrives from the rank before."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if ranks == 1:
        return parcel
    arriving = torch.empty_like(parcel)
    both = [
        dist.P2POp(dist.isend, parcel, group=group, group_peer=(rank + 1) % ranks),
        dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % ranks),
    ]
    for transfer in dist.batch_isend_irecv(both):
        transfer.wait()
    return arriving


class SigmoidLoss(torch.nn.Module):
    """The sigmoid loss with SigLIP's learned scale = exp(log_scale), at first 10, and bias, at first −10."""

    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(10)))
        self.bias = torch.nn.Parameter(torch.tensor(-10.0))

    @property
    def scale(self) -> Tensor:
        """1/τ as a differentiable scalar."""
        return self.log_scale.exp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sigmoid_loss(x, y, self.scale, self.bias)


RUNGS = {"sigmoid_loss": {"np": sigmoid_loss_np, "torch": sigmoid_loss, "fused": sigmoid_loss_fused}}
