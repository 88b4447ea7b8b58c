"""Laws of masking words and of predicting them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlp import mlm
from minivlp.mlm import IGNORE, mask_tokens, mlm_loss, mlm_loss_np
from tests.held import enough, holds_tiles_only, same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes

SPECIAL = (0, 1, 2, 3, 4)  # [PAD] [UNK] [CLS] [SEP] [MASK], as in WordPiece.train
VOCAB, MASK = 12, 4
seeds = st.integers(0, 999)


@st.composite
def captions(draw, B=5, L=15):
    """ids and word_ids of B captions of up to L tokens: [CLS], words of some pieces, [UNK], … [SEP] [PAD]."""
    rng = np.random.default_rng(draw(seeds))
    ids, word_ids = np.zeros((B, L), dtype=np.int64), np.full((B, L), -1)
    for b in range(B):
        n = rng.integers(2, L + 1)
        ids[b, :n] = rng.choice([1, 4, *range(5, VOCAB)], n)
        ids[b, [0, n - 1]] = 2, 3
        word_ids[b, 1 : n - 1] = np.sort(rng.integers(0, max(n // 2, 1), n - 2))
    word_ids[np.isin(ids, SPECIAL) & (rng.random((B, L)) < 0.5)] = -1  # a special id is enough, and so is −1
    return ids, word_ids


def masked(f, case, seed, **settings):
    settings = {"vocab_size": VOCAB, "mask_id": MASK, "special_ids": SPECIAL} | settings
    return f(*case, np.random.default_rng(seed), **settings)


@law("mask_tokens", hint="Copy the ids first. Labels: the true id where a token was chosen, −100 elsewhere.")
@given(case=captions(), seed=seeds, whole_word=st.booleans())
def labels_hold_the_true_ids(f, case, seed, whole_word):
    before = case[0].copy()
    inputs, labels = masked(f, case, seed, p=0.5, whole_word=whole_word)
    assert (case[0] == before).all(), "the ids passed in were changed: copy them"
    kept = labels == -100
    assert (labels[~kept] == before[~kept]).all(), "a label is not the true id of its token"
    assert (inputs[kept] == before[kept]).all(), "a token was changed without a label to say so"
    assert (inputs != before).any() or kept.sum() > before.size / 2, "nothing was ever hidden"


@law(
    "mask_tokens",
    hint="Leave out every special id and every word index of −1; draw replacements from the rest.",
)
@given(case=captions(), seed=seeds, whole_word=st.booleans())
def special_tokens_stay_out(f, case, seed, whole_word):
    ids, word_ids = case
    inputs, labels = masked(f, case, seed, p=1.0, whole_word=whole_word)
    outside = np.isin(ids, SPECIAL) | (word_ids < 0)
    assert (labels[outside] == -100).all(), "a special token or padding was chosen"
    unlabelled = (labels[~outside] == -100).sum()
    assert not unlabelled, f"with p = 1 every ordinary token has a label; {unlabelled} of yours have none"
    drawn = inputs[(labels != -100) & (inputs != labels) & (inputs != MASK)]
    assert not np.isin(drawn, SPECIAL).any() and (drawn < VOCAB).all(), (
        "a special id was drawn as replacement"
    )


@law("mask_tokens", hint="Throw one coin per word (row and word index) and let all its pieces look at it.")
@given(case=captions(), seed=seeds)
def words_are_chosen_whole(f, case, seed):
    ids, word_ids = case
    _, labels = masked(f, case, seed, p=0.5, whole_word=True)
    ordinary = (word_ids >= 0) & ~np.isin(ids, SPECIAL)
    for b, w in {(b, word_ids[b, i]) for b, i in np.argwhere(ordinary)}:
        pieces = labels[b, ordinary[b] & (word_ids[b] == w)] != -100
        assert pieces.all() or not pieces.any(), f"word {w} of row {b} is chosen in part"


def many(B=300, words=20):
    """B captions of words of two pieces each, the pieces 5 … 11 in turn."""
    ids = np.arange(B * 2 * words).reshape(B, 2 * words) % (VOCAB - 5) + 5
    return ids, np.tile(np.repeat(np.arange(words), 2), (B, 1))


def near(found, wanted, n, what):
    """A frequency out of n draws lies within five standard deviations of its probability."""
    margin = 5 * np.sqrt(wanted * (1 - wanted) / n)
    assert abs(found - wanted) < margin, f"{what}: {found:.3f}, expected {wanted:.3f} ± {margin:.3f}"


@law(
    "mask_tokens",
    hint="p is the rate of chosen words; of the chosen tokens 80 % [MASK], 10 % random, 10 % kept.",
)
@settings(max_examples=5)
@given(seed=seeds, p=st.sampled_from([0.15, 0.4]), whole_word=st.booleans())
def the_rates_are_p_and_80_10_10(f, seed, p, whole_word):
    ids, word_ids = many()
    inputs, labels = masked(f, (ids, word_ids), seed, p=p, whole_word=whole_word)
    chosen = labels != -100
    n = chosen.sum()
    near(chosen.mean(), p, ids.size / 2, "chosen")  # a word counts once: its two pieces are one draw
    near((inputs == MASK)[chosen].mean(), 0.8, n, "replaced by [MASK]")
    # A random id is the true one once in 7.
    swapped = (inputs != MASK) & (inputs != ids)
    near(swapped.sum() / n, 0.1 * 6 / 7, n, "replaced by another id")
    for token in range(5, VOCAB):
        near((inputs[swapped] == token).mean(), 1 / 7, swapped.sum(), f"share of id {token}")


@law("mask_tokens", hint="Every row has coins of its own; without whole_word every piece has.")
@settings(max_examples=5)
@given(seed=seeds)
def coins_are_independent(f, seed):
    ids, word_ids = many()
    for whole_word, both in ((True, 0.3), (False, 0.09)):
        chosen = masked(f, (ids, word_ids), seed, p=0.3, whole_word=whole_word)[1] != -100
        near((chosen[:, ::2] & chosen[:, 1::2]).mean(), both, ids.size / 2, "both pieces of a word")
        near((chosen[:-1] & chosen[1:]).mean(), 0.09, ids.size / 8, "the same place in two rows")
        near((chosen[:, :-2] & chosen[:, 2:]).mean(), 0.09, ids.size / 8, "two neighbouring words")


@law("mask_tokens", hint="A fate is one more draw for each chosen token, not for its word, row or batch.")
@settings(max_examples=5)
@given(seed=seeds, whole_word=st.booleans())
def fates_are_independent(f, seed, whole_word):
    ids, word_ids = many()
    inputs, labels = masked(f, (ids, word_ids), seed, p=0.5, whole_word=whole_word)
    chosen, hidden = labels != -100, inputs == MASK

    def agree(one, other, what):
        """Of two chosen tokens the one is hidden (80 %) whatever becomes of the other."""
        both = chosen[one] & chosen[other]
        near((hidden[one] & hidden[other])[both].mean(), 0.64, both.sum() / 2, what)

    everywhere = slice(None)
    first, second = (everywhere, slice(0, None, 2)), (everywhere, slice(1, None, 2))
    agree(first, second, "both chosen pieces of a word replaced by [MASK]")
    agree(slice(None, -1), slice(1, None), "the same place of two rows replaced by [MASK]")
    agree((everywhere, slice(None, -2)), (everywhere, slice(2, None)), "two neighbours replaced by [MASK]")
    swapped = inputs[chosen & ~hidden & (inputs != ids)]
    near((swapped[1:] == swapped[:-1]).mean(), 1 / 7, len(swapped) / 2, "two random ids in a row alike")


@law("mask_tokens", hint="Draw from the generator that is passed in, and from nothing else.")
@given(seed=seeds)
def the_generator_decides(f, seed):
    case = many(4, 10)
    first, again, other = (masked(f, case, s, p=0.5) for s in (seed, seed, seed + 1))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all(), "the same generator, another result"
    assert (first[1] != other[1]).any(), "another generator, the same result"


@st.composite
def cases(draw):
    """hidden (M, D), embedding (V, D), bias (V,), targets (M,): half of the targets −100, never all."""
    M, D, V = (draw(sizes()) for _ in range(3))
    rng = np.random.default_rng(draw(seeds))
    targets = np.where(rng.random(M) < 0.5, rng.integers(0, V, M), IGNORE)
    targets[rng.integers(M)] = rng.integers(V)
    return draw(arrays(M, D)), draw(arrays(V, D)), draw(arrays(V)), targets


@law("mlm_loss", hint="The mean of logsumexp(logits) − logits[target] over the masked tokens only.")
@given(case=cases())
def equals_the_slow_loop(f, case):
    hidden, embedding, bias, targets = case
    losses = []
    for h, t in zip(hidden, targets, strict=True):
        if t != IGNORE:
            logits = [h @ e + b for e, b in zip(embedding, bias, strict=True)]
            losses.append(np.log(np.exp(logits).sum()) - logits[t])
    close(f(*case), np.mean(losses))


@law("mlm_loss", hint="No masked token: the loss is 0 and every gradient is an array of zeros, not NaN.")
@given(case=cases())
def nothing_masked_is_zero(f, case):
    hidden, embedding, bias, targets = case
    case = hidden, embedding, bias, np.full_like(targets, IGNORE)
    close(f(*case), 0.0)
    for gradient, argument in zip(f.grads(*case), case, strict=False):
        close(gradient, np.zeros(argument.shape))


@law(
    "mlm_loss",
    hint="By how much does each probability miss the truth, in the mean over masked tokens?",
)
@given(case=cases())
def gradients_are_the_slopes(f, case):
    for which, gradient in enumerate(f.grads(*case)):
        close(gradient, central_differences(f, case, which), rtol=1e-6, atol=1e-7)


@law("mlm_loss", hint="Take the largest logit off before exp.")
@given(case=cases(), shift=st.sampled_from([1e4, -1e4]))
def large_logits_do_not_overflow(f, case, shift):
    hidden, embedding, bias, targets = case
    far = hidden, embedding, bias + shift, targets  # the same shift for all words changes nothing
    close(f(*far), f(*case), rtol=1e-8, atol=1e-8)
    for gradient, wanted in zip(f.grads(*far), f.grads(*case), strict=True):
        close(gradient, wanted, rtol=1e-8, atol=1e-8)


@st.composite
def hard_cases(draw):
    """Logits up to ± 10,000: the true word far ahead, far behind, or one of many alike."""
    hidden, embedding, bias, targets = draw(cases())
    length = draw(st.sampled_from([1.0, 30.0, 1e4]))
    kind = draw(st.sampled_from(["any", "sure", "wrong", "alike"]))
    if kind in ("sure", "wrong"):
        bias = bias * 0
        true = targets[targets != IGNORE][0]
        bias[true] = length if kind == "sure" else -length
    elif kind == "alike":
        hidden = hidden * 0
    return hidden * (length if kind == "any" else 1), embedding, bias, targets


@law(
    "mlm_loss",
    hint="Clip nothing: where a word is sure the slope is nearly 0, where it is sure and wrong it is not.",
)
@given(case=hard_cases())
def gradients_hold_at_every_logit(f, case):
    hidden, embedding, bias, targets = case
    masked = targets != IGNORE
    logits = hidden[masked] @ embedding.T + bias
    G = np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True))
    G = (G - np.eye(len(bias))[targets[masked]]) / masked.sum()
    dhidden = np.zeros_like(hidden)
    dhidden[masked] = G @ embedding
    near = 1e-12 * (1 + np.abs(logits).max()) * (1 + np.abs(hidden).max())
    wanted = dhidden, G.T @ hidden[masked], G.sum(0)
    for gradient, slopes in zip(f.grads(*case), wanted, strict=True):
        close(gradient, slopes, rtol=1e-6, atol=near)


@law("mlm_loss", hint="float32 comes in, float32 goes out.")
@given(case=hard_cases())
def float32_is_enough(f, case):
    same_in_float32(f, case, near=1e-5 * (1 + np.abs(case[0]).max() ** 2))


def large_batch(M=3200, V=150, D=4):
    """Several panels of masked rows, the last one not full, and some rows that predict nothing."""
    rng = np.random.default_rng(0)
    targets = np.where(np.arange(M) % 16, rng.integers(0, V, M), IGNORE)  # 3,000 masked
    return rng.standard_normal((M, D)), rng.standard_normal((V, D)), rng.standard_normal(V), targets


@law("mlm_loss", hint="Walk to the end: the last panel of masked rows may be smaller than the others.")
def many_panels_give_one_answer(f):
    hidden, embedding, bias, targets = case = large_batch()
    masked = targets != IGNORE
    logits, right = hidden[masked] @ embedding.T + bias, targets[masked]
    log_p = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    close(f(*case), -log_p[np.arange(len(right)), right].mean())
    G = (np.exp(log_p) - np.eye(len(bias))[right]) / len(right)
    for gradient, slopes in zip(f.grads(*case)[1:], (G.T @ hidden[masked], G.sum(0)), strict=True):
        close(gradient, slopes, rtol=1e-7, atol=1e-10)


@law("mlm_loss", hint="Make the logits of a panel of rows, and its gradients before the next panel.")
def no_more_than_panels_is_held(f):
    hidden, _, bias, targets = case = large_batch()
    masked, V = (targets != IGNORE).sum(), len(bias)
    most = enough(*case[:3], tokens=len(hidden))
    holds_tiles_only(f, case, {}, int(masked * V), "the logits", most, 256 * V)


test_laws = obeys(mlm)

ids, words, rng = np.full((2, 3), 6), np.zeros((2, 3), dtype=int), np.random.default_rng(0)
h, e, b, t = np.ones((3, 2)), np.ones((4, 2)), np.ones(4), np.array([0, IGNORE, 3])
test_refusals = refuses(
    mlm,
    [
        ("mask_tokens", "shapes", (ids, words[:1], rng, 9, 4, SPECIAL), {}, "word_ids must have shape"),
        ("mask_tokens", "float ids", (ids * 1.0, words, rng, 9, 4, SPECIAL), {}, "ids must have an integer"),
        ("mask_tokens", "id too large", (ids, words, rng, 6, 4, SPECIAL), {}, "ids must lie between 0 and"),
        ("mask_tokens", "mask id", (ids, words, rng, 9, 9, SPECIAL), {}, "special_ids and mask_id must lie"),
        (
            "mask_tokens",
            "p",
            (ids, words, rng, 9, 4, SPECIAL),
            {"p": 1.5},
            "p must be a probability, got 1.5",
        ),
        ("mask_tokens", "p NaN", (ids, words, rng, 9, 4, SPECIAL), {"p": np.nan}, "p must be a probability"),
        ("mask_tokens", "a seed", (ids, words, 0, 9, 4, SPECIAL), {}, "rng must be a numpy.random.Generator"),
        ("mask_tokens", "all special", (ids, words, rng, 9, 4, range(9)), {}, "special_ids must leave"),
        ("mlm_loss", "hidden shape", (h[0], e, b, t), {}, "hidden must have shape"),
        ("mlm_loss", "width", (h, e[:, :1], b, t), {}, "embedding must have shape"),
        ("mlm_loss", "bias", (h, e, b[1:], t), {}, "bias must have shape"),
        ("mlm_loss", "float targets", (h, e, b, t * 1.0), {}, "targets must have an integer dtype"),
        (
            "mlm_loss",
            "target V",
            (h, e, b, t + 1),
            {},
            "targets must be -100 or lie between 0 and 3, got -99",
        ),
        ("mlm_loss", "target −1", (h, e, b, np.array([0, -1, 3])), {}, "targets must be -100 .* got -1"),
        ("mlm_loss", "NaN", (h * np.nan, e, b, t), {}, "hidden must not contain NaN"),
        ("mlm_loss", "integers", (h.astype(int), e, b, t), {}, "hidden must have a floating dtype"),
    ],
)


def example(dtype=torch.float64, M=7, D=5, V=11):
    hidden, embedding, bias = (torch.randn(*s, dtype=dtype) for s in ((M, D), (V, D), (V,)))
    return hidden, embedding, bias, torch.tensor([3, IGNORE, 0, 10, IGNORE, 3, IGNORE])


def test_equals_torch_cross_entropy():
    """Outside truth: all logits, then torch's own ignore_index and mean."""
    hidden, embedding, bias, targets = example()
    inputs = [x.requires_grad_() for x in (hidden, embedding, bias)]
    expected = torch.nn.functional.cross_entropy(hidden @ embedding.T + bias, targets, ignore_index=IGNORE)
    wanted = torch.autograd.grad(expected, inputs)
    value, grads = mlm_loss_np(*(x.detach().numpy() for x in (*inputs, targets)))
    close(value, expected.item())
    found = torch.autograd.grad(mlm_loss(*inputs, targets), inputs)
    for one, two, three in zip(grads, found, wanted, strict=True):
        close(one, three)
        close(two, three)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision(dtype, rtol):
    hidden, embedding, bias, targets = example(dtype)
    loss = mlm_loss(hidden, embedding, bias, targets)
    assert loss.dtype == dtype
    exact = mlm_loss(hidden.double(), embedding.double(), bias.double(), targets)
    close(loss.double(), exact, rtol=rtol)


