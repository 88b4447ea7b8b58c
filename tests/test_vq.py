"""Laws of vector quantisation; scipy and Hugging Face as outside truths."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from minivlp import vq
from minivlp.data import CPU_NOUNS, Scenes, load_emojivl, scene_pixels
from tests.held import enough, holds_tiles_only, tiles
from tests.laws import Subject, close, law, obeys, refuses
from tests.strategies import arrays, sizes


@st.composite
def cases(draw):
    """z (M, D) and codes (K, D) of very different lengths; no vector is about as near to two codes."""
    M, K, D = draw(sizes(5)), draw(sizes(4)), draw(sizes(4))
    z, codes = draw(arrays(M, D, scale=2)), draw(arrays(K, D))
    codes = codes * np.random.default_rng(draw(st.integers(0, 99))).uniform(0.1, 3, (K, 1))
    apart = np.sort(distances(z, codes), 1)
    assume(K == 1 or (apart[:, 1] - apart[:, 0]).min() > 1e-3)
    return z, codes


@st.composite
def grids(draw):
    """z and codes of small whole numbers, among which many distances are equal, exactly."""
    M, K, D = draw(sizes(6)), draw(sizes(6, 2)), draw(sizes(3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return rng.integers(-1, 2, (M, D)) * 1.0, rng.integers(-1, 2, (K, D)) * 1.0


def distances(z, codes):
    """Squared distances (M, K), one difference at a time."""
    return np.array([[sum((a - b) ** 2 for a, b in zip(x, c, strict=True)) for c in codes] for x in z])


@law("nearest", hint="The nearest code has the largest 2 z·c − ‖c‖²: a long code is not near because z·c is.")
@given(case=cases())
def equals_brute_force(f, case):
    close(f(*case), distances(*case).argmin(1))


@law("nearest", hint="Of equally near codes the first is taken.")
@given(case=grids())
def ties_go_to_the_first(f, case):
    close(f(*case), distances(*case).argmin(1))


@law("nearest", hint="A number counts from the first code, and the last tiles may be smaller.")
def many_tiles_find_one_code(f):
    z, codes = large()
    with tiles():
        found = f(z, codes)
    close(found, ((z[:, None] - codes) ** 2).sum(-1).argmin(1))
    twice = np.concatenate([codes, codes])  # each code again, in a later tile
    with tiles():
        close(f(np.round(z), np.round(twice)), f(np.round(z), np.round(codes)))


@law("nearest", hint="Of S one tile at a time: a row's best score and its place are all that is remembered.")
def tiles_are_all_that_is_made(f):
    z, codes = large()
    told = Subject(lambda z, codes: f.function(z, codes).to(z) + 0 * z.sum(1), f.rung)
    if f.rung == "fused":
        f(z, codes)  # so that a report can name the call
        holds_tiles_only(told, (z, codes), {}, len(z) * len(codes), "S", enough(z, codes, tokens=len(z)))


def large(M=700, K=600, D=4):
    """Several tiles each way, the last ones not full."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((M, D)), 2 * rng.standard_normal((K, D))


BETA = 0.25


@law("vq", hint="quantised is the nearest code; the loss (1 + β) times the mean over numbers of (z − c)².")
@given(case=cases(), beta=st.sampled_from([0.0, BETA, 2.0]))
def equals_the_slow_loop(f, case, beta):
    z, codes = case
    quantised, loss = f(z, codes, beta=beta)
    chosen = codes[distances(z, codes).argmin(1)]
    assert (quantised == chosen).all(), "a quantised row is not exactly a code"
    close(loss, (1 + beta) * sum(((x - c) ** 2).sum() for x, c in zip(z, chosen, strict=True)) / z.size)


@law("vq", hint="Without beta it is 0.25.")
@given(case=cases())
def beta_is_a_quarter(f, case):
    close(f(*case)[1], f(*case, beta=BETA)[1])


