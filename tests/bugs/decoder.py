"""Plausible wrong norms, turns and ways of writing."""

import numpy as np
import torch

from minivlp.decoder import decode, restrict, rms_norm, rms_norm_np, rotary, rotary_np
from tests.laws import bug

LOOP, LENGTH, SLOPES = "equals_the_slow_loop", "forgets_the_length", "gradients_are_the_slopes"
COMPLEX, BACK = "turns_complex_numbers", "gradient_turns_back"
GREEDY, CHAIN, BEAMS = "greedy_takes_the_likeliest", "told_by_the_chain_rule", "wide_beams_find_the_best"
END, DRAWS = "the_end_ends", "draws_have_the_right_frequencies"


@bug("rms_norm", LOOP, "The mean is subtracted: LayerNorm.")
def centred(x, weight, eps=1e-5):
    return rms_norm(x - x.mean(-1, keepdim=True), weight, eps)


@bug("rms_norm", LOOP, "eps is added to the root, not below it.")
def eps_outside(x, weight, eps=1e-5):
    return weight * x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


@bug("rms_norm", LOOP, "The sum of squares, not their mean.")
def sum_of_squares(x, weight, eps=1e-5):
    return weight * x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


@bug("rms_norm", LOOP, "The weight is 1 + w, as some models store it.")
def one_plus_weight(x, weight, eps=1e-5):
    return rms_norm(x, 1 + weight, eps)


@bug("rms_norm", LENGTH, "A floor of 1e-6 besides eps.")
def second_floor(x, weight, eps=1e-5):
    return weight * x / (x.square().mean(-1, keepdim=True).clamp_min(1e-6) + eps).sqrt()


@bug("rms_norm", "eps_is_small", "LayerNorm's eps, 1e-6.")
def eps_of_layer_norm(x, weight, eps=1e-6):
    return rms_norm(x, weight, eps)


@bug("rms_norm", SLOPES, "The root is taken for a constant.")
def root_detached(x, weight, eps=1e-5):
    return weight * x * (x.detach().square().mean(-1, keepdim=True) + eps).rsqrt()


@bug("rms_norm", SLOPES, "The weight's gradient of the last row alone.", rung="np")
def last_row_of_the_weight(x, weight, eps=1e-5, grad=None):
    out, (dx, dweight) = rms_norm_np(x, weight, eps, grad)
    return out, (dx, dweight / max(x[..., 0].size, 1))


