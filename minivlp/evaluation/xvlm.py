"""What a trained X-VLM finds in crowds: two to four objects whose names training never put together.

    grounding      the box for a phrase overlaps the object's by an IoU of at least 0.5; every kind of phrase
                   (crowds.py) is asked equally often:
    ground_name        a guitar                     the only one there
    ground_place       a dog left of the middle     one of two dogs
    ground_relation    a dog above a guitar         one of two dogs
    naming         of all nouns, the one whose "a dog" has the largest dot product with the object's region
    pointing       the patch with the largest dot product with "a dog" has its centre in the box: no box head,
                   so this compares models that were trained without boxes too

"seen" scenes are new ones drawn by the training artists, "unseen" ones by all other artists in the data.
Beside each number stand its 95 % interval (interval.py, clustered by the first two nouns of the scene) and

    chance     what an answer reaches that looks neither at the picture nor at the phrase: the best constant
               box, chosen among 200 true ones on these very items (a box at random is worse); for naming one
               over the number of nouns, for pointing the share of patches that lie in the box
    objects    what one reaches who knows where every object is and what it is, but not which of those of the
               name in the phrase is meant: 1 or 1/2

Sources: Yu et al. 2016 (RefCOCO), IoU at least 0.5; Zeng, Zhang and Li 2022 (X-VLM), section 4.4.
Left out: proposals of boxes; the model answers with one box of its own.
"""

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import torch

from minivlp.boxes import cxcywh_to_xyxy
from minivlp.core.require import fail
from minivlp.data import TRAINING_ARTISTS, Concept, EmojiVL, Scene, scene_pixels
from minivlp.data.crowds import KINDS, Crowds, Phrase, phrases
from minivlp.data.probes import takes
from minivlp.evaluation.interval import measured
from minivlp.evaluation.point import patches_inside
from minivlp.evaluation.tables import scene_tables
from minivlp.evaluation.vilt import BATCH, encoded, whole_rows
from minivlp.models.xvlm import Xvlm
from minivlp.regions import patches_touched, region_tokens
from minivlp.text import WordPiece

NAMES = {
    "grounding": "a box for a phrase",
    "ground_name": "… that names the object",
    "ground_place": "… that says where it lies",
    "ground_relation": "… that says beside what it lies",
    "naming": "a noun for an object's region",
    "pointing": "a patch for a name",
}
CONSTANTS = 200
Item = tuple[Scene, Phrase]


