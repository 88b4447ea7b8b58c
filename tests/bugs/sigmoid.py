"""Plausible wrong sigmoid losses."""

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from minivlp import stream
from minivlp.sigmoid import sigmoid_loss, sigmoid_loss_np
from tests.laws import bug

ZERO, ORDER, BLOCKS = "zero_cosines_leave_the_bias", "pairs_come_in_any_order", "blocks_add_up"
PAIRS, HARD = "right_pairs_lie_on_the_diagonal_of_the_whole", "gradients_hold_at_every_score"
SINGLE, MANY, HELD = "float32_is_enough", "many_tiles_give_one_answer", "no_more_than_tiles_is_held"
LOOP, EULER, SLOPES = "equals_the_slow_loop", "scale_and_images_share_one_slope", "gradients_are_the_slopes"


@bug("sigmoid_loss", ZERO, "The bias is subtracted, as in the paper's displayed equation.")
def bias_subtracted(images, texts, scale, bias):
    return sigmoid_loss(images, texts, scale, -bias)


@bug("sigmoid_loss", ZERO, "The mean over all B² pairs, not their sum over B.")
def mean_over_pairs(images, texts, scale, bias):
    return sigmoid_loss(images, texts, scale, bias) / len(images)


@bug("sigmoid_loss", ZERO, "Chunks of two, as in a ring, with positives on the diagonal of every chunk.")
def positives_in_every_chunk(images, texts, scale, bias):
    S, place = scale * images @ texts.T + bias, torch.arange(len(images)) % 2
    return -F.logsigmoid(torch.where(place[:, None] == place, S, -S)).sum() / len(images)


@bug("sigmoid_loss", ZERO, "The bias is scaled too: scale · (x · y + bias).")
def bias_scaled(images, texts, scale, bias):
    return sigmoid_loss(images, texts, scale, scale * bias)


@bug(
    "sigmoid_loss",
    ZERO,
    "One-sided: each negative pair is counted once, from the image with the lower index.",
)
def upper_triangle(images, texts, scale, bias):
    S = scale * images @ texts.T + bias
    return (F.softplus(S).triu(1).sum() + F.softplus(-S.diagonal()).sum()) / len(images)


@bug("sigmoid_loss", ORDER, "Targets off by one: the positive is the next text.")
def next_text(images, texts, scale, bias):
    return sigmoid_loss(images, texts.roll(1, 0), scale, bias)


@bug("sigmoid_loss", BLOCKS, "Only the hardest negative of each image, B − 1 times.")
def hardest_negative(images, texts, scale, bias):
    B, S = len(images), scale * images @ texts.T + bias
    hardest = S.masked_fill(torch.eye(B, dtype=torch.bool), -torch.inf).amax(1)
    negatives = (B - 1) * F.softplus(hardest).sum() if B > 1 else 0
    return (F.softplus(-S.diagonal()).sum() + negatives) / B


@bug("sigmoid_loss", BLOCKS, "Scores are centred over the batch first, so pairs feel one another.")
def centred_scores(images, texts, scale, bias):
    return sigmoid_loss(images - images.mean(0), texts, scale, bias)


@bug("sigmoid_loss", LOOP, "The temperature upside down: divided by the scale.")
def temperature_upside_down(images, texts, scale, bias):
    return sigmoid_loss(images, texts, 1 / scale, bias)


@bug("sigmoid_loss", LOOP, "Rows normalised inside the loss.")
def normalised_inside(images, texts, scale, bias):
    return sigmoid_loss(F.normalize(images, dim=1), F.normalize(texts, dim=1), scale, bias)


@bug("sigmoid_loss", LOOP, "log(1 + exp(·)) taken literally: overflows.", rung="np")
def softplus_overflows(images, texts, scale, bias):
    z = 2 * np.eye(len(images)) - 1
    value = np.log(1 + np.exp(-z * (scale * images @ texts.T + bias))).sum() / len(images)
    return value, sigmoid_loss_np(images, texts, scale, bias)[1]


@bug(
    "sigmoid_loss", LOOP, "softplus(x) = −log1p(−σ(x)), exact for x ≤ 0, infinite from x ≈ 37 on.", rung="np"
)
def softplus_from_sigmoid(images, texts, scale, bias):
    z = 2 * np.eye(len(images)) - 1
    value = -np.log1p(-1 / (1 + np.exp(z * (scale * images @ texts.T + bias)))).sum() / len(images)
    return value, sigmoid_loss_np(images, texts, scale, bias)[1]


@bug("sigmoid_loss", EULER, "The scale is detached, so it is never learned.")
def scale_detached(images, texts, scale, bias):
    return sigmoid_loss(images, texts, scale.detach(), bias)


@bug("sigmoid_loss", EULER, "dscale taken with S, which holds scale and bias, in place of x yᵀ.", rung="np")
def scale_gradient_with_scores(images, texts, scale, bias):
    value, (dimages, dtexts, dscale, dbias) = sigmoid_loss_np(images, texts, scale, bias)
    return value, (dimages, dtexts, scale * dscale + bias * dbias, dbias)


@bug("sigmoid_loss", SLOPES, "The bias is detached, so it is never learned.")
def bias_detached(images, texts, scale, bias):
    return sigmoid_loss(images, texts, scale, bias.detach())


@bug("sigmoid_loss", SLOPES, "Texts of other chunks arrive without their gradient.")
def texts_detached(images, texts, scale, bias):
    return sigmoid_loss(images, texts.detach(), scale, bias)