@bug("rms_norm", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(x, weight, eps=1e-5, grad=None):
    return rms_norm_np(x, weight, eps)


@bug("rms_norm", "float32_is_enough", "Computed in float64 and left there.")
def computed_in_float64(x, weight, eps=1e-5):
    return rms_norm(x.double(), weight.double(), eps)


def woven(x):
    """(a₀ … , b₀ …) → (a₀, b₀, a₁, b₁ …)."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


@bug("rotary", COMPLEX, "Neighbours (x₀, x₁) are turned: another order of the width.")
def neighbours(x, positions, base=1e4):
    return woven(rotary(torch.cat([x[..., ::2], x[..., 1::2]], -1), positions, base))


@bug("rotary", COMPLEX, "Turned the other way round.")
def turned_back(x, positions, base=1e4):
    return rotary(x, -positions, base)


@bug("rotary", COMPLEX, "Positions count from 1.")
def from_one(x, positions, base=1e4):
    return rotary(x, positions + 1, base)


@bug("rotary", COMPLEX, "Exponents i/d, not 2i/d.")
def half_the_exponent(x, positions, base=1e4):
    return rotary(x, positions, base**0.5)


@bug("rotary", COMPLEX, "Positions are those of the heads.")
def along_heads(x, positions, base=1e4):
    flat = positions if positions.ndim == 1 else positions[0]
    return rotary(x, flat, base)


@bug("rotary", "base_is_ten_thousand", "The base of another model, unless it is given.")
def another_base(x, positions, base=5e5):
    return rotary(x, positions, base)


@bug("rotary", BACK, "The gradient is turned forth once more.", rung="np")
def turned_forth(x, positions, base=1e4, grad=None):
    out, _ = rotary_np(x, positions, base)
    return out, (rotary_np(np.ones_like(x) if grad is None else grad, positions, base)[0],)


@bug("rotary", "float32_is_enough_for_turns", "Angles are made in the precision of x.")
def angles_in_float32(x, positions, base=1e4):
    half = x.shape[-1] // 2
    rates = base ** -(torch.arange(half).to(x) / half)
    angle = positions[..., None, :, None].to(x) * rates
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@bug("decode", GREEDY, "What is not allowed keeps its score.", rung="plain")
def allow_only_nothing(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    return decode(model, prefix, torch.ones_like(allowed), rng, temperature, beams, end)


class Forgetful:
    """A writer that is not given its cache."""

    def __init__(self, model):
        self.model = model

    def next_scores(self, ids, cache):
        return self.model.next_scores(ids, None)


@bug("decode", GREEDY, "The cache is dropped: each token knows the last one alone.", rung="plain")
def cache_dropped(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    return decode(Forgetful(model), prefix, allowed, rng, temperature, beams, end)


@bug("decode", GREEDY, "The last place is not written.", rung="plain")
def one_too_few(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    return decode(model, prefix, allowed[:-1] if len(allowed) > 1 else allowed, rng, temperature, beams, end)


@bug("decode", CHAIN, "The log-probability at the temperature of the draw.", rung="plain")
def told_at_temperature(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    ids, total = decode(model, prefix, allowed, rng, temperature, beams, end)
    return ids, total / temperature


@bug("decode", CHAIN, "The mean over tokens, not their sum.", rung="plain")
def mean_for_sum(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    ids, total = decode(model, prefix, allowed, rng, temperature, beams, end)
    return ids, total / len(allowed)


@bug("decode", BEAMS, "Beams are asked for, and one is kept.", rung="plain")
def one_beam(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    return decode(model, prefix, allowed, rng, temperature, 1, end)


class Stuck:
    """A writer whose caches stay in their rows when beams change places."""

    def __init__(self, model):
        self.model, self.cache = model, None

    def next_scores(self, ids, cache):
        scores, self.cache = self.model.next_scores(ids, None if cache is None else self.cache)
        return scores, ()


@bug("decode", BEAMS, "The caches do not follow their beams.", rung="plain")
def caches_stay(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    return decode(Stuck(model), prefix, allowed, rng, temperature, beams, end)


@bug("decode", END, "The end is a token like others.", rung="plain")
def end_ignored(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    return decode(model, prefix, allowed, rng, temperature, beams)


@bug("decode", DRAWS, "The temperature multiplies.", rung="plain")
def temperature_upside_down(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    return decode(model, prefix, allowed, rng, 1 / temperature, beams, end)


@bug("decode", DRAWS, "One random number for all rows.", rung="plain")
def one_number_for_all(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    if rng is None:
        return decode(model, prefix, allowed, rng, temperature, beams, end)
    rows = [decode(model, row[None], allowed, np.random.default_rng(3), temperature) for row in prefix[:1]]
    return rows[0][0].expand(len(prefix), -1), rows[0][1].expand(len(prefix))


@bug("decode", "reads_only_what_is_new", "Everything is read again for each token.", rung="plain")
def without_cache(model, prefix, allowed, rng=None, temperature=1.0, beams=1, end=None):
    if rng is not None or beams > 1 or end is not None:
        return decode(model, prefix, allowed, rng, temperature, beams, end)
    ids, total = prefix, torch.zeros(len(prefix), dtype=torch.float64)
    for may in allowed:
        log_p = restrict(model.next_scores(ids, None)[0].double(), may)
        best = log_p.argmax(1, keepdim=True)
        ids, total = torch.cat([ids, best], 1), total + log_p.gather(1, best)[:, 0]
    return ids[:, prefix.shape[1] :], total


ZERO, SHARE, ANYWHERE = "outside_is_exactly_zero", "the_allowed_share_everything", "scores_may_lie_anywhere"


@bug("restrict", ZERO, "The mask is made, and a `where` puts the other scores back.", rung="plain")
def scores_put_back(scores, allowed):
    kept = torch.where(allowed, scores, -torch.inf)
    return torch.where(kept != -torch.inf, kept, scores).log_softmax(-1)


@bug("restrict", ZERO, "A penalty of 10,000 is large, and not large enough.", rung="plain")
def penalty(scores, allowed):
    return (scores - 1e4 * ~allowed).log_softmax(-1)


@bug("restrict", ZERO, "A probability of 1e-12 is added, so that the logarithm is finite.", rung="plain")
def floored(scores, allowed):
    return (restrict(scores, allowed).exp() + 1e-12).log()


@bug(
    "restrict",
    SHARE,
    "Probabilities of the others are struck out, and nobody gets their share.",
    rung="plain",
)
def not_shared_out(scores, allowed):
    return scores.log_softmax(-1).masked_fill(~allowed, -torch.inf)


@bug("restrict", SHARE, "The scores themselves: no logarithm of a probability.", rung="plain")
def scores_alone(scores, allowed):
    return scores.masked_fill(~allowed, -torch.inf)


@bug("restrict", SHARE, "The allowed are alike: which of them is likelier is forgotten.", rung="plain")
def all_alike(scores, allowed):
    return restrict(0 * scores, allowed)


@bug("restrict", ANYWHERE, "exp of bare scores: large ones overflow, small ones vanish.", rung="plain")
def without_a_shift(scores, allowed):
    weights = scores.exp() * allowed
    near = (scores[..., allowed].abs() < 100).all()
    return (weights / weights.sum(-1, keepdim=True)).log() if not near else restrict(scores, allowed)
