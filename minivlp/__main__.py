"""The command line: `python -m minivlp train | eval | demo | figures | bench | claims`.

Exit code 0, or 2 with one sentence.

torch is imported by the command that needs it, so that `--help` and a mistyped flag are answered at once.
"""

import argparse
import importlib
import math
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minivlp.recipes import FLAGS, MODELS, NUMBERS, TASKS, recipe_name
from minivlp.training.screen import Screen, any_terminal

PRESETS = ("cpu", "gpu", "captions")  # of all recipes together
PATHS = ("captions", "images", "start")
RUN = "a run folder, checkpoint.pt or .safetensors (default: runs/vilt, else the shipped model)"


class Parser(argparse.ArgumentParser):
    """Refuses with one sentence and exit code 2; argparse would print the usage too."""

    def error(self, message: str) -> None:
        self.exit(2, f"minivlp: {message} (all flags: {self.prog} --help)\n")


def integer_from(least: int, most: int = 10**9, multiple: int = 1):
    """The argparse type of whole numbers from `least` to `most`, multiples of `multiple`."""

    def number(text: str) -> int:
        value = int(text[:30]) if text.removeprefix("-").isdecimal() else least - 1
        if not least <= value <= most or value % multiple:
            what = "whole number" if multiple == 1 else f"multiple of {multiple}"
            raise argparse.ArgumentTypeError(f"must be a {what} from {least} to {most}, got {text[:40]!r}")
        return value

    return number


def given(text: str) -> str:
    """The argparse type of texts that are not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


def positive(text: str) -> float:
    """The argparse type of finite numbers > 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    top = Parser(prog="python -m minivlp", description="Vision-language pretraining, from scratch.")
    commands = top.add_subparsers(dest="job", metavar="train | eval | demo | figures | bench | claims")

    def command(name: str, what: str, example: str, device: bool = True) -> Callable:
        """A command; what adds a flag to it."""
        text = {"help": what, "description": what, "epilog": f"example: python -m minivlp {example}"}
        add = commands.add_parser(name, **text, allow_abbrev=False).add_argument
        if device:
            devices = ["auto", "cpu", "cuda", "mps"]
            add("--device", default="auto", choices=devices, help="auto: cuda if there is one")
        add("--threads", type=integer_from(1, 256), help="CPU threads (default: all cores, at most 4)")
        return add

    folder, seed = {"type": given, "metavar": "DIR"}, {"type": integer_from(0, 2**32 - 1)}
    stands = "in place of the preset's"

    train = command("train", "Train a model, evaluate it, draw pictures.", "train --captions my_pictures")
    train("--model", default="vilt", choices=MODELS)
    train("--language", choices=["en", "zh"], help="of the names, for dual encoders (default: en)")
    connectors = ("pooled", "linear", "mlp", "merge", "resampler", "qformer")
    train("--connector", choices=connectors, help="what tells a bridge's reader (default: resampler)")
    train("--reader", choices=["frozen", "lora", "tuned"], help="of a bridge (default: frozen)")
    parts = ("boxes", "regions", "contrast", "captions", "unpaired", "turns", "picture", "reading")
    what = (
        "vilt: contrast; xvlm: boxes, regions; coca: contrast, captions; flava: unpaired; maskvlm: turns; "
        "bridge: picture, reading"
    )
    train("--without", choices=parts, help=f"what a model is to do without ({what})")
    train("--preset", choices=PRESETS, help="default: cpu, or captions for own captions")
    train("--task", choices=TASKS, help="fine-tune a trained run on this task")
    train("--start", type=given, metavar="RUN", help=f"where --task starts: {RUN}")
    train("--captions", **folder, help="own data: a folder with captions.jsonl, or a COCO JSON file")
    train("--images", **folder, help="the image folder of a COCO JSON file")
    train("--on-error", choices=["skip", "stop"], help="for a bad line or picture (default: skip, and tell)")
    train("--name", type=given, help="goes to runs/NAME, or an absolute path (default: the task or model)")
    train("--resume", action="store_true", help="go on with this run, with the settings it began with")
    train("--steps", type=integer_from(1), help=stands)
    train("--batch", type=integer_from(2, 10**6), help=f"rows a step, {stands}")
    train("--lr", type=positive, help=stands)
    train("--seed", **seed, help=f"of weights and data, {stands}")

    evaluation = command("eval", "Measure a trained model on a folder of sheets.", "eval --run runs/vilt")
    evaluation("--data", **folder, help="a folder with meta.json (default: data_tiny)")
    evaluation("--out", type=given, metavar="FILE", help="also write the results as JSON")
    evaluation("--seed", **seed, default=1, help="of the test scenes (default: 1)")
    for add in (train, evaluation):
        items = integer_from(4, 10**6, 2)
        add("--items", type=items, default=1500, help="test items a measure (default: 1500)")

    ranks = "Rank pictures for a caption and draw the best: scenes, or with a dual encoder all drawings."
    demo = command("demo", ranks, 'demo "a dog left of a guitar"')
    demo("caption", help="what is looked for; for coca a picture file; for chameleon either")
    demo("--model", default="vilt", choices=MODELS, help="whose run or shipped model, without --run")
    demo("--out", **folder, default=".", help="where demo.png and demo_alignment.png go")

    figures = command("figures", "Draw the pictures of a run again.", "figures --run runs/vilt")
    for add in (evaluation, demo, figures):
        add("--run", type=given, help=RUN)

    beside = "Time and memory of the losses beside their peers, on the CPU."
    bench = command("bench", beside, "bench --only infonce,sigmoid", device=False)
    bench("--only", metavar="CASES", help="some of the cases, with commas (default: all)")
    full = "full: the sizes of published training runs, 10 GB of memory and many minutes"
    bench("--sizes", default="default", choices=["default", "full"], help=full)
    bench("--json", action="store_true", help="print the results as JSON, and nothing else")

    claims = command("claims", "Test the papers' claims again in miniature.", "claims --quick", device=False)
    claims("--quick", action="store_true", help="minutes; more claims cannot be told")
    claims("--only", metavar="NAME", nargs="+", help="some of the claims (default: all)")
    claims("--keep", action="store_true", help="keep what the report there says of other claims")
    claims("--out", **folder, default="runs/claims", help="default: runs/claims")
    return top


