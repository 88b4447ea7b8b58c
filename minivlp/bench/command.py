"""`python -m minivlp bench`: measure, tell, and write bench.json, report.md and bench.png."""

import argparse
import json

import torch

from minivlp.bench import bench, chosen
from minivlp.bench.figure import bars
from minivlp.bench.report import report
from minivlp.core.files import write_text
from minivlp.training.run import need_writable, run_folder, write_json
from minivlp.training.screen import Screen

FILES = ("bench.json", "report.md", "bench.png")


def run_bench(args: argparse.Namespace, screen: Screen) -> None:
    """Measure the losses beside their peers."""
    names, folder = chosen(args.only), run_folder("bench")
    for name in FILES:
        need_writable(folder / name, make_folder=True)
    with screen.bar("measuring", lines=not args.json) as tick:
        results = bench(names, args.sizes, torch.get_num_threads(), tick)
    write_json(folder / "bench.json", results)
    text = report(results)
    write_text(folder / "report.md", text)
    bars(folder / "bench.png", results)
    screen.say(json.dumps(results, ensure_ascii=False) if args.json else text)
    for name in () if args.json else FILES:
        screen.say(f"wrote {folder / name}")
