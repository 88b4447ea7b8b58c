"""Yours to write: mask_tokens, mlm_loss_np, mlm_loss, mlm_loss_fused.

`pytest tests/test_mlm.py` holds what you write here to the laws of minivlp/mlm.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp import stream
from tests import Todo


def mask_tokens(
    ids: np.ndarray,
    word_ids: np.ndarray,
    rng: np.random.Generator,
    vocab_size: int,
    mask_id: int,
    special_ids: Iterable[int],
    p: float = 0.15,
    whole_word: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose tokens to predict and hide them.

    ids (B, L) integers in [0, vocab_size); word_ids (B, L) the index in its row of each token's word, −1 at
    special tokens and padding, as `WordPiece.batch` gives them. Each word is chosen with probability `p`,
    independently, with all of its pieces; with `whole_word=False` each piece is chosen by itself. Each
    chosen token then becomes `mask_id` (80 %), a uniform draw from the ids that are not special, the true one
    included (10 %), or stays (10 %); the pieces of one word may differ, as in BERT.
    `mask_id` counts as special; tokens with a special id or a negative word index are never chosen.
    Returns `(inputs, labels)`, both (B, L) int64; labels hold the true ids of the chosen tokens and −100
    elsewhere; `ids` stays as it was. Raises ValueError on bad shapes, dtypes, ids or `p`.
    """
    raise Todo


def mlm_loss_np(hidden: np.ndarray, embedding: np.ndarray, bias: np.ndarray, targets: np.ndarray):
    """Masked-word cross-entropy and its gradients by hand.

    hidden (M, D), embedding (V, D), bias (V,), targets (M,) ids, −100 = not predicted; loss in nats.
    Returns `(loss, (d hidden, d embedding, d bias))`, all zero when every target is −100.
    Raises ValueError on bad shapes, mixed dtypes, targets, NaN, infinities and logits that overflow; rows of
    hidden that are not predicted may be infinite.
    """
    raise Todo


def mlm_loss(hidden: Tensor, embedding: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Masked-word cross-entropy: hidden (M, D), embedding (V, D), bias (V,), targets (M,) → scalar, in nats.

    The mean over targets ≠ −100. Without any it is 0, still part of the graph, so that backward gives zeros.
    Errors as in `mlm_loss_np`. Half precisions are added up in float32, also under autocast.
    """
    raise Todo


def mlm_loss_fused(hidden: Tensor, embedding: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """`mlm_loss` without its (K, V) logits: panel by panel, each with its gradients; arguments as there.

    The same 3 products. In units of K · V numbers: the plain rung holds 3, logits, log-softmax and gradient,
    and moves some 14 to and from memory; this rung holds a panel, 256/K, and moves about as many, 10 for the
    panels and 4 D/256 for E and dE. It can be differentiated once.
    """
    raise Todo
