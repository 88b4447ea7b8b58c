"""What a bench says: a table for each case, growth, and the goals with what was measured beside them.

The goals are ratios that were set before the fused rungs were written, for two cores and float32; a goal is
listed when its size was measured, and met or missed is computed here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minivlp.bench import comparison
from minivlp.bench.cases import BARE
from minivlp.bench.measure import quartiles

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """A variant of a case, with so many rows, takes at most `limit` of the time or memory of another."""

    case: str
    rows: int
    measure: str
    against: str
    limit: float
    variant: str = "fused"


_CLIP, _SIGLIP, _NAIVE = "open_clip ClipLoss", "open_clip SigLipLoss", "naive torch"
_PUBLISHED, _POT, _HF = "published procedure", "POT sinkhorn_log", "transformers ViltModel"
MODELS = ("vilt",)  # cases of a whole model, which has no fused rung
GOALS = (
    Goal("infonce", 4096, "time", BARE, 1.50),
    Goal("infonce", 8192, "time", BARE, 1.50),
    Goal("infonce", 4096, "time", _CLIP, 0.85),
    Goal("infonce", 8192, "time", _CLIP, 0.85),
    Goal("infonce", 8192, "memory", _CLIP, 1 / 7),
    Goal("infonce", 16384, "memory", _CLIP, 1 / 18),
    Goal("sigmoid", 4096, "time", BARE, 1.25),
    Goal("sigmoid", 8192, "time", BARE, 1.25),
    Goal("sigmoid", 4096, "time", _SIGLIP, 0.80),
    Goal("sigmoid", 8192, "time", _SIGLIP, 0.95),
    Goal("sigmoid", 8192, "memory", _SIGLIP, 1 / 8),
    Goal("sigmoid", 16384, "memory", _SIGLIP, 1 / 18),
    Goal("chamfer", 4096, "time", _NAIVE, 0.45),
    Goal("chamfer", 16384, "time", _NAIVE, 0.65),
    Goal("chamfer", 16384, "memory", _NAIVE, 1 / 20),
    Goal("mlm", 4096, "time", "F.linear + F.cross_entropy", 1.15),
    Goal("mlm", 4096, "memory", "F.linear_cross_entropy", 0.45),
    Goal("wpa", 64, "time", _PUBLISHED, 0.40),
    Goal("wpa", 64, "memory", _PUBLISHED, 0.30),
    Goal("transport", 2048, "time", _PUBLISHED, 0.50),
    Goal("transport", 2048, "time", _POT, 0.50),
    Goal("transport", 2048, "memory", _PUBLISHED, 0.60),
    Goal("sinkhorn", 2048, "time", _POT, 0.50),
    Goal("sinkhorn", 2048, "memory", _POT, 0.60),
    Goal("vilt", 64, "time", _HF, 0.80, "torch"),
    Goal("vilt", 64, "memory", _HF, 1.0, "torch"),
    Goal("vilt", 4, "time", _HF, 0.95, "torch"),
    Goal("vilt", 4, "memory", _HF, 1.0, "torch"),
)


def goals(results: Results) -> list[dict[str, Any]]:
    """The goals of the sizes that were measured, with `measured`, None where it could not be, and `met`."""
    rows = []
    for goal in GOALS:
        for entry in results["cases"]:
            if entry["case"] == goal.case and _rows(entry) == goal.rows:
                measured = comparison(entry, goal.measure, goal.variant, goal.against)
                met = None if measured is None else measured <= goal.limit
                rows.append(vars(goal) | {"measured": measured, "met": met})
    return rows


def _rows(entry: Results) -> int:
    """How many rows a case has: B, except of one large pair, where it is the number of tokens."""
    size = entry["size"]
    return max(size["B"], size["L"]) if entry["case"] == "transport" else next(iter(size.values()))


def described(entry: Results) -> str:
    """A case and its size in words."""
    size = ", ".join(f"{k} {v}" for k, v in entry["size"].items())
    return f"{entry['what']}: {size}; {_counted(entry['threads'], 'thread')}"


def report(results: Results) -> str:
    """The whole report, in Markdown."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    machine, path = results["machine"], results["path"]
    busy = "" if machine["load"] is None else f"; load before the start {machine['load']}"
    usable, threads = _counted(machine["cores"], "core"), _counted(machine["threads"], "thread")
    yield f"# Bench, {results['sizes']} sizes"
    yield ""
    yield (
        f"Machine: {machine['cpu']} ({machine['instructions']}), {usable} usable, {threads}, "
        f"torch {machine['torch']}, BLAS {machine['blas']}, {machine['system']}{busy}."
    )
    yield (
        f"Path of the fused rungs: {path['loop']} ({path['why']}), tile bodies {path['tile_bodies']}; "
        "called as they come, so this is the default."
    )
    yield (
        "Forward and backward, float32. Time: a ratio to the bare products of the same size, taken in turn "
        "in the same run; median (quartiles) over the repetitions."
    )
    yield "Variants: torch and fused are rungs of this library, the others its peers."
    yield (
        "Memory: the peak through backward beyond the inputs, gradients included, in a fresh process; "
        f"{results['memory_method']}; with glibc every array of 128 kB or more gets pages of its own."
    )
    yield from ["", "## The fused rungs beside their peers", "", *summary(results, "fused rung", "fused")]
    if any(entry["case"] in MODELS for entry in results["cases"]):
        yield from ["", "## Models beside their peers", "", *summary(results, "model", "torch")]
    for entry in results["cases"]:
        yield from ["", f"## {entry['case']}", described(entry), ""]
        yield from _table(entry)
    if results["growth"]:
        yield from ["", "## Growth", "Exponents of the number of rows, fitted over three sizes.", ""]
        yield from _growth_table(results["growth"])
    if found := goals(results):
        yield from [
            "",
            "## Goals",
            "Of the fused rungs and of models, as a share of another's time or memory.",
            "",
        ]
        yield "| case | rows | measure | against | at most | measured | |"
        yield "|---|---|---|---|---|---|---|"
        for goal in found:
            verdict = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
            against = "the bare products" if goal["against"] == BARE else goal["against"]
            yield (
                f"| {goal['case']} | {goal['rows']} | {goal['measure']} | {against} | {goal['limit']:.3f} | "
                f"{_number(goal['measured'], '.3f')} | {verdict} |"
            )


