"""Whose known mistake is it? A learner's function beside the wrong functions of tests/bugs.

answers   wherever the function is not the library, it answers as the mistake does: its values, where they
          are wrong, since gradients by hand need not be those of the mistake; else its gradients
draws     two functions with one mistake draw in different ways, so no two draws are the same; but asked
          often enough they have the same means and the same covariances
"""

import copy
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from tests.course import Exercise, Todo
from tests.laws import BUGS, LAWS, Bug, Law, Subject, load_bugs
from tests.limit import Clock, TooLong, hard
from tests.watched import Attempt, Call, Example, examples_of, file_of, finite, quiet, solution

ENOUGH, MOST = 3, 0.6  # wrong answers at least, and the share of them that are the mistake's
EACH = 3  # calls of an example that are asked, one of them for gradients
DRAWS, QUESTIONS, LARGEST = 200, 4, 200  # draws for a question, questions, numbers in an answer
REPLAYED = 6  # examples of each law
ALIKE, LEAD = 0.55, 0.05  # share of the questions and examples, and lead over the next mistake
FAR = 6.0  # standard errors between two means that are not the same; of 10,000 equal ones none is 5 apart


def mistakes(function: Callable, one: Exercise, law: Law, calls: list[Call]) -> list[Bug]:
    """Known mistakes that the function may have made; `law`'s own first, none when it took too long.

    `calls` are the function's own, of the example that broke the law.
    """
    load_bugs(one.concept)
    known = sorted(BUGS.get(one.family, {}).values(), key=lambda bug: bug.caught_by != law.name)
    subject = Timed(function, one.rung)
    try:
        if any(isinstance(a, np.random.Generator) for call in calls for a in given(call)):
            return _that_draw_alike(subject, one, known)
        return _that_answer_alike(subject, one, known, calls)
    except (TooLong, Todo):
        return []


class Timed(Subject):
    """A Subject that has so much time for all its answers."""

    def __init__(self, function: Callable, rung: str):
        super().__init__(function, rung)
        self.clock = Clock(file_of(function))

    def __call__(self, *args: Any, **settings: Any) -> Any:
        with self.clock.running():
            return super().__call__(*args, **settings)

    def grads(self, *args: Any, **settings: Any) -> tuple[np.ndarray, ...]:
        with self.clock.running():
            return super().grads(*args, **settings)


def given(call: Call) -> tuple:
    return (*call.args, *call.settings.values())


def _that_answer_alike(subject: Subject, one: Exercise, known: list[Bug], calls: list[Call]) -> list[Bug]:
    library = Subject(solution(one), one.rung)
    asked = [(call, answer(call, library)) for call in few(calls)] + [(c, c.answer) for c in battery(one)]
    with hard():
        answers = [(call, right, answer(call, subject)) for call, right in asked]
    wrong = [(call, a) for call, right, a in answers if a is not None and not agree(right, a)]
    if any(not call.gradient for call, _ in wrong):
        wrong = [(call, a) for call, a in wrong if not call.gradient]
    whole = [(call, a) for call, a in wrong if all(map(finite, parts(a)))]
    for evidence in (whole, wrong):
        if len(evidence) >= ENOUGH:
            shares = {bug: _share(bug, evidence) for bug in known}
            alike = [bug for bug in known if shares[bug] >= MOST]
            if alike:
                return sorted(alike, key=lambda bug: -shares[bug])
    return []


def _share(bug: Bug, evidence: list[tuple[Call, Any]]) -> float:
    subject = Subject(bug.function, bug.rung)
    return sum(agree(wrong, answer(call, subject)) for call, wrong in evidence) / len(evidence)


def _that_draw_alike(subject: Subject, one: Exercise, known: list[Bug]) -> list[Bug]:
    drawn = []
    for call in questions(one):
        with hard():
            drawn.append(draws(call, subject))
    behaved = behaviour(subject, one)
    scores = {}
    for bug in known:
        theirs = known_draws(bug, one), known_behaviour(bug, one)
        same = [same_draws(x, y) for x, y in zip(drawn, theirs[0], strict=True) if x is not None]
        broken = [behaved[p] == theirs[1][p] for p in behaved if behaved[p] or theirs[1][p]]
        scores[bug] = (sum(same) / max(len(same), 1) + sum(broken) / max(len(broken), 1)) / 2
    best = max(known, key=scores.get)
    lead = scores[best] - max(scores[bug] for bug in known if bug is not best)
    return [best] if scores[best] >= ALIKE and lead >= LEAD else []


