"""Late interaction: an image and a text are compared token by token, and only the comparisons are averaged.

Image a has M real patches xₘ, text b has N real words yₙ. Two directed similarities in [−1, 1] compare them;
the two differ, since a picture may hold more than its caption says, and the reverse:

    I_ab = meanₘ maxₙ cos(xₘ, yₙ),        T_ab = meanₙ maxₘ cos(xₘ, yₙ).

An image chooses its text by I, a text its image by T: with scale = 1/τ,

    L = 1/(2B) Σ_i [ logsumexpⱼ scale·I_ij − scale·I_ii + logsumexpⱼ scale·T_ji − scale·T_ii ].

The two towers still run without one another, but every token is stored, where CLIP stores one vector. The
diagonal of ½ (I + T) is the Chamfer similarity of the pairs.

Gradient: dI = scale (P_row − 1)/2B and dT = scale (P_column − 1)/2B, P the softmax and 1 the identity; each
row of tokens passes its share on to one best partner, the first on ties.

Rungs (B² M N cosines):
    late_interaction_np, filip_np    the cosines and their gradient, a few arrays of that size
    late_interaction, filip          one product makes the cosines; autograd keeps about three such arrays

Sources: Yao et al. 2022 (FILIP), section 3.1; Khattab and Zaharia 2020 (ColBERT), for the name.
Left out: ColBERT's sum in place of the mean, by which long texts win; sending only a quarter of the tokens
between processes, those with the largest similarities.
"""

import numpy as np
from torch import Tensor

from minivlp.chamfer import mean_max, mean_max_np
from minivlp.core import require
from minivlp.core.precision import at_least_float32, working_np
from minivlp.core.transport import within_range
from minivlp.sinkhorn import logsumexp_np, unit, unit_grad_np, unit_np


def _check(library, x, y, x_mask, y_mask) -> None:
    """Refuse what is not `x (A, M, D)` and `y (B, N, D)` with A, B ≥ 1 and masks that fit them."""
    require.shapes(library, x=(x, "A M D"), y=(y, "B N D"))
    for name, tokens in (("x", x), ("y", y)):
        if not len(tokens):
            require.fail(name, "must hold at least one set of tokens", tuple(tokens.shape))
    require.tokens(("x", x, "x_mask", x_mask), ("y", y, "y_mask", y_mask))


def _check_pairs(library, images, texts, scale, image_mask, text_mask) -> int:
    """Refuse other than images (B, M, D), texts (B, N, D), B ≥ 1, with masks and `scale` > 0; return B."""
    B = require.shapes(library, images=(images, "B M D"), texts=(texts, "B N D"))["B"]
    if B < 1:
        require.fail("images", "must hold at least one set of tokens", tuple(images.shape))
    require.tokens(("images", images, "image_mask", image_mask), ("texts", texts, "text_mask", text_mask))
    require.positive(library, scale=scale)
    return B


def late_interaction_np(x: np.ndarray, y: np.ndarray, x_mask=None, y_mask=None, grad=None):
    """The similarity from all sets of tokens x to all sets y, and its gradients by hand.

    x (A, M, D), y (B, N, D), masks (A, M) and (B, N) with True = real; grad (A, B) the upstream
    gradient (None = ones). Rows are divided by max(‖row‖, 1e-5). Returns `(value (A, B) in [−1, 1], (dx,
    dy))`: entry (a, b) is the mean over a's tokens of the largest cosine with one of b's. Raises
    ValueError on bad shapes, mixed dtypes, NaN, infinities, no set or no token, and an all-False mask row.
    """
    _check(np.ndarray, x, y, x_mask, y_mask)
    (p, p_length), (q, q_length) = map(unit_np, working_np(x, y))
    S = _cosines_np(p, q)  # (A, B, M, N)
    value, G = mean_max_np(S, _wide(x_mask, 1), _wide(y_mask, 0))  # (A, B), (A, B, M, N)
    G = G if grad is None else G * np.asarray(grad)[..., None, None]
    return value, _grads_np(p, p_length, q, q_length, G)


def late_interaction(
    x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None
) -> Tensor:
    """The similarity from all sets of tokens x (A, M, D) to all sets y (B, N, D): (A, B).

    For FILIP x are images and y texts, or the reverse: the other direction is `late_interaction(y, x, y_mask,
    x_mask).T`. Arguments and errors as in `late_interaction_np`.
    """
    _check(Tensor, x, y, x_mask, y_mask)
    return mean_max(_cosines(x, y), _wide(x_mask, 1), _wide(y_mask, 0)).to(x.dtype)


