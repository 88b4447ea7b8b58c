"""A learner's function under the laws: the first broken law, told in a few lines that a learner can act on.

The report has the shrunk counterexample in one line, the hint of the law, and the name of the known mistake
(tests/bugs) whose answers are the learner's answers.
"""

import copy
import importlib
import inspect
import linecache
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis.errors import Flaky

from minivlp import stream
from minivlp.core import transport
from tests.course import Exercise, Todo, shown
from tests.laws import BUGS, LAWS, Bug, Law, Subject, load_bugs

KEPT = 12  # values and as many gradients of a law that are compared with the known mistakes
TRIED = 40  # calls of one example among which the telling one is looked for


@dataclass(frozen=True)
class Broken:
    """A law that is broken: at which input, how, and whose mistake it looks like."""

    law: Law
    example: str
    message: str
    mistake: Bug | None
    call: "Call | None" = None

    def lines(self) -> list[str]:
        found = [f"breaks the law {self.law.name}", f"  {self.example}: {self.message}"]
        found.append(f"  hint: {self.law.hint}")
        if self.mistake:
            found.append(f"  looks like the known mistake {self.mistake.name}: {self.mistake.story}")
        return found


@dataclass
class Call:
    """What a law asked, as it was before the call, and the answer."""

    gradient: bool
    args: tuple
    settings: dict
    answer: Any = None

    def ask(self, subject: Subject) -> Any:
        """The answer of another subject to the same question."""
        args, settings = copy.deepcopy((self.args, self.settings))
        return (subject.grads if self.gradient else subject)(*args, **settings)


class Attempt(Subject):
    """A function to be judged: a Subject that must answer in the right form and leave its inputs alone."""

    def __init__(self, function: Callable, rung: str, law: str = ""):
        super().__init__(self._checked, rung)
        self.original, self.law = function, law
        self.calls: list[Call] = []
        self.example: list[Call] = []  # the calls of the example that is being tried
        self.frame: types.FrameType | None = None

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self._watch(super().__call__, Call(False, args, settings))

    def grads(self, *args: Any, **settings: Any) -> tuple[np.ndarray, ...]:
        found = self._watch(super().grads, Call(True, args, settings))
        if self.rung == "fused":  # autograd cannot forget the upstream gradient, a backward by hand can
            value = np.asarray(self(*args, **{k: v for k, v in settings.items() if k != "grad"}))
            upstream = -2 * settings.get("grad", np.ones_like(value))
            other = super().grads(*args, **settings | {"grad": upstream})
            same = all(np.allclose(b, -2 * a, 1e-6, 1e-12) for a, b in zip(found, other, strict=True))
            assert same, "the gradients do not grow with the upstream gradient: multiply by it in backward"
        return found

    def _watch(self, ask: Callable, call: Call) -> Any:
        args, settings = call.args, call.settings
        call.args, call.settings = copy.deepcopy((args, settings))
        self._remember(call)
        call.answer = ask(*args, **settings)
        for was, now in zip((*call.args, *call.settings.values()), (*args, *settings.values()), strict=True):
            assert _same(was, now), "your function changed one of its inputs"
        answers = call.answer if isinstance(call.answer, tuple) else (call.answer,)
        if all(map(_finite, call.args)) and not all(map(_finite, answers)):
            nan = any(np.isnan(a).any() for a in answers if is_float(a))
            overflow = "your result is infinite: does an exp overflow, or a log meet 0?"
            raise AssertionError("your result holds NaN" if nan else overflow)
        return call.answer

    def _remember(self, call: Call) -> None:
        """Keep the call; a law that runs in a new frame has begun a new example."""
        frame = sys._getframe(3)
        while frame.f_back and frame.f_code.co_name != self.law:
            frame = frame.f_back
        if frame is not self.frame:
            self.frame, self.example = frame, []
        if len(self.example) < TRIED:
            self.example.append(call)
        if sum(kept.gradient is call.gradient for kept in self.calls) < KEPT:
            self.calls.append(call)

    def _checked(self, *args: Any, **settings: Any) -> Any:
        """The function's own answer, looked at before Subject takes it apart."""
        out = self.original(*args, **settings)
        assert out is not None, "your function returned None: is the return missing?"
        if self.rung in ("torch", "fused"):
            assert isinstance(out, torch.Tensor), f"your function returned {_kind(out)}, expected a tensor"
        if self.rung == "np" and isinstance(out, tuple):
            good = len(out) == 2 and isinstance(out[1], tuple | list)
            found = "(value, array)" if is_float(out[-1]) and len(out) == 2 else _kind(out)
            wanted = "(value, (gradient, …))" if found == "(value, array)" else "(value, gradients)"
            assert good, f"your function returned {found}, expected {wanted}"
            wanted = sum(is_float(a) for a in args)
            assert len(out[1]) == wanted, f"your function returned {len(out[1])} gradients, expected {wanted}"
        return out


