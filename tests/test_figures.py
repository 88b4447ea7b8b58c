"""The figures: readable files of sane size, nothing cut off, no text over text, and the marks where the data
say."""

import os

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from minivlp.pictures import figures
from minivlp.pictures.figures import GREEN, GREY, alignment, curves, masked_words, retrieval_grid

LONG = (
    "a very long caption about $5 and $6, a man with a hat standing beside a bicycle in front of a window "
    "full of bread and cakes while it rains so hard that nobody else is out in the street at all today"
)


def scene(seed: int, height: int = 48, width: int = 48) -> np.ndarray:
    """A colour gradient with one square, as plain as the scenes of EmojiVL."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(-40, 40, width)[None, :, None] * rng.uniform(-1, 1, 3) + rng.uniform(80, 170, 3)
    image = np.repeat(ramp, height, axis=0).astype(np.uint8)
    x, y = rng.integers(0, width // 2), rng.integers(0, height // 2)
    image[y : y + 16, x : x + 16] = rng.integers(0, 256, 3)
    return image


def records(n: int = 200) -> list[dict]:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        mlm, itm, wpa = 1 + 6 * np.exp(-i / 30) + rng.normal() / 9, 0.7 - i / 900, -0.02
        lines.append({"step": 10 * i, "seconds": 4.0 * i, "scenes": 640 * i, "loss": mlm + itm + wpa})
        lines[-1] |= {"mlm": mlm, "itm": itm, "wpa": wpa}
        if i % 20 == 0:
            lines[-1] |= {
                "masked_object": 0.03 + i / 400,
                "matching": 0.5 + i / 450,
                "pointing": 0.5 + i / 440,
            }
    return lines


TERMS = ("loss", "mlm", "itm", "wpa")
CHANCE = {"masked_object": 1 / 32, "matching": 0.5, "pointing": 0.02}
HEAT = np.random.default_rng(0).random((9, 3, 4))
BOXES = np.array([[0, 0, 20, 20], [30, 10, 48, 48]])
TOP = [("dog", 0.62), ("bear", 0.3), ("panda", 0.05), ("a" * 40, 0.02), ("$x$", 0.0)]

# name → (function, arguments)
CASES = {
    "curves": (curves, (records(), TERMS, CHANCE)),
    "curves of one record": (curves, (records(1), TERMS, {"matching": 0.5})),
    "curves without accuracies": (curves, (records(), TERMS, {})),
    "curves of lines that coincide": (
        curves,
        ([{"step": s, "seconds": s, "loss": 1.0, "mlm": 1.0, "itm": 1.0, "x": 0.5, "y": 0.5} for s in (1, 9)],
         TERMS, {"x": 0.5, "y": 0.49}),
    ),
    "retrieval_grid": (
        retrieval_grid,
        ([(f"a dog left of a guitar {i}", [scene(5 * i + k) for k in range(5)], i % 5) for i in range(6)],),
    ),
    "retrieval_grid of long captions": (
        retrieval_grid,
        ([(LONG, [scene(0, 300, 90), scene(1, 40, 260)], None), ("incomprehensible " * 9, [scene(2)], 0)],),
    ),
    "alignment": (alignment, ([(scene(1), LONG.split()[:n], HEAT[:n], BOXES) for n in (9, 3)],)),
    "alignment of one word": (alignment, ([(scene(1, 60, 30), ["w" * 50], HEAT[:1], BOXES[:0])],)),
    "masked_words": (
        masked_words,
        ([(scene(1), "a [MASK] left of a guitar", TOP, "bear"), (scene(2, 30, 60), LONG, TOP[:2], "b" * 60),
          (scene(3), "a [MASK]", [("dog", 1.0)], "dog")],),
    ),
}  # fmt: skip


def render(function, args, path, save=figures.save_figure):
    """Draw into `path` and return the figure behind the file."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", lambda figure, path: (kept.append(figure), save(figure, path)))
        assert function(path, *args) is None
    return kept[0]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Each case, drawn once: (path of the PNG, the figure behind it)."""
    path = tmp_path_factory.mktemp("case") / "figure.png"
    return path, render(*CASES[request.param], path)


@pytest.fixture
def drawn(tmp_path):
    """Draw something: (path of the PNG, the figure behind it)."""
    path = tmp_path / "figure.png"
    return lambda function, *args: (path, render(function, args, path))


def composed(function, *args):
    """The figure as composed, neither drawn nor saved: fast, and enough to look at lines and labels."""
    return render(function, args, "", save=lambda figure, path: None)


def texts(figure) -> list[Text]:
    """Every text that is shown; matplotlib also keeps tick labels beyond the ends of an axis."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def test_a_readable_png_of_sane_size_and_nothing_else_is_written(case):
    path, _ = case
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        assert abs(image.width - 902) <= 1 and 150 <= image.height <= 1000
        pixels = np.asarray(image)
    assert path.stat().st_size < 200_000
    assert os.listdir(path.parent) == ["figure.png"]
    assert (pixels != 255).any(-1).mean() > 0.01  # not blank


