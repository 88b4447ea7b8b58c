"""The sigmoid loss: every image and every text answer yes or no as a pair; the loss that trains SigLIP.

With images X (B, D), their texts Y (B, D) and scale = 1/τ, the scores S = scale · X Yᵀ + bias are the logits
of B² yes-or-no questions, whose right answers are z = +1 on the diagonal and −1 elsewhere:

    L = 1/B Σ_ij softplus(−z_ij S_ij).

No score needs a normaliser, so the sum splits into blocks that need nothing of one another; InfoNCE's does
not. Negatives outnumber positives B − 1 to 1: bias = −10 starts the negatives near zero cost. The divisor is
B, not B².

Gradient, with σ the logistic function: G = dL/dS = −z σ(−z S) / B,
dX = scale · G Y, dY = scale · Gᵀ X, dscale = ⟨G, X Yᵀ⟩, dbias = Σ_ij G_ij.

Rungs (S has B² entries):
    sigmoid_loss_np     the formula and its gradients, a few arrays like S
    sigmoid_loss        the same in PyTorch: one product makes S, autograd keeps three arrays like it
    sigmoid_loss_fused  one walk over tiles of S makes the loss and the gradients: two tiles, dX and dY
Over R processes, each with b = B/R pairs:
    sigmoid_loss_ring   a block of S at a time on each rank: b² entries, however many ranks

Source: Zhai et al. 2023 (SigLIP), algorithm 1, and section 3.3 for the ring. The equation displayed in
section 3.2 subtracts the bias, so that −10 would start every negative at a cost of 10; the algorithm adds it.
Left out: normalising X and Y, which the model does; weights for the many negatives; rings that pass
shards both ways at once, which halve the waiting and not the traffic.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working, working_np


def _check(library, images, texts, scale, bias) -> int:
    """Refuse other than images, texts (B, D) with B ≥ 1, `scale` > 0 and a finite `bias`; return B."""
    sizes = require.shapes(library, images=(images, "B D"), texts=(texts, "B D"))
    if sizes["B"] < 1:
        require.fail("images", "must hold at least one pair", tuple(images.shape))
    require.floats(images=images, texts=texts)
    require.positive(library, scale=scale)
    require.finite(library, bias=bias)
    return sizes["B"]


def sigmoid_loss_np(images: np.ndarray, texts: np.ndarray, scale: float, bias: float):
    """The sigmoid loss and its gradients by hand.

    images (B, D) and texts (B, D), row i of one the partner of row i of the other; scale = 1/τ > 0; bias
    finite. Returns `(loss in nats, (dimages, dtexts, dscale, dbias))`. Raises ValueError on bad
    shapes, mixed dtypes, NaN, infinities, B = 0, scale ≤ 0 and scores that overflow.
    """
    B = _check(np.ndarray, images, texts, scale, bias)
    x, y = working_np(images, texts)
    cosines = x @ y.T  # (B, B)
    S = scale * cosines + bias
    z = 2 * np.eye(B) - 1  # (B, B)
    # softplus(t) = log(1 + exp(t)) = logaddexp(0, t), which never forms exp of a large number.
    loss = np.logaddexp(0, -z * S).sum() / B
    # softplus' = σ, and σ(t) = exp(−softplus(−t)) keeps every digit of a small σ; −z S brings the −z.
    G = -z * np.exp(-np.logaddexp(0, z * S)) / B  # (B, B)
    # S_ij = scale Σ_d x_id y_jd + bias, so a factor's gradient is G times the other factors, summed over the
    # rest.
    dimages = scale * G @ y  # (B, D)
    dtexts = scale * G.T @ x  # (B, D)
    dscale = (G * cosines).sum()
    dbias = G.sum()
    return require.loss(loss, images=images), (dimages, dtexts, dscale, dbias)


def sigmoid_loss(images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """The sigmoid loss: images (B, D), texts (B, D), scale = 1/τ > 0, bias → scalar in nats.

    Errors as in `sigmoid_loss_np`. Half precisions are added up in float32, also under autocast.
    """
    B = _check(Tensor, images, texts, scale, bias)
    with at_least_float32(images, texts) as (x, y):
        S = scale * x @ y.T + bias  # (B, B)
        z = 2 * torch.eye(B, dtype=S.dtype, device=S.device) - 1  # (B, B)
        loss = -F.logsigmoid(z * S).sum() / B
    return require.loss(loss, images=images)


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

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return sigmoid_loss(images, texts, self.scale, self.bias)


def sigmoid_loss_ring(
    images: Tensor,
    texts: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The sigmoid loss over the processes of `group`: shards images (b, D), texts (b, D) → whole loss.

    The batch is the shards in rank order; all ranks receive the same loss and must call backward on it alike.
    The gradients of images and texts are this rank's rows of the one-process gradients; those of `scale` and
    `bias`, which must be equal on all ranks, are already summed over them. (Gradients of the towers are not:
    sum those over ranks.)
    Raises ValueError, on every rank, when any rank holds what `sigmoid_loss` refuses or shards differ in
    shape.
    """
    require.on_every_rank(lambda: _check(Tensor, images, texts, scale, bias), "images", images, group)
    loss = stream.differentiable(_Ring, images, texts, scale, bias, group)
    return require.loss(loss, images=images)


