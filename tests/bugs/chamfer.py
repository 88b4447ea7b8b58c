"""Plausible wrong Chamfer alignments."""

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from minivlp.chamfer import chamfer, chamfer_np, mean_max
from minivlp.sinkhorn import cosine, unit, unit_np
from tests.laws import bug

PADDING, LOOP = "padding_never_counts", "equals_the_double_loop"
PADDED, SHORT, SINGLE = "padded_zero_rows_spoil_nothing", "real_short_rows_have_a_slope", "float32_is_enough"
MANY, HELD = "many_tiles_give_one_answer", "no_more_than_tiles_is_held"
SLOPES, TIES = "gradients_are_the_slopes", "the_first_of_equal_partners_wins"


def halves(S, x_mask, y_mask):
    return mean_max(S, x_mask, y_mask), mean_max(S.mT, y_mask, x_mask)


@bug("chamfer", PADDING, "A padded token may be somebody's best partner.")
def padding_in_the_maximum(x, y, x_mask=None, y_mask=None):
    S = cosine(x, y)
    return 0.5 * (mean_max(S, x_mask, None) + mean_max(S.mT, y_mask, None))


@bug("chamfer", PADDING, "A padded token looks for its own best partner and enters the mean.")
def padding_in_the_mean(x, y, x_mask=None, y_mask=None):
    S = cosine(x, y)
    return 0.5 * (mean_max(S, None, y_mask) + mean_max(S.mT, None, x_mask))


@bug("chamfer", PADDING, "Padding is set to 0 before the maximum: better than any negative cosine.")
def padding_is_zero(x, y, x_mask=None, y_mask=None):
    x = x if x_mask is None else x * x_mask[..., None]
    y = y if y_mask is None else y * y_mask[..., None]
    S = cosine(x, y)
    return 0.5 * (mean_max(S, x_mask, None) + mean_max(S.mT, y_mask, None))


@bug("chamfer", LOOP, "A distance, 1 − s: minimised in place of maximised it would push pairs apart.")
def distance(x, y, x_mask=None, y_mask=None):
    return 1 - chamfer(x, y, x_mask, y_mask)


@bug("chamfer", LOOP, "One direction only: a word without a partner in the image goes unnoticed.")
def one_direction(x, y, x_mask=None, y_mask=None):
    return mean_max(cosine(x, y), x_mask, y_mask)


@bug("chamfer", LOOP, "A sum over tokens, not a mean: long captions win.")
def sum_over_tokens(x, y, x_mask=None, y_mask=None):
    forward, backward = halves(cosine(x, y), x_mask, y_mask)
    M = x.shape[-2] if x_mask is None else x_mask.sum(-1)
    N = y.shape[-2] if y_mask is None else y_mask.sum(-1)
    return 0.5 * (M * forward + N * backward)


@bug("chamfer", LOOP, "Dot products of rows that nobody scaled to length one.")
def not_normalised(x, y, x_mask=None, y_mask=None):
    return 0.5 * sum(halves(x @ y.mT, x_mask, y_mask))


@bug("chamfer", LOOP, "The whole matrix divided by one norm, not each row by its own.")
def one_norm_for_all(x, y, x_mask=None, y_mask=None):
    p, q = (z / z.flatten(-2).norm(dim=-1)[..., None, None] for z in (x, y))
    return 0.5 * sum(halves(p @ q.mT, x_mask, y_mask))


@bug("chamfer", LOOP, "The two halves are added, not averaged.")
def sum_of_halves(x, y, x_mask=None, y_mask=None):
    return sum(halves(cosine(x, y), x_mask, y_mask))


@bug("chamfer", SLOPES, "The best partners are held fixed with detach: one side learns, the other does not.")
def frozen_partner(x, y, x_mask=None, y_mask=None):
    return 0.5 * sum(halves(cosine(x, y.detach()), x_mask, y_mask)) + 0 * y.sum()


@bug("chamfer", SLOPES, "The gradient of the unit rows is taken for that of the rows.", rung="np")
def length_forgotten(x, y, x_mask=None, y_mask=None, grad=None):
    value, (dx, dy) = chamfer_np(x, y, x_mask, y_mask, grad)
    return value, (dx * unit_np(x)[1], dy * unit_np(y)[1])


