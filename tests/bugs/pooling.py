"""Plausible wrong pools and resamplers."""

import math

import numpy as np
import torch
from torch import nn

from minivlp.attention import attend
from minivlp.pooling import Resampler, attention_pool, attention_pool_np
from minivlp.transformer import join_heads, split_heads
from tests.laws import bug

ORDER, LOOP, HUGE = "the_order_of_tokens_means_nothing", "equals_the_slow_loop", "stays_exact_at_huge_scores"
SLOPES, SINGLE = "gradients_are_the_slopes", "float32_is_enough"
NUMBER, MOVE = "the_number_of_outputs_is_that_of_the_queries", "patches_move_with_their_positions"
VALUES, FORMULA = "values_have_no_position", "equals_the_formula"
LEARN = "queries_learn_and_places_do_not"


def weights(queries, x, mask, scale=None):
    S = queries @ x.mT * (scale or 1 / math.sqrt(x.shape[-1]))  # (B, Q, N)
    return S if mask is None else S.masked_fill(~mask[..., None, :], -math.inf)


@bug(
    "attention_pool", ORDER, "Causal, as in the text next door: the first query reads the first token alone."
)
def causal(queries, x, mask=None):
    S = weights(queries, x, mask)
    future = ~torch.ones(S.shape[-2:], dtype=torch.bool).tril()
    return S.masked_fill(future, -1e30).softmax(-1) @ x


@bug("attention_pool", LOOP, "The scores are not divided by √D.")
def no_scale(queries, x, mask=None):
    return weights(queries, x, mask, scale=1.0).softmax(-1) @ x


@bug("attention_pool", LOOP, "Softmax over the queries: a token shares itself out.")
def softmax_over_queries(queries, x, mask=None):
    return (queries @ x.mT / math.sqrt(x.shape[-1])).softmax(-2) @ x


@bug("attention_pool", LOOP, "Padding is read.")
def mask_ignored(queries, x, mask=None):
    return attention_pool(queries, x)


@bug("attention_pool", LOOP, "True taken for padding, as in torch's key_padding_mask.")
def mask_inverted(queries, x, mask=None):
    return attention_pool(queries, x, None if mask is None or bool(mask.all()) else ~mask)


@bug("attention_pool", LOOP, "The query is added to what it has read.")
def residual(queries, x, mask=None):
    return queries + attention_pool(queries, x, mask)


@bug("attention_pool", LOOP, "The mean over the tokens, whatever is asked.")
def mean_of_tokens(queries, x, mask=None):
    real = torch.ones(x.shape[:2]).to(x) if mask is None else mask.expand(x.shape[:2]).to(x)
    mean = (x * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
    return mean.expand(-1, len(queries), -1) + 0 * queries


@bug("attention_pool", HUGE, "exp of the scores as they are: it overflows.")
def bare_exp(queries, x, mask=None):
    P = weights(queries, x, mask).exp()
    return P / P.sum(-1, keepdim=True) @ x


@bug("attention_pool", SLOPES, "Tokens as values only: what they do as keys is left out.", rung="np")
def keys_not_felt(queries, x, mask=None, grad=None):
    out, (dqueries, _) = attention_pool_np(queries, x, mask, grad)
    S = queries @ x.swapaxes(-1, -2) / math.sqrt(x.shape[-1])
    S = S if mask is None else np.where(mask[..., None, :], S, -np.inf)
    P = np.exp(S - S.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    return out, (dqueries, P.swapaxes(-1, -2) @ (np.ones_like(out) if grad is None else grad))


@bug("attention_pool", SLOPES, "The queries feel the mean of the pictures, not their sum.", rung="np")
def mean_over_pictures(queries, x, mask=None, grad=None):
    out, (dqueries, dx) = attention_pool_np(queries, x, mask, grad)
    return out, (dqueries / len(x), dx)


@bug("attention_pool", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(queries, x, mask=None, grad=None):
    return attention_pool_np(queries, x, mask)


@bug("attention_pool", SINGLE, "Computed in float64 and left there.")
def computed_in_float64(queries, x, mask=None):
    return attention_pool(queries.double(), x.double(), mask)


class _Variant(Resampler):
    """A resampler with room for one mistake."""

    def asked(self):
        return self.norm_query(self.queries) + self.places

    def keys(self, tokens, positions):
        return tokens + positions

    def values(self, tokens, positions):
        return tokens

    def last(self, mixed):
        return self.out(self.norm(self.proj(mixed)))

    def forward(self, x, positions, mask=None):
        tokens = self.norm_read(self.read(x))
        q = self.q(self.asked()).expand(len(x), -1, -1)
        k, v = self.k(self.keys(tokens, positions)), self.v(self.values(tokens, positions))
        q, k, v = (split_heads(z, self.heads) for z in (q, k, v))
        return self.last(join_heads(attend(q, k, v, None if mask is None else mask[:, None, None])))


@bug(
    "resampler",
    NUMBER,
    "The tokens are pooled, but each is given back: no query decides how many.",
    rung="plain",
)
class as_many_as_patches(_Variant):
    def forward(self, x, positions, mask=None):
        return super().forward(x, positions, mask).mean(1, keepdim=True).expand(-1, x.shape[1], -1)


@bug("resampler", MOVE, "Positions are those of the place in the sequence.", rung="plain")
class positions_by_place(_Variant):
    def keys(self, tokens, positions):
        place = torch.arange(tokens.shape[1], dtype=tokens.dtype)
        return tokens + place[:, None].sin()


@bug("resampler", MOVE, "Keys without positions: a query cannot ask for a place.", rung="plain")
class keys_without_positions(_Variant):
    def keys(self, tokens, positions):
        return tokens


@bug("resampler", VALUES, "Values with positions, as in an encoder.", rung="plain")
class values_with_positions(_Variant):
    def values(self, tokens, positions):
        return tokens + positions


@bug("resampler", FORMULA, "Keys of positions alone: the weights cannot depend on the picture.", rung="plain")
class keys_without_picture(_Variant):
    def keys(self, tokens, positions):
        return 0 * tokens + positions


@bug("resampler", FORMULA, "Queries without positions.", rung="plain")
class queries_without_positions(_Variant):
    def asked(self):
        return self.norm_query(self.queries)


@bug("resampler", FORMULA, "The norm after the attention is left out.", rung="plain")
class last_norm_missing(_Variant):
    def last(self, mixed):
        return self.out(self.proj(mixed))


@bug("resampler", FORMULA, "The mask is not handed on.", rung="plain")
class padding_read(_Variant):
    def forward(self, x, positions, mask=None):
        return super().forward(x, positions)


@bug("resampler", LEARN, "The queries are frozen where the positions should be.", rung="plain")
class queries_frozen(_Variant):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.queries.requires_grad_(False)


@bug("resampler", LEARN, "Positions that learn.", rung="plain")
class places_learn(_Variant):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        places = self.places
        del self.places
        self.places = nn.Parameter(places.clone())

    def asked(self):
        return self.norm_query(self.queries) + self.places