def behaviour(subject: Subject, one: Exercise) -> dict[tuple[str, int], str]:
    """For the first examples of every law the words in which it is broken, without numbers; "" for none."""
    found = {}
    for law, number, example in library_examples(one):
        if number < REPLAYED and example.drawn:
            found[law.name, number] = ""
            try:
                with quiet(), hard():
                    law.check.hypothesis.inner_test(subject, **copy.deepcopy(example.drawn))
            except Todo:
                raise
            except Exception as error:
                words = str(error).split("\n")[0]  # pytest puts the values of an assertion below them
                found[law.name, number] = re.sub(r"[-\d.\[\]()]+", "", words).strip() or "broken"
    return found


@cache
def known_behaviour(bug: Bug, one: Exercise) -> dict[tuple[str, int], str]:
    return behaviour(Subject(bug.function, bug.rung), one)


@cache
def known_draws(bug: Bug, one: Exercise) -> list[np.ndarray | None]:
    return [draws(call, Subject(bug.function, bug.rung)) for call in questions(one)]


@cache
def questions(one: Exercise) -> list[Call]:
    """Some that are asked often: with short answers, of all laws."""
    short = [c for c in battery(one) if c.answer is not None and flat(c.answer).size <= LARGEST]
    return short[:: -(-len(short) // QUESTIONS)]


def draws(call: Call, subject: Subject) -> np.ndarray | None:
    """Answers to one question, with as many generators: (DRAWS, numbers); None where one is missing."""
    found = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        args = tuple(rng if isinstance(a, np.random.Generator) else a for a in call.args)
        settings = {k: rng if isinstance(v, np.random.Generator) else v for k, v in call.settings.items()}
        found.append(answer(Call(call.gradient, args, settings), subject))
        if found[-1] is None:
            return None
    rows = [flat(one) for one in found]
    return np.stack(rows) if len({row.size for row in rows}) == 1 else None


def same_draws(x: np.ndarray | None, y: np.ndarray | None) -> bool:
    """Have the columns of two samples the same means, and the same covariances?"""
    if x is None or y is None or x.shape != y.shape:
        return False
    centre = (x.mean(0) + y.mean(0)) / 2
    x, y = x - centre, y - centre
    squares = [(z**2).T @ (z**2) / len(z) - (z.T @ z / len(z)) ** 2 for z in (x, y)]  # variance of a product
    near = abs(x.mean(0) - y.mean(0)) <= FAR * np.sqrt((x.var(0) + y.var(0)) / len(x)) + 1e-9
    error = np.sqrt(sum(squares).clip(0) / len(x))
    return bool(near.all() and (abs(x.T @ x - y.T @ y) / len(x) <= FAR * error + 1e-9).all())


def flat(answer: Any) -> np.ndarray:
    return np.concatenate([np.ravel(part).astype(float) for part in parts(answer)])


@cache
def library_examples(one: Exercise) -> list[tuple[Law, int, Example]]:
    """The first examples of every law, with the library's answers."""
    found = []
    for law in LAWS[one.family].values():
        library = Attempt(solution(one), one.rung, solution(one))
        with examples_of(law, library):
            law.check(library)
        found += [(law, number, example) for number, example in enumerate(library.examples)]
    return found


@cache
def battery(one: Exercise) -> list[Call]:
    """Some questions of every law, with the library's answers."""
    return [call for _, _, example in library_examples(one) for call in few(example.calls)]


def few(calls: list[Call]) -> list[Call]:
    """Of an example: a central difference asks a hundred questions that are almost the same."""
    values, gradients = ([c for c in calls if c.gradient is kind] for kind in (False, True))
    return values[: EACH - 1] + gradients[:1]


def answer(call: Call, subject: Subject) -> Any:
    """The subject's answer, None when it raises."""
    try:
        with quiet():
            return call.ask(subject)
    except Todo:
        raise
    except Exception:  # what crashes gives no answer
        return None


def parts(answer: Any) -> tuple:
    """The arrays of an answer."""
    if isinstance(answer, dict):
        answer = tuple(answer[name] for name in sorted(answer))
    several = answer if isinstance(answer, tuple) else (answer,)
    return tuple(part.detach().numpy() if isinstance(part, torch.Tensor) else part for part in several)


def agree(one: Any, other: Any) -> bool:
    """Are two answers the same, numbers up to rounding?"""
    if isinstance(one, list) or one is None or other is None:
        return isinstance(other, list) and one == other
    if isinstance(one, dict) and (not isinstance(other, dict) or one.keys() != other.keys()):
        return False
    pairs = list(zip(parts(one), parts(other), strict=False))
    return all(np.shape(a) == np.shape(b) and np.allclose(a, b, 1e-6, 1e-9, True) for a, b in pairs)
