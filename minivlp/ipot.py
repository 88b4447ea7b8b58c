"""IPOT: transport between the words and the patches of a pair by proximal steps; ViLT's word-patch alignment.

The proximal point method solves min ⟨T, C⟩ over plans with uniform marginals by a chain of easier problems,
each held near the plan before it by a Kullback-Leibler term of weight β:

    T_t = argmin ⟨T, C⟩ + β KL(T ‖ T_{t−1}).

One Sinkhorn sweep in each step is enough if the row scaling a is carried from step to step (T₀ = 1, a₀ = 1):

    Q = T_{t−1} · exp(−C / β),   b = (1/N) / (Qᵀ a_{t−1}),   a_t = (1/M) / (Q b),   T_t = diag(a_t) Q diag(b).

Columns are scaled first and rows last, so every word gives exactly 1/M, and the patches receive 1/N up to an
error that vanishes as t grows. If a were reset to 1 in each step the error would stay: the plan would remain
infeasible, and its cost might fall below the true optimum.

With A_t = Πa and B_t = Πb the plan is diag(A_t) exp(−t C / β) diag(B_t): one sweep at ε = β/t from
log-scalings that are extrapolated from the last two, log Ã_t = 2 log A_{t−1} − log A_{t−2}. So vectors
suffice (`ipot_potentials_np`).

Word-patch alignment: wpa = ⟨T, C⟩ with C = 1 − cos. Gradient: T is held fixed, so dC = T.

Entries of T fall as exp(−t (C − f − g) / β) with the potentials f, g of the best plan. C − f − g can be twice
the range of C, so they fall to exp(−2 t·range(C)/β): exp(−400) for cosines and t/β = 100.

Rungs (M × N pairs, everything in logarithms, since float32 ends near exp(−103)):
    ipot_np, ipot         log T is carried; three M × N arrays
    ipot_potentials_np    only potentials are carried, by the identity above; the same plan
    wpa_np, wpa           the cost, the detached plan, and the gradient through the cosine
    wpa_fused             groups of pairs of similar length, three M × N arrays for each group; backward makes
                          the plan again from the potentials, B × (L + N) numbers that are kept
The fused rung steps with exp(−t C / β) itself, and absorbs the scalings into it before float32 or float64
runs out of exponents: after `safe_steps` steps, a number known from the range of the costs. Where not one
step is safe (in float32 for range(C)/β above 22) it takes logarithms, as the other rungs do.

Sources: Xie, Wang, Wang and Zha 2020 (IPOT), algorithm 1; Chen et al. 2020 (UNITER), section 3.2; Kim, Son
and Kim 2021 (ViLT), section 3.2.
Left out: more than one inner sweep, and marginals other than uniform, which no alignment loss uses.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import without_autocast, working, working_np
from minivlp.core.transport import alignment_grads, cosines, gibbs, ipot_scalings, within_range
from minivlp.sinkhorn import (
    LARGEST,
    check_cost,
    check_iters,
    check_temperature,
    cosine,
    log_weights,
    log_weights_np,
    logsumexp_np,
    unit_grad_np,
    unit_np,
)


def _check_plan(library, cost, beta, iters, row_mask, col_mask) -> None:
    check_cost(library, cost, row_mask, col_mask, iters, beta=beta)


def _check_pairs(library, words, patches, word_mask, patch_mask, beta) -> None:
    """Refuse what is not `words (B, L, D)` and `patches (B, N, D)`, none empty, with masks that fit them."""
    require.shapes(library, words=(words, "B L D"), patches=(patches, "B N D"))
    require.tokens(("words", words, "word_mask", word_mask), ("patches", patches, "patch_mask", patch_mask))
    check_temperature(LARGEST, words.dtype, beta=beta)


def ipot_np(
    cost: np.ndarray,
    beta: float = 0.5,
    iters: int = 50,
    row_mask: np.ndarray | None = None,
    col_mask: np.ndarray | None = None,
) -> np.ndarray:
    """The plan (…, M, N) after `iters` proximal steps on cost (…, M, N), uniform over the real tokens.

    Masks (…, M) and (…, N) are bool, True = real; padded rows and columns of the plan are 0. beta > 0 is in
    units of cost. Row sums are exact. Raises ValueError on bad shapes, dtypes, NaN, infinities, an
    all-False mask row, iters < 1, and beta ≤ 0 or below the rounding of the costs.
    """
    _check_plan(np.ndarray, cost, beta, iters, row_mask, col_mask)
    log_mu = log_weights_np(None, row_mask, cost.shape[-2])[..., None]  # (…, M, 1)
    log_nu = log_weights_np(None, col_mask, cost.shape[-1])[..., None, :]  # (…, 1, N)
    step = -working_np(cost)[0] / beta  # (…, M, N)
    log_T, log_a = log_mu + np.zeros_like(step), np.zeros_like(log_mu)
    for _ in range(iters):
        log_Q = log_T + step
        # Columns first, from the carried row scaling; rows last.
        log_b = log_nu - logsumexp_np(log_Q + log_a, -2)[..., None, :]
        log_a = log_mu - logsumexp_np(log_Q + log_b, -1)[..., None]
        log_T = log_Q + log_a + log_b
    return np.exp(log_T)


def ipot_potentials_np(
    cost: np.ndarray,
    beta: float = 0.5,
    iters: int = 50,
    row_mask: np.ndarray | None = None,
    col_mask: np.ndarray | None = None,
) -> np.ndarray:
    """The plan of `ipot_np`, same arguments, from potentials alone: step t is a Sinkhorn sweep at ε = β/t.

    log A (…, M) and log B (…, N) are the logarithms of the products of all scalings so far. The plan before
    step t, scaled by the carried a_{t−1} = A_{t−1} / A_{t−2}, has rows A_{t−1} · A_{t−1} / A_{t−2}: a linear
    extrapolation of log A. The product of the column scalings cancels in the same way, because a sweep starts
    by solving for it.
    """
    _check_plan(np.ndarray, cost, beta, iters, row_mask, col_mask)
    (cost,) = working_np(cost)
    log_mu = log_weights_np(None, row_mask, cost.shape[-2])  # (…, M)
    log_nu = log_weights_np(None, col_mask, cost.shape[-1])  # (…, N)
    log_A = before = log_mu
    for t in range(1, iters + 1):
        K = -t * cost / beta  # (…, M, N)
        extrapolated = 2 * log_A - before
        log_B = log_nu - logsumexp_np(K + extrapolated[..., None], -2)
        before, log_A = log_A, log_mu - logsumexp_np(K + log_B[..., None, :], -1)
    return np.exp(log_A[..., None] + K + log_B[..., None, :])


@torch.no_grad()
def ipot(
    cost: Tensor,
    beta: float = 0.5,
    iters: int = 50,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
) -> Tensor:
    """The plan (…, M, N), detached; arguments and errors as in `ipot_np`.

    Half precisions are solved in float32, and the plan is returned in the dtype of the cost.
    """
    _check_plan(Tensor, cost, beta, iters, row_mask, col_mask)
    step = working(cost)[0] / -beta  # (…, M, N)
    log_mu = log_weights(None, row_mask, step, -2)[..., None]  # (…, M, 1)
    log_nu = log_weights(None, col_mask, step, -1)[..., None, :]  # (…, 1, N)
    log_T, log_a = log_mu + torch.zeros_like(step), torch.zeros_like(log_mu)
    for _ in range(iters):  # in place: log_T is all the state there is, besides log_a
        log_T += step
        log_b = log_nu - (log_T + log_a).logsumexp(-2, keepdim=True)  # columns, with the row scaling carried
        log_T += log_b
        log_a = log_mu - log_T.logsumexp(-1, keepdim=True)  # rows
        log_T += log_a
    return log_T.exp_().to(cost.dtype)


def wpa_np(
    words: np.ndarray,
    patches: np.ndarray,
    word_mask: np.ndarray | None = None,
    patch_mask: np.ndarray | None = None,
    beta: float = 0.5,
    iters: int = 50,
    grad: np.ndarray | None = None,
):
    """Word-patch alignment ⟨T, C⟩ per pair and its gradients with T held fixed.

    words (B, L, D), patches (B, N, D), masks (B, L) and (B, N) with True = a token that takes part; grad (B,)
    is the upstream gradient (None = ones). beta and iters act through the plan only, so they have no
    gradient. Returns `(value (B,) in [0, 2], (d words, d patches))`. Raises ValueError as `ipot_np` does.
    """
    _check_pairs(np.ndarray, words, patches, word_mask, patch_mask, beta)
    (p, p_length), (q, q_length) = map(unit_np, working_np(words, patches))
    C = 1 - p @ q.swapaxes(-1, -2)  # (B, L, N)
    T = ipot_np(C, beta, iters, word_mask, patch_mask)
    # value_b = Σ_ij T_ij (1 − p_i · q_j) with T a constant, so dp_i = −Σ_j T_ij q_j and dq_j = −Σ_i T_ij p_i,
    # times the upstream gradient of pair b.
    G = T if grad is None else T * grad[:, None, None]
    dwords = unit_grad_np(p, p_length, -G @ q)
    dpatches = unit_grad_np(q, q_length, -G.swapaxes(-1, -2) @ p)
    return (T * C).sum((-2, -1)), (dwords, dpatches)


def wpa(
    words: Tensor,
    patches: Tensor,
    word_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    beta: float = 0.5,
    iters: int = 50,
) -> Tensor:
    """⟨sg(T), C⟩ per pair: words (B, L, D), patches (B, N, D) → (B,); arguments and errors as in `wpa_np`."""
    _check_pairs(Tensor, words, patches, word_mask, patch_mask, beta)
    C = 1 - cosine(words, patches)  # (B, L, N)
    T = ipot(C, beta, iters, word_mask, patch_mask)
    return (T * C).sum((-2, -1)).to(words.dtype)  # elementwise: the trace of C Tᵀ would cost L × L products


def alignment_masks(text_mask: Tensor) -> Tensor:
    """The words that take part in ViLT's alignment: text_mask (B, L), True = real → word mask (B, L).

    Left out are padding, the first real token ([CLS]) and the last ([SEP]), neither of which names anything.
    On the image side drop the class token likewise: `wpa(text, image[:, 1:], word_mask, image_mask[:, 1:])`.
    A caption without words gives an all-False row, which `wpa` refuses. Raises ValueError unless text_mask is
    bool (B, L).
    """
    require.shapes(text_mask=(text_mask, "B L"))
    require.mask("text_mask", text_mask)
    so_far = text_mask.cumsum(1)  # (B, L), 1 at the first real token and the total at the last
    return text_mask & (so_far > 1) & (so_far < so_far[:, -1:])


# The fused rung solves groups of pairs of similar length together, by products of exp(−t C / β) with vectors,
# and absorbs the scalings into the kernel before its dtype runs out of exponents (core/transport.py). It
# keeps potentials only; backward makes the plan again from them, and the gradients of the tokens by hand.


def wpa_fused(
    words: Tensor,
    patches: Tensor,
    word_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    beta: float = 0.5,
    iters: int = 50,
) -> Tensor:
    """`wpa` by products of a kernel with vectors and a gradient by hand; differentiable once.

    In units of L·N numbers a step of the plain rung reads and writes some 20 and takes two logsumexps, and
    this rung reads 4 and writes 1, in the cache. It never makes unit copies of the tokens nor the gradients
    of those copies, which the plain rung moves through memory 12 times. Padding behind the longest caption
    and the largest picture of a group is skipped. Arguments and errors as in `wpa_np`.
    """
    _check_pairs(Tensor, words, patches, word_mask, patch_mask, beta)
    words, patches = within_range(words, patches)
    check_iters(iters)
    masks = (
        z.new_ones(z.shape[:2], dtype=torch.bool) if mask is None else mask.expand(z.shape[:2])
        for z, mask in ((words, word_mask), (patches, patch_mask))
    )
    return stream.dispatch(_Fused, words, patches, *masks, beta, iters, kernel=_kernel, unfit=_unfit)


def _kernel() -> Callable:
    from minivlp.kernels import wpa  # imports Triton, hence only where it is used

    return wpa.wpa


def _unfit(*inputs) -> str:
    from minivlp.kernels import wpa

    return wpa.unfit(*inputs)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, words, patches, word_mask, patch_mask, beta, iters):
        ctx.beta, ctx.iters, ctx.groups = beta, iters, _groups(word_mask, patch_mask)
        value, potentials = words.new_empty(len(words)), []
        for group in ctx.groups:
            g = _gather(group, words, patches, word_mask, patch_mask, beta)
            u, v = ipot_scalings(g.log_kernel, g.padding, g.mu, g.nu, iters)
            T = _plan(g, u, v, iters)
            # cos = top + β · log_kernel, and T sums to one.
            cosine = g.top.flatten() + beta * T.mul_(g.log_kernel).sum((1, 2))
            value[group[0]] = (1 - cosine).to(value.dtype)
            potentials += [u, v]
        ctx.save_for_backward(words, patches, word_mask, patch_mask, *potentials)
        return value

    @staticmethod
    def backward(ctx, upstream):
        stream.refuse_create_graph()
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:2]  # unpacked once: it may be made anew
        inputs, potentials = saved[:4], saved[4:]
        gradients = [z.new_zeros(z.shape) if n else None for z, n in zip(inputs, wanted, strict=False)]
        with without_autocast(upstream):
            for group, u, v in zip(ctx.groups, potentials[::2], potentials[1::2], strict=True):
                g = _gather(group, *inputs, ctx.beta)
                T = _plan(g, u, v, ctx.iters).mul_(upstream[group[0], None, None])
                T_cos = g.log_kernel.mul_(ctx.beta).add_(g.top).mul_(T)  # T · cos
                parts = alignment_grads(T, T_cos, g.x, g.y, g.per_x, g.per_y, wanted)
                for whole, part in zip(gradients, parts, strict=True):
                    if part is not None:
                        whole[:, : part.shape[1]][group[0]] = part.to(whole.dtype)
                # Freed before the next group is made, so that only one group is held.
                del g, T, T_cos, parts, whole, part
        return *gradients, None, None, None, None


# Entries of the plans of a group of pairs: plans, kernels and their logarithms then stay in a core's cache.
GROUP = 2**16


def _groups(word_mask: Tensor, patch_mask: Tensor) -> list[tuple]:
    """Pairs to solve together: (their indices, the longest caption, the largest picture), padding cut off."""
    L, N = ((m * torch.arange(1, m.shape[1] + 1, device=m.device)).amax(1) for m in (word_mask, patch_mask))
    if len(L) == 0:
        return []
    size = max(1, GROUP // int(L.max() * N.max()))
    if size >= len(L):
        return [(slice(None), int(L.max()), int(N.max()))]
    return [(pairs, int(L[pairs].max()), int(N[pairs].max())) for pairs in N.argsort().split(size)]


class _Group(NamedTuple):
    """A group of b pairs before it is solved, padding included."""

    x: Tensor  # (b, L, D) words
    y: Tensor  # (b, N, D) patches
    per_x: Tensor  # (b, L, 1) one over the lengths of the words
    per_y: Tensor  # (b, N, 1) one over the lengths of the patches
    log_kernel: Tensor  # (b, L, N) (cos − top) / β: −C/β but for a constant, which the scalings absorb
    top: Tensor  # (b, 1, 1) the largest cosine
    padding: Tensor  # (b, L, N) True where the word or the patch is padding
    mu: Tensor  # (b, L, 1) what each word gives
    nu: Tensor  # (b, 1, N) what each patch receives


def _gather(group, words, patches, word_mask, patch_mask, beta) -> _Group:
    pairs, L, N = group
    cut = words[:, :L], patches[:, :N], word_mask[:, :L], patch_mask[:, :N]
    x, y, rows, columns = cut if isinstance(pairs, slice) else (z.index_select(0, pairs) for z in cut)
    x, y = working(x, y)
    S, per_x, per_y = cosines(x, y)
    padding = ~(rows[:, :, None] & columns[:, None])
    top = S.masked_fill_(padding, -torch.inf).amax((1, 2), keepdim=True)
    # A padded entry has cost 0 between tokens of weight 0: it gets no mass, and no sum becomes 0/0.
    log_kernel = S.sub_(top).div_(beta).masked_fill_(padding, 0)
    mu, nu = (mask / mask.sum(1, keepdim=True, dtype=S.dtype) for mask in (rows, columns))
    return _Group(x, y, per_x, per_y, log_kernel, top, padding, mu[..., None], nu[:, None])


def _plan(g: _Group, u: Tensor, v: Tensor, iters: int) -> Tensor:
    return gibbs(g.log_kernel, u, v, torch.empty_like(g.log_kernel), iters)  # (b, L, N)


RUNGS = {
    "ipot": {"np": ipot_np, "torch": ipot},
    "wpa": {"np": wpa_np, "torch": wpa, "fused": wpa_fused},
}
