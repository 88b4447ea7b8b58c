"""Attention: every query takes a mean of the values, weighted by a softmax of its match with their keys.

For one head, with queries Q (Lq, d), keys K (Lk, d), values V (Lk, d):

    S = Q Kᵀ / √d,        P = row softmax of S over the allowed keys,        O = P V.

Gradient, with G = dL/dO: dV = Pᵀ G, and through the softmax Jacobian dS = P ∘ (G Vᵀ − rowsum(G ∘ O)), then
dQ = dS K / √d and dK = dSᵀ Q / √d. In ViLT words and patches stand in one sequence, so one call mixes both.

Masks are bool, True = the query may look at the key. `causal` lets query i see keys 0…i, counted from the
first key (the upper left corner) also when Lq ≠ Lk, as in torch's scaled_dot_product_attention, so that
every query has a key. To continue a sequence from cached keys, where the last query sees every key, pass that
mask instead.

Rungs:
    attention_np      S and P in full, (B, H, Lq, Lk) each; gradients by hand
    attention         the same in PyTorch; autograd keeps P and, under a mask, the mask
    attention_fused   a walk over tiles of S with a running softmax, and another in the backward pass: S and P
                      are never whole; kept are the arguments, O and a logsumexp a query, L × d numbers a head

The blocks of the models call `attend`, which is `attention` without a look at its arguments, because a model
checks its inputs once for all of its blocks.

Sources: Vaswani et al. 2017 (Attention is all you need), eq. 1. The row sum G ∘ O in place of dP ∘ P is from
Dao et al. 2022 (FlashAttention), appendix B.2.
Left out: dropout on P (0 in ViLT's blocks), additive biases, heads that share keys: no model here has them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import at_least_float32, without_autocast, working, working_np


def _check_shapes(library, q, k, v, mask) -> tuple[int, ...]:
    """Refuse bad arrays and masks that do not fit them; return (B, H, Lq, Lk)."""
    sizes = require.shapes(library, q=(q, "B H Lq d"), k=(k, "B H Lk d"), v=(v, "B H Lk d"))
    require.floats(q=q, k=k, v=v)
    if not sizes["Lk"] or not sizes["d"]:
        require.fail("k", "must hold at least one key of width ≥ 1", tuple(k.shape))
    full = tuple(sizes[letter] for letter in ("B", "H", "Lq", "Lk"))
    if mask is not None:
        require.of_library(library, "mask", mask)
        require.mask("mask", mask)
        trailing = full[len(full) - mask.ndim :]
        if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(mask.shape, trailing, strict=True)):
            require.fail("mask", f"must broadcast to (B, H, Lq, Lk) = {full}", tuple(mask.shape))
    return full


def _allowed(q, k, mask, causal: bool):
    """Which (query, key) pairs are allowed, or None when all are."""
    if not causal:
        return mask
    square = (q.shape[2], k.shape[2])
    if isinstance(q, Tensor):
        past = torch.ones(square, dtype=torch.bool, device=q.device).tril()  # True where key ≤ query
    else:
        past = np.tri(*square, dtype=bool)
    return past if mask is None else mask & past


def _check(library, q, k, v, mask, causal: bool):
    """Refuse bad input; return which (query, key) pairs are allowed, or None when all are."""
    _check_shapes(library, q, k, v, mask)
    mask = _allowed(q, k, mask, causal)
    if mask is not None:
        require.mask("mask", mask, whole_rows=True)
    return mask


def attention_np(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask=None, causal=False, grad=None):
    """Attention and its gradients by hand.

    q (B, H, Lq, d), k and v (B, H, Lk, d), mask bool broadcasting to (B, H, Lq, Lk), grad (B, H, Lq, d) the
    upstream gradient (None = ones). Returns `(out (B, H, Lq, d), (dq, dk, dv))`. Raises ValueError on bad
    shapes, mixed dtypes, NaN, infinities, when a query may see no key and when scores overflow.
    """
    allowed, dtype = _check(np.ndarray, q, k, v, mask, causal), q.dtype
    q, k, v = working_np(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1])
    S = q @ k.swapaxes(-1, -2) * scale  # (B, H, Lq, Lk)
    if allowed is not None:
        S = np.where(allowed, S, -np.inf)
    P = np.exp(S - S.max(-1, keepdims=True))  # the largest exponent is 0: nothing overflows
    P /= P.sum(-1, keepdims=True)
    out = P @ v  # (B, H, Lq, d)
    require.held(out, "result", "q", dtype)
    G = np.ones_like(out) if grad is None else grad
    # O_i = Σ_j P_ij V_j, so V_j collects P_ij G_i over the queries.
    dv = P.swapaxes(-1, -2) @ G
    # P_ij feeds O_i through V_j: dP_ij = G_i · V_j. The softmax Jacobian is ∂P_ij/∂S_il = P_ij (δ_jl − P_il),
    # so dS_ij = P_ij (dP_ij − Σ_l P_il dP_il), and Σ_l P_il (G_i · V_l) = G_i · O_i. A forbidden key has P =
    # 0, so dS = 0.
    dS = P * (G @ v.swapaxes(-1, -2) - (G * out).sum(-1, keepdims=True))
    # S_ij = scale · Q_i · K_j: each factor's gradient is dS times the other, summed over the index it does
    # not have.
    dq = dS @ k * scale
    dk = dS.swapaxes(-1, -2) @ q * scale
    return out, (dq, dk, dv)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention: q (B, H, Lq, d), k and v (B, H, Lk, d) → (B, H, Lq, d).

    mask is bool, True = may look, and broadcasts to (B, H, Lq, Lk): a key padding mask (B, Lk) comes as
    `mask[:, None, None]`. Errors as in `attention_np`. Half precisions are added up in float32, also under
    autocast.
    """
    _check(Tensor, q, k, v, mask, causal)
    with at_least_float32(q, k, v) as (x, y, z):
        out = attend(x, y, z, mask, causal).to(q.dtype)
    require.held(out, "result", "q", q.dtype)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """`attention`, unchecked: what the blocks of the models call."""
    allowed = _allowed(q, k, mask, causal)
    # Scaling q costs Lq · d products a head, scaling the scores Lq · Lk.
    S = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)  # (B, H, Lq, Lk)
    if allowed is not None:
        S.masked_fill_(~allowed, -math.inf)
    return S.softmax(-1) @ v  # (B, H, Lq, d)


