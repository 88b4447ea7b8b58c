"""A learner's function under the laws: a broken law, told in a few lines that a learner can act on.

The report has the shrunk counterexample in one line, the hint of the law, and the name of the known mistake
(tests/mistakes.py) that the function seems to have made.
"""

import inspect
import linecache
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from hypothesis.errors import Flaky

from tests import limit
from tests.course import Exercise, Todo, shown
from tests.laws import LAWS, Bug, Law, Subject, load_bugs
from tests.mistakes import agree, answer, mistakes, parts
from tests.watched import (
    Attempt,
    Call,
    Fault,
    NotFinite,
    examples_of,
    file_of,
    load,
    quiet,
    small_tiles,
    solution,
)

ENDLESS = "Does every way through the loop come nearer to its end?"


@dataclass(frozen=True)
class Broken:
    """A law that is broken: at which input, how, and whose mistake it looks like."""

    law: Law
    example: str
    message: str
    kind: str  # wrong, fault (in the form of the answer), not finite, or slow
    mistake: Bug | None
    call: Call | None = None

    def lines(self) -> list[str]:
        found = [f"breaks the law {self.law.name}", f"  {self.example}: {self.message}"]
        if self.kind != "fault":  # a fault says what to do, and the law has nothing to do with it
            found.append(f"  hint: {ENDLESS if self.kind == 'slow' else self.law.hint}")
        if self.mistake:
            found.append(f"  looks like the known mistake {self.mistake.name}: {self.mistake.story}")
        return found


def broken(function: Callable, one: Exercise, law: Law, diagnose: bool = True) -> Broken | None:
    """Hold a function to one law: None when it obeys. Raises Todo when the function is not finished."""
    attempt = Attempt(function, one.rung, solution(one))
    try:
        with quiet(), small_tiles(), limit.threads_of(shown(one.path)), examples_of(law, attempt):
            law.check(attempt)
        return None
    except (Todo, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a learner's function raises is an answer to be told
        if attempt.failed is not None and isinstance(error, limit.TooLong):
            error = attempt.failed.error  # there was no time left to look for a smaller example
        example = attempt.example if isinstance(error, limit.TooLong) else attempt.failed or attempt.example
        kind = _kind_of(error)
        call = example.calls[-1] if kind == "slow" and example.calls else _telling(example.calls, one)
        mistake = None
        if diagnose and kind != "slow":
            mistake = next(iter(mistakes(function, one, law, example.calls)), None)
        return Broken(law, _example(one, call), _message(error, function, one, call), kind, mistake, call)


def _kind_of(error: BaseException) -> str:
    if isinstance(error, limit.TooLong):
        return "slow"
    if isinstance(error, NotFinite):
        return "not finite"
    wrong = isinstance(error, AssertionError | Flaky) and not isinstance(error, Fault)
    return "wrong" if wrong else "fault"


def verdicts(function: Callable, one: Exercise) -> Iterable[tuple[Law, Broken | None]]:
    """Each law of the exercise with what was found; the last one is that which took too long, if one did."""
    load_bugs(one.concept)
    for law in LAWS[one.family].values():
        found = broken(function, one, law)
        yield law, found
        if found and found.kind == "slow":
            return


def verdict(function: Callable, one: Exercise) -> Broken | None:
    """The broken law that says the most, or None.

    It is the law against the known mistake, where one is recognised; else the first that is broken by a wrong
    number; else the first that is broken.
    """
    first = None
    for law, found in verdicts(function, one):
        if found and found.mistake and found.mistake.caught_by != law.name:
            own = broken(function, one, LAWS[one.family][found.mistake.caught_by])
            return own or found
        if found and found.kind != "not finite":
            return found if found.kind == "wrong" or first is None else first
        first = first or found
    return first


def _example(one: Exercise, call: Call | None) -> str:
    """The question in one line: infonce(images=[[0.126]], texts=[[-0.132]], scale=0.3)."""
    if call is None:
        return f"{one.name} was not called"
    names = list(inspect.signature(solution(one)).parameters)
    question = dict(zip(names, call.args, strict=False)) | call.settings
    told = ", ".join(f"{name}={_brief(value)}" for name, value in question.items())
    return f"{'the gradients of ' * call.gradient}{one.name}({told})"


def _brief(value: Any) -> str:
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    if isinstance(value, np.ndarray):
        if value.size > 12:
            return f"an array of shape {value.shape}"
        tiny = value.dtype.kind == "f" and ((value != 0) & (abs(value) < 5e-4)).any()  # not to be told as 0
        form = {"float_kind": lambda number: f"{number:.3g}"} if tiny else None
        text = np.array2string(value, precision=3, separator=", ", suppress_small=True, formatter=form)
        return re.sub(r"\s*\n\s*", " ", text)
    if isinstance(value, np.random.Generator):
        return "rng"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping) and any(isinstance(entry, torch.Tensor) for entry in value.values()):
        return f"{len(value)} tensors"
    if is_dataclass(value) or inspect.isfunction(value):  # a batch; a loss that is given
        return "a " + getattr(value, "__name__", type(value).__name__).strip("<>")
    if isinstance(value, Mapping):  # a vocabulary: its special tokens are always there
        rest = {key: entry for key, entry in value.items() if not re.fullmatch(r"\[[A-Z]+\]", str(key))}
        return _cut("{" + "…, " * (len(rest) < len(value)) + repr(rest)[1:], 100)
    return _cut(repr(value), 60)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _telling(calls: list[Call], one: Exercise) -> Call | None:
    """The first call that the library answers in another way, else the first."""
    library = Subject(solution(one), one.rung)
    differing = (call for call in calls if not agree(answer(call, library), call.answer))
    return next(differing, calls[0] if calls else None)


