"""Plausible wrong sigmoid losses."""

import numpy as np
import torch
import torch.nn.functional as F

from minivlp.sigmoid import sigmoid_loss, sigmoid_loss_np
from tests.laws import bug

ZERO, ORDER, BLOCKS = "zero_cosines_leave_the_bias", "pairs_come_in_any_order", "blocks_add_up"
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
