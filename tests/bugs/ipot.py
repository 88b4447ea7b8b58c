"""Plausible wrong IPOTs and word-patch alignments."""

import numpy as np
import torch

from minivlp.ipot import ipot, wpa, wpa_np
from minivlp.sinkhorn import cosine, sinkhorn
from tests.laws import bug

ROWS, OPTIMUM, UNITS = (
    "row_sums_are_exact",
    "more_steps_reach_the_exact_optimum",
    "cost_and_beta_share_a_unit",
)
SMALL, RECURRENCE = "no_row_is_lost_at_small_beta", "equals_the_plain_recurrence"
GRAPH, SINGLE, ALIGNED = "the_plan_has_no_graph", "float32_is_enough", "float32_is_enough_for_the_alignment"
PADDED, SHORT, KEPT = "padded_zero_rows_spoil_nothing", "real_short_rows_have_a_slope", "no_plan_is_kept"
PADDING, VALUE, SLOPES = "padding_never_counts", "is_the_plan_times_the_cost", "gradients_hold_the_plan_fixed"


def share(cost, row_mask, col_mask):
    """Uniform marginals (…, M, 1) and (…, 1, N) over the real tokens."""
    rows = torch.ones_like(cost[..., 0]) if row_mask is None else row_mask.to(cost)
    columns = torch.ones_like(cost[..., 0, :]) if col_mask is None else col_mask.to(cost)
    return (rows / rows.sum(-1, keepdim=True))[..., None], (columns / columns.sum(-1, keepdim=True))[
        ..., None, :
    ]


def plain_loop(cost, beta, iters, row_mask, col_mask, smooth=0.0):
    """The loop on T itself, with room for one mistake."""
    mu, nu = share(cost, row_mask, col_mask)
    K, T, a = (-cost / beta).exp(), torch.ones_like(cost), (mu > 0).to(cost)
    for _ in range(iters):
        Q = T * K
        b = nu / ((Q * a).sum(-2, keepdim=True) + smooth + (nu == 0))
        a = mu / ((Q * b).sum(-1, keepdim=True) + smooth + (mu == 0))
        T = a * Q * b
    return T


