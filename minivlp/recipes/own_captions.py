"""Pretraining on your own pictures and captions: ViLT's own recipe, checked on pictures that are kept back.

Left out: retrieval and intervals; with your own captions nobody knows which caption is true of which picture.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from minivlp.core.require import fail
from minivlp.data.own import Captions, captions_folder, coco_captions, split
from minivlp.models.published.pixels import resized
from minivlp.pictures.gallery import TERMS, draw_curves
from minivlp.recipes.glance import glance_at_captions
from minivlp.recipes.train import TrainConfig, new_model, pretraining_loss, train_config
from minivlp.recipes.vilt_batches import CaptionRows
from minivlp.text import WordPiece
from minivlp.training.job import Recipe, train_with
from minivlp.training.run import Run, write_json
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained, load_trained
from minivlp.training.workers import Workers

EVAL_BATCHES = 16


def check_captions(captions: str, images: str | None) -> None:
    """Raise ValueError, before anything is read, for what cannot be a data set."""
    path = Path(captions)
    if path.suffix == ".json":
        if not path.is_file():
            fail("--captions", "must be a folder with captions.jsonl, or a COCO JSON file", captions)
        if not Path(images or path.parent).is_dir():
            fail("--images", "must be a folder", images)
    elif not (path / "captions.jsonl").is_file():
        fail("--captions", "must be a folder with captions.jsonl, or a COCO JSON file", captions)
    elif images:
        fail("--images", "must come with a COCO JSON file as --captions", images)


def read_captions(settings: Mapping[str, Any], screen: Screen) -> tuple[Captions, Captions]:
    """(training part, kept-back part) of the data that a run's settings name, after telling what is left out.

    Raises ValueError for what is no such data, for the first bad entry with on_error "stop", and when there
    are not two different pictures.
    """
    path, on_error = Path(settings["captions"]), settings["on_error"]
    if path.suffix == ".json":
        data = coco_captions(path, settings["images"] or path.parent, on_error)
    else:
        data = captions_folder(path, on_error)
    data = _wide_enough(data, train_config(settings), on_error)
    for problem in data.problems:
        screen.say(f"skipped: {problem}")
    return split(data)


def _wide_enough(data: Captions, config: TrainConfig, on_error: str) -> Captions:
    """Without pictures so narrow that a side would be less than a patch: they would stop the run later."""
    narrow, problems = {}, list(data.problems)
    for i, name in enumerate(data.names):
        if name not in narrow:
            narrow[name] = False
            with Image.open(data.folder / name) as image:
                width, height = image.size
            try:
                resized(height, width, config.canvas, config.patch)
            except ValueError as error:
                narrow[name] = True
                problems.append(f"{data[i].source}: image {name!r}: {error}")
                if on_error == "stop":
                    raise ValueError(problems[-1]) from error
    good = data.subset(i for i, name in enumerate(data.names) if not narrow[name])
    good.problems = problems
    return good


def rows_of(data: Captions, tokenizer: WordPiece, config: TrainConfig, augment: bool) -> CaptionRows:
    """Batches of captioned pictures as the settings say."""
    c = config
    return CaptionRows(
        data, tokenizer, c.canvas, c.patch, c.max_text_len, c.batch, c.seed, c.mask, augment=augment
    )


def train_captions(run: Run, device: str, items: int, screen: Screen, workers: Workers) -> None:
    """Train, and measure on the tenth of the pictures that is kept back, on all that can be made of it."""
    config = train_config(run.settings)
    training, held = read_captions(run.settings, screen)
    if run.checkpoint.exists():  # the pictures may have changed since; the vocabulary must not
        tokenizer = WordPiece(run.load()["tokens"])
    else:
        tokenizer = WordPiece.train(training.texts, config.vocab_size)
    recipe = Recipe(
        new_model(config, len(tokenizer)),
        rows_of(training, tokenizer, config, True),
        partial(pretraining_loss, wpa_weight=config.wpa_weight, workers=workers),
        config,
        tokenizer,
        partial(glance_at_captions, rows=rows_of(held, tokenizer, config, False)),
        f"{len(training)} captions to train on, {len(held)} kept back, {len(tokenizer)} tokens",
    )
    train_with(recipe, run, device, screen, workers)
    if workers.rank == 0:
        results = evaluate_captions(load_trained(run.folder), held, screen)
        write_json(run.folder / "eval.json", results)
        screen.say(f"wrote {draw_curves(run.folder, run.records(), TERMS)}")


def evaluate_captions(trained: Trained, held: Captions, screen: Screen) -> dict[str, Any]:
    """masked_word and itm_random on kept-back pictures, told and returned, ready for JSON.

    {"kept_back": {measure: float}, "details": {"captions", "pictures", "step"}}; without itm_random, and told
    so, when no wrong pair can be made of them.
    """
    config = train_config(trained.settings)
    values = glance_at_captions(trained.model, rows_of(held, trained.tokenizer, config, False), EVAL_BATCHES)
    sizes = {"captions": len(held), "pictures": len(set(held.names)), "step": trained.step}
    told = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
    screen.say(
        f"on {sizes['captions']} kept-back captions of {sizes['pictures']} pictures: {told or 'nothing'}"
    )
    if "itm_random" not in values:
        screen.say("matching is not measured: no wrong pair can be made of the pictures that are kept back")
    return {"kept_back": values, "details": sizes}
