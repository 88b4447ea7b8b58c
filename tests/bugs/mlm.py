"""Plausible wrong ways of masking words and of predicting them."""

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from minivlp.mlm import mask_tokens, mlm_loss, mlm_loss_np
from tests.laws import bug

TRUE, OUT, WHOLE = "labels_hold_the_true_ids", "special_tokens_stay_out", "words_are_chosen_whole"
RATES, COINS, GENERATOR = "the_rates_are_p_and_80_10_10", "coins_are_independent", "the_generator_decides"
LOOP, ZERO, SLOPES = "equals_the_slow_loop", "nothing_masked_is_zero", "gradients_are_the_slopes"
OVERFLOW, FATES = "large_logits_do_not_overflow", "fates_are_independent"
HARD, SINGLE = "gradients_hold_at_every_logit", "float32_is_enough"
MANY, HELD = "many_panels_give_one_answer", "no_more_than_panels_is_held"


def hide(ids, chosen, rng, vocab_size, mask_id, special_ids, mask=0.8, keep=0.9, draw=None):
    """80/10/10 on the chosen tokens, with its choices open."""
    fate = rng.random(ids.shape)
    draw = np.setdiff1d(np.arange(vocab_size), special_ids) if draw is None else draw
    inputs = np.where(chosen & (fate < mask), mask_id, ids)
    swapped = chosen & (fate >= keep)
    inputs[swapped] = rng.choice(draw, swapped.sum())
    return inputs, np.where(chosen, ids, -100)


def choose(ids, word_ids, rng, special_ids, p, whole_word, rows=None):
    """The chosen tokens; `rows` coins for words are drawn and repeated over the batch."""
    if whole_word:
        coin = rng.random((rows or len(ids), word_ids.max(initial=0) + 1))
        coin = np.take_along_axis(np.resize(coin, (len(ids), coin.shape[1])), word_ids.clip(0), axis=1)
    else:
        coin = rng.random(ids.shape)
    return (coin < p) & (word_ids >= 0) & ~np.isin(ids, special_ids)