@bug("sigmoid_loss", BLOCKS, "Tile by tile: the last row of tiles, when not full, is never visited.")
def ragged_tiles_dropped(images, texts, scale, bias):
    S, full = scale * images @ texts.T + bias, max(1, len(images) // 2 * 2)
    z = 2 * torch.eye(len(images), dtype=S.dtype) - 1
    return -F.logsigmoid(z * S)[:full].sum() / len(images)


@bug("sigmoid_loss", LOOP, "Scores are clamped before exp, and what was cut off is forgotten.")
def clamped(images, texts, scale, bias):
    S = (scale * images @ texts.T + bias).clamp(-80, 80)
    z = 2 * torch.eye(len(images), dtype=S.dtype) - 1
    return -F.logsigmoid(z * S).sum() / len(images)


def in_tiles(images, texts, scale, bias, offset, tile=None):
    """The loss whose positives are on the diagonal at `offset(row start, column start)` of each tile."""
    S, B = scale * images @ texts.T + bias, len(images)
    z = torch.full_like(S, -1)
    height, width = tile or stream.TILE
    for row in range(0, B, height):
        for column in range(0, B, width):
            part = z[row : row + height, column : column + width]
            k = offset(row, column)
            if k is not None and -part.shape[0] < k < part.shape[1]:
                part.diagonal(k).fill_(1)
    return -F.logsigmoid(z * S).sum() / B


@bug("sigmoid_loss", PAIRS, "Tile by tile: the diagonal of every tile is taken for right.", rung="fused")
def diagonal_of_every_tile(images, texts, scale, bias):
    return in_tiles(images, texts, scale, bias, lambda row, column: 0)


@bug(
    "sigmoid_loss",
    PAIRS,
    "Tile by tile: only tiles that begin on the diagonal have right pairs.",
    rung="fused",
)
def diagonal_where_starts_are_equal(images, texts, scale, bias):
    return in_tiles(images, texts, scale, bias, lambda row, column: 0 if row == column else None)


@bug("sigmoid_loss", PAIRS, "Tile by tile: the offset of the diagonal with the wrong sign.", rung="fused")
def offset_with_the_wrong_sign(images, texts, scale, bias):
    return in_tiles(images, texts, scale, bias, lambda row, column: column - row)


@bug(
    "sigmoid_loss", PAIRS, "Its own tiles, of 64 × 96: every one has positives on its diagonal.", rung="fused"
)
def diagonal_of_every_tile_of_its_own(images, texts, scale, bias):
    return in_tiles(images, texts, scale, bias, lambda row, column: 0, (64, 96))


def with_slopes(images, texts, scale, bias, G):
    """The right value, the gradients that follow from another G."""
    value = sigmoid_loss_np(images, texts, scale, bias)[0]
    return value, (scale * G @ texts, scale * G.T @ images, (G * (images @ texts.T)).sum(), G.sum())


def probabilities(images, texts, scale, bias):
    """z and σ(−z S)."""
    z = 2 * np.eye(len(images)) - 1
    return z, np.exp(-np.logaddexp(0, z * (scale * images @ texts.T + bias)))


@bug("sigmoid_loss", HARD, "The scores are cut off at ± 10 in the gradient.", rung="np")
def clipped_scores(images, texts, scale, bias):
    S, z = scale * images @ texts.T + bias, 2 * np.eye(len(images)) - 1
    return with_slopes(images, texts, scale, bias, -z / (1 + np.exp(z * S.clip(-10, 10))) / len(S))


@bug("sigmoid_loss", HARD, "Probabilities are cut off at 1e-7 in the gradient: it never vanishes.", rung="np")
def clipped_probabilities(images, texts, scale, bias):
    z, p = probabilities(images, texts, scale, bias)
    return with_slopes(images, texts, scale, bias, -z * p.clip(1e-7, 1 - 1e-7) / len(images))


@bug("sigmoid_loss", HARD, "No gradient where a pair is sure, and wrong.", rung="np")
def nothing_where_sure(images, texts, scale, bias):
    z, p = probabilities(images, texts, scale, bias)
    return with_slopes(images, texts, scale, bias, -z * np.where(p > 1 - 1e-9, 0, p) / len(images))


@bug("sigmoid_loss", SINGLE, "z is made in float64, and float32 leaves as float64.")
def z_in_float64(images, texts, scale, bias):
    z = 2 * torch.eye(len(images), dtype=torch.float64) - 1
    return -F.logsigmoid(z * (scale * images @ texts.T + bias)).sum() / len(images)


@bug(
    "sigmoid_loss", MANY, "Its own tiles, of 64: the rows that do not fill a tile are left out.", rung="fused"
)
def rest_of_its_own_tiles_dropped(images, texts, scale, bias):
    S, full = scale * images @ texts.T + bias, len(images) // 64 * 64 or len(images)
    z = 2 * torch.eye(len(images), dtype=S.dtype) - 1
    return -F.logsigmoid(z * S)[:full].sum() / len(images)


@bug(
    "sigmoid_loss", HELD, "The plain loss: S is made whole, and three arrays like it are kept.", rung="fused"
)
def plain(images, texts, scale, bias):
    z = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -F.logsigmoid(z * (scale * images @ texts.T + bias)).sum() / len(images)


@bug(
    "sigmoid_loss",
    HELD,
    "Nothing is kept, but the plain loss is made again in the backward pass.",
    rung="fused",
)
def made_twice(images, texts, scale, bias):
    return torch.utils.checkpoint.checkpoint(sigmoid_loss, images, texts, scale, bias, use_reentrant=False)