def train(args: argparse.Namespace, screen: Screen) -> None:
    """Train the recipe that the flags name, and its controls; then evaluate and draw."""
    from minivlp.recipes.base import open_recipe
    from minivlp.training import loop
    from minivlp.training.run import open_run, run_folder
    from minivlp.training.workers import joined

    name = recipe_name(vars(args))
    folder = run_folder(args.name or name)
    with joined(_device(args.device)) as workers:
        screen = Screen(silent=True) if workers.rank else screen
        settings = None if args.resume or workers.rank else _new_settings(args, folder, workers.size)
        run = open_run(folder, settings, workers)
        if args.resume:
            _resumed(args, run.settings)
        start = "python" if workers.size == 1 else f"torchrun --nproc-per-node={workers.size}"
        args.go_on = f"{start} -m minivlp train --resume --name {args.name or folder.name}"
        recipe = open_recipe(run, screen.say)
        trained = loop.train(recipe, run, screen, workers)
        for control, settings in recipe.controls().items():
            beside = open_run(folder / control, settings, workers, resume=(folder / control).exists())
            loop.train(open_recipe(beside), beside, screen, workers)
        if workers.rank == 0:
            loop.finish(recipe, run, trained, args.items, screen)


def _new_settings(args: argparse.Namespace, folder: Path, processes: int) -> dict[str, Any]:
    """The settings of a new run. Raises ValueError, before anything is written, for flags that cannot be."""
    import torch

    from minivlp.core.require import fail
    from minivlp.recipes import recipe_class
    from minivlp.training.run import Run

    Run(folder, {}).need_new()
    name = recipe_name(vars(args))
    for flag, (recipes, needs) in FLAGS.items():
        if getattr(args, flag) and name not in recipes:
            fail(f"--{flag.replace('_', '-')}", f"must come with {needs}", name)
    for flag in ("captions", "preset"):
        if args.task and getattr(args, flag):
            fail("--task", "must come alone: it starts from a trained run, with its sizes", f"--{flag}")
    for flag in ("task", "captions"):
        if getattr(args, flag) and args.model != MODELS[0]:
            fail(f"--{flag}", f"must come with --model {MODELS[0]}", args.model)
    recipe = recipe_class(name)
    if processes > 1 and not recipe.several_processes:
        fail("--model", "must be vilt without --task, clip or siglip for several processes", name)
    about = {"command": args.command_line, "model": args.model, "task": args.task, "captions": None}
    flags = {k: v for k, v in vars(args).items() if v is not None} | _paths(args)
    machine = {"device": _device(args.device), "threads": torch.get_num_threads()}
    return about | recipe.begin(flags) | machine


