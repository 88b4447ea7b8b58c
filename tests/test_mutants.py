"""`pytest --bugs`: no constant, identity, changed input or NaN passes; small changes are caught."""

import signal
import tomllib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.attempts import broken, solution
from tests.course import Exercise, exercises
from tests.laws import LAWS, load_bugs
from tests.mutants import mutants

SURVIVORS = tomllib.loads((Path(__file__).parent / "survivors.toml").read_text(encoding="utf-8"))
ALL = pytest.mark.parametrize("one", exercises(), ids=lambda one: one.name)
SECONDS = 20  # a mutant that runs longer has lost its way out of a loop
TRIED: dict[str, tuple[int, int]] = {}  # exercise → mutants, survivors


@contextmanager
def limit(seconds: float):
    def stop(*_: Any) -> None:
        raise TimeoutError("no end in sight")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def killer(function: Callable, one: Exercise) -> str | None:
    """The first law that refuses the function, or None."""
    for name, law in LAWS[one.family].items():
        try:
            with limit(SECONDS):
                found = broken(function, one, law, diagnose=False)
        except TimeoutError:
            return name
        if found:
            return name
    return None


def changed(answer: Any, change: Callable) -> Any:
    """The answer with `change` made to every array and number in it."""
    if isinstance(answer, tuple | list):
        return type(answer)(changed(part, change) for part in answer)
    return change(answer) if isinstance(answer, np.ndarray | torch.Tensor | float) else None


def zeros(one: Exercise) -> Callable:
    """The right shape, nothing in it; for lists of words the empty list."""

    def function(*args: Any, **settings: Any) -> Any:
        answer = solution(one)(*args, **settings)
        return [] if isinstance(answer, list) else changed(answer, lambda a: a * 0)

    return function


def first_answer(one: Exercise) -> Callable:
    """Whatever was right the first time."""
    seen: list = []

    def function(*args: Any, **settings: Any) -> Any:
        seen.append(solution(one)(*args, **settings))
        return seen[0]

    return function


def identity(one: Exercise) -> Callable:
    """The first input back, for gradients all of them."""

    def function(*args: Any, **settings: Any) -> Any:
        floats = tuple(a for a in args if isinstance(a, float) or "float" in str(getattr(a, "dtype", "")))
        return (args[0], floats) if isinstance(solution(one)(*args, **settings), tuple) else args[0]

    return function


def nan(one: Exercise) -> Callable:
    def function(*args: Any, **settings: Any) -> Any:
        answer = solution(one)(*args, **settings)
        return [float("nan")] if isinstance(answer, list) else changed(answer, lambda a: a * np.nan)

    return function


def input_mutating(one: Exercise) -> Callable:
    """Right, but the first array, or the vocabulary, is not what it was."""

    def function(*args: Any, **settings: Any) -> Any:
        answer = solution(one)(*args, **settings)
        for a in args:
            if isinstance(a, dict):
                a["changed"] = 0
                break
            if isinstance(a, np.ndarray | torch.Tensor) and a.ndim:
                with torch.no_grad():
                    a[...] = a + 1 if a.dtype not in (bool, torch.bool) else ~a
                break
        return answer

    return function


NOTHING_TO_CHANGE = {"derangement"}  # its inputs are a number and a generator, which it must change


@ALL
@pytest.mark.parametrize(
    "wrong", [zeros, first_answer, identity, nan, input_mutating], ids=lambda w: w.__name__
)
def test_no_lazy_answer_passes(one: Exercise, wrong: Callable) -> None:
    if wrong is input_mutating and one.name in NOTHING_TO_CHANGE:
        pytest.skip("no input that could be changed")
    load_bugs(one.concept)
    assert killer(wrong(one), one), f"{wrong.__name__} obeys every law of {one.name}"


@ALL
def test_small_changes_are_caught(one: Exercise, pytestconfig: pytest.Config) -> None:
    load_bugs(one.concept)
    tried = mutants(one)
    alive = {mutant.change for mutant in tried if killer(mutant.function, one) is None}
    listed = SURVIVORS.get(one.name, {})
    TRIED[one.name] = len(tried), len(alive)
    line = f"{one.name}: {len(tried)} small changes, {len(tried) - len(alive)} caught"
    pytestconfig.kill_matrix = [*getattr(pytestconfig, "kill_matrix", []), line]
    unlisted = "\n".join(sorted(alive - set(listed)))
    assert not unlisted, (
        f"changes of {one.name} that no law catches and tests/survivors.toml does not explain:\n{unlisted}"
    )
    assert not set(listed) - alive, f"caught or gone, so not to be listed: {sorted(set(listed) - alive)}"


def test_of_all_changes_95_percent_are_caught() -> None:
    if len(TRIED) < len(exercises()):
        pytest.skip("not all exercises were tried")
    tried, alive = (sum(column) for column in zip(*TRIED.values(), strict=True))
    assert tried - alive >= 0.95 * tried, f"{alive} of {tried} small changes survive"


def test_every_survivor_has_a_reason() -> None:
    for name, listed in SURVIVORS.items():
        assert name in {one.name for one in exercises()}, f"{name} is no exercise"
        assert all(len(reason) > 20 for reason in listed.values()), f"{name}: a survivor without a reason"
