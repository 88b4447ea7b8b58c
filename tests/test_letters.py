"""The table of letters and the glossary of chapters/README.md, and the questions of part I."""

import re

import pytest

from chapters.build import sources
from tests.course import ROOT, exercises

PAGE = (ROOT / "chapters" / "README.md").read_text(encoding="utf-8")
PART = [source for source in sources() if int(source.stem[:2]) <= 8]
TEXT = " ".join(source.read_text(encoding="utf-8").replace("\n# ", " ") for source in PART)
MINUTES = {"I": range(9), "II": range(9, 14), "III": range(14, 20), "IV": range(20, 25), "V": range(25, 31)}


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_a_letter_stands_once_in_the_table_and_is_used():
    cells = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", section("Letters"), re.MULTILINE)[1:]
    letters = [letter for cell in cells for letter in cell.split(", ")]
    assert len(letters) > 20 and len(set(letters)) == len(letters)
    names = {"η": r"\\eta", "λ": r"\\lambda", "ε": r"\\varepsilon", "W": "W_"}
    for letter in letters:
        plain = letter.split()[0]
        assert re.search(names.get(plain, rf"(?<![A-Za-z]){plain}(?![a-z])"), TEXT), letter


def test_every_term_of_the_glossary_is_used_and_stands_in_order():
    terms = re.findall(r"\*\*([^*]+)\*\*:", section("Glossary"))
    assert len(terms) >= 25 and terms == sorted(terms)
    for term in terms:
        assert term in TEXT, f"{term} is explained and used nowhere in part I"


@pytest.mark.parametrize("source", PART, ids=lambda p: p.stem)
def test_a_chapter_ends_with_questions_whose_answers_are_folded(source):
    if source.stem.startswith("03"):
        pytest.skip("chapter 03 has exercises alone so far")
    text = source.read_text(encoding="utf-8")
    assert text.count("<details>") == text.count("</details>") == text.count("</summary>") >= 4


def test_part_one_has_exercises_of_all_kinds():
    kinds = re.findall(r"<summary>\d\. <i>([^.]+)\.</i>", TEXT)
    code = [one for one in exercises() if one.chapter <= 8]
    assert len(kinds) + len(code) >= 50
    assert sum("Derive" in kind for kind in kinds) >= 8 and sum("Predict" in kind for kind in kinds) >= 8
    assert sum("epair" in kind or kind in ("Ablate", "Break") for kind in kinds) >= 6


def test_the_hours_are_the_minutes_of_the_exercises():
    for part, chapters in MINUTES.items():
        minutes = sum(one.minutes for one in exercises() if one.chapter in chapters)
        told = re.search(rf"^\| {part} \|.*\| ([\d.]+) hours \|$", PAGE, re.MULTILINE)[1]
        assert abs(float(told) - minutes / 60) <= 0.5, f"part {part} has {minutes} minutes"
