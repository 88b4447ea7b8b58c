"""The experiments, and doing them: seed by seed, each result a whole file that is not made twice.

In the folder of the command, runs/claims unless --out says otherwise:

    results/<experiment>-<seed>.json      {"settings", "seed", "seconds", "samples"}
    work/<experiment>-<seed>/             a training that is not over yet

A result counts when its settings are those asked for; another one is made again. A file is written whole or
not at all (core/files.py), so whatever stops the command costs at most the steps since its last checkpoint.
Experiments run on one thread each, so that their numbers do not depend on how many run at once; the clock
runs alone.

Left out: experiments on other machines at the same time.
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from minivlp.claims.chunks import chunks
from minivlp.claims.clock import clock
from minivlp.claims.codes import KINDS, coded
from minivlp.claims.grounding import WITH, WITHOUT, grounding
from minivlp.claims.naming import LOSSES, naming_experiment
from minivlp.claims.pairs import VARIANTS, paired
from minivlp.claims.settings import Settings, Small
from minivlp.claims.verdict import Sample
from minivlp.claims.writing import NORMS, TERMS, captioning, scores
from minivlp.core.require import fail
from minivlp.training.run import read_json, write_json

VERSION = 1  # to be raised when an experiment does something else with the same settings
Samples = dict[str, Sample]


@dataclass(frozen=True)
class Experiment:
    """`run(part of the settings, seed, folder to train in)` → samples; alone: with no other beside it."""

    part: str  # the name of its part of Settings
    run: Callable[[Any, int, Path], Samples]
    alone: bool = False


EXPERIMENTS = {
    "clock": Experiment("clock", lambda size, seed, folder: clock(size, seed), alone=True),
    "chunks": Experiment("chunks", lambda size, seed, folder: chunks(size, seed)),
    **{name: Experiment("world", partial(paired, variant=name)) for name in VARIANTS},
    **{name: Experiment("naming", partial(naming_experiment, loss=name)) for name in LOSSES},
    **{f"xvlm-{name}": Experiment("regions", partial(grounding, variant=name)) for name in (WITH, WITHOUT)},
    **{f"coca-{name}": Experiment("captions", partial(captioning, losses=name)) for name in TERMS},
    **{f"vq-{name}": Experiment("codes", partial(coded, kind=kind)) for name, kind in KINDS.items()},
    **{f"qk-{name}": Experiment("scores", partial(scores, kind=kind)) for name, kind in NORMS.items()},
}
Job = tuple[str, int]  # the name of an experiment, and a seed


@dataclass(frozen=True)
class Done:
    """A job that is over: its seconds, how many are over of how many, and the seconds since the start."""

    job: Job
    seconds: float
    over: int
    jobs: int
    since: float

    def told(self) -> str:
        """One line, with the time left if the others take as long as these did."""
        left = self.since / self.over * (self.jobs - self.over)
        what = f"{self.job[0]}, seed {self.job[1]}"
        return f"[{self.over:2d}/{self.jobs}] {what:22} {self.seconds:6.1f} s   {left / 60:5.1f} min left"


def seeds(name: str, settings: Settings) -> range:
    """The seeds of an experiment."""
    small = isinstance(getattr(settings, EXPERIMENTS[name].part), Small)
    return range(settings.many if small else settings.seeds)


def do(job: Job, settings: Settings, folder: Path) -> float:
    """Do one job and write its result; return the seconds that it took."""
    name, seed = job
    torch.set_num_threads(1)
    experiment, started = EXPERIMENTS[name], time.perf_counter()
    place = folder / "work" / f"{name}-{seed}"
    samples = experiment.run(getattr(settings, experiment.part), seed, place)
    seconds = time.perf_counter() - started
    content = {"settings": made_with(name, settings), "seed": seed, "seconds": seconds}
    content |= {"samples": {key: asdict(sample) for key, sample in samples.items()}}
    write_json(_path(folder, job), content)
    shutil.rmtree(place, ignore_errors=True)
    return seconds


def made_with(name: str, settings: Settings) -> dict[str, Any]:
    """What a result depends on besides its seed, as JSON gives it back."""
    plain = {"experiment": name, "version": VERSION} | asdict(getattr(settings, EXPERIMENTS[name].part))
    return _listed(plain)


def done(job: Job, settings: Settings, folder: Path) -> bool:
    """Is there a result of the job that was made with these settings?"""
    path = _path(folder, job)
    return path.is_file() and read_json(path).get("settings") == made_with(job[0], settings)


def results(names: Iterable[str], settings: Settings, folder: Path) -> dict[str, list[Samples]]:
    """The samples of each experiment, by seed. Raises ValueError for a job that is not done."""
    found: dict[str, list[Samples]] = {}
    for name in names:
        for seed in seeds(name, settings):
            if not done((name, seed), settings, folder):
                fail("results", "must be complete", f"none of {name}, seed {seed}")
            samples = read_json(_path(folder, (name, seed)))["samples"]
            found.setdefault(name, []).append({key: Sample(**sample) for key, sample in samples.items()})
    return found


def spent(names: Iterable[str], settings: Settings, folder: Path) -> float:
    """The seconds that these experiments took, all seeds together."""
    jobs = [(name, seed) for name in names for seed in seeds(name, settings)]
    return sum(read_json(_path(folder, job))["seconds"] for job in jobs)


def do_all(names: Iterable[str], settings: Settings, folder: Path, workers: int = 1) -> Iterator[Done]:
    """Do what is not done, and tell of each job when it is over.

    workers: processes at once; with 1 all is done in this one. Raises ChildProcessError when one dies.
    """
    jobs = [(name, seed) for name in dict.fromkeys(names) for seed in seeds(name, settings)]
    jobs.sort(key=lambda job: job[1])  # every experiment's first seed before any second one
    jobs = [job for job in jobs if not done(job, settings, folder)]
    (folder / "results").mkdir(parents=True, exist_ok=True)
    alone = [job for job in jobs if workers == 1 or EXPERIMENTS[job[0]].alone]
    beside = [job for job in jobs if job not in alone]
    started = time.perf_counter()
    every = chain(
        ((job, do(job, settings, folder)) for job in alone), _beside(beside, settings, folder, workers)
    )
    for over, (job, seconds) in enumerate(every, start=1):
        yield Done(job, seconds, over, len(jobs), time.perf_counter() - started)


def _beside(jobs: list[Job], settings: Settings, folder: Path, workers: int) -> Iterator[tuple[Job, float]]:
    """Do jobs in processes of their own, several at once."""
    if not jobs:
        return
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is ours
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), **quiet)
    try:
        waiting = {pool.submit(do, job, settings, folder): job for job in jobs}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(f"an experiment's process died ({error}); what is done is kept") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():
            child.terminate()


def _path(folder: Path, job: Job) -> Path:
    return folder / "results" / f"{job[0]}-{job[1]}.json"


def _listed(value: Any) -> Any:
    """Tuples become lists, as in JSON."""
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, list | tuple) else value
