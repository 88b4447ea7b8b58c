"""Plausible wrong InfoNCE losses."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from minivlp.infonce import infonce, infonce_np
from tests.laws import bug

EQUAL, ORDER, EXCHANGE = "equal_scores_cost_log_B", "pairs_come_in_any_order", "images_and_texts_exchange"
BOUND, LOOP = "bounds_mutual_information", "equals_the_slow_loop"
EULER, SLOPES = "scale_and_images_share_one_slope", "gradients_are_the_slopes"


@bug("infonce", EQUAL, "The two directions are added, not averaged.")
def sum_of_directions(images, texts, scale):
    return 2 * infonce(images, texts, scale)


@bug("infonce", EQUAL, "The batch is summed, not averaged.")
def sum_over_batch(images, texts, scale):
    return len(images) * infonce(images, texts, scale)


@bug("infonce", EQUAL, "The positive is dropped from its own denominator.")
def diagonal_dropped(images, texts, scale):
    S = scale * images @ texts.T
    negatives = S.masked_fill(torch.eye(len(images), dtype=torch.bool), -math.inf)
    return (negatives.logsumexp(1) + negatives.logsumexp(0) - 2 * S.diagonal()).mean() / 2


@bug("infonce", ORDER, "Targets off by one: the right answer is the next text.")
def next_text(images, texts, scale):
    return infonce(images, texts.roll(1, 0), scale)


@bug("infonce", ORDER, "Targets remembered from a larger batch, so the last pairs point elsewhere.")
def stale_targets(images, texts, scale):
    S, target = scale * images @ texts.T, torch.arange(len(images)).clamp(max=max(0, len(images) - 2))
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2


@bug("infonce", EXCHANGE, "One direction only: images choose texts, texts never choose images.")
def one_direction(images, texts, scale):
    return F.cross_entropy(scale * images @ texts.T, torch.arange(len(images)))


@bug("infonce", EXCHANGE, "The columns' softmax is taken along the rows again, and read transposed.")
def softmax_along_rows_twice(images, texts, scale):
    P = (scale * images @ texts.T).log_softmax(1)
    return -(P.diagonal() + P.T.diagonal()).mean() / 2


@bug(
    "infonce", BOUND, "The positive leaves its denominator and log B is patched: claims more than log B nats."
)
def diagonal_dropped_and_patched(images, texts, scale):
    B = len(images)
    return (
        diagonal_dropped(images, texts, scale) + math.log(B / (B - 1))
        if B > 1
        else 0 * infonce(images, texts, scale)
    )


@bug("infonce", LOOP, "The temperature upside down: divided by the scale.")
def temperature_upside_down(images, texts, scale):
    return infonce(images, texts, 1 / scale)


@bug("infonce", LOOP, "Divided by √D, as in attention.")
def divided_by_root_width(images, texts, scale):
    return infonce(images / images.shape[1] ** 0.5, texts, scale)


@bug("infonce", LOOP, "Rows normalised inside the loss.")
def normalised_inside(images, texts, scale):
    return infonce(F.normalize(images, dim=1), F.normalize(texts, dim=1), scale)


@bug("infonce", LOOP, "The mean of the probabilities goes into the log, instead of the mean of the logs.")
def log_of_mean(images, texts, scale):
    S = scale * images @ texts.T
    return -sum(S.softmax(d).diagonal().mean().log() for d in (0, 1)) / 2


@bug("infonce", LOOP, "exp without subtracting the largest score: overflows.", rung="np")
def no_maximum_subtracted(images, texts, scale):
    S = scale * images @ texts.T
    E = np.exp(S)
    value = (np.log(E.sum(1)) + np.log(E.sum(0)) - 2 * S.diagonal()).mean() / 2
    return value, infonce_np(images, texts, scale)[1]


@bug("infonce", EULER, "The scale is detached, so it is never learned.")
def scale_detached(images, texts, scale):
    return infonce(images, texts, scale.detach())


@bug("infonce", EULER, "The gradient of log-scale handed out as that of the scale.", rung="np")
def gradient_of_log_scale(images, texts, scale):
    value, (dimages, dtexts, dscale) = infonce_np(images, texts, scale)
    return value, (dimages, dtexts, scale * dscale)


@bug("infonce", SLOPES, "Texts gathered without their gradient.")
def texts_detached(images, texts, scale):
    return infonce(images, texts.detach(), scale)


@bug("infonce", SLOPES, "G without its half for two directions.", rung="np")
def gradient_twice_too_large(images, texts, scale):
    value, grads = infonce_np(images, texts, scale)
    return value, tuple(2 * g for g in grads)


@bug("infonce", LOOP, "Tile by tile: the last row and column of tiles, when not full, are never visited.")
def ragged_tiles_dropped(images, texts, scale):
    S, full = scale * images @ texts.T, max(1, len(images) // 2 * 2)
    return (S[:, :full].logsumexp(1) + S[:full].logsumexp(0) - 2 * S.diagonal()).mean() / 2


@bug("infonce", EXCHANGE, "Tile by tile: the columns' normalisers start anew in each row of tiles.")
def columns_start_anew(images, texts, scale):
    S, last = scale * images @ texts.T, (len(images) - 1) // 2 * 2
    return (S.logsumexp(1) + S[last:].logsumexp(0) - 2 * S.diagonal()).mean() / 2


@bug("infonce", LOOP, "One shift for all scores, and no other where the sum underflows to 0.")
def one_shift_for_all(images, texts, scale):
    S = scale * images @ texts.T
    E = (S - S.max()).exp()
    return S.max() + ((E.sum(1).log() + E.sum(0).log()) / 2 - S.diagonal()).mean()


@bug("infonce", SLOPES, "Tile by tile: Gᵀ X is made from tiles of G that nobody transposed.", rung="np")
def tiles_not_transposed(images, texts, scale):
    value, (dimages, _, dscale) = infonce_np(images, texts, scale)
    S = scale * images @ texts.T
    P = [np.exp(S - np.logaddexp.reduce(S, a, keepdims=True)) for a in (0, 1)]
    return value, (
        dimages,
        scale * (P[0] + P[1] - 2 * np.eye(len(images))) @ images / (2 * len(images)),
        dscale,
    )