@law("vq", hint="A code that is nobody's nearest has gradient 0.")
@given(case=cases())
def unused_codes_stay(f, case):
    z, codes = case
    far = np.vstack([codes, codes[:1] + 1e3, codes[-1:] - 1e3])
    dcodes = f.grads(z, far, grad=(np.ones_like(z), np.ones(())))[1]
    unused = np.setdiff1d(np.arange(len(far)), distances(z, far).argmin(1))
    close(dcodes[unused], np.zeros_like(far[unused]))


@law("vq", hint="β stands on the term that moves z; the one that moves the codes has weight 1.")
@given(case=cases(), beta=st.sampled_from([0.0, BETA, 2.0]), slope=st.sampled_from([1.0, -0.5]))
def each_term_moves_one_side(f, case, beta, slope):
    z, codes = case
    ids = distances(z, codes).argmin(1)
    dz, dcodes = f.grads(z, codes, beta=beta, grad=(np.zeros_like(z), np.asarray(slope)))
    close(dz, 2 * beta * slope * (z - codes[ids]) / z.size)
    wanted = np.zeros_like(codes)
    for i, k in enumerate(ids):
        wanted[k] += 2 * slope * (codes[k] - z[i]) / z.size
    close(dcodes, wanted)


@law("vq", hint="What follows the quantised vectors moves z as if they were z, and moves no code.")
@given(case=cases(), seed=st.integers(0, 99))
def straight_through(f, case, seed):
    z, codes = case
    upstream = np.random.default_rng(seed).standard_normal(z.shape)
    dz, dcodes = f.grads(z, codes, grad=(upstream, np.zeros(())))
    close(dz, upstream)
    close(dcodes, np.zeros_like(codes))


@law("vq", hint="float32 comes in, float32 goes out.")
@given(case=cases())
def float32_is_enough(f, case):
    z, codes = (a.astype(np.float32) for a in case)
    if f.rung != "np":
        found = f.function(torch.from_numpy(z), torch.from_numpy(codes))
        assert all(value.dtype == torch.float32 for value in found)
    for single, double in zip(f(z, codes), f(z * 1.0, codes * 1.0), strict=True):
        close(single, double, rtol=1e-4, atol=1e-5)


@law("vq", hint="The gradient of a code comes from all of its vectors, in whatever tile.")
def many_tiles_give_one_answer(f):
    z, codes = large()
    with tiles():
        quantised, loss = f(z, codes)
        dz, dcodes = f.grads(z, codes, grad=(np.ones_like(z), np.ones(())))
    ids = ((z[:, None] - codes) ** 2).sum(-1).argmin(1)
    close(quantised, codes[ids])
    close(loss, (1 + BETA) * ((z - codes[ids]) ** 2).mean())
    close(dz, 2 * BETA * (z - codes[ids]) / z.size + 1)
    close(dcodes[ids[0]], 2 * (codes[ids[0]] - z[ids == ids[0]]).sum(0) / z.size)


@law("vq", hint="Keep z, the codes and one number a row; make S tile by tile.")
def no_more_than_tiles_is_held(f):
    z, codes = large()
    loss = Subject(lambda z, codes: f.function(z, codes)[1], f.rung)
    if f.rung == "fused":
        holds_tiles_only(loss, (z, codes), {}, len(z) * len(codes), "S", enough(z, codes, tokens=len(z)))


# k-means


@st.composite
def clouds(draw):
    """z (M, D), K ≤ M and a seed."""
    M, D = draw(sizes(30, 2)), draw(sizes(3))
    return draw(arrays(M, D, scale=3)), draw(st.integers(1, min(M, 6))), draw(st.integers(0, 99))


def distortion(z, codes):
    return distances(z, codes).min(1).mean()


@law("kmeans", hint="The same generator gives the same codes, and the vectors stay as they are.")
@given(case=clouds())
def the_generator_decides(f, case):
    z, K, seed = case
    before = z.copy()
    one, two = (f(z, K, np.random.default_rng(seed), steps=3) for _ in range(2))
    assert (one == two).all() and (z == before).all()
    assert one.shape == (K, z.shape[1])


