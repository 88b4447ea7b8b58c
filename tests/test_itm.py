"""Laws of matching pairs: who is swapped with whom, and the loss."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlp import itm
from minivlp.itm import derangement, hard_negatives, itm_loss, itm_loss_np
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes

seeds = st.integers(0, 999)


def chi_square(found, wanted):
    """Pearson's statistic Σ (found − wanted)² / wanted over the possible outcomes; none else may occur."""
    assert found[wanted == 0].sum() == 0, "an outcome of probability 0 was drawn"
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    return ((found - wanted) ** 2 / wanted).sum()


@law("derangement", hint="Every index once, none in its own place.")
@given(n=sizes(9, 2), seed=seeds)
def nobody_stays_and_everybody_is_there(f, n, seed):
    index = f(n, np.random.default_rng(seed))
    assert index.shape == (n,) and index.dtype == np.int64, f"{index.dtype} {index.shape}"
    assert sorted(index.tolist()) == list(range(n)), f"{index} is no permutation of 0 … {n - 1}"
    assert (index != np.arange(n)).all(), f"{index} leaves some index in its place"


@law(
    "derangement", hint="All arrangements without a fixed point must be equally likely, not the cycles alone."
)
@settings(max_examples=5)
@given(seed=seeds)
def every_derangement_is_equally_likely(f, seed):
    legal = [p for p in permutations(range(4)) if all(i != j for i, j in enumerate(p))]  # nine of them
    rng, draws = np.random.default_rng(seed), 100 * len(legal)
    found = [tuple(f(4, rng).tolist()) for _ in range(draws)]
    counts = np.array([found.count(p) for p in legal])
    rare, often = (f"{legal[i]} came {counts[i]} times" for i in (counts.argmin(), counts.argmax()))
    # χ² with 8 degrees of freedom is over 45 once in three million times.
    assert chi_square(counts, np.full(9, 100.0)) < 45, f"of {draws}: {rare}, {often}, expected about 100 each"


def decided_by(draw, seed):
    """Equal generators give equal draws, other generators other draws."""
    first, again, other = (draw(np.random.default_rng(s)) for s in (seed, seed, seed + 1))
    assert (first == again).all(), "the same generator, another result"
    assert (first != other).any(), "another generator, the same result"


@law("derangement", hint="Draw from the generator that is passed in, and from nothing else.")
@given(seed=seeds)
def the_generator_decides(f, seed):
    decided_by(lambda rng: f(40, rng), seed)


@st.composite
def similarities(draw):
    """A similarity (B, B), some of it large, and ids (B,) that leave every row a legal column."""
    B, scale = draw(sizes(6, 2)), draw(st.sampled_from([1.0, 100.0]))
    ids = np.array(draw(st.lists(st.integers(0, 3), min_size=B, max_size=B)))
    ids[-1] = 4 + (ids[0] == 4)
    return draw(arrays(B, B, scale=scale)), ids


@law("hard_negatives", hint="Take the diagonal and every column with the row's id out before drawing.")
@given(case=similarities(), seed=seeds)
def never_itself_nor_an_equal_id(f, case, seed):
    similarity, ids = case
    similarity = similarity + 50 * (
        ids[:, None] == ids
    )  # the true pairs are the most similar, as in training
    before = similarity.copy()
    rows = np.arange(len(ids))
    columns = f(similarity, np.random.default_rng(seed))
    assert columns.shape == (len(ids),) and columns.dtype == np.int64, f"{columns.dtype} {columns.shape}"
    assert ((columns >= 0) & (columns < len(ids)) & (columns != rows)).all(), f"a row drew itself: {columns}"
    columns = f(similarity, np.random.default_rng(seed), ids=ids)
    assert (ids[columns] != ids).all(), f"drew columns {columns}: one has the id of its row"
    assert (similarity == before).all(), "the similarity passed in was changed"


@law("hard_negatives", hint="P(column j for row i) is the softmax of row i over its legal columns.")
@settings(max_examples=5)
@given(seed=seeds)
def drawn_by_the_softmax_of_the_row(f, seed):
    rng = np.random.default_rng(seed)
    similarity, ids, draws = rng.standard_normal((5, 5)), np.array([0, 1, 2, 3, 0]), 1000
    found = np.array([f(similarity, rng, ids=ids) for _ in range(draws)])  # (draws, B)
    weights = np.exp(similarity) * (ids[:, None] != ids)
    for row, w in enumerate(weights):
        counts = np.bincount(found[:, row], minlength=5)
        wanted = draws * w / w.sum()
        told = (
            f"row {row}: columns drawn {counts.tolist()} times, expected about {wanted.astype(int).tolist()}"
        )
        # χ² with 3 degrees of freedom is over 35 less than once in eight million times.
        assert chi_square(counts, wanted) < 35, told


