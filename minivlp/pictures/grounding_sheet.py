"""A sheet of answers: each picture with the box that was found for a phrase, and the object's own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from minivlp.core.require import fail
from minivlp.pictures.figures import (
    BLUE,
    GREY,
    VERMILION,
    WIDTH,
    draw_picture,
    new_axes,
    new_figure,
    save_figure,
    wrapped,
    write_at,
)

COLUMNS, TOP, BELOW = 5, 0.35, 0.42  # pictures a row; inches above all rows, and below each picture


def grounding_sheet(
    path: str | Path, answers: Sequence[tuple[np.ndarray, str, np.ndarray, np.ndarray]]
) -> None:
    """Draw to a PNG file: (image (H, W, 3) uint8, phrase, true box, found box), boxes as corners in pixels.

    Raises ValueError when there is no answer.
    """
    if not answers:
        fail("answers", "must hold at least one", 0)
    side = WIDTH / COLUMNS
    figure = new_figure(TOP + -(-len(answers) // COLUMNS) * (side + BELOW))
    write_at(figure, 0.1, 0.18, "the object", BLUE, va="center", weight="bold")
    write_at(figure, 1.0, 0.18, "the box found for the phrase", VERMILION, va="center", weight="bold")
    for i, (image, phrase, true, found) in enumerate(answers):
        x, y = (i % COLUMNS) * side, TOP + (i // COLUMNS) * (side + BELOW)
        axes = new_axes(figure, x + 0.08, y, side - 0.16, side - 0.16)
        draw_picture(axes, image)
        _outline(axes, true, BLUE, "-")
        _outline(axes, found, VERMILION, "--")
        write_at(figure, x + side / 2, y + side - 0.1, wrapped(phrase, 24, 2), GREY, ha="center", va="top")
    save_figure(figure, path)


def _outline(axes: Axes, box: np.ndarray, colour: str, style: str) -> None:
    x1, y1, x2, y2 = box
    for edge, width, line in (("white", 2.6, "-"), (colour, 1.4, style)):  # a white rim shows on any picture
        corner = (x1 - 0.5, y1 - 0.5)
        axes.add_patch(
            Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=width, linestyle=line)
        )
