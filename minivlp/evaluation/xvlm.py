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

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from minivlp.boxes import cxcywh_to_xyxy
from minivlp.core.require import fail
from minivlp.data import Concept, EmojiVL, Scene, scene_pixels
from minivlp.data.crowds import KINDS, Crowds, Phrase, phrases
from minivlp.data.probes import takes
from minivlp.evaluation.interval import measured
from minivlp.evaluation.point import patches_inside
from minivlp.evaluation.reading import BATCH, encoded, fitting_rows
from minivlp.evaluation.splits import Progress, Tick, artists_by_split, evaluate_splits, silent
from minivlp.evaluation.tables import scene_tables
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
    progress: Progress = silent,
) -> dict:
    """All measures on held-out pairs of `nouns`, in square pictures of `canvas` pixels.

    items: phrases of each kind; progress(done, total) is told the forward passes. Returns, ready for JSON,
    {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value", "low", "high", "chance",
    "objects", "items", "clusters"}}, "unseen": {…}, "artists", "nouns", "canvas", "seed"}}. A split without
    artists in the data is {}. Raises ValueError when items is < 1 and when a split has no held-out pair.
    """
    if items < 1:
        fail("items", "must be at least 1", items)
    artists = artists_by_split(emojivl)
    there = filter(artists.get, artists)
    sources = {s: Crowds(emojivl, nouns, artists[s], canvas, pairs="held_out", seed=seed) for s in there}

    def measure(split: str, tick: Tick) -> dict[str, dict]:
        items_of = ask_phrases(sources[split], items)
        measures = _grounding(model, tokenizer, [item for kind in KINDS for item in items_of[kind]], tick)
        return measures | _similarity(model, tokenizer, sources[split], items_of["name"], tick)

    names = {split: [concept.noun for concept in source.nouns] for split, source in sources.items()}
    return evaluate_splits(artists, measure, 4 * items, progress, nouns=names, canvas=canvas, seed=seed)


def ask_phrases(source: Crowds, items: int) -> dict[str, list[Item]]:
    """`items` phrases of every kind, at most one of a kind a scene, with their scenes.

    Raises ValueError when 100 · (items + 10) scenes do not suffice.
    """
    items_of: dict[str, list[Item]] = {kind: [] for kind in KINDS}
    rng = np.random.default_rng(source.seed)
    endless = (source[i] for i in count())
    for scene in takes(endless, 100 * (items + 10), f"hold {items} phrases of every kind"):
        every = phrases(scene)
        for kind, chosen in items_of.items():
            fitting = [phrase for phrase in every if phrase.kind == kind]
            if fitting and len(chosen) < items:
                chosen.append((scene, fitting[int(rng.integers(len(fitting)))]))
        if all(len(chosen) == items for chosen in items_of.values()):
            break
    return items_of


def true_boxes(items: Sequence[Item]) -> np.ndarray:
    """The box of the object that each phrase is about: (items, 4) float64, corners in pixels."""
    return np.array([scene.boxes[phrase.row] for scene, phrase in items], float)


@torch.inference_mode()
def predict_boxes(
    model: Xvlm, tokenizer: WordPiece, items: Sequence[Item], tick: Tick = silent
) -> np.ndarray:
    """The box that the model gives for each phrase in its scene: (items, 4), corners in pixels."""
    predicted = np.zeros((len(items), 4))
    texts, scenes = [phrase.text for _, phrase in items], [scene for scene, _ in items]
    for rows, _, states in encoded(model, tokenizer, texts, scenes, tick):
        boxes = cxcywh_to_xyxy(model.boxes(states["pooled"])).float().cpu().numpy()
        predicted[rows] = boxes * np.tile(scenes[0].image.shape[1::-1], 2)
    return predicted


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (…, 4) as corners, pair by pair; arrays broadcast."""
    extent = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = extent.clip(0).prod(-1)
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)


def _grounding(model, tokenizer, items: list[Item], tick: Tick) -> dict[str, dict]:
    """Boxes for phrases, of all kinds and of each."""
    kinds, true = np.array([phrase.kind for _, phrase in items]), true_boxes(items)
    hits = iou(predict_boxes(model, tokenizer, items, tick), true) >= 0.5
    objects, pairs = np.where(kinds == "name", 1.0, 0.5), np.array(_pairs(items))
    measures = {}
    for name in tuple(NAMES)[:4]:
        own = (kinds == name.removeprefix("ground_")) | (name == "grounding")
        about = {"chance": best_guess(true[own]), "objects": objects[own].mean()}
        measures[name] = measured(hits[own], list(map(tuple, pairs[own].tolist())), **about)
    return measures


def best_guess(true: np.ndarray) -> float:
    """The share of boxes (n, 4) that one box answers, IoU at least 0.5: the best of CONSTANTS of these."""
    tried = true[np.linspace(0, len(true) - 1, CONSTANTS).astype(int)]
    return float((iou(tried[:, None], true) >= 0.5).mean(1).max())


def _similarity(model, tokenizer, source: Crowds, items: list[Item], tick: Tick) -> dict[str, dict]:
    """Naming and pointing, on the phrases that are names."""
    device, patch = next(model.parameters()).device, model.config.patch
    names = [f"{concept.article} {concept.noun}" for concept in source.nouns]
    ids, mask = (torch.from_numpy(x).to(device)
                 for x in fitting_rows(tokenizer, names, model.config.max_text_len))  # fmt: skip
    texts = model.text_vector(model.text_words(ids, mask))  # (nouns, embed)
    number = {concept.id: i for i, concept in enumerate(source.nouns)}
    named, pointed, share = [], [], []
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        scenes = [scene for scene, _ in batch]
        right = torch.tensor([number[scene.objects[phrase.row]] for scene, phrase in batch], device=device)
        patches = model.image_patches(scene_pixels(scenes).to(device))  # (B, N, D)
        touched = patches_touched(true_boxes(batch), patch, *scenes[0].image.shape[:2])  # (B, N)
        regions = region_tokens(patches, torch.from_numpy(touched).to(device))[:, 0]  # (B, D)
        named += ((model.image_vector(regions) @ texts.T).argmax(1) == right).tolist()
        heat = (model.image_vector(patches) @ texts[right][..., None])[..., 0]  # (B, N)
        inside = np.stack([patches_inside(scene, patch)[phrase.row] for scene, phrase in batch])  # (B, N)
        pointed += inside[np.arange(len(batch)), heat.argmax(1).cpu()].tolist()
        share += inside.mean(1).tolist()
        tick(len(batch))
    return {
        "naming": measured(named, _pairs(items), chance=1 / len(source.nouns), objects=1),
        "pointing": measured(pointed, _pairs(items), chance=np.mean(share), objects=1),
    }


def _pairs(items: Sequence[Item]) -> list[tuple[int, ...]]:
    """The first two objects of each scene: its cluster."""
    return [tuple(sorted(scene.objects[:2])) for scene, _ in items]


NOTE = """\
A box is right when its IoU with the object's is at least 0.5. Intervals are clustered by
pair of nouns. *Objects alone* is what one reaches who knows every object and its place, but
reads only the first noun of the phrase.
"""


def report_xvlm(results: dict) -> str:
    """The results of `evaluate_xvlm` as Markdown, one table a split."""
    return scene_tables(results, NAMES, NOTE)
