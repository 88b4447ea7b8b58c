"""ViLT's published weights: the names that the original code and Hugging Face give its tensors, and ours.

One row a tensor, (ours, Hugging Face, original). Beside the names three things differ: Hugging Face keeps
queries, keys and values apart where the original and we stack them in this order; both write the image [CLS]
and the positions with leading axes of 1; and Hugging Face has one name for the classifiers of VQA and NLVR2.

Sources: the state dicts of the original code (Kim, Son and Kim 2021) and of Hugging Face's ViLT classes.
Left out: the masked-patch head, distilled models and token classification; their tensors are refused by name.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minivlp.core import require
from minivlp.models.published import names

E, T = "vilt.embeddings.", "text_embeddings."
# A name that ends in "." stands for its weight and its bias, braces for tensors that are stacked in ours.
MODEL = [
    ("word.weight", E + T + "word_embeddings.weight", T + "word_embeddings.weight"),
    ("text_position.weight", E + T + "position_embeddings.weight", T + "position_embeddings.weight"),
    ("segment.weight", E + T + "token_type_embeddings.weight", T + "token_type_embeddings.weight"),
    ("text_norm.", E + T + "LayerNorm.", T + "LayerNorm."),
    ("modality.weight", E + "token_type_embeddings.weight", "token_type_embeddings.weight"),
    ("cls", E + "cls_token", "transformer.cls_token"),
    ("position", E + "position_embeddings", "transformer.pos_embed"),
    ("patch.", E + "patch_embeddings.projection.", "transformer.patch_embed.proj."),
    ("encoder.norm.", "vilt.layernorm.", "transformer.norm."),
    ("pooler.", "vilt.pooler.dense.", "pooler.dense."),
    ("mlm.dense.", "mlm_score.transform.dense.", "mlm_score.transform.dense."),
    ("mlm.norm.", "mlm_score.transform.LayerNorm.", "mlm_score.transform.LayerNorm."),
    ("mlm.weight", "mlm_score.decoder.weight", "mlm_score.decoder.weight"),
    ("mlm.bias", "mlm_score.decoder.bias", "mlm_score.bias"),  # older Hugging Face files use the second too
    ("itm.", "itm_score.fc.", "itm_score.fc."),  # not in Hugging Face: the name stays
    ("rank.", "rank_output.", "rank_output."),
]
BLOCK = [
    ("norm1.", "layernorm_before.", "norm1."),
    ("qkv.", "attention.attention.{query,key,value}.", "attn.qkv."),
    ("proj.", "attention.output.dense.", "attn.proj."),
    ("norm2.", "layernorm_after.", "norm2."),
    ("fc1.", "intermediate.dense.", "mlp.fc1."),
    ("fc2.", "output.dense.", "mlp.fc2."),
]
LEADING = {"cls": 2, "position": 1}  # how many axes of 1 the published shapes have in front
# Buffers of older files, and the ImageNet classifier that came with the original's blocks.
IGNORED = re.compile(r"(.*\.)?position_ids|transformer\.head\.(weight|bias)")


def _rows(layers: int, vqa: bool, nlvr2: bool) -> list[tuple[str, str, str]]:
    """(ours, Hugging Face, original) for every tensor of a ViLT with these layers and classifiers."""
    rows = list(MODEL)
    for i in range(layers):
        ours, face, original = f"encoder.blocks.{i}.", f"vilt.encoder.layer.{i}.", f"transformer.blocks.{i}."
        rows += [(ours + a, face + b, original + c) for a, b, c in BLOCK]
    heads = [name for name, present in (("vqa", vqa), ("nlvr2", nlvr2)) if present]
    for name in heads:
        # The one classifier of a model is "classifier"; a second keeps the original's name.
        face = "classifier" if name == heads[0] else f"{name}_classifier"
        rows += [(f"{name}.{i}.", f"{face}.{i}.", f"{name}_classifier.{i}.") for i in (0, 1, 3)]
    return names.both(rows)


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Vilt's state dict in Hugging Face's names and shapes."""
    rows = _rows(
        names.count_layers(state, "encoder.blocks."), "vqa.0.weight" in state, "nlvr2.0.weight" in state
    )
    return names.write([(ours, face) for ours, face, _ in rows], state, LEADING)


class Published(NamedTuple):
    """A published state dict, read."""

    tensors: dict[str, Tensor]  # in our names and shapes
    spelling: dict[str, str]  # our name → the source's
    original: bool  # are the names the original code's?


