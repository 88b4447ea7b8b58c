"""Plausible wrong pieces of ViLT: each is the library's own with one line changed."""

import inspect
import linecache
from collections.abc import Callable

from minivlp import build_vilt
from tests.laws import bug

SLOPES, LOOP = "gradients_are_the_slopes", "equals_the_slow_loop"


def changed(name: str, mistake: str, *lines: tuple[str, str]) -> Callable:
    """The library's function with each (old, new) put in its source, under the name of the mistake."""
    source = inspect.getsource(getattr(build_vilt, name))
    for old, new in lines:
        assert old != new and source.count(old) == 1, f"{name} has not one {old!r}"
        source = source.replace(old, new)
    file = f"<{mistake} of {name}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file  # so that it can be shown
    names = vars(build_vilt) | {"__name__": __name__}
    exec(compile(source, file, "exec"), names)
    names[name].__name__ = mistake
    return names[name]


def mistakes(family: str, name: str, law: str, rung: str, *rows: tuple) -> None:
    for mistake, story, *lines in rows:
        bug(family, law, story, rung)(changed(name, mistake, *lines))


mistakes(
    "multi_head",
    "multi_head",
    LOOP,
    "torch",
    (
        "scaled_by_the_whole_width",
        "Scores divided by √D, the width of all heads, in place of √d.",
        ("attention(q, k, v, mask)", "attention(q / math.sqrt(heads), k, v, mask)"),
    ),
    (
        "heads_of_tokens",
        "(B, L, D) viewed as (B, H, L, d) at once: heads take tokens, not columns.",
        ("split_heads(y, heads)", "y.reshape(len(y), heads, y.shape[1], -1)"),
    ),
    ("keys_first", "The rows of W in the order of keys, queries, values.", ("q, k, v = (", "k, q, v = (")),
    (
        "joined_without_exchange",
        "The heads are joined without exchanging their axis with that of the tokens.",
        ("join_heads(attention(q, k, v, mask))", "attention(q, k, v, mask).reshape(x.shape)"),
    ),
    (
        "no_output_map",
        "The heads are joined and not mixed: W_O is missing.",
        (
            "linear(join_heads(attention(q, k, v, mask)), wo, bo)",
            "(join_heads(attention(q, k, v, mask)) + 0 * wo.sum() + bo)",
        ),
    ),
    ("mask_ignored", "Padding is read.", ("attention(q, k, v, mask)", "attention(q, k, v)")),
)
mistakes(
    "multi_head",
    "multi_head_np",
    SLOPES,
    "np",
    (
        "values_alone",
        "Z receives the gradient of its values alone: queries and keys were made from it too.",
        ("dz = dqkv @ w_qkv", "dz = dqkv[..., 2 * D :] @ w_qkv[2 * D :]"),
    ),
    (
        "before_the_output_map",
        "The gradient enters the heads without passing W_O.",
        ("grad=split(G @ w_out)", "grad=split(G)"),
    ),
    ("map_transposed", "dO = G W_Oᵀ in place of G W_O.", ("split(G @ w_out)", "split(G @ w_out.T)")),
)


@bug("multi_head", "float32_is_enough", "Computed in float64 and left there.")
def always_double(z, w_qkv, b_qkv, w_out, b_out, heads=1, mask=None):
    arrays = (x.double() for x in (z, w_qkv, b_qkv, w_out, b_out))
    return build_vilt.multi_head(*arrays, heads, mask)


