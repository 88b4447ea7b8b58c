"""The house keeps its own rules: short files, imports in one direction, laws for all rungs, a true README."""

import ast
import importlib
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from PIL import Image

from minivlp.evaluation.vilt import MEASURES
from minivlp.models.vilt import Vilt, ViltConfig, save_vilt
from minivlp.text import WordPiece
from tests.laws import BUGS, LAWS, load_bugs

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "minivlp").rglob("*.py"))
CONCEPTS = sorted(p.stem for p in (ROOT / "tests" / "bugs").glob("*.py") if p.stem != "__init__")
LONGEST = 320  # lines of code


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    inside = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            inside |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.string:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - inside)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_files_are_short_and_open_with_what_they_are(path):
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), f"{path.name} has no docstring"
    assert code_lines(source) <= LONGEST, f"{path.name} has {code_lines(source)} lines of code"


def imported(path: Path) -> set[str]:
    """The modules of the project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name.split(".")[0] in ("minivlp", "tests", "chapters")}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    names = imported(path)
    assert not any(name.startswith(("tests", "chapters")) for name in names)
    if path.parent.name == "minivlp" and path.stem in CONCEPTS:
        allowed = {"core", "stream", *CONCEPTS}
        used = {name.split(".")[1] for name in names if name.count(".")}
        assert used <= allowed, f"a concept imports {sorted(used - allowed)}"


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
    peers = ["safetensors", "transformers", "tokenizers", "ot", "scipy", "triton", "open_clip"]
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
    published, losses = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
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
    for link in [part.split(")")[0] for part in readme.split("](")[1:]]:
        assert (ROOT / link).exists(), f"README links to {link}, which does not exist"


def test_readme_shows_rows_of_the_committed_bench():
    readme, bench = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "chapters/bench.md"))
    rows = readme.split("## Fused rungs")[1].split("\n## ")[0].splitlines()
    shown = [row for row in rows if row.startswith("|")]
    assert len(shown) > 10 and set(shown) <= set(bench.splitlines())
