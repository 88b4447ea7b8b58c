"""Several processes train one model: each takes its rows of every batch, and DDP averages the gradients.

    torchrun --nproc-per-node=2 -m minivlp train --model clip

The processes are those that torchrun started, on one machine or on several. Every process composes the whole
batch, which depends on (seed, step) alone, and keeps its part: nothing but gradients, counts and, for a loss
that compares all pairs, embeddings travels between them. Only process 0 writes and tells.

Sources: Li et al. 2020 (PyTorch Distributed) for DDP, the averaging of gradients while they are made.
Left out: composing only one's own rows, and processes that join or leave in the middle of a run.
"""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minivlp.core.require import fail


@dataclass(frozen=True)
class Workers:
    """This process among `size` of them; each method, alone, gives back what it was given."""

    rank: int = 0
    size: int = 1

    def check_sizes(self, sizes: Iterable[int]) -> None:
        """Raise ValueError, before the first step, when a batch of such a size cannot be shared."""
        if min(sizes, default=self.size) < self.size:
            fail(
                "--batch", f"must leave an example of every kind to each of {self.size} processes", min(sizes)
            )

    def parts(self, groups: Sequence[Any]) -> list[Any]:
        """This process's part of each group of rows. Raises ValueError when a group cannot be shared."""
        if self.size == 1:
            return list(groups)
        for rows in groups:
            if len(rows.ids) < self.size:
                fail("the batch", f"must have a row of every kind for each of {self.size} processes",
                       f"{len(rows.ids)} of one kind")  # fmt: skip
        return [rows.part(self.rank, self.size) for rows in groups]

    def wrap(self, step: nn.Module) -> nn.Module:
        """`step` with gradients that are the means over the processes; its values become those of rank 0."""
        if self.size == 1:
            return step
        # A process whose examples serve no matching, say, leaves that head without a gradient.
        return nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)

    def mean(self, counts: Sequence[int], device: torch.device) -> list[float]:
        """Each count, averaged over the processes."""
        if self.size == 1:
            return list(counts)
        total = torch.tensor(counts, dtype=torch.float32, device=device)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def broadcast(self, value: Any) -> Any:
        """What process 0 holds."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of all processes, which may hold unequal numbers; only x's own carry a gradient."""
        if self.size == 1:
            return x
        counts: list[int] = [0] * self.size
        dist.all_gather_object(counts, len(x))
        dtype = torch.uint8 if x.dtype == torch.bool else x.dtype
        sent = x.new_zeros((max(counts), *x.shape[1:]), dtype=dtype)
        sent[: len(x)] = x.detach()
        arrived = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(arrived, sent)
        rows = [part[:n].to(x.dtype) for part, n in zip(arrived, counts, strict=True)]
        rows[self.rank] = self.scale_gradient(x)
        return torch.cat(rows)

    def scale_gradient(self, x: Tensor) -> Tensor:
        """x, whose gradient arrives `size` times as large.

        A loss of the whole batch that every process holds gives each the gradient of its own rows. DDP then
        takes the mean of what must be a sum.
        """
        if self.size > 1 and x.requires_grad:
            x.register_hook(lambda gradient: self.size * gradient)
        return x


ONE_PROCESS = Workers()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(cores: int) -> int:
    """CPU threads for this process: its share of the cores, at most 4, as small models gain no more."""
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@contextmanager
def joined(device: str) -> Iterator[Workers]:
    """The processes of this job, or ONE_PROCESS when torchrun did not start this one.

    Raises ConnectionError when they lose each other, as when one was killed: the others see their connections
    break, or are told to stop by torchrun, whichever comes first.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ONE_PROCESS
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    before = signal.signal(signal.SIGTERM, _told_to_stop)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"the processes of this job lost each other: {reason}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _told_to_stop(*_) -> None:
    raise ConnectionError("the processes of this job lost each other: torchrun told this one to stop")
