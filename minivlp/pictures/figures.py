"""The pictures of a report, one function each: plain arrays in, one PNG file out.

    curves           loss terms over steps, accuracies over time, with what guessing would reach
    retrieval_grid   captions with the pictures found for them, the right one framed
    alignment        where on the picture the transport plan puts each word
    masked_words     the words proposed for a masked one, with their probabilities

Every figure is 902 pixels wide, made without a display and without pyplot's global state, in the colours of
Okabe and Ito that colour-blind readers can tell apart. A file is written whole or not at all, and equal
input gives equal files. Everything raises ValueError for empty input.

Sources: Okabe and Ito 2008, Color Universal Design; Kim, Son and Kim 2021 (ViLT), section 4.7 (heat maps).
Left out: scripts beyond Latin, Greek and Cyrillic, which the font that comes with matplotlib lacks.
"""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from minivlp.core.files import whole_file
from minivlp.core.require import fail

DPI, WIDTH = 110, 8.2  # dots per inch, inches
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS, GREY = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY), "#666666"
THIN = ("#CCCCCC", 0.8)  # colour and width of the usual frame
Heat, Boxes, Candidates = np.ndarray, np.ndarray, Sequence[tuple[str, float]]
Records = Sequence[Mapping[str, float]]  # lines of metrics.jsonl