def summary(results: Results, what: str, variant: str) -> Iterator[str]:
    """One row for each fused rung, or model, and size and peer; medians."""
    yield f"| {what} | size | time / bare products | memory, MB | peer | time / peer | memory / peer |"
    yield "|---|---|---|---|---|---|---|"
    for entry in results["cases"]:
        if (entry["case"] in MODELS) != (what == "model"):
            continue
        size = ", ".join(f"{k} {v}" for k, v in entry["size"].items())
        bare = _number(comparison(entry, "time", variant, BARE), ".2f")
        memory = entry["memory"].get(variant)
        held = _number(quartiles(memory)["median"] / 1e6 if memory else None, ".1f")
        variants = dict.fromkeys([*entry["seconds"], *entry["memory"]])
        for peer in (v for v in variants if v not in (BARE, "np", "torch", "fused")):
            ratios = [comparison(entry, measure, variant, peer) for measure in ("time", "memory")]
            cells = [entry["case"], size, bare, held, peer, *(_number(r, ".2f") for r in ratios)]
            yield f"| {' | '.join(cells)} |"


def _table(entry: Results) -> Iterator[str]:
    """Variants by time, memory and what became of the others."""
    repetitions = len(entry["seconds"].get(BARE, ()))
    yield f"| variant | time / {entry['unit']} | seconds | peak memory, MB |"
    yield "|---|---|---|---|"
    for variant in dict.fromkeys([*entry["seconds"], *entry["memory"]]):
        ratio, seconds, memory = "–", "–", "–"
        if variant in entry["seconds"]:
            r = entry["ratio"][variant]
            ratio = "1" if variant == BARE else f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
            seconds = f"{quartiles(entry['seconds'][variant])['median']:.4g}"
        if variant in entry["memory"]:
            memory = spread_of_memory(entry["memory"][variant])
        name = f"{entry['unit']}, bare" if variant == BARE else variant
        yield f"| {name} | {ratio} | {seconds} | {memory} |"
    yield ""
    if repetitions:
        yield f"{repetitions} repetitions."
    else:
        yield "Too large to be timed often: memory only."
    for heading in ("absent", "failed"):
        for variant, reason in entry[heading].items():
            yield f"- {heading}: {variant} ({reason})"


def spread_of_memory(held: list[int]) -> str:
    """Megabytes (10⁶): the median, and the quartiles when there are several processes."""
    q = {name: value / 1e6 for name, value in quartiles(held).items()}
    return f"{q['median']:.1f}" + (f" ({q['low']:.1f} to {q['high']:.1f})" if len(held) > 1 else "")


def _growth_table(growth: list[Results]) -> Iterator[str]:
    columns = ("fused time", "fused memory", "torch memory")
    yield "| case | sizes | " + " | ".join(columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for entry in growth:
        sizes = "; ".join(", ".join(f"{k} {v}" for k, v in size.items()) for size in entry["sizes"])
        cells = [_number(entry["exponents"].get(column), ".2f") for column in columns]
        yield f"| {entry['case']} | {sizes} | {' | '.join(cells)} |"
    for entry in growth:
        for variant, reason in entry["failed"].items():
            yield f"- failed: {entry['case']}, {variant} ({reason})"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
