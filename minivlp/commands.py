"""What each command does, from parsed arguments to files. Parsing, errors and exit codes: __main__.py."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from minivlp import figures
from minivlp.batches import CaptionRows, SceneRows, scene_pixels
from minivlp.captions import captions_folder, coco_captions, split
from minivlp.curriculum import STAGES
from minivlp.data import Concept, EmojiVL, Scene, Scenes, load_emojivl
from minivlp.evaluate import evaluate, rank, report
from minivlp.gallery import aligned, draw_run
from minivlp.glance import glance, glance_at_captions
from minivlp.refuse import refuse
from minivlp.runs import Run, default_folder, write_json
from minivlp.text import WordPiece
from minivlp.train import PRESETS, TrainConfig, fit, new_model, pretraining_loss, scene_tokenizer
from minivlp.trained import Trained, load_trained

Say = Callable[[str], None]
GLANCE = 256  # scenes asked about twenty times during training
DEMO = 11  # seed of the demo's pictures


def train(args: argparse.Namespace, say: Say) -> None:
    """Train the main job or on own captions, then evaluate and draw."""
    preset = args.preset or ("captions" if args.captions else "cpu")
    if preset not in PRESETS:
        refuse("--preset", f"must be one of {', '.join(PRESETS)}", repr(preset))
    run = Run(default_folder(args.name or ("captions" if args.captions else args.model)), args.resume)
    if args.resume:  # a resumed run keeps the settings it began with
        settings = run.load()["settings"]
    else:
        given = {
            k: getattr(args, k) for k in ("steps", "batch", "lr", "seed") if getattr(args, k) is not None
        }
        settings = {
            "command": args.command_line,
            "model": args.model,
            "preset": preset,
            "captions": args.captions,
            "images": args.images,
            "on_error": args.on_error,
            "train": asdict(replace(PRESETS[preset], **given)),
        }
    job = train_captions if settings["captions"] else train_scenes
    job(TrainConfig(**settings["train"]), run, settings, args, say)


def train_scenes(config: TrainConfig, run: Run, settings: dict, args: argparse.Namespace, say: Say) -> None:
    """The main job on EmojiVL scenes."""
    emojivl = load_emojivl()
    nouns = emojivl.nouns(config.nouns)
    tokenizer = scene_tokenizer(nouns, config.vocab_size)
    model = new_model(config, len(tokenizer))
    stages = STAGES[settings["preset"]]
    rows = SceneRows(emojivl, nouns, tokenizer, stages, config.steps, config.batch, config.seed)
    fresh = Scenes(emojivl, nouns, canvas=config.canvas, pairs="held_out", seed=config.seed + 1)
    check = partial(glance, tokenizer=tokenizer, scenes=fresh, items=GLANCE)
    size = sum(p.numel() for p in model.parameters())
    say(
        f"{size:,} parameters, {len(nouns)} nouns, {config.steps} steps of {config.batch} rows, in {run.folder}"
    )
    loss = partial(pretraining_loss, wpa_weight=config.wpa_weight)
    for record in fit(model, rows, loss, config, run, tokenizer, settings, check, args.device, args.resume):
        say(line(record, config.steps))
    trained = load_trained(run.folder)
    evaluate_into(run.folder / "eval.json", trained, emojivl, args, say)
    for path in draw_run(run.folder, run.records(), trained, emojivl):
        say(f"wrote {path}")


def train_captions(config: TrainConfig, run: Run, settings: dict, args: argparse.Namespace, say: Say) -> None:
    """ViLT's own recipe on your pictures and captions; a tenth of the pictures is kept for checking."""
    path, on_error = Path(settings["captions"]), settings["on_error"]
    if settings["images"]:
        data = coco_captions(path, settings["images"], on_error)
    else:
        data = captions_folder(path, on_error)
    for problem in data.problems:
        say(f"skipped: {problem}")
    training, held = split(data)
    tokenizer = WordPiece.train(training.texts, config.vocab_size)
    model = new_model(config, len(tokenizer))
    size = (tokenizer, config.canvas, config.patch, config.max_text_len, config.batch, config.seed)
    rows = CaptionRows(training, *size)
    say(
        f"{len(training)} captions to train on, {len(held)} to check with, {len(tokenizer)} tokens, in {run.folder}"
    )
    check = partial(glance_at_captions, rows=CaptionRows(held, *size, augment=False))
    loss = partial(pretraining_loss, wpa_weight=config.wpa_weight)
    for record in fit(model, rows, loss, config, run, tokenizer, settings, check, args.device, args.resume):
        say(line(record, config.steps))
    results = check(model)
    write_json(run.folder / "eval.json", results)
    say("  ".join(f"{name} {value:.3f}" for name, value in results.items()))
    figures.curves(run.folder / "curves.png", run.records(), {"itm_random": 0.5})


