"""pytest settings: hypothesis profiles, the `--bugs` run, and skips that name their reason."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors]
settings.register_profile(
    "learner", max_examples=25, derandomize=True, deadline=None, phases=PHASES, print_blob=False,
    report_multiple_bugs=False, suppress_health_check=QUIET,
)  # fmt: skip
settings.register_profile(
    "bugs", parent=settings.get_profile("learner"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile("long", parent=settings.get_profile("learner"), max_examples=300, derandomize=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bugs", action="store_true", help="prove that every known bug is caught by its law")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    profile = "bugs" if config.getoption("--bugs") else os.environ.get("MINIVLP_PROFILE", "learner")
    settings.load_profile(profile)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow` tests run only when -m asks for them; `--bugs` runs the bug tests alone; `gpu` needs a GPU."""
    bugs = config.getoption("--bugs")
    wants_slow = "slow" in (config.getoption("-m") or "")
    kept, dropped = [], []
    for item in items:
        is_bug_test = item.path.name == "test_bugs.py"
        is_slow = item.get_closest_marker("slow") is not None
        (kept if is_bug_test == bugs and (bugs or wants_slow or not is_slow) else dropped).append(item)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After `--bugs`: the kill matrix, one row a bug, one column a law."""
    for line in getattr(terminalreporter.config, "kill_matrix", []):
        terminalreporter.write_line(line)
