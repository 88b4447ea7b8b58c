"""A contact sheet: pictures in rows, best first, each with a line of text below it."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minivlp.core.require import fail
from minivlp.pictures.figures import (
    GREEN,
    GREY,
    THIN,
    WIDTH,
    draw_picture,
    new_axes,
    new_figure,
    save_figure,
    write_at,
)

COLUMNS, TOP, BELOW = 6, 0.4, 0.42  # pictures a row; inches above all rows, and below each picture


def contact_sheet(
    path: str | Path, sheets: Sequence[tuple[str, Sequence[tuple[np.ndarray, str, bool]]]]
) -> None:
    """Draw to a PNG file, under each title its pictures in order: (image (H, W, 3) uint8, label, framed?).

    Raises ValueError when there is no sheet, or one without pictures.
    """
    if not sheets or not all(pictures for _, pictures in sheets):
        fail("sheets", "must hold at least one picture each", [len(pictures) for _, pictures in sheets])
    side = WIDTH / COLUMNS
    rows = [-(-len(pictures) // COLUMNS) for _, pictures in sheets]
    figure = new_figure(sum(TOP + n * (side + BELOW) for n in rows))
    top = 0.0
    for (title, pictures), n in zip(sheets, rows, strict=True):
        write_at(figure, 0.1, top + 0.22, title, va="center", weight="bold")
        for i, (image, label, framed) in enumerate(pictures):
            x, y = (i % COLUMNS) * side, top + TOP + (i // COLUMNS) * (side + BELOW)
            frame = (GREEN, 3) if framed else THIN
            draw_picture(new_axes(figure, x + 0.08, y, side - 0.16, side - 0.16), image, frame=frame)
            lines = "\n".join(textwrap.wrap(label, 19, max_lines=2, placeholder=" …"))
            write_at(figure, x + side / 2, y + side - 0.1, lines, GREY, ha="center", va="top")
        top += TOP + n * (side + BELOW)
    save_figure(figure, path)
