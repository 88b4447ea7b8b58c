"""The course's exercises: their table, the learner's files, and how far each one is.

An exercise is one public function of the library that the learner writes again. The table is
chapters/exercises.toml; the learner's file is chapters/exercises/<concept>.py, or lies in the folder that
MINIVLP_EXERCISES names. Files are read by path and parsed, not imported, so that a file that is no Python
stops nothing else, whatever its bytes are.
"""

import ast
import hashlib
import os
import tomllib
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("MINIVLP_EXERCISES", ROOT / "chapters" / "exercises"))


class Todo(NotImplementedError):
    """Raised by a function that is still to be written."""


@dataclass(frozen=True)
class Exercise:
    """One function to write. `rung`: np, torch, fused or plain; `trains`: a model whose training calls it."""

    name: str
    concept: str
    rung: str
    chapter: int
    difficulty: int
    minutes: int
    hints: tuple[str, str, str]
    trains: str = ""

    @property
    def family(self) -> str:
        """The key of the library's RUNGS and of the laws."""
        return self.name.removesuffix(f"_{self.rung}")

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.concept}.py"

    @property
    def where(self) -> str:
        """The file to open, as seen from the root, with the line of the function."""
        try:
            node = functions(read(self.path)).get(self.name)
        except (OSError, SyntaxError):
            node = None
        return shown(self.path) + (f":{node.lineno}" if node else "")


def shown(path: Path) -> str:
    """A path from the root where it lies inside, else as it is."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


@cache
def table() -> tuple[dict[int, str], dict[str, Exercise]]:
    """{number: title} of the chapters and {name: exercise}, in the order of the course."""
    content = tomllib.loads((ROOT / "chapters" / "exercises.toml").read_text(encoding="utf-8"))
    rows = content["exercise"].items()
    found = [Exercise(name, **row | {"hints": tuple(row["hints"])}) for name, row in rows]
    titles = {int(number): title for number, title in content["chapters"].items()}
    return titles, {one.name: one for one in sorted(found, key=lambda one: one.chapter)}


def exercises(concept: str | None = None) -> list[Exercise]:
    """The exercises of a concept, or all, in the order of the course."""
    return [one for one in table()[1].values() if concept in (None, one.concept)]


def find(name: str) -> Exercise:
    """The exercise of this name. Raises ValueError that offers the nearest names."""
    known = table()[1]
    if name not in known:
        near = get_close_matches(name, known, 3, 0.4)
        raise ValueError(
            f"there is no exercise {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    return known[name]


def read(path: Path) -> str:
    """The text of a Python file: UTF-8, a byte order mark and kinds of line ends read over.

    Raises OSError, and SyntaxError with the line of a byte that no such file has.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        told, place = f"byte 0x{data[error.start]:02X} is no UTF-8; save the file as UTF-8", error.start
    else:
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
        told, place = "it holds a NUL byte", data.index(0)
    raise SyntaxError(told, (str(path), data.count(b"\n", 0, place) + 1, None, None))


@lru_cache(64)
def parsed(source: str) -> ast.Module:
    """The syntax tree of a text. Raises SyntaxError for all that Python would not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape is told when the file is run
            tree = ast.parse(source)
            compile(source, "exercise", "exec")  # finds a return outside of a function, too
        ast.dump(tree)
    except (RecursionError, MemoryError):
        raise SyntaxError("it is nested too deeply", ("exercise", 1, None, None)) from None
    except ValueError as error:
        raise SyntaxError(str(error), ("exercise", 1, None, None)) from None
    return tree


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions at the top of a file. Raises SyntaxError."""
    return {node.name: node for node in parsed(source).body if isinstance(node, ast.FunctionDef)}


def is_stub(node: ast.FunctionDef) -> bool:
    """A docstring and `raise Todo`, nothing else."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    names = {n.id for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.Name)}
    return len(body) == 1 and isinstance(body[0], ast.Raise) and names == {"Todo"}


def fault(one: Exercise) -> str | None:
    """Why there is nothing to run: no file, no such function, a line that is no Python. None if there is."""
    reset = f"`python -m chapters reset {one.name}` restores it"
    try:
        present = functions(read(one.path))
    except FileNotFoundError:
        return f"{shown(one.path)} is missing; {reset}"
    except OSError as error:
        return f"{shown(one.path)} cannot be read: {error.strerror}"
    except SyntaxError as error:
        return f"{shown(one.path)}:{error.lineno or 1} cannot be read: {error.msg}"
    return None if one.name in present else f"{shown(one.path)} has no {one.name}; was it renamed? {reset}"


def untouched(one: Exercise) -> bool:
    """Is it still the stub?"""
    return fault(one) is None and is_stub(functions(read(one.path))[one.name])


def fingerprint(one: Exercise) -> str:
    """A hash of the function and of all in its file that it uses: the laws' verdict holds while it does."""
    top = parsed(read(one.path)).body
    named = {node.name: node for node in top if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used, queue = [node for node in top if node not in named.values()], [one.name]
    while queue:
        if (node := named.pop(queue.pop(), None)) is not None:
            used.append(node)
            queue += sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name)})
    return hashlib.sha256("\n".join(map(ast.dump, used)).encode()).hexdigest()[:16]


def state(one: Exercise, verdicts: dict[str, list[str]]) -> str:
    """todo, right, wrong or unchecked, by the `verdicts` of earlier runs, {name: [fingerprint, outcome]}."""
    if fault(one):
        return "wrong"
    if untouched(one):
        return "todo"
    checked, verdict = verdicts.get(one.name, ["", ""])
    if checked != fingerprint(one):
        return "unchecked"
    return "right" if verdict == "passed" else "wrong"


MARKS = {"todo": ".", "right": "#", "wrong": "x", "unchecked": "?"}


def course_map(verdicts: dict[str, list[str]]) -> list[str]:
    """A bar per chapter, the count, and the next file to open."""
    titles, known = table()
    states = {name: state(one, verdicts) for name, one in known.items()}
    lines = ["the course:  # right   x breaks a law   ? written, not checked   . to do"]
    for chapter, title in titles.items():
        bar = "".join(MARKS[states[one.name]] for one in known.values() if one.chapter == chapter)
        if bar:
            lines.append(f"  {chapter:02d} {title:<34} {bar:<8} {bar.count('#')}/{len(bar)}")
    done = sum(one == "right" for one in states.values())
    lines.append(f"{done}/{len(states)} exercises")
    ahead = next_exercise(verdicts)
    if ahead is None:
        return [*lines, "all exercises obey their laws"]
    about = f"{ahead.name}, difficulty {ahead.difficulty}, {ahead.minutes} minutes"
    return [*lines, f"next: {ahead.where} ({about}; stuck? python -m chapters hint {ahead.name})"]


def next_exercise(verdicts: dict[str, list[str]]) -> Exercise | None:
    """The first that is begun and not right, else the first to do."""
    left = [(state(one, verdicts), one) for one in exercises()]
    for wanted in (("wrong", "unchecked"), ("todo",)):
        for what, one in left:
            if what in wanted:
                return one
    return None
