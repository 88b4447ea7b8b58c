"""What each command does, from parsed arguments to files. Parsing, errors and exit codes: __main__.py."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minivlp.bench import bench, chosen
from minivlp.bench.figure import bars
from minivlp.bench.measure import cores
from minivlp.bench.report import report as bench_report
from minivlp.claims.command import run_claims
from minivlp.core.files import whole_file
from minivlp.core.require import fail
from minivlp.data import load_emojivl
from minivlp.pictures.demo import demo
from minivlp.pictures.gallery import TERMS, draw_curves, draw_run
from minivlp.pictures.ground import ground
from minivlp.pictures.search import search
from minivlp.recipes.curriculum import STAGES
from minivlp.recipes.dual_job import draw_dual, dual_settings, measure_dual, train_dual
from minivlp.recipes.dual_train import dual_config
from minivlp.recipes.finetune import evaluate_task, report_task, task_settings, train_task
from minivlp.recipes.own_captions import check_captions, evaluate_captions, read_captions, train_captions
from minivlp.recipes.scene_job import measure_scenes, train_scenes
from minivlp.recipes.train import PRESETS, train_config
from minivlp.recipes.xvlm_job import draw_xvlm, measure_xvlm, train_xvlm, xvlm_settings
from minivlp.recipes.xvlm_train import xvlm_config
from minivlp.training.run import Onlooker, Run, existing, need_writable, run_folder, write_json
from minivlp.training.screen import Screen
from minivlp.training.trained import load_trained
from minivlp.training.workers import Workers, joined, threads

BENCH_FILES = ("bench.json", "report.md", "bench.png")


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run the command that was asked for."""
    jobs: dict[str, Callable] = {"train": train, "eval": evaluate_run, "demo": show, "figures": redraw}
    jobs |= {"bench": run_bench, "claims": run_claims}
    torch.set_num_threads(args.threads or threads(cores()))
    jobs[args.job](args, screen)


