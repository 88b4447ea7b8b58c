"""pytest settings: the hypothesis profile, the `--bugs` run, the map of the course, reasons for skips."""

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import (
    limit,
    profiles,  # noqa: F401, registers them
)
from tests.course import course_map, exercises, fault, fingerprint, untouched

VERDICTS = "course/verdicts"  # in pytest's cache: {exercise: [fingerprint, passed or failed]}
PROOFS = ("test_bugs.py", "test_mutants.py")  # run by --bugs alone


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bugs", action="store_true", help="prove that every known bug is caught by its law")
    parser.addoption("--strict-course", action="store_true", help="an exercise that is not written fails")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    limit.SCREEN = os.dup(2)  # before pytest takes what is written there
    profile = "bugs" if config.getoption("--bugs") else os.environ.get("MINIVLP_PROFILE", "learner")
    settings.load_profile(profile)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow` tests run only when -m asks for them; `--bugs` runs the bug tests alone; `gpu` needs a GPU."""
    bugs = config.getoption("--bugs")
    wants_slow = "slow" in (config.getoption("-m") or "")
    kept, dropped = [], []
    for item in items:
        is_bug_test = item.path.name in PROOFS
        is_slow = item.get_closest_marker("slow") is not None
        (kept if is_bug_test == bugs and (bugs or wants_slow or not is_slow) else dropped).append(item)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


OUTCOMES: dict[str, str] = {}  # of the attempts of this run


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what became of an attempt."""
    if report.nodeid.endswith("-attempt]") and (report.when == "call" or not report.passed):
        OUTCOMES[report.nodeid.rsplit("[", 1)[1].removesuffix("-attempt]")] = report.outcome


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """After `--bugs`: the kill matrix, one row a bug, one column a law, and the mutants."""
    for line in getattr(terminalreporter.config, "kill_matrix", []):
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int):
    """Remember the verdicts; the last lines of a run with all attempts in it are the map of the course."""
    result = yield
    session.config.exit_code = int(exitstatus)
    config, terminal = session.config, session.config.pluginmanager.get_plugin("terminalreporter")
    if not OUTCOMES or terminal is None:
        return result
    cache = getattr(config, "cache", None)
    known = cache.get(VERDICTS, {}) if cache else {}
    for one in exercises():
        if OUTCOMES.get(one.name) in ("passed", "failed") and not fault(one) and not untouched(one):
            known[one.name] = [fingerprint(one), OUTCOMES[one.name]]
    if cache:
        cache.set(VERDICTS, known)
    if len(OUTCOMES) == len(exercises()):
        for line in ["", *course_map(known)]:
            terminal.write_line(line)
    return result


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Threads that exercises have left running are not waited for."""
    limit.leave(getattr(config, "exit_code", 0))