def from_published(state: dict[str, Tensor]) -> Published:
    """A published state dict in our names and shapes.

    Raises ValueError when the names are not ViLT's, or when one is missing, unexpected, or spelled in two
    ways with two values.
    """
    state = {name: tensor for name, tensor in state.items() if not IGNORED.fullmatch(name)}
    original = "transformer.pos_embed" in state
    if "embeddings.position_embeddings" in state:  # a ViltModel without head
        state = {f"vilt.{name}": tensor for name, tensor in state.items()}
    if not original and "vilt.embeddings.position_embeddings" not in state:
        got = ", ".join([*sorted(state)[:3], "…"])
        require.fail("source", "must hold a ViLT with its Hugging Face or its original names", got)
    layers = names.count_layers(state, "transformer.blocks." if original else "vilt.encoder.layer.")
    # Hugging Face's one name: VQA reads one pooled vector (2D × D), NLVR2 two side by side (2D × 2D).
    first = state.get("classifier.0.weight")
    pairs = first is not None and first.ndim == 2 and first.shape[0] == first.shape[1]
    vqa = "vqa_classifier.0.weight" in state or (first is not None and not pairs)
    nlvr2 = "nlvr2_classifier.0.weight" in state or pairs
    rows = _rows(layers, vqa, nlvr2)
    spelling = {}
    for a, face, first in rows:
        spelling[a], other = (first, face) if original else (face, first)
        if other != spelling[a]:
            names.one_spelling(state, spelling[a], other)
    heads = {"mlm", "itm", "rank"} - {a.split(".")[0] for a, theirs in spelling.items() if theirs in state}
    held = [(a, theirs) for a, theirs in spelling.items() if a.split(".")[0] not in heads]
    # Tied to the words, the decoder of masked words has no tensor.
    held = [(a, theirs) for a, theirs in held if a != "mlm.weight" or theirs in state]
    return Published(names.read(held, state, names.whole("a ViLT"), LEADING), spelling, original)


def config_fields(
    published: Published, json: dict[str, Any], heads: int | None, eps: float | None
) -> dict[str, Any]:
    """The fields of the ViltConfig that the tensors belong to; `json` is their config.json ({} = none).

    Shapes tell all but the number of heads and the eps of the norms. For these: the arguments, else
    config.json, else D / 64 heads and the eps of the code that made the weights. Raises ValueError on shapes
    that do not fit one another, and when config.json belongs to other weights.
    """
    tensors, spelling, original = published
    axes = {
        "word.weight": "V D", "text_position.weight": "T D", "segment.weight": "S D",
        "modality.weight": "R D", "position": "P D", "patch.weight": "D 3 p p",
        "encoder.blocks.0.fc1.weight": "F D",
    }  # fmt: skip
    size = require.shapes(**{spelling[a]: (tensors[a], pattern) for a, pattern in axes.items()})
    layers = names.count_layers(tensors, "encoder.blocks.")
    grid = names.square(spelling["position"], size["P"])
    expected = {
        "model_type": "vilt", "hidden_act": "gelu", "qkv_bias": True, "hidden_size": size["D"],
        "num_hidden_layers": layers, "patch_size": size["p"],
    }  # fmt: skip
    names.agree("config.json", json, expected)
    if heads is None:
        heads = json.get("num_attention_heads")
    if eps is None:
        block_eps = json.get("layer_norm_eps", 1e-6 if original else 1e-12)
        text_eps = json.get("text_eps", json.get("layer_norm_eps", 1e-12))
    else:
        block_eps = text_eps = eps
    require.positive(eps=block_eps, text_eps=text_eps)
    mlm, word = "mlm.bias" in tensors, tensors["word.weight"]
    return {
        "vocab_size": size["V"], "max_text_len": size["T"], "dim": size["D"], "layers": layers,
        "heads": names.head_count(heads, size["D"]), "hidden": size["F"], "patch": size["p"],
        "image_size": grid * size["p"], "image_types": size["R"] - 1, "segments": size["S"],
        "eps": block_eps, "text_eps": text_eps, "mlm": mlm,
        # Tied only if the numbers say so: the original's decoder is a matrix of its own.
        "mlm_tied": mlm and torch.equal(tensors.get("mlm.weight", word), word),
        "itm": "itm.bias" in tensors, "nlvr2": "nlvr2.3.bias" in tensors, "rank": "rank.bias" in tensors,
        "num_answers": len(tensors["vqa.3.bias"]) if "vqa.3.bias" in tensors else 0,
    }  # fmt: skip


def hugging_face_config(c: Any) -> dict[str, Any]:
    """The config.json of a ViltConfig. `text_eps` is an addition: Hugging Face has one eps and ignores it."""
    classes = {
        "ViltForMaskedLM": c.mlm, "ViltForQuestionAnswering": c.num_answers,
        "ViltForImagesAndTextClassification": c.nlvr2, "ViltForImageAndTextRetrieval": c.rank,
    }  # fmt: skip
    labels = c.num_answers or 2
    return {
        "architectures": [name for name, present in classes.items() if present][:1] or ["ViltModel"],
        "model_type": "vilt", "vocab_size": c.vocab_size, "type_vocab_size": c.segments,
        "modality_type_vocab_size": 1 + c.image_types, "max_position_embeddings": c.max_text_len,
        "hidden_size": c.dim, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "intermediate_size": c.hidden, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "layer_norm_eps": c.eps, "text_eps": c.text_eps,
        "image_size": c.image_size, "patch_size": c.patch, "num_channels": 3, "qkv_bias": True,
        "max_image_length": -1, "num_images": c.image_types, "tie_word_embeddings": c.mlm_tied,
        "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
    }  # fmt: skip
