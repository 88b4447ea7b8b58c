"""The picture of a bench: for each case a bar a variant, time on the left, memory on the right.

Times are ratios to the bare products, whose limit is the dashed line at 1. Every case has scales of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivlp.bench.cases import BARE
from minivlp.bench.measure import quartiles
from minivlp.bench.report import described
from minivlp.core.require import fail
from minivlp.pictures.figures import BLUE, DPI, GREY, VERMILION, WIDTH, save_figure

COLOURS = {"fused": VERMILION, "torch": BLUE}  # and grey for the peers
LABELS, GAP, BAR, HEADING = 2.2, 0.35, 0.24, 0.5  # inches


def bars(path: str | Path, results: Mapping[str, Any]) -> None:
    """Draw the cases of a bench to a PNG file. Raises ValueError when there is none."""
    entries = [entry for entry in results["cases"] if entry["seconds"] or entry["memory"]]
    if not entries:
        fail("results", "must hold a case that was measured", "none")
    variants = [[v for v in dict.fromkeys([*e["seconds"], *e["memory"]]) if v != BARE] for e in entries]
    height = sum(HEADING + BAR * len(names) for names in variants) + 0.55
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    width = (WIDTH - LABELS - 2 * GAP) / 2
    top = 0.35
    headings = ("time, in units of the bare products (dashed)", "peak memory beyond the inputs, MB")
    for i, title in enumerate(headings):
        figure.text((LABELS + i * (width + GAP)) / WIDTH, 1 - 0.2 / height, title, fontsize=9, color=GREY)
    figure.text(0.1 / WIDTH, 1 - 0.2 / height, "grey: peers", fontsize=9, color=GREY)
    for entry, names in zip(entries, variants, strict=True):
        top += HEADING - 0.2
        title = described(entry) + f"; unit: {entry['unit']}"
        figure.text(0.1 / WIDTH, 1 - (top - 0.06) / height, title, fontsize=9, weight="bold")
        for i, draw in enumerate((_times, _memory)):
            left = LABELS + i * (width + GAP)
            box = (left, height - top - BAR * len(names), width, BAR * len(names))
            axes = figure.add_axes(
                (box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height), label=f"{top}, {i}"
            )
            draw(axes, entry, names)
            axes.set(xticks=[], yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
            axes.set_yticklabels(names if i == 0 else [], fontsize=9)
            axes.tick_params(length=0)
            axes.spines[["top", "right", "bottom"]].set_visible(False)
        top += BAR * len(names) + 0.2
    save_figure(figure, path)


def _times(axes: Axes, entry: Mapping[str, Any], names: list[str]) -> None:
    """Ratios to the bare products, quartiles as whiskers."""
    ratio = {v: entry["ratio"][v] for v in names if v in entry["ratio"]}
    if not ratio:
        axes.text(0.02, 0.5, "not timed at this size", transform=axes.transAxes, fontsize=9, va="center")
        return
    axes.axvline(1, color="black", linestyle="--", linewidth=1, zorder=3)
    longest = max(r["high"] for r in ratio.values())
    for v, r in ratio.items():
        spread = [[r["median"] - r["low"]], [r["high"] - r["median"]]]
        _bar(axes, names.index(v), v, r["median"], longest, f"{r['median']:.2f} ×", spread)


def _memory(axes: Axes, entry: Mapping[str, Any], names: list[str]) -> None:
    """Megabytes, medians over processes."""
    held = {v: quartiles(entry["memory"][v])["median"] / 1e6 for v in names if v in entry["memory"]}
    for v, megabytes in held.items():
        _bar(
            axes,
            names.index(v),
            v,
            megabytes,
            max(*held.values(), 1e-6),
            f"{megabytes:,.{1 if megabytes < 100 else 0}f} MB",
        )


def _bar(axes, row: int, variant: str, value: float, longest: float, label: str, spread=None) -> None:
    """One bar; its label stands beyond the whisker."""
    colour = COLOURS.get(variant, "#AAAAAA")
    axes.barh(row, value, height=0.7, color=colour, xerr=spread, error_kw={"elinewidth": 1})
    axes.set_xlim(0, max(longest, 1.0 if spread else 0) * 1.3)
    end = value + (spread[1][0] if spread else 0)
    axes.text(end + 0.02 * axes.get_xlim()[1], row, label, fontsize=9, va="center", zorder=4)
