"""What a model writes about pictures of pairs that training never showed together, and what it tells apart.

    nats              −log p(caption | picture), of the whole caption with its end. One who knows the picture
                      pays ln 2, for either object may be named first: the floor. One who knows the grammar
                      and not the picture pays the ceiling, the entropy of all captions.
    true              the most probable sentence, word by word, is true of the picture in either order: "a dog
                      left of a guitar" and "a guitar right of a dog" both are
    objects           the share of the picture's two objects that the sentence names
    order             the caption is more probable than the same with its nouns exchanged
    axis              … than the same with another relation
    order_contrast    the vectors of picture and caption are more alike than with the nouns exchanged
    order_match       the matching head prefers the caption to the same with its nouns exchanged
    first_of_64       the caption's picture among 64, by the vectors

Sources: Lin et al. 2023 (VisualGPTScore) and Tschannen et al. 2023 for order by the probability of a caption.
Left out: BLEU and CIDEr, which compare words; here it is known which sentences are true.
"""

import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

import numpy as np

from minivlp.core.require import fail
from minivlp.data import RELATIONS, Concept, EmojiVL, Scene, Scenes
from minivlp.data.probes import (
    article_and_noun,
    meaning,
    misrelated,
    retrieval_sets,
    swapped,
    true_captions,
)
from minivlp.evaluation.interval import measured
from minivlp.evaluation.splits import CANDIDATES, Progress, Tick, evaluate_pairs, silent
from minivlp.evaluation.tables import scene_tables
from minivlp.text import split_words

NAMES = {
    "true": "greedy captions that are true",
    "objects": "objects that they name",
    "order": "nouns exchanged, by the caption's probability",
    "axis": "another relation, by the caption's probability",
    "order_contrast": "nouns exchanged, by the vectors",
    "order_match": "nouns exchanged, by the matching head",
    "first_of_64": "caption → picture, R@1 of 64, by the vectors",
}
FLOOR = math.log(2)  # nats of a caption whose picture is known: which object is named first


