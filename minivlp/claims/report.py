"""claims.md: a row a claim, with its number, its interval and the verdict that follows from them."""

from collections.abc import Iterator, Sequence

import numpy as np

from minivlp.claims.archetypes import CONTROL
from minivlp.claims.claim import Claim, Results, samples
from minivlp.claims.settings import Settings
from minivlp.claims.table import CLAIMS
from minivlp.claims.verdict import Interval, interval


def report(names: Sequence[str], results: Results, settings: Settings, command: str, seconds: float) -> str:
    """The whole report of the named claims, in Markdown; seconds: what the experiments took in all."""
    return "\n".join(_lines(names, results, settings, command, seconds)) + "\n"


def _lines(
    names: Sequence[str], results: Results, settings: Settings, command: str, seconds: float
) -> Iterator[str]:
    yield "# The claims, tested again in miniature"
    yield ""
    yield f"Written by `{command}`: {settings.seeds} seeds, {seconds / 60:.0f} minutes of one core's time."
    yield ""
    yield "A verdict follows from the 95 % interval over seeds and test items and from the margin that the"
    yield "claim states: it *holds here* when the whole interval lies on the claimed side of the margin,"
    yield "*does not hold here* when it lies on the other, and else it *cannot be told at this size*."
    yield "Small models and minutes of training decide nothing about the models of the sources."
    yield ""
    yield "| claim | source | how tested here | result, 95 % interval | verdict |"
    yield "|---|---|---|---|---|"
    for name in names:
        claim = CLAIMS[name]
        result = f"{claim.number}: {told(claim.found(results, settings))}; claimed: {claim.rule()}"
        if not claim.above_guessing(results, settings):
            result += "; no model is surely above guessing"
        cells = [claim.says, claim.source, claim.tested, result, claim.verdict(results, settings)]
        yield f"| {' | '.join(cells)} |"
    if CONTROL in results:
        yield ""
        swaps, couples = _right(results, "swapped"), _right(results, "group")
        yield "The control: where only the order of words differs, a bag of words must never be right. It is"
        yield f"right on {swaps} swapped captions and on {couples} couples of pictures."
    for name in names:
        yield from ["", f"## {CLAIMS[name].says}", "", f"![{name}](pictures/claim_{name}.png)", ""]
        yield from _numbers(CLAIMS[name], results, settings)


def _numbers(claim: Claim, results: Results, settings: Settings) -> Iterator[str]:
    """Everything that was measured for a claim; one column a seed."""
    seeds = " | ".join(f"seed {seed}" for seed in range(settings.seeds))
    yield f"| {claim.axis} | mean, 95 % interval | {seeds} |"
    yield "|---|---|" + "---|" * settings.seeds
    for label, which in claim.points(settings).items():
        each = samples(results, which)
        means = " | ".join(f"{np.mean(seed.items):.3g}" for seed in each)
        yield f"| {label} | {told(interval(each))} | {means} |"
    if claim.chance is not None:
        yield ""
        yield f"Guessing: {claim.chance:.3g}."


def _right(results: Results, measure: str) -> str:
    hits = [hit for seed in samples(results, (CONTROL, measure)) for hit in seed.items]
    return f"{sum(hits):.0f} of {len(hits)}"


def told(found: Interval) -> str:
    """A number with its interval."""
    return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"