@law("kmeans", hint="Neither moving codes to their means nor restarting dead ones can raise the distance.")
@given(case=clouds())
def distortion_never_rises(f, case):
    z, K, seed = case
    found = [distortion(z, f(z, K, np.random.default_rng(seed), steps=n)) for n in range(6)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(found)), found


@law("kmeans", hint="Without a step the codes are K different rows of z, drawn by the generator.")
@given(case=clouds())
def begins_at_vectors(f, case):
    z, K, seed = case
    codes = f(z, K, np.random.default_rng(seed), steps=0)
    rows = [int((z == c).all(1).argmax()) for c in codes]
    close(codes, z[rows])
    assert len(set(rows)) == K or len(np.unique(z, axis=0)) < len(z)


@law("kmeans", hint="In the end each code is the mean of its vectors.")
@given(case=clouds())
def ends_at_means(f, case):
    z, K, seed = case
    codes = f(z, K, np.random.default_rng(seed), steps=60)
    ids = distances(z, codes).argmin(1)
    for k in np.unique(ids):
        close(codes[k], z[ids == k].mean(0))


@law("kmeans", hint="A code without vectors moves to one of them: with enough codes nothing is left over.")
@given(copies=st.integers(5, 12), seed=st.integers(0, 99))
def dead_codes_come_back(f, copies, seed):
    z = np.repeat(np.array([[0.0, 0], [9, 0], [0, 7], [8, 8]]), [copies, 2, 1, 1], 0)
    assert distortion(z, f(z, 4, np.random.default_rng(seed), steps=150)) < 1e-12


@law("kmeans", hint="A step is one move to the means; there are as many as asked for.")
@given(seed=st.integers(0, 99))
def a_step_is_one_move(f, seed):
    z = np.random.default_rng(seed).standard_normal((20, 2))
    codes = f(z, 3, np.random.default_rng(seed), steps=0)
    ids = distances(z, codes).argmin(1)
    means = np.array([z[ids == k].mean(0) for k in range(3)])
    close(f(z, 3, np.random.default_rng(seed), steps=1), means)


test_laws = obeys(vq)


@pytest.mark.parametrize("f", [vq.vq, vq.vq_fused])
def test_quantising_twice_changes_nothing_and_codes_have_no_order(f):
    z, codes = map(torch.from_numpy, large())
    once, loss = f(z, codes)
    assert torch.equal(f(once, codes)[0], once) and f(once, codes)[1] == 0
    other, same = f(z, codes.flip(0))
    assert torch.equal(other, once) and same == loss


@pytest.mark.parametrize("f", vq.RUNGS["vq"].values())
def test_no_vector_costs_nothing(f):
    z, codes = np.ones((0, 3)), np.ones((4, 3))
    if f is vq.vq_np:
        (quantised, loss), (dz, dcodes) = f(z, codes)
        assert quantised.shape == dz.shape == (0, 3) and loss == 0 and not dcodes.any()
    else:
        quantised, loss = f(*map(torch.from_numpy, (z, codes)))
        assert quantised.shape == (0, 3) and loss == 0


