"""The results of an evaluation as Markdown: one table for the training artists, one for all others."""

from collections.abc import Callable, Mapping
from typing import Any

INTERVAL = {"value": "{value:.3f}", "95 % interval": "{low:.3f} to {high:.3f}"}


def tables(
    results: Mapping[str, Any],
    about: Callable[[str], str],
    names: Callable[[str], str],
    columns: Mapping[str, str],
    note: str,
    after: Callable[[str], list[str]] = lambda split: [],
) -> str:
    """Both tables as one text.

    results: what an evaluation returned, with `details[split]` = {measure: numbers} and
    `details["artists"]`. about(split): a sentence above the table. names: how a measure is called.
    columns: heading → format of a measure's numbers, as in INTERVAL. note: what stands below both tables.
    after(split): lines below a table.
    """
    details, lines = results["details"], []
    for split in ("seen", "unseen"):
        if not details[split]:
            lines += [f"## No {split} artists", "", "The data holds none, so nothing was measured.", ""]
            continue
        artists = ", ".join(details["artists"][split])
        lines += [f"## {split.capitalize()} artists: {artists}", "", about(split), ""]
        lines += [f"| measure | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for name, numbers in details[split].items():
            cells = (form.format(**numbers) for form in columns.values())
            lines.append(f"| {names(name)} | {' | '.join(cells)} |")
        lines += [*after(split), ""]
    return "\n".join([*lines, note])


def scene_tables(
    results: Mapping[str, Any], names: Mapping[str, str], note: str, more: Mapping[str, str] | None = None
) -> str:
    """The tables of an evaluation on scenes, with `more` columns after the usual ones."""
    details = results["details"]
    columns = INTERVAL | {"chance": "{chance:.3f}", "objects alone": "{objects:.3f}"}
    columns |= {"items": "{items}", "pairs": "{clusters}"} | (more or {})

    def about(split: str) -> str:
        return f"{len(details['nouns'][split])} nouns, held-out pairs, {details['canvas']} pixels square."

    return tables(results, about, names.__getitem__, columns, note)
