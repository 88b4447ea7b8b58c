"""Plausible wrong late interactions and wrong losses on them."""

import numpy as np
import torch

from minivlp.chamfer import mean_max
from minivlp.filip import filip, filip_np, late_interaction, late_interaction_np
from minivlp.sinkhorn import unit, unit_np
from tests.laws import bug

PADDING, REPEAT = "padding_never_counts", "the_chosen_side_may_repeat_itself"
LOOP, SLOPES, TIES = (
    "equals_the_quadruple_loop",
    "gradients_are_the_slopes",
    "the_first_of_equal_partners_wins",
)


def cosines(x, y):
    return torch.einsum("amd,bnd->abmn", unit(x), unit(y))


def wide(x_mask, y_mask):
    return None if x_mask is None else x_mask[:, None], None if y_mask is None else y_mask[None]


@bug("late_interaction", PADDING, "A padded token may be somebody's best partner.")
def padding_in_the_maximum(x, y, x_mask=None, y_mask=None):
    return mean_max(cosines(x, y), wide(x_mask, y_mask)[0], None)


@bug("late_interaction", PADDING, "A padded token looks for its own best partner and enters the mean.")
def padding_in_the_mean(x, y, x_mask=None, y_mask=None):
    return mean_max(cosines(x, y), None, wide(x_mask, y_mask)[1])


@bug("late_interaction", PADDING, "Padding is set to 0 before the maximum: better than any negative cosine.")
def padding_is_zero(x, y, x_mask=None, y_mask=None):
    y = y if y_mask is None else y * y_mask[..., None]
    return mean_max(cosines(x, y), wide(x_mask, y_mask)[0], None)


@bug("late_interaction", PADDING, "The mean divides by all places, real or not.")
def mean_over_places(x, y, x_mask=None, y_mask=None):
    value = late_interaction(x, y, x_mask, y_mask)
    return value if x_mask is None else value * x_mask.sum(1, keepdim=True) / x.shape[1]


@bug("late_interaction", REPEAT, "The other direction: y's tokens look for partners.")
def other_direction(x, y, x_mask=None, y_mask=None):
    return late_interaction(y, x, y_mask, x_mask).T


@bug("late_interaction", REPEAT, "A softmax's weighted mean in place of the maximum.")
def soft_maximum(x, y, x_mask=None, y_mask=None):
    S = cosines(x, y)
    if y_mask is not None:
        S = S.masked_fill(~y_mask[None, :, None], -1e30)
    best = ((10 * S).softmax(-1) * S).sum(-1)
    return mean_max(best[..., None], wide(x_mask, y_mask)[0], None)


@bug("late_interaction", LOOP, "ColBERT's sum over tokens, not a mean: long captions win.")
def sum_over_tokens(x, y, x_mask=None, y_mask=None):
    M = x.shape[1] if x_mask is None else x_mask.sum(1, keepdim=True)
    return M * late_interaction(x, y, x_mask, y_mask)


@bug("late_interaction", LOOP, "Dot products of rows that nobody scaled to length one.")
def not_normalised(x, y, x_mask=None, y_mask=None):
    return mean_max(torch.einsum("amd,bnd->abmn", x, y), *wide(x_mask, y_mask))


@bug("late_interaction", LOOP, "The mean of all cosines: the tokens are compared as their averages.")
def mean_of_all(x, y, x_mask=None, y_mask=None):
    real = torch.ones(y.shape[:2]) if y_mask is None else y_mask
    average = (cosines(x, y) * real[None, :, None]).sum(-1) / real.sum(1)[:, None]  # (A, B, M)
    return mean_max(average[..., None], wide(x_mask, y_mask)[0], None)


@bug("late_interaction", SLOPES, "The best partners are held fixed with detach: y learns nothing.")
def frozen_partner(x, y, x_mask=None, y_mask=None):
    return late_interaction(x, y.detach(), x_mask, y_mask) + 0 * y.sum()


@bug("late_interaction", SLOPES, "The gradient of the unit rows is taken for that of the rows.", rung="np")
def length_forgotten(x, y, x_mask=None, y_mask=None, grad=None):
    value, (dx, dy) = late_interaction_np(x, y, x_mask, y_mask, grad)
    return value, (dx * unit_np(x)[1], dy * unit_np(y)[1])


