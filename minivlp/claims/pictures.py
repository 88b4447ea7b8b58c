"""One picture a claim: what was measured for each model, with its interval, the seeds as small marks.

    dots      a row for each number; red: what decides
    lines     numbers over a batch size or a layer, a line each
    stacks    milliseconds of the parts of each archetype, one bar each

Left out: the test items, of which only means are drawn.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivlp.claims.claim import Claim, Results, samples
from minivlp.claims.clock import PARTS
from minivlp.claims.report import told
from minivlp.claims.settings import Settings
from minivlp.claims.verdict import Interval, interval
from minivlp.pictures.figures import (
    BLUE,
    COLOURS,
    DPI,
    GREY,
    VERMILION,
    WIDTH,
    label_ends,
    save_figure,
    wrapped,
)

Numbers = Mapping[str, tuple[Interval, list[float]]]  # of each label, with the mean of each seed
LEFT, TOP, ROW = 1.9, 0.75, 0.27  # inches


def draw(path: str | Path, claim: Claim, results: Results, settings: Settings) -> None:
    """Write the picture of a claim as a PNG file."""
    numbers, decisive = {}, set()
    for label, which in claim.points(settings).items():
        if which in claim.deciding(settings):
            decisive.add(label)
        seeds = samples(results, which)
        numbers[label] = interval(seeds), [float(np.mean(seed.items)) for seed in seeds]
    kinds = len({label.rsplit(" ", 1)[0] for label in numbers})
    body = {"dots": ROW * len(numbers), "stacks": 0.42 * kinds, "lines": 2.4}[claim.draw]
    height = TOP + body + 0.55
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    left = 0.95 if claim.draw == "lines" else LEFT
    right = 1.35 if claim.draw == "lines" else 0.9
    axes = figure.add_axes((left / WIDTH, 0.5 / height, 1 - (left + right) / WIDTH, body / height))
    figure.text(
        0.1 / WIDTH, 1 - 0.12 / height, wrapped(claim.says, 95, 1), fontsize=10, weight="bold", va="top"
    )
    outcome = claim.found(results, settings)
    said = f"{claim.verdict(results, settings)}: {claim.number} {told(outcome)}; claimed: {claim.rule()}"
    figure.text(0.1 / WIDTH, 1 - 0.34 / height, wrapped(said, 112, 2), fontsize=8.5, color=GREY, va="top")
    {"dots": _dots, "lines": _lines, "stacks": _stacks}[claim.draw](axes, claim, numbers, decisive)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _dots(axes: Axes, claim: Claim, numbers: Numbers, decisive: set[str]) -> None:
    if claim.chance is not None:
        axes.axvline(claim.chance, color=GREY, linestyle="--", linewidth=1)
        axes.text(claim.chance, -0.62, "guessing", color=GREY, fontsize=8, ha="center", va="bottom")
    for row, (name, (found, seeds)) in enumerate(numbers.items()):
        colour = VERMILION if name in decisive else BLUE
        axes.plot([found.low, found.high], [row, row], color=colour, linewidth=1.5)
        axes.plot(found.value, row, marker="o", color=colour, markersize=6)
        axes.plot(seeds, [row] * len(seeds), marker="|", color="black", linestyle="none", markersize=8)
        axes.text(
            1.02, row, f"{found.value:.3g}", transform=axes.get_yaxis_transform(), fontsize=9, va="center"
        )
    axes.set(yticks=range(len(numbers)), ylim=(len(numbers) - 0.5, -0.6), xlabel=claim.axis)
    axes.set_yticklabels(list(numbers), fontsize=9)
    if claim.axis.startswith("share"):
        axes.set_xlim(-0.02, 1.02)


def _lines(axes: Axes, claim: Claim, numbers: Numbers, decisive: set[str]) -> None:
    series: dict[str, list[tuple[str, Interval, list[float]]]] = {}
    for label, (found, seeds) in numbers.items():
        name, x = label.rsplit(" ", 1)
        series.setdefault(name, []).append((x, found, seeds))
    ends = []
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        x = np.arange(len(points))  # one step apart, whatever the numbers are
        low, value, high = (
            np.array([getattr(p, key) for _, p, _ in points]) for key in ("low", "value", "high")
        )
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, value, color=colour, marker="o", markersize=4)
        for i, (_, _, seeds) in enumerate(points):
            axes.plot([x[i]] * len(seeds), seeds, marker="_", color=colour, linestyle="none", markersize=7)
        ends.append((value[-1], name, colour))
    axes.set_xticks(range(len(points)), [x for x, _, _ in points])
    axes.set(xlabel="layer" if "layer" in claim.says else "batch size", ylabel=claim.axis)
    label_ends(axes, ends)


def _stacks(axes: Axes, claim: Claim, numbers: Numbers, decisive: set[str]) -> None:
    kinds = list(dict.fromkeys(label.split(" ")[0] for label in numbers))
    for row, kind in enumerate(kinds):
        start = 0.0
        for colour, part in zip(COLOURS, PARTS, strict=False):
            width = numbers[f"{kind} {part}"][0].value
            axes.barh(row, width, left=start, height=0.7, color=colour, label=part if row == 0 else None)
            if width > 0.08 * max(1e-9, _widest(numbers, kinds)):
                axes.text(
                    start + width / 2,
                    row,
                    f"{width:.2f}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=9,
                )
            start += width
        axes.text(start, row, f"  {start:.2f} ms", va="center", fontsize=9)
    axes.set(yticks=range(len(kinds)), ylim=(len(kinds) - 0.5, -0.5), xlabel=claim.axis)
    axes.set_yticklabels(kinds, fontsize=9)
    axes.set_xlim(0, 1.12 * _widest(numbers, kinds))
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.97))


def _widest(numbers: Numbers, kinds: list[str]) -> float:
    return max(sum(numbers[f"{kind} {part}"][0].value for part in PARTS) for kind in kinds)
