"""Time of the fused rungs beside the plain ones on this machine's GPU: `python -m tests.kernel_times`.

Forward and backward at the sizes of `traffic.CASES`, medians of ten, and the times that `traffic` predicts
for its laptop.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minivlp import chamfer, infonce, ipot, mlm, sigmoid, stream
from minivlp.kernels import traffic

RUNS = 10


def losses(case: traffic.Case) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The plain and the fused rung of a case, as functions of x (P, M, D) and y (P, N, D)."""

    def of(module, family: str, *others):
        return {
            rung: lambda x, y, f=module.RUNGS[family][rung]: f(x, y, *others) for rung in ("torch", "fused")
        }

    def flat(rungs):
        return {name: lambda x, y, f=f: f(x[0], y[0]) for name, f in rungs.items()}

    if case.name == "masked words":
        return {
            rung: lambda h, e, f=f: f(h[0], e[0], e[0, :, 0], torch.arange(case.M, device=h.device))
            for rung, f in mlm.RUNGS["mlm_loss"].items()
            if rung != "np"
        }
    return {
        "InfoNCE": flat(of(infonce, "infonce", 10.0)),
        "sigmoid loss": flat(of(sigmoid, "sigmoid_loss", 10.0, -10.0)),
        "Chamfer": of(chamfer, "chamfer"),
        "word-patch": of(ipot, "wpa"),
    }[case.name]


def milliseconds(loss: Callable, x: Tensor, y: Tensor) -> float:
    """Median of forward and backward, after two runs that compile and warm up."""
    taken = []
    for _ in range(RUNS + 2):
        wait(x)
        began = time.perf_counter()
        torch.autograd.grad(loss(x, y).sum(), (x, y))
        wait(x)
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken[2:])


def wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def lines(cases: list[traffic.Case], device: str) -> Iterator[str]:
    """A line for each case and dtype: milliseconds of the two rungs, and which path the fused one took."""
    yield "                        plain, ms    fused, ms   path"
    for case in cases:
        for dtype in (torch.float32, torch.float16):
            x, y = (
                torch.nn.functional.normalize(torch.randn(case.P, n, case.D, device=device), dim=-1)
                for n in (case.M, case.N)
            )
            x, y = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
            times = {rung: milliseconds(f, x, y) for rung, f in losses(case).items()}
            path = "tiles" if case.name == "masked words" else stream.choose_backend(x)[0]
            bits = 8 * x.element_size()
            yield f"{case.name:14}{bits:4}{times['torch']:15.2f}{times['fused']:13.2f}   {path}"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: there is nothing to time")
    print(torch.cuda.get_device_name())
    for line in lines(traffic.CASES, "cuda"):
        print(line, flush=True)
    print(f"predicted for {traffic.LAPTOP.name}", *traffic.table(), sep="\n")
