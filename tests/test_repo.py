"""The house keeps its own rules: short files, imports in one direction, laws for all rungs, a true README."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from minivlp.evaluation.vilt import MEASURES
from minivlp.models.vilt import Vilt, ViltConfig, save_vilt
from minivlp.text import WordPiece
from tests.course import exercises
from tests.laws import BUGS, LAWS, load_bugs
from tests.size import CEILINGS, LIBRARY, LONGEST, PLUMBING, ROOT, code_lines, plumbing, room, sizes

CONCEPTS = sorted(p.stem for p in (ROOT / "tests" / "bugs").glob("*.py") if p.stem != "__init__")
# Room → the rooms that its modules may import, besides their own. Kernels are imported lazily by ideas.
ARROWS = {
    "core": set(),
    "ideas": {"core", "kernels"},
    "kernels": {"core", "ideas"},
    "models": {"core", "ideas"},
    "data": {"core", "ideas"},
    "evaluation": {"core", "ideas", "models", "data"},
    "training": {"core", "ideas", "models", "data"},
    "pictures": {"core", "ideas", "models", "data", "evaluation", "training"},
    "recipes": {"core", "ideas", "models", "data", "evaluation", "training", "pictures"},
    "bench": {"core", "ideas", "kernels", "models", "training", "pictures"},
    "claims": {"core", "ideas", "models", "data", "evaluation", "training", "pictures", "recipes", "bench"},
    "commands": {"core", "training", "recipes"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in LIBRARY}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_files_are_short_and_open_with_what_they_are(path):
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), f"{path.name} has no docstring"
    assert code_lines(source) <= LONGEST, f"{path.name} has {code_lines(source)} lines of code"


def imported(path: Path, lazily: bool = True) -> set[str]:
    """The modules of the project that a file imports; lazily: also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return {name for name in names if name in MODULES or name.split(".")[0] in ("tests", "chapters")}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_arrows_point_one_way(path):
    own = room(path)
    for name in imported(path):
        assert not name.startswith(("tests", "chapters")), f"the library imports {name}"
        other = room(MODULES[name])
        if name != "minivlp" and other != own:
            assert other in ARROWS[own], f"{name_of(path)}, of {own}, imports {name}, of {other}"
    if own == "ideas":
        kernels = {name for name in imported(path, lazily=False) if name.startswith("minivlp.kernels")}
        assert not kernels, f"{path.name} imports Triton's kernels before they are asked for"


def test_no_circle_of_imports():
    """Modules can be put in an order in which each imports earlier ones alone."""
    needs = {name: imported(path, lazily=False) - {name, "minivlp"} for name, path in MODULES.items()}
    for name in needs:  # importing a module imports the folders that it lies in
        needs[name] -= {name.rpartition(".")[0]}
    while ready := [name for name, others in needs.items() if not others]:
        for name in ready:
            del needs[name]
        for others in needs.values():
            others.difference_update(ready)
    assert not needs, f"these import one another: {sorted(needs)}"


def test_the_top_folder_holds_ideas_and_lists_them():
    """`minivlp/__init__.py` has a line for every module at the top, and there is no other."""
    listed = re.findall(r"^    (\w+) {2,}\S", importlib.import_module("minivlp").__doc__, re.MULTILINE)
    top = {path.stem for path in LIBRARY if room(path) == "ideas"}
    rooms = {path.name for path in (ROOT / "minivlp").iterdir() if (path / "__init__.py").is_file()}
    assert len(set(listed)) == len(listed) and set(listed) == top | rooms
    assert top == {"stream", *CONCEPTS}


def test_rooms_stay_below_their_ceilings():
    total = sizes()
    assert {name: n for name, n in total.items() if n > CEILINGS[name]} == {}
    assert plumbing(total) <= PLUMBING


@pytest.mark.parametrize("concept", CONCEPTS)
def test_every_family_of_rungs_has_laws_and_bugs(concept):
    load_bugs(concept)
    rungs = importlib.import_module(f"minivlp.{concept}").RUNGS
    for family, ladder in rungs.items():
        assert LAWS.get(family), f"{family} has no law"
        assert len(BUGS.get(family, {})) >= 5, f"{family} has fewer than five known bugs"
        assert "plain" in ladder or {"np", "torch"} <= set(ladder), f"{family} lacks a rung"


