"""The main job, a ViLT on EmojiVL scenes: from settings to a trained model, its measures and its pictures."""

from functools import partial
from typing import Any

from minivlp.data import EmojiVL, Scenes, load_emojivl
from minivlp.evaluation.vilt import CANDIDATES, evaluate, report
from minivlp.pictures.gallery import draw_run
from minivlp.recipes.curriculum import STAGES
from minivlp.recipes.glance import glance
from minivlp.recipes.train import new_model, pretraining_loss, scene_tokenizer, train_config
from minivlp.recipes.vilt_batches import SceneRows
from minivlp.text import WordPiece
from minivlp.training.job import Recipe, measure_and_draw, train_with
from minivlp.training.run import Run
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained
from minivlp.training.workers import Workers

GLANCE = 128  # scenes asked about twenty times during training
SEED = 1  # of the test scenes


def train_scenes(run: Run, device: str, items: int, screen: Screen, workers: Workers) -> None:
    """Train, measure, and write results, pictures and the model as one small file."""
    config, emojivl = train_config(run.settings), load_emojivl()
    nouns = emojivl.nouns(config.nouns)
    if run.checkpoint.exists():
        tokenizer = WordPiece(run.load()["tokens"])
    else:
        tokenizer = scene_tokenizer(nouns, config.vocab_size)
    stages = STAGES[run.settings["preset"]]
    fresh = Scenes(emojivl, nouns, canvas=config.canvas, pairs="held_out", seed=config.seed + 1)
    recipe = Recipe(
        new_model(config, len(tokenizer)),
        SceneRows(emojivl, nouns, tokenizer, stages, config.steps, config.batch, config.seed),
        partial(pretraining_loss, wpa_weight=config.wpa_weight, workers=workers),
        config,
        tokenizer,
        partial(glance, tokenizer=tokenizer, scenes=fresh, items=GLANCE),
        f"{len(nouns)} nouns",
    )
    train_with(recipe, run, device, screen, workers)
    if workers.rank == 0:
        measure = partial(
            measure_scenes, emojivl=emojivl, items=items, seed=SEED, device=device, screen=screen
        )
        measure_and_draw(run, screen, measure, report, partial(draw_run, emojivl=emojivl))


def measure_scenes(
    trained: Trained, emojivl: EmojiVL, items: int, seed: int, device: str, screen: Screen
) -> dict[str, Any]:
    """The results of `evaluate`, told."""
    nouns, model = trained.nouns(emojivl), trained.model.to(device)
    with screen.bar("evaluating", lines=True) as tick:
        what = (trained.tokenizer, emojivl, nouns, trained.canvas, items, -(-items // CANDIDATES), seed)
        results = evaluate(model, *what, progress=tick)
    model.to("cpu")
    screen.say(report(results))
    return results
