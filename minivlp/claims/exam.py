"""What an archetype is asked after training, question by question, so that seeds and models can be paired.

    retrieval    the caption's picture scores strictly above the others of its set
    swapped      a picture's caption scores strictly above the same words in the other order
    text, image, group    two pictures that differ in the order of two objects, and their two captions: each
                 picture prefers its caption, each caption its picture, and both; guessing gives 1/4, 1/4, 1/6
    statements   "F in one picture only", "F in both pictures or in none": true or false? Decided by whether F
                 matches each picture (log odds > 0); guessing, and either picture or the text alone, give
                 1/2, and objects without their places 3/4
    order        those of the statements whose pictures have the same objects in other relations: 1/2 for all
                 who do not see places
    matching     is a caption true? half of them are, a quarter is of another picture, a quarter swapped

and of a transformer over words and patches besides

    noun         a hidden noun, all its pieces, top-1
    pointing     the largest entry of the noun's rows in the transport plan is a patch inside its box
    layers       see layers.py

A tie is never right. Pictures and texts are encoded once, each by itself, as `look` and `read` allow.

Sources: Thrush et al. 2022 (Winoground), section 3; Yuksekgonul et al. 2023 (ARO); Suhr et al. 2019 (NLVR2).
Left out: pictures by other artists.
"""

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from minivlp.claims.archetypes import Archetype
from minivlp.claims.layers import layers
from minivlp.claims.verdict import Sample
from minivlp.claims.world import TEST_SEED, World
from minivlp.data import Scene, scene_pixels
from minivlp.data.probes import (
    false_captions,
    hide_slots,
    meaning,
    noun_spans,
    retrieval_sets,
    swapped,
    takes,
)
from minivlp.data.questions import ONE, SAME, statements
from minivlp.evaluation.point import patches_inside, transport
from minivlp.evaluation.reading import BATCH, encoded, fitting_rows

CHANCE = {
    "swapped": 1 / 2,
    "text": 1 / 4,
    "image": 1 / 4,
    "group": 1 / 6,
    "statements": 1 / 2,
    "matching": 1 / 2,
}
FALSE_SEED = 3  # of the choice of false captions


