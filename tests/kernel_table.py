"""Every kernel compiled for every chip, without one: `python -m tests.kernel_table` prints what each takes.

Registers a thread, shared memory a program and spills are read from the machine code with the `cuobjdump`
that Triton ships. A spill is a number that found no register and lives in memory: STACK or LOCAL above zero.
Shared memory beyond a chip's limit would refuse to launch.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minivlp.kernels import walks, wpa

# KB of shared memory that one program may take: CUDA C++ programming guide, table of compute capabilities.
KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
LIMITS = {chip: 1024 * size for chip, size in KB.items()}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEPS = {
    walks.fold_kernel: (walks.logsumexp, walks.best),
    walks.accumulate_kernel: (walks.infonce, walks.plan, walks.sigmoid),
    wpa.wpa_kernel: (None,),
}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Used(NamedTuple):
    """Registers a thread, bytes of shared memory a program, bytes of spills a thread."""

    registers: int
    shared: int
    spills: int


def cases() -> Iterator[tuple[Any, Any, torch.dtype]]:
    """(kernel, step, dtype of the rows)."""
    return ((kernel, step, dtype) for kernel, steps in STEPS.items() for step in steps for dtype in DTYPES)


def name(kernel: Any, step: Any) -> str:
    return kernel.__name__.removesuffix("_kernel") + (f" {step.__name__}" if step else "")


def compiled(kernel: Any, step: Any, dtype: torch.dtype, chip: int) -> Used:
    """Compile as the launch in `kernels` would: its tile, pointers and D multiples of 16, M and N any."""
    largest_pair = 64, 256
    t = wpa.wpa_tile(dtype, chip, *largest_pair) if kernel is wpa.wpa_kernel else walks.tile_for(dtype, chip)
    constants = {"step": step, "DOT": t.dot, "BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_D": t.d, "BLOCK_E": t.e}
    kinds = {"M": "i32", "N": "i32", "D": "i32", "iters": "i32", "beta": "fp32"}
    kinds |= {"row_ids": "*i32", "column_ids": "*i32"}
    kinds |= dict.fromkeys(("x", "y"), {4: "*fp32", 2: "*fp16"}[dtype.itemsize])
    if dtype == torch.bfloat16:
        kinds |= {"x": "*bf16", "y": "*bf16"}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        key: "constexpr" if key in constants else kinds.get(key, "*fp32") for key in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (key, kind) in enumerate(signature.items())
        if key == "D" or kind.startswith("*")
    }
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", chip, 32),
        options={"num_warps": t.warps, "num_stages": t.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        done = subprocess.run([TOOL, "-res-usage", cubin], capture_output=True, text=True, check=True)
    numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout)}
    return Used(numbers["REG"], made.metadata.shared + numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"])


def lines() -> Iterator[str]:
    """The table, a line at a time: registers and KB of shared memory for each chip, and the worst spill."""
    yield (
        "registers / KB shared".ljust(26) + "".join(f"sm_{chip}".rjust(10) for chip in LIMITS) + "    spills"
    )
    for kernel, step, dtype in cases():
        used = [compiled(kernel, step, dtype, chip) for chip in LIMITS]
        cells = "".join(f"{u.registers} / {u.shared / 1024:.0f}".rjust(10) for u in used)
        kind = str(dtype).removeprefix("torch.")
        yield f"{name(kernel, step)} {kind}".ljust(26) + cells + f"{max(u.spills for u in used)}".rjust(10)
    yield "limit of shared memory".ljust(26) + "".join(
        f"{limit // 1024} KB".rjust(10) for limit in LIMITS.values()
    )


if __name__ == "__main__":
    began = time.monotonic()
    for line in lines():
        print(line, flush=True)
    print(f"compiled in {time.monotonic() - began:.0f} s with Triton {triton.__version__}", file=sys.stderr)