@law("hard_negatives", hint="Every row needs noise of its own: one vector for all makes rows draw alike.")
@settings(max_examples=5)
@given(seed=seeds)
def rows_draw_independently(f, seed):
    rng, B, draws = np.random.default_rng(seed), 12, 400
    found = np.array([f(np.zeros((B, B)), rng) for _ in range(draws)])  # (draws, B)
    # Rows i and j may both draw any of the other B − 2 columns: (B − 2) / (B − 1)² is how often they agree.
    wanted = (B - 2) / (B - 1) ** 2
    for apart in (1, 2):
        agree = (found[:, apart:] == found[:, :-apart]).mean()
        margin = 5 * np.sqrt(wanted / agree_of(found, apart))
        told = f"rows {apart} apart draw the same column {agree:.3f} of the time, expected {wanted:.3f}"
        assert abs(agree - wanted) < margin, told
    again = (found[1:] == found[:-1]).mean()
    margin = 5 * np.sqrt(1 / (B - 1) / found[1:].size)
    assert abs(again - 1 / (B - 1)) < margin, f"a row draws its last column again {again:.3f} of the time"


def agree_of(found, apart):
    """How many independent comparisons there are, at least."""
    return found[:, apart:].size / 2


@law("hard_negatives", hint="Draw from the generator that is passed in, and from nothing else.")
@given(seed=seeds)
def the_generator_decides_the_columns(f, seed):
    decided_by(lambda rng: f(np.zeros((40, 40)), rng), seed)


@law(
    "hard_negatives", hint="Take the illegal columns out before the softmax: after it the rest may be 0 / 0."
)
@given(B=sizes(6, 3), seed=seeds)
def a_sharp_similarity_still_has_negatives(f, B, seed):
    similarity = 1e4 * np.eye(B) - np.arange(B) * 1e3  # softmax is 1 on the diagonal, 0 elsewhere
    columns = f(similarity, np.random.default_rng(seed))
    assert columns.tolist() == [1] + [0] * (B - 1), f"{columns}: the most similar legal column is far ahead"


@st.composite
def cases(draw):
    """logits (B, 2) and labels (B,) of 0 and 1."""
    B = draw(sizes())
    return draw(arrays(B, 2)), np.random.default_rng(draw(seeds)).integers(0, 2, B)


@law("itm_loss", hint="The mean of log(1 + exp(z_wrong − z_right)); column 1 speaks for a match, label 1.")
@given(case=cases())
def equals_the_slow_loop(f, case):
    logits, labels = case
    losses = [
        math.log(1 + math.exp(z[1 - label] - z[label])) for z, label in zip(logits, labels, strict=True)
    ]
    close(f(*case), np.mean(losses))


@law("itm_loss", hint="By how much does each probability miss the truth? And the mean?")
@given(case=cases())
def gradients_are_the_slopes(f, case):
    close(f.grads(*case)[0], central_differences(f, case, 0), rtol=1e-6, atol=1e-8)


@law("itm_loss", hint="Take the larger logit off before exp: no overflow, and a sure answer costs nearly 0.")
@given(case=cases(), shift=st.sampled_from([1e4, -1e4]))
def large_logits_do_not_overflow(f, case, shift):
    logits, labels = case
    close(f(logits + shift, labels), f(*case), rtol=1e-8, atol=1e-8)
    close(f.grads(logits + shift, labels)[0], f.grads(*case)[0], rtol=1e-8, atol=1e-8)


@law("itm_loss", hint="Clip nothing: where an answer is sure and wrong, the slope is as large as it can be.")
@given(case=cases(), gap=st.sampled_from([-1e4, -300.0, -30.0, 0.0, 30.0, 300.0, 1e4]))
def gradients_hold_at_every_logit(f, case, gap):
    logits, labels = case
    logits = logits + gap * np.eye(2)[labels]  # the right column ahead, or behind
    rows = np.arange(len(labels))
    wrong = logits[rows, 1 - labels] - logits[rows, labels]
    close(f(logits, labels), np.logaddexp(0, wrong).mean())
    p = np.exp(-np.logaddexp(0, -wrong)) / len(labels)  # the probability of the wrong answer
    wanted = p[:, None] * (1 - 2 * np.eye(2)[labels])
    close(f.grads(logits, labels)[0], wanted, rtol=1e-8, atol=1e-12)


@law("itm_loss", hint="float32 comes in, float32 goes out.")
@given(case=cases(), length=st.sampled_from([1.0, 100.0]))
def float32_is_enough(f, case, length):
    same_in_float32(f, (length * case[0], case[1]))


test_laws = obeys(itm)

