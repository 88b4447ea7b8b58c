"""The course's command line: `python -m chapters list | next | hint | solution | reset | build | train …`.

Exit code 0, or 2 with one sentence.
"""

import argparse
import os
import sys

from chapters import desk
from minivlp.training.screen import any_terminal
from tests.limit import leave


def parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    top = argparse.ArgumentParser(
        prog="python -m chapters", description="Exercises and notebooks of the course."
    )
    commands = top.add_subparsers(
        dest="job", metavar="list | next | hint | solution | reset | build | diagrams | train"
    )

    def command(name: str, what: str, example: str) -> argparse.ArgumentParser:
        epilog = f"example: python -m chapters {example}"
        return commands.add_parser(name, help=what, description=what, epilog=epilog, allow_abbrev=False)

    command("list", "All exercises, and where you stand.", "list")
    command("next", "The next exercise: its file, its task, its first hint.", "next")
    hint = command("hint", "A hint: 1 the idea, 2 the formula, 3 the lines.", "hint infonce 2")
    hint.add_argument("name", help="the function to write")
    hint.add_argument("level", nargs="?", type=int, choices=(1, 2, 3), default=1)
    solution = command(
        "solution", "The library's code, beside yours when yours obeys the laws.", "solution infonce"
    )
    solution.add_argument("name", help="the function to write")
    solution.add_argument("--spoil", action="store_true", help="show it before yours is right")
    reset = command("reset", "Restore a stub; what you wrote is kept aside.", "reset infonce")
    reset.add_argument("name", nargs="?", help="the function to write")
    reset.add_argument(
        "--stubs", action="store_true", help="bring all untouched stubs up to date with the library"
    )
    build = command("build", "Run chapters and write their notebooks, with outputs.", "build 01")
    build.add_argument("chapter", nargs="*", help="numbers or names (default: all)")
    build.add_argument("--measure", action="store_true", help="also run the cells tagged `measured` again")
    command("diagrams", "Draw the diagrams again.", "diagrams")
    moving = command("animate", "Train the main job and draw it learning.", "animate")
    moving.add_argument("--threads", type=int, help="CPU threads")
    train = command(
        "train",
        "Train the ViLT that you built, or any model with some of your functions.",
        "train --steps 150",
    )
    train.add_argument("--use", metavar="NAMES", help="train the library's model with these of yours")
    train.add_argument("--steps", type=int, help="a short run (default: the main job; with --use 60)")
    train.add_argument("--threads", type=int, help="CPU threads")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 after one sentence on stderr."""
    any_terminal()
    args = parser().parse_args(arguments)
    if args.job is None:
        parser().print_help()
        return 0
    try:
        if args.job == "build":
            from chapters.build import build

            build(args.chapter, args.measure)
        elif args.job == "diagrams":
            from chapters.diagrams import write

            print(f"wrote {len(write())} drawings in chapters/pictures")
        elif args.job == "animate":
            from chapters.animate import animate

            return animate(args.threads)
        elif args.job == "train":
            if args.steps is not None and args.steps < 1:
                raise ValueError(f"--steps must be at least 1, got {args.steps}")
            if args.use is None:
                from chapters import learner

                return learner.train(args.steps, args.threads)
            from chapters.train import train

            return train(args.use.split(","), args.steps or 60, args.threads)
        else:
            getattr(desk, f"{args.job}_")(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"chapters: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(leave(main()))
