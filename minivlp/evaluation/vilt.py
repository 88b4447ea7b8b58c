"""What a trained ViLT can do with pairs of objects that training never showed together.

    masked_object     a [MASK] left of a guitar   one noun hidden, all its pieces; right when every piece is,
                                                  top-1 over the vocabulary; `masked_both` hides both nouns
    masked_relation   a dog [MASK] a guitar       the whole phrase hidden; top-1 over the vocabulary
    itm_random        true captions, and captions of other pictures that are false here; accuracy
    itm_swapped       true captions, and the same with the nouns exchanged; accuracy
    retrieval_r1_64   the caption's picture scores strictly above 63 others, of which the caption is false, by
                      ranking.py, which asks both heads; `retrieval_itm` asks the matching head alone
    pointing          the largest entry of the noun's rows in the transport plan is a patch whose centre is in
                      the noun's box; `pointing_any` counts the other noun's box too

"seen" scenes are new ones drawn by the training artists, "unseen" ones by all other artists in the data.
Beside each number stand its 95 % interval (interval.py, clustered by pair of objects), `chance`, which
guessing gives, and `objects`, the ceiling for one who knows which objects a picture shows, but not where.

Sources: Kim, Son and Kim 2021 (ViLT), sections 4.3 and 4.4: a caption is read with every candidate picture.
Left out: retrieval of captions (the same scores along the other axis) and the wider ranks 5 and 10.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import TRAINING_ARTISTS, Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.probes import (
    false_captions,
    hide_relation,
    hide_slots,
    meaning,
    noun_spans,
    retrieval_sets,
    swapped,
    whole_word,
)
from minivlp.evaluation.interval import measured
from minivlp.evaluation.point import patches_inside, transport
from minivlp.evaluation.rank import BATCH, both_heads, match_odds, match_scores, whole_rows, word_scores
from minivlp.evaluation.tables import scene_tables
from minivlp.models.vilt import Vilt
from minivlp.text import WordPiece

CANDIDATES = 64
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
    items: int = 2000,
    sets: int = 32,
    seed: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """All measures on held-out pairs of `nouns`, in square pictures of `canvas` pixels.

    items: per measure, but retrieval has 64 · sets; progress(done, total) is told the forward passes.
    Returns, ready for JSON, {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value",
    "low", "high", "chance", "objects", "items", "clusters", "masked"}}, "unseen": {…}, "artists", "nouns",
    "canvas", "seed"}}. A split without artists in the data is {}. Raises ValueError when items is odd or < 4,
    and when a split has too few held-out pairs of nouns (16 for the 64 candidates).
    """
    if items < 4 or items % 2:
        fail("items", "must be even and at least 4", items)
    seen = [artist for artist in emojivl.sheets if artist in TRAINING_ARTISTS]
    artists = {"seen": seen, "unseen": list(emojivl.unseen_artists)}
    details = {"seen": {}, "unseen": {}, "artists": artists, "nouns": {}, "canvas": canvas, "seed": seed}
    splits = [split for split in artists if artists[split]]
    total, done = len(splits) * (5 * items + 2 * CANDIDATES**2 * sets), 0

    def tick(passes: int) -> None:
        nonlocal done
        done += passes
        progress(done, total)

    sources, groups = {}, {}
    for split in splits:  # all that can fail for lack of pairs comes before the first forward pass
        scenes = Scenes(emojivl, nouns, artists[split], canvas, pairs="held_out", seed=seed)
        groups[split] = retrieval_sets((scenes[i] for i in count(items)), sets, CANDIDATES)
        sources[split], details["nouns"][split] = scenes, [concept.noun for concept in scenes.nouns]
    for split, scenes in sources.items():
        details[split] |= _words(model, tokenizer, scenes, items, tick)
        details[split] |= _matching(model, tokenizer, scenes, items // 2, tick)
        details[split] |= _retrieval(model, tokenizer, groups[split], tick)
        details[split] |= _pointing(model, tokenizer, scenes, items // 2, tick)
    values = {s: {m: details[s][m]["value"] for m in MEASURES if details[s]} for s in artists}
    return values | {"details": details}


def _words(model, tokenizer, source: Scenes, items: int, tick: Callable) -> dict[str, dict]:
    """The three measures of hidden words, on the same scenes."""
    scenes, n = [source[i] for i in range(items)], len(source.nouns)
    pairs = [meaning(scene)[:2] for scene in scenes]

    def hits(hidden: list[tuple[str, list[int]]]) -> np.ndarray:
        right = np.zeros(items)
        for rows, ids, states in encoded(model, tokenizer, [text for text, _ in hidden], scenes, tick):
            is_mask = ids == tokenizer.mask_id  # (B, L)
            best = model.mlm_logits(states["text"][is_mask]).argmax(-1)  # one a [MASK], row after row
            for i, found in zip(rows, best.split(is_mask.sum(1).tolist()), strict=True):
                right[i] = found.tolist() == hidden[i][1]
        return right

    one = [hide_slots(scene, [i % 2], tokenizer) for i, scene in enumerate(scenes)]
    both = [hide_slots(scene, [0, 1], tokenizer) for scene in scenes]
    relation = [(text, [whole_word(word, tokenizer)]) for text, word in map(hide_relation, scenes)]
    return {
        "masked_object": measured(
            hits(one),
            pairs,
            chance=1 / (n - 1),
            objects=1,
            masked="one noun, all its pieces; the other shows",
        ),
        "masked_both": measured(
            hits(both), pairs, chance=1 / n / (n - 1), objects=1 / 2, masked="both nouns, all their pieces"
        ),
        "masked_relation": measured(
            hits(relation), pairs, chance=1 / 4, objects=1 / 4, masked="the relation phrase, as one [MASK]"
        ),
    }


def _matching(model, tokenizer, source: Scenes, pictures: int, tick: Callable) -> dict[str, dict]:
    """Accuracy on true and false captions; every picture is asked about with one of each."""
    scenes = [source[i] for i in range(pictures)]
    pairs = [meaning(scene)[:2] for scene in scenes]

    def accepts(captions: list[str]) -> np.ndarray:
        scores = np.zeros(pictures)
        for rows, _, states in encoded(model, tokenizer, captions, scenes, tick):
            scores[rows] = match_scores(model, states).float().cpu()
        return scores > 0

    others = false_captions(scenes, np.random.default_rng(source.seed))
    told = np.mean([pair != pairs[j] for pair, j in zip(pairs, others, strict=True)])  # by their objects
    true = accepts([scene.caption for scene in scenes])
    random = np.concatenate([true, ~accepts([scenes[j].caption for j in others])])
    order = np.concatenate([true, ~accepts([swapped(scene) for scene in scenes])])
    return {
        "itm_random": measured(random, pairs * 2, chance=1 / 2, objects=(1 + told) / 2, masked="nothing"),
        "itm_swapped": measured(order, pairs * 2, chance=1 / 2, objects=1 / 2, masked="nothing"),
    }


def _retrieval(model, tokenizer, groups: list[list[Scene]], tick: Callable) -> dict[str, dict]:
    """R@1 of every caption among the pictures of its group. A tie is no hit."""
    hits, pairs, objects = {"retrieval_r1_64": [], "retrieval_itm": []}, [], []
    for group in groups:
        pixels, names = scene_pixels(group), [meaning(scene)[:2] for scene in group]
        for i, scene in enumerate(group):
            odds = match_odds(model, tokenizer, scene.caption, pixels)
            hidden = hide_slots(scene, range(len(scene.slots)), tokenizer)
            both = both_heads(odds, word_scores(model, tokenizer, *hidden, pixels))
            for name, scores in zip(hits, (both, odds), strict=True):
                hits[name].append(bool((scores[i] > np.delete(scores, i)).all()))
            objects.append(1 / names.count(names[i]))
            tick(2 * len(group))
        pairs += names
    about = {"chance": 1 / CANDIDATES, "objects": np.mean(objects)}
    masked = {"retrieval_r1_64": "nothing, then both nouns", "retrieval_itm": "nothing"}
    return {name: measured(hits[name], pairs, masked=masked[name], **about) for name in hits}


def _pointing(model, tokenizer, source: Scenes, pictures: int, tick: Callable) -> dict[str, dict]:
    """Where the plan puts the most of each of the two nouns of every scene."""
    scenes = [source[i] for i in range(pictures)]
    hits, share = np.zeros((2, pictures, 2)), np.zeros((2, pictures, 2))  # (own or any box, scene, noun)
    for rows, _, states in encoded(model, tokenizer, [scene.caption for scene in scenes], scenes, tick):
        plans = transport(states).float().cpu().numpy()  # (B, L, N)
        for i, rows_of_plan in zip(rows, plans, strict=True):
            inside = patches_inside(scenes[i], model.config.patch)  # (2, N)
            best = [rows_of_plan[span].sum(0).argmax() for span in noun_spans(scenes[i], tokenizer)]
            hits[:, i] = inside[[0, 1], best], inside.any(0)[best]
            share[0, i], share[1, i] = inside.mean(1), inside.any(0).mean()
    clusters = [meaning(scene)[:2] for scene in scenes for _ in range(2)]
    return {
        name: measured(h.ravel(), clusters, chance=c.mean(), objects=c.mean(), masked="nothing")
        for name, h, c in zip(("pointing", "pointing_any"), hits, share, strict=True)
    }


def encoded(
    model: Vilt, tokenizer: WordPiece, texts: Sequence[str], scenes: Sequence[Scene], tick: Callable
) -> Iterator[tuple[np.ndarray, Tensor, dict[str, Tensor]]]:
    """Text i with picture i, in batches: `(rows (b,), ids (b, L), the states of model.encode)`."""
    device = next(model.parameters()).device
    for rows, ids in equal_lengths(tokenizer, texts, model.config.max_text_len):
        words, pixels = torch.from_numpy(ids).to(device), scene_pixels([scenes[i] for i in rows]).to(device)
        yield rows, words, model.encode(words, torch.ones_like(words, dtype=torch.bool), pixels)
        tick(len(rows))


def equal_lengths(
    tokenizer: WordPiece, texts: Sequence[str], longest: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Texts in batches of one length, so that no row needs padding or a mask: `(rows (b,), ids (b, L))`."""
    ids, mask = whole_rows(tokenizer, texts, longest)
    lengths = mask.sum(1)
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        for rows in np.split(same, range(BATCH, len(same), BATCH)):
            yield rows, ids[rows, :length]


def report(results: dict) -> str:
    """The results of `evaluate` as Markdown, one table a split."""
    lines = scene_tables(results, NAMES, {"masked": "{masked}"})
    lines.append(
        "Intervals are clustered by pair of objects. *Objects alone* is the ceiling for one who knows"
    )
    lines.append("which objects a picture shows, but not where.")
    return "\n".join([*lines, ""])