def exam(model: Archetype, world: World) -> dict[str, Sample]:
    """All measures of the model on the world's test scenes, which are the same for every model and seed."""
    size, source = world.size, world.scenes(0)
    scenes = [source[i] for i in range(size.items)]
    found = {"retrieval": _retrieval(model, world), "swapped": _swapped(model, world, scenes)}
    found |= winoground(model, world, counterparts(world.scenes(1), size.items // 2))
    found |= _statements(model, world)
    found["matching"] = _matching(model, world, scenes)
    if not model.config.dot:
        found["noun"] = _noun(model, world, scenes)
        found["pointing"] = _pointing(model, world, scenes)
        found |= layers(model, world, scenes)
    return found


@torch.inference_mode()
def scores(
    model: Archetype, world: World, texts: Sequence[str], scenes: Sequence[Scene], pairs: np.ndarray
) -> np.ndarray:
    """The log odds of the pairs (P, 2), rows of texts and of scenes: (P,)."""
    ids, mask = fitting_rows(world.tokenizer, texts, model.config.max_text_len)
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
    parts = [model.read(i, m) for i, m in zip(ids.split(BATCH), mask.split(BATCH), strict=True)]
    words = torch.cat(parts)
    seen = torch.cat([model.look(pixels) for pixels in scene_pixels(scenes).split(BATCH)])
    pairs = torch.from_numpy(pairs)
    return np.concatenate(
        [model.meet(seen[s], words[t], mask[t]).numpy() for t, s in (p.T for p in pairs.split(2 * BATCH))]
    )


def pair_of(scene: Scene) -> str:
    """The cluster of a scene: its pair of objects."""
    return "-".join(map(str, meaning(scene)[:2]))


def _own(n: int, text: int = 0, scene: int = 0) -> np.ndarray:
    """Text i with scene i, n of each, counted from these two on: (n, 2)."""
    return np.stack([np.arange(n) + text, np.arange(n) + scene], 1)


def _retrieval(model, world: World) -> Sample:
    source, hits, clusters = world.scenes(2), [], []
    for group in retrieval_sets((source[i] for i in count()), world.size.sets, world.size.candidates):
        n = len(group)
        every = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2)
        s = scores(model, world, [scene.caption for scene in group], group, every).reshape(n, n)
        best_other = np.where(np.eye(n, dtype=bool), -np.inf, s).max(1)
        hits += (s.diagonal() > best_other).tolist()
        clusters += [pair_of(scene) for scene in group]
    return _sample(hits, clusters)


def _swapped(model, world: World, scenes: Sequence[Scene]) -> Sample:
    n = len(scenes)
    texts = [scene.caption for scene in scenes] + [swapped(scene) for scene in scenes]
    s = scores(model, world, texts, scenes, np.concatenate([_own(n), _own(n, text=n)]))
    return _sample(s[:n] > s[n:], map(pair_of, scenes))


def counterparts(source, n: int) -> list[tuple[Scene, Scene]]:
    """n pairs of pictures with the same two objects along the same axis, in opposite order."""
    waiting: dict[tuple, list[Scene]] = {}
    found = []
    for scene in takes((source[i] for i in count()), 100 * (n + 10), "hold both orders of two objects"):
        low, high, axis, first = meaning(scene)
        if others := waiting.get((low, high, axis, not first)):
            found.append((others.pop(), scene))
        else:
            waiting.setdefault((low, high, axis, first), []).append(scene)
        if len(found) == n:
            return found


def winoground(model, world: World, couples: Sequence[tuple[Scene, Scene]]) -> dict[str, Sample]:
    """text, image and group for couples of pictures; the second caption is the first one swapped."""
    n = len(couples)
    texts = [a.caption for a, _ in couples] + [swapped(a) for a, _ in couples]
    pictures = [a for a, _ in couples] + [b for _, b in couples]
    asked = [_own(n, t, p) for t in (0, n) for p in (0, n)]
    s00, s01, s10, s11 = scores(model, world, texts, pictures, np.concatenate(asked)).reshape(4, n)
    text, image = (s00 > s10) & (s11 > s01), (s00 > s01) & (s11 > s10)
    clusters = [pair_of(a) for a, _ in couples]
    hits = {"text": text, "image": image, "group": text & image}
    return {name: _sample(h, clusters) for name, h in hits.items()}


def _statements(model, world: World) -> dict[str, Sample]:
    t, n = world.size.train, 16 * max(1, world.size.items // 16)
    sizes, seed = world.scenes(0).sizes, TEST_SEED + 3
    items = statements(world.emojivl, world.nouns, t.canvas, n, pairs="train", seed=seed, sizes=sizes)
    claimed_one = np.array([item.text.endswith(ONE.format("")) for item in items])
    said = [item.text.removesuffix(ONE.format("")).removesuffix(SAME.format("")) for item in items]
    pictures = [item.scenes[k] for k in (0, 1) for item in items]
    pairs = np.concatenate([_own(len(items)), _own(len(items), scene=len(items))])
    shown = (scores(model, world, said, pictures, pairs) > 0).reshape(2, -1)
    judged = (shown[0] != shown[1]) == claimed_one
    hits = judged == np.array([item.truth for item in items])
    clusters = np.array(["-".join(map(str, item.pair)) for item in items])
    order = np.array([item.kind == "same objects" for item in items])
    every = {"statements": slice(None), "order": order}
    return {name: _sample(hits[which], clusters[which].tolist()) for name, which in every.items()}


def _matching(model, world: World, scenes: Sequence[Scene]) -> Sample:
    n = len(scenes)
    others = false_captions(scenes, np.random.default_rng(FALSE_SEED))
    wrong = [swapped(scene) if i % 2 else scenes[j].caption
             for i, (scene, j) in enumerate(zip(scenes, others, strict=True))]  # fmt: skip
    texts = [scene.caption for scene in scenes] + wrong
    said = scores(model, world, texts, scenes, np.concatenate([_own(n), _own(n, text=n)])) > 0
    return _sample(np.concatenate([said[:n], ~said[n:]]), [pair_of(scene) for scene in scenes] * 2)


@torch.inference_mode()
def _noun(model, world: World, scenes: Sequence[Scene]) -> Sample:
    hidden = [hide_slots(scene, [i % 2], world.tokenizer) for i, scene in enumerate(scenes)]
    hits = np.zeros(len(scenes))
    for rows, ids, states in encoded(model.net, world.tokenizer, [t for t, _ in hidden], scenes):
        is_mask = ids == world.tokenizer.mask_id  # (B, L)
        best = model.net.mlm_logits(states["text"][is_mask]).argmax(-1)
        for i, one in zip(rows, best.split(is_mask.sum(1).tolist()), strict=True):
            hits[i] = one.tolist() == hidden[i][1]
    return _sample(hits, map(pair_of, scenes))


@torch.inference_mode()
def _pointing(model, world: World, scenes: Sequence[Scene]) -> Sample:
    hits, texts = np.zeros((len(scenes), 2)), [scene.caption for scene in scenes]
    for rows, _, states in encoded(model.net, world.tokenizer, texts, scenes):
        for i, plan in zip(rows, transport(states).numpy(), strict=True):
            inside = patches_inside(scenes[i], model.config.patch)  # (2, N)
            best = [plan[span].sum(0).argmax() for span in noun_spans(scenes[i], world.tokenizer)]
            hits[i] = inside[[0, 1], best]
    return _sample(hits.ravel(), [pair_of(scene) for scene in scenes for _ in range(2)])


def _sample(hits, clusters) -> Sample:
    return Sample([float(hit) for hit in hits], list(clusters))
