"""Plausible wrong ways of making false pairs and of scoring them."""

import numpy as np
import torch
import torch.nn.functional as F

from minivlp.itm import derangement, hard_negatives, itm_loss, itm_loss_np
from tests.laws import bug

STAYS, LIKELY, GENERATOR = (
    "nobody_stays_and_everybody_is_there",
    "every_derangement_is_equally_likely",
    "the_generator_decides",
)
ITSELF, SOFTMAX = "never_itself_nor_an_equal_id", "drawn_by_the_softmax_of_the_row"
COLUMNS, SHARP = "the_generator_decides_the_columns", "a_sharp_similarity_still_has_negatives"
ROWS, HARD, SINGLE = "rows_draw_independently", "gradients_hold_at_every_logit", "float32_is_enough"
LOOP, SLOPES, OVERFLOW = "equals_the_slow_loop", "gradients_are_the_slopes", "large_logits_do_not_overflow"


@bug("derangement", STAYS, "A permutation: one pair on average stays true under label 0.", rung="plain")
def permutation(n, rng):
    return rng.permutation(n)


@bug("derangement", STAYS, "Another index for each by itself: some images twice, some never.", rung="plain")
def independent(n, rng):
    return (np.arange(n) + rng.integers(1, n, n)) % n


@bug(
    "derangement",
    STAYS,
    "Images overwritten in place: a source may have been overwritten before.",
    rung="plain",
)
def in_place(n, rng):
    images = np.arange(n)
    for i in range(n):
        images[i] = images[(i + rng.integers(1, n)) % n]
    return images


@bug(
    "derangement",
    STAYS,
    "Fixed points are swapped with their neighbour, unless they are the last.",
    rung="plain",
)
def repaired(n, rng):
    index = rng.permutation(n)
    for i in range(n - 1):
        if index[i] == i:
            index[[i, i + 1]] = index[[i + 1, i]]
    return index


@bug(
    "derangement",
    LIKELY,
    "A shift: the batch keeps its order, so few false pairs are ever seen.",
    rung="plain",
)
def shift(n, rng):
    return (np.arange(n) + rng.integers(1, n)) % n


@bug("derangement", LIKELY, "Sattolo's shuffle: one cycle only, two pairs are never swapped.", rung="plain")
def one_cycle(n, rng):
    index = np.arange(n)
    for i in range(n - 1, 0, -1):
        j = rng.integers(i)
        index[[i, j]] = index[[j, i]]
    return index


@bug("derangement", LIKELY, "Always the next pair.", rung="plain")
def roll(n, rng):
    return np.roll(np.arange(n), -1)


@bug("derangement", GENERATOR, "NumPy's global random state is used.", rung="plain")
def global_state(n, rng):
    return derangement(n, np.random.default_rng(np.random.randint(2**31)))


@bug("hard_negatives", ITSELF, "The diagonal is left in: the true image under label 0.", rung="plain")
def diagonal_left_in(similarity, rng, ids=None):
    return (similarity + rng.gumbel(size=similarity.shape)).argmax(1)


@bug(
    "hard_negatives",
    ITSELF,
    "ids are ignored: captions of one image are negatives of each other.",
    rung="plain",
)
def ids_ignored(similarity, rng, ids=None):
    return hard_negatives(similarity, rng)


@bug("hard_negatives", ITSELF, "The diagonal of the caller's similarity is filled with −∞.", rung="plain")
def in_place_diagonal(similarity, rng, ids=None):
    columns = hard_negatives(similarity, rng, ids)
    np.fill_diagonal(similarity, -np.inf)
    return columns


@bug(
    "hard_negatives",
    SOFTMAX,
    "Always the most similar: mislabelled pairs are drawn in every epoch.",
    rung="plain",
)
def hardest(similarity, rng, ids=None):
    ids = np.arange(len(similarity)) if ids is None else ids
    return np.where(ids[:, None] == ids, -np.inf, similarity).argmax(1)


@bug("hard_negatives", SOFTMAX, "Uniform: the similarity is not used.", rung="plain")
def uniform(similarity, rng, ids=None):
    return hard_negatives(similarity * 0, rng, ids)


@bug(
    "hard_negatives",
    SOFTMAX,
    "The softmax of the column: texts for images instead of images for texts.",
    rung="plain",
)
def columns_for_rows(similarity, rng, ids=None):
    return hard_negatives(similarity.T, rng, ids)


@bug("hard_negatives", COLUMNS, "NumPy's global random state is used.", rung="plain")
def global_columns(similarity, rng, ids=None):
    return hard_negatives(similarity, np.random.default_rng(np.random.randint(2**31)), ids)


