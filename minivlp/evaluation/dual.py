"""What a trained dual encoder can do: name drawings, find them, and tell scenes apart.

    classification    a drawing → its name among the names of all training concepts, in an ensemble of prompts
    image_to_text     the same with the bare name                                              R@1, R@5, R@10
    text_to_image     a bare name → its drawing among all drawings by one artist
    zeroshot          drawings of concepts that training never showed, among their names alone
    zeroshot_all      the same among the names of all concepts
    scenes            a caption of two objects, a pair that training never showed together → its picture among
                      64, R@1; the caption is true of one of them; scene_captions is the other direction
    pixels            the floor: no model, but the concept of the training drawing with the nearest pixels

"seen" are the training artists, whose drawings of the training concepts were trained on; "unseen" all others.
Names of concepts that look the same (column `near`) count as hits; the tiers are told with and without.
Intervals are clustered by concept (scenes: by pair of objects).

Sources: Radford et al. 2021 (CLIP), section 3.1 (classification by names).
Left out: queries in free words; nobody has said which drawings are right for them.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import numpy as np
import torch

from minivlp.data import TRAINING_ARTISTS, Concept, EmojiVL, Scenes, scene_pixels, trained_concepts
from minivlp.data.drawings import Portraits
from minivlp.data.names import PROMPTS, named
from minivlp.data.probes import meaning, retrieval_sets
from minivlp.data.scenes import SCENE_SIZES
from minivlp.evaluation.interval import measured
from minivlp.evaluation.match import Matcher, ranks, similarities
from minivlp.evaluation.tables import INTERVAL, tables
from minivlp.evaluation.vilt import CANDIDATES

DEPTHS = (1, 5, 10)
TIERS = ("object", "thing", "person", "face", "symbol")


def evaluate_dual(
    matcher: Matcher,
    emojivl: EmojiVL,
    language: str,
    sets: int = 8,
    seed: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """All measures; sets: of 64 scenes each. Returns, ready for JSON,

    {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value", "low", "high", "chance",
    "items", "clusters"}}, "unseen": {…}, "tiers": {"seen": {tier: {measure: {…}}}, …}, "artists",
    "concepts", "language", "canvas", "seed"}}. A split without artists in the data is {}.
    """
    canvas = matcher.model.config.image_size
    seen = [a for a in emojivl.sheets if a in TRAINING_ARTISTS]
    artists = {"seen": seen, "unseen": list(emojivl.unseen_artists)}
    known = trained_concepts(emojivl, emojivl.sheets)
    new = [c for c in emojivl.concepts if c.split != "train" and c.artists]
    details = {"seen": {}, "unseen": {}, "tiers": {"seen": {}, "unseen": {}}, "artists": artists}
    details |= {"concepts": len(known), "language": language, "canvas": canvas, "seed": seed}
    exam, portraits = _Exam(matcher, emojivl, language), Portraits(emojivl, canvas)
    for i, split in enumerate(split for split in artists if artists[split]):
        drawings = _drawings(known, artists[split])
        pixels = portraits.plain(*_columns(drawings))
        found = {"classification": exam.classified(drawings, pixels, known, PROMPTS[language])}
        found["image_to_text"] = exam.classified(drawings, pixels, known, PROMPTS[language][:1])
        progress(4 * i + 1, 8)
        details[split] = {key: m for name, r in found.items() for key, m in r.measures(name).items()}
        details[split] |= exam.found(known, artists[split], portraits)
        unknown = _drawings(new, artists[split])
        if unknown:
            pictures = portraits.plain(*_columns(unknown))
            for name, names in (("zeroshot", new), ("zeroshot_all", [*known, *new])):
                details[split] |= exam.classified(unknown, pictures, names, PROMPTS[language]).measures(name)
        progress(4 * i + 2, 8)
        if split == "unseen" and seen:
            floor = nearest_pixels(portraits, drawings, pixels, known, seen)
            details[split] |= floor.measures("pixels")
        progress(4 * i + 3, 8)
        if language == "en":
            details[split] |= _scenes(matcher, emojivl, artists[split], sets, seed)
        details["tiers"][split] = found["classification"].tiers()
        progress(4 * i + 4, 8)
    values = {s: {name: m["value"] for name, m in details[s].items()} for s in artists}
    return values | {"details": details}


def _drawings(concepts: Sequence[Concept], artists: Sequence[str]) -> list[tuple[Concept, str]]:
    return [(c, a) for a in artists for c in concepts if a in c.artists]


def _columns(drawings: Sequence[tuple[Concept, str]]) -> tuple[list[int], list[str]]:
    return [c.id for c, _ in drawings], [a for _, a in drawings]


class Answers:
    """The ranks of the right answers, with and without what looks the same: (A,) each, and whose they are."""

    def __init__(self, scores: np.ndarray, asked: Sequence[Concept], among: Sequence[Concept]):
        ids = np.array([c.id for c in among])
        own = ids == np.array([c.id for c in asked])[:, None]  # (A, C)
        near = np.array([np.isin(ids, c.near) for c in asked])
        self.asked, self.exact, self.rank = list(asked), ranks(scores, own), ranks(scores, own | near)
        self.right = (own | near).sum(1)
        self.candidates = len(among)

    def measures(self, name: str, tier: str | None = None, exact: bool = False) -> dict[str, dict]:
        """{name_r1, name_r5, name_r10: measured}, of one tier or all; exact: no near name is a hit."""
        chosen = np.array([tier in (None, c.tier) for c in self.asked])
        rank, clusters = (self.exact if exact else self.rank)[chosen], [c.id for c in self.asked]
        clusters = np.array(clusters)[chosen].tolist()
        right = 1 if exact else self.right[chosen].mean()
        return {
            f"{name}_r{k}": measured(rank < k, clusters, chance=min(1, k * right / self.candidates))
            for k in DEPTHS
        }

    def tiers(self) -> dict[str, dict]:
        """Of each tier that was asked about: R@1, R@5 and R@10, and the same for the exact name."""
        there = [tier for tier in TIERS if any(c.tier == tier for c in self.asked)]
        return {t: self.measures("near", t) | self.measures("exact", t, exact=True) for t in there}


class _Exam:
    """Asks a matcher about drawings of concepts."""

    def __init__(self, matcher: Matcher, emojivl: EmojiVL, language: str):
        self.matcher, self.emojivl, self.language = matcher, emojivl, language

    def classified(self, drawings, pixels, among: Sequence[Concept], prompts: Sequence[str]) -> Answers:
        names = self.matcher.ensembles([named(c, self.language) for c in among], prompts)
        pictures = self.matcher.pictures(pixels)
        scores = np.mean([similarities(pictures, texts) for texts in names], axis=0)
        return Answers(scores, [c for c, _ in drawings], among)

    def found(self, concepts: Sequence[Concept], artists: Sequence[str], portraits: Portraits) -> dict:
        """text_to_image: each artist's drawings searched on their own, then all answers together."""
        parts = []
        for artist in artists:
            drawn = [c for c in concepts if artist in c.artists]
            pictures = self.matcher.pictures(portraits.plain([c.id for c in drawn], [artist] * len(drawn)))
            texts = self.matcher.texts([named(c, self.language) for c in drawn])
            parts.append(Answers(similarities(texts, pictures), drawn, drawn))
        measures = {}
        for k in DEPTHS:
            hits = np.concatenate([part.rank < k for part in parts])
            chance = np.concatenate(
                [np.minimum(1, k * part.right / part.candidates) for part in parts]
            ).mean()
            clusters = [c.id for part in parts for c in part.asked]
            measures[f"text_to_image_r{k}"] = measured(hits, clusters, chance=chance)
        return measures