def test_nothing_is_cut_off_at_the_border(case):
    path, figure = case
    pixels = np.asarray(Image.open(path))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()
    width, height = figure.get_size_inches() * figure.dpi
    for text in texts(figure):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text.get_text()


def test_no_text_lies_over_another_or_over_a_picture(case):
    _, figure = case
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert boxes
    pictures = [("a picture", axes.get_window_extent()) for axes in figure.axes if axes.images]
    for i, (label, box) in enumerate(boxes):
        for other, second in boxes[i + 1 :] + pictures:
            wide = min(box.x1, second.x1) - max(box.x0, second.x0)
            high = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert wide <= 0 or high <= 1.5, (label, other)  # a line's box holds a pixel of air on each side


@pytest.mark.parametrize("name", ["curves of one record", "retrieval_grid of long captions", "masked_words"])
def test_equal_input_gives_equal_files(name, tmp_path):
    for file in ("one.png", "two.png"):
        CASES[name][0](tmp_path / file, *CASES[name][1])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("step", [(Image.Image, "save"), (os, "replace")])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "curves.png"
    curves(path, records(), TERMS, {})
    old = path.read_bytes()

    def full(*args, **kwargs):
        for file in args:
            if hasattr(file, "write"):
                file.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(*step, full)
    with pytest.raises(OSError, match="disk full"):
        curves(path, records(3), TERMS, {})
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["curves.png"]


# curves ---------------------------------------------------------------------------------------------


def test_chance_lines_are_dashed_and_named():
    figure = composed(curves, records(), TERMS, {"masked_object": 0.25, "matching": 0.5, "pointing": 0.5})
    lines = {line.get_ydata()[0] for line in figure.axes[1].lines if line.get_linestyle() == "--"}
    assert lines == {25.0, 50.0}
    labels = [text.get_text() for text in figure.axes[1].texts if text.get_color() == GREY]
    assert labels == ["chance 25 %: masked object", "chance 50 %: matching, pointing"]


def test_axes_have_names_and_units():
    figure = composed(curves, records(), TERMS, CHANCE)
    names = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert names == [
        ("optimisation step", "loss (nats; wpa: cosine cost)"),
        ("training time (minutes)", "accuracy (%)"),
    ]


def test_the_terms_that_the_records_have_are_drawn_in_their_order():
    lines = [{"step": i, "seconds": i, "mlm": 1.0, "new_term": 2.0, "accuracy": 0.5} for i in range(3)]
    figure = composed(curves, lines, ("new_term", "mlm", "itm"), {})
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(labels) == ["mlm 1.00", "new term 2.00"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "last, unit, shown", [(90, "seconds", 90), (900, "minutes", 15), (36_000, "hours", 10)]
)
def test_time_is_told_in_a_fitting_unit(last, unit, shown):
    lines = [{"step": i, "seconds": last * i / 4, "loss": 1.0, "matching": 0.5} for i in range(5)]
    figure = composed(curves, lines, TERMS, {"matching": 0.5})
    assert figure.axes[1].get_xlabel() == f"training time ({unit})"
    assert figure.axes[1].lines[0].get_xdata()[-1] == pytest.approx(shown)


