"""The hinge loss: a pair must beat its negatives by a margin; VSE++ asks it of the hardest one alone.

With unit rows x (B, D) the images, y (B, D) their texts and S = x yᵀ, every negative has a cost in the row of
its image and one in the column of its text,

    R_ij = max(0, margin + S_ij − S_ii),        C_ij = max(0, margin + S_ij − S_jj),        0 on the diagonal,

    L = Σ_i maxⱼ R_ij + Σ_j maxᵢ C_ij        (hardest, VSE++),        or Σ_ij R_ij + C_ij        (VSE0).

A negative beyond the margin has no cost and no gradient: unlike a softmax, a hinge stops when it is content.
The hardest one is also the likeliest to be no negative at all: another picture of the same thing costs the
whole margin. From random weights it can collapse; begin with all negatives.

Gradient: G = dL/dS has +1 where a cost that counts is positive and −1, for each of these, at its diagonal
entry; dx = G y, dy = Gᵀ x. On ties the first index wins.

Rungs (S has B² entries):
    hinge_np    the formula and its gradients, a few arrays like S
    hinge       the same in PyTorch; autograd keeps a few arrays like S, of bits and indices mostly

Sources: Kiros, Salakhutdinov and Zemel 2014, eq. 8, for the sum; Faghri et al. 2018 (VSE++), eq. 6, for the
maximum. Both sum over the batch; divide by B for a mean.
Left out: normalising x and y, which is the model's affair; the asymmetric similarity of order embeddings.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require


def _check(x, y, margin: float) -> int:
    """Refuse what is not `x (B, D)`, `y (B, D)` with B ≥ 1 and `margin` > 0; return B."""
    sizes = require.shapes(x=(x, "B D"), y=(y, "B D"))
    if sizes["B"] < 1:
        require.fail("x", "must hold at least one pair", tuple(x.shape))
    require.floats(x=x, y=y)
    require.positive(margin=margin)
    return sizes["B"]


def hinge_np(x: np.ndarray, y: np.ndarray, margin: float = 0.2, hardest: bool = True):
    """The hinge loss and its gradients by hand.

    x (B, D), y (B, D) with row i of one the partner of row i of the other, margin > 0 in units of S; hardest:
    one negative a row and a column, else all. Returns `(loss, (dx, dy))`, the loss summed over the batch.
    Raises ValueError on bad shapes, dtypes, NaN, B = 0 or margin ≤ 0.
    """
    B = _check(x, y, margin)
    S = x @ y.T  # (B, B)
    loss, G = 0.0, np.zeros_like(S)
    for axis in (1, 0):  # along a row the image chooses among texts, along a column the text among images
        own = np.expand_dims(S.diagonal(), axis)  # the pair's score, at every place of its row or column
        cost = np.maximum(margin + S - own, 0) * (1 - np.eye(B))
        counts = cost > 0
        if hardest:
            first = np.expand_dims(cost.argmax(axis), axis)  # argmax gives the first of equal ones
            counts &= np.expand_dims(np.arange(B), 1 - axis) == first
        loss += (cost * counts).sum()
        # dL/dS_ij is 1 where the cost counts; the pair itself is in each cost of its line with −1.
        G += counts - np.diag(counts.sum(axis))
    # S = x yᵀ, so each factor's gradient is G times the other.
    return float(loss), (G @ y, G.T @ x)


def hinge(x: Tensor, y: Tensor, margin: float = 0.2, hardest: bool = True) -> Tensor:
    """The hinge loss: x (B, D), y (B, D) → scalar, summed over the batch.

    With `hardest` one negative counts in each row and column, else all. Errors as in `hinge_np`.
    """
    B = _check(x, y, margin)
    S = x @ y.T  # (B, B)
    own, pair = S.diagonal(), torch.eye(B, dtype=torch.bool, device=S.device)
    rows = (margin + S - own[:, None]).relu().masked_fill(pair, 0)  # (B, B)
    columns = (margin + S - own).relu().masked_fill(pair, 0)
    if not hardest:
        return rows.sum() + columns.sum()
    # max with an index, so that the gradient goes to the first of equal ones.
    return rows.max(1).values.sum() + columns.max(0).values.sum()


RUNGS = {"hinge": {"np": hinge_np, "torch": hinge}}
