"""FLAVA's published weights: the names of Hugging Face's FlavaForPreTraining, and ours.

One row a tensor, (ours, theirs). Beside the names three things differ: Hugging Face keeps queries, keys and
values apart where we stack them; it writes [CLS] tokens, the mask token and the positions with leading axes
of 1; and it spells the bias of a masked head in two ways, of which a file may hold either or both.

Source: the state dict and the configuration classes of Hugging Face's FLAVA (Singh et al. 2022).
Left out: the poolers of the three encoders, which no loss reads, and the picture codebook, a network of its
own; their tensors are passed over.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minivlp.core import require
from minivlp.models.published import names
from minivlp.models.published.start import BLOCK, HEAD

T, P, M = "flava.text_model.", "flava.image_model.", "flava.multimodal_model."
# A name ending in "." stands for its weight and its bias.
MODEL = [
    ("word.weight", T + "embeddings.word_embeddings.weight"),
    ("text_position.weight", T + "embeddings.position_embeddings.weight"),
    ("segment.weight", T + "embeddings.token_type_embeddings.weight"),
    ("text_norm.", T + "embeddings.LayerNorm."),
    ("cls", P + "embeddings.cls_token"),
    ("mask", P + "embeddings.mask_token"),
    ("position", P + "embeddings.position_embeddings"),
    ("patch.", P + "embeddings.patch_embeddings.projection."),
    ("fusion_cls", M + "cls_token"),
    ("image_project.", "flava.image_projection."),
    ("text_project.", "flava.text_projection."),
    ("image_to_fusion.", "flava.image_to_mm_projection."),
    ("text_to_fusion.", "flava.text_to_mm_projection."),
    ("contrast.log_scale", "flava.logit_scale"),
    ("pooler.", "itm_head.pooler.dense."),
    ("itm.", "itm_head.seq_relationship."),
]
HEADS = ("mim", "mlm", "mmm_image", "mmm_text")
ENCODERS = {"image": P, "text": T, "fusion": M}
LEADING = {"cls": 2, "mask": 2, "fusion_cls": 2, "position": 1}  # how many axes of 1 theirs have in front
IGNORED = re.compile(r"image_codebook\..*|flava\.\w+_model\.pooler\..*|.*\.(position|token_type)_ids")


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Their state dict in our names and shapes, and our name → theirs.

    Raises ValueError when the names are not FLAVA's, or when one is missing, unexpected, or spelled in two
    ways with two values.
    """
    state = {name: tensor for name, tensor in state.items() if not IGNORED.fullmatch(name)}
    if P + "embeddings.cls_token" not in state:
        got = ", ".join([*sorted(state)[:3], "…"])
        require.fail("source", "must hold a FLAVA for pretraining with its Hugging Face names", got)
    for head in HEADS:
        names.one_spelling(state, f"{head}_head.decoder.bias", f"{head}_head.bias")
    rows = list(MODEL)
    for ours, theirs in ENCODERS.items():
        rows.append((f"{ours}.norm.", theirs + "layernorm."))
        for i in range(names.count_layers(state, theirs + "encoder.layer.")):
            rows += [(f"{ours}.blocks.{i}.{a}", f"{theirs}encoder.layer.{i}.{b}") for a, b in BLOCK]
    rows += [(f"{head}.{a}", f"{head}_head.{b}") for head in HEADS for a, b in HEAD]
    rows = names.both(rows)
    return names.read(rows, state, names.whole("a FLAVA"), LEADING), dict(rows)


def config_fields(
    tensors: dict[str, Tensor],
    spelling: dict[str, str],
    json: dict[str, Any],
    heads: int | None,
    eps: float | None,
) -> dict[str, Any]:
    """The fields of the FlavaConfig that the tensors belong to; `json` is their config.json ({} = none).

    Shapes tell all but the number of heads and the eps of the norms. For these: the arguments, else
    config.json, else D / 64 heads and 1e-12. Raises ValueError on shapes that do not fit one another, when
    config.json belongs to other weights, and when its encoders differ in heads or eps.
    """
    axes = {
        "word.weight": "V D", "text_position.weight": "T D", "segment.weight": "S D", "position": "P D",
        "patch.weight": "D 3 p p", "image_project.weight": "E D", "mim.weight": "K D",
        **{f"{encoder}.blocks.0.fc1.weight": "F D" for encoder in ENCODERS},
    }  # fmt: skip
    size = require.shapes(**{spelling[a]: (tensors[a], pattern) for a, pattern in axes.items()})
    grid = names.square(spelling["position"], size["P"])
    layers = {name: names.count_layers(tensors, f"{name}.blocks.") for name in ENCODERS}
    parts = {f"{name}_config": json.get(f"{name}_config") or {} for name in ("image", "text", "multimodal")}
    for (where, part), count in zip(parts.items(), layers.values(), strict=True):
        wanted = {"hidden_act": "gelu", "hidden_size": size["D"], "num_hidden_layers": count}
        names.agree(f"{where} of config.json", part, wanted)
    for key, asked in {"num_attention_heads": heads, "layer_norm_eps": eps}.items():
        values = {part[key] for part in parts.values() if key in part}
        if asked is None and len(values) > 1:
            require.fail("config.json", f"must have one {key} in all encoders", sorted(values))
    told = {key: value for part in parts.values() for key, value in part.items()}
    heads = told.get("num_attention_heads", 12 if json else None) if heads is None else heads
    eps = told.get("layer_norm_eps", 1e-12) if eps is None else eps
    require.positive(eps=eps)
    return {f"{name}_layers": count for name, count in layers.items()} | {
        "vocab_size": size["V"], "max_text_len": size["T"], "segments": size["S"], "dim": size["D"],
        "hidden": size["F"], "embed": size["E"], "codes": size["K"], "patch": size["p"],
        "image_size": grid * size["p"], "heads": names.head_count(heads, size["D"]), "eps": eps,
    }  # fmt: skip