ONE, TWO = np.ones((2, 3)), np.ones((4, 3))
BAD = [
    ("width", (ONE, np.ones((4, 2))), {}, r"codes must have shape \(K, D=3\)"),
    ("flat", (np.ones(3), TWO), {}, r"z must have shape"),
    ("no_code", (ONE, np.ones((0, 3))), {}, "codes must hold at least one code"),
    ("nan", (ONE * np.nan, TWO), {}, "z must not contain NaN"),
    ("overflow", (ONE, TWO * 1e200), {}, "codes must give a squared length that is finite"),
    ("dtype", (ONE, TWO.astype(np.float32)), {}, "codes must have the dtype"),
]
test_refuses = refuses(
    vq,
    [(family, *case) for family in ("nearest", "vq") for case in BAD]
    + [("vq", "beta", (ONE, TWO), {"beta": -1.0}, "beta must be ≥ 0, got -1")]
    + [
        ("kmeans", "many", (ONE, 3, np.random.default_rng(0)), {}, r"K must lie in \[1, 2\].*, got 3"),
        ("kmeans", "none", (ONE, 0, np.random.default_rng(0)), {}, r"K must lie in \[1, 2\]"),
        ("kmeans", "seed", (ONE, 1, 7), {}, "rng must be a numpy.random.Generator, got int"),
        ("kmeans", "steps", (ONE, 1, np.random.default_rng(0)), {"steps": -1}, "steps must be ≥ 0"),
        ("kmeans", "nan", (ONE * np.nan, 1, np.random.default_rng(0)), {}, "z must not contain NaN"),
    ],
)


@pytest.mark.parametrize("f", vq.RUNGS["nearest"].values())
def test_scipy_finds_the_same_codes(f):
    cluster = pytest.importorskip("scipy.cluster.vq")
    z, codes = large()
    given = (z, codes) if f is vq.nearest_np else map(torch.from_numpy, (z, codes))
    np.testing.assert_array_equal(np.asarray(f(*given)), cluster.vq(z, codes)[0])


