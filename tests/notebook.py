"""`check("infonce")` in a chapter or notebook: the laws on your function, one line each, and a picture.

`hold(function, "infonce")` asks the same laws about any function, one that stands in a cell for instance.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import settings

from tests import profiles  # noqa: F401, registers them
from tests.attempts import Broken, broken, fault_at_import
from tests.course import Exercise, Todo, fault, find, untouched
from tests.laws import LAWS, Law, Subject, load_bugs
from tests.limit import Clock, TooLong
from tests.mistakes import given
from tests.watched import Call, file_of, is_float, load, quiet, solution


def check(*names: str) -> None:
    """Print what the laws say of these functions; draw the first counterexample, target beside attempt.

    Nothing is written, no state is kept. Raises ValueError for a name that is no exercise.
    """
    for name in names:
        one = find(name)
        if wrong := fault(one):
            print(wrong)
        elif untouched(one):
            about = f"difficulty {one.difficulty}, {one.minutes} minutes"
            print(f"{name}: not attempted yet; write it in {one.where} ({about})")
        elif wrong := fault_at_import(one):
            print(wrong)
        else:
            _report(one)


def hold(function: Callable, name: str, diagnose: bool = False) -> None:
    """Print what the laws of exercise `name` say of a function, as far as the first that it breaks.

    With `diagnose`, also whose known mistake it looks like. Raises ValueError for a name that is no exercise.
    """
    for law, found in _verdicts(find(name), function, diagnose):
        if isinstance(found, Broken):
            print("\n".join([f"broken  {law.name}", *found.lines()[1:]]))
            return
        print(f"{found or 'ok':<7} {law.name}")


def obeys(one: Exercise) -> bool:
    """Does the learner's function obey all its laws? Prints nothing."""
    if fault(one) or untouched(one) or fault_at_import(one):
        return False
    return all(found is None for _, found in _verdicts(one, load(one)))


def _report(one: Exercise) -> None:
    drawn, function = False, load(one)
    for law, found in _verdicts(one, function):
        if found is None:
            print(f"{one.name}  ok      {law.name}")
        elif found == "unfinished":
            print(f"{one.name}: not finished, it raised Todo")
        else:
            print("\n".join([f"{one.name}  broken  {law.name}", *found.lines()[1:]]))
            drawn = drawn or _draw(one, function, found)


def _verdicts(
    one: Exercise, function: Callable, diagnose: bool = True
) -> Iterator[tuple[Law, Broken | str | None]]:
    """Each law with what was found, under the learner's profile, as far as Todo or an endless loop."""
    settings.register_profile("before", settings.default)
    settings.load_profile("learner")  # before the laws are read, which copy it
    try:
        load_bugs(one.concept)
        for law in LAWS[one.family].values():
            try:
                found = broken(function, one, law, diagnose)
            except Todo:
                found = "unfinished"
            yield law, found
            if found == "unfinished" or (found and found.kind == "slow"):
                return
    finally:
        settings.load_profile("before")


def _draw(one: Exercise, function: Any, found: Broken) -> bool:
    """The library's answer beside the learner's, when both are arrays that can be drawn.

    Two random draws are not: both may be right.
    """
    call = found.call
    if call is None or found.kind == "slow" or any(isinstance(a, np.random.Generator) for a in given(call)):
        return False
    target, attempt = (_answer(call, Subject(f, one.rung)) for f in (solution(one), function))
    if target is None or attempt is None:
        return False
    # The array that differs the most: the value, or one of the gradients.
    triples = zip(_titles(one, call, len(target)), target, attempt, strict=False)
    triples = [(title, t, a) for title, t, a in triples if t.shape == a.shape and t.size > 1]
    if not triples:
        return False
    what, t, a = max(triples, key=lambda triple: np.abs(triple[1] - triple[2]).max())
    t, a = _flat(t), _flat(a)
    import matplotlib.pyplot as plt  # here, because pytest has no use for it

    fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.7), constrained_layout=True)
    most = max(np.abs(t).max(), np.abs(a).max(), 1e-12)
    for ax, (title, z) in zip(axes, (("target", t), ("yours", a), ("difference", a - t)), strict=True):
        image = ax.imshow(z, cmap="coolwarm", vmin=-most, vmax=most)
        ax.set(title=title, xlabel="column", ylabel="row")
    fig.suptitle(what)
    fig.colorbar(image, ax=axes, shrink=0.8)
    plt.show()
    return True


def _titles(one: Exercise, call: Call, count: int) -> list[str]:
    """What each array of an answer is: "the gradient of x", "result 1 of 2"."""
    if call.gradient:
        given = zip(inspect.signature(solution(one)).parameters, call.args, strict=False)
        return [f"the gradient of {name}" for name, value in given if is_float(value)]
    return ["the result"] if count == 1 else [f"result {i + 1} of {count}" for i in range(count)]


def _answer(call: Call | None, subject: Subject) -> list[np.ndarray] | None:
    """Value or gradients as float arrays, or None where there is no such answer."""
    if call is None:
        return None
    try:
        with quiet(), Clock(file_of(subject.function)).running():
            answer = call.ask(subject)
        parts: Sequence = answer if isinstance(answer, tuple) else (answer,)
        arrays = [np.asarray(part, dtype=float) for part in parts]
    except (Exception, TooLong):  # the attempt may raise, words are no numbers
        return None
    return arrays if all(np.isfinite(z).all() for z in arrays) else None


def _flat(z: np.ndarray) -> np.ndarray:
    """Any array as a matrix: leading axes are stacked."""
    return z.reshape(-1, z.shape[-1]) if z.ndim > 1 else z[None]
