"""Yours to write: entropies, infonce_bound, rate_distortion_np.

`pytest tests/test_information.py` holds what you write here to the laws of minivlp/information.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import math

import numpy as np

from minivlp.sinkhorn import logsumexp_np
from tests import Todo


def entropies(joint: np.ndarray) -> dict[str, float]:
    """Entropies in nats of a table p(x, y), (M, N), that sums to one.

    Returns "x", "y", "joint", "x_given_y", "y_given_x" and "mutual"; 0 log 0 = 0. Raises ValueError on bad
    shapes, NaN, infinities, entries below 0 and a sum that is not one.
    """
    raise Todo


def infonce_bound(loss: float, B: int) -> float:
    """What an InfoNCE loss (nats, over B pairs) proves of the mutual information: log B − loss.

    At most log B, however much there is. Raises ValueError for a loss that is not finite and B < 1.
    """
    raise Todo


def rate_distortion_np(
    distortion: np.ndarray, p: np.ndarray, beta: float, steps: int = 100
) -> tuple[float, float, np.ndarray]:
    """A point of R(D) by Blahut and Arimoto: `(rate in nats, mean distortion, column marginal q (N,))`.

    distortion (M, N) between x_i and its possible stand-ins, p (M,) how likely the x_i are, beta > 0 the
    price of a unit of distortion in nats, steps ≥ 1. The number of steps is fixed, and nothing looks whether
    they were enough: where stand-ins are nearly alike, or beta is small, it takes more. Raises ValueError on
    bad shapes, mixed dtypes, NaN, infinities, a p that is no distribution, beta ≤ 0 and steps < 1.
    """
    raise Todo
