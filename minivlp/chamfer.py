"""Chamfer alignment: how well do two sets of tokens match when every token may choose its best partner?

The answer is a similarity in [−1, 1], and 1 when every token has an exact partner on the other side:

    s = ½ (meanᵢ maxⱼ Sᵢⱼ + meanⱼ maxᵢ Sᵢⱼ),        Sᵢⱼ = cos(xᵢ, yⱼ), padding excluded from means and maxima.

On unit rows the squared Chamfer distance is 4 (1 − s). The two directed halves are the late interaction of
FILIP; a maximum is the limit of a logsumexp at temperature 0, and a row-wise best partner is transport with
the row marginal alone, so each mean of minima of 1 − cos is at most the cost of the full transport problem.

Gradient: dS = ½ (one-hot of the row maximum / M + one-hot of the column maximum / N), the first index winning
ties. s grows with the number of tokens even for unrelated sets, so read it against `mismatched`.

Rungs (M × N similarities):
    chamfer_np      S and its gradient, two M × N arrays
    chamfer         the same by autograd, which keeps the indices of the maxima and makes S, then its gradient
    chamfer_fused   one walk over tiles of S, which keeps each token's best partner: M + N indices

Sources: Fan, Su and Guibas 2017 (the Chamfer distance between point sets); Yao et al. 2022 (FILIP), section
3.1; Lin et al. 2024 (VILA), section 3.1, which measures alignment layer by layer with it.
Left out: the sum over tokens of ColBERT in place of the mean, which grows with the length of the caption.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import working, working_np
from minivlp.core.transport import MIN_NORM, within_range
from minivlp.sinkhorn import cosine, unit, unit_grad_np, unit_np


def _check(library, x, y, x_mask, y_mask) -> None:
    """Refuse what is not `x (…, M, D)` and `y (…, N, D)` with equal leading axes and masks that fit them."""
    require.shapes(library, x=(x, "… M D"), y=(y, "… N D"))
    if x.shape[:-2] != y.shape[:-2]:
        require.fail("y", f"must have the leading axes {tuple(x.shape[:-2])} of x", tuple(y.shape))
    require.tokens(("x", x, "x_mask", x_mask), ("y", y, "y_mask", y_mask))


def mean_max_np(S: np.ndarray, row_mask: np.ndarray | None, col_mask: np.ndarray | None):
    """One directed half: the mean over real rows of the maximum over real columns of S (…, M, N).

    Masks broadcast to (…, M) and (…, N). Returns `(value (…), its gradient in S (…, M, N))`.
    """
    best = (S if col_mask is None else np.where(col_mask[..., None, :], S, -np.inf)).argmax(-1)[..., None]
    real = np.ones(S.shape[:-1]) if row_mask is None else np.broadcast_to(row_mask, S.shape[:-1])
    weight = real / real.sum(-1, keepdims=True)  # (…, M), summing to one
    # value = Σ_i weight_i S_i,best(i): its slope in S_ij is weight_i where j is the partner, else 0.
    dS = np.zeros_like(S)
    np.put_along_axis(dS, best, weight[..., None], -1)
    return (dS * S).sum((-2, -1)), dS


def mean_max(S: Tensor, row_mask: Tensor | None = None, col_mask: Tensor | None = None) -> Tensor:
    """One directed half: the mean over real rows of the maximum over real columns, S (…, M, N) → (…).

    Masks broadcast to (…, M) and (…, N), so a batch of all pairs (B, B, M, N) takes (B, 1, M) and (1, B, N).
    The other half is `mean_max(S.mT, col_mask, row_mask)`.
    """
    if col_mask is not None:
        S = S.masked_fill(~col_mask[..., None, :], -torch.inf)
    best = S.max(-1).values  # (…, M); with an index, so that the gradient goes to the first of equal maxima
    if row_mask is None:
        return best.mean(-1)
    return best.masked_fill(~row_mask, 0).sum(-1) / row_mask.sum(-1)


def chamfer_np(
    x: np.ndarray,
    y: np.ndarray,
    x_mask: np.ndarray | None = None,
    y_mask: np.ndarray | None = None,
    grad: np.ndarray | None = None,
):
    """The Chamfer similarity of token sets and its gradients by hand.

    x (…, M, D), y (…, N, D), masks (…, M) and (…, N) with True = real; grad (…) is the upstream gradient
    (None = ones). Rows are divided by max(‖row‖, 1e-5). Returns `(value (…) in [−1, 1], (d x, d y))`. Raises
    ValueError on bad shapes, mixed dtypes, NaN, infinities, an empty set and an all-False mask row.
    """
    _check(np.ndarray, x, y, x_mask, y_mask)
    (p, x_length), (q, y_length) = map(unit_np, working_np(x, y))
    S = p @ q.swapaxes(-1, -2)  # (…, M, N)
    forward, d_forward = mean_max_np(S, x_mask, y_mask)
    backward, d_backward = mean_max_np(S.swapaxes(-1, -2), y_mask, x_mask)
    G = 0.5 * (d_forward + d_backward.swapaxes(-1, -2))  # (…, M, N)
    G = G if grad is None else G * np.asarray(grad)[..., None, None]
    # S = P Qᵀ, so each factor's gradient is G times the other; G holds at most M + N numbers that are not 0.
    dx = unit_grad_np(p, x_length, G @ q)
    dy = unit_grad_np(q, y_length, G.swapaxes(-1, -2) @ p)
    return 0.5 * (forward + backward), (dx, dy)


def chamfer(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """The Chamfer similarity: x (…, M, D), y (…, N, D) → (…); arguments and errors as in `chamfer_np`."""
    _check(Tensor, x, y, x_mask, y_mask)
    S = cosine(x, y)  # (…, M, N)
    return (0.5 * (mean_max(S, x_mask, y_mask) + mean_max(S.mT, y_mask, x_mask))).to(x.dtype)


def mismatched(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """The baseline to read `chamfer(x, y)` against: its mean over wrong pairs of equal size, a scalar.

    x (B, M, D), y (B, N, D), masks as in `chamfer`. Partners of pair i are the yⱼ, j ≠ i, with as many real
    tokens as yᵢ, because the similarity of unrelated sets depends on how many tokens there are to choose
    from. Every pair that has partners counts once. Raises ValueError when none has, and as `chamfer` does.
    """
    _check(Tensor, x, y, x_mask, y_mask)
    B = require.shapes(x=(x, "B M D"))["B"]
    real = y.new_ones(y.shape[:2], dtype=torch.bool) if y_mask is None else y_mask.expand(y.shape[:2])
    size = real.sum(1)  # (B,)
    p, q = working(x, y)
    total, partners = q.new_zeros(B), size.new_zeros(B)
    for shift in range(1, B):
        equal = size == size.roll(shift)  # (B,)
        total = total + chamfer(p, q.roll(shift, 0), x_mask, real.roll(shift, 0)) * equal
        partners = partners + equal
    if not bool(partners.any()):
        require.fail("y", "must hold two sets with equally many real tokens", f"sizes {size.tolist()}")
    return (total / partners.clamp_min(1))[partners > 0].mean().to(x.dtype)


# The fused rung never holds S: one walk over its tiles keeps the best partner of each token, on both sides. G
# has at most M + N entries that are not 0, so backward needs no second walk: it gathers partners.


def chamfer_fused(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """`chamfer` without S: all that is kept is each token's best partner. Arguments and errors as there.

    1 product in place of 3, as G has M + N entries that are not 0: the gradients are gathers. In units of
    M · N numbers read or written: the plain rung moves some 16 to and from memory, S and the gradients of its
    maxima, mostly zeros; this one moves rows of y, D/512 in all, as its tiles stay in the cache. It can be
    differentiated once.
    """
    _check(Tensor, x, y, x_mask, y_mask)
    return stream.differentiable(_Fused, *within_range(x, y), x_mask, y_mask)


class _Fused(torch.autograd.Function):
    """One walk finds the partners; backward pulls each token to its partner and to those that chose it."""

    @staticmethod
    def forward(ctx, x, y, x_mask, y_mask):
        rows = [t.reshape(t.shape[:-2].numel(), *t.shape[-2:]) for t in (x, y)]  # (B, M, D), (B, N, D)
        (x_best, a, x_veto, w), (y_best, b, y_veto, v) = _empty_state(x, x_mask), _empty_state(y, y_mask)
        if stream.choose_backend(x)[0] == "kernels":
            from minivlp.kernels import losses  # imports Triton, hence only where it is used

            vetoes = (0.0 if veto is None else veto for veto in (x_veto, y_veto))
            x_best, a, y_best, b = losses.best_partners(*rows, *vetoes)
        else:
            p, q = map(unit, working(*rows))
            stream.fold(partner_tile, p, q, x_best, a, x_veto, y_best, b, y_veto)
        # Backward looks for partners in the flattened batch.
        pair = torch.arange(len(a), device=x.device)[:, None]
        a, b = a + pair * y.shape[-2], b + pair * x.shape[-2]
        ctx.save_for_backward(x, y, a, b, w, v)
        value = 0.5 * ((w * x_best).sum(-1) + (v * y_best).sum(-1))  # (B,)
        return value.view(x.shape[:-2]).to(x.dtype)

    @staticmethod
    def backward(ctx, upstream):
        stream.refuse_create_graph()
        x, y, a, b, w, v = ctx.saved_tensors
        x, y, half = *working(x, y), 0.5 * upstream.reshape(-1, 1)
        w, v = half * w, half * v  # (B, M), (B, N)
        dx = _pulled(x, y, a, w, b, v) if ctx.needs_input_grad[0] else None
        dy = _pulled(y, x, b, v, a, w) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None


def partner_tile(S, scratch, rows, columns, x_best, x_partner, x_veto, y_best, y_partner, y_veto) -> None:
    """Fold the tile into the best value (B, M) and the partner's index (B, M) of x's tokens, and of y's.

    A veto is −inf at padding, which is nobody's partner, else 0; None stands for all 0.
    """
    allowed = S if y_veto is None else torch.add(S, y_veto[columns][:, None], out=scratch)  # (b, m, n)
    _keep_best(allowed, columns[1].start, x_best[rows], x_partner[rows])
    allowed = S if x_veto is None else torch.add(S, x_veto[rows][..., None], out=scratch)
    _keep_best(allowed.mT, rows[1].start, y_best[columns], y_partner[columns])


def _keep_best(allowed: Tensor, first: int, best: Tensor, partner: Tensor) -> None:
    """Compare `allowed` (b, m, n) with the best so far (b, m); its first column has the index `first`."""
    top = allowed.amax(-1)
    better = top > best  # not ≥: of equal maxima the first stays
    best[better] = top[better]
    # An index costs ten times its maximum, and few rows improve after the first tiles.
    partner[better] = allowed[better].argmax(-1) + first


def _empty_state(tokens: Tensor, mask: Tensor | None) -> tuple:
    """For tokens (…, M, D): best −inf, partner 0, veto, and the weights of the mean, all (B, M)."""
    (one,) = working(tokens.new_ones(()))
    best = one.new_full(tokens.shape[:-1], -torch.inf).reshape(-1, tokens.shape[-2])
    partner = torch.zeros_like(best, dtype=torch.int64)
    if mask is None:
        return best, partner, None, torch.full_like(best, 1 / best.shape[1])
    real = mask.expand(tokens.shape[:-1]).reshape(best.shape)
    veto = torch.zeros_like(best).masked_fill_(~real, -torch.inf)
    return best, partner, veto, real / real.sum(1, keepdim=True, dtype=best.dtype)


TOKENS = 1024  # tokens whose pulls are added together: scaling all of y at once would be another array like y


def _pulled(x: Tensor, y: Tensor, a: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """dx of Σᵢ wᵢ cos(xᵢ, y_aᵢ) + Σⱼ vⱼ cos(x_bⱼ, yⱼ): x (…, M, D), y (…, N, D), a, w (B, M), b, v (B, N)."""
    flat, others = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (x, y))  # (BM, D), (BN, D)
    per_y = 1 / others.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)  # (BN, 1)
    a, w = a.flatten(), w.view(-1, 1)
    pull = others[a].mul_(per_y[a].mul_(w))  # (BM, D)
    shares = per_y * v.view(-1, 1)  # (BN, 1)
    for chooser, chosen, share in zip(
        others.split(TOKENS), b.flatten().split(TOKENS), shares.split(TOKENS), strict=True
    ):
        pull.index_add_(0, chosen, chooser * share)
    # As in unit_grad_np; in place, so that beside x and y one array of tokens is held.
    length = flat.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)
    along = stream.row_dots(flat, pull)[:, None] * (length > MIN_NORM) / length**2
    return pull.addcmul_(flat, along, value=-1).div_(length).view(x.shape)


RUNGS = {"chamfer": {"np": chamfer_np, "torch": chamfer, "fused": chamfer_fused}}
