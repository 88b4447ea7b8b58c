"""Chameleon's published weights: the names that Hugging Face gives its tensors, and ours.

Beside the names two things differ: Hugging Face keeps queries, keys and values apart where we stack them in
this order, and has the norms of queries and keys as (heads, width) where ours have an axis of tokens.

Sources: the state dict of Hugging Face's ChameleonForConditionalGeneration.
Left out: the VQ-VAE's tensors, which are read over.
"""

import re
from typing import Any

from torch import Tensor

from minivlp.core import require
from minivlp.models.published import names

# A name that ends in "." stands for its weight and its bias, braces for tensors that are stacked in ours.
MODEL = [
    ("word.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
]
BLOCK = [
    ("norm1.weight", "input_layernorm.weight"),
    ("qkv.weight", "self_attn.{q,k,v}_proj.weight"),
    ("q_norm.", "self_attn.q_norm."),
    ("k_norm.", "self_attn.k_norm."),
    ("proj.weight", "self_attn.o_proj.weight"),
    ("norm2.weight", "post_attention_layernorm.weight"),
    ("mlp.gate.weight", "mlp.gate_proj.weight"),
    ("mlp.up.weight", "mlp.up_proj.weight"),
    ("mlp.down.weight", "mlp.down_proj.weight"),
]
RULE = "must hold a Chameleon with its Hugging Face names, and nothing else"


def from_hugging_face(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A published state dict in our names and shapes, float32; and what Hugging Face calls each of them.

    Raises ValueError when a tensor is missing or unexpected.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith("model.vqmodel.")}
    rows = list(MODEL)
    for i in range(names.count_layers(state, "model.layers.")):
        rows += [(f"blocks.{i}.{a}", f"model.layers.{i}.{b}") for a, b in BLOCK]
    rows = names.both(rows)
    tensors, spelling = names.read(rows, state, (RULE, RULE)), dict(rows)
    for name, tensor in tensors.items():
        if re.search(r"[qk]_norm\.", name):
            require.shapes(**{spelling[name]: (tensor, "H d")})
            tensors[name] = tensor[:, None]
    return tensors, spelling


def config_fields(
    tensors: dict[str, Tensor], spelling: dict[str, str], json: dict[str, Any]
) -> dict[str, Any]:
    """The fields of the ChameleonConfig that the tensors belong to; `json` is config.json ({} = none).

    Raises ValueError when config.json belongs to other weights, or to the 34B model's kind of blocks.
    """
    axes = {"word.weight": "V D", "blocks.0.mlp.gate.weight": "F D", "blocks.0.q_norm.weight": "H 1 d"}
    size = require.shapes(**{spelling[a]: (tensors[a], pattern) for a, pattern in axes.items()})
    layers = sum(name.endswith(".qkv.weight") for name in tensors)
    expected = {
        "model_type": "chameleon", "swin_norm": False, "attention_bias": False, "mlp_bias": False,
        "hidden_act": "silu", "vocab_size": size["V"], "hidden_size": size["D"],
        "num_hidden_layers": layers, "num_attention_heads": size["H"], "num_key_value_heads": size["H"],
    }  # fmt: skip
    for key, value in expected.items():
        if json.get(key, value) != value:
            require.fail("config.json", f"must have {key} = {value!r}", repr(json[key]))
    rotary = json.get("rope_parameters") or {}
    if rotary.get("rope_type", "default") != "default":
        require.fail("config.json", "must have rope_type = 'default'", repr(rotary["rope_type"]))
    return {
        "vocab_size": size["V"], "dim": size["D"], "layers": layers, "heads": size["H"], "hidden": size["F"],
        "base": float(rotary.get("rope_theta", json.get("rope_theta", 10_000.0))),
        "eps": json.get("rms_norm_eps", 1e-5),
    }  # fmt: skip
