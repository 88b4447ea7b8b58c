"""Image-text matching: tell a true pair from a wrong one, after the model has looked at both together.

A dual encoder compares two vectors. A model in which words and patches attend to one another can also
notice that a picture shows "a dog left of a guitar" the other way round, and matching teaches it to notice. A
head maps the pooled pair to two logits z_b, label 1 = match, and the loss is their cross-entropy:

    loss = 1/B Σ_b [ logsumexp(z_b) − z_b[label_b] ].

Gradient: dL/dz = (softmax(z) − one-hot(label)) / B.

How hard the task is depends on the wrong pairs. `derangement` gives each text another image of the batch,
every such assignment equally likely. `hard_negatives` prefers for each row (text) the columns (images) that a
contrastive model finds similar:

    P(column j for row i) = exp(s_ij) / Σ_{k legal} exp(s_ik),        legal: j ≠ i and ids_j ≠ ids_i.

Both return indices for a fresh gather, `wrong = images[index]`. Overwriting images one after another in
place fails in three ways: a source may itself have been overwritten, which can even bring the true image
back under label 0; a source drawn from all images is the image itself once in B times; and the other
objectives of the batch, masked words above all, then see the wrong images.

Rungs:
    derangement       draws permutations until one has no fixed point, about e of them; O(n) memory
    hard_negatives    one (B, B) array of Gumbel noise
    itm_loss_np       the formula, (B, 2) arrays
    itm_loss          the same in PyTorch, differentiated by autograd

Sources: Kim, Son and Kim 2021 (ViLT), section 3.2; hard negatives: Li et al. 2021 (ALBEF), section 3.2, and
Zeng, Zhang and Li 2022 (X-VLM); the maximum that samples a softmax: Gumbel 1954.
Left out: queues of past images, which offer harder negatives and need a momentum encoder to stay comparable.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import working, working_np


def derangement(n: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of 0 … n−1 that moves every element, (n,) int64, uniform over all such permutations.

    Uniform permutations are drawn until one has no fixed point. It has none with probability near 1/e
    (between 1/3 and 1/2 from n = 2 on), so about e draws of O(n) are needed on average, whatever n is.
    Raises ValueError for n < 2: a single pair has no other to swap with.
    """
    require.generator(rng)
    if n < 2:
        require.fail("n", "must be at least 2 for a swap", n)
    identity = np.arange(n, dtype=np.int64)
    while True:
        permutation = rng.permutation(identity)
        if (permutation != identity).all():
            return permutation


def hard_negatives(
    similarity: np.ndarray, rng: np.random.Generator, ids: np.ndarray | None = None
) -> np.ndarray:
    """For each row a wrong column, drawn by the softmax of the row over the legal ones: (B,) int64.

    similarity (B, B) finite; row i and column i are a true pair. It is not scaled here: multiply it by 1/τ
    before the call. ids (B,) integers, equal where pairs share an image or a caption: a column with the row's
    id is as illegal as the diagonal. Rows draw independently; a column may serve several rows.
    Raises ValueError on bad shapes, dtypes or entries, and when a row has no legal column.
    """
    B = require.shapes(np.ndarray, similarity=(similarity, "B B"))["B"]
    require.floats(similarity=similarity)
    require.generator(rng)
    if B < 1:
        require.fail("similarity", "must hold at least two pairs", tuple(similarity.shape))
    ids = np.arange(B) if ids is None else ids
    require.shapes(np.ndarray, similarity=(similarity, "B B"), ids=(ids, "B"))
    require.integers(ids=ids)
    illegal = ids[:, None] == ids  # (B, B), the diagonal included
    if illegal.all(1).any():
        rule = "must leave every row a column with another id"
        require.fail("ids", rule, f"none for row {int(illegal.all(1).argmax())} of {len(ids)}")
    # argmax_j (s_ij + g_ij) with Gumbel noise g is a draw from softmax(s_i); no weight can underflow to zero.
    noisy = similarity + rng.gumbel(size=similarity.shape)
    return np.where(illegal, -np.inf, noisy).argmax(1)


def _check(library, logits, labels) -> int:
    """Refuse what is not `logits (B, 2)` and `labels (B,)` of 0 and 1; return B."""
    sizes = require.shapes(library, logits=(logits, "B 2"), labels=(labels, "B"))
    require.floats(logits=logits)
    require.integers(labels=labels)
    if sizes["B"] < 1:
        require.fail("logits", "must hold at least one pair", tuple(logits.shape))
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        require.fail("labels", "must be 1 (match) or 0", int(wrong[0]))
    return sizes["B"]


def itm_loss_np(logits: np.ndarray, labels: np.ndarray):
    """Matching loss and its gradient by hand.

    logits (B, 2), column 1 speaks for a match; labels (B,) integers, 1 = match; loss in nats.
    Returns `(loss, (d logits,))`. Raises ValueError on bad shapes, dtypes, labels, NaN, infinities, and for
    B = 0.
    """
    B = _check(np.ndarray, logits, labels)
    rows, (z,) = np.arange(B), working_np(logits)
    log_p = z - np.logaddexp(z[:, :1], z[:, 1:])  # (B, 2): z − logsumexp(z)
    loss = -log_p[rows, labels].sum() / B
    # d logsumexp / dz = softmax, and −z[label] takes 1 off the label's column; the mean divides by B.
    dlogits = np.exp(log_p)
    dlogits[rows, labels] -= 1
    return require.loss(loss, logits=logits), (dlogits / B,)


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Matching loss: logits (B, 2), labels (B,) with 1 = match → scalar, in nats, the mean over pairs.

    Errors as in `itm_loss_np`. Half precisions are added up in float32.
    """
    _check(Tensor, logits, labels)
    (z,) = working(logits)
    return require.loss(F.cross_entropy(z, labels.long()), logits=logits)


RUNGS = {
    "derangement": {"plain": derangement},
    "hard_negatives": {"plain": hard_negatives},
    "itm_loss": {"np": itm_loss_np, "torch": itm_loss},
}