def is_float(a: Any) -> bool:
    return isinstance(a, float) or (hasattr(a, "dtype") and "float" in str(a.dtype))


def _finite(a: Any) -> bool:
    a = a.detach().numpy() if isinstance(a, torch.Tensor) else a
    return not is_float(a) or bool(np.isfinite(a).all())


def _kind(out: Any) -> str:
    return f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, torch.Tensor):
        was, now = was.numpy(), now.numpy()
    if isinstance(was, np.ndarray):
        return was.shape == now.shape and np.array_equal(was, now, equal_nan=was.dtype.kind == "f")
    return isinstance(was, np.random.Generator) or was == now


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings about the numbers in a wrong answer: the law says what is wrong with it."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles smaller than the laws' arrays, so that a fused rung has to cross from one to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "TILE", (2, 3))
        patch.setattr(transport, "BLOCK", 4)
        yield


def broken(function: Callable, one: Exercise, law: Law, diagnose: bool = True) -> Broken | None:
    """Hold a function to one law: None when it obeys. Raises Todo when the function is not finished."""
    attempt = Attempt(function, one.rung, law.name)
    try:
        with quiet(), small_tiles():
            law.check(attempt)
        return None
    except Todo:
        raise
    except Exception as error:  # whatever a learner's function raises is an answer to be told
        mistake = next(iter(mistakes(function, one, law)), None) if diagnose else None
        call = _telling(attempt.example, one)
        return Broken(law, _example(one, call), _message(error, function, one, call), mistake, call)


def verdicts(function: Callable, one: Exercise) -> Iterable[tuple[Law, Broken | None]]:
    """Each law of the exercise with what was found."""
    load_bugs(one.concept)
    for law in LAWS[one.family].values():
        yield law, broken(function, one, law)


def mistakes(function: Callable, one: Exercise, law: Law) -> list[Bug]:
    """Known mistakes that answer as the function does wherever it is not the library; `law`'s own first."""
    load_bugs(one.concept)
    subject = Subject(function, one.rung)
    answers = [(call, _answer(call, subject)) for call in battery(one)]
    wrong = [(call, answer) for call, answer in answers if not _agree(call.answer, answer)]
    if len(wrong) < 3 or any(answer is None for _, answer in wrong):
        return []
    known = sorted(BUGS.get(one.family, {}).values(), key=lambda bug: bug.caught_by != law.name)
    rungs = {bug: Subject(bug.function, bug.rung) for bug in known}
    return [bug for bug in known if all(_agree(answer, _answer(call, rungs[bug])) for call, answer in wrong)]


@cache
def battery(one: Exercise) -> list[Call]:
    """Some questions of every law, with the library's answers."""
    calls = []
    for law in LAWS[one.family].values():
        library = Attempt(solution(one), one.rung, law.name)
        law.check(library)
        calls += library.calls
    return calls


def _answer(call: Call, subject: Subject) -> Any:
    """The subject's answer, None when it raises."""
    try:
        with quiet():
            return call.ask(subject)
    except Exception:  # what crashes gives no answer
        return None


def _telling(calls: list[Call], one: Exercise) -> Call | None:
    """The first call that the library answers in another way, else the first."""
    library = Subject(solution(one), one.rung)
    differing = (call for call in calls if not _agree(_answer(call, library), call.answer))
    return next(differing, calls[0] if calls else None)


