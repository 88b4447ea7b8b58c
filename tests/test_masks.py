"""Laws of masks: the table, what it lets through, and attention on its blocks alone."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minivlp import masks
from minivlp.masks import FULL, PREFIX, TOWERS, real_keys, visible
from minivlp.transformer import Encoder
from tests.held import enough, holds_tiles_only, same_in_float32, tiles
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes

# lengths, sees, causal. The last one leaks: its words are causal, but the picture may read them.
SYSTEMS = {
    "ViLT": ((2, 4), FULL, ()),
    "two towers": ((2, 4), TOWERS, (0,)),
    "prefix language model": ((3, 3), PREFIX, (1,)),
    "plain language model": ((3, 3), PREFIX, (0, 1)),
    "CoCa's first half, [CLS] last": ((4, 1), PREFIX, (0,)),
    "captions of videos: [CLS], frames, words": ((1, 2, 3), ((1, 1, 0), (1, 1, 0), (1, 1, 1)), (2,)),
    "the picture sees the text": ((3, 3), FULL, (1,)),
}


@st.composite
def tables(draw, segments=4, most=4, whole_rows=False):
    """lengths, sees, causal: segments without tokens, tables with empty rows, any segments causal."""
    S = draw(sizes(segments))
    lengths = tuple(draw(st.integers(0, most)) for _ in range(S))
    sees = np.random.default_rng(draw(st.integers(0, 999))).random((S, S)) < 0.6
    if whole_rows:
        lengths = (max(lengths[0], 1), *lengths[1:])
        sees[:, 0] |= ~sees[:, np.array(lengths) > 0].any(1)
    causal = tuple(s for s in range(S) if draw(st.booleans()))
    return lengths, tuple(tuple(int(x) for x in row) for row in sees), causal


def slow_visible(lengths, sees, causal):
    """Token by token."""
    segment = [s for s, n in enumerate(lengths) for _ in range(n)]
    wanted = np.zeros((len(segment), len(segment)), dtype=bool)
    for i, s in enumerate(segment):
        for j, t in enumerate(segment):
            future = s == t and s in causal and j > i
            wanted[i, j] = bool(sees[s][t]) and not future
    return wanted


def same_mask(got, wanted):
    got = np.asarray(got)
    assert got.dtype == bool, f"the mask must be bool, not {got.dtype}"
    close(got.astype(int), wanted.astype(int))


@law(
    "visible", hint="Causal stops the future inside one segment; what a table allows elsewhere stays allowed."
)
@given(case=tables(), seed=st.integers(0, 99))
def the_layout_means_nothing(f, case, seed):
    """Segments in another order: the same table and mask, with rows and columns in another order."""
    (lengths, sees, causal), S = case, len(case[0])
    order = np.random.default_rng(seed).permutation(S)
    moved = (
        tuple(lengths[s] for s in order),
        tuple(tuple(sees[s][t] for t in order) for s in order),
        tuple(i for i, s in enumerate(order) if s in causal),
    )
    starts = np.cumsum([0, *lengths])
    places = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in order]).astype(int)
    same_mask(f(*moved), np.asarray(f(*case))[np.ix_(places, places)])


@law(
    "visible", hint="Row i may see column j where sees[s(i)][s(j)], but no later token of its causal segment."
)
@given(case=tables())
def equals_the_slow_loop(f, case):
    same_mask(f(*case), slow_visible(*case))


@cache
def dependence(system, layers):
    """Outside truth: where the Jacobian of a stack of real blocks is not zero, (L, L) bool."""
    mask = torch.from_numpy(slow_visible(*SYSTEMS[system]))
    with torch.random.fork_rng():
        torch.manual_seed(layers)
        stack = Encoder(8, 2, 8, layers).double().apply(wide_init)
        x = torch.randn(1, len(mask), 8, dtype=torch.float64, requires_grad=True)
        probe = torch.randn(8, dtype=torch.float64)
    read = stack(x, mask)[0] @ probe  # (L,)
    slopes = [torch.autograd.grad(one, x, retain_graph=True)[0][0].norm(dim=-1) for one in read]
    return torch.stack(slopes).numpy() > 1e-9


def wide_init(module):
    """Weights at which nothing that depends is as small as rounding."""
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.4)


@law("influence", hint="One layer lets i depend on what it sees, and on itself; the next layer sees that.")
def the_jacobian_of_real_blocks_is_not_zero_there(f):
    for system in SYSTEMS:
        for layers in (1, 2, 3):
            same_mask(f(slow_visible(*SYSTEMS[system]), layers), dependence(system, layers))


def paths(mask, layers):
    """Where each row gets by at most `layers` looks, walked one after the other."""
    reach = np.zeros_like(mask)
    for i in range(len(mask)):
        found = {i}
        for _ in range(layers):
            found |= {j for k in found for j in range(len(mask)) if mask[k, j]}
        reach[i, list(found)] = True
    return reach


@st.composite
def any_masks(draw):
    """mask (L, L) with a few True, some of them on the diagonal, and layers."""
    L, layers = draw(sizes(6)), draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    if draw(st.booleans()):  # a chain: one more layer reaches one more token
        return np.eye(L, k=draw(st.sampled_from([-1, 1])), dtype=bool), layers
    return rng.random((L, L)) < 0.3, layers


@law("influence", hint="Multiply as often as there are layers: none is the identity, each adds one look.")
@given(case=any_masks())
def equals_the_walked_paths(f, case):
    before = case[0].copy()
    same_mask(f(*case), paths(*case))
    assert np.array_equal(case[0], before), "the mask was changed"


@law("influence", hint="Whether there is a path, not how many: 256 of them are 0 in eight bits.")
def paths_are_not_counted(f):
    for L, layers in ((16, 3), (2, 70)):
        same_mask(f(np.ones((L, L), dtype=bool), layers), np.ones((L, L), dtype=bool))


@law(
    "leaks",
    hint="A leak may need two looks, i at a patch and the patch at word t: ask the power, not the mask.",
)
def words_come_back_through_the_picture(f):
    mask = slow_visible((2, 4), FULL, (1,))
    reads = [(i, i + 1) for i in range(2, 5)]
    assert f(mask, 1, reads) == [], "with one layer nothing leaks"
    assert f(mask, 2, reads) == reads, "with two layers every word but the first can be copied"
    right = slow_visible((2, 4), PREFIX, (1,))
    assert f(right, 12, [(1, 2), *reads]) == [], "a prefix never leaks"


@law("leaks", hint="Of the pairs (i, t) asked for, in their order, those whose row i reaches column t.")
@given(case=any_masks(), seed=st.integers(0, 99))
def equals_the_pairs_with_a_path(f, case, seed):
    (mask, layers), rng = case, np.random.default_rng(seed)
    reads = [tuple(pair) for pair in rng.integers(0, len(mask), (rng.integers(0, 6), 2)).tolist()]
    wanted = [(i, t) for i, t in reads if paths(mask, layers)[i, t]]
    found = f(mask, layers, reads)
    assert [tuple(pair) for pair in found] == wanted, f"got {found}, expected {wanted} of {reads}"


@st.composite
def cases(draw, scale=1.0):
    """(q, k, v), settings: tables in which every token sees one, segments without tokens among them."""
    lengths, sees, causal = draw(tables(segments=3, most=3, whole_rows=True))
    B, H, d = draw(sizes(2)), draw(sizes(2)), draw(sizes(3))
    q, k, v = (draw(arrays(B, H, sum(lengths), d, scale=z)) for z in (scale, scale, 1.0))
    return (q, k, v), {"lengths": lengths, "sees": sees, "causal": causal}


def slow(q, k, v, lengths, sees, causal=()):
    """Attention one query at a time, the softmax by logarithms."""
    mask, out = slow_visible(lengths, sees, causal), np.zeros_like(q)
    for b, h, i in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(mask[i])
        scores = k[b, h, keys] @ q[b, h, i] / q.shape[-1] ** 0.5
        out[b, h, i] = np.exp(scores - np.logaddexp.reduce(scores)) @ v[b, h, keys]
    return out


@law("attention_blocks", hint="Segments that do not see one another are as if the others were not there.")
@given(case=cases())
def towers_are_separate_passes(f, case):
    (q, k, v), _ = case
    n = q.shape[2]
    both = (np.concatenate([z, 1 - z], 2) for z in (q, k, v))
    out = f(*both, lengths=(n, n), sees=TOWERS, causal=(1,))
    close(out[:, :, :n], f(q, k, v, lengths=(n,), sees=((1,),), causal=()))
    close(out[:, :, n:], f(1 - q, 1 - k, 1 - v, lengths=(n,), sees=((1,),), causal=(0,)))


@law(
    "attention_blocks", hint="One softmax over all keys that the row's segment may see, wherever they stand."
)
@given(case=cases())
def equals_attention_with_the_mask(f, case):
    arguments, settings = case
    close(f(*arguments, **settings), slow(*arguments, **settings))


@law("attention_blocks", hint="Subtract a row's largest score over all its blocks, not that of the last one.")
@given(case=cases(scale=100.0))
def stays_exact_at_huge_scores(f, case):
    arguments, settings = case
    close(f(*arguments, **settings), slow(*arguments, **settings))
    assert all(np.isfinite(gradient).all() for gradient in f.grads(*arguments, **settings))


@law("attention_blocks", hint="Every block gives its share: a key collects from all segments that see it.")
@given(case=cases(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    arguments, settings = case
    upstream = np.random.default_rng(seed).standard_normal(arguments[0].shape)
    for which, gradient in enumerate(f.grads(*arguments, grad=upstream, **settings)):
        slope = central_differences(lambda *a: f(*a, **settings), arguments, which, grad=upstream)
        close(gradient, slope, rtol=1e-6, atol=1e-7)


@law("attention_blocks", hint="float32 comes in, float32 goes out; −∞ is in every dtype, −1e300 is not.")
@given(case=cases())
def float32_is_enough(f, case):
    same_in_float32(f, *case, near=1e-5)


LONG = {"lengths": (300, 200, 300), "sees": ((1, 0, 0), (0, 1, 0), (1, 0, 1)), "causal": (2,)}


def long_sequence(d=4):
    """One head over several tiles each way, the last ones not full."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((1, 1, sum(LONG["lengths"]), d)) for _ in "qkv")


