"""What a trained ViLT can do with pairs of objects that training never showed together.

    masked_object     a [MASK] left of a guitar   one noun hidden, all its pieces; right when every piece is,
                                                  top-1 over the vocabulary; `masked_both` hides both nouns
    masked_relation   a dog [MASK] a guitar       the whole phrase hidden; top-1 over the vocabulary
    itm_random        true captions, and captions of other pictures that are false here; accuracy
    itm_swapped       true captions, and the same with the nouns exchanged; accuracy
    retrieval_r1_64   the caption's picture scores strictly above 63 others, of which the caption is false, by
                      rank.py, which asks both heads; `retrieval_itm` asks the matching head alone
    pointing          the largest entry of the noun's rows in the transport plan is a patch whose centre is in
                      the noun's box; `pointing_any` counts the other noun's box too

"seen" scenes are new ones drawn by the training artists, "unseen" ones by all other artists in the data.
Beside each number stand its 95 % interval (interval.py, clustered by pair of objects), `chance`, which
guessing gives, and `objects`, the ceiling for one who knows which objects a picture shows, but not where.

Sources: Kim, Son and Kim 2021 (ViLT), sections 4.3 and 4.4: a caption is read with every candidate picture.
Left out: retrieval of captions (the same scores along the other axis) and the wider ranks 5 and 10.
"""

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import Concept, EmojiVL, Scene, Scenes, probes
from minivlp.evaluation.interval import measured
from minivlp.evaluation.point import patches_inside, transport
from minivlp.evaluation.rank import Hidden, match_odds, wins
from minivlp.evaluation.reading import encoded
from minivlp.evaluation.splits import CANDIDATES, Progress, Tick, artists_by_split, evaluate_splits, silent
from minivlp.evaluation.tables import scene_tables
from minivlp.models.vilt import Vilt
from minivlp.text import WordPiece

NAMES = {
    "masked_object": "masked object word",
    "masked_relation": "masked relation word",
    "itm_random": "matching, random captions",
    "itm_swapped": "matching, swapped order",
    "retrieval_r1_64": "caption → picture, R@1 of 64",
    "pointing": "pointing into the noun's box",
    "masked_both": "both object words masked",
    "retrieval_itm": "R@1 by the matching head alone",
    "pointing_any": "pointing into either box",
}
MEASURES = tuple(NAMES)[:6]  # the others stand in the details only


@torch.inference_mode()
def evaluate(
    model: Vilt,
    tokenizer: WordPiece,
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    items: int = 1500,
    sets: int = 12,
    seed: int = 1,
    progress: Progress = silent,
) -> dict:
    """All measures on held-out pairs of `nouns`, in square pictures of `canvas` pixels.

    items: per measure, but retrieval has 64 · sets. progress(done, total) is told the forward passes but for
    those that retrieval needs to compare nouns: nobody knows beforehand how many. Returns, ready for JSON,
    {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value", "low", "high", "chance",
    "objects", "items", "clusters", "masked"}}, "unseen": {…}, "artists", "nouns", "canvas", "seed"}}. A split
    without artists in the data is {}. Raises ValueError when items is odd or < 4, and when a split has too
    few held-out pairs of nouns (16 for the 64 candidates).
    """
    if items < 4 or items % 2:
        fail("items", "must be even and at least 4", items)
    artists, sources, groups, half = artists_by_split(emojivl), {}, {}, items // 2
    for split in filter(artists.get, artists):  # what fails for lack of pairs does so before the first pass
        scenes = Scenes(emojivl, nouns, artists[split], canvas, pairs="held_out", seed=seed)
        groups[split] = probes.retrieval_sets((scenes[i] for i in count(items)), sets, CANDIDATES)
        sources[split] = scenes

    def measure(split: str, tick: Tick) -> dict[str, dict]:
        scenes = [sources[split][i] for i in range(items)]
        measures = _words(model, tokenizer, scenes, len(sources[split].nouns), tick)
        measures |= _matching(model, tokenizer, scenes[:half], seed, tick)
        measures |= _retrieval(model, tokenizer, groups[split], tick)
        return measures | _pointing(model, tokenizer, scenes[:half], tick)

    ticks = 5 * items + CANDIDATES**2 * sets
    names = {split: [concept.noun for concept in scenes.nouns] for split, scenes in sources.items()}
    results = evaluate_splits(artists, measure, ticks, progress, nouns=names, canvas=canvas, seed=seed)
    return results | {split: {name: results[split][name] for name in MEASURES} for split in sources}


def _pairs(scenes: Sequence[Scene]) -> list[tuple[int, int]]:
    """The two objects of each scene: its cluster."""
    return [probes.meaning(scene)[:2] for scene in scenes]


def found(
    model: Vilt, tokenizer: WordPiece, hidden: Sequence[Hidden], scenes: Sequence[Scene], tick: Tick = silent
) -> list[Tensor]:
    """Which of the pieces hidden in text i are top-1 over the vocabulary, given the rest and picture i."""
    right = [torch.empty(0)] * len(hidden)
    for rows, ids, states in encoded(model, tokenizer, [text for text, _ in hidden], scenes, tick):
        is_mask = ids == tokenizer.mask_id  # (B, L)
        best = model.mlm_logits(states["text"][is_mask]).argmax(-1).cpu()  # one a [MASK], row after row
        for i, guesses in zip(rows, best.split(is_mask.sum(1).tolist()), strict=True):
            right[i] = guesses == torch.tensor(hidden[i][1])
    return right


