"""The Q-Former's published weights: the names that Hugging Face's BLIP-2 gives its tensors, and ours.

Four of its classes hold a Q-Former. Blip2QFormerModel is the stack alone: its queries and words are given to
it as rows. Blip2Model and Blip2ForConditionalGeneration add the queries, Blip2ForImageTextRetrieval also the
words, the maps into the space of comparison and the matching head. What a file holds decides what is read.

Source: the state dicts and the configuration classes of Hugging Face's BLIP-2 (Li et al. 2023).
Left out: the picture encoder and the language model, whose tensors are passed over; the original's head of
next words and its temperature, which Hugging Face does not keep.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minivlp.core import require
from minivlp.models.published import names

# A name ending in "." stands for its weight and its bias, braces for tensors that are stacked in ours.
LAYER = [
    ("qkv.", "attention.attention.{query,key,value}."),
    ("proj.", "attention.output.dense."),
    ("norm.", "attention.output.LayerNorm."),
    ("queries.fc1.", "intermediate_query.dense."),
    ("queries.fc2.", "output_query.dense."),
    ("queries.norm.", "output_query.LayerNorm."),
]
ACROSS = [
    ("q.", "crossattention.attention.query."),
    ("kv.", "crossattention.attention.{key,value}."),
    ("proj_cross.", "crossattention.output.dense."),
    ("norm_cross.", "crossattention.output.LayerNorm."),
]
TEXT = [
    ("words.fc1.", "intermediate.dense."),
    ("words.fc2.", "output.dense."),
    ("words.norm.", "output.LayerNorm."),
]
WORDS = [
    ("word.weight", "embeddings.word_embeddings.weight"),
    ("position.weight", "embeddings.position_embeddings.weight"),
]
HEADS = [
    ("image_project.", "vision_projection."),
    ("text_project.", "text_projection."),
    ("itm.", "itm_head."),
]
IGNORED = re.compile(r"(vision_model|language_model|language_projection)\..*|(.*\.)?position_ids")


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Their state dict in our names and shapes, and our name → theirs.

    Raises ValueError when the names are not a Q-Former's, or when one is missing or unexpected.
    """
    state = {name: tensor for name, tensor in state.items() if not IGNORED.fullmatch(name)}
    if "layernorm.weight" in state:  # a Blip2QFormerModel
        state = {f"qformer.{name}": tensor for name, tensor in state.items()}
    if "qformer.layernorm.weight" not in state:
        got = ", ".join([*sorted(state)[:3], "…"])
        require.fail("source", "must hold a Q-Former with its Hugging Face names", got)
    rows = [("norm.", "qformer.layernorm.")]
    for part in ([("query", "query_tokens")], WORDS, HEADS):
        rows += part if any(name.startswith(theirs) for name in state for _, theirs in part) else []
    before = "qformer.encoder.layer."
    for i in range(names.count_layers(state, before)):
        held = [name.removeprefix(f"{before}{i}.") for name in state if name.startswith(f"{before}{i}.")]
        parts = LAYER + ACROSS * any(name.startswith("crossattention.") for name in held)
        parts = parts + TEXT * any(name.startswith(("intermediate.", "output.")) for name in held)
        rows += [(f"layers.{i}.{a}", f"{before}{i}.{b}") for a, b in parts]
    rows = names.both(rows)
    tensors, spelling = names.read(rows, state, names.whole("a Q-Former"), {"query": 1}), dict(rows)
    tensors.setdefault("query", tensors["norm.weight"].new_empty(0, len(tensors["norm.weight"])))
    if "itm.weight" in tensors:
        tensors["contrast.log_scale"] = torch.tensor(math.log(1 / 0.07))
    return tensors, spelling


def config_fields(
    tensors: dict[str, Tensor],
    spelling: dict[str, str],
    json: dict[str, Any],
    heads: int | None,
    eps: float | None,
) -> dict[str, Any]:
    """The fields of the QformerConfig that the tensors belong to; `json` is their config.json ({} = none).

    Shapes tell all but the number of heads and the eps of the norms. For these: the arguments, else
    config.json, else D / 64 heads and 1e-12. Raises ValueError on shapes that do not fit one another, when
    layers differ in what they hold, and when config.json belongs to other weights.
    """
    first = "layers.0."
    axes = {"norm.weight": "D", first + "queries.fc1.weight": "F D", first + "kv.weight": "K I"}
    axes |= {"word.weight": "V D", "position.weight": "T D", "image_project.weight": "E D"}
    held = {a: pattern for a, pattern in axes.items() if a in tensors}
    if first + "kv.weight" not in held:
        require.fail("source", "must look at the picture in layer 0", "one without crossattention")
    size = require.shapes(**{spelling[a]: (tensors[a], pattern) for a, pattern in held.items()})
    layers = names.count_layers(tensors, "layers.")
    across = [i for i in range(layers) if f"layers.{i}.kv.weight" in tensors]
    every = across[1] if len(across) > 1 else layers
    text = [f"layers.{i}.words.fc1.weight" in tensors for i in range(layers)]
    if across != list(range(0, layers, every)) or len(set(text)) > 1:
        rule = "must look at the picture in every n-th layer, and have MLPs for words in all or none"
        require.fail("source", rule, f"layers {across} and {[i for i in range(layers) if text[i]]}")
    beside, json = bool(json), json.get("qformer_config", json)
    wanted = {"hidden_act": "gelu", "hidden_size": size["D"], "num_hidden_layers": layers}
    wanted |= {"cross_attention_frequency": every} if every < layers else {}
    names.agree("config.json", json, wanted)
    if beside and heads is None:
        heads = json.get("num_attention_heads", 12)
    eps = json.get("layer_norm_eps", 1e-12) if eps is None else eps
    require.positive(eps=eps)
    return {
        "vocab_size": size.get("V", 0), "max_text_len": size.get("T", 0), "queries": len(tensors["query"]),
        "dim": size["D"], "layers": layers, "heads": names.head_count(heads, size["D"]), "hidden": size["F"],
        "image_dim": size["I"], "every": every, "words": text[0], "embed": size.get("E", 0),
        "captions": False, "eps": eps,
    }  # fmt: skip
