"""Laws of RMSNorm, of rotary positions and of writing; the decoder block."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import decoder
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes, widths

EPS = 0.1  # large enough to see where it stands


@st.composite
def rows(draw):
    """x (…, D) with one, two or three axes, and weight (D,)."""
    D = draw(widths(5))
    return draw(arrays(*draw(st.sampled_from([(), (3,), (2, 3)])), D)), draw(arrays(D))


@law("rms_norm", hint="Per row: divide by √(mean of squares + eps), times weight; no mean is subtracted.")
@given(case=rows())
def equals_the_slow_loop(f, case):
    x, weight = case
    out = f(x, weight, eps=EPS)
    for place in np.ndindex(x.shape[:-1]):
        row, D = x[place], x.shape[-1]
        root = (sum(value**2 for value in row) / D + EPS) ** 0.5
        close(out[place], np.array([row[i] / root * weight[i] for i in range(D)]))


@law("rms_norm", hint="Without eps in the way the length of a row does not count.")
@given(case=rows(), scale=st.sampled_from([1e-3, 7.0, 1e6]))
def forgets_the_length(f, case, scale):
    x, weight = case
    close(f(scale * x, weight, eps=1e-30), f(x, weight, eps=1e-30))


@law("rms_norm", hint="Unless it is given, eps is 1e-5.")
@given(case=rows())
def eps_is_small(f, case):
    x, weight = case
    close(f(1e-3 * x, weight), f(1e-3 * x, weight, eps=1e-5))
    close(f(0 * x, weight), 0 * x)


@law("rms_norm", hint="The root depends on all entries of a row: dx has two parts; weight is shared by rows.")
@given(case=rows(), seed=st.integers(0, 99), zeros=st.booleans())
def gradients_are_the_slopes(f, case, seed, zeros):
    case = (case[0] * (not zeros), case[1])  # at zeros dx is largest
    upstream = np.random.default_rng(seed).standard_normal(case[0].shape)
    for which, gradient in enumerate(f.grads(*case, grad=upstream, eps=EPS)):
        slope = central_differences(lambda *a: f(*a, eps=EPS), case, which, grad=upstream)
        close(gradient, slope, rtol=1e-6, atol=1e-7)


@law("rms_norm", hint="float32 comes in, float32 goes out.")
@given(case=rows())
def float32_is_enough(f, case):
    same_in_float32(f, case, {"eps": EPS})


# Rotary positions


@st.composite
def turned(draw):
    """x (B, H, L, d), positions (L,) or (B, L), some of them negative."""
    B, H, L, d = draw(sizes(2)), draw(sizes(2)), draw(sizes(4)), 2 * draw(sizes(3))
    shape = draw(st.sampled_from([(L,), (B, L)]))
    positions = np.random.default_rng(draw(st.integers(0, 99))).integers(-3, 40, shape)
    return draw(arrays(B, H, L, d)), positions


@law("rotary", hint="(x_i, x_{i+d/2}) as a complex number, times exp(i · position · base^(−2i/d)).")
@given(case=turned(), base=st.sampled_from([10_000.0, 7.0]))
def turns_complex_numbers(f, case, base):
    x, positions = case
    out, half = f(x, positions, base=base), x.shape[-1] // 2
    places = np.broadcast_to(positions, (len(x), x.shape[2]))
    for b, h, t in np.ndindex(x.shape[:3]):
        for i in range(half):
            z = complex(x[b, h, t, i], x[b, h, t, i + half])
            z *= np.exp(1j * places[b, t] * base ** (-i / half))
            close(out[b, h, t, [i, i + half]], np.array([z.real, z.imag]))


@law("rotary", hint="Unless it is given, the base is 10,000.")
@given(case=turned())
def base_is_ten_thousand(f, case):
    close(f(*case), f(*case, base=10_000.0))


@law("rotary", hint="The gradient of a turn is the turn back.")
@given(case=turned(), seed=st.integers(0, 99), zeros=st.booleans())
def gradient_turns_back(f, case, seed, zeros):
    x, positions = case[0] * (not zeros), case[1]  # it is the same at all x
    upstream = np.random.default_rng(seed).standard_normal(x.shape)
    (dx,) = f.grads(x, positions, grad=upstream)
    close(dx, f(upstream, -positions))


@law("rotary", hint="float32 comes in, float32 goes out; the angles of far places are made in float64.")
@given(case=turned(), far=st.sampled_from([0, 10**7]))
def float32_is_enough_for_turns(f, case, far):
    x, positions = case
    same_in_float32(f, (x, positions + far), {"base": 2.0})


def test_scores_depend_on_differences_of_positions():
    """And lengths are kept, so that a score is that of the same pair anywhere."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    here = torch.tensor([0, 3, 4, 9, 2])
    scores = [decoder.rotary(q, here + s) @ decoder.rotary(k, here + s).mT for s in (0, 1, 1000)]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decoder.rotary(q, here).norm(dim=-1), q.norm(dim=-1))


