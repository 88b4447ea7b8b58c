"""A dual encoder's published files: Hugging Face's CLIPModel and SiglipModel, and back.

Each form is one table from our tensors to theirs. The blocks' names are the same in all four towers; theirs
keep query, key and value apart, ours are stacked.

config.json tells what the tensors cannot. Shapes give every size but the number of heads. Heads, activation,
eps and the end-of-text id come from the caller, else from config.json, whose absent keys stand for the
defaults of the library that wrote it, else from what most published models of the form have.

Source: the names and the configuration classes of Hugging Face's CLIP and SigLIP.
Left out: the names of OpenAI's and open_clip's own files; models with one tower; classifiers.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minivlp.core import require
from minivlp.models.published import names

# A name that ends in "." stands for its weight and its bias, braces for tensors that are stacked in ours.
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
    ("qkv.", "self_attn.{q,k,v}_proj."),
    ("proj.", "self_attn.out_proj."),
    ("norm2.", "layer_norm2."),
    ("fc1.", "mlp.fc1."),
    ("fc2.", "mlp.fc2."),
]
SCALARS = ("log_scale", "logit_bias")
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
    return names.both(rows)


def to_hugging_face(form: Form, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Dual's state dict in Hugging Face's names and shapes."""
    layers = [names.count_layers(state, f"{tower}.encoder.blocks.") for tower in ("text", "image")]
    return names.write(_rows(form, *layers), state, form.leading)