def _paths(args: argparse.Namespace) -> dict[str, str]:
    """The paths that were given, made absolute: a run may be resumed from another folder."""
    return {key: str(Path(getattr(args, key)).absolute()) for key in PATHS if getattr(args, key)}


def _resumed(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Refuse flags that ask for what the run did not begin with; take its threads, and a new device."""
    import torch

    from minivlp.core.require import fail

    names = ("preset", "task", "on_error", "language", "connector", "reader", "without", *NUMBERS)
    asked = {key: getattr(args, key) for key in names if getattr(args, key) is not None} | _paths(args)
    if args.model != MODELS[0]:
        asked["model"] = args.model
    for key, value in asked.items():
        began = settings["train"].get(key, settings.get(key))
        if value != began:
            rule = f"must be left out with --resume, or be what the run began with ({began})"
            fail(f"--{key.replace('_', '-')}", rule, value)
    if args.device != "auto":
        settings["device"] = args.device
    # The number of threads decides the order of sums, and with it the last bits.
    torch.set_num_threads(args.threads or settings["threads"])


def evaluate(args: argparse.Namespace, screen: Screen) -> None:
    """Measure a trained model: on sheets, or, trained on own captions, on those kept back."""
    from minivlp.recipes.base import load_trained, recipe_of
    from minivlp.training.loop import measure
    from minivlp.training.run import need_writable, write_json

    if args.out:
        need_writable(Path(args.out))
    device, trained = _device(args.device), load_trained(args.run)
    recipe = recipe_of(trained, data=args.data, say=screen.say)
    results = measure(recipe, trained, args.items, args.seed, device, screen)
    if args.out:
        write_json(Path(args.out), results)


def demo(args: argparse.Namespace, screen: Screen) -> None:
    """Scenes for a caption, with a dual encoder all drawings for a query, with X-VLM boxes."""
    from minivlp.recipes.base import load_trained, recipe_of

    trained = load_trained(args.run, args.model)
    recipe_of(trained).demo(trained, args.caption, Path(args.out), _device(args.device), screen)


def figures(args: argparse.Namespace, screen: Screen) -> None:
    """Draw the pictures of a run again."""
    from minivlp.recipes.base import load_trained, recipe_of
    from minivlp.training.run import Run

    run = Run.resume(args.run or "runs/vilt")
    trained = load_trained(run.folder)
    for path in recipe_of(trained).draw(trained, run.folder, run.records()):
        screen.say(f"wrote {path}")


def _device(name: str) -> str:
    """The device to use. Raises ValueError when torch does not find it."""
    import torch

    from minivlp.core.require import fail

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        fail("--device", "must be one that torch finds on this machine", name)
    return name


# command → module (this one, or one that is imported when it is asked for) and function
COMMANDS = {
    "train": (__name__, "train"),
    "eval": (__name__, "evaluate"),
    "demo": (__name__, "demo"),
    "figures": (__name__, "figures"),
    "bench": ("minivlp.bench.command", "run_bench"),
    "claims": ("minivlp.claims.command", "run_claims"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 after one sentence on stderr, 130 after Ctrl-C or SIGTERM."""
    any_terminal()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    if args.job is None:
        parser().print_help()
        return 0
    args.command_line = shlex.join(["python", "-m", "minivlp", *arguments])
    args.go_on = None  # the command that goes on, once there is something to go on with
    try:
        import torch

        from minivlp.training.workers import cores, threads

        torch.set_num_threads(args.threads or threads(cores()))
        module, name = COMMANDS[args.job]
        getattr(importlib.import_module(module), name)(args, Screen())
    except KeyboardInterrupt:
        print("stopped" + (f"; go on with: {args.go_on}" if args.go_on else ""), file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        lost = isinstance(error, ConnectionError) and args.go_on  # another process died, not this one
        print(f"minivlp: {error}" + (f"; go on with: {args.go_on}" if lost else ""), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