def evaluate_command(args: argparse.Namespace, say: Say) -> None:
    """Measure a trained model on the sheets of a data folder."""
    trained = load_trained(args.run)
    evaluate_into(Path(args.out) if args.out else None, trained, load_emojivl(args.data), args, say)


def evaluate_into(
    out: Path | None, trained: Trained, emojivl: EmojiVL, args: argparse.Namespace, say: Say
) -> dict:
    """Evaluate; write the results to `out`, and the report beside it."""
    trained.model.to(args.device)
    nouns = trained.nouns(emojivl)
    sets = -(-args.items // 64)
    results = evaluate(
        trained.model,
        trained.tokenizer,
        emojivl,
        nouns,
        trained.canvas,
        args.items,
        sets,
        progress=args.progress,
    )
    trained.model.to("cpu")
    text = report(results)
    if out:
        write_json(out, results)
        out.with_name("report.md").write_text(text, encoding="utf-8")
    say(text)
    return results


def demo(args: argparse.Namespace, say: Say) -> None:
    """Rank 64 pictures of the unseen artists for a caption; draw the best five and the alignment with the best."""
    trained = load_trained(args.run)
    emojivl, t = load_emojivl(), trained.tokenizer
    nouns = trained.nouns(emojivl)
    if unknown := [w for w in args.caption.split() if t.unk_id in t.encode(w)]:
        known = ", ".join(c.noun for c in nouns)
        refuse("caption", f"must use the model's words (nouns: {known})", f"{', '.join(unknown)}")
    scenes = demo_scenes(emojivl, nouns, trained.canvas, args.caption)
    scores = rank(trained.model, t, args.caption, scene_pixels(scenes))
    best = np.argsort(-scores)[:5]
    for place, i in enumerate(best, start=1):
        say(f"{place}. {scores[i]:+6.2f}  {scenes[i].caption}")
    out = Path(args.out)
    right = [place for place, i in enumerate(best) if scenes[i].caption == args.caption]
    figures.retrieval_grid(
        out / "demo.png", [(args.caption, [scenes[i].image for i in best], right[0] if right else None)]
    )
    figures.alignment(out / "demo_alignment.png", [aligned(trained.model, t, scenes[best[0]], args.caption)])
    say(f"wrote {out / 'demo.png'} and {out / 'demo_alignment.png'}")


def demo_scenes(emojivl: EmojiVL, nouns: tuple[Concept, ...], canvas: int, caption: str) -> list[Scene]:
    """64 pictures by unseen artists; half of them show only the caption's own nouns, where there are two."""
    artists = emojivl.unseen_artists or tuple(emojivl.sheets)
    asked = [c for c in nouns if c.noun in caption.split()]
    mixed = Scenes(emojivl, nouns, artists, canvas, pairs="all", seed=DEMO)
    if len(asked) < 2:
        return [mixed[i] for i in range(64)]
    hard = Scenes(emojivl, asked, artists, canvas, pairs="all", seed=DEMO)
    return [hard[i] for i in range(32)] + [mixed[i] for i in range(32)]


def redraw(args: argparse.Namespace, say: Say) -> None:
    """Draw the pictures of a run folder again."""
    run = Run(args.run or default_folder("vilt"), resume=True)
    for path in draw_run(run.folder, run.records(), load_trained(run.folder), load_emojivl()):
        say(f"wrote {path}")


def line(record: dict, steps: int) -> str:
    """One plain line of progress."""
    left = record["seconds"] / record["step"] * (steps - record["step"])
    numbers = "  ".join(f"{k} {v:.3f}" for k, v in record.items() if k not in ("step", "rows", "seconds"))
    return f"step {record['step']:5d}/{steps}  {record['seconds']:5.0f} s  {left:4.0f} s left  {numbers}"
