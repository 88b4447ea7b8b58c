"""Plausible wrong attentions."""

import math

import numpy as np
import torch

from minivlp.attention import attention, attention_np
from tests.laws import bug

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