def curves(path: str | Path, records: Records, terms: Sequence[str], chance: Mapping[str, float]) -> None:
    """Loss terms over the step and, below, accuracies over time.

    records: lines of metrics.jsonl with "step", "seconds", loss terms (nats; "wpa" a cosine cost) and
    accuracies (0…1); a record may lack some. terms: the loss terms, of which those are drawn that any record
    has. chance: what guessing reaches, for each accuracy to be drawn. The loss lines are means over 1/40 of
    the run, with the single values thin behind them.
    """
    _some("records", records)
    losses = [name for name in terms if len(_series(records, "step", name)[1])]
    if not losses:
        fail("records", f"must hold numbers for one of {', '.join(terms)}", sorted(records[0]))
    for name in chance:
        if not len(_series(records, "seconds", name)[1]):
            fail("chance", "must name accuracies that are in the records", repr(name))
    seconds = max(record["seconds"] for record in records)
    minutes = ("minutes", 60) if seconds >= 600 else ("seconds", 1)
    unit, length = ("hours", 3600) if seconds >= 36_000 else minutes
    figure = Figure(figsize=(WIDTH, 5.4 if chance else 2.9), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    panels = figure.subplots(2 if chance else 1, 1, squeeze=False)[:, 0]
    ends = []
    for name, colour in zip(losses, cycle(COLOURS), strict=False):
        steps, values = _series(records, "step", name)
        window = max(1, len(values) // 40)
        mean = np.convolve(values, np.ones(window) / window, "valid")
        panels[0].plot(steps, values, color=colour, linewidth=0.6, alpha=0.35 if window > 1 else 0)
        panels[0].plot(steps[window - 1 :], mean, color=colour, marker="." if len(mean) < 2 else None)
        ends.append((mean[-1], f"{name} {mean[-1]:.2f}", colour))
    units = "nats; wpa: cosine cost" if "wpa" in losses else "nats"
    panels[0].set(xlabel="optimisation step", ylabel=f"loss ({units})")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    label_ends(panels[0], ends)
    if chance:
        ends, shared = [], {}
        for name, colour in zip(chance, cycle(COLOURS), strict=False):
            times, values = _series(records, "seconds", name)
            panels[1].plot(times / length, 100 * values, color=colour, marker=".")
            ends.append((100 * values[-1], f"{name} {100 * values[-1]:.0f} %", colour))
            shared.setdefault(chance[name], []).append(name)
        for value, names in shared.items():
            panels[1].axhline(100 * value, color=GREY, linestyle="--", linewidth=1)
            whose = ": " + ", ".join(names) if len(chance) > 1 else ""
            ends.append((100 * value, f"chance {100 * value:.3g} %{whose}", GREY))
        panels[1].set(xlabel=f"training time ({unit})", ylabel="accuracy (%)", ylim=(0, 102))
        label_ends(panels[1], ends)
    save_figure(figure, path)


def retrieval_grid(
    path: str | Path, rows: Sequence[tuple[str, Sequence[np.ndarray], int | Collection[int] | None]]
) -> None:
    """One row a query: the caption and the pictures found for it, best first, the right ones framed.

    rows: (caption, one to five images (H, W, 3) uint8, index or indices of the right ones, None = not there).
    """
    _some("rows", rows)
    side, top = 1.2, 0.35
    figure = new_figure(top + len(rows) * side)
    for rank in range(max(len(images) for _, images, _ in rows)):
        write_at(figure, 2.15 + (rank + 0.5) * side, 0.18, f"rank {rank + 1}", GREY, ha="center", va="center")
    for i, (caption, images, hit) in enumerate(rows):
        hits = [] if hit is None else [hit] if isinstance(hit, int) else list(hit)
        if not 1 <= len(images) <= 5 or not set(hits) <= set(range(len(images))):
            fail("rows", "must hold 1 to 5 images and the index of one of them or None", (len(images), hit))
        middle = top + (i + 0.5) * side
        write_at(figure, 0.1, middle - (0 if hits else 0.1), wrapped(caption, 26, 5), va="center")
        if not hits:
            write_at(figure, 0.1, middle + 0.48, "right picture not among these", VERMILION, va="center")
        for rank, image in enumerate(images):
            axes = new_axes(figure, 2.15 + rank * side + 0.05, top + i * side + 0.05, side - 0.1, side - 0.1)
            draw_picture(axes, image, frame=(GREEN, 4) if rank in hits else THIN)
    save_figure(figure, path)


def alignment(path: str | Path, rows: Sequence[tuple[np.ndarray, Sequence[str], Heat, Boxes]]) -> None:
    """Where the transport plan puts each word: heat over the grey picture, the boxes of the objects outlined.

    rows: (image (H, W, 3) uint8, words, heat (words, grid rows, grid columns), boxes (n, 4) xyxy in pixels).
    The heat of each word is z-normalised over the patches and clamped to [1, 3], as in ViLT, so what is
    below one standard deviation above the mean is not drawn; the grid covers the whole picture.
    """
    _some("rows", rows)
    for _, words, _, _ in rows:
        _some("words", words)
    columns = min(7, 1 + max(len(words) for _, words, _, _ in rows))
    lines = [-(-len(words) // (columns - 1)) for _, words, _, _ in rows]
    width, height = WIDTH / 7, WIDTH / 7 + 0.22  # a panel and the word above it
    side = width - 0.1
    figure = new_figure(sum(lines) * height + 0.6)
    top = 0.05
    for (image, words, heat, boxes), count in zip(rows, lines, strict=True):
        heat = np.asarray(heat, float)
        if heat.ndim != 3 or len(heat) != len(words):
            fail("heat", f"must have shape ({len(words)} words, rows, columns)", heat.shape)
        draw_picture(new_axes(figure, 0.05, top + 0.22, side, side), image, "the picture", boxes)
        edges = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
        pale = (128 + grey / 2).astype(np.uint8)
        for k, (word, values) in enumerate(zip(words, heat, strict=True)):
            line, column = divmod(k, columns - 1)
            axes = new_axes(figure, 0.05 + (column + 1) * width, top + line * height + 0.22, side, side)
            draw_picture(axes, pale, word, boxes)
            z = np.clip((values - values.mean()) / max(values.std(), 1e-12), 1, 3)
            axes.imshow(_heat(z), extent=edges, interpolation="nearest")
        top += count * height
    scale = new_axes(figure, 0.05 + width, top + 0.1, 2 * width, 0.12)
    scale.imshow(_heat(np.linspace(1, 3, 256)[None]), aspect="auto", extent=(1, 3, 0, 1))
    scale.set_yticks([])
    scale.set_xticks([1, 2, 3], ["≤ 1", "2", "≥ 3"], fontsize=8)
    note = "transport to the patch, in standard deviations\nabove the mean of the word; boxes: the objects"
    write_at(figure, 0.2 + 3 * width, top + 0.16, note, GREY, va="center")
    save_figure(figure, path)


def masked_words(path: str | Path, rows: Sequence[tuple[np.ndarray, str, Candidates, str]]) -> None:
    """Beside each picture its caption with one word masked, and the most probable words as bars.

    rows: (image (H, W, 3) uint8, caption with the mask, one to five (word, probability) best first, answer).
    """
    _some("rows", rows)
    side = 1.75
    figure = new_figure(len(rows) * side + 0.4)
    for i, (image, caption, candidates, answer) in enumerate(rows):
        if not 1 <= len(candidates) <= 5:
            fail("candidates", "must be one to five (word, probability)", len(candidates))
        top = i * side + 0.08
        draw_picture(new_axes(figure, 0.1, top, side - 0.16, side - 0.16), image)
        caption = wrapped(caption, 72, 2)
        below = 0.25 + 0.18 * caption.count("\n")
        write_at(figure, side + 0.2, top, caption, va="top", weight="bold")
        bars = new_axes(figure, side + 1.6, top + below, WIDTH - side - 2.1, side - 0.2 - below)
        right = [word == answer for word, _ in candidates]
        colours = [GREEN if r else "#AAAAAA" for r in right]
        bars.barh(range(len(right)), [p for _, p in candidates], 0.7, color=colours)
        bars.set(xlim=(0, 1), ylim=(4.6, -0.6), yticks=[], xticks=np.linspace(0, 1, 6))
        for place, (word, probability) in enumerate(candidates):
            style = {"va": "center", "fontsize": 9, "weight": "bold" if right[place] else "normal"}
            bars.text(-0.01, place, _cut(word, 18), ha="right", parse_math=False, **style)
            bars.text(probability + 0.01, place, f"{probability:.2f}", **style)
        if not any(right):
            missed = {"ha": "right", "va": "center", "fontsize": 9, "parse_math": False, "color": VERMILION}
            bars.text(1, 4.2, f"right: {_cut(answer, 18)}", **missed)
        bars.spines[["top", "right"]].set_visible(False)
        bars.tick_params(labelbottom=i == len(rows) - 1, labelsize=8)
    bars.set_xlabel("probability of the masked word (green: the right one)", fontsize=9)
    save_figure(figure, path)


def _some(name: str, items: Sequence) -> None:
    if not len(items):
        fail(name, "must not be empty", "no entry")


def _heat(z: np.ndarray) -> np.ndarray:
    """Vermilion (…, 4), transparent at z = 1 and nearly opaque at z = 3."""
    opacity = 0.9 * (z - 1) / 2
    return np.stack([*(np.full(z.shape, c) for c in to_rgb(VERMILION)), opacity], axis=-1)


def _series(records: Records, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The x and y of the records that have a finite number for y."""
    pairs = np.array([(r[x], r[y]) for r in records if r.get(y) is not None], float).reshape(-1, 2)
    return tuple(pairs[np.isfinite(pairs).all(1)].T)


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name each line at its right end, (y, label, colour); labels that would overlap are moved apart."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    low, high = axes.get_ylim()
    ends = sorted(ends)
    gap = 0.17 / 2.0  # a line of text, as a share of the height of a panel
    blocks: list[tuple[float, int]] = []  # (mean of wanted place − own offset, members), kept in rising order
    for i, (y, _, _) in enumerate(ends):
        mean, members = (y - low) / (high - low) - i * gap, 1
        while blocks and blocks[-1][0] > mean:  # least squares under the order: merge neighbours that collide
            other, size = blocks.pop()
            mean, members = (mean * members + other * size) / (members + size), members + size
        blocks.append((mean, members))
    places = np.repeat([m for m, _ in blocks], [n for _, n in blocks]) + gap * np.arange(len(ends))
    for (y, label, colour), place in zip(ends, places, strict=True):
        ends_at = [(y - low) / (high - low), place]
        axes.plot([1.003, 1.025], ends_at, color=colour, lw=0.8, transform=axes.transAxes, clip_on=False)
        style = {"color": colour, "va": "center", "fontsize": 9, "transform": axes.transAxes}
        axes.text(1.03, place, label.replace("_", " "), **style)


def new_figure(height: float) -> Figure:
    """A figure of the common width, `height` inches high."""
    return Figure(figsize=(WIDTH, height), dpi=DPI)


def new_axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes whose upper left corner lies x, y inches from that of the figure."""
    total = figure.get_figheight()
    return figure.add_axes((x / WIDTH, 1 - (y + height) / total, width / WIDTH, height / total))


def write_at(figure: Figure, x: float, y: float, text: str, colour: str = "black", **style: object) -> None:
    """Text whose place is x, y inches from the upper left corner."""
    height = figure.get_figheight()
    figure.text(x / WIDTH, 1 - y / height, text, color=colour, fontsize=9, parse_math=False, **style)


def wrapped(text: str, width: int, lines: int) -> str:
    """The text in at most `lines` lines of `width` characters; what is cut off leaves "…"."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def _cut(word: str, width: int) -> str:
    return word if len(word) <= width else word[: width - 1] + "…"


def draw_picture(axes: Axes, image: np.ndarray, title: str = "", boxes: Boxes = (), frame=THIN) -> None:
    """One picture with a frame, a title and outlined boxes."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        fail("image", "must be (H, W, 3) uint8", f"{image.shape} {image.dtype}")
    # Small pictures show their true pixels, which also compress well; large ones are smoothed when reduced.
    axes.imshow(image, interpolation="nearest" if max(image.shape) < 200 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.set_title(_cut(title, 14), fontsize=9, pad=3, parse_math=False)
    axes.spines[:].set(color=frame[0], linewidth=frame[1])
    for box in boxes:
        outline(axes, box)


def outline(axes: Axes, box: Sequence[float], colour: str = BLUE, style: str = "-") -> None:
    """The outline of a box, x1 y1 x2 y2 in pixels of the picture on these axes."""
    x1, y1, x2, y2 = box
    for edge, width, line in (("white", 2.4, "-"), (colour, 1.2, style)):  # a white rim shows on any picture
        look = {"fill": False, "edgecolor": edge, "linewidth": width, "linestyle": line}
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, **look))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG; a reader never sees half of one."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    with whole_file(path) as file:
        picture.save(file, format="PNG", optimize=True)
