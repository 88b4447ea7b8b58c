"""The results of an evaluation as Markdown: one table for the training artists, one for all others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Heading of a column → format of a measure's numbers; and a whole measure in one cell.
INTERVAL = {"value": "{value:.3f}", "95 % interval": "{low:.3f} to {high:.3f}"}
OBJECTS = {"chance": "{chance:.3f}", "objects alone": "{objects:.3f}", "items": "{items}"}
CELL = "{value:.3f} ({low:.3f} to {high:.3f})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return [head, "|---" * len(heads) + "|", *lines]


def tables(
    details: Mapping[str, Any],
    about: Callable[[str], str],
    names: Callable[[str], str],
    columns: Mapping[str, str],
    note: str,
    after: Callable[[str], list[str]] = lambda split: [],
) -> str:
    """Both tables as one text.

    details: those of an evaluation, {split: {measure: numbers}, "artists": {split: names}, …}. about(split):
    a sentence above the table. names: how a measure is called. columns: heading → format of a measure's
    numbers, as in INTERVAL. note: what stands below both tables. after(split): lines below a table.
    """
    lines = []
    for split, artists in details["artists"].items():
        if not details[split]:
            lines += [f"## No {split} artists", "", "The data holds none, so nothing was measured.", ""]
            continue
        forms = columns.values()
        rows = [[names(name), *(f.format(**m) for f in forms)] for name, m in details[split].items()]
        lines += [f"## {split.capitalize()} artists: {', '.join(artists)}", "", about(split), ""]
        lines += [*table(["measure", *columns], rows), *after(split), ""]
    return "\n".join([*lines, note])


def scene_tables(results: Mapping[str, Any], names: Mapping[str, str], note: str, **more: str) -> str:
    """The tables of an evaluation on scenes, with `more` columns after the usual ones."""
    details, columns = results["details"], INTERVAL | OBJECTS | {"pairs": "{clusters}"} | more

    def about(split: str) -> str:
        return f"{len(details['nouns'][split])} nouns, held-out pairs, {details['canvas']} pixels square."

    return tables(details, about, names.__getitem__, columns, note)