# Writing


class History:
    """A writer whose scores depend on all that was written, by a table; its cache is what it has read."""

    def __init__(self, V: int, seed: int = 0, spread: float = 2.0):
        self.V, self.seed, self.spread, self.sizes = V, seed, spread, []

    def scores(self, ids) -> np.ndarray:
        """Of the token after these ids, (V,)."""
        rng = np.random.default_rng((self.seed, *(int(i) + 1 for i in ids)))
        return self.spread * rng.standard_normal(self.V)

    def next_scores(self, ids, cache):
        self.sizes.append(ids.shape[1])
        read = ids if cache is None else torch.cat([cache[0], ids], 1)
        return torch.tensor(np.array([self.scores(row) for row in read])), (read,)

    def log_probability(self, prefix, written, allowed, end=None) -> float:
        """Of what is written after a prefix, by the chain rule; −∞ for what is not allowed."""
        total, read = 0.0, list(prefix)
        for token, may in zip(written, allowed, strict=True):
            if end is not None and len(read) > len(prefix) and read[-1] == end:
                if token != end:
                    return -np.inf
                continue
            s = np.where(may, self.scores(read), -np.inf)
            total += s[token] - np.logaddexp.reduce(s)
            read.append(int(token))
        return total


@st.composite
def papers(draw):
    """A writer, prefix (B, P), allowed (T, V) with a True in every row."""
    B, P, T, V = draw(sizes(3)), draw(sizes(3)), draw(sizes(4)), draw(sizes(3, 2))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    allowed = rng.random((T, V)) < 0.7
    allowed[:, rng.integers(V)] = True
    prefix = torch.from_numpy(rng.integers(0, V, (B, P)))
    return (
        History(V, draw(st.integers(0, 99)), draw(st.sampled_from([2.0, 0.3]))),
        prefix,
        torch.from_numpy(allowed),
    )


def every(allowed, end=None):
    """All sequences of allowed tokens."""
    choices = [[t for t in range(len(row)) if row[t] or t == end] for row in allowed.tolist()]
    return list(product(*choices))


@law("decode", hint="Without rng each token is the likeliest of the allowed ones, given all before it.")
@given(case=papers())
def greedy_takes_the_likeliest(f, case):
    writer, prefix, allowed = case
    ids, _ = f(writer, prefix, allowed)
    assert ids.shape == (len(prefix), len(allowed))
    for start, row in zip(prefix.tolist(), ids.tolist(), strict=True):
        for place, may in enumerate(allowed.numpy()):
            s = np.where(may, writer.scores([*start, *row[:place]]), -np.inf)
            assert row[place] == s.argmax(), "not the likeliest allowed token"


@law("decode", hint="The log-probability is that of the whole: the sum over its tokens, among the allowed.")
@given(case=papers(), drawn=st.booleans(), seed=st.integers(0, 99))
def told_by_the_chain_rule(f, case, drawn, seed):
    writer, prefix, allowed = case
    ids, total = f(writer, prefix, allowed, np.random.default_rng(seed) if drawn else None, temperature=2.0)
    for start, row, told in zip(prefix.tolist(), ids.tolist(), total, strict=True):
        assert all(may[token] for token, may in zip(row, allowed, strict=True)), "a token is not allowed"
        close(float(told), writer.log_probability(start, row, allowed.numpy()))


