"""What each command does, from parsed arguments to files. Parsing, errors and exit codes: __main__.py."""

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minivlp.batches import SceneRows
from minivlp.curriculum import STAGES
from minivlp.data import EmojiVL, Scenes, load_emojivl
from minivlp.demo import demo
from minivlp.evaluate import evaluate, report
from minivlp.finetune import evaluate_task, report_task, task_settings, train_task
from minivlp.fit import fit
from minivlp.gallery import draw_curves, draw_run
from minivlp.glance import glance
from minivlp.own_captions import check_captions, evaluate_captions, read_captions, train_captions
from minivlp.refuse import refuse
from minivlp.runs import Run, existing, need_writable, run_folder, write_json
from minivlp.screen import Screen, progress_line
from minivlp.text import WordPiece
from minivlp.train import PRESETS, new_model, pretraining_loss, scene_tokenizer, train_config
from minivlp.trained import Trained, load_trained, ship

GLANCE = 128  # scenes asked about twenty times during training
SEED = 1  # of the test scenes


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run the command that was asked for."""
    jobs: dict[str, Callable] = {"train": train, "eval": evaluate_run, "demo": show, "figures": redraw}
    torch.set_num_threads(args.threads or _cores())
    jobs[args.job](args, screen)


def _cores() -> int:
    """The cores this process may use, at most 4: small models gain nothing from more."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, usable)


def _device(name: str) -> str:
    """The device to use. Raises ValueError when torch does not find it."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if found["cuda"] else "cpu"
    if not found[name]:
        refuse("--device", "must be one that torch finds on this machine", name)
    return name


def train(args: argparse.Namespace, screen: Screen) -> None:
    """Train the main job, on own captions or on a task; then evaluate and draw."""
    name = args.name or args.task or ("captions" if args.captions else args.model)
    folder = run_folder(name)
    if args.resume:
        run = Run.resume(folder)
        _check_resumed(args, run.settings)
        device = _device(run.settings["device"] if args.device == "auto" else args.device)
        # The number of threads decides the order of sums, and with it the last bits.
        torch.set_num_threads(args.threads or run.settings["threads"])
    else:
        device = _device(args.device)
        Run(folder, {}).need_new()  # before anything takes time
        settings = _settings(args) | {"device": device, "threads": torch.get_num_threads()}
        run = Run.begin(folder, settings)
    args.go_on = f"python -m minivlp train --resume --name {name}"
    if run.settings.get("task"):
        train_task(run, device, args.items, screen)
    elif run.settings.get("captions"):
        train_captions(run, device, screen)
    else:
        train_scenes(run, device, args.items, screen)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that stand in place of a preset's numbers."""
    return {k: v for k in ("steps", "batch", "lr", "seed") if (v := getattr(args, k)) is not None}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a new run. Raises ValueError for flags that do not go together."""
    for flag, needs in (("start", "task"), ("images", "captions"), ("on_error", "captions")):
        if getattr(args, flag) and not getattr(args, needs):
            refuse(f"--{flag.replace('_', '-')}", f"must come with --{needs}", "none")
    for flag in ("captions", "preset"):
        if args.task and getattr(args, flag):
            refuse("--task", "must come alone: it starts from a trained run, with its sizes", f"--{flag}")
    about = {"command": args.command_line, "model": args.model, "task": None, "captions": None}
    if args.task:
        return about | task_settings(args.task, args.start, _given(args))
    preset = args.preset or ("captions" if args.captions else "cpu")
    if not args.captions and preset not in STAGES:
        refuse("--preset", f"must be {' or '.join(STAGES)} without --captions", preset)
    about |= {"preset": preset, "train": asdict(replace(PRESETS[preset], **_given(args)))}
    if args.captions:
        about |= {"images": None} | _paths(args) | {"on_error": args.on_error or "skip"}
        check_captions(about["captions"], about["images"])
    else:
        load_emojivl()  # read once a process; refuses a damaged file before the run begins
    return about


def _paths(args: argparse.Namespace) -> dict[str, str]:
    """The folders that were given, as absolute paths: a run may be resumed from another folder."""
    given = {key: getattr(args, key) for key in ("captions", "images", "start") if getattr(args, key)}
    return {key: str(existing(path).absolute()) for key, path in given.items()}


def _check_resumed(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Refuse flags that ask for something else than the run began with."""
    train_config(settings)
    flags = {key: getattr(args, key) for key in ("preset", "task", "on_error") if getattr(args, key)}
    for key, value in (flags | _paths(args) | _given(args)).items():
        began = settings["train"].get(key, settings.get(key))
        if value != began:
            rule = f"must be left out with --resume, or be what the run began with ({began})"
            refuse(f"--{key.replace('_', '-')}", rule, value)