@bug("mask_tokens", TRUE, "The caller's ids are overwritten.", rung="plain")
def in_place(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    inputs, labels = mask_tokens(ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word)
    ids[:] = inputs
    return ids, labels


@bug("mask_tokens", TRUE, "Labels are taken after the masking: the model is to predict [MASK].", rung="plain")
def labels_after_masking(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    inputs, labels = mask_tokens(ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word)
    return inputs, np.where(labels != -100, inputs, -100)


@bug("mask_tokens", TRUE, "The 10 % that stay get no label; so do the 10 % replaced.", rung="plain")
def labels_only_under_the_mask(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    inputs, labels = mask_tokens(ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word)
    return inputs, np.where(inputs == mask_id, labels, -100)


@bug("mask_tokens", OUT, "Special tokens and padding are masked like words.", rung="plain")
def specials_masked(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    chosen = choose(ids, word_ids.clip(0), rng, [], p, whole_word)
    return hide(ids, chosen, rng, vocab_size, mask_id, special_ids)


@bug(
    "mask_tokens", OUT, "Only word_ids is looked at: [UNK] and a [MASK] in the text are masked.", rung="plain"
)
def unknown_masked(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    chosen = choose(ids, word_ids, rng, [], p, whole_word)
    return hide(ids, chosen, rng, vocab_size, mask_id, special_ids)


@bug("mask_tokens", OUT, "The random word may be [PAD] or [CLS].", rung="plain")
def any_replacement(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    chosen = choose(ids, word_ids, rng, special_ids, p, whole_word)
    return hide(ids, chosen, rng, vocab_size, mask_id, special_ids, draw=np.arange(vocab_size))


@bug("mask_tokens", WHOLE, "whole_word is ignored: pieces are masked one by one.", rung="plain")
def always_pieces(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    return mask_tokens(ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word=False)


@bug("mask_tokens", RATES, "A word is chosen when any of its pieces is: long words too often.", rung="plain")
def any_piece_chooses(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    chosen = choose(ids, word_ids, rng, special_ids, p, False)
    if whole_word:
        same = (word_ids[:, :, None] == word_ids[:, None]) & chosen[:, None]
        chosen = same.any(2) & (word_ids >= 0) & ~np.isin(ids, special_ids)
    return hide(ids, chosen, rng, vocab_size, mask_id, special_ids)


@bug("mask_tokens", RATES, "Every chosen token becomes [MASK].", rung="plain")
def all_masked(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    chosen = choose(ids, word_ids, rng, special_ids, p, whole_word)
    return hide(ids, chosen, rng, vocab_size, mask_id, special_ids, mask=1.0, keep=1.0)


@bug("mask_tokens", RATES, "80 % [MASK] and 20 % random: none is kept.", rung="plain")
def none_kept(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    chosen = choose(ids, word_ids, rng, special_ids, p, whole_word)
    return hide(ids, chosen, rng, vocab_size, mask_id, special_ids, keep=0.8)


@bug("mask_tokens", RATES, "One random word a batch stands in for all that are replaced.", rung="plain")
def one_replacement(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    chosen = choose(ids, word_ids, rng, special_ids, p, whole_word)
    ordinary = np.setdiff1d(np.arange(vocab_size), special_ids)
    return hide(
        ids, chosen, rng, vocab_size, mask_id, special_ids, draw=ordinary[[rng.integers(len(ordinary))]]
    )


@bug("mask_tokens", COINS, "One coin per word index for the whole batch.", rung="plain")
def rows_alike(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    chosen = choose(ids, word_ids, rng, special_ids, p, whole_word, rows=1)
    return hide(ids, chosen, rng, vocab_size, mask_id, special_ids)


@bug("mask_tokens", COINS, "Words are masked whole even when whole_word is False.", rung="plain")
def always_whole(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    return mask_tokens(ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word=True)


@bug("mask_tokens", GENERATOR, "NumPy's global random state is used.", rung="plain")
def global_state(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    rng = np.random.default_rng(np.random.randint(2**31))
    return mask_tokens(ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word)


@bug(
    "mask_tokens",
    GENERATOR,
    "A new generator with seed 0 at every call: the same words every epoch.",
    rung="plain",
)
def same_every_time(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    rng = np.random.default_rng(0)
    return mask_tokens(ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word)


@bug("mlm_loss", LOOP, "The sum is divided by all tokens, not by the masked ones.")
def mean_over_all(hidden, embedding, bias, targets):
    return mlm_loss(hidden, embedding, bias, targets) * (targets != -100).sum() / len(targets)


@bug("mlm_loss", LOOP, "−100 is clamped to 0: unmasked tokens are to predict [PAD].")
def ignored_become_padding(hidden, embedding, bias, targets):
    return F.cross_entropy(hidden @ embedding.T + bias, targets.clamp(0))


@bug("mlm_loss", LOOP, "The decoder's bias is forgotten.")
def no_bias(hidden, embedding, bias, targets):
    return mlm_loss(hidden, embedding, bias * 0, targets)


@bug(
    "mlm_loss",
    ZERO,
    "A mean over nothing: the loss is NaN when no word is hidden, and so is every mean it enters.",
)
def mean_over_nothing(hidden, embedding, bias, targets):
    return F.cross_entropy(hidden @ embedding.T + bias, targets, ignore_index=-100)


@bug("mlm_loss", ZERO, "A constant zero, cut from the graph: backward raises, or other ranks wait.")
def detached_zero(hidden, embedding, bias, targets):
    if (targets == -100).all():
        return torch.tensor(0.0, dtype=hidden.dtype)
    return mlm_loss(hidden, embedding, bias, targets)


@bug(
    "mlm_loss",
    SLOPES,
    "The embedding is detached: the tied matrix does not learn from the words it predicts.",
)
def embedding_detached(hidden, embedding, bias, targets):
    return mlm_loss(hidden, embedding.detach() + embedding * 0, bias, targets)


@bug("mlm_loss", SLOPES, "The one-hot is forgotten in the gradient.", rung="np")
def softmax_only(hidden, embedding, bias, targets):
    value, (_, dE, db) = mlm_loss_np(hidden, embedding, bias, targets)
    mask = (targets != -100)[:, None]
    logits = hidden @ embedding.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    return value, ((p / p.sum(1, keepdims=True) * mask / max(mask.sum(), 1)) @ embedding, dE, db)


@bug("mlm_loss", SLOPES, "The gradient is not divided by the number of masked tokens.", rung="np")
def gradient_of_the_sum(hidden, embedding, bias, targets):
    value, grads = mlm_loss_np(hidden, embedding, bias, targets)
    return value, tuple(g * (targets != -100).sum() for g in grads)


@bug("mlm_loss", OVERFLOW, "exp of the logits as they come.", rung="np")
def plain_exponential(hidden, embedding, bias, targets):
    masked = targets != -100
    h, t, K = hidden[masked], targets[masked], max(masked.sum(), 1)
    e = np.exp(h @ embedding.T + bias)
    p = e / e.sum(1, keepdims=True)
    value = -np.log(p[np.arange(len(t)), t]).sum() / K
    p[np.arange(len(t)), t] -= 1
    dhidden = np.zeros_like(hidden)
    dhidden[masked] = p @ embedding / K
    return value, (dhidden, p.T @ h / K, p.sum(0) / K)


@bug("mlm_loss", SLOPES, "Panel by panel: the decoder's bias keeps the gradient of the last one.", rung="np")
def bias_of_the_last_panel(hidden, embedding, bias, targets):
    value, (dhidden, dE, _) = mlm_loss_np(hidden, embedding, bias, targets)
    masked = np.flatnonzero(targets != -100)
    panel = masked[(len(masked) - 1) // 2 * 2 :] if len(masked) else masked
    last = mlm_loss_np(hidden[panel], embedding, bias, targets[panel])[1][2]
    return value, (dhidden, dE, last * len(panel) / max(len(masked), 1))


@bug("mlm_loss", SLOPES, "The masked rows' gradients are never put back in their places.", rung="np")
def rows_not_put_back(hidden, embedding, bias, targets):
    value, (dhidden, dE, db) = mlm_loss_np(hidden, embedding, bias, targets)
    rows = dhidden[targets != -100]
    return value, (np.concatenate([rows, np.zeros((len(hidden) - len(rows), hidden.shape[1]))]), dE, db)


@bug(
    "mlm_loss", SLOPES, "Rows that predict nothing receive a gradient: the softmax is not masked.", rung="np"
)
def gradient_everywhere(hidden, embedding, bias, targets):
    value, (dhidden, dE, db) = mlm_loss_np(hidden, embedding, bias, targets)
    logits = hidden @ embedding.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    G = p / p.sum(1, keepdims=True) / max((targets != -100).sum(), 1)
    return value, (np.where((targets != -100)[:, None], dhidden, G @ embedding), dE, db)


def with_fates(fate, ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word):
    """Tokens chosen as they should be, with fates (B, L) that `fate(coins of words, coin)` makes."""
    words = rng.random((len(ids), word_ids.max(initial=0) + 1))
    coin = np.take_along_axis(words, word_ids.clip(0), axis=1) if whole_word else rng.random(ids.shape)
    chosen = (coin < p) & (word_ids >= 0) & ~np.isin(ids, [*special_ids, mask_id])
    drawn = fate(coin)
    inputs = np.where(chosen & (drawn < 0.8), mask_id, ids)
    swapped = chosen & (drawn >= 0.9)
    ordinary = np.setdiff1d(np.arange(vocab_size), [*special_ids, mask_id])
    inputs[swapped] = rng.choice(ordinary, swapped.sum())
    return inputs, np.where(chosen, ids, -100)


@bug("mask_tokens", FATES, "One coin chooses a word and decides its fate: its pieces share it.", rung="plain")
def one_coin_for_both(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    rest = ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word
    return with_fates(lambda coin: np.minimum(coin / max(p, 1e-9), 1), *rest)


@bug("mask_tokens", FATES, "A fate is drawn for a place of the row, the same in all rows.", rung="plain")
def one_fate_for_all_rows(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    rest = ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word
    return with_fates(lambda coin: np.broadcast_to(rng.random(coin.shape[1]), coin.shape), *rest)


@bug("mask_tokens", FATES, "A fate is drawn for a row, and all its chosen tokens share it.", rung="plain")
def one_fate_for_a_row(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    rest = ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word
    return with_fates(lambda coin: np.broadcast_to(rng.random((len(coin), 1)), coin.shape), *rest)


@bug("mask_tokens", FATES, "Random ids are drawn once and dealt out in their order.", rung="plain")
def sorted_replacements(ids, word_ids, rng, vocab_size, mask_id, special_ids, p=0.15, whole_word=True):
    inputs, labels = mask_tokens(ids, word_ids, rng, vocab_size, mask_id, special_ids, p, whole_word)
    swapped = (labels != -100) & (inputs != mask_id) & (inputs != ids)
    inputs[swapped] = np.sort(inputs[swapped])
    return inputs, labels


def with_slopes(hidden, embedding, bias, targets, change):
    """The right value, the gradients of softmax − one-hot (K, V) after a change."""
    masked = targets != -100
    value = mlm_loss_np(hidden, embedding, bias, targets)[0]
    logits = hidden[masked] @ embedding.T + bias
    P = np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True))
    G = change(P, np.eye(len(bias))[targets[masked]]) / max(masked.sum(), 1)
    dhidden = np.zeros_like(hidden)
    dhidden[masked] = G @ embedding
    return value, (dhidden, G.T @ hidden[masked], G.sum(0))


@bug("mlm_loss", HARD, "A word that is sure, right or wrong, receives no gradient.", rung="np")
def nothing_where_sure(*case):
    return with_slopes(*case, lambda P, one: np.where((P * one).sum(1, keepdims=True) < 1e-9, 0, P - one))


@bug("mlm_loss", HARD, "Probabilities are held above 1e-7 in the gradient.", rung="np")
def clipped_probabilities(*case):
    return with_slopes(*case, lambda P, one: P.clip(1e-7) - one)


@bug("mlm_loss", HARD, "Logits are cut off at ± 50 in the gradient.")
def clipped_logits(hidden, embedding, bias, targets):
    masked = targets != -100
    logits = hidden[masked] @ embedding.T + bias
    near = logits.clamp(-50, 50)
    logits = near + (logits - near).detach()
    return F.cross_entropy(logits, targets[masked], reduction="sum") / max(len(logits), 1)


@bug("mlm_loss", SINGLE, "The divisor is a float64 tensor of one entry a row: float32 leaves as float64.")
def mean_in_float64(hidden, embedding, bias, targets):
    masked = targets != -100
    losses = F.cross_entropy(hidden[masked] @ embedding.T + bias, targets[masked], reduction="none")
    return (losses * torch.full((len(losses),), 1 / max(len(losses), 1), dtype=torch.float64)).sum()


@bug("mlm_loss", MANY, "Its own panels, of 256: what does not fill the last one is left out.", rung="fused")
def rest_of_its_own_panels_dropped(hidden, embedding, bias, targets):
    K = int((targets != -100).sum())
    late = (targets != -100).cumsum(0) > (K // 256 * 256 or K)
    return mlm_loss(hidden, embedding, bias, targets.masked_fill(late, -100))


@bug("mlm_loss", HELD, "The plain loss: all logits are made, and their log-softmax is kept.", rung="fused")
def plain(hidden, embedding, bias, targets):
    return mlm_loss(hidden, embedding, bias, targets)


@bug("mlm_loss", HELD, "Nothing is kept, but all logits are made again in the backward pass.", rung="fused")
def made_twice(*case):
    return torch.utils.checkpoint.checkpoint(mlm_loss, *case, use_reentrant=False)


@bug("mlm_loss", HELD, "Panel by panel, but autograd keeps the log-softmax of each.", rung="fused")
def panels_kept(hidden, embedding, bias, targets):
    masked = (targets != -100).nonzero()[:, 0]
    total = 0 * (hidden.sum() + embedding.sum() + bias.sum())
    for rows in masked.split(256):
        logits = hidden[rows] @ embedding.T + bias
        total = total + F.cross_entropy(logits, targets[rows], reduction="sum")
    return total / max(len(masked), 1)
