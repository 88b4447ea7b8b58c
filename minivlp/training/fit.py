"""The training loop: rows → states → loss terms → gradients → one update, and checkpoints that lose nothing.

Matrices are updated by Muon (momentum made orthogonal, which needs clearly fewer scenes here), embeddings and
everything else by AdamW. Everything random depends on (seed, step), so a checkpoint needs no generator
state and a resumed run ends in the same weights.

Sources: Kim, Son and Kim 2021 (ViLT), section 4.2, for AdamW's settings; Jordan et al. 2024 for Muon, which
ViLT does not use.
Left out: mixed precision, gradient accumulation, learning rates per layer. Rows are composed between the
steps (each record says for how long): a second thread for it was slower, as it takes the model's cores.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minivlp.text import WordPiece
from minivlp.training.run import Run, tensor_bytes
from minivlp.training.workers import ALONE, Workers

MATRICES = (".blocks.", "pooler.weight", "mlm.dense.weight")  # what Muon updates, by a part of its name
Loss = Callable[[nn.Module, Sequence[Any]], dict[str, Tensor]]


class Step(nn.Module):
    """A loss and its model as one module, for DDP must see the forward pass."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, groups: Sequence[Any]) -> dict[str, Tensor]:
        return self.loss(self.model, groups)


class Rates(Protocol):
    """What the loop needs of a run's configuration, train.py's or dual_train.py's."""

    steps: int
    batch: int
    lr: float  # AdamW
    matrix_lr: float  # Muon
    weight_decay: float
    warmup: int  # steps
    cooldown: float  # the last share of the run, in which the rates fall to zero
    save_every: int  # steps
    report_every: int


def optimizers(model: nn.Module, config: Rates) -> list[torch.optim.Optimizer]:
    """Muon for the MATRICES, AdamW for the rest; biases and norms are not decayed."""
    named = model.named_parameters()
    matrices = [p for name, p in named if p.ndim == 2 and any(part in name for part in MATRICES)]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    decayed = {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay}
    plain = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}
    muon = torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=0.0, momentum=0.95)
    adam = torch.optim.AdamW([decayed, plain], lr=config.lr, betas=(0.9, 0.98), eps=1e-8)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def rate(config: Rates, step: int) -> float:
    """The share of the peak rate at a step: linear warm-up, flat, linear to zero."""
    left = (config.steps - step) / max(1, round(config.cooldown * config.steps))
    return min(1.0, (step + 1) / max(1, config.warmup)) * min(1.0, left)


def fit(
    model: nn.Module,
    source: Callable[[int], Sequence[Any]],
    loss: Loss,
    config: Rates,
    run: Run,
    tokenizer: WordPiece,
    check: Callable[[nn.Module], dict[str, float]] = lambda model: {},
    device: str = "cpu",
    tick: Callable[[int, int], None] = lambda step, steps: None,
    workers: Workers = ALONE,
) -> Iterator[dict[str, Any]]:
    """Train `model` in place, on from the run's checkpoint if there is one; yield a record now and then.

    The model has a dataclass `config` of its sizes. `source(step)` gives a step's rows, which can move `.to`
    a device, `loss(model, rows)` their weighted terms, `check(model)` accuracies on what is not trained on,
    asked at most twenty times; `tick(step, steps)` is told of every step. Each of several `workers` trains on
    its part of the rows and must be given the same arguments; the terms in the records are its own part's.
    Raises FloatingPointError at the first step whose loss or gradient is not finite, naming the term; the
    last checkpoint is then kept.
    """
    model.to(device).train()
    tuned = optimizers(model, config)
    first, seconds, saved, means = 0, 0.0, None, {}
    # Process 0 decides, before it writes a first checkpoint that another might take for an old one.
    state = workers.agree(run.load() if workers.rank == 0 and run.checkpoint.exists() else None)
    if state:
        model.load_state_dict(state["model"])
        for optimizer, its_state in zip(tuned, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        first = saved = state["step"]
        seconds, means = state["seconds"], state["means"]
        run.forget_after(first)
    compute = workers.wrap(Step(model, loss))
    run.need_space(4 * tensor_bytes(model.state_dict()))  # a weight and at most three numbers beside it
    started = time.perf_counter() - seconds
    check_every = max(config.report_every, config.steps // 20)

    def save(step: int) -> None:
        run.save(
            {
                "step": step,
                "seconds": time.perf_counter() - started,
                "means": means,
                "tokens": tokenizer.tokens,
                "model": model.state_dict(),
                "model_config": asdict(model.config),
                "optimizers": [optimizer.state_dict() for optimizer in tuned],
            }
        )

    def stop(step: int, what: str, value: float) -> None:
        kept = f"the checkpoint of step {saved} is kept in {run.folder}"
        raise FloatingPointError(f"step {step}: {what} is {value}; {kept}")

    if saved is None:
        save(0)
        saved = 0
    tick(first, config.steps)
    composing = 0.0  # seconds since the last record that went into making rows
    for step in range(first, config.steps):
        asked = time.perf_counter()
        groups = [rows.to(device) for rows in workers.parts(source(step))]
        composing += time.perf_counter() - asked
        try:
            terms = compute(groups)
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            # A rung refused what the model computed.
            stop(step, f"the forward pass ({error})", math.nan)
        for name, term in terms.items():
            if not torch.isfinite(term):
                stop(step, f"loss term {name}", float(term.detach()))
        for optimizer in tuned:
            optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            stop(step, "the norm of the gradient", float(norm))
        torch.nn.utils.clip_grad_norm_(tuned[1].param_groups[0]["params"], 1.0)
        for optimizer in tuned:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(config, step)
            optimizer.step()
        for name, term in terms.items():
            means.setdefault(name, []).append(float(term.detach()))
        done = step + 1
        tick(done, config.steps)
        if done % config.report_every == 0 or done % check_every == 0 or done == config.steps:
            record = {"step": done, "rows": done * config.batch, "seconds": time.perf_counter() - started}
            record |= {name: sum(values) / len(values) for name, values in means.items()}
            record["composing"] = composing
            if done % check_every == 0 or done == config.steps:
                record |= check(model.eval())
                model.train()
            means, composing = {}, 0.0
            run.log(record)
            yield record
        if done % config.save_every == 0 or done == config.steps:
            save(done)
            saved = done
    model.eval()