mistakes(
    "block",
    "block",
    "equals_the_module",
    "plain",
    (
        "norm_after",
        "The norm stands behind the first half: post-norm.",
        ('n = layer_norm(z, w["norm1.weight"], w["norm1.bias"], eps)', "n = z"),
        (
            "z = z + multi_head(n, *maps, heads, mask)",
            'z = layer_norm(z + multi_head(n, *maps, heads, mask), w["norm1.weight"], w["norm1.bias"], eps)',
        ),
    ),
    (
        "second_half_not_added",
        "The second half replaces its input.",
        ("return z + linear(", "return linear("),
    ),
    (
        "first_half_not_added",
        "The first half replaces its input.",
        ("z = z + multi_head(", "z = multi_head("),
    ),
    (
        "adds_to_the_norm",
        "The first half is added to the normed tokens: the straight path passes the norm.",
        ("z = z + multi_head(", "z = n + multi_head("),
    ),
    (
        "one_norm",
        "The first norm serves both halves.",
        ('w["norm2.weight"], w["norm2.bias"]', 'w["norm1.weight"], w["norm1.bias"]'),
    ),
    (
        "no_bend",
        "GELU is missing: two maps in a row are one.",
        ('gelu(linear(n, w["fc1.weight"], w["fc1.bias"]))', 'linear(n, w["fc1.weight"], w["fc1.bias"])'),
    ),
    (
        "tanh_form",
        "GELU's tanh form in place of the exact one.",
        ('w["fc1.bias"]))', 'w["fc1.bias"]), approximate="tanh")'),
    ),
    ("mask_lost", "The mask is not handed on.", ("heads, mask)", "heads)")),
    (
        "usual_eps",
        "ε is always 1e-6.",
        ('w["norm1.bias"], eps)', 'w["norm1.bias"])'),
        ('w["norm2.bias"], eps)', 'w["norm2.bias"])'),
    ),
)
mistakes(
    "encoder",
    "encoder",
    "equals_the_encoder",
    "plain",
    (
        "no_last_norm",
        "The last norm is missing.",
        ('return layer_norm(z, w["norm.weight"], w["norm.bias"], eps)', "return z"),
    ),
    (
        "a_norm_after_every_block",
        "The last norm follows every block.",
        ("mask, eps)\n", 'mask, eps)\n        z = layer_norm(z, w["norm.weight"], w["norm.bias"], eps)\n'),
    ),
    (
        "always_the_first_block",
        "Every layer takes the weights of block 0.",
        ('f"blocks.{n}."', '"blocks.0."'),
    ),
    ("one_layer_less", "Blocks are counted from 1.", ("range(layers)", "range(1, layers)")),
    ("mask_lost_on_the_way", "The mask is not handed on.", ("heads, mask, eps)", "heads, None, eps)")),
    ("backwards", "The last block comes first.", ("range(layers)", "reversed(range(layers))")),
)
mistakes(
    "embed_words",
    "embed_words",
    "equals_the_models_rows_of_words",
    "plain",
    ("no_position", "Words without positions.", (' + w["text_position.weight"][: ids.shape[1]]', "")),
    ("no_segment", "The segment is missing.", (' + w["segment.weight"][0]', "")),
    (
        "type_of_the_picture",
        "Words are given the type of patches.",
        ('w["modality.weight"][0]', 'w["modality.weight"][1]'),
    ),
    (
        "position_by_id",
        "The position of a word is looked up by its id.",
        (
            'w["text_position.weight"][: ids.shape[1]]',
            'w["text_position.weight"][ids % len(w["text_position.weight"])]',
        ),
    ),
    (
        "type_before_the_norm",
        "The type is added before the norm.",
        ('w["segment.weight"][0]', 'w["segment.weight"][0] + w["modality.weight"][0]'),
        (', 1e-12) + w["modality.weight"][0]', ", 1e-12)"),
    ),
    (
        "no_norm",
        "The rows are not normed.",
        ('layer_norm(rows, w["text_norm.weight"], w["text_norm.bias"], 1e-12)', "rows"),
    ),
    (
        "words_detached",
        "The word table receives no gradient.",
        ('w["word.weight"][ids]', 'w["word.weight"].detach()[ids]'),
    ),
)
mistakes(
    "embed_patches",
    "embed_patches",
    "equals_the_models_rows_of_a_picture",
    "plain",
    ("cls_last", "The picture's [CLS] stands last.", ("[cls, patches]", "[patches, cls]")),
    ("no_type", "The type is missing.", (' + w["modality.weight"][1]', "")),
    (
        "type_of_words",
        "Patches are given the type of words.",
        ('w["modality.weight"][1]', 'w["modality.weight"][0]'),
    ),
    (
        "positions_shifted",
        "[CLS] has the last position and every patch that of its left neighbour.",
        ('w["position"]', 'w["position"].roll(-1, 0)'),
    ),
    (
        "no_place_for_cls",
        "Patches have positions, [CLS] has none.",
        ('w["position"]', 'torch.cat([0 * w["position"][:1], w["position"][1:]])'),
    ),
)
mistakes(
    "encode",
    "encode",
    "equals_the_models_states",
    "plain",
    (
        "padding_is_read",
        "Padding is not masked.",
        ("real = torch.cat([text_mask, ", "real = torch.cat([text_mask | True, "),
    ),
    (
        "picture_sees_words",
        "In writing, the rows of the picture see words, and carry later ones to earlier.",
        ("order[L:, :L] = False", "pass"),
    ),
    (
        "causal_over_all",
        "In writing, the picture's rows are put in order too.",
        ("order[:L, :L] = order[:L, :L].tril()", "order = order.tril()"),
    ),
    ("always_writing", "No word ever sees a later one.", ("if writing:", "if True:")),
    ("never_writing", "In writing every word sees all others.", ("if writing:", "if False:")),
    (
        "sees_only_earlier",
        "In writing a word does not see itself.",
        (".tril()", ".tril(-1) | (torch.arange(L) == 0)[None]"),
    ),
    (
        "image_first",
        "The picture stands before the words, and the states are cut as if it did not.",
        ("torch.cat([text, image], 1), under", "torch.cat([image, text], 1), under"),
    ),
)
mistakes(
    "mlm_hidden",
    "mlm_hidden",
    "equals_the_models_head_of_words",
    "plain",
    (
        "norm_before_the_bend",
        "The norm comes before GELU.",
        ("bent = gelu(linear(", "bent = (linear("),
        (
            'return layer_norm(bent, w["mlm.norm.weight"], w["mlm.norm.bias"], 1e-12)',
            'return gelu(layer_norm(bent, w["mlm.norm.weight"], w["mlm.norm.bias"], 1e-12))',
        ),
    ),
    (
        "head_without_norm",
        "No norm.",
        ('layer_norm(bent, w["mlm.norm.weight"], w["mlm.norm.bias"], 1e-12)', "bent"),
    ),
    ("head_without_bend", "No GELU.", ("bent = gelu(", "bent = (")),
    (
        "head_adds",
        "The states are added to what the head makes of them.",
        ("return layer_norm(bent,", "return layer_norm(states + bent,"),
    ),
    (
        "head_detached",
        "The states are detached: the model learns nothing from hidden words.",
        ("linear(states,", "linear(states.detach().requires_grad_(),"),
    ),
)
mistakes(
    "itm_logits",
    "itm_logits",
    "equals_the_models_pooler_and_head",
    "plain",
    ("no_tanh", "No tanh: two maps in a row are one.", (".tanh()", "")),
    (
        "tanh_first",
        "tanh before the pooler's map.",
        ("linear(linear(cls, ", "linear(linear(cls.tanh(), "),
        ('["pooler.bias"]).tanh()', '["pooler.bias"])'),
    ),
    ("pooler_without_bias", "The pooler's bias is missing.", (', w["pooler.bias"]', "")),
    ("squashed_twice", "tanh of the logits too.", ('w["itm.bias"])', 'w["itm.bias"]).tanh()')),
    ("columns_exchanged", "Column 0 is made the match.", ('w["itm.bias"])', 'w["itm.bias"]).flip(-1)')),
)
mistakes(
    "pretraining_loss",
    "pretraining_loss",
    "equals_the_recipes_terms",
    "plain",
    (
        "all_examples_match",
        "Examples with hidden words serve matching too, as wrong pairs.",
        ("batch.match >= 0", "batch.match >= -1"),
        ("batch.match[paired]", "batch.match[paired].clamp(min=0)"),
    ),
    (
        "alignment_pulls_all",
        "Wrong pairs are pulled together too.",
        ("(batch.align[aligned] * cost)", "(batch.align[aligned].abs() * cost)"),
    ),
    (
        "alignment_over_the_batch",
        "Alignment's mean is over all examples.",
        ("paired.sum().clamp(min=1)", "len(batch.ids)"),
    ),
    (
        "alignment_unweighted",
        "The weight of the alignment is always 0.1.",
        ('"wpa"] = wpa_weight *', '"wpa"] = 0.1 *'),
    ),
    (
        "picture_token_transported",
        "The picture's [CLS] takes part in the transport.",
        ("image[aligned, 1:]", "image[aligned]"),
    ),
    (
        "word_ends_transported",
        "[CLS] and [SEP] of the text take part in the transport.",
        ("alignment_masks(batch.text_mask[aligned])", "batch.text_mask[aligned]"),
    ),
    (
        "never_written",
        "A batch that is to be written is read like any other: it sees what it predicts.",
        ("heads, batch.written)", "heads)"),
    ),
    (
        "always_mlm",
        "The loss of the next word is called mlm.",
        ('"next" if batch.written else "mlm"', '"mlm"'),
    ),
    (
        "first_patch_pooled",
        "Matching reads the last word instead of the first.",
        ("text[paired, 0]", "text[paired, -1]"),
    ),
)
mistakes(
    "rate",
    "rate",
    "equals_the_librarys_share",
    "plain",
    ("starts_at_zero", "The first step has rate 0.", ("(step + 1)", "step")),
    ("ends_at_zero", "The last step has rate 0.", ("(steps - step)", "(steps - step - 1)")),
    ("whole_run_cools", "The rate falls over the whole run.", ("round(cooldown * steps)", "steps")),
    ("never_cools", "The rate stays.", (" * min(1.0, left)", "")),
    (
        "above_the_peak",
        "The warm-up goes on rising.",
        ("min(1.0, (step + 1) / max(1, warmup))", "((step + 1) / max(1, warmup))"),
    ),
    (
        "the_smaller_share",
        "The smaller of both shares in place of their product.",
        (
            "return min(1.0, (step + 1) / max(1, warmup)) * min(1.0, left)",
            "return min(1.0, (step + 1) / max(1, warmup), left)",
        ),
    ),
)
mistakes(
    "adamw",
    "adamw",
    "equals_torchs_adamw",
    "plain",
    (
        "uncorrected",
        "The means are not divided by 1 − βᵏ: the first steps are a fraction of lr.",
        ("mean / (1 - 0.9**count)", "mean"),
        ("(square / (1 - 0.98**count))", "square"),
    ),
    ("counts_from_zero", "The count is one too high.", ("0.9**count", "0.9**(count + 1)")),
    (
        "l2_in_the_gradient",
        "The decay is added to the gradient, as in Adam with L2: √square divides it too.",
        ("mean, square = 0.9", "grad = grad + decay * weight\n    mean, square = 0.9"),
        ("(1 - lr * decay) * weight", "weight"),
    ),
    ("no_decay", "Nothing decays.", ("(1 - lr * decay) * weight", "weight")),
    (
        "eps_inside",
        "ε under the root.",
        (".sqrt() + 1e-8)", " + 1e-8).sqrt()"),
        ("((square / (1 - 0.98**count))", "(square / (1 - 0.98**count)"),
    ),
    (
        "usual_betas",
        "β₂ = 0.999, Adam's usual one.",
        ("0.98 * square + 0.02 * grad**2", "0.999 * square + 0.001 * grad**2"),
        ("0.98**count", "0.999**count"),
    ),
    ("decay_without_rate", "The weight decays by decay, not by lr · decay.", ("1 - lr * decay", "1 - decay")),
)
mistakes(
    "muon",
    "muon",
    "each_singular_value_by_itself",
    "plain",
    ("raw_momentum", "The momentum itself is the step.", ("range(5)", "range(0)")),
    ("no_nesterov", "M is the mean alone.", ("X = 0.95 * mean + 0.05 * grad", "X = mean")),
    (
        "not_divided",
        "M is not divided by its norm: the iteration runs away.",
        ("X = X / X.norm().clamp(min=1e-7)", "pass"),
    ),
    (
        "by_entries",
        "Squares of entries in place of X Xᵀ.",
        ("square = X @ X.mT", "square = X @ X.mT * torch.eye(len(X), dtype=X.dtype)"),
    ),
    ("no_shape_factor", "Tall matrices move like square ones.", (" * math.sqrt(max(1, A / B))", "")),
    ("wide_factor", "B / A in place of A / B.", ("math.sqrt(max(1, A / B))", "math.sqrt(max(1, B / A))")),
    ("cubic", "The fifth power is left out.", (" + 2.0315 * square @ square", "")),
    ("uphill", "The weight moves up the gradient.", ("weight - lr", "weight + lr")),
)
mistakes(
    "train",
    "train",
    "equals_the_librarys_updates",
    "plain",
    ("no_clipping", "Gradients are not clipped.", ("min(1.0, 1 / (norm + 1e-6))", "1.0")),
    (
        "each_clipped",
        "Every weight is clipped by its own norm.",
        ("1 / (norm + 1e-6)", "1 / (float(g.norm()) + 1e-6)"),
    ),
    (
        "matrices_clipped",
        "The norm counts the matrices of Muon too.",
        ("if g.ndim >= 2 and name not in matrices]", "if g.ndim >= 2]"),
    ),
    (
        "always_at_the_peak",
        "The rate never changes.",
        ("share = rate(step, steps, warmup, cooldown)", "share = 1.0"),
    ),
    (
        "one_step_late",
        "The rate of the step before.",
        ("share = rate(step,", "share = rate(max(0, step - 1),"),
    ),
    ("all_by_adamw", "No weight is updated by Muon.", ("if name in matrices:", "if False:")),
    ("biases_decay", "Biases decay too.", ("decay if g.ndim >= 2 else 0.0", "decay")),
    (
        "counts_all_steps",
        "Steps in which a weight was not read count for its means.",
        ("counts[name] += 1", "counts[name] = step + 1"),
    ),
    (
        "looks_too_early",
        "`look` is told of the step, not of the steps done.",
        ("look(step + 1,", "look(step,"),
    ),
    (
        "weights_given_changed",
        "The tensors that were given are trained in place.",
        ("value.detach().clone().requires_grad_() for", "value.detach().requires_grad_() for"),
    ),
)
