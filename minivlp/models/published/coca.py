"""CoCa's published weights: the names that open_clip gives its tensors, and ours.

open_clip stacks queries, keys and values as we do. Its projections are transposed, and its pooler has one
stacked matrix where picture and text have one width, and three where they differ.

Source: the state dict of open_clip 3.3's CoCa.
Left out: LayerScale, towers of timm and of Hugging Face, models without [CLS]; their tensors are refused by
name.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minivlp.core import require

# A name ending in "." stands for its weight and its bias.
MODEL = [
    ("cls", "visual.class_embedding"),
    ("position", "visual.positional_embedding"),
    ("patch.weight", "visual.conv1.weight"),
    ("image_norm.", "visual.ln_pre."),
    ("image.norm.", "visual.attn_pool.ln_k."),
    ("pool.query", "visual.attn_pool.query"),
    ("pool.norm_query.", "visual.attn_pool.ln_q."),
    ("pool.q.weight", "visual.attn_pool.attn.q_proj_weight"),
    ("pool.k.weight", "visual.attn_pool.attn.k_proj_weight"),
    ("pool.v.weight", "visual.attn_pool.attn.v_proj_weight"),
    ("pool.proj.", "visual.attn_pool.attn.out_proj."),
    ("pool.norm.", "visual.ln_post."),
    ("image_project.weight", "visual.proj"),
    ("word.weight", "text.token_embedding.weight"),
    ("text_cls", "text.cls_emb"),
    ("text_position", "text.positional_embedding"),
    ("text_norm.", "text.ln_final."),
    ("text_project.weight", "text.text_projection"),
    ("norm.", "text_decoder.ln_final."),
    ("vocabulary.weight", "text_decoder.text_projection"),
    ("contrast.log_scale", "logit_scale"),
]
BLOCK = [
    ("norm1.", "ln_1."),
    ("qkv.weight", "attn.in_proj_weight"),
    ("qkv.bias", "attn.in_proj_bias"),
    ("proj.", "attn.out_proj."),
    ("norm2.", "ln_2."),
    ("fc1.", "mlp.c_fc."),
    ("fc2.", "mlp.c_proj."),
]
BLOCKS = {
    "image.blocks": "visual.transformer.resblocks",
    "text": "text.transformer.resblocks",
    "blocks": "text_decoder.resblocks",
    "across": "text_decoder.cross_attn",
}
TRANSPOSED = ("image_project.weight", "text_project.weight", "vocabulary.weight")
STACKED = "visual.attn_pool.attn.in_proj_"  # weight and bias of the pooler


def _rows(layers: dict[str, int]) -> list[tuple[str, str]]:
    """(ours, theirs) for every tensor of a CoCa with so many layers."""
    rows = list(MODEL)
    for ours, theirs in BLOCKS.items():
        for i in range(layers[ours]):
            parts = BLOCK + [("norm_others.", "ln_1_kv.")] * (ours == "across")
            rows += [(f"{ours}.{i}.{a}", f"{theirs}.{i}.{b}") for a, b in parts]
    both = [(a + end, b + end) for a, b in rows if a.endswith(".") for end in ("weight", "bias")]
    return both + [row for row in rows if not row[0].endswith(".")]


def from_published(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """open_clip's state dict in our names and shapes, and our name → theirs.

    Raises ValueError when a tensor is missing or unexpected.
    """
    state, layers = dict(state), {}
    for ours, theirs in BLOCKS.items():
        found = [re.match(re.escape(theirs) + r"\.(\d+)\.", name) for name in state]
        layers[ours] = 1 + max((int(match[1]) for match in found if match), default=0)
    for end in {"weight", "bias"} & {name.removeprefix(STACKED) for name in state}:
        parts = state.pop(STACKED + end).chunk(3)
        for part, tensor in zip("qkv", parts, strict=True):
            state[f"visual.attn_pool.attn.{part}_proj_{end}"] = tensor
    rows = _rows(layers) + [(f"pool.{p}.bias", f"visual.attn_pool.attn.{p}_proj_bias") for p in "qkv"]
    ours = {b: a for a, b in rows}
    for what, names in (("unexpected", set(state) - set(ours)), ("missing", set(ours) - set(state))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            got = f"{what} {', '.join(sorted(names)[:3])}{more}"
            require.fail("source", "must hold open_clip's CoCa, every tensor of it and nothing else", got)
    tensors = {ours[b]: tensor.T if ours[b] in TRANSPOSED else tensor for b, tensor in state.items()}
    tensors["contrast.log_scale"] = tensors["contrast.log_scale"].reshape(())
    return tensors, dict(rows)


def config_fields(
    tensors: dict[str, Tensor], spelling: dict[str, str], heads: Sequence[int] | None
) -> dict[str, Any]:
    """The CocaConfig that the tensors belong to, as fields. Raises ValueError on shapes that do not fit."""
    axes = {
        "word.weight": "V D", "text_position": "T D", "text.0.fc1.weight": "F D", "pool.query": "Q D",
        "patch.weight": "I 3 p p", "position": "P I", "image.blocks.0.fc1.weight": "G I",
    }  # fmt: skip
    size = require.shapes(**{spelling[a]: (tensors[a], pattern) for a, pattern in axes.items()})
    grid = math.isqrt(size["P"] - 1)
    if grid**2 != size["P"] - 1:
        require.fail(spelling["position"], "must hold g · g positions and one", size["P"])
    if heads is None:
        for name in "ID":
            if size[name] % 64:
                require.fail("heads", f"must be given, as {size[name]} is not a multiple of 64", "None")
        heads = (size["I"] // 64, size["D"] // 64, 8)
    layers = {ours: len({n.split(".")[ours.count(".") + 1] for n in tensors if n.startswith(ours + ".")})
              for ours in BLOCKS}  # fmt: skip
    return {
        "vocab_size": size["V"], "max_text_len": size["T"] - 1, "patch": size["p"],
        "image_size": grid * size["p"], "image_dim": size["I"], "image_hidden": size["G"],
        "image_layers": layers["image.blocks"], "image_heads": heads[0], "dim": size["D"],
        "hidden": size["F"], "text_layers": layers["text"], "layers": layers["blocks"], "heads": heads[1],
        "queries": size["Q"], "pool_heads": heads[2], "eps": 1e-5,
    }  # fmt: skip