@bug(
    "hard_negatives",
    SHARP,
    "The diagonal is set to 0 after the softmax: 0 / 0, or the small constant decides.",
    rung="plain",
)
def masked_after_the_softmax(similarity, rng, ids=None):
    ids = np.arange(len(similarity)) if ids is None else ids
    weights = np.exp(similarity - similarity.max(1, keepdims=True)) + 1e-12
    weights = np.where(ids[:, None] == ids, 0, weights)
    weights /= weights.sum(1, keepdims=True)
    return np.array([rng.choice(len(ids), p=w) for w in weights])


@bug("itm_loss", LOOP, "Label 1 is taken for a false pair.")
def labels_swapped(logits, labels):
    return itm_loss(logits, 1 - labels)


@bug("itm_loss", LOOP, "The sum, not the mean: the weight of matching grows with the batch.")
def summed(logits, labels):
    return itm_loss(logits, labels) * len(logits)


@bug("itm_loss", LOOP, "Softmax twice: cross-entropy is given probabilities.")
def softmax_twice(logits, labels):
    return itm_loss(logits.softmax(-1), labels)


@bug("itm_loss", LOOP, "Two sigmoids, one for each column, instead of one softmax.")
def two_sigmoids(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels.long(), 2).to(logits.dtype))


@bug("itm_loss", SLOPES, "The gradient is not divided by B.", rung="np")
def gradient_of_the_sum(logits, labels):
    value, (gradient,) = itm_loss_np(logits, labels)
    return value, (gradient * len(logits),)


@bug("itm_loss", SLOPES, "The one-hot is forgotten in the gradient.", rung="np")
def softmax_only(logits, labels):
    value, (gradient,) = itm_loss_np(logits, labels)
    gradient[np.arange(len(labels)), labels] += 1 / len(labels)
    return value, (gradient,)


@bug("itm_loss", OVERFLOW, "exp of the logits as they come.", rung="np")
def plain_exponential(logits, labels):
    rows, p = np.arange(len(labels)), np.exp(logits)
    p = p / p.sum(1, keepdims=True)
    value = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    return value, (p / len(labels),)


@bug("hard_negatives", ROWS, "One vector of noise for all rows: they favour the same columns.", rung="plain")
def one_noise_for_all_rows(similarity, rng, ids=None):
    ids = np.arange(len(similarity)) if ids is None else ids
    return np.where(ids[:, None] == ids, -np.inf, similarity + rng.gumbel(size=len(similarity))).argmax(1)


@bug("hard_negatives", ROWS, "One uniform number for all rows, by the inverse of the sums.", rung="plain")
def one_uniform_for_all_rows(similarity, rng, ids=None):
    ids = np.arange(len(similarity)) if ids is None else ids
    z = np.where(ids[:, None] == ids, -np.inf, similarity)
    sums = np.exp(z - z.max(1, keepdims=True)).cumsum(1)
    return (sums <= rng.random() * sums[:, -1:]).sum(1)


@bug("hard_negatives", ROWS, "Columns are drawn without replacement where that is possible.", rung="plain")
def without_replacement(similarity, rng, ids=None):
    ids = np.arange(len(similarity)) if ids is None else ids
    legal = ids[:, None] != ids
    left, found = np.ones(len(ids), bool), np.zeros(len(ids), np.int64)
    for row in rng.permutation(len(ids)):
        open_ = legal[row] & left if (legal[row] & left).any() else legal[row]
        found[row] = np.where(open_, similarity[row] + rng.gumbel(size=len(ids)), -np.inf).argmax()
        left[found[row]] = False
    return found


@bug("itm_loss", HARD, "No gradient where an answer is sure and wrong.", rung="np")
def nothing_where_sure_and_wrong(logits, labels):
    value, (gradient,) = itm_loss_np(logits, labels)
    return value, (np.where(np.abs(gradient) * len(labels) > 1 - 1e-9, 0, gradient),)


@bug("itm_loss", HARD, "Logits are cut off at ± 20 in the gradient.")
def clipped_logits(logits, labels):
    near = logits - logits.mean(1, keepdim=True).detach()
    kept = near.clamp(-10, 10)
    return itm_loss(kept + (near - kept).detach(), labels)


@bug("itm_loss", HARD, "Probabilities are held above 1e-12 before the log.")
def clipped_probabilities(logits, labels):
    p = logits.softmax(1).clamp_min(1e-12)
    return -p.log().gather(1, labels.long()[:, None]).mean()


@bug("itm_loss", SINGLE, "The one-hot labels are float64, and float32 leaves as float64.")
def labels_in_float64(logits, labels):
    return -(F.one_hot(labels.long(), 2).to(torch.float64) * logits.log_softmax(1)).sum(1).mean()