def _agree(one: Any, other: Any) -> bool:
    """Are two answers the same, numbers up to rounding?"""
    if isinstance(one, list) or one is None or other is None:
        return isinstance(other, list) and one == other
    pairs = list(zip(*(a if isinstance(a, tuple) else (a,) for a in (one, other)), strict=False))
    return all(np.shape(a) == np.shape(b) and np.allclose(a, b, 1e-6, 1e-9, True) for a, b in pairs)


def solution(one: Exercise) -> Callable:
    """The library's own function."""
    return getattr(importlib.import_module(f"minivlp.{one.concept}"), one.name)


def load(one: Exercise) -> Callable:
    """The learner's function, read anew. Raises whatever the file raises."""
    module = types.ModuleType(f"exercises_{one.concept}")
    module.__file__ = str(one.path)
    sys.modules[module.__name__] = module  # dataclasses and pickles look their module up
    exec(compile(one.path.read_text(encoding="utf-8"), str(one.path), "exec"), module.__dict__)
    return getattr(module, one.name)


def _example(one: Exercise, call: Call | None) -> str:
    """The question in one line: infonce(images=[[0.126]], texts=[[-0.132]], scale=0.3)."""
    if call is None:
        return f"{one.name} was not called"
    names = list(inspect.signature(solution(one)).parameters)
    given = dict(zip(names, call.args, strict=False)) | call.settings
    parts = ", ".join(f"{name}={_brief(value)}" for name, value in given.items())
    return f"{'the gradients of ' * call.gradient}{one.name}({parts})"


def _brief(value: Any) -> str:
    value = value.numpy() if isinstance(value, torch.Tensor) else value
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
    if isinstance(value, Mapping):  # a vocabulary: its special tokens are always there
        rest = {key: entry for key, entry in value.items() if not re.fullmatch(r"\[[A-Z]+\]", str(key))}
        return _cut("{" + "…, " * (len(rest) < len(value)) + repr(rest)[1:], 100)
    return _cut(repr(value), 60)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _message(error: Exception, function: Callable, one: Exercise, call: Call | None) -> str:
    """The first line of an assertion; of another exception its name too, and the learner's own line.

    When the law itself stumbled over the answer, and the answer has another shape than the library's, the
    shapes are told.
    """
    if isinstance(error, Flaky):
        return "the same input gave two different answers: does it use global random numbers or keep a state?"
    text = (str(error).strip().splitlines() or [""])[0]
    text = re.sub(r"\bnp\.(?:u?int|float|bool)\w*\(([^()]*)\)", r"\1", text)  # np.int64(3) is 3
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    where, trace, last = "", error.__traceback__, ("", 0)
    while trace:
        last = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if last[0] == file:
            where = f" in line {trace.tb_lineno}"
        trace = trace.tb_next
    if isinstance(error, AssertionError):
        if not text or text.startswith("assert "):  # the law gave no words to it
            text = "not so: " + linecache.getline(*last).strip().removeprefix("assert ")
        return _cut(text, 160)
    if not where and (shapes := _misshapen(one, call)):
        return shapes
    return f"raised {type(error).__name__}{where}: {_cut(text, 160)}"


def _misshapen(one: Exercise, call: Call | None) -> str | None:
    """How the shapes of an answer differ from those of the library's."""
    if call is None or call.answer is None:
        return None
    answers = call.answer, _answer(call, Subject(solution(one), one.rung))
    for yours, wanted in zip(*(a if isinstance(a, tuple) else (a,) for a in answers), strict=False):
        if np.shape(yours) != np.shape(wanted):
            return f"your result has shape {np.shape(yours)}, expected {np.shape(wanted)}"
    return None


def fault_at_import(one: Exercise) -> str | None:
    """Why the learner's file cannot be run, in one line, or None."""
    try:
        load(one)
    except Exception as error:  # anything may happen in a file that is being written
        line, trace = "", error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == str(one.path):
                line = f":{trace.tb_lineno}"
            trace = trace.tb_next
        return f"{shown(one.path)}{line} raised {type(error).__name__}: {_cut(str(error), 160)}"
    return None
