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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from minivlp.data import Concept, EmojiVL, Scenes, scene_pixels, trained_concepts
from minivlp.data.drawings import Portraits
from minivlp.data.names import PROMPTS, named
from minivlp.data.probes import meaning, retrieval_sets
from minivlp.data.scenes import SCENE_SIZES
from minivlp.evaluation.interval import measured
from minivlp.evaluation.match import Matcher, Tokens, ranks, similarities
from minivlp.evaluation.splits import CANDIDATES, Progress, Tick, artists_by_split, evaluate_splits, silent
from minivlp.evaluation.tables import CELL, INTERVAL, table, tables

DEPTHS = (1, 5, 10)
TIERS = ("object", "thing", "person", "face", "symbol")


def evaluate_dual(
    matcher: Matcher, emojivl: EmojiVL, language: str, sets: int, seed: int = 1, progress: Progress = silent
) -> dict:
    """All measures; sets: of 64 scenes each. Returns, ready for JSON,

    {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value", "low", "high", "chance",
    "items", "clusters"}}, "unseen": {…}, "tiers": {"seen": {tier: {measure: {…}}}, …}, "artists",
    "concepts", "language", "canvas", "seed"}}. A split without artists in the data is {}.
    """
    canvas, prompts = matcher.model.config.image_size, PROMPTS[language]
    artists, portraits = artists_by_split(emojivl), Portraits(emojivl, canvas)
    known = trained_concepts(emojivl, emojivl.sheets)
    new = [c for c in emojivl.concepts if c.split != "train" and c.artists]

    def read(concepts: list[Concept], forms: Sequence[str] = prompts) -> list[Tokens]:
        return matcher.ensembles([named(c, language) for c in concepts], forms) if concepts else []

    texts, bare, new_texts, all_texts = read(known), read(known, prompts[:1]), read(new), read(known + new)
    tiers: dict[str, dict] = {"seen": {}, "unseen": {}}

    def measure(split: str, tick: Tick) -> dict[str, dict]:
        drawings, unknown = _drawings(known, artists[split]), _drawings(new, artists[split])
        pixels = portraits.plain(*_columns(drawings))
        pictures = matcher.pictures(pixels)
        by_prompts = _classified(drawings, pictures, texts, known)
        tiers[split] = by_prompts.tiers()
        measures = by_prompts.measures("classification")
        measures |= _classified(drawings, pictures, bare, known).measures("image_to_text")
        tick(1)
        measures |= _searched(drawings, pictures, bare[0], known).measures("text_to_image")
        if unknown:
            pictures = matcher.pictures(portraits.plain(*_columns(unknown)))
            measures |= _classified(unknown, pictures, new_texts, new).measures("zeroshot")
            measures |= _classified(unknown, pictures, all_texts, known + new).measures("zeroshot_all")
        tick(1)
        if split == "unseen" and artists["seen"]:
            floor = nearest_pixels(portraits, drawings, pixels, known, artists["seen"])
            measures |= floor.measures("pixels")
        tick(1)
        if language == "en":
            measures |= _scenes(matcher, emojivl, artists[split], sets, seed)
        tick(1)
        return measures

    about = {"tiers": tiers, "concepts": len(known), "language": language, "canvas": canvas, "seed": seed}
    return evaluate_splits(artists, measure, 4, progress, **about)


def _drawings(concepts: Sequence[Concept], artists: Sequence[str]) -> list[tuple[Concept, str]]:
    return [(c, a) for a in artists for c in concepts if a in c.artists]


def _columns(drawings: Sequence[tuple[Concept, str]]) -> tuple[list[int], list[str]]:
    return [c.id for c, _ in drawings], [a for _, a in drawings]