def test_the_bold_line_is_the_mean_of_the_thin_one():
    lines = [{"step": i, "seconds": i, "loss": float(i % 2)} for i in range(400)]
    figure = composed(curves, lines, TERMS, {})
    thin, bold = figure.axes[0].lines[:2]
    assert thin.get_ydata().tolist() == [i % 2 for i in range(400)]
    assert bold.get_ydata() == pytest.approx(0.5) and bold.get_xdata()[-1] == 399


def test_missing_and_infinite_values_are_passed_over():
    lines = [{"step": i, "seconds": i, "loss": v} for i, v in enumerate([3.0, None, float("nan"), 1.0])]
    figure = composed(curves, [*lines, {"step": 4, "seconds": 4}], TERMS, {})
    assert figure.axes[0].lines[1].get_ydata().tolist() == [3.0, 1.0]


# The pictures ---------------------------------------------------------------------------------------


def green(pixels: np.ndarray) -> np.ndarray:
    colour = [int(GREEN[i : i + 2], 16) for i in (1, 3, 5)]
    return (pixels == colour).all(-1)


@pytest.mark.parametrize("hit", [None, 0, 2, 4])
def test_the_frame_is_around_the_right_picture_only(drawn, hit):
    path, figure = drawn(retrieval_grid, [("a dog", [scene(k) for k in range(5)], hit)])
    columns = np.flatnonzero(green(np.asarray(Image.open(path))).any(0))
    if hit is None:
        assert len(columns) == 0
        assert any(text.get_text() == "right picture not among these" for text in figure.texts)
    else:
        box = figure.axes[hit].get_window_extent()
        assert abs(columns[0] - box.x0) < 5 and abs(columns[-1] - box.x1) < 5


def test_pictures_keep_their_proportions(drawn):
    _, figure = drawn(retrieval_grid, [("a dog", [scene(0, 40, 80), scene(0, 90, 30)], 0)])
    shapes = [axes.get_window_extent() for axes in figure.axes]
    assert [box.width / box.height for box in shapes] == pytest.approx([2, 1 / 3])


def heat_of(figure, word: int) -> np.ndarray:
    """The opacity of the heat of one word: the second image of its panel."""
    return figure.axes[1 + word].images[1].get_array()[..., 3]


def test_heat_is_the_z_score_of_each_word_clamped_to_one_and_three():
    heat = np.random.default_rng(0).standard_normal((2, 12, 12))
    heat[1] *= 1e-6  # the scale of a word must not matter
    heat[0, 5, 7] = 30.0
    heat[1, 2, :3] = np.array([6.0, 4.5, 4.2]) * 1e-6  # 3 is where the scale ends, not the largest value
    figure = composed(alignment, [(scene(0), ["dog", "guitar"], heat, BOXES)])
    for word in (0, 1):
        z = (heat[word] - heat[word].mean()) / heat[word].std()
        shown = np.asarray(heat_of(figure, word), float)
        assert (shown[z <= 1] == 0).all() and (shown[z >= 3] == 0.9).all()
        middle = (z > 1) & (z < 3)
        assert np.allclose(shown[middle] / 0.9, (z[middle] - 1) / 2)
    assert heat_of(figure, 0).argmax() == 5 * 12 + 7 and ((z > 3) & (z < 4)).any()


def test_a_word_spread_evenly_shows_no_heat():
    figure = composed(alignment, [(scene(0), ["dog"], np.full((1, 4, 4), 1 / 3), BOXES)])
    assert (heat_of(figure, 0) == 0).all()


