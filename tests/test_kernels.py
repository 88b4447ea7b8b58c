"""The kernels without a GPU: interpreted against NumPy, compiled for every chip. With one: run and timed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minivlp import stream
from minivlp.kernels import traffic

ROOT = Path(__file__).parent.parent
TRITON = pytest.importorskip("triton", reason="Triton is not installed: see tests/requirements-peers.txt")


def in_a_process_of_its_own(*command: str, **variables: str) -> str:
    """Triton is compiler or interpreter from its import on, and this process may have imported it already."""
    rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=rest | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.slow
def test_interpreted_kernels_agree_with_numpy():
    said = in_a_process_of_its_own(
        "pytest", "-p", "no:cacheprovider", "tests/kernel_checks.py", TRITON_INTERPRET="1"
    )
    assert " passed" in said and "failed" not in said and "skipped" not in said, said


@pytest.mark.gpu
def test_kernels_on_the_gpu_agree_with_numpy():
    said = in_a_process_of_its_own("pytest", "-p", "no:cacheprovider", "tests/kernel_checks.py")
    assert " passed" in said and "failed" not in said and "skipped" not in said, said


@pytest.mark.gpu
@pytest.mark.slow
def test_times_on_the_gpu():
    print(in_a_process_of_its_own("tests.kernel_times"))


@pytest.mark.slow
@pytest.mark.parametrize("chip", [75, 80, 86, 89, 90, 120])
def test_kernels_compile_without_spills(chip, tmp_path, monkeypatch):
    """For each chip, in shared memory that it has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled now, not found in a cache
    from tests import kernel_table

    assert set(kernel_table.LIMITS) == {75, 80, 86, 89, 90, 120}
    for kernel, step, dtype in kernel_table.cases():
        used = kernel_table.compiled(kernel, step, dtype, chip)
        name = f"{kernel_table.name(kernel, step)} {dtype} on sm_{chip}: {used}"
        assert used.spills == 0, name
        assert 0 < used.shared <= kernel_table.LIMITS[chip], name
        assert 0 < used.registers <= 255, name


@pytest.mark.slow
def test_a_spill_is_seen(monkeypatch):
    """A tile of 64 × 64 × 64 in float32 does not fit the registers of 128 threads."""
    from minivlp.kernels import walks
    from tests import kernel_table

    monkeypatch.setattr(
        walks, "tile_for", lambda dtype, chip: walks.Tile(64, 64, 64, 64, 4, 1, TRITON.language.float32)
    )
    used = kernel_table.compiled(walks.accumulate_kernel, walks.infonce, torch.float32, 80)
    assert used.spills > 0


def test_the_docstring_of_traffic_holds_its_table():
    """Digit for digit, so that the numbers in the docstring are those that are worked out."""
    source = (ROOT / "minivlp" / "kernels" / "traffic.py").read_text(encoding="utf-8")
    table = "\n".join("    " + line for line in traffic.table())
    assert table in ast.get_docstring(ast.parse(source), clean=False)
    assert (
        f"{traffic.LAPTOP.balance(4):.0f} flops in float32, {traffic.LAPTOP.balance(2):.0f} in 16 bits"
        in source
    )
    assert f"{traffic.LAPTOP.flops / 1e12:.1f} TFLOP/s" in source


def test_passes_over_an_array_are_counted():
    """x yᵀ, exp and sum write S, read it, write, read; backward expands the 1, which is a view, multiplies it
    with exp(S), and reads the outcome for two products."""
    case = traffic.CASES[0]._replace(plain=lambda x, y: (x[0] @ y[0].T).exp().sum())
    written_and_read = 1 + 2 + 1
    backward = 3 + 2
    assert traffic.passes(case) == written_and_read + backward


def test_bytes_of_the_kernels():
    """Width 10, two strips: a fold reads M + N rows, or N each round of programs; an accumulate writes M."""
    fold = traffic.Case("", 1, 100, 30, 10, 1, 0, lambda x, y: x, 3)
    gather = 3 * (100 + 30) * 4
    large, none, pair = (
        traffic.LAPTOP._replace(cache=c, programs=p) for c, p in ((10**9, 1), (0, 1), (0, 2))
    )
    for chip in (large, pair):  # in the cache, or two programs that share what they read
        assert traffic.kernel_bytes(fold, 2, chip) == ((100 + 30) * 2 + gather) * 10
    assert traffic.kernel_bytes(fold, 2, none) == ((100 + 2 * 30) * 2 + gather) * 10
    both = fold._replace(folds=0, accumulates=2, P=3)
    assert traffic.kernel_bytes(both, 2, none) == 3 * 10 * ((100 + 2 * 30 + 30 + 100) * 2 + 130 * 4)


def test_each_launch_has_columns_of_its_own():
    """The smaller side fits the cache and the larger one does not: only one of two launches reads again."""
    both = traffic.Case("", 1, 200, 1000, 10, 2, 2, lambda x, y: x, 3)
    chip = traffic.LAPTOP._replace(cache=200 * 10 * 4, programs=3)
    assert traffic.rounds(200, 1000 * 10 * 4, chip) == 2  # four strips, three at a time
    assert traffic.rounds(1000, 200 * 10 * 4, chip) == 1
    read = 2 * ((200 + 2 * 1000) + (1000 + 200))
    assert traffic.kernel_bytes(both, 4, chip) == (read + 1200) * 10 * 4


def test_arrays_that_fit_the_cache_move_nothing_through_memory():
    case = next(case for case in traffic.CASES if case.name == "word-patch")
    rows = case.products * case.P * (case.M + case.N) * case.D * 4
    assert traffic.plain_bytes(case, 4) == rows
    small = traffic.LAPTOP._replace(cache=case.P * case.M * case.N * 4 - 1)
    passes = traffic.passes(case) * case.P * case.M * case.N * 4
    assert traffic.plain_bytes(case, 4, small) == rows + passes


def test_the_backend_can_be_asked(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert stream.choose_backend(torch.zeros(2, 3)) == ("tiles", "x is on cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert stream.choose_backend(torch.zeros(2, 3)) == ("kernels", "Triton interprets them")
    assert stream.choose_backend(torch.zeros(2, 3, dtype=torch.float64))[0] == "tiles"
    assert stream.choose_backend(torch.zeros(0, 3)) == ("tiles", "x is empty")
