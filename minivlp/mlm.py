"""Masked language modelling: hide words of a caption and predict them from the rest and from the picture.

The hidden word of "two [MASK] on a table" can be known only from the picture. This objective teaches a
vision-language model single words, as matching teaches it whole pairs. With hidden states
h_m (D) of the M tokens, word embeddings E (V, D), bias b (V), and t_m the true id of a masked token:

    logits_m = E h_m + b,        loss = 1/|masked| Σ_{m masked} [ logsumexp(logits_m) − logits_m[t_m] ].

Gradient: G = dL/dlogits = (softmax − one-hot) / |masked| on masked rows, zero elsewhere; dh = G E, dE = Gᵀ h,
db = Σ_m G_m. A batch in which nothing is masked has loss 0 and zero gradients, not 0/0.

Which tokens to hide is drawn here too. Words are chosen with probability p, each with all of its pieces,
since the other pieces of a word ("skate ##bo [MASK]") give the hidden piece away without the picture. Of the
chosen tokens 80 % become [MASK], 10 % another id and 10 % stay: a model that cannot tell which token it must
predict has to represent them all, and is prepared for fine-tuning, where there is no [MASK].

Rungs (M tokens, K of them masked, K ≈ 0.15 M):
    mask_tokens      random choices, no gradient
    mlm_loss_np      selects the masked rows, then keeps their (K, V) logits
    mlm_loss         the same in PyTorch; autograd keeps a (K, V) log-softmax
    mlm_loss_fused   panels of 256 masked tokens, each with its gradients: (256, V) logits, and dh, dE, db

Sources: Devlin et al. 2019 (BERT), section 3.1 and appendix A.1 (80/10/10); Kim, Son and Kim 2021 (ViLT),
sections 3.2 and 3.3 (whole words, p = 0.15, the image left whole).
Left out: at least one mask per caption (UNITER) and masked spans of words (X-VLM), which change the rate;
masked patches, which ViLT found to hurt.
"""

from collections.abc import Iterable

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from minivlp import stream
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working, working_np

IGNORE = -100  # the label of a token that is not to be predicted, as in torch's cross-entropy


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
    require.shapes(np.ndarray, ids=(ids, "B L"), word_ids=(word_ids, "B L"))
    require.integers(ids=ids, word_ids=word_ids)
    require.generator(rng)
    special = np.unique([*special_ids, mask_id])
    for name, values in (("ids", ids), ("special_ids and mask_id", special)):
        outside = values[(values < 0) | (values >= vocab_size)]
        if outside.size:
            require.fail(name, f"must lie between 0 and vocab_size − 1 = {vocab_size - 1}", outside[0])
    if not 0 <= p <= 1:
        require.fail("p", "must be a probability", p)
    if len(special) == vocab_size:
        require.fail("special_ids", "must leave an ordinary id to draw", f"all {vocab_size}")

    ids, word_ids = ids.astype(np.int64), word_ids.astype(np.int64)  # copies, wide enough for −100
    if whole_word:  # every piece looks at the coin of its word
        coin = rng.random((len(ids), word_ids.max(initial=0) + 1))  # (B, words)
        coin = np.take_along_axis(coin, word_ids.clip(0), axis=1)  # (B, L)
    else:
        coin = rng.random(ids.shape)  # (B, L)
    chosen = (coin < p) & (word_ids >= 0) & ~np.isin(ids, special)
    fate = rng.random(ids.shape)
    ordinary = np.delete(np.arange(vocab_size), special)
    inputs = np.where(chosen & (fate < 0.8), mask_id, ids)
    swapped = chosen & (fate >= 0.9)
    inputs[swapped] = rng.choice(ordinary, swapped.sum())
    return inputs, np.where(chosen, ids, IGNORE)


def _check(library, hidden, embedding, bias, targets):
    """Refuse other than hidden (M, D), embedding (V, D), bias (V,), targets (M,) of ids or −100.

    Returns the targets in int64: eight bits hold neither −100 nor the size of a vocabulary.
    """
    sizes = require.shapes(
        library,
        hidden=(hidden, "M D"),
        embedding=(embedding, "V D"),
        bias=(bias, "V"),
        targets=(targets, "M"),
    )
    require.integers(targets=targets)
    targets = targets.long() if library is Tensor else targets.astype(np.int64)
    require.floats(infinite=True, hidden=hidden)
    require.floats(hidden=hidden[targets != IGNORE], embedding=embedding, bias=bias)
    wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= sizes["V"]))]
    if len(wrong):
        require.fail("targets", f"must be {IGNORE} or lie between 0 and {sizes['V'] - 1}", int(wrong[0]))
    return targets


