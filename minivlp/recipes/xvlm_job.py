"""X-VLM's job: from settings to a trained model, its evaluation and its pictures.

Left out: own captions, which have no boxes, and fine-tuning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivlp.core.require import fail
from minivlp.data import EmojiVL, load_emojivl
from minivlp.data.crowds import Crowds
from minivlp.evaluation.xvlm import ask_phrases, best_guess, evaluate_xvlm, iou, predict_boxes, report_xvlm
from minivlp.models.xvlm import Xvlm
from minivlp.pictures.gallery import draw_curves
from minivlp.pictures.sheets import grounding_sheet
from minivlp.recipes.train import scene_tokenizer
from minivlp.recipes.xvlm_rows import RegionSource
from minivlp.recipes.xvlm_train import ABLATIONS, PRESETS, new_xvlm, xvlm_config, xvlm_loss
from minivlp.text import WordPiece
from minivlp.training.job import Recipe, measure_and_draw, train_with
from minivlp.training.run import Run
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import Workers

GLANCE = 128  # phrases of each kind asked about twenty times during training
SEED, DRAWN_SEED, DRAWN = 1, 7, 15  # of the test scenes, and of those that are drawn; how many of these


def xvlm_settings(preset: str | None, without: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a new run, `without` of ABLATIONS. Raises ValueError for a preset that is not."""
    if preset not in (None, *PRESETS):
        fail("--preset", f"must be {' or '.join(PRESETS)} for xvlm", preset)
    load_emojivl()  # read once a process; refuses a damaged file before the run begins
    given = {**ABLATIONS.get(without, {}), **given}
    train = asdict(replace(PRESETS[preset or "cpu"], **given))
    return {"preset": preset or "cpu", "without": without, "train": train}


def train_xvlm(run: Run, device: str, items: int, screen: Screen, workers: Workers) -> None:
    """Train on regions and pictures, measure, and write results, pictures and the model as one small file."""
    config, emojivl = xvlm_config(run.settings), load_emojivl()
    nouns = emojivl.nouns(config.nouns)
    if run.checkpoint.exists():
        tokenizer = WordPiece(run.load()["tokens"])
    else:
        tokenizer = scene_tokenizer(nouns, config.vocab_size)
    sizes = {name: getattr(config, name) for name in ("canvas", "patch", "regions", "mask", "seed")}
    recipe = Recipe(
        new_xvlm(config, len(tokenizer)),
        RegionSource(emojivl, nouns, tokenizer, pictures=config.batch, **sizes),
        partial(xvlm_loss, config=config),
        config,
        tokenizer,
        _glance(emojivl, nouns, config.canvas, tokenizer),
        f"{len(nouns)} nouns",
    )
    train_with(recipe, run, device, screen, workers)
    about = {"emojivl": emojivl, "items": items, "seed": SEED, "device": device, "screen": screen}
    measure = partial(measure_xvlm, **about)
    measure_and_draw(run, screen, measure, report_xvlm, partial(draw_xvlm, emojivl=emojivl))


def _glance(
    emojivl: EmojiVL, nouns: Sequence, canvas: int, tokenizer: WordPiece
) -> Callable[[Xvlm], dict[str, float]]:
    """A quick look: grounding for some phrases on scenes of seen and of unseen artists."""
    groups = {"seen": None, "unseen": emojivl.unseen_artists}
    asked = {}
    for split, artists in groups.items():
        if artists is None or artists:
            source = Crowds(emojivl, nouns, artists, canvas, "held_out", seed=SEED)
            asked[split] = [item for some in ask_phrases(source, GLANCE).values() for item in some]

    @torch.inference_mode()
    def check(model: Xvlm) -> dict[str, float]:
        found = {}
        for split, items in asked.items():
            true = np.array([scene.boxes[phrase.row] for scene, phrase in items])
            right = iou(predict_boxes(model, tokenizer, items), true) >= 0.5
            found[f"grounding_{split}"] = float(right.mean())
        return found

    return check


def measure_xvlm(
    trained: Trained, emojivl: EmojiVL, items: int, seed: int, device: str, screen: Screen
) -> dict[str, Any]:
    """The results of `evaluate_xvlm`, told."""
    model = trained.model.to(device)
    with screen.bar("evaluating", lines=True) as tick:
        what = (trained.tokenizer, emojivl, trained.nouns(emojivl), trained.canvas, items, seed, tick)
        results = evaluate_xvlm(model, *what)
    model.to("cpu")
    screen.say(report_xvlm(results))
    return results


def draw_xvlm(folder: Path, records: Sequence[dict], trained: Trained, emojivl: EmojiVL) -> list[Path]:
    """Write curves.png and grounding.png, the boxes found for phrases in unseen scenes, into the folder."""
    artists = emojivl.unseen_artists or tuple(emojivl.sheets)
    nouns = trained.nouns(emojivl)
    source = Crowds(emojivl, nouns, artists, trained.canvas, "held_out", seed=DRAWN_SEED)
    asked = [item for trio in zip(*ask_phrases(source, GLANCE).values(), strict=True) for item in trio]
    chance = best_guess(np.array([scene.boxes[phrase.row] for scene, phrase in asked], float))
    items = asked[:DRAWN]
    with torch.inference_mode():
        found = predict_boxes(trained.model, trained.tokenizer, items)
    rows = [
        (scene.image, phrase.text, scene.boxes[phrase.row], box)
        for (scene, phrase), box in zip(items, found, strict=True)
    ]
    grounding_sheet(folder / "grounding.png", rows)
    measures = [f"grounding_{split}" for split in ("seen", "unseen")]
    shown = {name: chance for name in measures if any(name in record for record in records)}
    return [draw_curves(folder, records, ("itc", "itm", "mlm", "box"), shown), folder / "grounding.png"]
