"""ViLT's published weights: the names that the original code and Hugging Face give its tensors, and ours.

One row a tensor, (ours, Hugging Face, original). Beside the names three things differ: Hugging Face keeps
queries, keys and values apart where the original and we stack them in this order; both write the image [CLS]
and the positions with leading axes of 1; and Hugging Face has one name for the classifiers of VQA and NLVR2.

Sources: the state dicts of the original code (Kim, Son and Kim 2021) and of Hugging Face's ViLT classes.
Left out: the masked-patch head, distilled models and token classification; their tensors are refused by name.
"""

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minivlp.core import require

E, T = "vilt.embeddings.", "text_embeddings."
# A name ending in "." stands for its weight and its bias.
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
    ("qkv.", "attention.attention.qkv.", "attn.qkv."),  # three tensors in Hugging Face, see QKV
    ("proj.", "attention.output.dense.", "attn.proj."),
    ("norm2.", "layernorm_after.", "norm2."),
    ("fc1.", "intermediate.dense.", "mlp.fc1."),
    ("fc2.", "output.dense.", "mlp.fc2."),
]
QKV = ("query", "key", "value")
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
    both = [(a + end, b + end, c + end) for a, b, c in rows if a.endswith(".") for end in ("weight", "bias")]
    return both + [row for row in rows if not row[0].endswith(".")]


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Vilt's state dict in Hugging Face's names and shapes."""
    layers = len({name.split(".")[2] for name in state if name.startswith("encoder.blocks.")})
    out = {}
    for ours, face, _ in _rows(layers, "vqa.0.weight" in state, "nlvr2.0.weight" in state):
        if ".qkv." in ours:
            parts = zip(QKV, state[ours].chunk(3), strict=True)
            out |= {face.replace("qkv", part): tensor for part, tensor in parts}
        elif ours in state:
            out[face] = state[ours][(None,) * LEADING.get(ours, 0)]
    return out


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
    _join_qkv(state)
    blocks = [re.match(r"(?:vilt\.encoder\.layer|transformer\.blocks)\.(\d+)\.", name) for name in state]
    layers = 1 + max((int(block[1]) for block in blocks if block), default=0)
    # Hugging Face's one name: VQA reads one pooled vector (2D × D), NLVR2 two side by side (2D × 2D).
    first = state.get("classifier.0.weight")
    pairs = first is not None and first.ndim == 2 and first.shape[0] == first.shape[1]
    vqa = "vqa_classifier.0.weight" in state or (first is not None and not pairs)
    nlvr2 = "nlvr2_classifier.0.weight" in state or pairs
    rows = _rows(layers, vqa, nlvr2)
    ours = {name: a for a, b, c in rows for name in (b, c)}
    spelling = {a: c if original else b for a, b, c in rows}
    _all_or_refuse("nothing else", "unexpected", sorted(set(state) - set(ours)))
    found = {ours[name] for name in state}
    absent = {"mlm", "itm", "rank"} - {name.split(".")[0] for name in found}
    wanted = {a for a in spelling if a.split(".")[0] not in absent} - {"mlm.weight"}  # tied, it has no tensor
    _all_or_refuse("every tensor of it", "missing", sorted(spelling[a] for a in wanted - found))

    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        a, leading = ours[name], LEADING.get(ours[name], 0)
        if tensor.shape[:leading] != (1,) * leading:
            require.fail(name, f"must have {leading} leading axes of size 1", tuple(tensor.shape))
        tensor = tensor[(0,) * leading]
        if a in tensors and not torch.equal(tensors[a], tensor):
            require.fail("source", f"must spell {spelling[a]} one way or with equal values", "two values")
        tensors[a] = tensor
    return Published(tensors, spelling, original)


def _join_qkv(state: dict[str, Tensor]) -> None:
    """Stack Hugging Face's query, key and value into qkv, in place."""
    one = re.compile(r"(.*\.attention\.attention\.)(?:query|key|value)\.(weight|bias)")
    for before, end in sorted({match.groups() for match in map(one.fullmatch, state) if match}):
        names = [f"{before}{part}.{end}" for part in QKV]
        _all_or_refuse("every tensor of it", "missing", [name for name in names if name not in state])
        state[f"{before}qkv.{end}"] = torch.cat([state.pop(name) for name in names])


def _all_or_refuse(rule: str, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        require.fail("source", f"must hold a ViLT and {rule}", f"{what} {', '.join(names[:3])}{more}")


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
    layers = len({name.split(".")[2] for name in tensors if name.startswith("encoder.blocks.")})
    grid = math.isqrt(max(size["P"] - 1, 0))
    if not grid or grid**2 != size["P"] - 1:
        require.fail(spelling["position"], "must hold 1 + g · g positions", size["P"])
    expected = {
        "model_type": "vilt", "hidden_act": "gelu", "qkv_bias": True, "hidden_size": size["D"],
        "num_hidden_layers": layers, "patch_size": size["p"],
    }  # fmt: skip
    for key, value in expected.items():
        if json.get(key, value) != value:
            require.fail("config.json", f"must have {key} = {value!r}, as the weights do", repr(json[key]))
    if heads is None:
        heads = json.get("num_attention_heads")
    if heads is None and size["D"] % 64:
        require.fail("heads", f"must be given, as D={size['D']} is not a multiple of 64", "None")
    if eps is None:
        block_eps = json.get("layer_norm_eps", 1e-6 if original else 1e-12)
        text_eps = json.get("text_eps", json.get("layer_norm_eps", 1e-12))
    else:
        block_eps = text_eps = eps
    require.positive(eps=block_eps, text_eps=text_eps)
    mlm, word = "mlm.bias" in tensors, tensors["word.weight"]
    return {
        "vocab_size": size["V"], "max_text_len": size["T"], "dim": size["D"], "layers": layers,
        "heads": size["D"] // 64 if heads is None else heads, "hidden": size["F"], "patch": size["p"],
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
