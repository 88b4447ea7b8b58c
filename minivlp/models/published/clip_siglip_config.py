"""A dual encoder's config.json: what its tensors cannot tell, and back.

Shapes give every size but the number of heads. Heads, activation, eps and the end-of-text id come from the
caller, else from config.json, whose absent keys stand for the defaults of the library that wrote it, else
from what most published models of the form have.

Source: the configuration classes of Hugging Face's CLIP and SigLIP.
"""

import math
from typing import Any

from torch import Tensor

from minivlp.core import require
from minivlp.models.published.clip_siglip import CLIP, WIDEST, Form, count_layers


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
    grid = math.isqrt(max(size["P"] - cls, 0))
    if not grid or grid**2 != size["P"] - cls:
        require.fail(spelling["image.position"], "must hold g · g positions" + " and one" * cls, size["P"])
    layers = {t: count_layers(tensors, f"{t}.encoder.blocks") for t in ("text", "image")}
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
        for key, value in wanted.items():
            if found.get(key, value) != value:
                require.fail(where, f"must have {key} = {value!r}, as the weights do", repr(found[key]))
    if eot is None and form is CLIP:  # SigLIP reads the last position
        # Here 2 stands for "the largest id": it was every published file's value for a while, and wrong.
        found = towers["text"].get("eos_token_id")
        eot = None if found == 2 else found
    image_heads, text_heads = heads if isinstance(heads, tuple) else (heads, heads)
    return form.fields | {
        "vocab_size": size["V"], "max_text_len": size["L"], "patch": size["p"],
        "image_size": grid * size["p"], "embed": size["E"],
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
    if heads is None and dim % 64:
        require.fail("heads", f"must be given, as D={dim} is not a multiple of 64", "None")
    if heads is None:
        heads = dim // 64 if most is None else min(dim // 64, most)
    return heads


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
