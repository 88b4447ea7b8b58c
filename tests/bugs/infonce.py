"""Plausible wrong InfoNCE losses."""

import math

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from minivlp import stream
from minivlp.infonce import infonce, infonce_np
from tests.laws import bug

EQUAL, ORDER, EXCHANGE = "equal_scores_cost_log_B", "pairs_come_in_any_order", "images_and_texts_exchange"
BOUND, LOOP = "bounds_mutual_information", "equals_the_slow_loop"
PAIRS, HARD = "right_pairs_lie_on_the_diagonal_of_the_whole", "gradients_hold_at_every_score"
SINGLE, MANY, HELD = "float32_is_enough", "many_tiles_give_one_answer", "no_more_than_tiles_is_held"
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


def in_tiles(images, texts, scale, offset, tile=None):
    """InfoNCE whose positives are those of the diagonal at `offset(row start, column start)` of each tile."""
    S, B = scale * images @ texts.T, len(images)
    right = torch.zeros_like(S, dtype=torch.bool)
    height, width = tile or stream.TILE
    for row in range(0, B, height):
        for column in range(0, B, width):
            part = right[row : row + height, column : column + width]
            k = offset(row, column)
            if k is not None and -part.shape[0] < k < part.shape[1]:
                part.diagonal(k).fill_(True)
    return ((S.logsumexp(1) + S.logsumexp(0)).sum() - 2 * S[right].sum()) / (2 * B)


@bug("infonce", PAIRS, "Tile by tile: the diagonal of every tile is taken for right.", rung="fused")
def diagonal_of_every_tile(images, texts, scale):
    return in_tiles(images, texts, scale, lambda row, column: 0)


@bug("infonce", PAIRS, "Tile by tile: only tiles that begin on the diagonal have right pairs.", rung="fused")
def diagonal_where_starts_are_equal(images, texts, scale):
    return in_tiles(images, texts, scale, lambda row, column: 0 if row == column else None)


@bug("infonce", PAIRS, "Tile by tile: the offset of the diagonal with the wrong sign.", rung="fused")
def offset_with_the_wrong_sign(images, texts, scale):
    return in_tiles(images, texts, scale, lambda row, column: column - row)


@bug(
    "infonce",
    PAIRS,
    "Its own tiles, of 64 × 96: the offset is forgotten where only they can see it.",
    rung="fused",
)
def diagonal_of_every_tile_of_its_own(images, texts, scale):
    return in_tiles(images, texts, scale, lambda row, column: 0, (64, 96))


def with_slopes(images, texts, scale, P_row, P_column):
    """The right value, the gradients of another softmax."""
    G = (P_row + P_column - 2 * np.eye(len(images))) / (2 * len(images))
    value = infonce_np(images, texts, scale)[0]
    return value, (scale * G @ texts, scale * G.T @ images, (G * (images @ texts.T)).sum())


def softmaxes(S):
    return [np.exp(S - np.logaddexp.reduce(S, axis, keepdims=True)) for axis in (1, 0)]


@bug("infonce", HARD, "Scores are cut off at ± 50 before the softmax of the gradient.", rung="np")
def clipped_scores(images, texts, scale):
    return with_slopes(images, texts, scale, *softmaxes(np.clip(scale * images @ texts.T, -50, 50)))


@bug("infonce", HARD, "No gradient where the softmax is sure, right or wrong.", rung="np")
def nothing_where_sure(images, texts, scale):
    P = (
        np.where(np.abs(P - 0.5) > 0.5 - 1e-9, np.eye(len(P)), P) for P in softmaxes(scale * images @ texts.T)
    )
    return with_slopes(images, texts, scale, *P)


@bug("infonce", HARD, "Long gradients are cut to length 1, as a step of training would.", rung="np")
def clipped_gradients(images, texts, scale):
    value, grads = infonce_np(images, texts, scale)
    return value, tuple(g / max(1.0, float(np.linalg.norm(g)) / 10) for g in grads)


@bug("infonce", SINGLE, "A float64 array slips in, and float32 leaves as float64.")
def computed_in_float64(images, texts, scale):
    return infonce(images.double(), texts.double(), scale)


@bug(
    "infonce",
    MANY,
    "Its own tiles, of 64: what does not fill a tile is left out of the normalisers.",
    rung="fused",
)
def rest_of_its_own_tiles_dropped(images, texts, scale):
    S, full = scale * images @ texts.T, len(images) // 64 * 64 or len(images)
    return (S[:, :full].logsumexp(1) + S[:full].logsumexp(0) - 2 * S.diagonal()).mean() / 2


@bug("infonce", HELD, "The plain loss: S is made whole and kept.", rung="fused")
def plain(images, texts, scale):
    S = scale * images @ texts.T
    return (S.logsumexp(1) + S.logsumexp(0) - 2 * S.diagonal()).mean() / 2


@bug("infonce", HELD, "Nothing is kept, but the plain loss is made again in the backward pass.", rung="fused")
def made_twice(images, texts, scale):
    return torch.utils.checkpoint.checkpoint(infonce, images, texts, scale, use_reentrant=False)


class FromNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, scale):
        value, grads = infonce_np(*(t.detach().numpy() for t in (images, texts)), float(scale))
        ctx.save_for_backward(*(torch.as_tensor(g) for g in grads))
        return images.new_tensor(value)

    @staticmethod
    def backward(ctx, upstream):
        return tuple(upstream * g for g in ctx.saved_tensors)


@bug("infonce", HELD, "Gradients beside the loss, by NumPy, which makes S whole all the same.", rung="fused")
def whole_in_numpy(images, texts, scale):
    return FromNumPy.apply(images, texts, scale)
