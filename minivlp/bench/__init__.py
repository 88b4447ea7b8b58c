"""Our rungs beside their peers: time as a ratio to the bare matrix products, and peak memory.

Everything is measured in processes of their own (task.py): the variants of a case share one for time,
because they are taken in turn, and have one each for memory. Times come one after another; memory, which
neighbours do not change, up to four at once, but one by one at full sizes, of which two may not fit.
Forward and backward, float32, on the CPU.

Left out: a GPU, whose time and memory other clocks count.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from minivlp import stream
from minivlp.bench.cases import BARE, CASES, Case, Size
from minivlp.bench.measure import OWN_PAGES, cores, exponent, machine, quartiles, ratios
from minivlp.core.require import fail
from minivlp.training.screen import Tick

SECONDS = {"tiny": 0.0, "default": 3.0, "full": 30.0}  # to repeat a case, after its first four repetitions
PROCESSES = {"tiny": 1, "default": 1, "full": 3}  # for the memory of a variant
GROWTH_RUNGS = ("fused", "torch")
Task, Answer = dict[str, Any], dict[str, Any]


def chosen(only: str | None) -> list[str]:
    """The cases named in "infonce,wpa", or all. Raises ValueError for a name that is none."""
    names = list(CASES) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in CASES:
            fail("--only", f"must name some of {', '.join(CASES)}", repr(name))
    return list(dict.fromkeys(names))


def bench(names: Iterable[str], sizes: str, threads: int, tick: Tick) -> dict[str, Any]:
    """Measure the named cases at a set of sizes ("default", "full"); `tick` hears of each finished process.

    Returns plain data: `machine`, `sizes`, `path`, `memory_method`, `cases` (one entry a case and size) and
    `growth` (one a case that claims to grow like B² in time and B in memory).
    """
    about = machine(threads)  # before anything runs: it tells how busy the machine was
    plan = [entry for name in names for entry in _plan(name, sizes, threads)]
    tasks = [task for entry in plan for task in entry["tasks"]]
    answers = _run(tasks, 1 if sizes == "full" else min(4, cores()), tick)
    for entry in plan:
        entry["answers"] = [answers[id(task)] for task in entry.pop("tasks")]
    compiled = sorted({a["task"]["case"] for a in answers.values() if a["compiled"]})
    methods = sorted({a["method"] for a in answers.values() if a["method"]})
    bodies = f"compiled in {', '.join(compiled)}" if compiled else "eager"
    taken, why = stream.choose_backend(torch.zeros(1, 1))
    return {
        "machine": about,
        "sizes": sizes,
        "path": {"loop": taken, "why": why, "tile_bodies": bodies},
        "memory_method": "; ".join(methods),
        "cases": [_case(entry) for entry in plan if not entry["growth"]],
        "growth": [_growth(entry) for entry in plan if entry["growth"]],
    }


def _plan(name: str, sizes: str, threads: int) -> list[dict[str, Any]]:
    """The entries of a case, each with its tasks: first time, then memory."""
    case = CASES[name]
    present, absent = case.variants()
    threads = 1 if case.one_thread else threads

    def task(do: str, variants: list[str], *points: Size) -> Task:
        seconds = SECONDS[sizes]
        about = {"do": do, "case": name, "variants": variants, "sizes": points}
        return about | {"threads": threads, "seconds": seconds}

    entries = []
    for size in (*case.sizes[sizes], *case.memory_only.get(sizes, ())):
        timed = size in case.sizes[sizes]
        tasks = [task("time", present, size)] if timed else []
        tasks += [task("memory", [v], size) for v in present for _ in range(PROCESSES[sizes] if timed else 1)]
        entry = {"name": name, "size": size, "threads": threads, "absent": absent, "growth": False}
        entries.append(entry | {"tasks": tasks})
    points = case.growth.get(sizes)
    rungs = [rung for rung in GROWTH_RUNGS if rung in present]
    if points and "fused" in rungs:
        tasks = [task("time", ["fused"], *points) | {"seconds": SECONDS[sizes] / 5}]
        tasks += [task("memory", [rung], *points) for rung in rungs]
        entries.append({"name": name, "size": points, "threads": threads, "growth": True, "tasks": tasks})
    return entries


def _run(tasks: list[Task], workers: int, tick: Tick) -> dict[int, Answer]:
    """The answers by the identity of their tasks. Times are taken alone, then memory by several workers."""
    answers: dict[int, Answer] = {}
    for do, many in (("time", 1), ("memory", workers)):
        mine = [task for task in tasks if task["do"] == do]
        with ThreadPoolExecutor(many) as pool:
            for task, answer in zip(mine, pool.map(fresh, mine), strict=True):
                answers[id(task)] = answer | {"task": task}
                tick(len(answers), len(tasks))
    return answers


def fresh(task: Task) -> Answer:
    """The answer of a new process; one that dies, for want of memory perhaps, has failed for all variants."""
    allocator = OWN_PAGES if task["do"] == "memory" else {}
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "minivlp.bench.task", json.dumps(task)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | allocator,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    ended = f"ended by signal {-done.returncode}: out of memory?" if done.returncode < 0 else last
    failed = dict.fromkeys(task["variants"], ended)
    return {"points": [], "failed": failed, "method": None, "compiled": False}


def _case(entry: dict[str, Any]) -> dict[str, Any]:
    """One case at one size: seconds, ratios to the bare work, bytes, and who is missing or failed."""
    case: Case = CASES[entry["name"]]
    result = {"case": entry["name"], "what": case.what, "unit": case.unit, "size": entry["size"]}
    result |= {"threads": entry["threads"], "absent": entry["absent"], "failed": {}}
    seconds, memory = {}, {}
    for answer in entry["answers"]:
        result["failed"] |= answer["failed"]
        for point in answer["points"]:
            if answer["task"]["do"] == "time":
                seconds = point
            else:
                memory.setdefault(answer["task"]["variants"][0], []).append(point)
    ratio = {v: quartiles(ratios(times, seconds[BARE])) for v, times in seconds.items()}
    return result | {"seconds": seconds, "ratio": ratio, "memory": memory}


def _growth(entry: dict[str, Any]) -> dict[str, Any]:
    """How time and memory grow over three sizes: exponents of the number of rows."""
    points = entry["size"]
    rows = [next(iter(size.values())) for size in points]
    result = {"case": entry["name"], "sizes": points, "failed": {}, "seconds": {}, "memory": {}}
    result["exponents"] = {}
    for answer in entry["answers"]:
        (variant,), do = answer["task"]["variants"], answer["task"]["do"]
        result["failed"] |= answer["failed"]
        if not answer["points"]:
            continue
        values = answer["points"]
        if do == "time":
            values = [quartiles(point[variant])["median"] for point in values]
        result["seconds" if do == "time" else "memory"][variant] = values
        result["exponents"][f"{variant} {do}"] = exponent(rows, values)
    return result


def comparison(entry: dict[str, Any], measure: str, variant: str, against: str) -> float | None:
    """The median ratio of a variant to another (or to "bare") in time or memory.

    None if one of them was not measured, or if the other's memory was less than a page.
    """
    values = entry["seconds" if measure == "time" else "memory"]
    if variant not in values or against not in values:
        return None
    if measure == "time":
        return quartiles(ratios(values[variant], values[against]))["median"]
    held = quartiles(values[against])["median"]
    return quartiles(values[variant])["median"] / held if held else None
