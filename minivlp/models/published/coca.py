"""CoCa's published weights: the names that open_clip gives its tensors, and ours.

open_clip stacks queries, keys and values as we do. Its projections are transposed, and its pooler has one
stacked matrix where picture and text have one width, and three where they differ.

Source: the state dict of open_clip 3.3's CoCa.
Left out: LayerScale, towers of timm and of Hugging Face, models without [CLS]; their tensors are refused by
name.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minivlp.core import require
from minivlp.models.published import names

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


RULE = "must hold open_clip's CoCa, every tensor of it and nothing else"


def from_published(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """open_clip's state dict in our names and shapes, and our name → theirs.

    Raises ValueError when a tensor is missing or unexpected.
    """
    state, rows = dict(state), list(MODEL)
    for ours, theirs in BLOCKS.items():
        for i in range(names.count_layers(state, theirs + ".")):
            parts = BLOCK + [("norm_others.", "ln_1_kv.")] * (ours == "across")
            rows += [(f"{ours}.{i}.{a}", f"{theirs}.{i}.{b}") for a, b in parts]
    for end in {"weight", "bias"} & {name.removeprefix(STACKED) for name in state}:
        parts = state.pop(STACKED + end).chunk(3)
        for part, tensor in zip("qkv", parts, strict=True):
            state[f"visual.attn_pool.attn.{part}_proj_{end}"] = tensor
    rows += [(f"pool.{p}.bias", f"visual.attn_pool.attn.{p}_proj_bias") for p in "qkv"]
    rows = names.both(rows)
    tensors = names.read(rows, state, (RULE, RULE))
    tensors |= {ours: tensors[ours].T for ours in TRANSPOSED}
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
    rule = "must hold g · g positions and one"
    grid = names.square(spelling["position"], size["P"], rule=rule)
    if heads is None:
        for name in "ID":
            if size[name] % 64:
                require.fail("heads", f"must be given, as {size[name]} is not a multiple of 64", "None")
        heads = (size["I"] // 64, size["D"] // 64, 8)
    layers = {ours: names.count_layers(tensors, ours + ".") for ours in BLOCKS}
    return {
        "vocab_size": size["V"], "max_text_len": size["T"] - 1, "patch": size["p"],
        "image_size": grid * size["p"], "image_dim": size["I"], "image_hidden": size["G"],
        "image_layers": layers["image.blocks"], "image_heads": heads[0], "dim": size["D"],
        "hidden": size["F"], "text_layers": layers["text"], "layers": layers["blocks"], "heads": heads[1],
        "queries": size["Q"], "pool_heads": heads[2], "eps": 1e-5,
    }  # fmt: skip