@law("decode", hint="As many beams as there are sequences find the best; each comes from its own history.")
@given(case=papers())
def wide_beams_find_the_best(f, case):
    writer, prefix, allowed = case
    found = every(allowed)
    ids, total = f(writer, prefix, allowed, beams=len(found))
    for start, row, told in zip(prefix.tolist(), ids.tolist(), total, strict=True):
        values = [writer.log_probability(start, one, allowed.numpy()) for one in found]
        assert tuple(row) == found[int(np.argmax(values))], "not the likeliest of all sequences"
        close(float(told), max(values))


@law("decode", hint="After the end a row repeats it, at no cost.")
@given(case=papers(), beams=st.sampled_from([1, 81]), seed=st.integers(0, 99))
def the_end_ends(f, case, beams, seed):
    writer, prefix, allowed = case
    end, T = int(allowed[0].nonzero()[0]), len(allowed)
    rng = np.random.default_rng(seed) if beams == 1 else None
    ids, total = f(writer, prefix, allowed, rng, beams=beams, end=end)
    for start, row, told in zip(prefix.tolist(), ids.tolist(), total, strict=True):
        stop = row.index(end) if end in row else T
        assert row[stop:] == [end] * (T - stop), "a row goes on after its end"
        close(float(told), writer.log_probability(start, row, allowed.numpy(), end))
        if beams > 1:
            best = max(writer.log_probability(start, o, allowed.numpy(), end) for o in every(allowed, end))
            close(float(told), best)


@law("decode", hint="Draw from the probabilities to the power 1 / temperature, each row by its own number.")
@given(seed=st.integers(0, 5), temperature=st.sampled_from([1.0, 2.0]))
def draws_have_the_right_frequencies(f, seed, temperature):
    writer, n = History(3, seed, spread=1.5), 4000
    allowed = torch.tensor([[True, True, False], [True, True, True]])
    ids, _ = f(writer, torch.zeros(n, 1, dtype=torch.long), allowed, np.random.default_rng(seed), temperature)
    for one in every(allowed):
        p, read = 1.0, [0]
        for token, may in zip(one, allowed.numpy(), strict=True):
            weights = np.where(may, np.exp(writer.scores(read) / temperature), 0)
            p, read = p * weights[token] / weights.sum(), [*read, token]
        share = float((ids == torch.tensor(one)).all(1).double().mean())
        assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-3, f"{one} has {share:.3f}, not {p:.3f}"


@law("decode", hint="The prefix is read once; after that each token alone, with the cache.")
@given(case=papers(), beams=st.sampled_from([1, 3]))
def reads_only_what_is_new(f, case, beams):
    writer, prefix, allowed = case
    before = prefix.clone()
    f(writer, prefix, allowed, beams=beams)
    assert writer.sizes == [prefix.shape[1], *[1] * (len(allowed) - 1)]
    assert torch.equal(prefix, before)


# What may stand at a place


@st.composite
def ballots(draw):
    """Scores (…, V) of up to three axes, allowed (V,) with a True; the forbidden are the highest or any."""
    V = draw(sizes(6, 2))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    scores = rng.standard_normal((*draw(st.sampled_from([(), (3,), (2, 3)])), V))
    allowed = rng.random(V) < 0.6
    allowed[rng.integers(V)] = True
    scores[..., ~allowed] += draw(st.sampled_from([0.0, 1e4]))
    return torch.from_numpy(scores * draw(st.sampled_from([1.0, 3.0]))), torch.from_numpy(allowed)


