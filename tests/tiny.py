"""`python -m tests.tiny train …` is `python -m minivlp train …` with sizes that train in a second, for tests."""

import sys
from dataclasses import replace

from minivlp import commands, evaluate, finetune
from minivlp.__main__ import main
from minivlp.train import PRESETS

SIZES = dict(dim=16, layers=1, heads=2, hidden=32, steps=12, batch=16, warmup=2, save_every=4, report_every=3)


def shrink(put=setattr) -> None:
    """Make every preset, the looks during training and the candidates of the evaluation small."""
    put(commands, "PRESETS", {name: replace(preset, **SIZES) for name, preset in PRESETS.items()})
    put(commands, "GLANCE", 16)
    put(evaluate, "CANDIDATES", 4)
    put(finetune, "GLANCE", 16)
    put(finetune, "CHANGES", {"steps": 6, "batch": 16, "warmup": 2})


if __name__ == "__main__":
    shrink()
    sys.exit(main())