@pytest.mark.slow
def test_the_base_install_is_enough():
    """Importing every module but the kernels, which are Triton's, needs none of the peers."""
    peers = [
        "safetensors",
        "transformers",
        "tokenizers",
        "ot",
        "scipy",
        "triton",
        "open_clip",
        "peft",
        "torchmultimodal",
    ]
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in LIBRARY
        if not p.stem.startswith("__") and p.parent.name != "kernels"
    ]
    code = f"import sys, importlib; sys.modules.update(dict.fromkeys({peers!r}))\n"
    code += f"for name in {names!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    """Published weights in five lines, on a small model of their layout; then two losses in a loop."""
    words = WordPiece.train(["a bunch of cats laying on a couch"], 64, min_count=1)
    config = ViltConfig(vocab_size=len(words), dim=64, layers=1, heads=1, hidden=64)
    save_vilt(Vilt(config), tmp_path / "vilt-b32-mlm")
    (tmp_path / "vilt-b32-mlm" / "vocab.txt").write_text("\n".join(words.tokens) + "\n")
    Image.new("RGB", (640, 480), (9, 99, 200)).save(tmp_path / "cats.jpg")
    monkeypatch.chdir(tmp_path)
    losses, published = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    exec(published, {})
    names = {name: torch.randn(4, 8, requires_grad=True) for name in ("images", "texts")}
    names |= {name: torch.randn(4, n, 8, requires_grad=True) for name, n in (("words", 5), ("patches", 6))}
    exec(losses, names | {"scale": 10.0, "word_mask": torch.ones(4, 5, dtype=torch.bool)})
    assert all(tensor.grad.abs().sum() > 0 for tensor in names.values())


def test_readme_shows_the_shipped_numbers():
    """Its table is the evaluation of the shipped model, digit for digit, and its links lead somewhere."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = json.loads((ROOT / "chapters" / "weights" / "vilt_tiny.json").read_text(encoding="utf-8"))[
        "numbers"
    ]
    for measure in (*MEASURES, "retrieval_itm"):
        seen, unseen = (numbers["details"][split][measure] for split in ("seen", "unseen"))
        cells = [f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})" for m in (seen, unseen)]
        assert " | ".join(cells) in readme, f"the README's row of {measure} must hold {cells}"
    headings = {line.lower().replace(" ", "-").replace("##-", "#", 1) for line in readme.splitlines()}
    for link in [part.split(")")[0] for part in readme.split("](")[1:]]:
        found = link in headings if link.startswith("#") else (ROOT / link).exists()
        assert found, f"README links to {link}, which does not exist"


def test_readme_shows_rows_of_the_committed_bench():
    readme, bench = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "chapters/bench.md"))
    rows = readme.split("## Fused rungs")[1].split("\n## ")[0].splitlines()
    shown = [row for row in rows if row.startswith("|")]
    assert len(shown) >= 8 and set(shown) <= set(bench.splitlines())


def section(heading: str) -> list[str]:
    """The lines of a section of the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()


def test_readme_is_short_and_adds_up_the_exercises():
    """Its exercises and minutes are those of exercises.toml, and its columns sum to them."""
    assert (
        len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 230
    )  # a row a family and a part
    minutes = [one.minutes for one in exercises()]
    course = section("The course")
    assert f"{len(minutes)} exercises are planned at {sum(minutes):,} minutes" in " ".join(course)
    cells = [line.strip("| ").split(" | ")[-2:] for line in course if line.startswith("| ")][1:]
    assert [sum(map(int, column)) for column in zip(*cells, strict=True)] == [len(minutes), sum(minutes)]


def test_readme_says_what_each_idea_imports():
    """A loss can be copied with these files and core/, so the table of ideas must be whole and true."""
    listed = {}
    for row in section("One loss in your own loop"):
        ideas = re.findall(r"\]\(minivlp/(\w+)\.py\)", row)
        listed |= dict.fromkeys(ideas, row.split(" | ")[2] if ideas else "")
    assert set(listed) == {*CONCEPTS, "stream"}
    for idea, cell in listed.items():
        names = {name.split(".")[1] for name in imported(ROOT / "minivlp" / f"{idea}.py") if "." in name}
        assert cell == (", ".join(sorted(names - {"core", "kernels"})) or "–"), f"the README's row of {idea}"


def test_readme_names_every_room():
    rooms = [p.parent.name for p in (ROOT / "minivlp").glob("*/__init__.py")]
    tree = " ".join(section("From the command to the loss in three hops")).split()
    assert len(rooms) > 8 and [room for room in rooms if f"{room}/" not in tree] == []


def test_every_package_and_every_file_that_is_read_is_in_the_wheel():
    """The lists of pyproject.toml, beside what lies in the folders."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "minivlp").rglob("__init__.py")}
    assert set(told["packages"]) == found | set(told["package-dir"])
    for package, folder in told["package-dir"].items():
        patterns = told["package-data"][package]
        listed = {path for pattern in patterns for path in (ROOT / folder).glob(pattern)}
        left_out = {p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"} - listed
        assert not left_out, f"{package} leaves out {left_out}"
