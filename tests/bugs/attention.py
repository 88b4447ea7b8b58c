"""Plausible wrong attentions."""

import math

import numpy as np
import torch
import torch.utils.checkpoint

from minivlp.attention import attention, attention_np
from tests.laws import bug

HARD, SINGLE = "gradients_hold_at_every_score", "float32_is_enough"
MANY, HELD = "many_tiles_give_one_answer", "no_more_than_tiles_is_held"
LOOP, HUGE, SLOPES = "equals_the_slow_loop", "stays_exact_at_huge_scores", "gradients_are_the_slopes"


@bug("attention", LOOP, "The scores are not divided by √d.")
def no_scale(q, k, v, mask=None, causal=False):
    return attention(q * math.sqrt(q.shape[-1]), k, v, mask, causal)


@bug("attention", LOOP, "The scores are divided by d.")
def divided_by_the_width(q, k, v, mask=None, causal=False):
    return attention(q / math.sqrt(q.shape[-1]), k, v, mask, causal)


@bug("attention", LOOP, "Softmax over the queries: a key shares itself out.")
def softmax_over_queries(q, k, v, mask=None, causal=False):
    S = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return S.softmax(-2) @ v


@bug("attention", LOOP, "True taken as padding, as in torch's key_padding_mask.")
def mask_inverted(q, k, v, mask=None, causal=False):
    return attention(q, k, v, None if mask is None else ~mask, causal)


@bug("attention", LOOP, "The mask is applied after the softmax, and the weights no longer sum to one.")
def mask_after_softmax(q, k, v, mask=None, causal=False):
    P = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    past = torch.ones(P.shape[-2:], dtype=torch.bool).tril()
    return (P * (past if causal else 1) * (1 if mask is None else mask)) @ v


@bug("attention", LOOP, "Causal counted from the last key: bottom right, not upper left.")
def causal_from_the_end(q, k, v, mask=None, causal=False):
    if causal:
        Lq, Lk = q.shape[2], k.shape[2]
        past = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq)
        mask = past if mask is None else mask & past
    return attention(q, k, v, mask)


@bug("attention", LOOP, "A query cannot see itself.")
def causal_strict(q, k, v, mask=None, causal=False):
    if causal:
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(-1)
        past[:, 0] = True
        mask = past if mask is None else mask & past
    return attention(q, k, v, mask)


def running_softmax(q, k, v, mask, causal, rescale=True, guard=True):
    """The running softmax over one key after the other, with room for one mistake."""
    S = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    past = torch.ones(S.shape[-2:], dtype=torch.bool).tril()
    S = S.masked_fill(
        ~((past if causal else torch.ones_like(past)) & (True if mask is None else mask)), -math.inf
    )
    top, total, out = torch.full_like(S[..., :1], -math.inf), 0.0, 0 * q
    for j in range(S.shape[-1]):
        highest = torch.maximum(top, S[..., j : j + 1])
        shift = highest.masked_fill(highest == -math.inf, 0) if guard else highest
        shrink, weight = (top - shift).exp(), (S[..., j : j + 1] - shift).exp()
        total = total * shrink + weight
        out = out * (shrink if rescale else 1) + weight * v[:, :, j : j + 1]
        top = highest
    return out / total


@bug(
    "attention", LOOP, "A running softmax that shrinks its sum, but not its values, when the top score rises."
)
def values_not_rescaled(q, k, v, mask=None, causal=False):
    return running_softmax(q, k, v, mask, causal, rescale=False)


@bug("attention", LOOP, "A walk that begins with forbidden keys: the top is −∞, and −∞ − (−∞) is NaN.")
def nothing_seen_yet(q, k, v, mask=None, causal=False):
    return running_softmax(q, k, v, mask, causal, guard=False)


@bug("attention", LOOP, "Keys in two tiles, each with its own softmax, and the mean of the two results.")
def softmax_by_tile(q, k, v, mask=None, causal=False):
    half = (k.shape[2] + 1) // 2
    S = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    past = torch.ones(S.shape[-2:], dtype=torch.bool).tril()
    S = S.masked_fill(
        ~((past if causal else torch.ones_like(past)) & (True if mask is None else mask)), -1e30
    )
    tiles = [S[..., :half].softmax(-1) @ v[:, :, :half]]
    tiles += [S[..., half:].softmax(-1) @ v[:, :, half:]] * (half < k.shape[2])
    return sum(tiles) / len(tiles)


@bug("attention", HUGE, "exp of the scores as they are: it overflows.")
def bare_exp(q, k, v, mask=None, causal=False):
    S = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    past = torch.ones(S.shape[-2:], dtype=torch.bool).tril()
    P = S.exp() * (past if causal else 1) * (1 if mask is None else mask)
    return P / P.sum(-1, keepdim=True) @ v


@bug("attention", HUGE, "Forbidden keys get -10000 added instead of no weight at all.")
def minus_ten_thousand(q, k, v, mask=None, causal=False):
    S = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    past = torch.ones(S.shape[-2:], dtype=torch.bool).tril()
    allowed = (past if causal else torch.ones_like(past)) & (True if mask is None else mask)
    return (S - 1e4 * ~allowed).softmax(-1) @ v


