"""The command line: `python -m minivlp train | eval | demo | figures | bench | claims`.

Exit code 0, or 2 with one sentence.

torch is imported by the command that needs it, so that `--help` and a mistyped flag are answered at once.
"""

import argparse
import math
import shlex
import sys

from minivlp.training.screen import Screen

PRESETS = ("cpu", "gpu", "captions")  # those of train.py, which imports torch
MODELS = ("vilt", "clip", "siglip", "vse", "filip", "xvlm")  # clip to filip are those of dual_train.py
RUN = "a run folder, checkpoint.pt or .safetensors (default: runs/vilt, else the shipped model)"


class Parser(argparse.ArgumentParser):
    """Refuses with one sentence and exit code 2; argparse would print the usage too."""

    def error(self, message: str) -> None:
        self.exit(2, f"minivlp: {message} (all flags: {self.prog} --help)\n")


def whole(least: int, multiple: int = 1):
    """The argparse type of whole numbers from `least` on, multiples of `multiple`."""

    def number(text: str) -> int:
        value = int(text) if text.removeprefix("-").isdecimal() else least - 1
        if value < least or value % multiple:
            what = "whole number" if multiple == 1 else f"multiple of {multiple}"
            raise argparse.ArgumentTypeError(f"must be a {what} from {least} on, got {text!r}")
        return value

    return number


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

    def command(name: str, what: str, example: str, device: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"example: python -m minivlp {example}",
            allow_abbrev=False,
        )
        if device:
            devices = ["auto", "cpu", "cuda", "mps"]
            sub.add_argument("--device", default="auto", choices=devices, help="auto: cuda if there is one")
        sub.add_argument("--threads", type=whole(1), help="CPU threads (default: all cores, at most 4)")
        return sub

    train = command("train", "Train a model, evaluate it, draw pictures.", "train --captions my_pictures")
    train.add_argument("--model", default="vilt", choices=MODELS)
    train.add_argument(
        "--language", choices=["en", "zh"], help="of the names, for dual encoders (default: en)"
    )
    train.add_argument("--without", choices=["boxes", "regions"], help="what xvlm is to do without")
    train.add_argument("--preset", choices=PRESETS, help="default: cpu, or captions for own captions")
    train.add_argument("--task", choices=["vqa", "nlvr2"], help="fine-tune a trained run on this task")
    train.add_argument("--start", metavar="RUN", help=f"where --task starts: {RUN}")
    train.add_argument(
        "--captions", metavar="DIR", help="own data: a folder with captions.jsonl, or a COCO JSON file"
    )
    train.add_argument("--images", metavar="DIR", help="the image folder of a COCO JSON file")
    train.add_argument(
        "--on-error", choices=["skip", "stop"], help="for a bad line or picture (default: skip, and tell)"
    )
    train.add_argument(
        "--name",
        help="results go to runs/NAME (default: the task or model; an absolute path is taken as it is)",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of this name, with the settings it began with",
    )
    train.add_argument("--steps", type=whole(1), help="in place of the preset's")
    train.add_argument("--batch", type=whole(2), help="rows a step, in place of the preset's")
    train.add_argument("--lr", type=positive, help="in place of the preset's")
    train.add_argument("--seed", type=whole(0), help="of weights and data, in place of the preset's")

    evaluation = command("eval", "Measure a trained model on a folder of sheets.", "eval --run runs/vilt")
    evaluation.add_argument("--data", metavar="DIR", help="a folder with meta.json (default: data_tiny)")
    evaluation.add_argument("--out", metavar="FILE", help="also write the results as JSON")
    evaluation.add_argument("--seed", type=whole(0), default=1, help="of the test scenes (default: 1)")
    for sub in (train, evaluation):
        sub.add_argument(
            "--items", type=whole(4, 2), default=2000, help="test items a measure (default: 2000)"
        )

    demo = command(
        "demo",
        "Rank pictures for a caption and draw the best: scenes, or with a dual encoder all drawings.",
        'demo "a dog left of a guitar"',
    )
    demo.add_argument("caption")
    demo.add_argument(
        "--model", default="vilt", choices=MODELS, help="whose run or shipped model, without --run"
    )
    demo.add_argument("--out", metavar="DIR", default=".", help="where demo.png and demo_alignment.png go")

    figures = command("figures", "Draw the pictures of a run again.", "figures --run runs/vilt")
    for sub in (evaluation, demo, figures):
        sub.add_argument("--run", help=RUN)

    bench = command(
        "bench",
        "Time and memory of the losses beside their peers, on the CPU.",
        "bench --only infonce,sigmoid",
        device=False,
    )
    bench.add_argument("--only", metavar="CASES", help="some of the cases, with commas (default: all)")
    bench.add_argument(
        "--sizes",
        default="default",
        choices=["default", "full"],
        help="full: the sizes of published training runs, 10 GB of memory and many minutes",
    )
    bench.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else")

    claims = command("claims", "Test the papers' claims again in miniature.", "claims --quick", device=False)
    claims.add_argument("--quick", action="store_true", help="minutes; more claims cannot be told")
    claims.add_argument("--only", metavar="NAME", nargs="+", help="some of the claims (default: all)")
    claims.add_argument("--out", metavar="DIR", default="runs/claims", help="default: runs/claims")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 after one sentence on stderr, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    if args.job is None:
        parser().print_help()
        return 0
    args.command_line = shlex.join(["python", "-m", "minivlp", *arguments])
    args.go_on = None  # the command that goes on, once there is something to go on with
    try:
        from minivlp import commands

        commands.run(args, Screen())
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
