"""The hinge loss: a pair must beat its negatives by a margin; VSE++ asks it of the hardest one alone.

With unit rows of images X (B, D), of their texts Y (B, D) and S = X Yᵀ, every negative has a cost in the row
of its image and one in the column of its text,

    R_ij = max(0, margin + S_ij − S_ii),        C_ij = max(0, margin + S_ij − S_jj),        0 on the diagonal,

    L = Σ_i maxⱼ R_ij + Σ_j maxᵢ C_ij        (hardest, VSE++),        or Σ_ij R_ij + C_ij        (VSE0).

A negative beyond the margin has no cost and no gradient, where a softmax never stops pushing. The hardest
negative is also the likeliest to be a false one: another picture of the same thing costs the whole margin.
Training on the hardest negatives alone can collapse from random weights; it should begin with all of them.

Gradient: each cost that counts and is positive puts +1 into G = dL/dS at its own entry and −1 at its pair's
diagonal entry; dX = G Y, dY = Gᵀ X. On ties the first index wins.

Rungs (S has B² entries):
    hinge_np    the formula and its gradients, a few arrays like S
    hinge       the same in PyTorch; autograd keeps a few arrays like S, of bits and indices mostly

Sources: Kiros, Salakhutdinov and Zemel 2014, eq. 8, for the sum; Faghri et al. 2018 (VSE++), eq. 6, for the
maximum. Both sum over the batch; divide by B for a mean.
Left out: normalising X and Y, which the model does; the asymmetric similarity of order embeddings.
"""

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import at_least_float32, working_np


def _check(library, images, texts, margin: float) -> int:
    """Refuse what is not `images (B, D)`, `texts (B, D)` with B ≥ 1 and `margin` > 0; return B."""
    sizes = require.shapes(library, images=(images, "B D"), texts=(texts, "B D"))
    if sizes["B"] < 1:
        require.fail("images", "must hold at least one pair", tuple(images.shape))
    require.floats(images=images, texts=texts)
    require.positive(library, margin=margin)
    return sizes["B"]


def hinge_np(images: np.ndarray, texts: np.ndarray, margin: float = 0.2, hardest: bool = True):
    """The hinge loss and its gradients by hand.

    images (B, D) and texts (B, D), row i of one the partner of row i of the other; margin > 0 in units of S.
    With `hardest` one negative counts in each row and column, else all. Returns `(loss, (dimages, dtexts))`,
    the loss summed over the batch.
    Raises ValueError on bad shapes, mixed dtypes, NaN, infinities, B = 0, margin ≤ 0 and scores that
    overflow.
    """
    B = _check(np.ndarray, images, texts, margin)
    x, y = working_np(images, texts)
    S = x @ y.T  # (B, B)
    loss, G = 0.0, np.zeros_like(S)
    for axis in (1, 0):  # along a row the image chooses among texts, along a column the text among images
        positives = np.expand_dims(
            S.diagonal(), axis
        )  # the pair's score, at every place of its row or column
        cost = np.maximum(margin + S - positives, 0) * (1 - np.eye(B))
        counts = cost > 0
        if hardest:
            first = np.expand_dims(cost.argmax(axis), axis)  # argmax gives the first of equal ones
            counts &= np.expand_dims(np.arange(B), 1 - axis) == first
        loss += (cost * counts).sum()
        # dL/dS_ij is 1 where the cost counts; the pair itself is in each cost of its line with −1.
        G += counts - np.diag(counts.sum(axis))
    # S = X Yᵀ, so each factor's gradient is G times the other.
    return require.loss(loss, images=images), (G @ y, G.T @ x)


def hinge(images: Tensor, texts: Tensor, margin: float = 0.2, hardest: bool = True) -> Tensor:
    """The hinge loss: images (B, D), texts (B, D) → scalar, summed over the batch.

    With `hardest` one negative counts in each row and column, else all. Errors as in `hinge_np`. Half
    precisions are added up in float32, also under autocast.
    """
    B = _check(Tensor, images, texts, margin)
    with at_least_float32(images, texts) as (x, y):
        S = x @ y.T  # (B, B)
    positives, pair = S.diagonal(), torch.eye(B, dtype=torch.bool, device=S.device)
    rows = (margin + S - positives[:, None]).relu().masked_fill(pair, 0)  # (B, B)
    columns = (margin + S - positives).relu().masked_fill(pair, 0)
    if hardest:  # max with an index, so that the gradient goes to the first of equal ones
        rows, columns = rows.max(1).values, columns.max(0).values
    return require.loss(rows.sum() + columns.sum(), images=images)


RUNGS = {"hinge": {"np": hinge_np, "torch": hinge}}