def test_heat_and_boxes_lie_in_the_coordinates_of_the_picture():
    figure = composed(alignment, [(scene(0, 30, 60), ["dog"], np.eye(3)[None], np.array([[10, 5, 25, 20]]))])
    picture, heat = figure.axes[1].images
    assert heat.get_extent() == pytest.approx(picture.get_extent())
    corners = figure.axes[1].patches[0].get_bbox()
    # Pixel 10 is drawn from 9.5 to 10.5, so a box over the pixels 10…24 runs from 9.5 to 24.5.
    assert corners.extents == pytest.approx([9.5, 4.5, 24.5, 19.5])


def test_bars_are_as_long_as_the_probabilities_and_the_right_one_is_green(drawn):
    rows = [(scene(0), "a [MASK]", TOP, "bear"), (scene(1), "two [MASK]", TOP, "cat")]
    path, figure = drawn(masked_words, rows)
    for axes in figure.axes[1::2]:
        assert [bar.get_width() for bar in axes.patches] == [p for _, p in TOP]
        assert axes.get_xlim() == (0, 1)
    first, second = figure.axes[1], figure.axes[3]
    dark = [bar.get_facecolor()[:3] for bar in first.patches]
    assert [i for i, colour in enumerate(dark) if colour != dark[0]] == [1]
    assert len({bar.get_facecolor() for bar in second.patches}) == 1
    labels = [text.get_text() for axes in (first, second) for text in axes.texts]
    assert [label for label in labels if label.startswith("right")] == ["right: cat"]
    assert green(np.asarray(Image.open(path))).any()


def test_dollar_signs_are_letters():
    """matplotlib would typeset what stands between two dollar signs as mathematics."""
    money = "$5 or $6"
    for function, row in [
        (retrieval_grid, (money, [scene(0)], 0)),
        (alignment, (scene(0), [money], HEAT[:1], BOXES)),
        (masked_words, (scene(0), money, [(money, 0.5)], "$1 $")),
    ]:
        shown = [text for text in texts(composed(function, [row])) if "$" in text.get_text()]
        assert shown and not any(text.get_parse_math() for text in shown)


IMAGE = scene(0)


@pytest.mark.parametrize(
    "function, args, message",
    [
        (curves, ([], TERMS, {}), "records must not be empty"),
        (
            curves,
            ([{"step": 1, "seconds": 1, "lr": 0.1}], TERMS, {}),
            "records must hold numbers for one of loss",
        ),
        (curves, (records(), TERMS, {"counting": 0.2}), "chance must name accuracies .* got 'counting'"),
        (retrieval_grid, ([],), "rows must not be empty"),
        (retrieval_grid, ([("a dog", [], None)],), "rows must hold 1 to 5 images"),
        (retrieval_grid, ([("a dog", [IMAGE] * 6, 0)],), "rows must hold 1 to 5 images"),
        (retrieval_grid, ([("a dog", [IMAGE], 1)],), "rows must hold 1 to 5 images and the index of one"),
        (
            retrieval_grid,
            ([("a dog", [IMAGE / 255], 0)],),
            r"image must be \(H, W, 3\) uint8, got .* float64",
        ),
        (alignment, ([],), "rows must not be empty"),
        (alignment, ([(IMAGE, [], HEAT[:0], BOXES)],), "words must not be empty"),
        (alignment, ([(IMAGE, ["dog"], HEAT, BOXES)],), r"heat must have shape \(1 words, rows, columns\)"),
        (masked_words, ([],), "rows must not be empty"),
        (masked_words, ([(IMAGE, "a [MASK]", [], "dog")],), "candidates must be one to five"),
    ],
)
def test_empty_and_wrong_input_is_refused_and_nothing_is_written(tmp_path, function, args, message):
    with pytest.raises(ValueError, match=message):
        function(tmp_path / "figure.png", *args)
    assert os.listdir(tmp_path) == []