def _message(error: BaseException, function: Callable, one: Exercise, call: Call | None) -> str:
    """The first line of an assertion; of another exception its name too, and the learner's own line.

    When the law itself stumbled over the answer, and the answer has another shape than the library's, the
    shapes are told.
    """
    if isinstance(error, Flaky):
        return "the same input gave two different answers: does it use global random numbers or keep a state?"
    line, last = _lines(error, file_of(function))
    if isinstance(error, limit.TooLong):
        return f"no end after {limit.SECONDS:g} seconds{_standing(file_of(function), line)}"
    text = _first_line(error)
    text = re.sub(r"\bnp\.(?:u?int|float|bool)\w*\(([^()]*)\)", r"\1", text)  # np.int64(3) is 3
    if isinstance(error, AssertionError):
        if not text or text.startswith("assert "):  # the law gave no words to it
            text = "not so: " + linecache.getline(*last).strip().removeprefix("assert ")
        return _cut(text, 160)
    if not line and (shapes := _misshapen(one, call)):
        return shapes
    where = f" in line {line}" if line else ""
    return f"raised {type(error).__name__}{where}: {_cut(text, 160)}"


def _lines(error: BaseException, file: str | None) -> tuple[int, tuple[str, int]]:
    """The innermost line of `file` where the error passed, 0 if none; file and line where it was raised."""
    line, last, trace = 0, ("", 0), error.__traceback__
    while trace:
        last = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if last[0] == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line, last


def _standing(file: str | None, line: int) -> str:
    """Where the learner's code stood when its time was over."""
    if not file or not line:
        return ""
    linecache.checkcache(file)
    return f"; it stood in line {line}: {linecache.getline(file, line).strip()}"


def _first_line(error: BaseException) -> str:
    try:
        return (str(error).strip().splitlines() or [""])[0]
    except Exception:  # a learner's own exception may not know its text
        return "an error without a text"


def _misshapen(one: Exercise, call: Call | None) -> str | None:
    """How the shapes of an answer differ from those of the library's."""
    if call is None or call.answer is None:
        return None
    wanted = answer(call, Subject(solution(one), one.rung))
    for yours, theirs in zip(parts(call.answer), parts(wanted), strict=False):
        if np.shape(yours) != np.shape(theirs):
            return f"your result has shape {np.shape(yours)}, expected {np.shape(theirs)}"
    return None


def fault_at_import(one: Exercise) -> str | None:
    """Why the learner's file cannot be run, in one line, or None."""
    try:
        load(one)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything may happen in a file that is being written
        line, _ = _lines(error, str(one.path))
        place = f"{shown(one.path)}:{line}" if line else shown(one.path)
        if isinstance(error, limit.TooLong):
            return f"{place} cannot be read to its end: {_message(error, load, one, None)}"
        return f"{place} raised {type(error).__name__}: {_cut(_first_line(error), 160)}"
    return None
