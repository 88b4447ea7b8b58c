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
    seeds = " or ".join(map(str, sorted({len(found) for found in results.values()})))
    yield f"Written by `{command}`: {seeds} seeds, {seconds / 60:.0f} minutes of one core's time."
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
    n = len(samples(results, claim.first(settings)))
    yield f"| {claim.axis} | mean, 95 % interval | {' | '.join(f'seed {seed}' for seed in range(n))} |"
    yield "|---|---|" + "---|" * n
    for label, which in claim.points(settings).items():
        each = samples(results, which)
        means = " | ".join(f"{np.mean(seed.items):.3g}" for seed in each)
        yield f"| {label} | {told(interval(each))} | {means} |"
    if claim.chance is not None:
        yield ""
        yield f"Guessing: {claim.chance:.3g}."


def merged(old: str, new: str) -> str:
    """The report `new`, and what `old` says of claims that are not in `new`, in the order of the table."""
    before, now = _parts(old), _parts(new)
    written = [line for line in before[0] if line.split(":")[0] != now[0][0].split(":")[0]] + now[0]
    rows, sections = before[1] | now[1], before[3] | now[3]
    said = [claim.says for claim in CLAIMS.values() if claim.says in rows]
    head, _, rest = new.partition(now[0][0])
    intro = rest[: rest.index("|---|---|---|---|---|")] + "|---|---|---|---|---|"
    table = "\n".join([intro, *(rows[name] for name in said)])
    control = now[2] or before[2]
    return (
        "\n\n".join([head + "\n".join(written) + table, *control, *(sections[name] for name in said)]) + "\n"
    )


def _parts(text: str) -> tuple[list[str], dict[str, str], list[str], dict[str, str]]:
    """The lines that tell of commands, the rows, the control if there is one, the sections, by claim."""
    head, *sections = text.strip("\n").split("\n\n## ")
    head, _, table = head.partition("|---|---|---|---|---|\n")
    table, *control = table.split("\n\n")
    written = [line for line in head.splitlines() if line.startswith("Written by ")]
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in table.splitlines()}
    return written, rows, control, {one.splitlines()[0]: f"## {one}" for one in sections}


def _right(results: Results, measure: str) -> str:
    hits = [hit for seed in samples(results, (CONTROL, measure)) for hit in seed.items]
    return f"{sum(hits):.0f} of {len(hits)}"


def told(found: Interval) -> str:
    """A number with its interval."""
    return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"
