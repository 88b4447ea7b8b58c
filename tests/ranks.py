"""Run a distributed loss in several processes that talk over gloo, and compare it with one process."""

import datetime
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.overrides import TorchFunctionMode

from tests.laws import close

# With 2 ranks a shard passed the wrong way round the ring still arrives: 3 are the fewest that show it.
COUNTS = [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)]
b, D = 4, 2  # pairs on a rank, width: small against b, so that a block of scores outweighs a shard


def in_ranks(loss, scalars: tuple[float, ...], ranks: int, folder) -> list[dict]:
    """What every rank found when it ran `loss` on its shard, in rank order; see `_one_rank`."""
    # Where there is a fork server it imports torch once for all processes of all tests.
    methods = multiprocessing.get_all_start_methods()
    multiprocessing.set_forkserver_preload(["torch", "tests.ranks"])
    mp.start_processes(
        _one_rank,
        (loss, scalars, ranks, str(folder)),
        nprocs=ranks,
        start_method="forkserver" if "forkserver" in methods else "spawn",
    )
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]


def equal_one_process(results: list[dict], loss, scalars: tuple[float, ...]) -> None:
    """The loss, a second time backward, and the texts frozen; then the group of all ranks but the last."""
    x, y = _batch(len(results))
    whole, (dx, dy, *dscalars) = _value_and_grads(loss, x, y, scalars)
    members = max(1, len(results) - 1)
    fewer, _ = _value_and_grads(loss, x[: members * b], y[: members * b], scalars)
    for rank, result in enumerate(results):
        rows = slice(rank * b, (rank + 1) * b)
        close(result["loss"], whole, rtol=1e-12)
        for got, again, wanted in zip(
            result["grads"], result["again"], [dx[rows], dy[rows], *dscalars], strict=True
        ):
            close(got, wanted, rtol=1e-12, atol=1e-12)
            close(again, wanted, rtol=1e-12, atol=1e-12)
        close(result["frozen"], dx[rows], rtol=1e-12, atol=1e-12)
        if rank < members:
            close(result["subgroup"], fewer, rtol=1e-12)


def refuse_together(results: list[dict]) -> None:
    """A NaN on the last rank and a shard of another length are refused by all ranks, in the same words."""
    for result in results:
        assert f"rank {len(results) - 1}: images must not contain NaN" in result["spoilt"]
        if len(results) > 1:
            assert "images must have the same shape on every rank" in result["uneven"]


def _batch(ranks: int) -> list[torch.Tensor]:
    """The batch of all ranks together, the same in every process: x (b·ranks, D), y (b·ranks, D)."""
    rng = np.random.default_rng(ranks)
    return [torch.from_numpy(rng.standard_normal((b * ranks, D))) for _ in range(2)]


def _leaves(x, y, scalars) -> list[torch.Tensor]:
    numbers = [torch.tensor(s, dtype=torch.float64) for s in scalars]
    return [t.clone().requires_grad_() for t in (x, y, *numbers)]


def _value_and_grads(loss, x, y, scalars) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Upstream gradient 3, so that a backward pass that ignores it shows."""
    leaves = _leaves(x, y, scalars)
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(3 * value, leaves)


def _one_rank(rank: int, loss, scalars: tuple[float, ...], ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)  # a rank left waiting fails the test instead of hanging it
    dist.init_process_group("gloo", f"file://{folder}/store", patience, ranks, rank)
    x, y = (t[rank * b : (rank + 1) * b] for t in _batch(ranks))
    leaves, kept, largest = _leaves(x, y, scalars), [], _Largest()

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), largest:
        value = loss(*leaves)
    first, second = (torch.autograd.grad(3 * value, leaves, retain_graph=True) for _ in range(2))
    found = {"loss": value.detach(), "grads": first, "again": second}
    found |= {"kept": sum(kept), "largest": largest.numbers}
    found["frozen"] = torch.autograd.grad(3 * loss(leaves[0], y, *scalars), leaves[0])[0]
    found["uneven"] = _refusal(loss, x[: b - rank], y[: b - rank], *scalars)
    found["spoilt"] = _refusal(loss, x * float("nan") if rank == ranks - 1 else x, y, *scalars)
    members = list(range(max(1, ranks - 1)))
    group = dist.new_group(members)
    if rank in members:
        found["subgroup"] = loss(x, y, *scalars, group=group)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _refusal(loss, *args) -> str:
    try:
        loss(*args)
    except ValueError as error:
        return str(error)
    return "accepted"


class _Largest(TorchFunctionMode):
    """Notes how many floats the largest tensor holds that is made while it is active."""

    numbers = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        floats = [t.numel() for t in made if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.numbers = max([self.numbers, *floats])
        return out
