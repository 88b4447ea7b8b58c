"""Sheets of pictures in rows, each with a line of text below it.

    contact_sheet     under each title its pictures, best first
    grounding_sheet   each picture with the box predicted for a phrase, and the object's own

Left out: more than one page; a sheet grows downwards.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivlp.core.require import fail
from minivlp.pictures import figures
from minivlp.pictures.figures import BLUE, GREEN, GREY, THIN, VERMILION, WIDTH, write_at

Sheet = tuple[str, Sequence[tuple[np.ndarray, str, bool]]]  # title; image (H, W, 3) uint8, label, framed?
BELOW = 0.42  # inches below each picture, for its label


def contact_sheet(path: str | Path, sheets: Sequence[Sheet]) -> None:
    """Draw to a PNG file, under each title its pictures in order, the framed ones in green.

    Raises ValueError when there is no sheet, or one without pictures.
    """
    if not sheets or not all(pictures for _, pictures in sheets):
        fail("sheets", "must hold at least one picture each", [len(pictures) for _, pictures in sheets])
    heights = [0.4 + _height(len(pictures), columns=6) for _, pictures in sheets]
    figure, top = figures.new_figure(sum(heights)), 0.0
    for (title, pictures), height in zip(sheets, heights, strict=True):
        write_at(figure, 0.1, top + 0.22, title, va="center", weight="bold")
        for i, (image, label, framed) in enumerate(pictures):
            axes = _cell(figure, i, 6, top + 0.4, label, letters=19)
            figures.draw_picture(axes, image, frame=(GREEN, 3) if framed else THIN)
        top += height
    figures.save_figure(figure, path)


def grounding_sheet(
    path: str | Path, answers: Sequence[tuple[np.ndarray, str, np.ndarray, np.ndarray]]
) -> None:
    """Draw to a PNG file: (image (H, W, 3) uint8, phrase, true box, predicted box), corners in pixels.

    Raises ValueError when there is no answer.
    """
    if not answers:
        fail("answers", "must hold at least one", 0)
    figure = figures.new_figure(0.35 + _height(len(answers), columns=5))
    write_at(figure, 0.1, 0.18, "the object", BLUE, va="center", weight="bold")
    write_at(figure, 1.0, 0.18, "the box found for the phrase", VERMILION, va="center", weight="bold")
    for i, (image, phrase, true, predicted) in enumerate(answers):
        axes = _cell(figure, i, 5, 0.35, phrase, letters=24)
        figures.draw_picture(axes, image, boxes=[true])
        figures.outline(axes, predicted, VERMILION, "--")
    figures.save_figure(figure, path)


def _height(pictures: int, columns: int) -> float:
    """Inches that so many pictures take in rows of `columns`."""
    return -(-pictures // columns) * (WIDTH / columns + BELOW)


def _cell(figure: Figure, i: int, columns: int, top: float, label: str, letters: int) -> Axes:
    """The axes of picture i of a grid that begins at `top` inches; its label is written below it."""
    side = WIDTH / columns
    x, y = (i % columns) * side, top + (i // columns) * (side + BELOW)
    text = figures.wrapped(label, letters, 2)
    write_at(figure, x + side / 2, y + side - 0.1, text, GREY, ha="center", va="top")
    return figures.new_axes(figure, x + 0.08, y, side - 0.16, side - 0.16)
