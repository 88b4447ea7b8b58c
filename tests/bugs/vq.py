"""Plausible wrong quantisers."""

import numpy as np
import torch

from minivlp.vq import kmeans, nearest, nearest_np, restart_dead, vq, vq_fused, vq_np
from tests.laws import bug

BRUTE, TIES, TILES = "equals_brute_force", "ties_go_to_the_first", "many_tiles_find_one_code"
LOOP, SIDES, THROUGH = "equals_the_slow_loop", "each_term_moves_one_side", "straight_through"


@bug("nearest", BRUTE, "The largest dot product: the norm of the codes is forgotten.")
def nearest_without_norm(z, codes):
    return (z @ codes.T).argmax(1)


@bug("nearest", BRUTE, "The norm counted at half its weight: z·c − ‖c‖².")
def norm_at_double_weight(z, codes):
    return (z @ codes.T - codes.square().sum(1)).argmax(1)


@bug("nearest", BRUTE, "Cosines: the length of a code does not count.")
def nearest_by_cosine(z, codes):
    return (z @ (codes / codes.norm(dim=1, keepdim=True)).T).argmax(1)


@bug("nearest", BRUTE, "The farthest code: argmin of S.")
def farthest(z, codes):
    return (2 * z @ codes.T - codes.square().sum(1)).argmin(1)


@bug("nearest", TIES, "Of equal scores the last is taken.")
def ties_last(z, codes):
    S = 2 * z @ codes.T - codes.square().sum(1)
    return S.shape[1] - 1 - S.flip(1).argmax(1)


@bug("nearest", TILES, "The number is counted from the beginning of the tile.", rung="fused")
def numbered_in_its_tile(z, codes):
    return nearest(z, codes) % 128