def filip_np(images: np.ndarray, texts: np.ndarray, scale: float, image_mask=None, text_mask=None):
    """The contrastive loss of late interaction and its gradients by hand.

    images (B, M, D) and texts (B, N, D), row i of one the partner of row i of the other; scale = 1/τ > 0;
    masks (B, M) and (B, N) with True = real. Returns `(loss in nats, (dimages, dtexts, dscale))`. Raises
    ValueError as `late_interaction_np` does, and when scale ≤ 0.
    """
    B = _check_pairs(np.ndarray, images, texts, scale, image_mask, text_mask)
    (p, p_length), (q, q_length) = map(unit_np, working_np(images, texts))
    S, rows, columns = _cosines_np(p, q), _wide(image_mask, 1), _wide(text_mask, 0)
    halves = mean_max_np(S, rows, columns), mean_max_np(S.swapaxes(-1, -2), columns, rows)
    loss, dscale, G = 0.0, 0.0, np.zeros_like(S)
    # I is softmaxed along its rows, T along its columns.
    for axis, (similarity, slope) in zip((1, 0), halves, strict=True):
        z = scale * similarity  # (B, B)
        total = np.expand_dims(logsumexp_np(z, axis), axis)
        loss += (total.squeeze(axis) - z.diagonal()).sum() / (2 * B)
        # d logsumexpⱼ z_ij / dz_ij is the softmax; the pair's own score adds −1.
        dz = (np.exp(z - total) - np.eye(B)) / (2 * B)
        dscale += (dz * similarity).sum()
        # Each half passes its share to the cosines that it is made of; T is made of the transposed cosines.
        share = scale * dz[..., None, None] * slope
        G += share if axis else share.swapaxes(-1, -2)
    return require.loss(loss, images=images), (*_grads_np(p, p_length, q, q_length, G), dscale)


def filip(
    images: Tensor,
    texts: Tensor,
    scale: float | Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Tensor:
    """The contrastive loss of late interaction: images (B, M, D), texts (B, N, D), scale = 1/τ → scalar,
    nats.

    Arguments and errors as in `filip_np`.
    """
    _check_pairs(Tensor, images, texts, scale, image_mask, text_mask)
    S, rows, columns = _cosines(images, texts), _wide(image_mask, 1), _wide(text_mask, 0)
    image = scale * mean_max(S, rows, columns)  # (B, B): image i with text j
    text = scale * mean_max(S.mT, columns, rows)  # (B, B): the same pairs, from text to image
    choices = image.logsumexp(1) - image.diagonal() + text.logsumexp(0) - text.diagonal()  # (B,)
    return require.loss(choices.mean() / 2, images=images)


def _cosines_np(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Products of all tokens of all sets: unit p (A, M, D), q (B, N, D) → (A, B, M, N)."""
    return np.einsum("amd,bnd->abmn", p, q, optimize=True)


def _grads_np(p, p_length, q, q_length, G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of x (A, M, D) and y (B, N, D) from G = dL/dcosines (A, B, M, N)."""
    # cos_abmn = Σ_d p_amd q_bnd: each factor's gradient is G times the other, summed over what it lacks.
    dp = np.einsum("abmn,bnd->amd", G, q, optimize=True)
    dq = np.einsum("abmn,amd->bnd", G, p, optimize=True)
    return unit_grad_np(p, p_length, dp), unit_grad_np(q, q_length, dq)


def _wide(mask, axis: int):
    """A mask (A, M) or (M,) as (A, 1, M) for axis 1, as (1, A, M) for axis 0, or (M,); None stays None."""
    if mask is None or mask.ndim == 1:
        return mask
    return mask[:, None] if axis else mask[None]


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of all tokens of all sets, (A, B, M, N), in float32 at least, also under autocast."""
    with at_least_float32(*within_range(x, y)) as (p, q):
        flat = unit(p).flatten(0, 1) @ unit(q).flatten(0, 1).T  # (A·M, B·N)
    return flat.unflatten(0, x.shape[:2]).unflatten(2, y.shape[:2]).transpose(1, 2)  # (A, B, M, N)


RUNGS = {
    "late_interaction": {"np": late_interaction_np, "torch": late_interaction},
    "filip": {"np": filip_np, "torch": filip},
}