class Writer(Protocol):
    """A model that writes."""

    def log_p(self, captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray: ...
    def write(self, scenes: Sequence[Scene]) -> list[str]: ...


Scores = Callable[[Sequence[str], Sequence[Scene]], np.ndarray]  # captions (A), scenes (B) → (A, B)


def named_objects(text: str, scene: Scene) -> int:
    """How many of a pair's two nouns a text has as whole words."""
    padded = f" {text} "
    return sum(f" {' '.join(split_words(article_and_noun(slot)[1]))} " in padded for slot in scene.slots)


def blind_nats(source: Scenes) -> float:
    """The entropy in nats of a pair's caption: which pair, which of its nouns first, and which relation."""
    return math.log(2 * source.pairs_of_nouns * len(RELATIONS))


def evaluate_captions(
    writer: Writer,
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    items: int = 1500,
    seed: int = 1,
    progress: Progress = silent,
    contrast: Scores | None = None,
    blind: Writer | None = None,
    match: Callable[[Sequence[str], Sequence[Scene]], np.ndarray] | None = None,
) -> dict:
    """All measures on held-out pairs; those of vectors where there is a `contrast`, of matching with `match`.

    match(captions, scenes) → (n,), the more the likelier does caption i belong to scene i.

    Returns, ready for JSON, {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value",
    "low", "high", "chance", "objects", "items", "clusters"}, …}, …, "nats": {"seen": {"own", "floor",
    "ceiling"}, …}, "blind": {"training_pairs": …, "ceiling": …}}}; `blind`, a model that was trained without
    pictures, is asked about captions of training pairs. Raises ValueError when items is < 4.
    """
    if items < 4:
        fail("items", "must be at least 4", items)
    nats = {}

    def measure(split: str, source: Scenes, tick: Tick) -> dict[str, dict]:
        scenes = [source[i] for i in range(items)]
        pairs, rng = [meaning(scene)[:2] for scene in scenes], np.random.default_rng(seed)
        captions = [scene.caption for scene in scenes]
        exchanged = [swapped(scene) for scene in scenes]
        own = writer.log_p(captions, scenes)
        tick(1)
        nats[split] = {"own": float(-own.mean()), "floor": FLOOR, "ceiling": blind_nats(source)}
        order = own > writer.log_p(exchanged, scenes)
        axis = own > writer.log_p([misrelated(scene, rng) for scene in scenes], scenes)
        tick(1)
        written = [" ".join(split_words(text)) for text in writer.write(scenes)]
        true = [text in true_captions(scene) for text, scene in zip(written, scenes, strict=True)]
        named = [named_objects(text, scene) / 2 for text, scene in zip(written, scenes, strict=True)]
        tick(1)
        chance = 1 / (len(source.nouns) * (len(source.nouns) - 1) / 2 * len(RELATIONS))
        measures = {
            "true": measured(true, pairs, chance=chance, objects=1 / len(RELATIONS)),
            "objects": measured(named, pairs, chance=2 / len(source.nouns), objects=1),
            "order": measured(order, pairs, chance=1 / 2, objects=1 / 2),
            "axis": measured(axis, pairs, chance=1 / 2, objects=1 / 2),
        }
        if contrast is not None:
            true_scores, false_scores = (_own(contrast, texts, scenes) for texts in (captions, exchanged))
            measures["order_contrast"] = measured(
                true_scores > false_scores, pairs, chance=1 / 2, objects=1 / 2
            )
            measures["first_of_64"] = _first_of_64(contrast, source, items, seed)
        if match is not None:
            order = match(captions, scenes) > match(exchanged, scenes)
            measures["order_match"] = measured(order, pairs, chance=1 / 2, objects=1 / 2)
        tick(1)
        return measures

    results = evaluate_pairs(measure, emojivl, nouns, canvas, seed, 4, progress)
    results["details"]["nats"] = nats
    if blind is not None:
        source = Scenes(emojivl, nouns, canvas=canvas, pairs="train", seed=seed)
        scenes = [source[i] for i in range(items)]
        own = float(-blind.log_p([scene.caption for scene in scenes], scenes).mean())
        results["details"]["blind"] = {"training_pairs": own, "ceiling": blind_nats(source)}
    return results


def _own(contrast: Scores, captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray:
    """The score of each caption with its own picture."""
    return contrast(captions, scenes).diagonal()


def _first_of_64(contrast: Scores, source: Scenes, items: int, seed: int) -> dict:
    hits, pairs, objects = [], [], []
    sets = -(-items // (2 * CANDIDATES))
    for group in retrieval_sets((source[i] for i in count(items)), sets, CANDIDATES):
        scores = contrast([scene.caption for scene in group], group)
        best_other = np.where(np.eye(len(group), dtype=bool), -np.inf, scores).max(1)
        hits.extend(scores.diagonal() > best_other)  # a tie is no hit
        names = [meaning(scene)[:2] for scene in group]
        objects += [1 / names.count(name) for name in names]
        pairs += names
    return measured(hits, pairs, chance=1 / CANDIDATES, objects=np.mean(objects))


NOTE = """\
Held-out pairs of objects; intervals are clustered by them. *Objects alone* is the ceiling for one who knows
which objects a picture shows, but not where.
"""


def report_captions(results: dict) -> str:
    """The results of `evaluate_captions` as Markdown: one table a split, and nats a caption."""
    details = results["details"]
    lines = [scene_tables(results, NAMES, NOTE), ""]
    for split, n in details["nats"].items():
        lines.append(
            f"A caption of a picture by {split} artists takes {n['own']:.2f} nats; one who knows the picture "
            f"pays {n['floor']:.2f}, one who knows only the grammar {n['ceiling']:.2f}."
        )
    if "blind" in details:
        blind = details["blind"]
        lines.append(
            f"The blind model pays {blind['training_pairs']:.2f} nats for a caption of training pairs, whose "
            f"entropy is {blind['ceiling']:.2f}."
        )
    return "\n".join(lines) + "\n"
