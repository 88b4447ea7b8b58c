"""The command line: `python -m minivlp train | eval | demo | figures`. Exit code 0, or 2 with one sentence.

torch is imported by the command that needs it, so that `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable


def parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    top = argparse.ArgumentParser(
        prog="python -m minivlp", description="Vision-language pretraining, from scratch."
    )
    commands = top.add_subparsers(dest="job", required=True, metavar="train | eval | demo | figures")

    def command(name: str, what: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=what, description=what, epilog=f"example: python -m minivlp {example}"
        )
        sub.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
        sub.add_argument("--threads", type=int, help="CPU threads (default: all cores, at most 4)")
        return sub

    train = command("train", "Train a model, evaluate it, draw pictures.", "train --captions my_pictures")
    train.add_argument("--model", default="vilt", choices=["vilt"])
    train.add_argument("--preset", help="cpu (default), gpu, or captions (default for own captions)")
    train.add_argument(
        "--captions", metavar="DIR", help="own data: a folder with captions.jsonl, or a COCO JSON"
    )
    train.add_argument("--images", metavar="DIR", help="the image folder of a COCO JSON")
    train.add_argument(
        "--on-error", default="skip", choices=["skip", "stop"], help="for a bad line or picture"
    )
    train.add_argument("--name", help="results go to runs/NAME (default: the model's name)")
    train.add_argument("--resume", action="store_true", help="go on with the run of this name")
    train.add_argument("--items", type=int, default=2000, help="test items a measure in the evaluation")
    for flag, kind in (("steps", int), ("batch", int), ("lr", float), ("seed", int)):
        train.add_argument(f"--{flag}", type=kind, help="in place of the preset's")

    evaluation = command("eval", "Measure a trained model on a folder of sheets.", "eval --run runs/vilt")
    evaluation.add_argument("--data", metavar="DIR", help="EmojiVL folder (default: data_tiny)")
    evaluation.add_argument("--out", metavar="FILE", help="also write the results as JSON")
    evaluation.add_argument("--items", type=int, default=2000, help="test items a measure")

    demo = command(
        "demo", "Rank pictures for a caption and draw the alignment.", 'demo "a dog left of a guitar"'
    )
    demo.add_argument("caption")
    demo.add_argument("--out", metavar="DIR", default=".", help="where demo.png and demo_alignment.png go")

    figures = command("figures", "Draw the pictures of a run again.", "figures --run runs/vilt")
    for sub in (evaluation, demo, figures):
        sub.add_argument(
            "--run", help="run folder, checkpoint or weights (default: runs/vilt, else the shipped model)"
        )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 after one sentence on stderr, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    args.command_line = " ".join(["python -m minivlp", *arguments])
    import torch

    from minivlp import commands

    torch.set_num_threads(args.threads or min(4, os.cpu_count() or 1))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.progress = progress
    job: Callable = {
        "train": commands.train,
        "eval": commands.evaluate_command,
        "demo": commands.demo,
        "figures": commands.redraw,
    }[args.job]
    try:
        job(args, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"minivlp: {error}", file=sys.stderr)
        return 2
    return 0


def progress(done: int, total: int) -> None:
    """A counter on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(
            f"\revaluating {done / total:4.0%}",
            end="\n" if done >= total else "",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
