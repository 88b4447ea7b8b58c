"""`python -m minivlp claims`: do what is not done, then write the table and the pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from minivlp.claims.pictures import draw
from minivlp.claims.report import merged, report
from minivlp.claims.settings import FULL, QUICK, Settings
from minivlp.claims.table import CLAIMS, chosen
from minivlp.claims.work import do_all, results, spent
from minivlp.core.files import write_text
from minivlp.data import load_emojivl
from minivlp.training.run import need_writable
from minivlp.training.screen import Screen


def run_claims(args: argparse.Namespace, screen: Screen) -> None:
    """The command; as many experiments at once as there are threads, one thread each."""
    names, folder = chosen(args.only), Path(args.out)
    need_writable(folder / "claims.md", make_folder=True)
    load_emojivl()  # refuses a damaged file before anything takes time
    args.go_on = args.command_line  # what is done is not done again
    settings = QUICK if args.quick else FULL
    write_claims(names, settings, folder, torch.get_num_threads(), args.command_line, screen, args.keep)


def write_claims(
    names: Sequence[str], settings: Settings, folder: Path, workers: int, command: str, screen: Screen,
    keep: bool = False,
) -> None:  # fmt: skip
    """Do the experiments of the named claims, then write claims.md and a picture a claim into the folder.

    keep: a report that is there keeps what it says of other claims.
    """
    needed = list(dict.fromkeys(e for name in names for e in CLAIMS[name].experiments(settings)))
    screen.say(f"{len(names)} claims, {len(needed)} experiments, in {folder}")
    with screen.bar("experiments") as tick:
        for line in do_all(needed, settings, folder, workers):
            tick(line.over, line.jobs)
            screen.say(line.told())
    found = results(needed, settings, folder)
    text = report(names, found, settings, command, spent(needed, settings, folder))
    for name in names:
        path = folder / "pictures" / f"claim_{name}.png"
        path.parent.mkdir(exist_ok=True)
        draw(path, CLAIMS[name], found, settings)
        screen.say(f"{CLAIMS[name].says} {CLAIMS[name].verdict(found, settings)}")
    path = folder / "claims.md"
    if keep and path.is_file():
        text = merged(path.read_text(encoding="utf-8"), text)
    write_text(path, text)
    screen.say(f"wrote {path} and a picture a claim")