def mlm_loss_np(hidden: np.ndarray, embedding: np.ndarray, bias: np.ndarray, targets: np.ndarray):
    """Masked-word cross-entropy and its gradients by hand.

    hidden (M, D), embedding (V, D), bias (V,), targets (M,) ids, −100 = not predicted; loss in nats.
    Returns `(loss, (d hidden, d embedding, d bias))`, all zero when every target is −100.
    Raises ValueError on bad shapes, mixed dtypes, targets, NaN, infinities and logits that overflow; rows of
    hidden that are not predicted may be infinite.
    """
    targets = _check(np.ndarray, hidden, embedding, bias, targets)
    masked = np.flatnonzero(targets != IGNORE)  # (K,)
    h, E, b = working_np(hidden[masked], embedding, bias)
    t, K = targets[masked], max(len(masked), 1)  # (K,)
    logits = h @ E.T + b  # (K, V)
    shifted = logits - logits.max(
        1, keepdims=True, initial=-np.inf
    )  # the largest is 0, so exp cannot overflow
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))  # (K, V)
    loss = -log_p[np.arange(len(t)), t].sum() / K
    # d logsumexp / d logits = softmax, and −logits[t] takes 1 off the target; the mean divides by K.
    G = np.exp(log_p) / K  # (K, V)
    G[np.arange(len(t)), t] -= 1 / K
    # logits_kv = Σ_d h_kd E_vd + b_v, so each factor receives G times the other; other rows took no part.
    dhidden = np.zeros_like(hidden, dtype=h.dtype)
    dhidden[masked] = G @ E
    return require.loss(loss, hidden=hidden), (dhidden, G.T @ h, G.sum(0))


def mlm_loss(hidden: Tensor, embedding: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Masked-word cross-entropy: hidden (M, D), embedding (V, D), bias (V,), targets (M,) → scalar, in nats.

    The mean over targets ≠ −100. Without any it is 0, still part of the graph, so that backward gives zeros.
    Errors as in `mlm_loss_np`. Half precisions are added up in float32, also under autocast.
    """
    targets = _check(Tensor, hidden, embedding, bias, targets)
    masked = targets != IGNORE
    with at_least_float32(hidden[masked], embedding, bias) as (h, E, b):
        logits = h @ E.T + b  # (K, V): the rows first, 15 % of the work
        loss = F.cross_entropy(logits, targets[masked], reduction="sum") / max(len(logits), 1)
    return require.loss(loss, hidden=hidden)


# The fused rung never holds all logits: it walks over panels of whole rows, so that a panel knows its
# normalisers, and makes each panel's gradients before the next panel overwrites it.


def mlm_loss_fused(hidden: Tensor, embedding: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """`mlm_loss` without its (K, V) logits: panel by panel, each with its gradients; arguments as there.

    The same 3 products. In units of K · V numbers: the plain rung holds 3, logits, log-softmax and gradient,
    and moves some 14 to and from memory; this rung holds a panel, 256/K, and moves about as many, 10 for the
    panels and 4 D/256 for E and dE. It can be differentiated once.
    """
    targets = _check(Tensor, hidden, embedding, bias, targets)
    return require.loss(stream.differentiable(_Fused, hidden, embedding, bias, targets), hidden=hidden)


class _Fused(stream.GradientsFromForward):
    """One walk: a panel holds whole rows, so that their normalisers and their part of G are known at once."""

    @staticmethod
    def forward(ctx, hidden, embedding, bias, targets):
        masked = (targets != IGNORE).nonzero()[:, 0]  # (K,)
        K, V = len(masked), len(embedding)
        all_masked = len(hidden) == K
        h, E, b = working(hidden if all_masked else hidden[masked], embedding, bias)
        losses, slopes = h.new_zeros(K), b.new_zeros(V)
        dh, dE, _ = stream.accumulate(
            word_panel,
            h,
            E,
            targets[masked],
            losses,
            slopes,
            bias=b,
            tile=(PANEL, V),
            weight=1 / max(K, 1),
            wanted=(*ctx.needs_input_grad[:2], False),
        )
        if dh is not None and not all_masked:
            # Rows that are not masked took no part.
            dh = dh.new_zeros(hidden.shape).index_copy_(0, masked, dh)
        ctx.save_for_backward(dh, dE, slopes / max(K, 1))
        return (losses.sum() / max(K, 1)).to(hidden.dtype)


PANEL = 256  # masked tokens whose logits are made together


def word_panel(S, scratch, rows, columns, targets: Tensor, losses: Tensor, slopes: Tensor) -> None:
    """Whole rows of logits become K · G = softmax − one-hot; fills losses (K,), adds to the slopes (V,)."""
    target = targets[rows][:, None]
    S.sub_(S.amax(1, keepdim=True))
    true = S.gather(1, target)
    normaliser = S.exp_().sum(1, keepdim=True)
    losses[rows] = (normaliser.log() - true)[:, 0]
    S.div_(normaliser)
    S.scatter_add_(1, target, S.new_full((1, 1), -1.0).expand_as(target))
    slopes += S.sum(0)


RUNGS = {
    "mask_tokens": {"plain": mask_tokens},
    "mlm_loss": {"np": mlm_loss_np, "torch": mlm_loss, "fused": mlm_loss_fused},
}
