"""A function that is watched while laws ask it: what it was asked, what it answered, how long it took.

The laws know nothing of it. They see a Subject, and hypothesis a test that is told of every example.
"""

import copy
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis.errors import HypothesisException, StopTest
from hypothesis.strategies import DataObject

from minivlp import stream
from minivlp.core import transport
from tests.course import Exercise, exercises, fault, read, shown, untouched
from tests.laws import Law, Subject, parameters
from tests.limit import Clock, TooLong, hard, threads_of

KEPT = 12  # examples of a law that are remembered from the first
TRIED = 40  # calls that are remembered of an example


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


class Fault(AssertionError):
    """What no law needs to be asked about: the answer has the wrong form, or an input was changed."""


class NotFinite(AssertionError):
    """An answer with NaN or infinity in it, to a finite question."""


@dataclass
class Example:
    """One example of a law: what was drawn for it, what the law then asked, how the law failed.

    `drawn` is empty when the law draws while it asks: then it cannot be asked the same again.
    """

    drawn: dict
    calls: list[Call] = field(default_factory=list)
    error: BaseException | None = None


class Attempt(Subject):
    """A function to be judged: a Subject that must answer in time, in the right form, and change no input."""

    def __init__(self, function: Callable, rung: str, library: Callable | None = None):
        """`library`: the function that has the answer, whose form a right one has."""
        super().__init__(self._checked, rung)
        form = str(inspect.signature(library).return_annotation) if library else ""
        self.several = form.startswith("tuple")  # more than one tensor
        self.infinite = bool(library) and "−∞" in (library.__doc__ or "")  # may an answer be −∞?
        self.original, self.parameters = function, parameters(function)
        self.clock = Clock(file_of(function))
        self.example = Example({})  # the one that is being tried
        self.examples: list[Example] = []
        self.failed: Example | None = None  # the last one, and so the smallest

    @contextmanager
    def trying(self, drawn: dict) -> Iterator[None]:
        """One example of a law."""
        self.example = Example(drawn)
        if len(self.examples) < KEPT:
            self.examples.append(self.example)
        try:
            with hard():
                yield
        except (TooLong, KeyboardInterrupt, HypothesisException, StopTest):
            raise
        except BaseException as error:
            if self.failed is None:
                self.clock = Clock(self.clock.file)  # as long again, to look for a smaller example
            self.example.error, self.failed = error, self.example
            raise

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self._watch(super().__call__, Call(False, args, settings))

    def grads(self, *args: Any, **settings: Any) -> tuple[np.ndarray, ...]:
        found = self._watch(super().grads, Call(True, args, settings))
        if self.rung == "fused":  # autograd cannot forget the upstream gradient, a backward by hand can
            value = np.asarray(self(*args, **{k: v for k, v in settings.items() if k != "grad"}))
            upstream = -2 * settings.get("grad", np.ones_like(value))
            with self.clock.running():
                other = super().grads(*args, **settings | {"grad": upstream})
            same = all(np.allclose(b, -2 * a, 1e-6, 1e-12) for a, b in zip(found, other, strict=True))
            if not same:
                raise Fault(
                    "the gradients do not grow with the upstream gradient: multiply by it in backward"
                )
        return found

    def _watch(self, ask: Callable, call: Call) -> Any:
        args, settings = call.args, call.settings
        call.args, call.settings = copy.deepcopy((args, settings))
        if len(self.example.calls) < TRIED:
            self.example.calls.append(call)
        with self.clock.running():
            call.answer = ask(*args, **settings)
        for was, now in zip((*call.args, *call.settings.values()), (*args, *settings.values()), strict=True):
            if not _same(was, now):
                raise Fault("your function changed one of its inputs")
        if all(map(finite, call.args)):
            answer = tuple(call.answer.values()) if isinstance(call.answer, dict) else call.answer
            for a in answer if isinstance(answer, tuple) else (answer,):
                if not finite(a) and not (self.infinite and below_infinity(a)):
                    what = getattr(a, "name", None) or "your result"
                    overflow = f"{what} is infinite: does an exp overflow, or a log meet 0?"
                    raise NotFinite(f"{what} holds NaN" if np.isnan(a).any() else overflow)
        return call.answer

    def _checked(self, *args: Any, **settings: Any) -> Any:
        """The function's own answer, looked at before Subject takes it apart."""
        out = self.original(*args, **settings)
        if out is None:
            raise Fault("your function returned None: is the return missing?")
        if self.rung in ("torch", "fused"):
            tensors = out if isinstance(out, tuple) else (out,)
            if isinstance(out, tuple) != self.several or not all(
                isinstance(t, torch.Tensor) for t in tensors
            ):
                wanted = "a tuple of tensors" if self.several else "a tensor"
                raise Fault(f"your function returned {_kind(out)}, expected {wanted}")
        if self.rung == "np" and isinstance(out, tuple):
            found = "(value, array)" if is_float(out[-1]) and len(out) == 2 else _kind(out)
            wanted = "(value, (gradient, …))" if found == "(value, array)" else "(value, gradients)"
            if len(out) != 2 or not isinstance(out[1], tuple | list):
                raise Fault(f"your function returned {found}, expected {wanted}")
            wanted = sum(is_float(a) for a in args)
            if len(out[1]) != wanted:
                raise Fault(f"your function returned {len(out[1])} gradients, expected {wanted}")
        return out