@law("restrict", hint="Not a small probability for the others but none: exactly 0, the logarithm −∞.")
@given(case=ballots())
def outside_is_exactly_zero(f, case):
    scores, allowed = case
    outside = np.asarray(f(scores, allowed))[..., ~allowed.numpy()]
    assert (outside == -np.inf).all(), f"a token that is not allowed has log p = {outside.max():.6g}"


@law("restrict", hint="Among the allowed, probabilities keep their ratios and sum to 1, row by row.")
@given(case=ballots())
def the_allowed_share_everything(f, case):
    scores, allowed = case
    found = np.asarray(f(scores, allowed))
    assert found.shape == scores.shape
    for place in np.ndindex(scores.shape[:-1]):
        s = scores[place].numpy()[allowed.numpy()]
        close(found[place][allowed.numpy()], s - np.logaddexp.reduce(s))


@law("restrict", hint="Only differences of scores count: none is too large or too small to be told apart.")
@given(case=ballots(), shift=st.sampled_from([1e5, -1e5]))
def scores_may_lie_anywhere(f, case, shift):
    scores, allowed = case
    here, there = (np.asarray(f(z, allowed))[..., allowed.numpy()] for z in (scores, scores + shift))
    close(there, here, rtol=1e-6, atol=1e-6)


test_laws = obeys(decoder)

X, IDS, MAY = np.ones((1, 2, 3, 4)), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 3) > 0
WRITER, RNG = History(3), np.random.default_rng(0)
test_refuses = refuses(
    decoder,
    [
        ("rms_norm", "width", (X, np.ones(3)), {}, "weight must have shape"),
        ("rms_norm", "eps", (X, np.ones(4)), {"eps": 0.0}, "eps must be a finite number > 0"),
        ("rms_norm", "nan", (X * np.nan, np.ones(4)), {}, "x must not contain NaN"),
        ("rms_norm", "large", (X * 1e200, np.ones(4)), {}, "x must give a mean square that is finite"),
        ("rotary", "odd", (X[..., :3], np.arange(3)), {}, "x must have an even width d, got 3"),
        ("rotary", "float", (X, np.arange(3.0)), {}, "positions must have an integer dtype"),
        ("rotary", "length", (X, np.arange(4)), {}, r"positions must have shape \(1, 3\) or \(3,\)"),
        ("rotary", "base", (X, np.arange(3)), {"base": 0.0}, "base must be a finite number > 0"),
        ("rotary", "infinite", (X * np.inf, np.arange(3)), {}, "x must be finite"),
        ("decode", "empty", (WRITER, IDS[:, :0], MAY), {}, "prefix must hold at least one token"),
        ("decode", "float", (WRITER, IDS * 1.0, MAY), {}, "prefix must have an integer dtype"),
        ("decode", "nothing", (WRITER, IDS, ~MAY), {}, "allowed must have a True in every row"),
        ("decode", "many", (WRITER, IDS, torch.ones(2, 4) > 0), {}, r"must have shape \(T, V=3\)"),
        ("decode", "rng", (WRITER, IDS, MAY, 7), {}, r"rng must be a numpy\.random\.Generator"),
        ("decode", "beams", (WRITER, IDS, MAY), {"beams": 0}, "beams must be at least 1"),
        ("decode", "drawn", (WRITER, IDS, MAY, RNG), {"beams": 2}, "and 1 beside rng, got 2"),
        ("decode", "cold", (WRITER, IDS, MAY), {"temperature": 0.0}, "temperature must be a finite"),
        ("decode", "end", (WRITER, IDS, MAY), {"end": 3}, r"end must be None or lie in \[0, 3\), got 3"),
    ],
)


def test_what_is_not_allowed_has_probability_zero():
    scores = torch.tensor([[5.0, 1e4, -3.0], [0.0, 0.0, 0.0]])
    p = decoder.restrict(scores, torch.tensor([True, False, True])).exp()
    assert torch.equal(p[:, 1], torch.zeros(2))
    torch.testing.assert_close(p.sum(1), torch.ones(2))


