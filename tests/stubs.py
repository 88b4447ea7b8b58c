"""The learner's files, made from the library's own source: signature, docstring, `raise Todo`."""

import ast
import re
from functools import cache
from pathlib import Path
from textwrap import fill, indent

from tests.course import ROOT, Exercise, exercises

HEADER = '''"""{names}

`pytest tests/test_{concept}.py` holds what you write here to the laws of minivlp/{concept}.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

'''


def library_source(concept: str) -> str:
    return (ROOT / "minivlp" / f"{concept}.py").read_text(encoding="utf-8")


def segment(source: str, node: ast.FunctionDef, last: int | None = None) -> str:
    """The lines of a function with its decorators, up to line `last` (None = its end)."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(source.split("\n")[first - 1 : last or node.end_lineno]) + "\n"


@cache
def library_functions(concept: str) -> tuple[str, dict[str, ast.FunctionDef]]:
    """The library's source and the functions in it."""
    source = library_source(concept)
    return source, {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}


def library_function(one: Exercise) -> tuple[str, ast.FunctionDef]:
    """The library's source and the function in it."""
    source, found = library_functions(one.concept)
    if one.name not in found:
        raise ValueError(f"minivlp/{one.concept}.py has no function {one.name}")
    return source, found[one.name]


def stub(one: Exercise) -> str:
    """One function of the learner's file."""
    source, node = library_function(one)
    return segment(source, node, node.body[0].end_lineno) + "    raise Todo\n"


@cache
def stub_file(concept: str) -> str:
    """The whole file: what signatures and third hints need is imported as the library does."""
    ours = exercises(concept)
    stubs = [stub(one) for one in ours]
    words = set(re.findall(r"\w+", "\n".join(re.sub(r'""".*?"""', "", s, flags=re.DOTALL) for s in stubs)))
    words |= {"np"} | ({"torch", "Tensor"} if any(one.rung in ("torch", "fused") for one in ours) else set())
    hints = set().union(*map(hinted, ours)) - {one.name for one in ours}
    words |= hints
    lines, home, own = {"import torch"} if "torch" in words else set(), set(), []
    if any(one.rung == "fused" for one in ours):
        home.add("from minivlp import stream")
    for node in ast.parse(library_source(concept)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            library = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minivlp")
            node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in words - {"stream"}]
            if node.names:
                (home if library else lines).add(ast.unparse(node))
        elif isinstance(node, ast.Assign):
            own += [t.id for t in node.targets if isinstance(t, ast.Name) and t.id in words]
        elif isinstance(node, ast.FunctionDef) and node.name in hints:
            own.append(node.name)
    if own:
        home.add(f"from minivlp.{concept} import {', '.join(sorted(own))}")
    standard = sorted(i for i in lines if i.split()[1].split(".")[0] not in ("numpy", "torch"))
    third = sorted(lines - set(standard), key=lambda i: (i.startswith("from"), i))
    blocks = [
        "\n".join(block) for block in (standard, third, [*sorted(home), "from tests import Todo"]) if block
    ]
    names = fill(f"Yours to write: {', '.join(one.name for one in ours)}.", 107, break_long_words=False)
    header = HEADER.format(names=names, concept=concept)
    return header + "\n\n".join([*blocks, *("\n" + text.rstrip() for text in stubs)]) + "\n"


def hinted(one: Exercise) -> set[str]:
    """The names that the lines of the third hint use and do not give themselves."""
    whole = stub(one).removesuffix("    raise Todo\n") + indent(one.hints[2], "    ")
    nodes = list(ast.walk(ast.parse(whole)))
    given = {node.arg for node in nodes if isinstance(node, ast.arg)}
    given |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {node.id for node in nodes if isinstance(node, ast.Name)} - given


def write_missing(folder: Path) -> list[Path]:
    """Write the files that are not there; returns them."""
    missing = [folder / f"{c}.py" for c in dict.fromkeys(one.concept for one in exercises())]
    missing = [path for path in missing if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        path.write_text(stub_file(path.stem), encoding="utf-8")
    return missing