class _Ring(torch.autograd.Function):
    """A block of S at a time on each rank. Gradients are made beside the loss, so that no block is kept."""

    @staticmethod
    def forward(ctx, images, texts, scale, bias, group):
        b, B = len(images), len(images) * dist.get_world_size(group)
        x, y = working(images, texts)
        loss, dscale, dbias = x.new_zeros(3)
        dimages = torch.zeros_like(x)  # (b, D)
        # A shard of texts travels together with its gradient, to which every rank adds its share.
        parcel = torch.stack([y, torch.zeros_like(y)])  # (2, b, D)
        z = 2 * torch.eye(b, dtype=x.dtype, device=x.device) - 1  # (b, b)
        for _ in range(dist.get_world_size(group)):
            visiting, dvisiting = parcel
            cosines = x @ visiting.T  # (b, b)
            S = scale * cosines + bias
            loss -= F.logsigmoid(z * S).sum() / B
            # The gradient of sigmoid_loss_np, for one of its blocks.
            G = -z * torch.sigmoid(-z * S) / B  # (b, b)
            dimages += scale * G @ visiting
            dvisiting += scale * G.T @ x
            dscale += (G * cosines).sum()
            dbias += G.sum()
            # Texts that come from another rank have no partner here: every pair is a negative.
            z = torch.full_like(z, -1)
            parcel = _pass_on(parcel, group)
        # After as many passes as ranks each parcel is home. The scalars are shares of a sum: add them up.
        totals = torch.stack([loss, dscale, dbias])
        dist.all_reduce(totals, group=group)
        loss, dscale, dbias = totals
        ctx.save_for_backward(dimages, parcel[1], dscale, dbias)
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


# The fused rung never holds S: no score needs another, so one walk over its tiles makes loss and gradients,
# and one exponential an entry serves both. The diagonal is set aside and treated by itself. It would be
# shorter to count all B² entries as negatives and to correct the positives by softplus(−s) = softplus(s) − s,
# but for a confident positive that difference of two equal numbers is 0, where the loss is e^(−s).


def sigmoid_loss_fused(images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """`sigmoid_loss` without S: a tile gives its part of the loss and of the gradients, and is forgotten.

    The same 3 products, less traffic. In units of B² numbers read or written: the plain rung moves some 25 to
    and from memory, S, z and what autograd makes of them; this one moves rows of Y and dY, 4 D/512 in all, as
    its tiles stay in the cache. It can be differentiated once. Arguments and errors as in `sigmoid_loss`.
    """
    _check(Tensor, images, texts, scale, bias)
    return require.loss(stream.dispatch(_Fused, images, texts, scale, bias, kernel=_kernel), images=images)


def _kernel() -> Callable:
    from minivlp.kernels import losses  # imports Triton, hence only where it is used

    return losses.sigmoid_loss


class _Fused(stream.GradientsFromForward):
    """One walk: no score needs another, so its part of G is known as soon as it is."""

    @staticmethod
    def forward(ctx, images, texts, scale, bias):
        B, scale, bias = len(images), float(scale), float(bias)
        x, y = working(images, texts)
        losses, slopes = x.new_zeros(2, B)
        dimages, dtexts, dscale = stream.accumulate(
            sigmoid_tile,
            x,
            y,
            losses,
            slopes,
            scale=scale,
            bias=bias,
            weight=1 / B,
            wanted=ctx.needs_input_grad,
        )
        ctx.save_for_backward(dimages, dtexts, dscale, slopes.sum() / B)
        return (losses.sum() / B).to(images.dtype)


# Above this softplus(s) = s to the last digit of float64, and e^s is still far from overflowing in float32.
SOFTPLUS_LINEAR = 80.0


def sigmoid_tile(S: Tensor, scratch: Tensor, rows, columns, losses: Tensor, slopes: Tensor) -> None:
    """S becomes B · G; its rows' shares of B · loss and B · ΣG are added to losses (B,) and slopes (B,)."""
    offset = rows[0].start - columns[0].start
    diagonal = S.diagonal(offset)  # a view, empty off the diagonal of the whole S
    positives = diagonal.clone()
    diagonal.fill_(-math.inf)  # a negative of −∞ costs nothing
    # A negative costs softplus(s) = log(1 + e^s), with slope σ(s) = e^s / (1 + e^s): one exp for both. What
    # exceeds SOFTPLUS_LINEAR is added as it is.
    losses[rows] += torch.sub(S, SOFTPLUS_LINEAR, out=scratch).clamp_(min=0).sum(1)
    S.clamp_(max=SOFTPLUS_LINEAR).exp_()
    torch.log1p(S, out=scratch)
    scratch.diagonal(offset).copy_(-F.logsigmoid(positives))
    losses[rows] += scratch.sum(1)
    S.div_(torch.add(S, 1, out=scratch))
    diagonal.copy_(-torch.sigmoid(-positives))
    slopes[rows] += S.sum(1)


RUNGS = {"sigmoid_loss": {"np": sigmoid_loss_np, "torch": sigmoid_loss, "fused": sigmoid_loss_fused}}
