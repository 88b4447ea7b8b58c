"""The shipped ViLT as a start: what other models with its width take over from it.

Its first blocks become those of a picture and of a text encoder, which read apart what it reads together; the
next one becomes whatever lets the two sides meet. ViLT adds a type to every patch and to every word; here the
types are part of the positions and of the norm's bias. Tensors have Hugging Face's names on the way in.

Left out: its pooler and its matching head, which speak of another token.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from minivlp.models.published.names import both, parts

BLOCK = [
    ("norm1.", "layernorm_before."),
    ("qkv.", "attention.attention.{query,key,value}."),
    ("proj.", "attention.output.dense."),
    ("norm2.", "layernorm_after."),
    ("fc1.", "intermediate.dense."),
    ("fc2.", "output.dense."),
]
HEAD = [("dense.", "transform.dense."), ("norm.", "transform.LayerNorm."), ("", "decoder.")]


def towers(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Embeddings, `layers` blocks of each of the two encoders and the masked-word head, in our names."""
    E, text = "vilt.embeddings.", "vilt.embeddings.text_embeddings."
    types = state[E + "token_type_embeddings.weight"]
    rows = [("text_norm.", text + "LayerNorm."), ("patch.", E + "patch_embeddings.projection.")]
    rows += [(f"mlm.{a}", f"mlm_score.{b}") for a, b in HEAD]
    found = {ours: state[theirs] for ours, theirs in both(rows)} | {
        "word.weight": state[text + "word_embeddings.weight"],
        "text_position.weight": state[text + "position_embeddings.weight"],
        "cls": state[E + "cls_token"][0, 0],
        "position": state[E + "position_embeddings"][0] + types[1],
    }
    found["text_norm.bias"] = found["text_norm.bias"] + types[0]
    # What ViLT adds to every word; only FLAVA has a table of its own for it.
    found["text_position.weight"] = (
        found["text_position.weight"] + state[text + "token_type_embeddings.weight"][0]
    )
    for encoder in ("image", "text"):
        for i in range(layers):
            found |= block(state, i, f"{encoder}.blocks.{i}.")
    return found


def block(state: Mapping[str, Tensor], i: int, name: str) -> dict[str, Tensor]:
    """Block i, called `name`."""
    rows = both([(name + a, f"vilt.encoder.layer.{i}.{b}") for a, b in BLOCK])
    return {ours: torch.cat([state[part] for part in parts(theirs)]) for ours, theirs in rows}


def cross_block(state: Mapping[str, Tensor], i: int, name: str) -> dict[str, Tensor]:
    """Block i as a CrossBlock called `name`: among its own tokens and across it attends alike."""
    found = block(state, i, name)
    for end in ("weight", "bias"):
        qkv = found[f"{name}qkv.{end}"]
        D = len(qkv) // 3
        found[f"{name}q.{end}"], found[f"{name}kv.{end}"] = qkv[:D], qkv[D:]
        found[f"{name}norm_cross.{end}"] = found[f"{name}norm1.{end}"]
        found[f"{name}proj_cross.{end}"] = found[f"{name}proj.{end}"]
    return found