def _words(model, tokenizer, scenes: list[Scene], nouns: int, tick: Tick) -> dict[str, dict]:
    """The three measures of hidden words, on the same scenes."""

    def hits(hidden: list[Hidden]) -> list[bool]:
        return [bool(pieces.all()) for pieces in found(model, tokenizer, hidden, scenes, tick)]

    one = [probes.hide_slots(scene, [i % 2], tokenizer) for i, scene in enumerate(scenes)]
    both = [probes.hide_slots(scene, [0, 1], tokenizer) for scene in scenes]
    relation = [
        (text, [probes.single_piece_id(word, tokenizer)]) for text, word in map(probes.hide_relation, scenes)
    ]
    asked = {  # what is hidden, the chance, the ceiling of objects, and what the report says is masked
        "masked_object": (one, 1 / (nouns - 1), 1, "one noun, all its pieces; the other shows"),
        "masked_both": (both, 1 / nouns / (nouns - 1), 1 / 2, "both nouns, all their pieces"),
        "masked_relation": (relation, 1 / 4, 1 / 4, "the relation phrase, as one [MASK]"),
    }
    return {
        name: measured(hits(hidden), _pairs(scenes), chance=chance, objects=objects, masked=masked)
        for name, (hidden, chance, objects, masked) in asked.items()
    }


def _matching(model, tokenizer, scenes: list[Scene], seed: int, tick: Tick) -> dict[str, dict]:
    """Accuracy on true and false captions; every picture is asked about with one of each."""

    def accepted(captions: list[str]) -> np.ndarray:
        return match_odds(model, tokenizer, captions, scenes, tick) > 0

    pairs, others = _pairs(scenes), probes.false_captions(scenes, np.random.default_rng(seed))
    other_objects = np.mean([pair != pairs[j] for pair, j in zip(pairs, others, strict=True)])
    true = accepted([scene.caption for scene in scenes])
    random = np.concatenate([true, ~accepted([scenes[j].caption for j in others])])
    order = np.concatenate([true, ~accepted([probes.swapped(scene) for scene in scenes])])
    about = {"chance": 1 / 2, "masked": "nothing"}
    return {
        "itm_random": measured(random, pairs * 2, objects=(1 + other_objects) / 2, **about),
        "itm_swapped": measured(order, pairs * 2, objects=1 / 2, **about),
    }


def _retrieval(model, tokenizer, groups: list[list[Scene]], tick: Tick) -> dict[str, dict]:
    """R@1 of every caption among the pictures of its group. A tie is no hit."""
    hits, pairs, objects = {"retrieval_r1_64": [], "retrieval_itm": []}, [], []
    for group in groups:
        n, captions = len(group), [scene.caption for scene in group]
        hidden = [probes.hide_slots(scene, range(len(scene.slots)), tokenizer) for scene in group]
        odds = match_odds(model, tokenizer, [c for c in captions for _ in group], group * n, tick)
        odds = odds.reshape(n, n)  # row i: caption i with every picture
        hits["retrieval_r1_64"] += wins(model, tokenizer, hidden, group, odds).tolist()
        best_other = np.where(np.eye(n, dtype=bool), -np.inf, odds).max(1)
        hits["retrieval_itm"] += (odds.diagonal() > best_other).tolist()
        names = _pairs(group)
        objects += [1 / names.count(name) for name in names]
        pairs += names
    about = {"chance": 1 / CANDIDATES, "objects": np.mean(objects)}
    masked = {"retrieval_r1_64": "nothing, then both nouns", "retrieval_itm": "nothing"}
    return {name: measured(hits[name], pairs, masked=masked[name], **about) for name in hits}


def _pointing(model, tokenizer, scenes: list[Scene], tick: Tick) -> dict[str, dict]:
    """Where the plan puts the most of each of the two nouns of every scene."""
    hits, share = np.zeros((2, 2, len(scenes), 2))  # each (own or any box, scene, noun)
    for rows, _, states in encoded(model, tokenizer, [scene.caption for scene in scenes], scenes, tick):
        plans = transport(states).float().cpu().numpy()  # (B, L, N)
        for i, rows_of_plan in zip(rows, plans, strict=True):
            inside = patches_inside(scenes[i], model.config.patch)  # (2, N)
            best = [rows_of_plan[span].sum(0).argmax() for span in probes.noun_spans(scenes[i], tokenizer)]
            hits[:, i] = inside[[0, 1], best], inside.any(0)[best]
            share[0, i], share[1, i] = inside.mean(1), inside.any(0).mean()
    clusters = [pair for pair in _pairs(scenes) for _ in range(2)]
    return {
        name: measured(h.ravel(), clusters, chance=c.mean(), objects=c.mean(), masked="nothing")
        for name, h, c in zip(("pointing", "pointing_any"), hits, share, strict=True)
    }


NOTE = """\
Intervals are clustered by pair of objects. *Objects alone* is the ceiling for one who knows
which objects a picture shows, but not where.
"""


def report(results: dict) -> str:
    """The results of `evaluate` as Markdown, one table a split."""
    return scene_tables(results, NAMES, NOTE, masked="{masked}")
