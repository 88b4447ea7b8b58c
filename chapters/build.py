"""Run a chapter and write its notebook: from NN_name.py (percent format) to NN_name.ipynb, with outputs.

One direction only: the .py is the source. With the same versions a second build writes the same bytes. Times
differ from run to run, so a cell tagged `measured` keeps its outputs while its source stays as it is.
"""

import ast
import base64
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output
from PIL import Image

from minivlp.core.files import whole_file

CHAPTERS = Path(__file__).parent
LARGEST = 400_000  # bytes
ALTERNATIVE = 150  # letters of a figure's alternative text, before its last sentence
DPI, COLOURS, LIGHT = 120, 256, 40_000  # a figure of more bytes than LIGHT has a palette
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def sources(names: list[str] | None = None) -> list[Path]:
    """The chapters of these numbers or names, or all. Raises ValueError for one that is not there."""
    found = sorted(CHAPTERS.glob("[0-9][0-9]_*.py"))
    if not names:
        return found
    chosen = {name: [p for p in found if name in (p.stem, p.stem[:2], p.stem[3:])] for name in names}
    if missing := [name for name, paths in chosen.items() if not paths]:
        raise ValueError(f"there is no chapter {missing[0]}; there are {', '.join(p.stem for p in found)}")
    return [path for paths in chosen.values() for path in paths]


def build(names: list[str], measure: bool = False) -> None:
    """Write the notebooks, each chapter in a process of its own, so that none sees another's settings."""
    for source in sources(names):
        worker = get_context("spawn").Process(target=build_one, args=(source, measure))
        worker.start()
        worker.join()
        if worker.exitcode:
            raise ValueError(f"{source.name} does not run (see above)")
        print(f"wrote chapters/{source.stem}.ipynb, {source.with_suffix('.ipynb').stat().st_size:,} bytes")


def build_one(source: Path, measure: bool = False) -> None:
    """Run one chapter and write its notebook. Raises what the chapter raises."""
    os.environ["MPLBACKEND"] = "Agg"  # before matplotlib is imported
    target = source.with_suffix(".ipynb")
    notebook, before = read(source), measured(target)
    with contextlib.chdir(CHAPTERS):
        run(notebook)
    for cell in notebook.cells:
        if not measure and "measured" in cell.metadata.get("tags", []):
            cell.outputs = before.get(cell.source, cell.get("outputs", []))
    describe(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > LARGEST:
        raise ValueError(f"{target.name} has {len(text.encode()):,} bytes, at most {LARGEST:,} are allowed")
    with whole_file(target) as file:
        file.write(text.encode())


def describe(notebook: NotebookNode) -> None:
    """Give each figure an alternative text: what the Markdown that follows tells to see, else its neighbour.

    A paragraph that begins with "What to see" comes first, then any other behind the figure, then the last
    before it.
    """
    before: list[str] = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            before = paragraphs(cell) or before
        later = (c for c in notebook.cells[number + 1 :] if c.cell_type == "markdown")
        behind = next(map(paragraphs, later), [])
        seen = [text for text in behind if text.startswith("What to see")]
        text = [*seen, *behind, *before[::-1], ""][0].removeprefix("What to see: ")
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata = nbformat.from_dict({"image/png": {"alt": shorter(text)}})


def paragraphs(cell: NotebookNode) -> list[str]:
    """The paragraphs of a Markdown cell, each in one line, without headings, tasks, tables and formulas."""
    texts = [" ".join(text.split()) for text in cell.source.split("\n\n")]
    return [text for text in texts if not text.startswith(("#", "<", "|", "$", "!", "*", ">"))]


def shorter(text: str) -> str:
    """Whole sentences of a text, some ALTERNATIVE letters of it."""
    end = text.find(". ", ALTERNATIVE)
    return text if end < 0 else text[: end + 1]


def read(source: Path) -> NotebookNode:
    """The notebook of a chapter without outputs, its ids and metadata the same every time."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(KERNEL | {"language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
    return notebook


def measured(target: Path) -> dict[str, list]:
    """The outputs of the cells tagged `measured` that a notebook holds, by their source."""
    if not target.exists():
        return {}
    cells = nbformat.read(target, as_version=4).cells
    return {cell.source: cell.outputs for cell in cells if "measured" in cell.metadata.get("tags", [])}


def run(notebook: NotebookNode) -> None:
    """Run the code cells in order in one namespace and give each its outputs."""
    import matplotlib.pyplot as plt

    plt.close("all")  # figures that were left open before are not this chapter's
    names: dict[str, Any] = {"__name__": "__main__"}
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(codes, 1):
        outputs, text = [], io.StringIO()

        def flush(outputs: list = outputs, text: io.StringIO = text) -> None:
            if text.getvalue():
                outputs.append(new_output("stream", name="stdout", text=text.getvalue()))
                text.seek(0)
                text.truncate()

        def show(*args: Any, outputs: list = outputs, flush: Any = flush, **settings: Any) -> None:
            flush()
            outputs += [new_output("display_data", {"image/png": png}) for png in _figures(plt)]

        plt.show = show
        with contextlib.redirect_stdout(text):
            value = _run_cell(cell.source, f"cell {number}", names)
        show()
        if value is not None:
            result = {"text/plain": repr(value)}
            outputs.append(new_output("execute_result", result, execution_count=number))
        cell.outputs, cell.execution_count = outputs, number


def _run_cell(source: str, title: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line when that is an expression not ended by a semicolon."""
    tree = ast.parse(source, title)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, title, "exec"), names)
    return eval(compile(last, title, "eval"), names) if last else None


def _figures(plt: Any) -> Iterator[str]:
    """Each open figure as a PNG in base64, then closed: large ones with a palette, a third of the bytes."""
    for number in plt.get_fignums():
        drawn, file = io.BytesIO(), io.BytesIO()
        plt.figure(number).savefig(drawn, format="png", dpi=DPI)
        plt.close(number)
        image = Image.open(drawn).convert("RGB")
        image.save(file, "png", optimize=True)
        if len(file.getvalue()) > LIGHT:
            file = io.BytesIO()
            image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
        yield base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    sys.exit("use python -m chapters build")