def test_kmeans_is_scipys():
    """From the same start, without dead codes, after the same number of steps."""
    cluster = pytest.importorskip("scipy.cluster.vq")
    z = np.random.default_rng(3).standard_normal((400, 3))
    start = vq.kmeans(z, 7, np.random.default_rng(0), steps=0)
    expected, _ = cluster.kmeans2(z, start, iter=9, minit="matrix")
    np.testing.assert_allclose(vq.kmeans(z, 7, np.random.default_rng(0), steps=9), expected, rtol=1e-10)
    tensor = vq.kmeans(torch.from_numpy(z).float(), 7, np.random.default_rng(0), steps=9)
    assert tensor.dtype == torch.float32 and np.allclose(tensor.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("f", [vq.vq, vq.vq_fused])
def test_hugging_faces_quantiser_has_beta_on_the_other_term(f):
    """Theirs is ‖z − sg c‖² + b ‖sg z − c‖²: b times ours with β = 1 / b."""
    modeling = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    from transformers import ChameleonVQVAEConfig

    torch.manual_seed(0)
    config = ChameleonVQVAEConfig(num_embeddings=9, embed_dim=4)
    theirs = modeling.ChameleonVQVAEVectorQuantizer(config).double()
    nn.init.normal_(theirs.embedding.weight)
    z = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    ours, weight = (t.detach().clone().requires_grad_() for t in (z, theirs.embedding.weight))
    quantised, loss, ids = theirs(z)
    upstream = torch.randn_like(quantised)
    (theirs.beta * 0 + (quantised * upstream).sum() + loss).backward()
    rows = ours.permute(0, 2, 3, 1).reshape(-1, 4)
    got, our_loss = f(rows, weight, beta=1 / theirs.beta)
    assert torch.equal(vq.nearest(rows, weight), ids)
    got = got.view(2, 3, 5, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, quantised)
    torch.testing.assert_close(theirs.beta * our_loss, loss)
    ((got * upstream).sum() + theirs.beta * our_loss).backward()
    torch.testing.assert_close(ours.grad, z.grad)
    torch.testing.assert_close(weight.grad, theirs.embedding.weight.grad)


def test_without_upstream_the_gradients_by_hand_are_those_of_the_loss():
    z, codes = large()
    tensors = [torch.from_numpy(a).requires_grad_() for a in (z, codes)]
    vq.vq(*tensors)[1].backward()
    for got, wanted in zip(vq.vq_np(z, codes)[1], tensors, strict=True):
        np.testing.assert_allclose(got, wanted.grad, rtol=1e-9, atol=1e-12)


def test_perplexity_counts_the_codes_in_use():
    assert vq.perplexity(torch.zeros(7, dtype=torch.long), 4) == 1
    assert vq.perplexity(torch.arange(8), 8) == pytest.approx(8)
    assert vq.perplexity(torch.tensor([0, 0, 1, 1]), 100) == pytest.approx(2)


def test_dead_codes_restart_at_vectors():
    codes, z = torch.arange(10.0).view(5, 2), torch.randn(6, 2)
    ids, before = torch.tensor([1, 1, 3]), codes.clone()
    new = vq.restart_dead(codes, ids, z, np.random.default_rng(0))
    assert torch.equal(codes, before) and torch.equal(new[[1, 3]], codes[[1, 3]])
    assert all((z == row).all(1).any() for row in new[[0, 2, 4]])
    with pytest.raises(ValueError, match=r"rng must be a numpy\.random\.Generator"):
        vq.restart_dead(codes, ids, z, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("f", [vq.vq, vq.vq_fused])
def test_half_precision_keeps_its_dtype_and_its_codes(f, dtype):
    z, codes = (200 * torch.randn(n, 8, dtype=torch.float64) for n in (40, 20))
    low = [a.to(dtype).requires_grad_() for a in (z, codes)]
    quantised, loss = f(*low)
    assert quantised.dtype == loss.dtype == dtype
    ids = vq.nearest(low[0].double(), low[1].double())
    assert torch.equal(quantised, low[1][ids])
    (quantised.sum() + loss).backward()
    assert all(torch.isfinite(a.grad).all() for a in low)


def trained_vqvae(pixels, held, restart, steps=200, width=32, K=256):
    """A small convolutional VQ-VAE → how many of its codes the held-out pictures use, and their PSNR."""
    torch.manual_seed(0)
    rng, side = np.random.default_rng(0), pixels.shape[-1] // 8
    encoder = nn.Sequential(
        nn.Conv2d(3, width, 4, 4), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(width, width, 2, 2),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.ConvTranspose2d(width, width, 2, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(),
        nn.ConvTranspose2d(width, 3, 4, 4),
    )  # fmt: skip
    codes = nn.Parameter(torch.randn(K, width))
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), codes], lr=2e-3)

    def through(x):
        z = encoder(x).permute(0, 2, 3, 1).flatten(0, 2)  # (B · side², width)
        quantised, loss = vq.vq_fused(z, codes)
        y = decoder(quantised.unflatten(0, (len(x), side, side)).permute(0, 3, 1, 2))
        return z, loss, (y - x).square().mean()

    for _ in range(steps):
        z, loss, error = through(pixels[torch.from_numpy(rng.integers(len(pixels), size=32))])
        adam.zero_grad()
        (loss + error).backward()
        adam.step()
        if restart:
            codes.data.copy_(vq.restart_dead(codes, vq.nearest_fused(z, codes), z, rng))
    with torch.no_grad():
        z, _, error = through(held)
    return vq.perplexity(vq.nearest_fused(z, codes), K), float(10 * (4 / error).log10())


@pytest.mark.slow
def test_a_vqvae_collapses_without_restarts_and_not_with_them():
    """Of 256 codes N(0, 1) one wins all vectors, and the others never have a gradient again."""
    emojivl = load_emojivl()
    nouns = emojivl.nouns(CPU_NOUNS)
    train, held = Scenes(emojivl, nouns), Scenes(emojivl, nouns, pairs="held_out", seed=1)
    pictures = (scene_pixels([source[i] for i in range(n)]) for source, n in ((train, 1000), (held, 100)))
    pictures = tuple(pictures)
    collapsed, blurred = trained_vqvae(*pictures, restart=False)
    used, sharp = trained_vqvae(*pictures, restart=True)
    assert collapsed <= 4 and used >= 150, (collapsed, used)
    assert sharp > blurred + 2, (blurred, sharp)
