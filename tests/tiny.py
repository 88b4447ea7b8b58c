"""`python -m tests.tiny train …` is `python -m minivlp train …` with sizes that train in a second, for tests.

MINIVLP_KILL="rename 2" makes such a process send itself SIGKILL, the second time it comes to that place.
"""

import atexit
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from minivlp import commands, evaluate, finetune, gallery, runs
from minivlp.__main__ import main
from minivlp.data import Scene
from minivlp.train import PRESETS

SIZES = dict(dim=16, layers=1, heads=2, hidden=32, steps=12, batch=16, warmup=2, save_every=4, report_every=3)


def shrink(put=setattr) -> None:
    """Make every preset, the looks during training and the candidates of the evaluation small."""
    put(commands, "PRESETS", {name: replace(preset, **SIZES) for name, preset in PRESETS.items()})
    put(commands, "GLANCE", 16)
    put(evaluate, "CANDIDATES", 4)
    put(finetune, "GLANCE", 16)
    put(finetune, "CHANGES", {"steps": 6, "batch": 16, "warmup": 2})


def commands_with(patch: pytest.MonkeyPatch, draw: bool = False) -> Callable[..., int]:
    """`run("train", "--name", …)` → the exit code of a command with small sizes, on one thread.

    Without `draw` a training run draws no pictures, which takes longer than all the rest.
    """
    shrink(patch.setattr)
    patch.setattr(commands, "draw_run", gallery.draw_run if draw else lambda *run: [])
    return lambda job, *flags: main([job, *map(str, flags), "--threads", "1"])


@cache
def trained() -> Path:
    """A run folder of the main job, trained once a process."""
    home = Path(tempfile.mkdtemp(prefix="minivlp-test-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        assert commands_with(patch, draw=True)("train", "--name", home / "vilt", "--items", 16) == 0
    return home / "vilt"


def told(caption: str, scene: Scene) -> bool:
    """Is the caption true of the scene, by what the scene's own caption says?"""
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    if match := re.fullmatch("(.*) (left of|right of|above|below) (.*)", scene.caption):
        one, relation, two = match.groups()
        return caption in (scene.caption, f"{two} {back[relation]} {one}", *scene.slots)
    if match := re.fullmatch("(.*) between (.*) and (.*)", scene.caption):
        middle, one, two = match.groups()
        return caption in (scene.caption, f"{middle} between {two} and {one}")
    return caption == scene.caption


def kill_at(place: str, times: int) -> None:
    """Patch one function so that this process kills itself before, or after, the call of this number."""
    owner, name, after, chosen = {
        "written": (os, "fsync", False, lambda *a: True),  # all bytes of some file are in its draft
        "rename": (os, "replace", False, lambda old, new: new.name == "checkpoint.pt"),
        "renamed": (os, "replace", True, lambda old, new: new.name == "checkpoint.pt"),
        "logged": (runs.Run, "log", True, lambda *a: True),
        "step": (commands, "pretraining_loss", False, lambda *a: True),
    }[place]
    real, seen = getattr(owner, name), 0

    def deadly(*args, **settings):
        nonlocal seen
        seen += chosen(*args)
        if seen >= times and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **settings)
        if seen >= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    shrink()
    if "MINIVLP_KILL" in os.environ:
        where, number = os.environ["MINIVLP_KILL"].split()
        kill_at(where, int(number))
    sys.exit(main())