@contextmanager
def examples_of(law: Law, attempt: Attempt) -> Iterator[None]:
    """Have the attempt told where each example of the law begins and how it ends."""
    inside = getattr(law.check, "hypothesis", None)
    if inside is None:  # a law without draws
        with attempt.trying({}):
            yield
        return
    test = inside.inner_test

    @wraps(test)  # hypothesis draws by the source of the test
    def told(*args: Any, **drawn: Any) -> None:
        again = {name: value for name, value in drawn.items() if value is not attempt}
        later = any(isinstance(value, DataObject) for value in again.values())
        with attempt.trying({} if later else copy.deepcopy(again)):
            test(*args, **drawn)

    inside.inner_test = told
    try:
        yield
    finally:
        inside.inner_test = test


def file_of(function: Callable) -> str | None:
    """The file of a function, which Python does not know of all that can be called."""
    return getattr(getattr(function, "__code__", None), "co_filename", None)


def is_float(a: Any) -> bool:
    return isinstance(a, float) or (hasattr(a, "dtype") and "float" in str(a.dtype))


def finite(a: Any) -> bool:
    a = a.detach().numpy() if isinstance(a, torch.Tensor) else a
    return not is_float(a) or bool(np.isfinite(a).all())


def below_infinity(a: Any) -> bool:
    """Numbers and −∞, no NaN and no ∞."""
    a = a.detach().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)
    return bool((a < np.inf).all())


def _kind(out: Any) -> str:
    return f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, tuple):
        return all(map(_same, was, now))
    if is_dataclass(was):
        was, now = vars(was), vars(now)
    if isinstance(was, dict):
        return was.keys() == now.keys() and all(_same(was[name], now[name]) for name in was)
    if isinstance(was, torch.Tensor):
        was, now = was.detach().numpy(), now.detach().numpy()
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


def solution(one: Exercise) -> Callable:
    """The library's own function."""
    return getattr(importlib.import_module(f"minivlp.{one.concept}"), one.name)


def load(one: Exercise) -> Callable:
    """The learner's function, read anew. Raises whatever the file raises, and TooLong.

    The file's other exercises, while they are stubs, are the library's, so that none waits for another.
    """
    code = compile(read(one.path), str(one.path), "exec")
    module = types.ModuleType(f"exercises_{one.concept}")
    module.__file__ = str(one.path)
    sys.modules[module.__name__] = module  # dataclasses and pickles look their module up
    with Clock(str(one.path)).running(), hard(), threads_of(shown(one.path)):
        exec(code, module.__dict__)
    for other in exercises(one.concept):
        if other.name != one.name and not fault(other) and untouched(other):
            setattr(module, other.name, solution(other))
    return getattr(module, one.name)