def train_scenes(run: Run, device: str, items: int, screen: Screen) -> None:
    """The main job on EmojiVL scenes."""
    config, emojivl = train_config(run.settings), load_emojivl()
    nouns = emojivl.nouns(config.nouns)
    if run.checkpoint.exists():
        tokenizer = WordPiece(run.load()["tokens"])
    else:
        tokenizer = scene_tokenizer(nouns, config.vocab_size)
    model = new_model(config, len(tokenizer))
    stages = STAGES[run.settings["preset"]]
    rows = SceneRows(emojivl, nouns, tokenizer, stages, config.steps, config.batch, config.seed)
    fresh = Scenes(emojivl, nouns, canvas=config.canvas, pairs="held_out", seed=config.seed + 1)
    check = partial(glance, tokenizer=tokenizer, scenes=fresh, items=GLANCE)
    loss = partial(pretraining_loss, wpa_weight=config.wpa_weight)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(nouns)} nouns"
    screen.say(f"{size}, {config.steps} steps of {config.batch} rows, in {run.folder}")
    with screen.bar("training") as tick:
        for record in fit(model, rows, loss, config, run, tokenizer, check, device, tick):
            screen.say(progress_line(record, config.steps))
    trained = load_trained(run.folder)
    results = _measure(trained, emojivl, items, SEED, device, screen)
    write_json(run.folder / "eval.json", results)
    (run.folder / "report.md").write_text(report(results), encoding="utf-8")
    ship(trained, run.folder / "vilt_tiny.safetensors", results)
    for path in draw_run(run.folder, run.records(), trained, emojivl):
        screen.say(f"wrote {path}")


def _measure(
    trained: Trained, emojivl: EmojiVL, items: int, seed: int, device: str, screen: Screen
) -> dict[str, Any]:
    """The results of `evaluate`, told."""
    nouns, model = trained.nouns(emojivl), trained.model.to(device)
    with screen.bar("evaluating", lines=True) as tick:
        what = (model, trained.tokenizer, emojivl, nouns, trained.canvas, items, -(-items // 64), seed)
        results = evaluate(*what, progress=tick)
    model.to("cpu")
    screen.say(report(results))
    return results


def evaluate_run(args: argparse.Namespace, screen: Screen) -> None:
    """Measure a trained model: on sheets, or, trained on own captions, on those kept back."""
    if args.out:
        need_writable(Path(args.out))
    device, trained = _device(args.device), load_trained(args.run)
    if trained.settings.get("captions"):
        if args.data:
            refuse("--data", "must be left out for a run on own captions", args.data)
        results = evaluate_captions(trained, read_captions(trained.settings, screen)[1], screen)
    elif trained.settings.get("task"):
        emojivl = load_emojivl(args.data)
        path = existing(args.run)
        folder = path if path.is_dir() else path.parent
        results = evaluate_task(folder, emojivl, args.items, args.seed, device, screen)
        screen.say(report_task(results))
    else:
        results = _measure(trained, load_emojivl(args.data), args.items, args.seed, device, screen)
    if args.out:
        write_json(Path(args.out), results)


def show(args: argparse.Namespace, screen: Screen) -> None:
    """The demo."""
    demo(args.caption, args.run, Path(args.out), _device(args.device), screen)


def redraw(args: argparse.Namespace, screen: Screen) -> None:
    """Draw the pictures of a run again."""
    run = Run.resume(existing(args.run or "runs/vilt"))
    if run.settings.get("task") or run.settings.get("captions"):
        paths = [draw_curves(run.folder, run.records())]
    else:
        paths = draw_run(run.folder, run.records(), load_trained(run.folder), load_emojivl())
    for path in paths:
        screen.say(f"wrote {path}")