def test_guidance_is_one_writer_at_scale_1_and_the_other_at_0():
    allowed, prefix, blank = torch.ones(4, 5) > 0, torch.tensor([[1, 2], [3, 4]]), torch.tensor([0])
    one, other = History(5, 1), History(5, 2)
    alone = [decoder.decode(w, p, allowed) for w, p in ((one, prefix), (other, blank.expand(2, 1)))]
    for scale, (ids, told) in zip((1.0, 0.0), alone, strict=True):
        for beams in (1, 3):
            found, total = decoder.decode(decoder.Guided(one, other, blank, scale), prefix, allowed)
            assert torch.equal(found, ids) and torch.equal(total, told), (scale, beams)
    free, bound = other.scores([0]), one.scores([1, 2])
    guided, _ = decoder.Guided(one, other, blank, 3.0).next_scores(prefix, None)
    np.testing.assert_allclose(guided[0], free + 3 * (bound - free))
    beyond = decoder.Guided(one, other, blank, 3.0)
    decoder.decode(beyond, prefix, allowed, beams=3)  # both caches follow their beams
    with pytest.raises(ValueError, match="scale must be finite"):
        decoder.Guided(one, other, blank, float("nan"))


# The block


def block(dim=12, heads=3):
    torch.manual_seed(0)
    made = decoder.DecoderBlock(dim, heads, 20).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


PAST = torch.ones(6, 6, dtype=torch.bool).tril()


def through(made, x, first=0):
    return made(x, decoder.turns(torch.arange(first, first + x.shape[1]), 4, 1e4, x), PAST)[0]


def test_a_block_is_its_parts():
    made, x = block(), torch.randn(2, 6, 12, dtype=torch.float64)
    z = decoder.rms_norm(x, made.norm1.weight)
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (z @ made.qkv.weight.T).chunk(3, -1))
    for norm in (made.q_norm, made.k_norm):
        assert norm.weight.shape == (3, 1, 4)
    q, k = (
        (t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * n.weight
        + n.bias
        for t, n in ((q, made.q_norm), (k, made.k_norm))
    )
    q, k = (decoder.rotary(t, torch.arange(6)) for t in (q, k))
    P = (q @ k.mT / 2).masked_fill(~PAST, -torch.inf).softmax(-1)
    x1 = x + (P @ v).transpose(1, 2).flatten(2) @ made.proj.weight.T
    u, m = decoder.rms_norm(x1, made.norm2.weight), made.mlp
    g = u @ m.gate.weight.T
    expected = x1 + (g * g.sigmoid() * (u @ m.up.weight.T)) @ m.down.weight.T
    torch.testing.assert_close(through(made, x), expected)


def test_scaling_the_maps_of_queries_and_keys_changes_nothing():
    """QK-norm: no score grows with the weights. And only differences of positions count."""
    made, x = block(), torch.randn(2, 6, 12, dtype=torch.float64)
    before = through(made, x)
    torch.testing.assert_close(through(made, x, first=50), before)
    with torch.no_grad():
        query, key, _ = made.qkv.weight.chunk(3)
        query.mul_(1000)
        key.mul_(300)
    torch.testing.assert_close(through(made, x), before, rtol=2e-3, atol=2e-3)  # eps is felt by small weights


def test_a_block_goes_on_from_what_is_kept():
    made, x = block(), torch.randn(2, 6, 12, dtype=torch.float64)
    whole, kept, out = through(made, x), None, []
    for first, last in ((0, 3), (3, 4), (4, 6)):
        angles = decoder.turns(torch.arange(first, last), 4, 1e4, x)
        part, kept = made(x[:, first:last], angles, PAST[first:last, :last], kept)
        out.append(part)
    torch.testing.assert_close(torch.cat(out, 1), whole)


@pytest.mark.parametrize("dim, heads", [(12, 5), (12, 4), (12, 0)])
def test_heads_must_divide_the_width_evenly(dim, heads):
    with pytest.raises(ValueError, match=f"heads must divide dim=12 into even widths, got {heads}"):
        decoder.DecoderBlock(dim, heads, 8)