def attention_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """`attention` tile by tile; arguments and errors as there, differentiable once.

    In units of B·H·Lq·Lk numbers the plain rung moves S, its mask, its softmax and the gradients of both
    through memory, some 12; this one keeps tiles of them in the cache, and makes S twice for it.
    """
    full = _check_shapes(Tensor, q, k, v, mask)
    out = stream.differentiable(_Fused, q, k, v, None if mask is None else mask.expand(full), causal)
    require.held(out, "result", "q", q.dtype)
    return out


def _forbid(S: Tensor, rows, columns, mask: Tensor | None, causal: bool) -> Tensor:
    """The tile S (b, m, n) of heads rows[0], with −∞ where the mask (B, H, Lq, Lk) or the future forbids."""
    if mask is not None:
        heads = torch.arange(rows[0].start, rows[0].stop, device=S.device)
        tile = mask[:, :, rows[1], columns[1]]  # (B, H, m, n)
        S.masked_fill_(~tile[heads // mask.shape[1], heads % mask.shape[1]], -math.inf)
    if causal:
        query, key = (torch.arange(z[1].start, z[1].stop, device=S.device) for z in (rows, columns))
        S.masked_fill_(key > query[:, None], -math.inf)
    return S


def attend_tile(S, spare, rows, columns, v, mask, causal, top, total, out) -> None:
    """The running softmax: top (B·H, Lq) is the largest score so far, total Σ exp(S − top), out Σ exp · v."""
    _forbid(S, rows, columns, mask, causal)
    highest = torch.maximum(top[rows], S.amax(-1))
    # What was summed under a lower top shrinks. Without any key so far all is 0, not −∞ − (−∞).
    shift = highest.masked_fill(highest == -math.inf, 0)
    shrink = (top[rows] - shift).exp_()
    P = S.sub_(shift[..., None]).exp_()
    total[rows] = total[rows] * shrink + P.sum(-1)
    out[rows] = (out[rows] * shrink[..., None]).baddbmm_(P, v[columns])
    top[rows] = highest


def attend_back_tile(S, spare, rows, columns, v, mask, causal, lse, G, inner, dv) -> None:
    """S becomes dS = P ∘ (G Vᵀ − inner), inner = rowsum(G ∘ O), and dv += Pᵀ G."""
    P = _forbid(S, rows, columns, mask, causal).sub_(lse[rows][..., None]).exp_()
    dv[columns] += P.mT @ G[rows]
    torch.bmm(G[rows], v[columns].mT, out=spare)
    P.mul_(spare.sub_(inner[rows][..., None]))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, causal):
        x, y, z = (t.flatten(0, 1) for t in working(q, k, v))  # (B·H, L, d)
        top, total, out = x.new_full(x.shape[:2], -math.inf), x.new_zeros(x.shape[:2]), torch.zeros_like(x)
        ctx.scale, ctx.causal = 1 / math.sqrt(q.shape[-1]), causal
        stream.fold(attend_tile, x, y, z, mask, causal, top, total, out, scale=ctx.scale)
        if bool((top == -math.inf).any()):
            require.fail("mask", "must have a True in every row", "an all-False row")
        out = out.div_(total[..., None]).view(q.shape).to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, out, top.add_(total.log_()))
        return out

    @staticmethod
    def backward(ctx, upstream):
        stream.refuse_create_graph()
        *arrays, mask, out, lse = ctx.saved_tensors
        x, y, z, O, G = (t.flatten(0, 1) for t in working(*arrays, out, upstream))
        inner, dv = (G * O).sum(-1), torch.zeros_like(z)
        with without_autocast(x):
            dq, dk, _ = stream.accumulate(
                attend_back_tile,
                x,
                y,
                z,
                mask,
                ctx.causal,
                lse,
                G,
                inner,
                dv,
                scale=ctx.scale,
                wanted=(True, True, False),
            )
        found = (g.view(a.shape).to(a.dtype) for g, a in zip((dq, dk, dv), arrays, strict=True))
        return *(g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=False)), None, None


RUNGS = {"attention": {"np": attention_np, "torch": attention, "fused": attention_fused}}
CORES = {"attention": attend}  # what the models call