def from_published(form: Form, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Their state dict in our names and shapes, and our name → theirs.

    Raises ValueError when the names are none of this form's, or when one is missing or unexpected.
    """
    state = {name: tensor for name, tensor in state.items() if not IGNORED.fullmatch(name)}
    if not any(name.startswith(("text_model.", "vision_model.")) for name in state):
        got = ", ".join([*sorted(state)[:3], "…"])
        require.fail("source", f"must hold a {form.name} with its Hugging Face names", got)
    layers = [names.count_layers(state, f"{tower}_model.encoder.layers.") for tower in ("text", "vision")]
    rows = _rows(form, *layers)
    # Scalars are written with an axis of 1 and without.
    axes = {ours: state[theirs].ndim for ours, theirs in rows if ours in SCALARS and theirs in state}
    leading = form.leading | {ours: n for ours, n in axes.items() if n < 2}
    return names.read(rows, state, names.whole(f"a {form.name}"), leading), dict(rows)


def config_fields(
    form: Form,
    tensors: dict[str, Tensor],
    spelling: dict[str, str],
    json: dict[str, Any],
    heads: int | tuple[int, int] | None,
    activation: str | None,
    eot: int | None,
) -> dict[str, Any]:
    """The fields of the DualConfig that the tensors belong to; `json` is their config.json ({} = none).

    Raises ValueError on shapes that do not fit one another, when config.json belongs to other weights, and
    when its two towers differ in what our two share.
    """
    axes = {
        "text.word.weight": "V T", "text.position": "L T", "text.encoder.blocks.0.fc1.weight": "F T",
        "image.patch.weight": "I 3 p p", "image.position": "P I", "image.encoder.blocks.0.fc1.weight": "G I",
        "text.project.weight": "E T",
    }  # fmt: skip
    size = require.shapes(**{spelling[a]: (tensors[a], pattern) for a, pattern in axes.items()})
    cls = int("image.cls" in tensors)
    rule = "must hold g · g positions" + " and one" * cls
    grid = names.square(spelling["image.position"], size["P"], cls, rule)
    layers = {t: names.count_layers(tensors, f"{t}.encoder.blocks.") for t in ("text", "image")}
    towers = {name: _tower(form, json, name) for name in ("text", "vision")}
    expected = {
        "config.json": (json, {"model_type": form.model_type}),
        "text_config": (towers["text"], {"hidden_size": size["T"], "num_hidden_layers": layers["text"]}),
        "vision_config": (
            towers["vision"],
            {"hidden_size": size["I"], "num_hidden_layers": layers["image"], "patch_size": size["p"]},
        ),
    }
    for where, (found, wanted) in expected.items():
        names.agree(where, found, wanted)
    # Pixels beyond the last whole patch, as of 384 in patches of 14, are not seen.
    side = towers["vision"].get("image_size", grid * size["p"])
    if type(side) is not int or side // size["p"] != grid:
        rule = f"must have an image_size of {grid} patches of {size['p']}, as the weights do"
        require.fail("vision_config", rule, repr(side))
    if eot is None and form is CLIP:  # SigLIP reads the last position
        # Here 2 stands for "the largest id": it was every published file's value for a while, and wrong.
        found = towers["text"].get("eos_token_id")
        eot = None if found == 2 else found
    image_heads, text_heads = heads if isinstance(heads, tuple) else (heads, heads)
    return form.fields | {
        "vocab_size": size["V"], "max_text_len": size["L"], "patch": size["p"],
        "image_size": side, "embed": size["E"],
        "image_dim": size["I"], "image_layers": layers["image"], "image_hidden": size["G"],
        "image_heads": _heads(image_heads, towers["vision"], size["I"], WIDEST),
        "text_dim": size["T"], "text_layers": layers["text"], "text_hidden": size["F"],
        "text_heads": _heads(text_heads, towers["text"], size["T"], form.text_heads),
        "eot": eot,
        "activation": _agreed(form, towers, "hidden_act") if activation is None else activation,
        "eps": _agreed(form, towers, "layer_norm_eps"),
    }  # fmt: skip


def _tower(form: Form, json: dict[str, Any], name: str) -> dict[str, Any]:
    """One tower's part of config.json with its defaults filled in; {} where there is no config.json."""
    if not json:
        return {}
    defaults = form.shared | {"num_attention_heads": form.heads[name]}
    # Older files have a second dictionary, which overrules the first.
    return defaults | (json.get(f"{name}_config") or {}) | (json.get(f"{name}_config_dict") or {})


def _agreed(form: Form, towers: dict[str, dict[str, Any]], key: str) -> Any:
    text, vision = (tower.get(key, form.shared[key]) for tower in towers.values())
    if text != vision:
        require.fail("config.json", f"must have one {key} in both towers", f"{text!r} and {vision!r}")
    return text


def _heads(asked: int | None, tower: dict[str, Any], dim: int, most: int | None) -> int:
    heads = tower.get("num_attention_heads") if asked is None else asked
    found = names.head_count(heads, dim)
    return found if heads is not None or most is None else min(found, most)


def hugging_face_config(form: Form, c: Any) -> dict[str, Any]:
    """The config.json of a DualConfig. Raises ValueError when it is not of this form."""
    for name in ("image_pool", "text_pool"):
        if getattr(c, name) != form.fields[name]:
            require.fail(name, f"must be {form.fields[name]!r} to be saved as {form.name}", getattr(c, name))
    if (c.init_bias is None) != ("init_bias" not in form.fields):
        rule = "must be None" if c.init_bias is not None else "must be a number"
        require.fail("init_bias", f"{rule} to be saved as {form.name}", c.init_bias)
    if c.eot == 2 and form is CLIP:
        require.fail("eot", "must not be 2, which config.json takes for 'the largest id'", 2)
    both = {"hidden_act": c.activation, "layer_norm_eps": c.eps}
    text = {"projection_size": c.embed}
    if form is CLIP:
        both |= {"projection_dim": c.embed}
        text = {"eos_token_id": 2 if c.eot is None else c.eot}
    text |= both | {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_text_len, "hidden_size": c.text_dim,
        "num_hidden_layers": c.text_layers, "num_attention_heads": c.text_heads,
        "intermediate_size": c.text_hidden,
    }  # fmt: skip
    vision = both | {
        "image_size": c.image_size, "patch_size": c.patch, "num_channels": 3, "hidden_size": c.image_dim,
        "num_hidden_layers": c.image_layers, "num_attention_heads": c.image_heads,
        "intermediate_size": c.image_hidden,
    }  # fmt: skip
    top = {"architectures": [form.architecture], "model_type": form.model_type, "projection_dim": c.embed}
    return top | {"text_config": text, "vision_config": vision}