@dataclass(frozen=True)
class Answers:
    """The ranks of the right answers to A questions, with and without what looks the same."""

    concepts: np.ndarray  # (A,) ids of the concepts that were asked about
    tier: np.ndarray  # (A,) their tiers
    rank: np.ndarray  # (A,) wrong answers that score at least as high as the best right one
    share: np.ndarray  # (A,) of the candidates that are right
    exact: np.ndarray  # (A,) the rank where only the concept itself is right
    exact_share: np.ndarray  # (A,)

    @classmethod
    def of(cls, scores: np.ndarray, asked: Sequence[Concept], among: Sequence[Concept]) -> "Answers":
        """From scores (A, C) of the questions with the candidates."""
        ids, concepts = np.array([c.id for c in among]), np.array([c.id for c in asked])
        own = ids == concepts[:, None]  # (A, C)
        right = own | np.array([np.isin(ids, c.near) for c in asked])
        tier = np.array([c.tier for c in asked])
        return cls(concepts, tier, ranks(scores, right), right.mean(1), ranks(scores, own), own.mean(1))

    def measures(self, name: str, tier: str | None = None, exact: bool = False) -> dict[str, dict]:
        """{name_r1, name_r5, name_r10: measured}, of one tier or all; exact: no near name is a hit."""
        chosen = slice(None) if tier is None else self.tier == tier
        rank, share = (self.exact, self.exact_share) if exact else (self.rank, self.share)
        clusters = self.concepts[chosen].tolist()
        chance = {k: np.minimum(1, k * share[chosen]).mean() for k in DEPTHS}
        return {f"{name}_r{k}": measured(rank[chosen] < k, clusters, chance=chance[k]) for k in DEPTHS}

    def tiers(self) -> dict[str, dict]:
        """Of each tier that was asked about: R@1, R@5 and R@10, and the same for the exact name."""
        there = [tier for tier in TIERS if tier in self.tier]
        return {t: self.measures("near", t) | self.measures("exact", t, exact=True) for t in there}


def _classified(drawings, pictures: Tokens, texts: Sequence[Tokens], among: Sequence[Concept]) -> Answers:
    """Each drawing's name among the names of these concepts, read in one or several prompts."""
    scores = np.mean([similarities(pictures, names) for names in texts], axis=0)
    return Answers.of(scores, [c for c, _ in drawings], among)


def _searched(drawings, pictures: Tokens, texts: Tokens, concepts: Sequence[Concept]) -> Answers:
    """Names among each artist's drawings, searched on their own; then the answers of all artists together."""
    number, parts = {c.id: i for i, c in enumerate(concepts)}, []
    for artist in dict.fromkeys(a for _, a in drawings):
        rows, drawn = zip(*((k, c) for k, (c, a) in enumerate(drawings) if a == artist), strict=True)
        rows, names = list(rows), [number[c.id] for c in drawn]
        scores = similarities((texts[0][names], texts[1][names]), (pictures[0][rows], pictures[1][rows]))
        parts.append(Answers.of(scores, drawn, drawn))
    return Answers(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))


def nearest_pixels(
    portraits, drawings, pixels, concepts: Sequence[Concept], artists: Sequence[str]
) -> Answers:
    """The floor: a concept's score is minus the smallest distance to one of its drawings by these artists."""
    bank, number = _drawings(concepts, artists), {c.id: i for i, c in enumerate(concepts)}
    known = portraits.plain(*_columns(bank)).flatten(1)  # (K, 3·H·W)
    distance = torch.cdist(pixels.flatten(1), known).numpy()  # (A, K)
    scores = np.full((len(concepts), len(pixels)), -np.inf, np.float32)
    np.maximum.at(scores, [number[c.id] for c, _ in bank], -distance.T)
    return Answers.of(scores.T, [c for c, _ in drawings], concepts)


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


NOTE = """\
Classification is by an ensemble of prompts among the names of all training concepts; a name whose
drawing nearly coincides counts as a hit, but not as the exact name. *Pixels* is the floor: the
concept of the training drawing with the nearest pixels. Intervals are clustered by concept, for
scenes by pair of objects.
"""


def report_dual(results: Mapping) -> str:
    """The results of `evaluate_dual` as Markdown, a table of measures and one of tiers a split."""
    details = results["details"]
    columns = INTERVAL | {"chance": "{chance:.4f}", "items": "{items}", "concepts or pairs": "{clusters}"}

    def tiers(split: str) -> list[str]:
        keys, rows = ("near_r1", "near_r5", "exact_r1", "exact_r5"), []
        for tier, m in details["tiers"][split].items():
            rows.append([tier, str(m["near_r1"]["items"]), *(CELL.format(**m[key]) for key in keys)])
        return ["", *table(["tier", "items", "R@1", "R@5", "R@1, exact name", "R@5, exact name"], rows)]

    about = f"{details['concepts']} training concepts, {details['canvas']} pixels square."
    return tables(details, lambda split: about, lambda name: name.replace("_r", ", R@"), columns, NOTE, tiers)
