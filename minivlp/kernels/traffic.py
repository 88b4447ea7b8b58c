"""What a loss moves through memory and multiplies: counted on the plain rungs, predicted for the kernels.

Plain rung: `passes` runs it on a small input, forward and backward, and counts how often an operation reads
or writes an array as large as S. Each operation is taken to read and write an entry once, in memory, or in
the cache of the chip if the array fits there. Each product moves the rows and the columns once besides.

Kernels, launch by launch: a launch reads its rows once, and an accumulate writes its gradient in float32. Its
columns are read once if they fit the cache. If not, the programs in flight, one on each multiprocessor, begin
at column 0 together and share what they read as long as they keep step: the columns are read once for each
round of programs. The strips of dx that are added up in memory, one for each program in flight, stay in the
cache too.

Times are predictions of this model, not measurements. The plain rung multiplies at full rate and moves at
full rate, one after the other; a kernel does both at once. Each of the two leaves out work, such as
exponentials, so each is too small, and their quotient may err to either side. The chip is that of a laptop,
with its published rates.

The table is for forward and backward on a laptop GPU whose memory gives 256 GB/s and which makes 11.6 TFLOP/s
in float32, twice that in 16 bits. It is predicted by `table`, not measured. Products are of 2·M·N·D flops. S
is 8192 × 8192 of width 512, for masked words 4096 × 30522 of width 768, for word-patch alignment 64 times 40
× 240 of width 768.

                             MB moved              products  predicted, ms
                  bits     plain    kernel   ratio   plain kernel   plain   kernel
    InfoNCE         32       6,543       168    39.0       3     6       43.3     35.5
    InfoNCE         16       3,272       101    32.5       3     6       21.7     17.8
    sigmoid loss    32       6,812       101    67.7       3     4       44.4     23.7
    sigmoid loss    16       3,406        67    50.8       3     4       22.2     11.8
    masked words    32       7,320       800     9.1       3     5       78.2     82.7
    masked words    16       3,660       453     8.1       3     5       39.1     41.3
    Chamfer         32       4,396       168    26.2       3     2       34.9     11.8
    Chamfer         16       2,198       134    16.4       3     2       17.5      5.9
    word-patch      32         165       220     0.8       3     5        0.9      0.9
    word-patch      16          83       138     0.6       3     5        0.4      0.5

That chip makes 45 flops in float32, 91 in 16 bits, while one byte arrives; what makes fewer for each byte it
moves waits for memory. A tile of 64 × 64 makes 16 or 32 for each byte of x and y that it reads, so tiles must
come from the cache (32 MB). They do where the columns fit it. For the vocabulary, which outgrows it, they do
where programs keep step.

Word-patch alignment moves as little in the plain rung, whose arrays fit the cache; its kernel saves passes
over the cache and launches, which this model does not time. For masked words kernels would move a ninth of
the bytes and make five products in place of three, and by the prediction they are no faster.
`mlm_loss_fused` therefore has none, and keeps its panels and the vendor's products. Others have such kernels:
Cut Cross-Entropy makes S again in backward and skips tiles whose gradient is too small to count.

Source: Wijmans, Huval, Hertzberg, Koltun and Krähenbühl 2024 (Cut Cross-Entropy).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minivlp.chamfer import chamfer
from minivlp.infonce import infonce
from minivlp.ipot import wpa
from minivlp.mlm import mlm_loss
from minivlp.sigmoid import sigmoid_loss

STRIP = 64  # rows of S that a program walks along


class Chip(NamedTuple):
    """Float32 flops a second, bytes a second from memory, bytes of L2, programs in flight.

    Half precisions are twice as fast.
    """

    name: str
    flops: float
    bandwidth: float
    cache: int
    programs: int

    def balance(self, size: int) -> float:
        """Flops that the chip makes while one byte arrives, for operands of `size` bytes."""
        return self.rate(size) / self.bandwidth

    def rate(self, size: int) -> float:
        return self.flops * (2 if size == 2 else 1)


# 3072 cores × 2 flops × 1.89 GHz; 24 multiprocessors with one program each.
LAPTOP = Chip("GeForce RTX 4060 Laptop", 3072 * 2 * 1.89e9, 256e9, 32 * 2**20, 24)


class Case(NamedTuple):
    """A loss of P problems of M × N at width D: launches of its kernels, its plain rung and its products."""

    name: str
    P: int
    M: int
    N: int
    D: int
    folds: int
    accumulates: int
    plain: Callable[..., Any]
    products: int  # of the plain rung, forward and backward: 2·P·M·N·D flops each


def _rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _words(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return mlm_loss(x[0], y[0], _rows(y.shape[1]), torch.arange(x.shape[1]))


def _scores(loss: Callable[..., Any], scalars: int) -> Callable[..., Any]:
    return lambda x, y: loss(x[0], y[0], *(_rows(1)[0].exp() for _ in range(scalars)))


CASES = [
    Case("InfoNCE", 1, 8192, 8192, 512, 2, 2, _scores(infonce, 1), 3),
    Case("sigmoid loss", 1, 8192, 8192, 512, 0, 2, _scores(sigmoid_loss, 2), 3),
    Case("masked words", 1, 4096, 30522, 768, 1, 2, _words, 3),
    Case("Chamfer", 1, 8192, 8192, 512, 2, 0, chamfer, 3),
    Case("word-patch", 64, 40, 240, 768, 1, 2, wpa, 3),
]  # fmt: skip


@functools.cache
def passes(case: Case) -> float:
    """How often the plain rung reads or writes an entry of an array as large as S, forward and backward."""
    P, M, N = 3, 37, 41  # no array but those like S has P · M · N entries
    P = 1 if case.P == 1 else P
    N = M if case.M == case.N else N
    counter = _Counter(P * M * N)
    with counter:
        case.plain(_rows(P, M, 8), _rows(P, N, 8)).sum().backward()
    return counter.bytes / (4 * P * M * N)


class _Counter(TorchDispatchMode):
    """Adds up the bytes of all operands and results with so many entries; a view moves nothing."""

    def __init__(self, entries: int):
        super().__init__()
        self.entries, self.bytes = entries, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            for t in torch.utils._pytree.tree_leaves((args, kwargs, made)):
                if isinstance(t, torch.Tensor) and t.numel() == self.entries:
                    self.bytes += t.numel() * t.element_size()
        return made


def plain_bytes(case: Case, size: int, chip: Chip = LAPTOP) -> float:
    """Moved by the plain rung, forward and backward, with entries of `size` bytes."""
    entries = case.P * case.M * case.N
    in_memory = passes(case) * entries * size if entries * size > chip.cache else 0.0
    return in_memory + case.products * case.P * (case.M + case.N) * case.D * size


def kernel_bytes(case: Case, size: int, chip: Chip = LAPTOP) -> int:
    """Moved by the kernels: rows and columns of each launch, read from memory, and gradients written."""
    total, sides = 0, ((case.M, case.N), (case.N, case.M))
    for launches, written in ((case.folds, 0), (case.accumulates, 4)):
        for rows, columns in sides[:launches]:  # the second launch has the sides exchanged
            total += (rows + columns * rounds(rows, columns * case.D * size, chip)) * size + rows * written
    if not case.accumulates:  # the gradient is gathered: rows, their partners, and what they add up to
        total += 3 * (case.M + case.N) * 4
    return total * case.P * case.D


def rounds(rows: int, column_bytes: int, chip: Chip) -> int:
    """How often a launch over so many rows reads its columns from memory."""
    if column_bytes <= chip.cache:
        return 1
    strips = -(-rows // STRIP)
    return -(-strips // chip.programs)


def row(case: Case, size: int, chip: Chip = LAPTOP) -> str:
    """One line of the table."""
    flops = 2 * case.P * case.M * case.N * case.D
    plain, kernel = plain_bytes(case, size, chip), kernel_bytes(case, size, chip)
    products = case.folds + 2 * case.accumulates
    before = case.products * flops / chip.rate(size) + plain / chip.bandwidth
    after = max(products * flops / chip.rate(size), kernel / chip.bandwidth)
    return (
        f"{case.name:14}{8 * size:4}{plain / 1e6:12,.0f}{kernel / 1e6:10,.0f}{plain / kernel:8.1f}"
        f"{case.products:8}{products:6}{before * 1e3:11.1f}{after * 1e3:9.1f}"
    )


def table(chip: Chip = LAPTOP) -> list[str]:
    """The table in this module's docstring."""
    head = [
        "                         MB moved              products  predicted, ms",
        "              bits     plain    kernel   ratio   plain kernel   plain   kernel",
    ]
    return head + [row(case, size, chip) for case in CASES for size in (4, 2)]