@law("attention_blocks", hint="Keep the output and one logsumexp a query; build no mask, keep no weights.")
def no_more_than_tiles_is_held(f):
    q, *_ = case = long_sequence()
    holds_tiles_only(f, case, LONG, q.shape[2] ** 2, "S", enough(*case, tokens=q.shape[2]))


class Multiplications(TorchDispatchMode):
    """How many multiplications the products of matrices take."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket.__name__.removesuffix("_") in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"):
            self.total += out.numel() * [a for a in args if isinstance(a, torch.Tensor)][-1].shape[-2]
        return out


def live(lengths, sees, causal=()):
    """How many scores the table asks for."""
    return sum(n * m for s, n in enumerate(lengths) for t, m in enumerate(lengths) if sees[s][t])


@law("attention_blocks", hint="Walk over the blocks that the table allows; what it forbids needs no product.")
def nothing_is_multiplied_on_dead_blocks(f):
    if f.rung != "fused":
        return
    arrays = long_sequence()
    tensors = [torch.from_numpy(z).requires_grad_() for z in arrays]
    with tiles(), Multiplications() as forward:
        out = f.function(*tensors, **LONG)
    with tiles(), Multiplications() as backward:
        torch.autograd.grad(out.sum(), tensors)
    allowed = 1.05 * live(**LONG) * arrays[0].shape[-1]
    for way, found, products in (("forward", forward, 2), ("backward", backward, 5)):
        assert found.total <= products * allowed, (
            f"{found.total / allowed:.1f} products of the size of the live blocks in the {way} pass, "
            f"{products} are enough"
        )


test_laws = obeys(masks)

q = np.ones((2, 1, 5, 4))
table = {"lengths": (2, 3), "sees": PREFIX, "causal": (1,)}
test_refusals = refuses(
    masks,
    [
        ("visible", "negative", ((2, -1), PREFIX), {}, "lengths must be a sequence of whole numbers ≥ 0"),
        ("visible", "fractions", ((2, 1.5), PREFIX), {}, "lengths must be a sequence of whole numbers ≥ 0"),
        ("visible", "a number", (5, PREFIX), {}, "lengths must be a sequence of whole numbers ≥ 0"),
        ("visible", "no segment", ((), ()), {}, "lengths must be a sequence of whole numbers ≥ 0"),
        ("visible", "too large", ((2,), PREFIX), {}, "sees must be 1 × 1, as there are 1 lengths, got rows"),
        ("visible", "ragged", ((2, 3), ((1,), (1, 1))), {}, "sees must be 2 × 2"),
        ("visible", "a two", ((2, 3), ((1, 0), (2, 1))), {}, "sees must hold 0 and 1 only, got 2"),
        (
            "visible",
            "no segment 2",
            ((2, 3), PREFIX, (2,)),
            {},
            "causal must be a sequence of segments, 0 to 1",
        ),
        ("visible", "no segment -1", ((2, 3), PREFIX, (-1,)), {}, "causal must be a sequence of segments"),
        ("visible", "causal a number", ((2, 3), PREFIX, 1), {}, "causal must be a sequence of segments"),
        ("influence", "not square", (np.ones((2, 3), bool), 1), {}, "mask must have shape"),
        ("influence", "numbers", (np.ones((2, 2)), 1), {}, "mask must be bool"),
        ("influence", "negative", (np.ones((2, 2), bool), -1), {}, "layers must be a whole number ≥ 0"),
        ("influence", "half a layer", (np.ones((2, 2), bool), 1.5), {}, "layers must be a whole number ≥ 0"),
        ("leaks", "numbers", (np.ones((2, 2)), 1, []), {}, "mask must be bool"),
        ("leaks", "outside", (np.ones((2, 2), bool), 1, [(0, 2)]), {}, "reads must hold pairs of positions"),
        ("leaks", "below", (np.ones((2, 2), bool), 1, [(-1, 0)]), {}, "reads must hold pairs of positions"),
        ("attention_blocks", "widths differ", (q, np.ones((2, 1, 5, 3)), q), table, "k must have shape"),
        ("attention_blocks", "other lengths", (q, q, q[:, :, :4]), table, "v must have shape"),
        ("attention_blocks", "integers", (q.astype(int), q, q), table, "q must have a floating dtype"),
        ("attention_blocks", "NaN", (q, q, q * np.nan), table, "v must not contain NaN"),
        ("attention_blocks", "no keys", (q[:, :, :0],) * 3, table, "k must hold at least one key"),
        ("attention_blocks", "sum", (q[:, :, :4],) * 3, table, "lengths must add up to L=4, got \\[2, 3\\]"),
        (
            "attention_blocks",
            "sees nothing",
            (q, q, q),
            table | {"sees": ((0, 0), (1, 1))},
            "sees must let every token see one, got segment 0",
        ),
        (
            "attention_blocks",
            "sees nobody there",
            (q, q, q),
            {"lengths": (5, 0), "sees": ((0, 1), (1, 1))},
            "sees must let every token see one, got segment 0",
        ),
    ],
)


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_closed_under_sees_can_be_kept(system):
    """A set of segments comes out alike alone and in the whole sequence where it sees nothing outside."""
    lengths, sees, causal = SYSTEMS[system]
    mask = torch.from_numpy(visible(lengths, sees, causal))
    torch.manual_seed(0)
    stack, x = Encoder(8, 2, 8, 3).double().apply(wide_init), torch.randn(1, len(mask), 8).double()
    segment = np.repeat(np.arange(len(lengths)), lengths)
    for some in range(1, 2 ** len(lengths)):
        inside = torch.from_numpy(np.isin(segment, [s for s in range(len(lengths)) if some >> s & 1]))
        closed = not mask[inside][:, ~inside].any()
        alone = stack(x[:, inside], mask[inside][:, inside])
        assert torch.allclose(stack(x, mask)[:, inside], alone, atol=1e-12) == closed


def test_the_layout_of_the_sequence_means_nothing():
    """[image; text] and [text; image] are one model: only the table and the positions count."""
    torch.manual_seed(0)
    stack, image, text = Encoder(8, 2, 8, 2).double(), torch.randn(1, 4, 8), torch.randn(1, 3, 8)
    one = stack(torch.cat([image, text], 1).double(), torch.from_numpy(visible((4, 3), PREFIX, (1,))))
    sees = ((1, 1), (0, 1))
    two = stack(torch.cat([text, image], 1).double(), torch.from_numpy(visible((3, 4), sees, (0,))))
    assert torch.allclose(one, two.roll(4, 1), atol=1e-12)


def test_padding_is_seen_by_itself_alone():
    mask = torch.from_numpy(visible((2, 4), PREFIX, (1,)))
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    allowed = real_keys(mask, real)
    assert allowed.shape == (2, 1, 6, 6) and torch.equal(allowed[0, 0], mask)
    assert allowed[1, 0, :, 4:].tolist() == [[False] * 2] * 4 + [[True, False], [False, True]]
    torch.manual_seed(0)
    stack, x = Encoder(8, 2, 8, 2), torch.randn(2, 6, 8)
    before = stack(x, allowed)
    x[1, 4:] = 7
    assert torch.equal(before[real], stack(x, allowed)[real])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rung", ["torch", "fused"])
def test_low_precision_views_and_frozen_sides(rung, dtype, tolerance):
    """Views with permuted strides, no gradient for a frozen side, a second backward, and the dtype kept."""
    f = masks.RUNGS["attention_blocks"][rung]
    q, k, v = (torch.randn(2, 5, 3, 4, dtype=torch.float64).transpose(1, 2) for _ in "qkv")
    low = [x.to(dtype).requires_grad_(i != 1) for i, x in enumerate((q, k, v))]
    out = f(*low, **table)
    assert out.dtype == dtype
    expected, gradients = masks.attention_blocks_np(q.numpy(), k.numpy(), v.numpy(), **table)
    assert np.allclose(out.detach().double().numpy(), expected, atol=tolerance)
    first = torch.autograd.grad(out.sum(), (low[0], low[2]), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (low[0], low[2]))
    for one, two, reference in zip(first, second, (gradients[0], gradients[2]), strict=True):
        assert torch.equal(one, two)
        assert np.allclose(one.double().numpy(), reference, atol=10 * tolerance)
