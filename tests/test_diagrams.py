"""The diagrams: drawn by code, in step with it, readable on a phone, and each shown with words beside it."""

import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from chapters import animate
from chapters.build import sources
from chapters.diagrams import DRAWINGS, FOLDER, KINDS, write
from minivlp.recipes.vilt import PRESETS, ViltRecipe
from tests.course import ROOT

EACH = pytest.mark.parametrize("name", DRAWINGS)
PAGES = [*sources(), ROOT / "README.md", ROOT / "chapters" / "README.md"]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_files_are_what_the_code_draws(tmp_path):
    for path in write(tmp_path):
        told = "run python -m chapters diagrams"
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), told
    assert {p.stem for p in FOLDER.glob("*.svg")} == set(DRAWINGS) and len(DRAWINGS) >= 14


@EACH
def test_a_drawing_can_be_read_on_a_phone_and_by_a_screen_reader(name):
    """At most 520 units wide, letters of 14 or more, a title and a description; nothing beyond its edges."""
    drawing = ElementTree.fromstring(DRAWINGS[name]().svg())
    _, _, width, height = map(float, drawing.get("viewBox").split())
    assert width <= 520
    assert len(drawing.find(f"{SVG}title").text) > 8 and len(drawing.find(f"{SVG}desc").text) > 30
    for text in drawing.iter(f"{SVG}text"):
        size, x, at = float(text.get("font-size")), float(text.get("x")), text.get("text-anchor")
        assert size >= 14
        length = 0.56 * size * len(text.text)  # as wide as Helvetica's letters are in the mean
        left = {"start": x, "middle": x - length / 2, "end": x - length}[at]
        assert left > -5 and left + length < width + 5, text.text
    for rect in drawing.iter(f"{SVG}rect"):
        if rect.get("x"):
            x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
            assert x >= 0 and x + w <= width and y >= 0 and y + h <= height


def test_one_colour_has_one_meaning():
    assert len({fill for fill, _ in KINDS.values()}) == len(KINDS)


@EACH
def test_a_drawing_is_shown_with_an_alternative_text_and_what_to_see(name):
    pattern = rf"!\[([^\]]*)\]\([^)]*pictures/{name}\.svg\)(.{{0,120}})"
    pages = [page.read_text(encoding="utf-8") for page in PAGES if page.is_file()]
    found = [one for page in pages for one in re.findall(pattern, page, re.DOTALL)]
    assert found, f"{name}.svg is shown nowhere"
    for alternative, after in found:
        assert len(alternative) > 30 and "What to see" in after


def test_the_animation_is_small_and_its_frames_can_be_drawn_again(tmp_path):
    """Some twenty looks at one run; a model that has learnt nothing gives a frame of the same size."""
    with Image.open(animate.PATH) as moving:
        assert moving.n_frames >= 20 and animate.PATH.stat().st_size <= animate.LARGEST
        size = moving.size
    recipe = ViltRecipe(PRESETS["cpu"], {"preset": "cpu"})
    image = animate.frame(recipe.model.eval(), recipe, 0)
    assert image.size == size
    with Image.open(animate.write([image, image.rotate(180)], tmp_path / "two.gif")) as moving:
        assert moving.n_frames == 2