def test_numpy_keeps_float32():
    x = [a.numpy() for a in example(torch.float32)]
    assert all(g.dtype == np.float32 for g in mlm_loss_np(*x)[1])


def test_backward_twice_frozen_side_and_strides():
    hidden, embedding, bias, targets = example()
    hidden = hidden.T.contiguous().T.requires_grad_()
    loss = mlm_loss(hidden, embedding, bias, targets.repeat_interleave(2)[::2])
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    close(hidden.grad, 2 * once)
    assert embedding.grad is None and not once[targets == IGNORE].any()


def test_nothing_masked_can_be_added_to_another_loss():
    hidden, embedding, bias, targets = example()
    hidden.requires_grad_()
    loss = mlm_loss(hidden, embedding, bias, torch.full_like(targets, IGNORE))
    assert loss.item() == 0 and loss.requires_grad
    (loss + hidden.sum()).backward()
    close(hidden.grad, np.ones(hidden.shape))
    assert mlm_loss(hidden[:0], embedding, bias, targets[:0]).item() == 0
    assert mlm_loss_np(np.ones((0, 2)), e, b, np.zeros(0, dtype=int))[0] == 0


def test_only_masked_rows_are_multiplied():
    """An infinite hidden state in a row that is not masked takes no part."""
    hidden, embedding, bias, targets = example()
    expected = mlm_loss(hidden, embedding, bias, targets)
    hidden[targets == IGNORE] = torch.inf
    close(mlm_loss(hidden, embedding, bias, targets), expected)


def test_integer_kinds_and_other_collections_of_special_ids():
    case = many(3, 4)
    wanted = masked(mask_tokens, case, 0)
    for dtype in (np.int32, np.uint8):
        found = masked(mask_tokens, [a.astype(dtype) for a in case], 0, special_ids=[*SPECIAL, 4])
        assert all((x == y).all() and x.dtype == np.int64 for x, y in zip(found, wanted, strict=True))
    assert masked(mask_tokens, (case[0][:0], case[1][:0]), 0)[0].shape == (0, 8)


def test_the_mask_is_never_masked_even_when_special_ids_forget_it():
    ids, word_ids = many(2, 4)
    ids[:, 3] = MASK
    inputs, labels = masked(mask_tokens, (ids, word_ids), 0, p=1.0, special_ids=(0, 1, 2, 3))
    assert (labels[:, 3] == IGNORE).all() and (inputs[:, 3] == MASK).all()
