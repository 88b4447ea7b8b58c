"""`pytest --bugs`: no constant, identity, changed input or NaN passes; small changes are caught.

And every promise of a docstring has a known mistake that breaks it.
"""

import inspect
import re
import signal
import tomllib
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import test_hard_inputs as hard
from tests.attempts import broken, solution
from tests.course import Exercise, exercises
from tests.laws import BUGS, LAWS, caught, load_bugs
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
    if isinstance(answer, dict):
        return {name: changed(part, change) for name, part in answer.items()}
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


# Their inputs are numbers, and a generator, which must change.
NOTHING_TO_CHANGE = {"derangement", "rate", "visible", "hide_patches", "infonce_bound"}


@ALL
@pytest.mark.parametrize(
    "wrong", [zeros, first_answer, identity, nan, input_mutating], ids=lambda w: w.__name__
)
def test_no_lazy_answer_passes(one: Exercise, wrong: Callable) -> None:
    if wrong is input_mutating and one.name in NOTHING_TO_CHANGE:
        pytest.skip("no input that could be changed")
    load_bugs(one.concept)
    assert killer(wrong(one), one), f"{wrong.__name__} obeys every law of {one.name}"


def refused_at_the_ends(function: Callable, one: Exercise) -> bool:
    """Do the tests of hard inputs refuse what the laws, which are for learners too, let pass?"""
    tests = {"unit_np": [partial(hard.check_unit_rows, function)]}
    if one.family == "giou":
        tests[one.name] = [partial(test, one.rung) for test in (hard.check_any_unit, hard.check_equal_boxes)]
    with pytest.MonkeyPatch.context() as patch:
        if one.family == "giou":
            patch.setitem(hard.RUNGS["giou"], one.rung, function)
        for test in tests.get(one.name, ()):
            try:
                test()
            except Exception:  # whatever breaks shows it
                return True
    return False


@ALL
def test_small_changes_are_caught(one: Exercise, pytestconfig: pytest.Config) -> None:
    load_bugs(one.concept)
    tried = mutants(one)
    held = [mutant for mutant in tried if killer(mutant.function, one) is None]
    alive = {mutant.change for mutant in held if not refused_at_the_ends(mutant.function, one)}
    listed = SURVIVORS.get(one.name, {})
    TRIED[one.name] = len(tried), len(alive)
    line = f"{one.name}: {len(tried)} small changes, {len(tried) - len(alive)} caught"
    pytestconfig.kill_matrix = [*getattr(pytestconfig, "kill_matrix", []), line]
    unlisted = "\n".join(sorted(alive - set(listed)))
    assert not unlisted, (
        f"changes of {one.name} that no law catches and tests/survivors.toml does not explain:\n{unlisted}"
    )
    assert not set(listed) - alive, f"caught or gone, so not to be listed: {sorted(set(listed) - alive)}"


def test_of_all_changes_98_percent_are_caught() -> None:
    if len(TRIED) < len(exercises()):
        pytest.skip("not all exercises were tried")
    tried, alive = (sum(column) for column in zip(*TRIED.values(), strict=True))
    assert tried - alive >= 0.98 * tried, f"{alive} of {tried} small changes survive"


def test_every_survivor_has_a_reason() -> None:
    for name, listed in SURVIVORS.items():
        assert name in {one.name for one in exercises()}, f"{name} is no exercise"
        assert all(len(reason) > 20 for reason in listed.values()), f"{name}: a survivor without a reason"


