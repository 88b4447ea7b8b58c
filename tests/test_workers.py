"""Several processes train the model that one process trains, and a job that loses one can go on."""

import datetime
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from minivlp.recipes.base import Recipe
from minivlp.training import loop
from minivlp.training.loop import Step, steps
from minivlp.training.run import ReadOnlyRun, Run
from minivlp.training.screen import Screen
from minivlp.training.workers import ONE_PROCESS, Workers, threads
from tests import test_dual_train, test_train
from tests.course import ROOT

STEPS = 6


def recipe(name: str) -> Recipe:
    """A small run of a model, with a check that costs nothing."""
    if name == "vilt":
        return test_train.recipe(replace(test_train.CONFIG, steps=STEPS))
    made = test_dual_train.recipe(name, replace(test_dual_train.CONFIG, steps=STEPS))
    made.check = lambda model: {}
    return made


def gradients_of_one(made: Recipe, workers: Workers) -> dict[str, torch.Tensor]:
    step = workers.wrap(Step(made, workers))  # which must outlive its backward pass
    sum(step(workers.parts(made.batch(STEPS - 1))).values()).backward()
    found = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad(set_to_none=True)
    return found


def trained(name: str, workers: Workers, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The gradients of the last batches, and the weights after STEPS steps, both from the same start."""
    torch.set_num_threads(1)
    gradients, made = gradients_of_one(recipe(name), workers), recipe(name)
    run = ReadOnlyRun(folder, {}) if workers.rank else Run.begin(folder, {})
    list(steps(made, run, workers))
    return {"gradients": gradients, "weights": made.model.state_dict()}


def one_of(rank: int, size: int, folder: str) -> None:
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", patience, size, rank)
    found = {
        name: trained(name, Workers(rank, size), Path(folder) / name) for name in ("vilt", "clip", "siglip")
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What each of two processes ended with."""
    folder = tmp_path_factory.mktemp("two")
    methods = multiprocessing.get_all_start_methods()
    method = "forkserver" if "forkserver" in methods else "spawn"
    mp.start_processes(one_of, (2, str(folder)), nprocs=2, start_method=method)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def norm(tensors) -> float:
    return float(sum(t.float().square().sum() for t in tensors).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vilt", "clip", "siglip"])
def test_two_processes_train_the_model_of_one(name, two, tmp_path):
    """Gradients agree to 1e-5. After six updates the weights are apart by a tenth of their way at most.

    Gradients must be compared too: neither optimizer feels it when all of them are twice as large. Muon works
    in bfloat16, where the last bits of a gradient can become 1 % of an update.
    """
    start = recipe(name).model.state_dict()
    alone = trained(name, ONE_PROCESS, tmp_path / name)
    for found in two:
        assert found[name]["gradients"].keys() == alone["gradients"].keys()
        for key, wanted in alone["gradients"].items():
            assert norm([found[name]["gradients"][key] - wanted]) <= 1e-5 * norm([wanted]) + 1e-8, key
        way = norm(weight - start[key] for key, weight in alone["weights"].items())
        assert norm(found[name]["weights"][key] - w for key, w in alone["weights"].items()) <= 0.1 * way
    for key, mine in two[0][name]["weights"].items():
        assert torch.equal(mine, two[1][name]["weights"][key]), key


def test_examples_are_dealt_once():
    """ViLT's examples in turn, a dual encoder's in shards of one size; what cannot be shared is refused."""
    batches = test_train.batches()(11)
    for i, batch in enumerate(batches):
        parts = [Workers(rank, 3).parts(batches)[i] for rank in range(3)]
        assert sorted(torch.cat([p.ids for p in parts]).tolist()) == sorted(batch.ids.tolist())
        assert all(len(p.pixels) == len(p.match) == len(p.ids) for p in parts)
    (pairs, *_) = test_dual_train.batches()(0)
    parts = [pairs.part(rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([p.pixels for p in parts]), pairs.pixels)
    with pytest.raises(
        ValueError, match=f"the batch must be a multiple of the 5 processes, got {len(pairs.ids)}"
    ):
        pairs.part(0, 5)
    with pytest.raises(ValueError, match="must have a row of every kind for each of 17 processes"):
        Workers(0, 17).parts(batches)


def test_what_processes_cannot_share_is_known_before_the_first_step(tmp_path):
    """Two captions on two processes are one each; of 32 examples the rarest kind is one."""
    Workers(0, 2).check_sizes({2})
    with pytest.raises(
        ValueError, match="--batch must leave an example of every kind to each of 4 processes, got 3"
    ):
        Workers(0, 4).check_sizes({3, 8})
    made = recipe("vilt")
    made.batch = lambda step: pytest.fail("a batch was composed")
    run = Run.begin(tmp_path / "run", {})
    with pytest.raises(ValueError, match="--batch must leave an example of every kind"):
        loop.train(made, run, Screen(silent=True), Workers(0, 9999))
    assert not run.checkpoint.exists()


def test_threads_are_shared_by_the_processes_of_a_machine(monkeypatch):
    assert [threads(n) for n in (1, 2, 16)] == [1, 2, 4]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [threads(n) for n in (2, 8, 64)] == [1, 2, 4]


def torchrun(*flags, **env) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node=2 -m minivlp train …` with small sizes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "tests.tiny", "train"]
    return subprocess.run(
        [*start, *map(str, flags)],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_job_that_loses_a_process_says_so_and_goes_on(tmp_path):
    flags = ("--name", tmp_path / "run", "--items", 4, "--threads", 1)
    killed = torchrun(*flags, MINIVLP_KILL="step 7")
    assert killed.returncode and "Signal 9 (SIGKILL)" in killed.stderr
    assert "minivlp: the processes of this job lost each other" in killed.stderr
    assert "go on with: torchrun --nproc-per-node=2 -m minivlp train --resume --name" in killed.stderr
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    resumed = torchrun(*flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("step    12/12") == 1  # told once, not twice
    whole = torchrun("--name", tmp_path / "whole", *flags[2:])
    assert whole.returncode == 0, whole.stderr
    a, b = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("run", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_two_captions_train_on_two_processes(tmp_path):
    """One each, whatever is hidden in it: no step may wait for a term that one of them lacks."""
    for name, colour in (("dog", "red"), ("cat", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    lines = [json.dumps({"image": f"{name}.png", "caption": f"a {name}"}) for name in ("dog", "cat") * 2]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    flags = ("--captions", tmp_path, "--batch", 2, "--steps", 12, "--items", 4, "--threads", 1)
    done = torchrun(*flags, "--name", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 12


@pytest.mark.slow
def test_a_model_that_processes_cannot_share_is_refused(tmp_path):
    refused = torchrun("--model", "vse", "--name", tmp_path / "run")
    assert refused.returncode and "for several processes, got vse" in refused.stderr
    assert not (tmp_path / "run").exists()
