"""The machinery of the laws: register a law, run it on every rung, prove that it catches the known bugs.

A law is a hypothesis property that takes the function under test as its first argument:

    @law("infonce", hint="Shuffling the pairs together must not matter: is the diagonal the target?")
    @given(case=pairs())
    def joint_permutation(f, case):
        x, y, scale = case
        ...
        assert close(f(x[p], y[p], scale), f(x, y, scale))

`f` always speaks NumPy: `f(*arrays_and_scalars, **settings)` is the value, `f.grads(*same, grad=None)` the
gradients over the float arguments in order. Positional floats are differentiated (learnable scalars too);
keywords are settings and masks. So one law holds the NumPy rung and the torch rungs, and the learner's
attempts at them (tests/attempts.py).

How to read one test: `test_infonce.py::test_laws[infonce-fused-images_and_texts_exchange]` holds the function
RUNGS["infonce"]["fused"] of minivlp/infonce.py to the law of that name in tests/test_infonce.py. hypothesis
draws cases and calls the law with each; the test fails at the smallest case for which the law raises.
tests/bugs/infonce.py has the wrong functions that each law must refuse.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, repeat
from typing import Any

import numpy as np
import pytest
import torch

from tests.course import Exercise, Todo, exercises, fault, untouched

LAWS: dict[str, dict[str, "Law"]] = {}
BUGS: dict[str, dict[str, "Bug"]] = {}


@dataclass(frozen=True)
class Law:
    family: str
    name: str
    check: Callable
    hint: str


@dataclass(frozen=True)
class Bug:
    family: str
    name: str
    function: Callable
    rung: str
    caught_by: str
    story: str


def law(*families: str, hint: str) -> Callable:
    """Register a property for one or more function families (the keys of RUNGS)."""

    def register(check: Callable) -> Callable:
        for family in families:
            LAWS.setdefault(family, {})[check.__name__] = Law(family, check.__name__, check, hint)
        return check

    return register


def bug(family: str, caught_by: str, story: str, rung: str = "torch") -> Callable:
    """Register a plausible wrong answer; `rung` says how it is called: np, torch or plain."""

    def register(function: Callable) -> Callable:
        BUGS.setdefault(family, {})[function.__name__] = Bug(
            family, function.__name__, function, rung, caught_by, story
        )
        return function

    return register


class Subject:
    """One rung, made to speak NumPy (see the module docstring).

    `rung` is np, torch or fused, or plain or slow for functions without gradients.
    """

    def __init__(self, function: Callable, rung: str):
        self.function, self.rung = function, rung
        self.parameters = parameters(function)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        if self.rung in ("plain", "slow"):
            return self.function(*args, **settings)
        if self.rung == "np":
            out = self.function(*args, **settings)
            return out[0] if isinstance(out, tuple) else out
        out = self.function(*(_tensor(a) for a in args), **{k: _setting(v) for k, v in settings.items()})
        return tuple(map(_array, out)) if isinstance(out, tuple) else _array(out)

    def grads(self, *args: Any, grad: np.ndarray | None = None, **settings: Any) -> tuple[np.ndarray, ...]:
        """Gradients of sum(value * grad) over the positional float arguments, in order.

        Of several values each has its own `grad`, all of them in a tuple.
        """
        if self.rung == "np":
            if grad is not None:
                settings["grad"] = grad
            return self._named(self.function(*args, **settings)[1], args)
        tensors = [_tensor(a).requires_grad_(_is_float(a)) for a in args]
        out = self.function(*tensors, **{k: _setting(v) for k, v in settings.items()})
        outs = out if isinstance(out, tuple) else (out,)
        given = grad if isinstance(out, tuple) else (grad,)
        upstream = [
            torch.ones_like(o) if g is None else torch.as_tensor(g, dtype=o.dtype)
            for o, g in zip(outs, given, strict=True)
        ]
        wanted = [t for t in tensors if t.requires_grad]
        found = torch.autograd.grad(outs, wanted, upstream, allow_unused=True)
        zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))
        return self._named(map(_array, zeros), args)

    def _named(self, gradients: Iterable, args: tuple) -> tuple["Gradient", ...]:
        names = [f"d{name}" for name, a in zip(self.parameters, args, strict=False) if _is_float(a)]
        return tuple(
            Gradient.of(g, name) for g, name in zip(gradients, chain(names, repeat(None)), strict=False)
        )


class Gradient(np.ndarray):
    """A gradient that knows its name, "dscale", as long as nobody calculates with it."""

    name: str | None = None

    @classmethod
    def of(cls, array: Any, name: str | None) -> "Gradient":
        made = np.asarray(array).view(cls)
        made.name = name
        return made

    def __array_finalize__(self, source: Any) -> None:
        self.name = getattr(source, "name", None)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return array[()] if return_scalar else np.asarray(array)


@lru_cache(1000)
def parameters(function: Callable) -> tuple[str, ...]:
    """The names of a function's parameters; none where Python cannot tell them."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _is_float(a: Any) -> bool:
    return isinstance(a, float) or (hasattr(a, "dtype") and "float" in str(a.dtype))


def _tensor(a: Any) -> Any:
    if isinstance(a, float):
        return torch.tensor(a, dtype=torch.float64)
    return torch.from_numpy(a) if isinstance(a, np.ndarray) else a