# Sentences that say each, every, independently, differentiable, at most, never, exact, uniform or stays, and
# the known mistakes that break them. A sentence is found by a part of it; "" marks one that promises nothing
# of the answer: a matter of form, of speed or of another function.
PROMISES: dict[str, dict[str, str]] = {
    "to_patches": {
        "row-major over the grid, each in (C, p, p)": "cut_column_by_column cut_with_channels_last"
    },
    "learn_vocab": {"at most `alphabet`": "first_of_the_alphabet", "every machine learns the same": ""},
    "mask_tokens": {
        "the index in its row of each token's word": "",
        "Each word is chosen with probability `p`, independently": "rows_alike any_piece_chooses",
        "each piece is chosen by itself": "always_whole",
        "Each chosen token then becomes": "all_masked none_kept one_replacement one_coin_for_both "
        "one_fate_for_all_rows one_fate_for_a_row sorted_replacements",
        "are never chosen": "specials_masked unknown_masked",
        "`ids` stays as it was": "in_place",
    },
    "mlm_loss_np": {"all zero when every target is": "mean_over_nothing detached_zero"},
    "derangement": {
        "moves every element": "permutation repaired",
        "Uniform permutations are drawn": "shift one_cycle roll",
    },
    "hard_negatives": {
        "For each row a wrong column": "diagonal_left_in ids_ignored hardest uniform columns_for_rows",
        "Rows draw independently": "one_noise_for_all_rows one_uniform_for_all_rows without_replacement",
    },
    "hinge_np": {"one negative counts in each row and column": "always_the_sum hardest_of_the_batch"},
    "hinge": {"one negative counts in each row and column": "always_the_sum hardest_of_the_batch"},
    "nce_fused": {"differentiable once": "", "for every operation": ""},
    "sinkhorn_np": {
        "with exact row sums": "columns_last unscaled_potentials unscaled_potentials_in_the_sums",
        "each summing to one": "",
        "uniform over the real tokens": "masked_afterwards",
    },
    "sinkhorn": {"Differentiable through every iteration": "under_no_grad rows_detached columns_detached"},
    "sinkhorn_cost_fused": {"differentiable once": ""},
    "ipot_np": {"uniform over the real tokens": "share_of_padding", "Row sums are exact": "columns_last"},
    "wpa_fused": {"differentiable once": "", "It never makes unit copies": ""},
    "attention_fused": {"differentiable once": ""},
    "attention_pool_np": {"with a True in every row": ""},
    "hide_side": {
        "Each pair is chosen with probability p, independently": "one_coin patches_first words_only"
    },
    "attention_blocks_fused": {"differentiable once": ""},
    "pmi": {"Each row's mean of exp is 1 afterwards": "sum_in_place_of_the_mean mean_of_logarithms"},
    "errors": {
        "How well each class explains each picture": "",
        "for every level and picture one": "own_noise_per_class",
    },
    "nearest_np": {"The nearest code of each vector": "nearest_without_norm vector_of_each_code"},
    "kmeans": {"Each step moves every code to the mean": "jumps_over half_way_once dead_codes_kept"},
    "mlm_loss_fused": {"each with its gradients": "plain made_twice panels_kept"},
    "infonce_bound": {"At most log B": "the_loss"},
    "block": {"each with `.weight` and `.bias`": "", "with the exact GELU": "tanh_form"},
    "itm_logits": {"each with": ""},
    "train": {
        "one update of every weight": "all_by_adamw",
        "common norm is at most 1": "no_clipping each_clipped",
        "After every update": "looks_too_early",
    },
    "chamfer_fused": {"all that is kept is each token's best partner": "plain partners_in_the_whole"},
}
WORDS = r"\b(each|every|independently|differentiable|at most|never|exact|uniform|stays)\b"


@ALL
def test_every_promise_of_a_docstring_has_a_mistake_that_breaks_it(one: Exercise) -> None:
    load_bugs(one.concept)
    text = (inspect.getdoc(solution(one)) or "").replace("\n", " ")
    sentences = [s for s in re.split(r"(?<=[.:;])\s+", text) if re.search(WORDS, s, re.IGNORECASE)]
    known = PROMISES.get(one.name, {})
    for sentence in sentences:
        assert any(part in sentence for part in known), (
            f"{one.name} promises, and nothing breaks it: {sentence}"
        )
    for part, mistakes in known.items():
        assert any(part in sentence for sentence in sentences), f"{one.name} no longer promises {part!r}"
        for name in mistakes.split():
            wrong = BUGS[one.family][name]
            assert caught(LAWS[one.family][wrong.caught_by], wrong), f"{name} is not caught"
