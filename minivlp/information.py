"""Information in nats: how much one thing tells of another, what a model proves of it, what it costs to keep.

    H(X) = −Σ p log p,        I(X; Y) = H(X) + H(Y) − H(X, Y)

A model never knows I, but its loss bounds it from below:

    InfoNCE      I ≥ log B − loss, and never above log B: the batch is the ruler            (infonce_bound)
    captioner    I ≥ H(c) − E[−log p(c | x)]; generators and masked models alike, word by word

Rate and distortion: to keep X within a mean distance D one must keep R(D) = min I(X; Z) nats of it. For each
price β of distance the optimum is found by turns (Blahut–Arimoto):

    W_ij = softmax_j (log q_j − β d_ij),        q = p W.

T_ij = p_i W_ij is a transport plan whose rows sum to p: the row step is Sinkhorn's, and the column step
learns the marginal in place of enforcing one.

Rungs:
    rate_distortion_np, rate_distortion    two sums of (M, N) a step

Sources: Cover and Thomas 2006 (Elements of information theory), chapters 2 and 10; Blahut 1972; Arimoto 1972;
van den Oord et al. 2018 (CPC), eq. 5; Bordes et al. 2024 (An introduction to vision-language modeling),
section 2.3.3, for losses of vision and language as rate and distortion.
Left out: estimates from samples, whose bias is of the size of what is looked for; bits (divide by ln 2).
"""

import math

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import at_least_float32, working, working_np
from minivlp.sinkhorn import logsumexp_np


def entropies(joint: np.ndarray) -> dict[str, float]:
    """Entropies in nats of a table p(x, y), (M, N), that sums to one.

    Returns "x", "y", "joint", "x_given_y", "y_given_x" and "mutual"; 0 log 0 = 0. Raises ValueError on bad
    shapes, NaN, infinities, entries below 0 and a sum that is not one.
    """
    require.shapes(np.ndarray, joint=(joint, "M N"))
    require.floats(joint=joint)
    _distribution("joint", joint)
    joint = joint.astype(np.float64)
    x, y, both = (_entropy(p) for p in (joint.sum(1), joint.sum(0), joint))
    given = {"x_given_y": both - y, "y_given_x": both - x, "mutual": x + y - both}
    return {"x": x, "y": y, "joint": both} | given


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _distribution(name: str, p: np.ndarray | Tensor) -> None:
    """Refuse what is below 0 or does not sum to one, up to the rounding of its own dtype."""
    if bool((p < 0).any()):
        require.fail(name, "must be at least 0", float(p.min()))
    tensor = isinstance(p, Tensor)
    total = float((working(p.detach()) if tensor else working_np(p))[0].sum())
    eps = float((torch if tensor else np).finfo(p.dtype).eps)
    if not math.isclose(total, 1, abs_tol=max(1e-5, eps)):
        require.fail(name, "must sum to 1", total)


def infonce_bound(loss: float, B: int) -> float:
    """What an InfoNCE loss (nats, over B pairs) proves of the mutual information: log B − loss.

    At most log B, however much there is. Raises ValueError for a loss that is not finite and B < 1.
    """
    require.finite(loss=loss)
    if B < 1:
        require.fail("B", "must be at least 1", B)
    return math.log(B) - loss


def rate_distortion_np(
    distortion: np.ndarray, p: np.ndarray, beta: float, steps: int = 100
) -> tuple[float, float, np.ndarray]:
    """A point of R(D) by Blahut and Arimoto: `(rate in nats, mean distortion, column marginal q (N,))`.

    distortion (M, N) between x_i and its possible stand-ins, p (M,) how likely the x_i are, beta > 0 the
    price of a unit of distortion in nats, steps ≥ 1. The number of steps is fixed, and nothing looks whether
    they were enough: where stand-ins are nearly alike, or beta is small, it takes more. Raises ValueError on
    bad shapes, mixed dtypes, NaN, infinities, a p that is no distribution, beta ≤ 0 and steps < 1.
    """
    _check(np.ndarray, distortion, p, beta, steps)
    d, p = working_np(distortion, p)
    log_q = np.full(d.shape[1], -math.log(d.shape[1]))  # every stand-in alike
    for _ in range(steps):
        S = log_q - beta * d  # (M, N)
        log_W = S - logsumexp_np(S, 1)[:, None]
        q = p @ np.exp(log_W)
        log_q = np.log(np.maximum(q, np.finfo(q.dtype).tiny))  # a stand-in that nobody takes stays away
    T = p[:, None] * np.exp(log_W)
    return float((T * (log_W - log_q)).sum()), float((T * d).sum()), q.astype(distortion.dtype)


def rate_distortion(
    distortion: Tensor, p: Tensor, beta: float, steps: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch: `(rate, mean distortion, q (N,))`; arguments and errors as there."""
    _check(Tensor, distortion, p, beta, steps)
    with at_least_float32(distortion, p) as (d, p):
        log_q = d.new_full((d.shape[1],), -math.log(d.shape[1]))
        for _ in range(steps):
            log_W = (log_q - beta * d).log_softmax(1)  # (M, N)
            q = p @ log_W.exp()
            log_q = q.clamp_min(torch.finfo(q.dtype).tiny).log()
        T = p[:, None] * log_W.exp()
        found = (T * (log_W - log_q)).sum(), (T * d).sum(), q
    return tuple(z.to(distortion.dtype) for z in found)


def _check(library, distortion, p, beta: float, steps: int) -> None:
    sizes = require.shapes(library, distortion=(distortion, "M N"), p=(p, "M"))
    if not sizes["N"]:
        require.fail("distortion", "must have at least one column", tuple(distortion.shape))
    require.floats(distortion=distortion, p=p)
    _distribution("p", p)
    require.positive(beta=beta)
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
        require.fail("steps", "must be a whole number ≥ 1", steps)


RUNGS = {
    "entropies": {"plain": entropies}, "infonce_bound": {"plain": infonce_bound},
    "rate_distortion": {"plain": rate_distortion_np, "torch": rate_distortion},
}  # fmt: skip
