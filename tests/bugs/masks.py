"""Plausible wrong tables, powers, leaks and attentions on blocks."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch.nn.functional import normalize

from minivlp.attention import attention, attention_fused
from minivlp.filip import late_interaction
from minivlp.masks import (
    attention_blocks,
    attention_blocks_fused,
    attention_blocks_np,
    influence,
    leaks,
    visible,
)
from minivlp.models.qformer import Qformer
from tests import test_qformer  # noqa: F401, it registers the Q-Former's laws
from tests.laws import bug

LOOP, LAYOUT = "equals_the_slow_loop", "the_layout_means_nothing"
JACOBIAN, PATHS = "the_jacobian_of_real_blocks_is_not_zero_there", "equals_the_walked_paths"
COUNTED = "paths_are_not_counted"
PICTURE, PAIRS = "words_come_back_through_the_picture", "equals_the_pairs_with_a_path"
TOWERS, MASK = "towers_are_separate_passes", "equals_attention_with_the_mask"
HUGE, SLOPES, SINGLE = "stays_exact_at_huge_scores", "gradients_are_the_slopes", "float32_is_enough"
HELD, DEAD = "no_more_than_tiles_is_held", "nothing_is_multiplied_on_dead_blocks"


def segments(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


@bug("visible", LOOP, "Columns look at rows.", rung="plain")
def transposed(lengths, sees, causal=()):
    return visible(lengths, sees, causal).T


# Published: get_causal_mask in models/blip2/qformer_utils.py of torchmultimodal-nightly 2024.4.1, for queries
# and words in one pass. The same mistake in a whole Q-Former stands at the end of this file.
@bug("visible", LOOP, "A plain triangle over all tokens, as soon as one segment is causal.", rung="plain")
def queries_causal(lengths, sees, causal=()):
    mask = visible(lengths, sees)
    return mask & np.tri(len(mask), dtype=bool) if len(causal) else mask


@bug(
    "visible", LOOP, "A causal segment may look at nothing behind it in other segments either.", rung="plain"
)
def causal_everywhere(lengths, sees, causal=()):
    mask, own = visible(lengths, sees), np.isin(segments(lengths), list(causal))
    return mask & (np.tri(len(mask), dtype=bool) | ~own[:, None])


@bug("visible", LOOP, "Two causal segments are one: the later of their words are hidden.", rung="plain")
def causal_as_one(lengths, sees, causal=()):
    mask, own = visible(lengths, sees), np.isin(segments(lengths), list(causal))
    return mask & (np.tri(len(mask), dtype=bool) | ~(own[:, None] & own))


@bug("visible", LOOP, "A causal token cannot see itself.", rung="plain")
def causal_strict(lengths, sees, causal=()):
    own = np.isin(segments(lengths), list(causal))
    return visible(lengths, sees, causal) & ~np.diag(own)


@bug("visible", LOOP, "Causal opens the block of a segment that may not look at itself.", rung="plain")
def causal_opens(lengths, sees, causal=()):
    opened = [[1 if s == t and s in causal else x for t, x in enumerate(r)] for s, r in enumerate(sees)]
    return visible(lengths, opened, causal)


@bug("visible", LOOP, "A padding mask handed over as the mask replaces the causal one.", rung="plain")
def padding_replaces_causal(lengths, sees, causal=()):
    return visible(lengths, sees)


@bug("visible", LOOP, "The past is hidden instead of the future.", rung="plain")
def past_hidden(lengths, sees, causal=()):
    return visible(lengths[::-1], [row[::-1] for row in sees[::-1]], [len(lengths) - 1 - s for s in causal])[
        ::-1, ::-1
    ]


@bug("visible", LOOP, "The [CLS] at the end has the row of a [CLS] at the front.", rung="plain")
def cls_mask_at_front(lengths, sees, causal=()):
    mask = visible(lengths, sees, causal)
    return np.roll(mask, 1, 0) if lengths[-1] == 1 else mask


@bug(
    "visible",
    LAYOUT,
    "Two causal segments: the first may not see the second, whatever the table.",
    rung="plain",
)
def later_segments_hidden(lengths, sees, causal=()):
    segment, own = segments(lengths), np.isin(segments(lengths), list(causal))
    return visible(lengths, sees, causal) & ~(own[:, None] & own & (segment[:, None] < segment))


@bug("influence", JACOBIAN, "What one layer sees, however many there are.", rung="plain")
def one_layer(mask, layers):
    return influence(mask, min(layers, 1))


@bug("influence", JACOBIAN, "One layer too many.", rung="plain")
def one_too_many(mask, layers):
    return influence(mask, layers + 1)


@bug("influence", JACOBIAN, "Columns depend on rows.", rung="plain")
def columns_depend(mask, layers):
    return influence(mask, layers).T


@bug("influence", JACOBIAN, "All that is reached by any number of layers.", rung="plain")
def closure(mask, layers):
    return influence(mask, len(mask) * min(layers, 1))


@bug("influence", PATHS, "The residual stream forgotten: only paths of exactly so many looks.", rung="plain")
def no_residual(mask, layers):
    reach = np.eye(len(mask), dtype=bool)
    for _ in range(layers):
        reach = mask @ reach
    return reach


@bug("influence", PATHS, "Squared once a layer.", rung="plain")
def squared(mask, layers):
    return influence(mask, min(2 ** (layers - 1), 99) if layers else 0)


@bug("influence", PATHS, "Without a layer everything still sees what the mask shows.", rung="plain")
def at_least_one(mask, layers):
    return influence(mask, max(layers, 1))


@bug("influence", COUNTED, "Paths are counted in eight bits: 256 of them are none.", rung="plain")
def eight_bits(mask, layers):
    step = (mask | np.eye(len(mask), dtype=bool)).astype(np.uint8)
    return np.linalg.matrix_power(step, layers) > 0


@bug("influence", COUNTED, "Paths are counted in 64 bits, which is too few for deep stacks.", rung="plain")
def sixty_four_bits(mask, layers):
    return np.linalg.matrix_power((mask | np.eye(len(mask), dtype=bool)).astype(int), layers) > 0


@bug("leaks", PICTURE, "Looks at the mask alone: image_sees_text passes.", rung="plain")
def mask_alone(mask, layers, reads):
    return leaks(mask, 1, reads)


@bug("leaks", PICTURE, "Whether the target reaches its reader.", rung="plain")
def the_other_way(mask, layers, reads):
    return [(i, t) for i, t in reads if influence(mask, layers)[t, i]]


@bug("leaks", PICTURE, "Every token is taken to be predicted by the one before it.", rung="plain")
def next_words_only(mask, layers, reads):
    return leaks(mask, layers, [(i, i + 1) for i in range(len(mask) - 1)])


@bug("leaks", PICTURE, "The pairs that do not leak.", rung="plain")
def what_is_safe(mask, layers, reads):
    return [pair for pair in reads if pair not in leaks(mask, layers, reads)]


@bug("leaks", PAIRS, "Sorted, and each once.", rung="plain")
def as_a_set(mask, layers, reads):
    return sorted(set(leaks(mask, layers, reads)))


@bug(
    "leaks",
    PAIRS,
    "The residual stream forgotten: a position that predicts its own input does not leak.",
    rung="plain",
)
def not_itself(mask, layers, reads):
    return [(i, t) for i, t in leaks(mask, layers, reads) if i != t]


@bug("leaks", PAIRS, "Only targets that come later can leak.", rung="plain")
def later_only(mask, layers, reads):
    return [(i, t) for i, t in leaks(mask, layers, reads) if t > i]


def tensor_mask(lengths, sees, causal):
    return torch.from_numpy(visible(lengths, sees, causal))


@bug("attention_blocks", TOWERS, "The table is not looked at: a full mask, or a triangle.")
def table_ignored(q, k, v, lengths, sees, causal=()):
    return attention(q, k, v, causal=bool(causal))


@bug("attention_blocks", MASK, "The triangle is left out.")
def triangle_left_out(q, k, v, lengths, sees, causal=()):
    return attention_blocks(q, k, v, lengths, sees)


@bug("attention_blocks", MASK, "Keys look at queries.")
def table_transposed(q, k, v, lengths, sees, causal=()):
    turned = [[1 if s == t else sees[t][s] for t in range(len(sees))] for s in range(len(sees))]
    return attention(q, k, v, tensor_mask(lengths, turned, causal) | torch.eye(q.shape[2], dtype=torch.bool))


def by_segment(q, k, v, lengths, sees, causal, merge):
    """Each query segment beside each key segment it may see, merged afterwards: (out, logsumexp) of each."""
    ends = np.cumsum([0, *lengths])
    place = [slice(int(a), int(b)) for a, b in pairwise(ends)]
    parts = []
    for s, rows in enumerate(place):
        found = []
        for t, columns in enumerate(place):
            if sees[s][t] and lengths[s] and lengths[t]:
                S = q[:, :, rows] @ k[:, :, columns].mT / q.shape[-1] ** 0.5
                if s == t and s in causal:
                    S = S.masked_fill(~torch.ones(S.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
                found.append((S.softmax(-1) @ v[:, :, columns], S.logsumexp(-1, keepdim=True), S, columns))
        if found:
            parts.append(merge(found, v))
    return torch.cat(parts, 2)


@bug("attention_blocks", MASK, "A softmax for each key segment, and their mean.")
def mean_of_segments(q, k, v, lengths, sees, causal=()):
    merge = lambda found, v: sum(out for out, *_ in found) / len(found)  # noqa: E731
    return by_segment(q, k, v, lengths, sees, causal, merge)


@bug("attention_blocks", MASK, "A softmax for each key segment, and their sum.")
def sum_of_segments(q, k, v, lengths, sees, causal=()):
    return by_segment(q, k, v, lengths, sees, causal, lambda found, v: sum(out for out, *_ in found))


@bug("attention_blocks", MASK, "Two causal segments share one triangle, counted from the first token of all.")
def triangle_of_the_sequence(q, k, v, lengths, sees, causal=()):
    return attention(q, k, v, torch.from_numpy(np.array(visible(lengths, sees, causal)).T[::-1, ::-1].copy()))


@bug("attention_blocks", HUGE, "The segments are merged by bare exponentials, which overflow.")
def bare_exp(q, k, v, lengths, sees, causal=()):
    def merge(found, v):
        total = sum(S.exp().sum(-1, keepdim=True) for *_, S, _ in found)
        return sum(S.exp() @ v[:, :, columns] for *_, S, columns in found) / total

    return by_segment(q, k, v, lengths, sees, causal, merge)


@bug("attention_blocks", HUGE, "Forbidden keys get −10000 added instead of no weight at all.")
def minus_ten_thousand(q, k, v, lengths, sees, causal=()):
    S = q @ k.mT / q.shape[-1] ** 0.5
    return (S - 1e4 * ~tensor_mask(lengths, sees, causal)).softmax(-1) @ v


@bug("attention_blocks", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(q, k, v, lengths, sees, causal=(), grad=None):
    return attention_blocks_np(q, k, v, lengths, sees, causal)


@bug("attention_blocks", SLOPES, "The weights by which segments are merged are taken for constants.")
def merged_by_constants(q, k, v, lengths, sees, causal=()):
    def merge(found, v):
        shares = torch.cat([lse.detach() for _, lse, *_ in found], -1).softmax(-1)
        return sum(out * shares[..., i : i + 1] for i, (out, *_) in enumerate(found))

    return by_segment(q, k, v, lengths, sees, causal, merge)


@bug("attention_blocks", SINGLE, "Computed in float64 and left there.")
def computed_in_float64(q, k, v, lengths, sees, causal=()):
    return attention_blocks(q.double(), k.double(), v.double(), lengths, sees, causal)


@bug("attention_blocks", HELD, "The plain function: mask, scores and weights are made whole.", rung="fused")
def plain(q, k, v, lengths, sees, causal=()):
    return attention_blocks(q, k, v, lengths, sees, causal)


@bug("attention_blocks", HELD, "By segment, but autograd keeps the weights of each.", rung="fused")
def segments_kept(q, k, v, lengths, sees, causal=()):
    def merge(found, v):
        shares = torch.cat([lse for _, lse, *_ in found], -1).softmax(-1)
        return sum(out * shares[..., i : i + 1] for i, (out, *_) in enumerate(found))

    return by_segment(q, k, v, lengths, sees, causal, merge)


@bug(
    "attention_blocks",
    DEAD,
    "Tile by tile, but under the whole mask: dead tiles are made and thrown away.",
    rung="fused",
)
def masked_tiles(q, k, v, lengths, sees, causal=()):
    return attention_fused(q, k, v, tensor_mask(lengths, sees, causal))


@bug(
    "attention_blocks",
    DEAD,
    "The table is right, but blocks are walked twice in the forward pass.",
    rung="fused",
)
def walked_twice(q, k, v, lengths, sees, causal=()):
    attention_blocks_fused(q.detach(), k.detach(), v.detach(), lengths, sees, causal)
    return attention_blocks_fused(q, k, v, lengths, sees, causal)


# The Q-Former is one stack under three of these tables; its laws stand in tests/test_qformer.py.

TABLES, THROUGH = "three_tables_on_one_set_of_weights", "words_learn_of_the_picture_through_queries"
ALONE, CACHED = "words_of_contrast_have_no_gradient_by_the_picture", "one_pass_equals_the_cached_pass"
ORDER, TWICE = "queries_have_no_order", "contrast_is_unchanged_by_a_query_twice"
SCORES, PADDING = "scores_are_the_loops", "padding_changes_nothing"


@bug(
    "qformer",
    CACHED,
    "Captions in one pass under a plain triangle: a query misses the later ones.",
    rung="plain",
)
class queries_causal_in_one_pass(Qformer):
    def sees(self, table, text_mask):
        mask = super().sees(table, text_mask)
        return mask.tril() if table == "captions" else mask


@bug("qformer", TABLES, "Queries of captions see the words, and words come back through them.", rung="plain")
class queries_see_words(Qformer):
    def sees(self, table, text_mask):
        mask, Q = super().sees(table, text_mask), len(self.query)
        mask[:, :, :Q, Q:] |= (table == "captions") & text_mask[:, None, None]
        return mask


@bug("qformer", TABLES, "Words of captions see later words: the next word is copied.", rung="plain")
class words_see_later_ones(Qformer):
    def sees(self, table, text_mask):
        mask, Q = super().sees(table, text_mask), len(self.query)
        mask[:, :, Q:, Q:] |= text_mask[:, None, None]
        return mask


@bug("qformer", TABLES, "Queries and words that are to be compared see one another.", rung="plain")
class compared_while_looking(Qformer):
    def sees(self, table, text_mask):
        return super().sees("matching" if table == "contrast" else table, text_mask)


@bug("qformer", THROUGH, "Every layer looks at the picture.", rung="plain")
class every_layer_looks(Qformer):
    def __init__(self, config):
        super().__init__(replace(config, every=1))


@bug("qformer", THROUGH, "Words look at the picture themselves.", rung="plain")
class words_look(Qformer):
    def run(self, rows, Q, image=None, image_mask=None, mask=None, kept=None):
        return super().run(rows, rows.shape[1] if image is not None else Q, image, image_mask, mask, kept)


@bug("qformer", ALONE, "Words alone are causal, as for captions.", rung="plain")
class words_alone_causal(Qformer):
    def read_words(self, ids, text_mask):
        L = ids.shape[1]
        mask = torch.ones(L, L, dtype=torch.bool).tril() & text_mask[:, None, None]
        return self.run(self._embed(ids, text_mask), 0, mask=mask | torch.eye(L, dtype=torch.bool))


@bug(
    "qformer",
    CACHED,
    "Words over kept keys stand behind the queries, at the positions Q, Q + 1, …",
    rung="plain",
)
class places_count_the_queries(Qformer):
    def write(self, ids, text_mask, kept):
        shift = torch.nn.functional.embedding(torch.tensor(1), self.position.weight) - self.position.weight[0]
        handle = self.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + shift,))
        found = super().write(ids, text_mask, kept)
        handle.remove()
        return found


@bug("qformer", CACHED, "What is kept grows under the hands of who kept it.", rung="plain")
class kept_grows(Qformer):
    def write(self, ids, text_mask, kept):
        words, more = super().write(ids, text_mask, kept)
        for old, new in zip(kept, more, strict=True):
            old[:] = new
        return words, kept


@bug("qformer", ORDER, "Queries with positions, as words have.", rung="plain")
class queries_with_places(Qformer):
    def run(self, rows, Q, image=None, image_mask=None, mask=None, kept=None):
        places = torch.zeros_like(rows[0])
        places[:Q] = self.position.weight[:Q]
        return super().run(rows + places, Q, image, image_mask, mask, kept)


@bug("qformer", ORDER, "The first query alone says whether they match.", rung="plain")
class first_query_matches(Qformer):
    def itm_logits(self, queries):
        return self.itm(queries[:, 0])


@bug(
    "qformer",
    TWICE,
    "The mean over queries, not the largest: every query must look at what the text names.",
    rung="plain",
)
class mean_over_queries_in_itc(Qformer):
    def similarity(self, queries, words):
        x, y = (normalize(z, dim=-1) for z in (self.image_project(queries), self.text_project(words[:, 0])))
        return (x @ y.T).mean(1)


@bug("qformer", SCORES, "The scores are squeezed, and a batch of one loses its axis.", rung="plain")
class squeezed(Qformer):
    def similarity(self, queries, words):
        return super().similarity(queries, words).squeeze()


@bug("qformer", SCORES, "Pictures choose texts, and no text chooses its picture.", rung="plain")
class one_direction(Qformer):
    def contrast_loss(self, queries, words):
        S = self.scale * self.similarity(queries, words)
        return (S.logsumexp(1) - S.diagonal()).mean()


@bug("qformer", SCORES, "Every word is compared, not the first alone.", rung="plain")
class all_words_compared(Qformer):
    def similarity(self, queries, words):
        return late_interaction(self.text_project(words), self.image_project(queries)).T


@bug("qformer", SCORES, "A linear map of the largest query states, not the mean of maps.", rung="plain")
class largest_states_match(Qformer):
    def itm_logits(self, queries):
        return self.itm(queries.amax(1))


@bug("qformer", PADDING, "Padding is looked at like a word.", rung="plain")
class padded_words_read(Qformer):
    def sees(self, table, text_mask):
        return super().sees(table, torch.ones_like(text_mask))

    def read_words(self, ids, text_mask):
        return self.encode(
            ids, text_mask, torch.zeros(len(ids), 1, self.config.image_dim).to(self.query), "contrast"
        )[1]

    def write(self, ids, text_mask, kept):
        return super().write(ids, torch.ones_like(text_mask), kept)


@bug("qformer", PADDING, "Padding of the picture is looked at like a patch.", rung="plain")
class padded_patches_read(Qformer):
    def run(self, rows, Q, image=None, image_mask=None, mask=None, kept=None):
        return super().run(rows, Q, image, None, mask, kept)
