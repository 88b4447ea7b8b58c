"""`check("infonce")` in a chapter or notebook: the laws on your function, one line each, and a picture."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import settings

from tests import profiles  # noqa: F401, registers them
from tests.attempts import Broken, Call, broken, fault_at_import, load, solution
from tests.course import Exercise, Todo, fault, find, untouched
from tests.laws import LAWS, Law, Subject, load_bugs


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


def obeys(one: Exercise) -> bool:
    """Does the learner's function obey all its laws? Prints nothing."""
    if fault(one) or untouched(one) or fault_at_import(one):
        return False
    return all(found is None for _, found in _verdicts(one))


def _report(one: Exercise) -> None:
    drawn = False
    for law, found in _verdicts(one):
        if found is None:
            print(f"{one.name}  ok      {law.name}")
        elif found == "unfinished":
            print(f"{one.name}: not finished, it raised Todo")
        else:
            print("\n".join([f"{one.name}  broken  {law.name}", *found.lines()[1:]]))
            drawn = drawn or _draw(one, load(one), found)


def _verdicts(one: Exercise) -> Iterator[tuple[Law, Broken | str | None]]:
    """Each law with what was found, under the learner's profile; a function that raises Todo ends it."""
    before = settings.get_current_profile_name()
    settings.load_profile("learner")  # before the laws are read, which copy it
    try:
        load_bugs(one.concept)
        for law in LAWS[one.family].values():
            try:
                yield law, broken(load(one), one, law)
            except Todo:
                yield law, "unfinished"
                return
    finally:
        settings.load_profile(before)


def _draw(one: Exercise, function: Any, found: Broken) -> bool:
    """The library's answer beside the learner's, when both are arrays that can be drawn."""
    call = found.call
    target, attempt = (_answer(call, Subject(f, one.rung)) for f in (solution(one), function))
    if call is None or target is None or attempt is None:
        return False
    # The array that differs the most: the value, or one of the gradients.
    pairs = [(t, a) for t, a in zip(target, attempt, strict=False) if t.shape == a.shape and t.size > 1]
    if not pairs:
        return False
    t, a = (_flat(z) for z in max(pairs, key=lambda p: np.abs(p[0] - p[1]).max()))
    import matplotlib.pyplot as plt  # here, because pytest has no use for it

    fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.4), constrained_layout=True)
    most = max(np.abs(t).max(), np.abs(a).max(), 1e-12)
    for ax, (title, z) in zip(axes, (("target", t), ("yours", a), ("difference", a - t)), strict=True):
        image = ax.imshow(z, cmap="coolwarm", vmin=-most, vmax=most)
        ax.set(title=title, xlabel="column", ylabel="row")
    fig.colorbar(image, ax=axes, shrink=0.8)
    plt.show()
    return True


def _answer(call: Call | None, subject: Subject) -> list[np.ndarray] | None:
    """Value or gradients as float arrays, or None where there is no such answer."""
    if call is None:
        return None
    try:
        with np.errstate(all="ignore"):
            answer = call.ask(subject)
        parts: Sequence = answer if isinstance(answer, tuple) else (answer,)
        arrays = [np.asarray(part, dtype=float) for part in parts]
    except Exception:  # the attempt may raise, words are no numbers
        return None
    return arrays if all(np.isfinite(z).all() for z in arrays) else None


def _flat(z: np.ndarray) -> np.ndarray:
    """Any array as a matrix: leading axes are stacked."""
    return z.reshape(-1, z.shape[-1]) if z.ndim > 1 else z[None]
