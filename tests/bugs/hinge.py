"""Plausible wrong hinge losses."""

import numpy as np
import torch

from minivlp.hinge import hinge, hinge_np
from tests.laws import bug

SEPARATED, EXCHANGE = "separated_pairs_cost_nothing", "images_and_texts_exchange"
LOOP, SLOPES, TIES = (
    "equals_the_slow_loop",
    "gradients_are_the_slopes",
    "the_first_of_equal_negatives_wins",
)
ZERO, ONCE, SINGLE = (
    "a_cost_of_zero_has_no_gradient",
    "equal_and_large_costs_count_once_each",
    "float32_is_enough",
)


def costs(images, texts, margin):
    """Rows, columns (transposed), 0 on the diagonal."""
    S = images @ texts.T
    pair = torch.eye(len(S), dtype=torch.bool)
    return [(margin + T - T.diagonal()[:, None]).relu().masked_fill(pair, 0) for T in (S, S.T)]


@bug("hinge", SEPARATED, "The diagonal is left in: every pair is its own negative and costs the margin.")
def pair_against_itself(images, texts, margin=0.2, hardest=True):
    S = images @ texts.T
    lines = [(margin + T - T.diagonal()[:, None]).relu() for T in (S, S.T)]
    return sum(c.max(1).values.sum() if hardest else c.sum() for c in lines)


@bug("hinge", SEPARATED, "Similarities taken for distances: the pair is pushed apart.")
def distances(images, texts, margin=0.2, hardest=True):
    return hinge(-images, texts, margin, hardest)


@bug("hinge", EXCHANGE, "Only images look for texts.")
def one_direction(images, texts, margin=0.2, hardest=True):
    rows, _ = costs(images, texts, margin)
    return rows.max(1).values.sum() if hardest else rows.sum()


@bug("hinge", EXCHANGE, "Both directions take the maximum along the rows.")
def rows_twice(images, texts, margin=0.2, hardest=True):
    S = images @ texts.T
    pair = torch.eye(len(S), dtype=torch.bool)
    lines = [(margin + S - own).relu().masked_fill(pair, 0) for own in (S.diagonal()[:, None], S.diagonal())]
    return sum(c.max(1).values.sum() if hardest else c.sum() for c in lines)


@bug("hinge", LOOP, "All negatives count, whatever `hardest` says.")
def always_the_sum(images, texts, margin=0.2, hardest=True):
    return sum(c.sum() for c in costs(images, texts, margin))


@bug("hinge", LOOP, "One hardest negative a pair, not one in each direction.")
def hardest_of_both_directions(images, texts, margin=0.2, hardest=True):
    rows, columns = costs(images, texts, margin)
    return torch.maximum(rows, columns).max(1).values.sum() if hardest else (rows + columns).sum()


@bug("hinge", LOOP, "The mean over the batch.")
def mean_over_batch(images, texts, margin=0.2, hardest=True):
    return hinge(images, texts, margin, hardest) / len(images)


@bug("hinge", LOOP, "The hardest negative of all lines, one for the whole batch.")
def hardest_of_the_batch(images, texts, margin=0.2, hardest=True):
    return sum(c.max() if hardest else c.sum() for c in costs(images, texts, margin))


@bug("hinge", LOOP, "The squared hinge of support vector machines.")
def squared(images, texts, margin=0.2, hardest=True):
    lines = [c.square() for c in costs(images, texts, margin)]
    return sum(c.max(1).values.sum() if hardest else c.sum() for c in lines)


@bug("hinge", LOOP, "A margin twice as large: it is added to the negative and taken from the pair.")
def margin_twice(images, texts, margin=0.2, hardest=True):
    return hinge(images, texts, 2 * margin, hardest)


@bug("hinge", SLOPES, "The pair's own score taken as a constant: negatives are pushed, pairs are not pulled.")
def pair_detached(images, texts, margin=0.2, hardest=True):
    S = images @ texts.T
    pair = torch.eye(len(S), dtype=torch.bool)
    own = S.diagonal().detach()[:, None]
    lines = [(margin + T - own).relu().masked_fill(pair, 0) for T in (S, S.T)]
    return sum(c.max(1).values.sum() if hardest else c.sum() for c in lines)


@bug("hinge", SLOPES, "The −1 of the diagonal once a line, however many costs count.", rung="np")
def one_pull_a_line(images, texts, margin=0.2, hardest=True):
    value, grads = hinge_np(images, texts, margin, hardest)
    if hardest:
        return value, grads
    S = images @ texts.T
    G = np.zeros_like(S)
    for own in (S.diagonal()[:, None], S.diagonal()):
        counts = (margin + S - own > 0) & ~np.eye(len(S), dtype=bool)
        G += counts - np.diag(counts.any(1 if own.ndim == 2 else 0).astype(float))
    return value, (G @ texts, G.T @ images)


@bug("hinge", SLOPES, "dy takes G where its transpose belongs.", rung="np")
def not_transposed(images, texts, margin=0.2, hardest=True):
    value, (dimages, _) = hinge_np(images, texts, margin, hardest)
    G = hinge_np(images @ texts.T, np.eye(len(images)), margin, hardest)[1][0]
    return value, (dimages, G @ images)


@bug("hinge", TIES, "amax splits the gradient between equally hard negatives.")
def split_between_ties(images, texts, margin=0.2, hardest=True):
    return sum(c.amax(1).sum() if hardest else c.sum() for c in costs(images, texts, margin))


def with_counts(images, texts, margin, hardest, counting):
    """The right value; G from the costs that `counting(cost)` lets count, the first of equal ones."""
    B, S = len(images), images @ texts.T
    G = np.zeros_like(S)
    for axis in (1, 0):
        cost = margin + S - np.expand_dims(S.diagonal(), axis)
        counts = counting(cost) * (1 - np.eye(B))
        if hardest:
            cost = np.where(np.eye(B), -np.inf, cost)
            first = np.expand_dims(cost.argmax(axis), axis)
            counts = counts * (np.expand_dims(np.arange(B), 1 - axis) == first)
        G += counts - np.diag(counts.sum(axis))
    return hinge_np(images, texts, margin, hardest)[0], (G @ texts, G.T @ images)


@bug("hinge", ZERO, "≥ 0 in the gradient: a pair that is just content is pushed all the same.", rung="np")
def at_least_zero(images, texts, margin=0.2, hardest=True):
    return with_counts(images, texts, margin, hardest, lambda cost: cost >= 0)


@bug("hinge", ONCE, "The slope of a large cost is cut off: a pair far behind learns nothing.", rung="np")
def nothing_where_far_behind(images, texts, margin=0.2, hardest=True):
    return with_counts(images, texts, margin, hardest, lambda cost: (cost > 0) & (cost < 1e3))


@bug("hinge", SINGLE, "The margin is a float64 array of one entry a row: float32 leaves as float64.")
def margin_in_float64(images, texts, margin=0.2, hardest=True):
    return hinge(images.double(), texts.double(), margin, hardest)