def _setting(a: Any) -> Any:
    return torch.from_numpy(a) if isinstance(a, np.ndarray) else a


def _array(t: Any) -> Any:
    return t.detach().to(torch.float64 if t.is_floating_point() else t.dtype).numpy()


def close(got: Any, wanted: Any, rtol: float = 1e-9, atol: float = 1e-11) -> bool:
    """True when shapes agree and every entry does; else raise one readable line (no array dump)."""
    __tracebackhide__ = True
    name = getattr(got, "name", None) if isinstance(got, Gradient) else None
    got, wanted = np.asarray(got), np.asarray(wanted)
    what = name or "your result"
    assert got.shape == wanted.shape, f"{what} has shape {got.shape}, expected {wanted.shape}"
    error = np.abs(got - wanted)
    bad = ~(error <= atol + rtol * np.abs(wanted))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        place = f" at {where}" if where else ""
        a, b = float(got[where]), float(wanted[where])
        digits = next((d for d in (6, 9, 12) if f"{a:.{d}g}" != f"{b:.{d}g}"), 17)  # enough to differ
        told = f"{name}: " if name else ""
        raise AssertionError(f"{told}got {a:.{digits}g}, expected {b:.{digits}g}{place}")
    return True


def central_differences(
    f: Callable, args: tuple, which: int, grad: Any = None, step: float = 1e-5
) -> np.ndarray:
    """d sum(f(*args) * grad) / d args[which] in float64, one entry at a time."""
    base = np.array(args[which], dtype=np.float64)
    slope = np.zeros_like(base)
    for index in np.ndindex(base.shape):
        sides = []
        for sign in (1, -1):
            moved = base.copy()
            moved[index] += sign * step
            changed = moved if moved.ndim else float(moved)
            value = np.asarray(f(*args[:which], changed, *args[which + 1 :]))
            sides.append((value if grad is None else value * grad).sum())
        slope[index] = (sides[0] - sides[1]) / (2 * step)
    return slope


def rungs(module: Any) -> list[tuple[str, str, Subject]]:
    """(family, rung, subject) for everything in a concept's RUNGS and for the small steps of the course."""
    plain = [one.name for one in _exercises(module) if one.rung == "plain"]
    steps = {name: {"plain": getattr(module, name)} for name in plain}
    return [
        (family, rung, Subject(function, rung))
        for family, ladder in (steps | module.RUNGS).items()
        for rung, function in ladder.items()
    ]


def _exercises(module: Any) -> list[Exercise]:
    return exercises(module.__name__.rsplit(".", 1)[-1])


def obeys(module: Any) -> Callable:
    """A pytest test of every law of every family in `module.RUNGS` on every rung, then of every attempt.

    An attempt is one test, which tells the broken law that says the most.
    """
    cases = [
        pytest.param(subject, one, id=f"{family}-{rung}-{one.name}")
        for family, rung, subject in rungs(module)
        for one in LAWS.get(family, {}).values()
    ]
    cases += [pytest.param(None, one, id=f"{one.name}-attempt") for one in _exercises(module)]

    @pytest.mark.parametrize("subject, one", cases)
    def test(subject: Subject | None, one: Law | Exercise, pytestconfig: pytest.Config) -> None:
        if subject is None:
            attempt_obeys(one, pytestconfig.getoption("--strict-course"))
        else:
            one.check(subject)

    return test


def attempt_obeys(one: Exercise, strict: bool = False) -> None:
    """Skip what is not written; fail in a few lines when the learner's function breaks a law."""
    from tests import attempts  # it needs the names above

    to_do = f"to do: {one.where} {one.name}"
    if wrong := fault(one):
        pytest.fail(wrong, pytrace=False)
    if not untouched(one):
        if wrong := attempts.fault_at_import(one):
            pytest.fail(wrong, pytrace=False)
        try:
            if found := attempts.verdict(attempts.load(one), one):
                pytest.fail(f"{one.where} {one.name} " + "\n".join(found.lines()), pytrace=False)
            return
        except Todo:
            to_do += ", which is not finished"
    (pytest.fail(to_do, pytrace=False) if strict else pytest.skip(to_do))


def refuses(module: Any, cases: list[tuple]) -> Callable:
    """A pytest test over `(family, what, args, settings, pattern)`: every rung raises that ValueError."""
    table = [
        pytest.param(subject, args, settings, message, id=f"{family}-{rung}-{what}")
        for family, rung, subject in rungs(module)
        for wanted, what, args, settings, message in cases
        if wanted == family
    ]

    @pytest.mark.parametrize("subject, args, settings, message", table)
    def test(subject: Subject, args: tuple, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            subject(*args, **settings)

    return test


def caught(one: Law, suspect: Bug) -> bool:
    """Does this law refuse this wrong answer?"""
    try:
        with np.errstate(all="ignore"):
            one.check(Subject(suspect.function, suspect.rung))
    except Exception:  # any failure is a refusal: a wrong answer may also crash
        return True
    return False


def load_bugs(concept: str) -> None:
    """Import the laws and the bugs of one concept, which registers them."""
    importlib.import_module(f"tests.test_{concept}")
    importlib.import_module(f"tests.bugs.{concept}")
