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


def costs(x, y, margin):
    """Rows, columns (transposed), 0 on the diagonal."""
    S = x @ y.T
    pair = torch.eye(len(S), dtype=torch.bool)
    return [(margin + T - T.diagonal()[:, None]).relu().masked_fill(pair, 0) for T in (S, S.T)]


@bug("hinge", SEPARATED, "The diagonal is left in: every pair is its own negative and costs the margin.")
def pair_against_itself(x, y, margin=0.2, hardest=True):
    S = x @ y.T
    lines = [(margin + T - T.diagonal()[:, None]).relu() for T in (S, S.T)]
    return sum(c.max(1).values.sum() if hardest else c.sum() for c in lines)


@bug("hinge", SEPARATED, "Similarities taken for distances: the pair is pushed apart.")
def distances(x, y, margin=0.2, hardest=True):
    return hinge(-x, y, margin, hardest)


@bug("hinge", EXCHANGE, "Only images look for texts.")
def one_direction(x, y, margin=0.2, hardest=True):
    rows, _ = costs(x, y, margin)
    return rows.max(1).values.sum() if hardest else rows.sum()


@bug("hinge", EXCHANGE, "Both directions take the maximum along the rows.")
def rows_twice(x, y, margin=0.2, hardest=True):
    S = x @ y.T
    pair = torch.eye(len(S), dtype=torch.bool)
    lines = [(margin + S - own).relu().masked_fill(pair, 0) for own in (S.diagonal()[:, None], S.diagonal())]
    return sum(c.max(1).values.sum() if hardest else c.sum() for c in lines)


@bug("hinge", LOOP, "All negatives count, whatever `hardest` says.")
def always_the_sum(x, y, margin=0.2, hardest=True):
    return sum(c.sum() for c in costs(x, y, margin))


@bug("hinge", LOOP, "One hardest negative a pair, not one in each direction.")
def hardest_of_both_directions(x, y, margin=0.2, hardest=True):
    rows, columns = costs(x, y, margin)
    return torch.maximum(rows, columns).max(1).values.sum() if hardest else (rows + columns).sum()


@bug("hinge", LOOP, "The mean over the batch.")
def mean_over_batch(x, y, margin=0.2, hardest=True):
    return hinge(x, y, margin, hardest) / len(x)


@bug("hinge", LOOP, "The hardest negative of all lines, one for the whole batch.")
def hardest_of_the_batch(x, y, margin=0.2, hardest=True):
    return sum(c.max() if hardest else c.sum() for c in costs(x, y, margin))


@bug("hinge", LOOP, "The squared hinge of support vector machines.")
def squared(x, y, margin=0.2, hardest=True):
    lines = [c.square() for c in costs(x, y, margin)]
    return sum(c.max(1).values.sum() if hardest else c.sum() for c in lines)


@bug("hinge", LOOP, "A margin twice as large: it is added to the negative and taken from the pair.")
def margin_twice(x, y, margin=0.2, hardest=True):
    return hinge(x, y, 2 * margin, hardest)


@bug("hinge", SLOPES, "The pair's own score taken as a constant: negatives are pushed, pairs are not pulled.")
def pair_detached(x, y, margin=0.2, hardest=True):
    S = x @ y.T
    pair = torch.eye(len(S), dtype=torch.bool)
    own = S.diagonal().detach()[:, None]
    lines = [(margin + T - own).relu().masked_fill(pair, 0) for T in (S, S.T)]
    return sum(c.max(1).values.sum() if hardest else c.sum() for c in lines)


@bug("hinge", SLOPES, "The −1 of the diagonal once a line, however many costs count.", rung="np")
def one_pull_a_line(x, y, margin=0.2, hardest=True):
    value, grads = hinge_np(x, y, margin, hardest)
    if hardest:
        return value, grads
    S = x @ y.T
    G = np.zeros_like(S)
    for own in (S.diagonal()[:, None], S.diagonal()):
        counts = (margin + S - own > 0) & ~np.eye(len(S), dtype=bool)
        G += counts - np.diag(counts.any(1 if own.ndim == 2 else 0).astype(float))
    return value, (G @ y, G.T @ x)


@bug("hinge", SLOPES, "dy takes G where its transpose belongs.", rung="np")
def not_transposed(x, y, margin=0.2, hardest=True):
    value, (dx, _) = hinge_np(x, y, margin, hardest)
    G = hinge_np(x @ y.T, np.eye(len(x)), margin, hardest)[1][0]
    return value, (dx, G @ x)


@bug("hinge", TIES, "amax splits the gradient between equally hard negatives.")
def split_between_ties(x, y, margin=0.2, hardest=True):
    return sum(c.amax(1).sum() if hardest else c.sum() for c in costs(x, y, margin))