rng, s, z, y = np.random.default_rng(0), np.eye(3), np.ones((3, 2)), np.array([0, 1, 1])
test_refusals = refuses(
    itm,
    [
        ("derangement", "one pair", (1, rng), {}, "n must be at least 2.*got 1"),
        ("derangement", "none", (0, rng), {}, "n must be at least 2.*got 0"),
        ("derangement", "a seed", (3, 0), {}, "rng must be a numpy.random.Generator, got int"),
        ("hard_negatives", "one pair", (s[:1, :1], rng), {}, "ids must leave every row .* none for row 0"),
        ("hard_negatives", "equal ids", (s, rng), {"ids": y * 0}, "ids must leave every row a column"),
        ("hard_negatives", "not square", (s[:2], rng), {}, "similarity must have shape"),
        ("hard_negatives", "ids too short", (s, rng), {"ids": y[:2]}, "ids must have shape"),
        ("hard_negatives", "float ids", (s, rng), {"ids": y * 1.0}, "ids must have an integer dtype"),
        ("hard_negatives", "NaN", (s * np.nan, rng), {}, "similarity must not contain NaN"),
        ("hard_negatives", "infinite", (s - np.inf, rng), {}, "similarity must be finite"),
        ("hard_negatives", "empty", (np.ones((0, 0)), rng), {}, "similarity must hold at least two pairs"),
        ("hard_negatives", "a seed", (s, 0), {}, "rng must be a numpy.random.Generator"),
        ("itm_loss", "three columns", (np.ones((3, 3)), y), {}, "logits must have shape"),
        ("itm_loss", "labels too short", (z, y[:2]), {}, "labels must have shape"),
        ("itm_loss", "float labels", (z, y * 1.0), {}, "labels must have an integer dtype"),
        ("itm_loss", "label 2", (z, y + 1), {}, r"labels must be 1 \(match\) or 0, got 2"),
        ("itm_loss", "label −1", (z, y - 1), {}, r"labels must be 1 \(match\) or 0, got -1"),
        ("itm_loss", "integer logits", (z.astype(int), y), {}, "logits must have a floating dtype"),
        ("itm_loss", "NaN", (z * np.nan, y), {}, "logits must not contain NaN"),
        ("itm_loss", "no pairs", (z[:0], y[:0]), {}, "logits must hold at least one pair"),
    ],
)


def example(dtype=torch.float64):
    return torch.randn(6, 2, dtype=dtype), torch.tensor([1, 0, 0, 1, 1, 0])


def test_equals_torch_binary_cross_entropy():
    """Outside truth: two logits are one logit of a match, their difference."""
    logits, labels = example()
    logits.requires_grad_()
    difference = logits[:, 1] - logits[:, 0]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(difference, labels.double())
    wanted = torch.autograd.grad(expected, logits)[0]
    value, (gradient,) = itm_loss_np(logits.detach().numpy(), labels.numpy())
    close(value, expected.item())
    close(gradient, wanted)
    close(torch.autograd.grad(itm_loss(logits, labels), logits)[0], wanted)


def test_chance_costs_one_bit():
    close(itm_loss_np(np.zeros((4, 2)), np.array([0, 1, 1, 1]))[0], math.log(2))


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision(dtype, rtol):
    logits, labels = example(dtype)
    loss = itm_loss(logits, labels)
    assert loss.dtype == dtype
    close(loss.double(), itm_loss(logits.double(), labels), rtol=rtol)


def test_numpy_keeps_float32():
    logits, labels = example(torch.float32)
    assert itm_loss_np(logits.numpy(), labels.numpy())[1][0].dtype == np.float32


def test_backward_twice_and_strides():
    logits, labels = example()
    logits = logits.T.contiguous().T.requires_grad_()
    loss = itm_loss(logits, labels.repeat_interleave(2)[::2].int())
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    close(logits.grad, 2 * once)


def test_derangement_needs_about_e_permutations():
    class Counting(np.random.Generator):
        drawn = 0

        def permutation(self, *args, **kwargs):
            self.drawn += 1
            return super().permutation(*args, **kwargs)

    rng = Counting(np.random.PCG64(0))
    for _ in range(1000):
        derangement(50, rng)
    assert abs(rng.drawn / 1000 - math.e) < 5 * math.sqrt(math.e * (math.e - 1) / 1000)  # geometric, p = 1/e


def test_hard_negatives_in_float32_and_unsigned_ids():
    similarity = np.eye(4, dtype=np.float32)
    columns = hard_negatives(similarity, np.random.default_rng(0), ids=np.array([0, 0, 1, 1], dtype=np.uint8))
    assert set(columns[:2]) <= {2, 3} and set(columns[2:]) <= {0, 1} and columns.dtype == np.int64