@bug("attention", SLOPES, "Softmax's Jacobian without its second term: dS = P ∘ dP.", rung="np")
def diagonal_jacobian(q, k, v, mask=None, causal=False, grad=None):
    out, (_, _, dv) = attention_np(q, k, v, mask, causal, grad)
    G, scale = np.ones_like(out) if grad is None else grad, 1 / math.sqrt(q.shape[-1])
    S = q @ k.swapaxes(-1, -2) * scale
    allowed = np.broadcast_to(True if mask is None else mask, S.shape)
    S = np.where(allowed & (np.tri(*S.shape[-2:], dtype=bool) if causal else True), S, -np.inf)
    P = np.exp(S - S.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    dS = P * (G @ v.swapaxes(-1, -2))
    return out, (dS @ k * scale, dS.swapaxes(-1, -2) @ q * scale, dv)


@bug("attention", SLOPES, "√d forgotten on the way back to the keys.", rung="np")
def key_gradient_unscaled(q, k, v, mask=None, causal=False, grad=None):
    out, (dq, dk, dv) = attention_np(q, k, v, mask, causal, grad)
    return out, (dq, dk * math.sqrt(q.shape[-1]), dv)


@bug("attention", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(q, k, v, mask=None, causal=False, grad=None):
    return attention_np(q, k, v, mask, causal)


def weights(q, k, mask, causal, change=lambda S: S):
    """P (B, H, Lq, Lk) of scores after a change."""
    S = change(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))
    allowed = np.ones(S.shape[-2:], bool) if not causal else np.tri(*S.shape[-2:], dtype=bool)
    S = np.where(allowed if mask is None else allowed & mask, S, -np.inf)
    P = np.exp(S - S.max(-1, keepdims=True))
    return P / P.sum(-1, keepdims=True)


def with_weights(q, k, v, P, mask, causal, grad):
    """The right value, the gradients of other weights."""
    out, _ = attention_np(q, k, v, mask, causal, grad)
    G = np.ones_like(out) if grad is None else grad
    dP = G @ v.swapaxes(-1, -2)
    dS = P * (dP - (P * dP).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
    return out, (dS @ k, dS.swapaxes(-1, -2) @ q, P.swapaxes(-1, -2) @ G)


@bug("attention", HARD, "Scores are cut off at ± 20 in the backward pass.", rung="np")
def clipped_scores(q, k, v, mask=None, causal=False, grad=None):
    P = weights(q, k, mask, causal, lambda S: S.clip(-20, 20))
    return with_weights(q, k, v, P, mask, causal, grad)


@bug(
    "attention",
    HARD,
    "Weights below 1e-3 are dropped in the backward pass, and the rest not rescaled.",
    rung="np",
)
def small_weights_dropped(q, k, v, mask=None, causal=False, grad=None):
    P = weights(q, k, mask, causal)
    return with_weights(q, k, v, np.where(P < 1e-3, 0, P), mask, causal, grad)


@bug("attention", SINGLE, "Forbidden scores are −1e300, which float32 does not have.")
def fill_of_float64(q, k, v, mask=None, causal=False):
    S = q @ k.mT / math.sqrt(q.shape[-1])
    allowed = torch.ones(S.shape[-2:], dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    S = S.masked_fill(~(allowed if mask is None else allowed & mask), -1e300)
    return S.softmax(-1) @ v


@bug("attention", SINGLE, "Computed in float64 and left there.")
def computed_in_float64(q, k, v, mask=None, causal=False):
    return attention(q.double(), k.double(), v.double(), mask, causal)


@bug(
    "attention",
    MANY,
    "Its own tiles, of 64 keys: what does not fill the last one is never read.",
    rung="fused",
)
def rest_of_its_own_tiles_dropped(q, k, v, mask=None, causal=False):
    full = k.shape[2] // 64 * 64 or k.shape[2]
    mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., :full]
    return attention(q, k[:, :, :full], v[:, :, :full], mask, causal)


@bug("attention", HELD, "The plain function: S and P are made whole, and P is kept.", rung="fused")
def plain(q, k, v, mask=None, causal=False):
    return attention(q, k, v, mask, causal)


@bug(
    "attention",
    HELD,
    "Nothing is kept, but the plain function runs again in the backward pass.",
    rung="fused",
)
def made_twice(q, k, v, mask=None, causal=False):
    return torch.utils.checkpoint.checkpoint(attention, q, k, v, mask, causal, use_reentrant=False)


@bug(
    "attention",
    HELD,
    "One block of queries after another, but autograd keeps the weights of each.",
    rung="fused",
)
def blocks_kept(q, k, v, mask=None, causal=False):
    Lq, Lk = q.shape[2], k.shape[2]
    allowed = torch.ones(Lq, Lk, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    allowed = (allowed if mask is None else allowed & mask).expand(*q.shape[:2], Lq, Lk)
    parts = [attention(a, k, v, m) for a, m in zip(q.split(64, 2), allowed.split(64, 2), strict=True)]
    return torch.cat(parts, 2)