@bug("nearest", TILES, "What does not fill the last tile is never read.", rung="fused")
def last_tile_dropped(z, codes):
    return nearest(z, codes[: len(codes) // 128 * 128 or len(codes)])


@bug("nearest", "tiles_are_all_that_is_made", "The plain function: S is made whole.", rung="fused")
def whole_matrix(z, codes):
    return nearest(z, codes)


@bug("nearest", BRUTE, "The axes exchanged: each code's vector in place of each vector's code.", rung="np")
def vector_of_each_code(z, codes):
    return np.resize(nearest_np(codes, z), len(z))


@bug("vq", SIDES, "β on the codebook term, as in much public code.")
def beta_on_codebook(z, codes, beta=0.25):
    c = codes[nearest(z, codes)]
    loss = (z - c.detach()).square().mean() + beta * (z.detach() - c).square().mean()
    return c.detach() + (z - z.detach()), loss


@bug("vq", SIDES, "No stop gradient: both terms move both sides.")
def nothing_stopped(z, codes, beta=0.25):
    c = codes[nearest(z, codes)]
    return c.detach() + (z - z.detach()), (1 + beta) * (z - c).square().mean()


@bug("vq", THROUGH, "The argmax has no gradient, and nothing is passed around it.")
def straight_through_missing(z, codes, beta=0.25):
    quantised, loss = vq(z, codes, beta)
    return quantised.detach() + 0 * z, loss


@bug("vq", THROUGH, "What follows moves the codes too.")
def upstream_to_the_codes(z, codes, beta=0.25):
    _, loss = vq(z, codes, beta)
    return codes[nearest(z, codes)] + (z - z.detach()), loss


@bug("vq", LOOP, "The sum over numbers, not their mean.")
def sum_for_mean(z, codes, beta=0.25):
    quantised, loss = vq(z, codes, beta)
    return quantised, loss * z.numel()


@bug("vq", LOOP, "The mean over vectors of squared lengths.")
def mean_over_vectors(z, codes, beta=0.25):
    quantised, loss = vq(z, codes, beta)
    return quantised, loss * z.shape[1]


@bug("vq", LOOP, "Distances, not their squares.")
def unsquared(z, codes, beta=0.25):
    quantised, _ = vq(z, codes, beta)
    c = codes[nearest(z, codes)]
    return quantised, (z.detach() - c).abs().mean() + beta * (z - c.detach()).abs().mean()


@bug("vq", LOOP, "z + (c − z) is not quite c, and is another code's vector for the next reader.")
def rounded_codes(z, codes, beta=0.25):
    quantised, loss = vq(z, codes, beta)
    return quantised + 1e-9, loss


@bug("vq", "beta_is_a_quarter", "β is 1 unless it is given.")
def beta_of_one(z, codes, beta=1.0):
    return vq(z, codes, beta)


@bug("vq", SIDES, "Of the vectors of a code the last one alone counts.", rung="np")
def last_vector_of_a_code(z, codes, beta=0.25, grad=None):
    value, (dz, dcodes) = vq_np(z, codes, beta, grad)
    ids, g = nearest_np(z, codes), 1 if grad is None else grad[1]
    dcodes = np.zeros_like(codes)
    dcodes[ids] = -2 * g / z.size * (z - codes[ids])
    return value, (dz, dcodes)


@bug("vq", SIDES, "The slope of the loss is taken to be 1.", rung="np")
def slope_of_one(z, codes, beta=0.25, grad=None):
    return vq_np(z, codes, beta, None if grad is None else (grad[0], 1.0))


@bug("vq", "unused_codes_stay", "Weight decay inside the gradient: unused codes shrink.")
def decayed(z, codes, beta=0.25):
    quantised, loss = vq(z, codes, beta)
    return quantised, loss + 1e-3 * (codes.square().sum() - codes.detach().square().sum())


@bug("vq", "no_more_than_tiles_is_held", "The plain function: S is made whole.", rung="fused")
def plain(z, codes, beta=0.25):
    return vq(z, codes, beta)


@bug("vq", "many_tiles_give_one_answer", "The first tile of vectors alone moves the codes.", rung="fused")
def first_tile_moves_codes(z, codes, beta=0.25):
    quantised, loss = vq_fused(z, codes, beta)
    few = vq_fused(z[:128], codes, beta)[1] * (min(len(z), 128) / len(z))
    return quantised, few + (loss - few).detach()


@bug("vq", "float32_is_enough", "Computed in float64 and left there.")
def computed_in_float64(z, codes, beta=0.25):
    return vq(z.double(), codes.double(), beta)


def lloyd(z, K, rng, steps, restart=True, move=1.0, start=None):
    """k-means with room for one mistake."""
    x = torch.from_numpy(z)
    codes = x[rng.choice(len(z), K, replace=False)] if start is None else start(x)
    for _ in range(steps):
        ids = nearest(x, codes)
        means = torch.stack([x[ids == k].mean(0) if (ids == k).any() else codes[k] for k in range(K)])
        codes = codes + move * (means - codes)
        codes = restart_dead(codes, ids, x, rng) if restart else codes
    return codes.numpy()


@bug("kmeans", "dead_codes_come_back", "Dead codes stay where they are.", rung="plain")
def dead_codes_kept(z, K, rng, steps=20):
    return lloyd(z, K, rng, steps, restart=False)


@bug("kmeans", "begins_at_vectors", "Codes begin as noise, far from the vectors.", rung="plain")
def begins_as_noise(z, K, rng, steps=20):
    return lloyd(z, K, rng, steps, start=lambda x: torch.from_numpy(rng.standard_normal((K, x.shape[1]))))


@bug("kmeans", "begins_at_vectors", "A row may be drawn twice.", rung="plain")
def drawn_with_return(z, K, rng, steps=20):
    return lloyd(z, K, rng, steps, start=lambda x: x[rng.integers(len(x), size=K)])


@bug("kmeans", "distortion_never_rises", "Codes jump over their means.", rung="plain")
def jumps_over(z, K, rng, steps=20):
    return lloyd(z, K, rng, steps, move=2.5)


@bug("kmeans", "ends_at_means", "Codes go only half of the way, and once.", rung="plain")
def half_way_once(z, K, rng, steps=20):
    return lloyd(z, K, rng, min(steps, 1), move=0.5)


@bug("kmeans", "the_generator_decides", "Draws by a generator of its own.", rung="plain")
def own_generator(z, K, rng, steps=20):
    return kmeans(z, K, np.random.default_rng(), steps)


@bug("kmeans", "a_step_is_one_move", "One step more than asked for.", rung="plain")
def a_step_too_many(z, K, rng, steps=20):
    return kmeans(z, K, rng, steps + (steps > 0))
