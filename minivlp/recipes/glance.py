"""A quick look during training: accuracies on scenes, or on kept-back captions, that are not trained on.

Left out: intervals, baselines and rare cases, for which evaluate.py takes its time.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from minivlp.data import Scene, Scenes, scene_pixels
from minivlp.data.probes import false_captions, hide_relation, hide_slots, swapped, text_rows
from minivlp.mlm import IGNORE
from minivlp.models.vilt import Vilt
from minivlp.recipes.vilt_batches import Rows
from minivlp.text import WordPiece


@torch.inference_mode()
def glance(model: Vilt, tokenizer: WordPiece, scenes: Scenes, items: int) -> dict[str, float]:
    """Four of evaluate's measures, in [0, 1], on the first `items` of `scenes`, which must be pairs."""
    some = [scenes[i] for i in range(items)]
    others = false_captions(some, np.random.default_rng(scenes.seed))
    one = [hide_slots(scene, [i % 2], tokenizer) for i, scene in enumerate(some)]
    relation = [(text, tokenizer.encode(word)) for text, word in map(hide_relation, some)]
    true = _accepts(model, tokenizer, [scene.caption for scene in some], some)
    random = _accepts(model, tokenizer, [some[j].caption for j in others], some)
    order = _accepts(model, tokenizer, [swapped(scene) for scene in some], some)
    return {
        "masked_object": _fills(model, tokenizer, one, some),
        "masked_relation": _fills(model, tokenizer, relation, some),
        "itm_random": (true + 1 - random) / 2,
        "itm_swapped": (true + 1 - order) / 2,
    }


def _states(model: Vilt, texts: tuple, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    ids, mask, _ = (tensor.to(device) for tensor in texts)
    return model.encode(ids, mask, scene_pixels(scenes).to(device))


def _fills(model: Vilt, tokenizer: WordPiece, hidden: Sequence[tuple], scenes: Sequence[Scene]) -> float:
    """The share of hidden tokens that are guessed, top-1 over the vocabulary."""
    texts = text_rows(tokenizer, *zip(*hidden, strict=True))
    is_mask = texts[2] != IGNORE  # (B, L)
    text = _states(model, texts, scenes)["text"]  # (B, L, D)
    best = model.mlm_logits(text[is_mask.to(text.device)]).argmax(-1).cpu()
    return float((best == texts[2][is_mask]).float().mean())


def _accepts(model: Vilt, tokenizer: WordPiece, captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """The share of captions that are called a match."""
    states = _states(model, text_rows(tokenizer, captions, [()] * len(captions)), scenes)
    return float(model.itm_logits(states["pooled"]).argmax(-1).float().mean())


@torch.inference_mode()
def glance_at_captions(model: Vilt, rows: Callable[[int], list[Rows]], steps: int = 4) -> dict[str, float]:
    """masked_word and itm_random, in [0, 1], on `steps` batches of kept-back captions.

    itm_random is the mean of the accuracies on true and on wrong pairs, so guessing gives 1/2 however many
    there are of each. A measure for which there is nothing to ask is left out.
    """
    device = next(model.parameters()).device
    words, pairs = [], {0: [], 1: []}
    for step in range(steps):
        for r in rows(step):
            r = r.to(device)
            out = model.encode(r.ids, r.text_mask, r.pixels, r.pixel_mask)
            hidden = r.labels != IGNORE  # (B, L)
            words.append(model.mlm_logits(out["text"][hidden]).argmax(-1) == r.labels[hidden])
            said = model.itm_logits(out["pooled"]).argmax(-1)  # (B,)
            for truth, hits in pairs.items():
                hits.append(said[r.match == truth] == truth)
    words, (wrong, true) = torch.cat(words), map(torch.cat, pairs.values())
    found = {"masked_word": float(words.float().mean())} if len(words) else {}
    if len(wrong) and len(true):
        found["itm_random"] = float((wrong.float().mean() + true.float().mean()) / 2)
    return found