@torch.inference_mode()
def evaluate_xvlm(
    model: Xvlm,
    tokenizer: WordPiece,
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    items: int = 2000,
    seed: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """All measures on held-out pairs of `nouns`, in square pictures of `canvas` pixels.

    items: phrases of each kind; progress(done, total) is told the forward passes. Returns, ready for JSON,
    {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value", "low", "high", "chance",
    "objects", "items", "clusters"}}, "unseen": {…}, "artists", "nouns", "canvas", "seed"}}. A split without
    artists in the data is {}. Raises ValueError when items is < 1 and when a split has no held-out pair.
    """
    if items < 1:
        fail("items", "must be at least 1", items)
    seen = [artist for artist in emojivl.sheets if artist in TRAINING_ARTISTS]
    artists = {"seen": seen, "unseen": list(emojivl.unseen_artists)}
    details = {"seen": {}, "unseen": {}, "artists": artists, "nouns": {}, "canvas": canvas, "seed": seed}
    splits = [split for split in artists if artists[split]]
    sources = {s: Crowds(emojivl, nouns, artists[s], canvas, "held_out", seed=seed) for s in splits}
    total, done = len(splits) * 4 * items, 0

    def tick(passes: int) -> None:
        nonlocal done
        done += passes
        progress(done, total)

    for split, source in sources.items():
        details["nouns"][split] = [concept.noun for concept in source.nouns]
        asked = questions(source, items)
        details[split] |= _grounding(model, tokenizer, asked, tick)
        details[split] |= _similarity(model, tokenizer, source, asked["name"], tick)
    values = {s: {m: details[s][m]["value"] for m in details[s]} for s in artists}
    return values | {"details": details}


def questions(source: Crowds, items: int) -> dict[str, list[Item]]:
    """`items` phrases of every kind, at most one of a kind a scene, with their scenes.

    Raises ValueError when 100 · (items + 10) scenes do not suffice.
    """
    asked: dict[str, list[Item]] = {kind: [] for kind in KINDS}
    rng = np.random.default_rng(source.seed)
    endless = (source[i] for i in count())
    for scene in takes(endless, 100 * (items + 10), f"hold {items} phrases of every kind"):
        for kind, some in asked.items():
            fitting = [phrase for phrase in phrases(scene) if phrase.kind == kind]
            if fitting and len(some) < items:
                some.append((scene, fitting[int(rng.integers(len(fitting)))]))
        if all(len(some) == items for some in asked.values()):
            break
    return asked


def answers(model: Xvlm, tokenizer: WordPiece, items: Sequence[Item], tick: Callable) -> np.ndarray:
    """The box for each phrase in its scene: (items, 4) as corners in pixels."""
    found = np.zeros((len(items), 4))
    texts, scenes = [phrase.text for _, phrase in items], [scene for scene, _ in items]
    for rows, _, states in encoded(model, tokenizer, texts, scenes, tick):
        boxes = cxcywh_to_xyxy(model.boxes(states["pooled"])).float().cpu().numpy()
        found[rows] = boxes * np.tile(scenes[0].image.shape[1::-1], 2)
    return found


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (…, 4) as corners, pair by pair; arrays broadcast."""
    extent = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = extent.clip(0).prod(-1)
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)


def _grounding(model, tokenizer, asked: dict[str, list[Item]], tick: Callable) -> dict[str, dict]:
    every = [item for some in asked.values() for item in some]
    kinds = np.array([phrase.kind for _, phrase in every])
    true = np.array([scene.boxes[phrase.row] for scene, phrase in every], float)  # (n, 4)
    hits = iou(answers(model, tokenizer, every, tick), true) >= 0.5
    objects = np.where(kinds == "name", 1.0, 0.5)
    pairs = [_pair(scene) for scene, _ in every]
    found = {}
    for name in tuple(NAMES)[:4]:
        own = np.ones(len(every), bool) if name == "grounding" else kinds == name.removeprefix("ground_")
        clusters = [pair for pair, mine in zip(pairs, own, strict=True) if mine]
        found[name] = measured(hits[own], clusters, chance=best_guess(true[own]), objects=objects[own].mean())
    return found


def best_guess(true: np.ndarray) -> float:
    """The share of boxes (n, 4) that one box answers, IoU at least 0.5: the best of CONSTANTS of these."""
    tried = true[np.linspace(0, len(true) - 1, CONSTANTS).astype(int)]
    return float((iou(tried[:, None], true) >= 0.5).mean(1).max())


def _similarity(model, tokenizer, source: Crowds, items: list[Item], tick: Callable) -> dict[str, dict]:
    """Naming and pointing, on the phrases that are names."""
    device, patch = next(model.parameters()).device, model.config.patch
    ids, mask = whole_rows(
        tokenizer, [f"{c.article} {c.noun}" for c in source.nouns], model.config.max_text_len
    )
    words = model.text_words(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
    texts = model.text_vector(words)  # (nouns, embed)
    number = {concept.id: i for i, concept in enumerate(source.nouns)}
    named, pointed, share = [], [], []
    for start in range(0, len(items), BATCH):
        scenes, rows = zip(
            *((scene, phrase.row) for scene, phrase in items[start : start + BATCH]), strict=True
        )
        right = np.array([number[scene.objects[row]] for scene, row in zip(scenes, rows, strict=True)])
        boxes = np.array([scene.boxes[row] for scene, row in zip(scenes, rows, strict=True)])
        patches = model.image_patches(scene_pixels(scenes).to(device))  # (B, N, D)
        touched = torch.from_numpy(patches_touched(boxes, patch, *scenes[0].image.shape[:2])).to(device)
        regions = model.image_vector(region_tokens(patches, touched)[:, 0])  # (B, embed)
        named += ((regions @ texts.T).argmax(1).cpu().numpy() == right).tolist()
        heat = model.image_vector(patches) @ texts[torch.from_numpy(right).to(device)][..., None]  # (B, N, 1)
        centred = np.stack(
            [patches_inside(scene, patch)[row] for scene, row in zip(scenes, rows, strict=True)]
        )
        pointed += centred[np.arange(len(scenes)), heat[..., 0].argmax(1).cpu().numpy()].tolist()
        share += centred.mean(1).tolist()
        tick(len(scenes))
    clusters, chance = [_pair(scene) for scene, _ in items], float(np.mean(share))
    return {
        "naming": measured(named, clusters, chance=1 / len(source.nouns), objects=1),
        "pointing": measured(pointed, clusters, chance=chance, objects=1),
    }


def _pair(scene: Scene) -> tuple[int, ...]:
    return tuple(sorted(scene.objects[:2]))


def report_xvlm(results: dict) -> str:
    """The results of `evaluate_xvlm` as Markdown, one table a split."""
    lines = scene_tables(results, NAMES, {})
    lines.append("A box is right when its IoU with the object's is at least 0.5. Intervals are clustered by")
    lines.append(
        "pair of nouns. *Objects alone* is what one reaches who knows every object and its place, but"
    )
    lines.append("reads only the first noun of the phrase.")
    return "\n".join([*lines, ""])
