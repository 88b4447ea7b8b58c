"""The dual encoder's job: from settings to a trained model, its evaluation and its pictures.

Left out: own captions and fine-tuning, which ViLT has.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minivlp.core.require import fail
from minivlp.data import TRAINING_ARTISTS, EmojiVL, load_emojivl, trained_concepts
from minivlp.data.drawings import Portraits
from minivlp.data.names import name_tokenizer, named
from minivlp.evaluation.dual import evaluate_dual, report_dual
from minivlp.evaluation.match import Matcher, ranks, similarities
from minivlp.evaluation.vilt import CANDIDATES
from minivlp.models.dual import Dual
from minivlp.pictures.gallery import draw_curves
from minivlp.pictures.search import DrawingIndex
from minivlp.pictures.sheets import contact_sheet
from minivlp.recipes.dual_train import OF_MODEL, PRESETS, PairSource, dual_config, dual_loss, new_dual
from minivlp.text import WordPiece
from minivlp.training.job import Recipe, measure_and_draw, train_with
from minivlp.training.run import Run
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import Workers

GLANCE = 256  # drawings named twenty times during training
SEED = 1  # of the test scenes
QUERIES = ("something to eat", "an animal with stripes", "music", "love", "cold weather", "a red fruit")


def dual_settings(
    kind: str, language: str | None, preset: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a new run of this model. Raises ValueError for a preset that there is not."""
    if preset not in (None, *PRESETS):
        fail("--preset", f"must be {' or '.join(PRESETS)} for a dual encoder", preset)
    load_emojivl()  # read once a process; refuses a damaged file before the run begins
    given = OF_MODEL.get(kind, {}) | given | ({"language": language} if language else {})
    return {"preset": preset or "cpu", "train": asdict(replace(PRESETS[preset or "cpu"], **given))}


def train_dual(run: Run, device: str, items: int, screen: Screen, workers: Workers) -> None:
    """Train on drawings and scenes, measure, and write results, pictures and the model as one small file."""
    kind, config, emojivl = run.settings["model"], dual_config(run.settings), load_emojivl()
    concepts = trained_concepts(emojivl, TRAINING_ARTISTS)
    if run.checkpoint.exists():
        tokenizer = WordPiece(run.load()["tokens"])
    else:
        tokenizer = name_tokenizer(concepts, config.language)
    model = new_dual(kind, config, tokenizer)
    source = PairSource(emojivl, tokenizer, config, fixed=model.config.text_pool == "last")
    recipe = Recipe(
        model,
        source,
        partial(dual_loss, objective=kind, config=config, workers=workers),
        config,
        tokenizer,
        _glance(emojivl, source.portraits, tokenizer, kind, config.language),
        f"{len(concepts)} concepts",
    )
    train_with(recipe, run, device, screen, workers)
    if workers.rank == 0:
        about = {"emojivl": emojivl, "items": items, "seed": SEED, "device": device, "screen": screen}
        measure = partial(measure_dual, **about)
        measure_and_draw(run, screen, measure, report_dual, partial(draw_dual, emojivl=emojivl))


def _glance(
    emojivl: EmojiVL, portraits: Portraits, tokenizer: WordPiece, kind: str, language: str
) -> Callable[[Dual], dict[str, float]]:
    """A quick look: R@1 of names for some drawings of the training artists and of the unseen ones."""
    concepts, rng = trained_concepts(emojivl, TRAINING_ARTISTS), np.random.default_rng(SEED)
    groups = {"seen": [a for a in emojivl.sheets if a in TRAINING_ARTISTS], "unseen": emojivl.unseen_artists}
    asked = {}
    for split, artists in groups.items():
        drawings = [(i, a) for i, c in enumerate(concepts) for a in artists if a in c.artists]
        some = [drawings[k] for k in rng.permutation(len(drawings))[:GLANCE]]
        if some:
            right = np.array([i for i, _ in some])[:, None] == np.arange(len(concepts))
            asked[split] = portraits.plain([concepts[i].id for i, _ in some], [a for _, a in some]), right
    names = [named(concept, language) for concept in concepts]

    def check(model: Dual) -> dict[str, float]:
        matcher = Matcher(model, tokenizer, kind == "filip")
        texts = matcher.texts(names)
        found = {split: similarities(matcher.pictures(x), texts) for split, (x, _) in asked.items()}
        return {f"name_{split}": float((ranks(s, asked[split][1]) < 1).mean()) for split, s in found.items()}

    return check


def measure_dual(
    trained: Trained, emojivl: EmojiVL, items: int, seed: int, device: str, screen: Screen
) -> dict[str, Any]:
    """The results of `evaluate_dual`, told; items: of scenes, rounded up to a multiple of 64."""
    matcher = Matcher(trained.model.to(device), trained.tokenizer, trained.kind == "filip")
    language = trained.settings["train"]["language"]
    with screen.bar("evaluating", lines=True) as tick:
        results = evaluate_dual(matcher, emojivl, language, -(-items // CANDIDATES), seed, tick)
    trained.model.to("cpu")
    screen.say(report_dual(results))
    return results


def draw_dual(folder: Path, records: list[dict], trained: Trained, emojivl: EmojiVL) -> list[Path]:
    """Write curves.png and search.png, the best drawings for some queries, into the folder."""
    chance = 1 / len(trained_concepts(emojivl, TRAINING_ARTISTS))
    paths = [draw_curves(folder, records, ("names", "scenes"), {"name_seen": chance, "name_unseen": chance})]
    index = DrawingIndex(trained, emojivl)
    if index.language == "en":
        sheets = [index.sheet(query, 6) for query in QUERIES]
    else:  # names of concepts that training never showed
        new = [c for c in index.concepts if c.split != "train"][: len(QUERIES)]
        sheets = [index.sheet(named(c, index.language), 6, c.name_en) for c in new]
    contact_sheet(folder / "search.png", sheets)
    return [*paths, folder / "search.png"]