def nearest_pixels(
    portraits, drawings, pixels, concepts: Sequence[Concept], artists: Sequence[str]
) -> Answers:
    """The floor: a concept's score is minus the smallest distance to one of its drawings by these artists."""
    bank = _drawings([c for c in concepts], artists)
    known = portraits.plain(*_columns(bank)).flatten(1)  # (K, 3·H·W)
    distance = torch.cdist(pixels.flatten(1), known).numpy()  # (A, K)
    scores = np.full((len(pixels), len(concepts)), -np.inf, np.float32)
    place = {c.id: i for i, c in enumerate(concepts)}
    for k, (concept, _) in enumerate(bank):
        column = place[concept.id]
        scores[:, column] = np.maximum(scores[:, column], -distance[:, k])
    return Answers(scores, [c for c, _ in drawings], concepts)


def _scenes(matcher: Matcher, emojivl: EmojiVL, artists, sets: int, seed: int) -> dict[str, dict]:
    """R@1 of captions and of pictures in groups of 64, on held-out pairs of nouns."""
    canvas = matcher.model.config.image_size
    source = Scenes(emojivl, emojivl.nouns(), artists, canvas, pairs="held_out", sizes=SCENE_SIZES, seed=seed)
    hits, pairs = {"scenes_r1": [], "scene_captions_r1": []}, []
    for group in retrieval_sets((source[i] for i in count()), sets, CANDIDATES):
        pictures = matcher.pictures(scene_pixels(group))
        texts = matcher.texts([scene.caption for scene in group])
        own = np.eye(len(group), dtype=bool)
        hits["scenes_r1"].extend(ranks(similarities(texts, pictures), own) < 1)
        hits["scene_captions_r1"].extend(ranks(similarities(pictures, texts), own) < 1)
        pairs += [meaning(scene)[:2] for scene in group]
    return {name: measured(h, pairs, chance=1 / CANDIDATES) for name, h in hits.items()}


def report_dual(results: Mapping) -> str:
    """The results of `evaluate_dual` as Markdown, a table of measures and one of tiers a split."""
    details = results["details"]
    columns = INTERVAL | {"chance": "{chance:.4f}", "items": "{items}", "concepts or pairs": "{clusters}"}

    def tiers(split: str) -> list[str]:
        lines = [
            "",
            "| tier | items | R@1 | R@5 | R@1, exact name | R@5, exact name |",
            "|---|---|---|---|---|---|",
        ]
        for tier, m in details["tiers"][split].items():
            cells = [f"{m[key]['value']:.3f} ({m[key]['low']:.3f} to {m[key]['high']:.3f})"
                     for key in ("near_r1", "near_r5", "exact_r1", "exact_r5")]  # fmt: skip
            lines.append(f"| {tier} | {m['near_r1']['items']} | {' | '.join(cells)} |")
        return lines

    lines = tables(
        results,
        lambda split: f"{details['concepts']} training concepts, {details['canvas']} pixels square.",
        lambda name: name.replace("_r", ", R@"),
        columns,
        tiers,
    )
    lines += [
        "Classification is by an ensemble of prompts among the names of all training concepts; a name whose",
        "drawing nearly coincides counts as a hit, but not as the exact name. *Pixels* is the floor: the",
        "concept of the training drawing with the nearest pixels. Intervals are clustered by concept, for",
        "scenes by pair of objects.",
    ]
    return "\n".join([*lines, ""])