@bug("late_interaction", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(x, y, x_mask=None, y_mask=None, grad=None):
    return late_interaction_np(x, y, x_mask, y_mask)


@bug("late_interaction", TIES, "amax splits the gradient between equal maxima.")
def split_between_ties(x, y, x_mask=None, y_mask=None):
    S = cosines(x, y)
    if y_mask is not None:
        S = S.masked_fill(~y_mask[None, :, None], -torch.inf)
    return mean_max(S.amax(-1, keepdim=True), wide(x_mask, y_mask)[0], None)


PADDED, SHORT, SINGLE = "padded_zero_rows_spoil_nothing", "real_short_rows_have_a_slope", "float32_is_enough"
LOSS_SHORT = "real_short_rows_have_a_slope_in_the_loss"
LOSS_PADDED, HARD = "padded_zero_rows_spoil_no_loss", "gradients_hold_at_every_scale"
FIRST, LOSS_SINGLE = "the_first_of_equal_partners_learns", "float32_is_enough_for_the_loss"
EQUAL, ORDER, ONE = "equal_scores_cost_log_B", "pairs_come_in_any_order", "one_token_each_is_infonce"
SLOW, LOSS_SLOPES = "equals_the_slow_loop", "loss_gradients_are_the_slopes"


def halves(images, texts, image_mask=None, text_mask=None):
    image = late_interaction(images, texts, image_mask, text_mask)
    text = late_interaction(texts, images, text_mask, image_mask).T
    return image, text


def choices(image, text, scale):
    """The loss of two matrices of similarities."""
    image, text = scale * image, scale * text
    rows, columns = image.logsumexp(1) - image.diagonal(), text.logsumexp(0) - text.diagonal()
    return (rows + columns).mean() / 2


@bug("filip", EQUAL, "The two directions are added, not averaged.")
def sum_of_directions(images, texts, scale, image_mask=None, text_mask=None):
    return 2 * filip(images, texts, scale, image_mask, text_mask)


@bug("filip", EQUAL, "The pair itself is left out of the denominator.")
def pair_left_out(images, texts, scale, image_mask=None, text_mask=None):
    pair = torch.eye(len(images), dtype=torch.bool)
    image, text = (scale * s for s in halves(images, texts, image_mask, text_mask))
    rows = image.masked_fill(pair, -1e9).logsumexp(1) - image.diagonal()
    return ((rows + text.masked_fill(pair, -1e9).logsumexp(0) - text.diagonal()).mean()) / 2


@bug("filip", ONE, "Each image's right answer is the next text.")
def shifted_target(images, texts, scale, image_mask=None, text_mask=None):
    text_mask = None if text_mask is None else text_mask.roll(1, 0)
    return filip(images, texts.roll(1, 0), scale, image_mask, text_mask)


@bug("filip", ORDER, "Only the first pair of the batch is scored.")
def first_pair_only(images, texts, scale, image_mask=None, text_mask=None):
    image, text = (scale * s for s in halves(images, texts, image_mask, text_mask))
    return (image.logsumexp(1) - image.diagonal() + text.logsumexp(0) - text.diagonal())[0] / 2


@bug("filip", ONE, "scale taken for a temperature: the scores are divided by it.")
def divided_by_scale(images, texts, scale, image_mask=None, text_mask=None):
    return filip(images, texts, 1 / scale, image_mask, text_mask)


@bug("filip", ONE, "Both directions are softmaxes along the rows.")
def rows_twice(images, texts, scale, image_mask=None, text_mask=None):
    image, text = halves(images, texts, image_mask, text_mask)
    return choices(image, text.T, scale)


@bug("filip", SLOW, "One matrix for both directions: texts choose by the images' patches.")
def one_matrix(images, texts, scale, image_mask=None, text_mask=None):
    image, _ = halves(images, texts, image_mask, text_mask)
    return choices(image, image, scale)


@bug("filip", SLOW, "Images choose by the texts' matrix and texts by the images'.")
def matrices_exchanged(images, texts, scale, image_mask=None, text_mask=None):
    image, text = halves(images, texts, image_mask, text_mask)
    return choices(text, image, scale)


@bug("filip", SLOW, "The mean of the two matrices, as for the Chamfer similarity, in both directions.")
def chamfer_in_both(images, texts, scale, image_mask=None, text_mask=None):
    mean = sum(halves(images, texts, image_mask, text_mask)) / 2
    return choices(mean, mean, scale)


@bug("filip", SLOW, "Padding takes part.")
def masks_ignored(images, texts, scale, image_mask=None, text_mask=None):
    return filip(images, texts, scale)


@bug("filip", LOSS_SLOPES, "The scale has no gradient.")
def frozen_scale(images, texts, scale, image_mask=None, text_mask=None):
    return filip(images, texts, scale.detach(), image_mask, text_mask)


@bug("filip", LOSS_SLOPES, "The scale is forgotten in the gradient of the tokens.", rung="np")
def scale_forgotten(images, texts, scale, image_mask=None, text_mask=None):
    value, (dimages, dtexts, dscale) = filip_np(images, texts, scale, image_mask, text_mask)
    return value, (dimages / scale, dtexts / scale, dscale)


@bug("filip", LOSS_SLOPES, "Texts are frozen: only the image tower learns.")
def frozen_texts(images, texts, scale, image_mask=None, text_mask=None):
    return filip(images, texts.detach(), scale, image_mask, text_mask)


def by_units(p, q, x_mask, y_mask):
    """Late interaction of rows that are already divided by their lengths; padding is at −2."""
    S = torch.einsum("amd,bnd->abmn", p, q)
    if x_mask is not None:
        S = S.masked_fill(~x_mask[:, None, :, None], -2)
    if y_mask is not None:
        S = S.masked_fill(~y_mask[None, :, None], -2)
    return mean_max(S, *wide(x_mask, y_mask))


def bare(z):
    return z / z.norm(dim=-1, keepdim=True)


@bug("late_interaction", PADDED, "No floor under the lengths: a padded row of zeros makes gradients NaN.")
def no_floor(x, y, x_mask=None, y_mask=None):
    return by_units(bare(x), bare(y), x_mask, y_mask)


@bug("late_interaction", SHORT, "The floor is 1e-12: the slope of a short row is ten million times as large.")
def lower_floor(x, y, x_mask=None, y_mask=None):
    return by_units(*(torch.nn.functional.normalize(z, dim=-1) for z in (x, y)), x_mask, y_mask)


@bug("late_interaction", SHORT, "A row below the floor receives no gradient.", rung="np")
def nothing_for_short_rows(x, y, x_mask=None, y_mask=None, grad=None):
    value, grads = late_interaction_np(x, y, x_mask, y_mask, grad)
    return value, tuple(g * (unit_np(z)[1] > 1e-5) for g, z in zip(grads, (x, y), strict=True))


@bug("late_interaction", SINGLE, "The cosines are float64, and float32 leaves as float64.")
def computed_in_float64(x, y, x_mask=None, y_mask=None):
    return late_interaction(x.double(), y.double(), x_mask, y_mask)


@bug("filip", LOSS_PADDED, "No floor under the lengths: a padded row of zeros makes gradients NaN.")
def no_floor_in_the_loss(images, texts, scale, image_mask=None, text_mask=None):
    p, q = bare(images), bare(texts)
    image, text = by_units(p, q, image_mask, text_mask), by_units(q, p, text_mask, image_mask).T
    return choices(image, text, scale)


@bug("filip", LOSS_SHORT, "The floor is 1e-12: the slope of a short row is ten million times as large.")
def lower_floor_in_the_loss(images, texts, scale, image_mask=None, text_mask=None):
    p, q = (torch.nn.functional.normalize(z, dim=-1) for z in (images, texts))
    image, text = by_units(p, q, image_mask, text_mask), by_units(q, p, text_mask, image_mask).T
    return choices(image, text, scale)


@bug("filip", LOSS_SHORT, "A row below the floor receives no gradient.", rung="np")
def nothing_for_short_rows_in_the_loss(images, texts, scale, image_mask=None, text_mask=None):
    value, (dimages, dtexts, dscale) = filip_np(images, texts, scale, image_mask, text_mask)
    return value, (dimages * (unit_np(images)[1] > 1e-5), dtexts * (unit_np(texts)[1] > 1e-5), dscale)


@bug("filip", HARD, "Scores are cut off at ± 20 in the gradient.")
def clipped_scores(images, texts, scale, image_mask=None, text_mask=None):
    def near(z):
        z = scale * z
        return z.clamp(-20, 20) + (z - z.clamp(-20, 20)).detach()

    image, text = halves(images, texts, image_mask, text_mask)
    return choices(near(image), near(text), 1)


@bug("filip", HARD, "A pair that is sure, right or wrong, receives no gradient.", rung="np")
def nothing_where_sure(images, texts, scale, image_mask=None, text_mask=None):
    value, grads = filip_np(images, texts, scale, image_mask, text_mask)
    return value, tuple(np.asarray(g) * (1e-9 < value < 20) for g in grads)


@bug("filip", FIRST, "amax splits the gradient between equal maxima.")
def split_between_ties_in_the_loss(images, texts, scale, image_mask=None, text_mask=None):
    S = cosines(images, texts)  # (A, B, M, N)
    if image_mask is not None:
        S = S.masked_fill(~image_mask[:, None, :, None], -2)
    if text_mask is not None:
        S = S.masked_fill(~text_mask[None, :, None], -2)
    rows, columns = wide(image_mask, text_mask)
    image = mean_max(S.amax(-1, keepdim=True), rows, None)
    text = mean_max(S.mT.amax(-1, keepdim=True), columns, None)
    return choices(image, text, scale)


@bug("filip", LOSS_SINGLE, "The cosines are float64, and float32 leaves as float64.")
def loss_in_float64(images, texts, scale, image_mask=None, text_mask=None):
    return filip(images.double(), texts.double(), scale, image_mask, text_mask)
