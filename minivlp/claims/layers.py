"""Do words and patches come closer from layer to layer, and closer when they belong together?

For each layer k of the transformer, 0 being its input, the Chamfer similarity of the words of a caption with
the patches of

    true         its picture
    wrong        another picture, of which it is false, read together with it: tokens that pass one
                 transformer grow alike whatever they mean, and this is how much
    mismatched   another picture, read with its own caption (chamfer.py): the usual baseline

The measure is true − wrong, and `deepening` how much it grows from the input to the last layer.

Sources: Lin et al. 2024 (VILA), section 3.1, for Chamfer similarity by layer.
Left out: norms other than the final one: a cosine does not see the scale of a layer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minivlp.chamfer import chamfer, mismatched
from minivlp.claims.archetypes import Archetype
from minivlp.claims.verdict import Sample
from minivlp.claims.world import World
from minivlp.data import Scene, scene_pixels
from minivlp.data.probes import meaning
from minivlp.evaluation.reading import equal_lengths
from minivlp.ipot import alignment_masks


@torch.inference_mode()
def layers(model: Archetype, world: World, scenes: Sequence[Scene]) -> dict[str, Sample]:
    """Samples "layer k true", "layer k wrong", "layer k mismatched" of every layer, and "deepening"."""
    kinds: dict[str, list[np.ndarray]] = {"true": [], "wrong": [], "mismatched": []}
    clusters = []
    texts = [scene.caption for scene in scenes]
    for rows, ids in equal_lengths(world.tokenizer, texts, model.config.max_text_len):
        other = _false(scenes, rows)
        rows, ids, other = (x[other >= 0] for x in (rows, ids, other))
        if len(rows) < 2:
            continue
        pixels, words = scene_pixels([scenes[i] for i in rows]), torch.from_numpy(ids)
        true = by_layer(model, words, pixels)
        wrong = by_layer(model, words, scene_pixels([scenes[i] for i in other]))
        kinds["true"].append(torch.stack([chamfer(*states) for states in true]).numpy())
        kinds["wrong"].append(torch.stack([chamfer(*states) for states in wrong]).numpy())
        base = torch.stack([mismatched(*states) for states in true]).numpy()  # (layers,)
        kinds["mismatched"].append(np.repeat(base[:, None], len(rows), 1))
        clusters += ["-".join(map(str, meaning(scenes[i])[:2])) for i in rows]
    found = {kind: np.concatenate(parts, 1) for kind, parts in kinds.items()}  # (layers, n)
    gap = found["true"] - found["wrong"]
    samples = {
        f"layer {k} {kind}": Sample(values.tolist(), clusters)
        for kind, rows in found.items()
        for k, values in enumerate(rows)
    }
    return samples | {"deepening": Sample((gap[-1] - gap[0]).tolist(), clusters)}


def by_layer(model: Archetype, ids: Tensor, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Words (B, L−2, D), without [CLS] and [SEP], and patches (B, N, D), layer by layer."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    z, L = torch.cat([model.read(ids, mask), model.look(pixels)], 1), ids.shape[1]
    every = [z]
    for block in model.net.encoder.blocks:
        z = block(z)
        every.append(z)
    every[-1] = model.net.encoder.norm(z)
    words = alignment_masks(mask)[0]
    return [(z[:, :L][:, words], z[:, L + 1 :]) for z in every]


def _false(scenes: Sequence[Scene], rows: np.ndarray) -> np.ndarray:
    """For each row the next one in its batch with two other objects, −1 where there is none."""
    objects = [set(scenes[i].objects) for i in rows]
    found = np.full(len(rows), -1)
    for k in range(len(rows)):
        for step in range(1, len(rows)):
            other = (k + step) % len(rows)
            if not objects[k] & objects[other]:
                found[k] = rows[other]
                break
    return found