def _device(name: str) -> str:
    """The device to use. Raises ValueError when torch does not find it."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if found["cuda"] else "cpu"
    if not found[name]:
        fail("--device", "must be one that torch finds on this machine", name)
    return name


def train(args: argparse.Namespace, screen: Screen) -> None:
    """Train the main job, on own captions or on a task; then evaluate and draw."""
    folder = run_folder(args.name or args.task or ("captions" if args.captions else args.model))
    with joined(_device(args.device)) as workers:
        if workers.rank:
            screen = Screen(silent=True)
        # Process 0 opens the run; when it is refused, the job ends.
        run = Onlooker(folder, {}) if workers.rank else _run(args, folder, workers)
        run.settings = workers.agree(run.settings)
        start = "python" if workers.size == 1 else f"torchrun --nproc-per-node={workers.size}"
        args.go_on = f"{start} -m minivlp train --resume --name {args.name or folder.name}"
        _job(run.settings, workers)(run, run.settings["device"], args.items, screen, workers)


def _run(args: argparse.Namespace, folder: Path, workers: Workers) -> Run:
    """The run to train: the one in the folder with --resume, else a new one."""
    if not args.resume:
        Run(folder, {}).need_new()  # before anything takes time
        settings = _settings(args) | {"device": _device(args.device), "threads": torch.get_num_threads()}
        _job(settings, workers)  # refuses before anything is written
        return Run.begin(folder, settings)
    run = Run.resume(folder)
    _check_resumed(args, run.settings)
    if args.device != "auto":
        run.settings["device"] = args.device
    # The number of threads decides the order of sums, and with it the last bits.
    torch.set_num_threads(args.threads or run.settings["threads"])
    return run


def _job(settings: dict[str, Any], workers: Workers) -> Callable:
    """What trains a run of these settings. Raises ValueError for one that several processes cannot share."""
    kind = settings["model"]
    if settings.get("task"):
        job = train_task
    elif settings.get("captions"):
        job = train_captions
    else:
        job = {"vilt": train_scenes, "xvlm": train_xvlm}.get(kind, train_dual)
    if workers.size > 1 and (
        job not in (train_scenes, train_captions, train_dual) or kind in ("vse", "filip")
    ):
        fail("--model", "must be vilt without --task, clip or siglip for several processes", kind)
    return job


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that stand in place of a preset's numbers."""
    return {k: v for k in ("steps", "batch", "lr", "seed") if (v := getattr(args, k)) is not None}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a new run. Raises ValueError for flags that do not go together."""
    for flag, needs in (("start", "task"), ("images", "captions"), ("on_error", "captions")):
        if getattr(args, flag) and not getattr(args, needs):
            fail(f"--{flag.replace('_', '-')}", f"must come with --{needs}", "none")
    for flag in ("captions", "preset"):
        if args.task and getattr(args, flag):
            fail("--task", "must come alone: it starts from a trained run, with its sizes", f"--{flag}")
    about = {"command": args.command_line, "model": args.model, "task": None, "captions": None}
    if args.language and args.model in ("vilt", "xvlm"):
        fail("--language", "must come with a dual encoder, as in --model clip", args.model)
    if args.without and args.model != "xvlm":
        fail("--without", "must come with --model xvlm", args.model)
    if args.model != "vilt":
        for flag in ("task", "captions"):
            if getattr(args, flag):
                fail(f"--{flag}", "must come with --model vilt", args.model)
        if args.model == "xvlm":
            return about | xvlm_settings(args.preset, args.without, _given(args))
        return about | dual_settings(args.model, args.language, args.preset, _given(args))
    if args.task:
        return about | task_settings(args.task, args.start, _given(args))
    preset = args.preset or ("captions" if args.captions else "cpu")
    if not args.captions and preset not in STAGES:
        fail("--preset", f"must be {' or '.join(STAGES)} without --captions", preset)
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
    {"vilt": train_config, "xvlm": xvlm_config}.get(settings["model"], dual_config)(settings)
    asked = (
        "preset",
        "task",
        "on_error",
        "language",
        "without",
        *(["model"] if args.model != "vilt" else []),
    )
    flags = {key: getattr(args, key) for key in asked if getattr(args, key)}
    for key, value in (flags | _paths(args) | _given(args)).items():
        began = settings["train"].get(key, settings.get(key))
        if value != began:
            rule = f"must be left out with --resume, or be what the run began with ({began})"
            fail(f"--{key.replace('_', '-')}", rule, value)


def evaluate_run(args: argparse.Namespace, screen: Screen) -> None:
    """Measure a trained model: on sheets, or, trained on own captions, on those kept back."""
    if args.out:
        need_writable(Path(args.out))
    device, trained = _device(args.device), load_trained(args.run)
    if trained.kind != "vilt":
        emojivl = load_emojivl(args.data)
        measure = measure_xvlm if trained.kind == "xvlm" else measure_dual
        results = measure(trained, emojivl, args.items, args.seed, device, screen)
    elif trained.settings.get("captions"):
        if args.data:
            fail("--data", "must be left out for a run on own captions", args.data)
        results = evaluate_captions(trained, read_captions(trained.settings, screen)[1], screen)
    elif trained.settings.get("task"):
        emojivl = load_emojivl(args.data)
        path = existing(args.run)
        folder = path if path.is_dir() else path.parent
        results = evaluate_task(folder, emojivl, args.items, args.seed, device, screen)
        screen.say(report_task(results))
    else:
        results = measure_scenes(trained, load_emojivl(args.data), args.items, args.seed, device, screen)
    if args.out:
        write_json(Path(args.out), results)


def show(args: argparse.Namespace, screen: Screen) -> None:
    """The demo: scenes for a caption, with a dual encoder all drawings for a query, with X-VLM boxes."""
    trained, where = load_trained(args.run, args.model), (Path(args.out), _device(args.device), screen)
    {"vilt": demo, "xvlm": ground}.get(trained.kind, search)(args.caption, trained, *where)


def redraw(args: argparse.Namespace, screen: Screen) -> None:
    """Draw the pictures of a run again."""
    run = Run.resume(existing(args.run or "runs/vilt"))
    if run.settings["model"] != "vilt":
        draw = draw_xvlm if run.settings["model"] == "xvlm" else draw_dual
        paths = draw(run.folder, run.records(), load_trained(run.folder), load_emojivl())
    elif run.settings.get("task") or run.settings.get("captions"):
        paths = [draw_curves(run.folder, run.records(), (*TERMS, "vqa", "nlvr2"))]
    else:
        paths = draw_run(run.folder, run.records(), load_trained(run.folder), load_emojivl())
    for path in paths:
        screen.say(f"wrote {path}")


def run_bench(args: argparse.Namespace, screen: Screen) -> None:
    """Measure the losses beside their peers; tell, and write bench.json, report.md and bench.png."""
    names, folder = chosen(args.only), run_folder("bench")
    for name in BENCH_FILES:
        need_writable(folder / name, make_folder=True)
    with screen.bar("measuring", lines=not args.json) as tick:
        results = bench(names, args.sizes, torch.get_num_threads(), tick)
    write_json(folder / "bench.json", results)
    text = bench_report(results)
    with whole_file(folder / "report.md") as file:
        file.write(text.encode())
    bars(folder / "bench.png", results)
    screen.say(json.dumps(results, ensure_ascii=False) if args.json else text)
    for name in () if args.json else BENCH_FILES:
        screen.say(f"wrote {folder / name}")
