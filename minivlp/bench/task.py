"""One measurement in a process of its own: `python -m minivlp.bench.task '{"do": "memory", …}'` prints JSON.

A fresh process has no memory left over from another variant, and nothing that another variant warmed up. The
task, a JSON object:

    do         "time" or "memory"
    case       a name of cases.CASES
    variants   names of its rungs and peers; with "memory" one only
    sizes      the sizes to measure, smallest first
    threads    CPU threads
    seconds    with "time": how long to repeat at each size

The answer: `points`, an entry for each size ({variant: seconds of each repetition} or bytes), `failed`
({variant: reason}), `method` (how memory was counted), `compiled` (whether torch.compile served a variant).
"""

import json
import sys
from functools import partial
from typing import Any

import torch

from minivlp.bench.cases import BARE, CASES, Case, Loss
from minivlp.bench.measure import interleaved, peak_increase


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """The answer to a task, see above."""
    torch.set_num_threads(task["threads"])
    case = CASES[task["case"]]
    losses, failed = _warm(case, task["variants"])
    answer = {"points": [], "failed": failed, "method": None}
    for size in task["sizes"] if losses else []:
        problem = case.problem(**size)
        steps = {name: partial(case.posed(name, problem).step, loss) for name, loss in losses.items()}
        if task["do"] == "time":
            answer["points"].append(interleaved({BARE: problem.bare} | steps, seconds=task["seconds"]))
        else:
            (step,) = steps.values()
            held, answer["method"] = peak_increase(step)
            answer["points"].append(held)
    return answer | {"compiled": _compiled()}


def _warm(case: Case, variants: list[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Run every variant once at a tiny size: libraries start up, and what cannot run is found out."""
    problem, losses, failed = case.problem(**case.sizes["tiny"][0]), {}, {}
    problem.bare()
    for name in variants:
        try:
            loss = case.loss(name)
            case.posed(name, problem).step(loss)
            losses[name] = loss
        except Exception as error:  # a peer may raise anything; the table says what
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return losses, failed


def _compiled() -> bool:
    """Whether any code ran through torch.compile in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and sum(dynamo.counters["frames"].values()) > 0


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
