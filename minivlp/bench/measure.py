"""Two measures to trust on a busy machine: time as a ratio, and peak memory in a process of its own.

    interleaved     seconds of a reference and of several calls, taken in turn: what slows the machine down
                    for a while slows all of them, and the ratio of two neighbours stays what it is
    peak_increase   the most memory that a call holds beyond what was held before it
    quartiles, ratios, exponent    what a table says of them
    machine         what they depend on

Sources: Hoefler and Belli 2015 (Scientific benchmarking of parallel computing systems): medians with
quartiles, the reference measured in the same run.
Left out: energy, and any clock but that on the wall.
"""

import gc
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from minivlp.training.workers import cores

KERNEL = Path("/proc/self")  # Linux tells what a process holds, and forgets the peak when asked to
# Asks glibc to give every array of 128 kB or more pages of its own and to give them back when it is freed, as
# it does at first; otherwise the limit rises to 32 MB and the peak holds gaps that depend on history.
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
MOST = 15  # repetitions that are enough, however short


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    least: int = 3,
    seconds: float = 6.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, one entry a repetition; each repetition runs all of them once, in rotation.

    At least `least` repetitions, then more until `seconds` have passed or there are 15. One more before the
    first is not counted: it meets cold caches. Entry i of all lists comes from the same repetition.
    """
    names, times = list(calls), {name: [] for name in calls}
    started, turn = clock(), 0
    while turn <= least or (turn <= MOST and clock() - started < seconds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]  # nobody always follows the same one
            before = clock()
            calls[name]()
            after = clock()
            if turn:
                times[name].append(after - before)
        turn += 1
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median of the values, with the quartiles below and above it."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return {"median": median, "low": low, "high": high}


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Repetition by repetition: the median of ratios, unlike the ratio of medians, cancels a slow minute."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """k of values ∝ sizesᵏ: the least-squares slope on logarithms. None when a value is not positive."""
    if min(values) <= 0:
        return None
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def peak_increase(call: Callable[[], object]) -> tuple[int, str]:
    """Bytes that `call` holds at its peak beyond those held before, and how they were counted.

    On Linux the kernel's peak is reset first. Elsewhere a peak from before the call hides a smaller one
    during it. Memory that the process has freed but not given back may be taken again unseen, so call this
    early in a fresh process, and with OWN_PAGES in its environment.
    """
    gc.collect()
    try:
        (KERNEL / "clear_refs").write_text("5")  # the peak becomes what is held now
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before, "peak resident set (VmHWM, reset before the call)"
    except OSError:
        before = _highest()
        call()
        return _highest() - before, "growth of the highest resident set (ru_maxrss)"


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", (KERNEL / "status").read_text(), re.M)[1])


def _highest() -> int:
    """The peak so far: kilobytes, on macOS bytes."""
    import resource  # absent on Windows, where nothing else here would tell

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine(threads: int) -> dict[str, object]:
    """What the figures depend on: processor, cores, threads, versions, and how busy the machine was."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": threads,
        "torch": torch.__version__,
        "blas": blas[1] if blas else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else None
    if found:
        return found[1].strip()
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()