@bug("ipot", ROWS, "Rows first, columns last: now the patches get their exact share and the words do not.")
def columns_last(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    return ipot(cost.mT, beta, iters, col_mask, row_mask).mT


@bug("ipot", ROWS, "1e-8 in the denominators: a little mass leaks in every step.")
def smoothed_denominators(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    return plain_loop(cost, beta, iters, row_mask, col_mask, smooth=1e-8)


@bug("ipot", ROWS, "Padding counts in the marginals: 1/M of the longest caption for all.")
def share_of_padding(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    plan = ipot(cost, beta, iters)
    plan = plan if row_mask is None else plan * row_mask[..., None]
    return plan if col_mask is None else plan * col_mask[..., None, :]


@bug("ipot", OPTIMUM, "The scaling is reset to 1 in every step: the cost falls below the true optimum.")
def reset_scaling(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    """In logarithms, so that this mistake is the only one."""
    mu, nu = (torch.where(z > 0, z.clamp_min(1e-30).log(), -1e30) for z in share(cost, row_mask, col_mask))
    log_T = torch.where(mu > -1e30, 0.0, mu) + 0 * cost  # padded words never begin
    for _ in range(iters):
        log_Q = log_T - cost / beta
        log_b = nu - log_Q.logsumexp(-2, keepdim=True)
        log_T = log_Q + log_b + mu - (log_Q + log_b).logsumexp(-1, keepdim=True)
    return log_T.exp()


@bug("ipot", OPTIMUM, "T is not carried: Sinkhorn at ε = β, however many steps.")
def sinkhorn_at_beta(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    return sinkhorn(cost, eps=beta, iters=iters, row_mask=row_mask, col_mask=col_mask)


@bug("ipot", UNITS, "exp(−C·β) for exp(−C/β).")
def beta_multiplies(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    return ipot(cost * beta, 1.0, iters, row_mask, col_mask)


@bug("ipot", SMALL, "The kernel exp(−C/β) itself: it underflows to 0, and 0/0 is NaN.")
def plain_kernel(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    return plain_loop(cost, beta, iters, row_mask, col_mask)


@bug("ipot", RECURRENCE, "Annealing without extrapolation: ε = β/t and the potentials stay what they were.")
def annealed_sinkhorn(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    mu, nu = share(cost, row_mask, col_mask)
    f = torch.where(mu > 0, 0.0, -torch.inf)  # in units of cost / β, kept from step to step
    for t in range(1, iters + 1):
        g = (nu.log() - (t * (f - cost / beta)).logsumexp(-2, keepdim=True)) / t
        f = (mu.log() - (t * (g - cost / beta)).logsumexp(-1, keepdim=True)) / t
    return (t * (f + g - cost / beta)).exp()


@bug("ipot", RECURRENCE, "T starts at exp(−C/β) and not at 1: one step too many.")
def one_step_too_many(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    return ipot(cost, beta, iters + 1, row_mask, col_mask)


@bug("ipot", RECURRENCE, "Padded words begin like real ones: the first column sums count them.")
def padded_words_begin(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    mu, nu = share(cost, row_mask, col_mask)
    K, T, a = (-cost / beta).exp(), torch.ones_like(cost), torch.ones_like(mu)
    for _ in range(iters):
        Q = T * K
        b = nu / (Q * a).sum(-2, keepdim=True)
        a = mu / (Q * b).sum(-1, keepdim=True)
        T = a * Q * b
    return T


@bug("wpa", PADDING, "The padding of the image is not masked.")
def padded_patches(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    return wpa(words, patches, word_mask, None, beta, iters)


@bug("wpa", PADDING, "The padding of the caption is not masked.")
def padded_words(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    return wpa(words, patches, None, patch_mask, beta, iters)


@bug("wpa", VALUE, "Σ T·S: a similarity where a cost is asked for.")
def similarity(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    return 1 - wpa(words, patches, word_mask, patch_mask, beta, iters)


@bug("wpa", VALUE, "Pairs are sorted by size to save padding, and their values stay in that order.")
def left_in_sorted_order(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    order = torch.arange(len(words)) if patch_mask is None else patch_mask.sum(1).argsort(stable=True)
    masks = (None if mask is None else mask[order] for mask in (word_mask, patch_mask))
    return wpa(words[order], patches[order], *masks, beta, iters)


@bug("wpa", VALUE, "The patches are sorted by their masks, the words are not.")
def one_side_sorted(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    order = torch.arange(len(words)) if patch_mask is None else patch_mask.sum(1).argsort(stable=True)
    value = wpa(
        words, patches[order], word_mask, None if patch_mask is None else patch_mask[order], beta, iters
    )
    return value[order.argsort()]


@bug("wpa", VALUE, "Dot products of tokens that nobody scaled to length one.")
def not_normalised(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    C = 1 - words @ patches.mT
    return (ipot(C, beta, iters, word_mask, patch_mask) * C).sum((-2, -1))


@bug("wpa", VALUE, "A mean over the M × N entries: the plan sums to one already.")
def mean_over_entries(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    return wpa(words, patches, word_mask, patch_mask, beta, iters) / (words.shape[1] * patches.shape[1])


@bug("wpa", VALUE, "Squared distance of unit rows, which is twice 1 − cos.")
def squared_distance(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    C = 2 - 2 * cosine(words, patches)
    return (ipot(C, beta, iters, word_mask, patch_mask) * C).sum((-2, -1))


@bug("wpa", SLOPES, "The cost is detached with the plan: the loss is a number that teaches nothing.")
def detached_cost(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    value = wpa(words.detach(), patches.detach(), word_mask, patch_mask, beta, iters)
    return value + 0 * words.sum() + 0 * patches.sum()


@bug("wpa", SLOPES, "No detach: the gradient runs through every step of the solver.")
def unrolled(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    C = 1 - cosine(words, patches)
    return (plain_loop(C, beta, iters, word_mask, patch_mask) * C).sum((-2, -1))


@bug("wpa", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50, grad=None):
    return wpa_np(words, patches, word_mask, patch_mask, beta, iters)


@bug(
    "wpa",
    SLOPES,
    "The gradient goes to the unit tokens and forgets to come back through the length.",
    rung="np",
)
def length_forgotten(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50, grad=None):
    value, grads = wpa_np(words, patches, word_mask, patch_mask, beta, iters, grad)
    lengths = (np.linalg.norm(z, axis=-1, keepdims=True) for z in (words, patches))
    return value, tuple(g * length for g, length in zip(grads, lengths, strict=True))


ENDS = "first_and_last_real_token_stay_out"


@bug("alignment_masks", ENDS, "[SEP] takes part.", rung="plain")
def sep_takes_part(text_mask):
    return text_mask & (text_mask.cumsum(1) > 1)


@bug("alignment_masks", ENDS, "[CLS] takes part.", rung="plain")
def cls_takes_part(text_mask):
    so_far = text_mask.cumsum(1)
    return text_mask & (so_far < so_far[:, -1:])


@bug(
    "alignment_masks",
    ENDS,
    "The last place is taken for [SEP], which in a short caption is padding.",
    rung="plain",
)
def last_place_dropped(text_mask):
    mask = text_mask.clone()
    mask[:, [0, -1]] = False
    return mask


@bug("alignment_masks", ENDS, "Everything real takes part.", rung="plain")
def nothing_left_out(text_mask):
    return text_mask


@bug("alignment_masks", ENDS, "Padding takes part.", rung="plain")
def padding_takes_part(text_mask):
    so_far = text_mask.cumsum(1)
    return (so_far > 1) & (so_far < so_far[:, -1:]) | ~text_mask


@bug("ipot", GRAPH, "No no_grad: every step of the solver is kept for a backward pass that nobody wants.")
def with_a_graph(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    return ipot(cost, beta, iters, row_mask, col_mask) + 0 * cost


@bug("ipot", SINGLE, "Solved in float64, and the plan is left there.")
def solved_in_float64(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    return ipot(cost.double(), beta, iters, row_mask, col_mask)


def by_units(p, q, word_mask, patch_mask, beta, iters):
    """Alignment of rows that are already divided by their lengths; a NaN among padding has cost 1."""
    C = 1 - p @ q.mT
    rows = torch.ones_like(p[..., 0], dtype=torch.bool) if word_mask is None else word_mask
    columns = torch.ones_like(q[..., 0], dtype=torch.bool) if patch_mask is None else patch_mask
    C = C.masked_fill(~(rows[..., None] & columns[..., None, :]), 1.0)
    return (ipot(C.nan_to_num(1.0), beta, iters, word_mask, patch_mask) * C).sum((-2, -1))


@bug("wpa", PADDED, "No floor under the lengths: a padded row of zeros makes every gradient NaN.")
def no_floor(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    p, q = (z / z.norm(dim=-1, keepdim=True) for z in (words, patches))
    return by_units(p, q, word_mask, patch_mask, beta, iters)


@bug("wpa", SHORT, "The floor is 1e-12: the slope of a short row is ten million times as large.")
def lower_floor(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    p, q = (torch.nn.functional.normalize(z, dim=-1) for z in (words, patches))
    return by_units(p, q, word_mask, patch_mask, beta, iters)


@bug("wpa", SHORT, "A row below the floor receives no gradient.", rung="np")
def nothing_for_short_rows(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50, grad=None):
    value, grads = wpa_np(words, patches, word_mask, patch_mask, beta, iters, grad)
    lengths = (np.linalg.norm(z, axis=-1, keepdims=True) for z in (words, patches))
    return value, tuple(g * (length > 1e-5) for g, length in zip(grads, lengths, strict=True))


@bug("wpa", ALIGNED, "The cosines are float64, and float32 leaves as float64.")
def computed_in_float64(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    return wpa(words.double(), patches.double(), word_mask, patch_mask, beta, iters)


@bug("wpa", KEPT, "The plain function: the plan is kept for the backward pass.", rung="fused")
def plain(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    return wpa(words, patches, word_mask, patch_mask, beta, iters)


@bug("wpa", KEPT, "The gradient by the plan as a coefficient, which autograd keeps.", rung="fused")
def plan_as_a_coefficient(words, patches, word_mask=None, patch_mask=None, beta=0.5, iters=50):
    p, q = (z / z.norm(dim=-1, keepdim=True).clamp_min(1e-5) for z in (words, patches))
    T = ipot(1 - p.detach() @ q.detach().mT, beta, iters, word_mask, patch_mask)
    return 1 - (p * (T @ q)).sum((-2, -1))
