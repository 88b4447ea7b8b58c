"""A dual encoder's published names: Hugging Face's CLIPModel and SiglipModel, and back.

Each form is one table from our tensors to theirs. The blocks' names are the same in all four towers; theirs
keep query, key and value apart, ours are stacked. config.json is read in dual_config.py.

Source: the names of Hugging Face's CLIP and SigLIP classes.
Left out: the names of OpenAI's and open_clip's own files; models with one tower; classifiers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlp.core import require

# A name ending in "." stands for its weight and its bias.
COMMON = [
    ("text.word.weight", "text_model.embeddings.token_embedding.weight"),
    ("text.position", "text_model.embeddings.position_embedding.weight"),
    ("text.encoder.norm.", "text_model.final_layer_norm."),
    ("image.patch.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("image.position", "vision_model.embeddings.position_embedding.weight"),
    ("image.encoder.norm.", "vision_model.post_layernorm."),
    ("log_scale", "logit_scale"),
]
BLOCK = [
    ("norm1.", "layer_norm1."),
    ("qkv.", "self_attn.qkv."),  # three tensors of theirs, see QKV
    ("proj.", "self_attn.out_proj."),
    ("norm2.", "layer_norm2."),
    ("fc1.", "mlp.fc1."),
    ("fc2.", "mlp.fc2."),
]
QKV = ("q_proj", "k_proj", "v_proj")
IGNORED = re.compile(r"(text|vision)_model\.embeddings\.position_ids")  # buffers of older files
WIDEST = 16  # heads: the largest published image towers, and SigLIP's texts, widen theirs beyond 64


@dataclass(frozen=True)
class Form:
    """What CLIP and SigLIP do not share."""

    name: str
    model_type: str
    architecture: str
    rows: list[tuple[str, str]]  # (ours, theirs)
    fields: dict[str, Any]  # of the DualConfig
    shared: dict[str, Any]  # config.json's defaults in both towers
    heads: dict[str, int]  # the same for the number of heads
    text_heads: int | None  # the most heads of a text tower, where D / 64 would give more
    leading: dict[str, int]  # our name → how many axes of 1 their shape has in front


CLIP = Form(
    "CLIP", "clip", "CLIPModel",
    [
        *COMMON,
        ("text.project.weight", "text_projection.weight"),
        ("image.cls", "vision_model.embeddings.class_embedding"),
        ("image.pre_norm.", "vision_model.pre_layrnorm."),  # their spelling
        ("image.project.weight", "visual_projection.weight"),
    ],
    {"image_pool": "cls", "text_pool": "eot"},
    {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407},
    {"text": 8, "vision": 12},
    None,
    {},
)  # fmt: skip
SIGLIP = Form(
    "SigLIP", "siglip", "SiglipModel",
    [
        *COMMON,
        ("text.project.", "text_model.head."),
        ("image.patch.bias", "vision_model.embeddings.patch_embedding.bias"),
        ("image.pool.probe", "vision_model.head.probe"),
        ("image.pool.qkv.weight", "vision_model.head.attention.in_proj_weight"),
        ("image.pool.qkv.bias", "vision_model.head.attention.in_proj_bias"),
        ("image.pool.proj.", "vision_model.head.attention.out_proj."),
        ("image.pool.norm.", "vision_model.head.layernorm."),
        ("image.pool.fc1.", "vision_model.head.mlp.fc1."),
        ("image.pool.fc2.", "vision_model.head.mlp.fc2."),
        ("logit_bias", "logit_bias"),
    ],
    {"image_pool": "map", "text_pool": "last", "init_scale": 10.0, "init_bias": -10.0},
    {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    {"text": 12, "vision": 12},
    WIDEST,
    {"image.pool.probe": 2, "log_scale": 1, "logit_bias": 1},
)  # fmt: skip


def form_of(config: Any) -> Form:
    """The form that a DualConfig has."""
    return SIGLIP if config.text_pool == "last" else CLIP


def _rows(form: Form, text_layers: int, image_layers: int) -> list[tuple[str, str]]:
    """(ours, theirs) for every tensor of a model with that many layers in its towers."""
    rows = list(form.rows)
    for ours, theirs, layers in (("text", "text", text_layers), ("image", "vision", image_layers)):
        for i in range(layers):
            before = f"{ours}.encoder.blocks.{i}.", f"{theirs}_model.encoder.layers.{i}."
            rows += [(before[0] + a, before[1] + b) for a, b in BLOCK]
    both = [(a + end, b + end) for a, b in rows if a.endswith(".") for end in ("weight", "bias")]
    return both + [row for row in rows if not row[0].endswith(".")]


def count_layers(names: Iterable[str], blocks: str) -> int:
    """One more than the largest number that follows `blocks` in the names, at least 1."""
    found = [re.match(re.escape(blocks) + r"\.(\d+)\.", name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def to_hugging_face(form: Form, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Dual's state dict in Hugging Face's names and shapes."""
    layers = [count_layers(state, f"{tower}.encoder.blocks") for tower in ("text", "image")]
    out = {}
    for ours, theirs in _rows(form, *layers):
        if ".self_attn.qkv." in theirs:
            parts = zip(QKV, state[ours].chunk(3), strict=True)
            out |= {theirs.replace("qkv", part): tensor for part, tensor in parts}
        else:
            out[theirs] = state[ours][(None,) * form.leading.get(ours, 0)]
    return out


def from_published(form: Form, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Their state dict in our names and shapes, and our name → theirs.

    Raises ValueError when the names are none of this form's, or when one is missing or unexpected.
    """
    state = {name: tensor for name, tensor in state.items() if not IGNORED.fullmatch(name)}
    if not any(name.startswith(("text_model.", "vision_model.")) for name in state):
        got = ", ".join([*sorted(state)[:3], "…"])
        require.fail("source", f"must hold a {form.name} with its Hugging Face names", got)
    _join_qkv(form, state)
    layers = [count_layers(state, f"{tower}_model.encoder.layers") for tower in ("text", "vision")]
    rows = _rows(form, *layers)
    ours, spelling = {b: a for a, b in rows}, dict(rows)
    _all_or_refuse(form, "nothing else", "unexpected", sorted(set(state) - set(ours)))
    _all_or_refuse(form, "every tensor of it", "missing", sorted(set(ours) - set(state)))
    tensors = {}
    for theirs, name in ours.items():
        leading, tensor = form.leading.get(name, 0), state[theirs]
        if tensor.shape[:leading] != (1,) * leading:
            require.fail(theirs, f"must have {leading} leading axes of size 1", tuple(tensor.shape))
        tensors[name] = tensor[(0,) * leading]
    return tensors, spelling


def _join_qkv(form: Form, state: dict[str, Tensor]) -> None:
    """Stack Hugging Face's query, key and value into qkv, in place."""
    one = re.compile(r"(.*\.self_attn\.)(?:q|k|v)_proj\.(weight|bias)")
    for before, end in sorted({match.groups() for match in map(one.fullmatch, state) if match}):
        names = [f"{before}{part}.{end}" for part in QKV]
        missing = [name for name in names if name not in state]
        _all_or_refuse(form, "every tensor of it", "missing", missing)
        state[f"{before}qkv.{end}"] = torch.cat([state.pop(name) for name in names])


def _all_or_refuse(form: Form, rule: str, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        require.fail("source", f"must hold a {form.name} and {rule}", f"{what} {', '.join(names[:3])}{more}")