@bug("chamfer", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(x, y, x_mask=None, y_mask=None, grad=None):
    return chamfer_np(x, y, x_mask, y_mask)


@bug("chamfer", TIES, "amax splits the gradient between equal maxima.")
def split_between_ties(x, y, x_mask=None, y_mask=None):
    S = unit(x) @ unit(y).mT
    down, across = S, S
    if x_mask is not None:
        down = S.masked_fill(~x_mask[..., None], -torch.inf)
    if y_mask is not None:
        across = S.masked_fill(~y_mask[..., None, :], -torch.inf)
    forward, backward = across.amax(-1), down.amax(-2)
    rows = torch.ones_like(forward) if x_mask is None else x_mask
    columns = torch.ones_like(backward) if y_mask is None else y_mask
    return 0.5 * (
        torch.where(rows > 0, forward, 0).sum(-1) / rows.sum(-1)
        + torch.where(columns > 0, backward, 0).sum(-1) / columns.sum(-1)
    )


@bug("chamfer", SLOPES, "Tile by tile: a partner's index counts from its tile, not from the first token.")
def index_within_the_tile(x, y, x_mask=None, y_mask=None):
    p, q = unit(x), unit(y)
    astray = p @ q[..., torch.arange(q.shape[-2]) % 2, :].mT
    S = (p @ q.mT).detach() + astray - astray.detach()  # the value of the partner, the gradient of another
    return 0.5 * sum(halves(S, x_mask, y_mask))


@bug("chamfer", TIES, "Tile by tile: ≥ where > belongs, so that the last of equal maxima wins.")
def the_last_of_equals(x, y, x_mask=None, y_mask=None):
    flip = [None if m is None else m.flip(-1) for m in (x_mask, y_mask)]
    return 0.5 * sum(halves(cosine(x.flip(-2), y.flip(-2)), *flip))


@bug("chamfer", PADDED, "No floor under the lengths: a padded row of zeros makes every gradient NaN.")
def no_floor(x, y, x_mask=None, y_mask=None):
    p, q = (z / z.norm(dim=-1, keepdim=True) for z in (x, y))
    S = p @ q.mT
    if x_mask is not None:
        S = S.masked_fill(~x_mask[..., None], -2)
    if y_mask is not None:
        S = S.masked_fill(~y_mask[..., None, :], -2)
    return 0.5 * sum(halves(S, x_mask, y_mask))


@bug("chamfer", PADDED, "NaN is put right in the value by one where, and is still there in the gradient.")
def repaired_value(x, y, x_mask=None, y_mask=None):
    p, q = (torch.where((z != 0).any(-1, keepdim=True), z / z.norm(dim=-1, keepdim=True), 0) for z in (x, y))
    return 0.5 * sum(halves(p @ q.mT, x_mask, y_mask))


@bug("chamfer", SHORT, "The floor is 1e-12: the slope of a short row is ten million times as large.")
def lower_floor(x, y, x_mask=None, y_mask=None):
    return 0.5 * sum(halves(F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT, x_mask, y_mask))


@bug(
    "chamfer",
    SHORT,
    "Projected also where the divisor is the constant 1e-5, or no slope there at all.",
    rung="np",
)
def nothing_for_short_rows(x, y, x_mask=None, y_mask=None, grad=None):
    value, (dx, dy) = chamfer_np(x, y, x_mask, y_mask, grad)
    return value, (dx * (unit_np(x)[1] > 1e-5), dy * (unit_np(y)[1] > 1e-5))


@bug("chamfer", SINGLE, "The cosines are float64, and float32 leaves as float64.")
def computed_in_float64(x, y, x_mask=None, y_mask=None):
    return chamfer(x.double(), y.double(), x_mask, y_mask)


@bug(
    "chamfer",
    MANY,
    "Its own tiles, of 64: tokens that do not fill the last one are nobody's partner.",
    rung="fused",
)
def rest_of_its_own_tiles_dropped(x, y, x_mask=None, y_mask=None):
    N = y.shape[-2]
    S = cosine(x, y)
    across = torch.where(torch.arange(N) < (N // 64 * 64 or N), S, -2)
    return 0.5 * (mean_max(across, x_mask, y_mask) + mean_max(S.mT, y_mask, x_mask))


@bug("chamfer", HELD, "The plain function: S is made whole, and the gradients of its maxima.", rung="fused")
def plain(x, y, x_mask=None, y_mask=None):
    return chamfer(x, y, x_mask, y_mask)


@bug("chamfer", HELD, "Partners are looked for without a graph, but in the whole of S.", rung="fused")
def partners_in_the_whole(x, y, x_mask=None, y_mask=None):
    p, q = unit(x), unit(y)
    with torch.no_grad():
        S = cosine(x, y)
        down = S if x_mask is None else S.masked_fill(~x_mask[..., None], -torch.inf)
        across = S if y_mask is None else S.masked_fill(~y_mask[..., None, :], -torch.inf)
        a, b = across.max(-1).indices, down.max(-2).indices
    forward = (p * q.gather(-2, a[..., None].expand_as(p))).sum(-1)
    backward = (q * p.gather(-2, b[..., None].expand_as(q))).sum(-1)
    w = torch.ones_like(forward) if x_mask is None else x_mask.to(p).expand_as(forward)
    v = torch.ones_like(backward) if y_mask is None else y_mask.to(q).expand_as(backward)
    return 0.5 * ((w * forward).sum(-1) / w.sum(-1) + (v * backward).sum(-1) / v.sum(-1))
