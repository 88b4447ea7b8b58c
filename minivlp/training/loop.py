"""The training loop: batches → loss terms → gradients → one update, and checkpoints that lose nothing.

Matrices are updated by Muon (momentum made orthogonal, which needs clearly fewer examples here), embeddings
and everything else by AdamW; what does not require gradients is left as it is. Everything random depends on
(seed, step), so a checkpoint needs no generator state and a resumed run ends in the same weights.

Sources: Kim, Son and Kim 2021 (ViLT), section 4.2, for AdamW's settings; Jordan et al. 2024 for Muon, which
ViLT does not use.
Left out: mixed precision, gradient accumulation, learning rates per layer. Batches are composed between the
steps (each record says for how long): a second thread for it was slower, as it takes the model's cores.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minivlp.core.files import write_text
from minivlp.core.require import NotFinite, fail
from minivlp.text import WordPiece
from minivlp.training.run import Run, tensor_bytes, write_json
from minivlp.training.screen import Screen, progress_line
from minivlp.training.trained import Trained, write_trained
from minivlp.training.workers import ONE_PROCESS, Workers

TEST_SEED = 1  # of the evaluation that ends a run


@dataclass(frozen=True)
class Rates:
    """The numbers of the loop; rates are per step."""

    steps: int = 1000
    batch: int = 64  # examples a step
    lr: float = 2e-3  # AdamW: embeddings, norms, biases, heads
    matrix_lr: float = 0.01  # Muon: matrices
    weight_decay: float = 0.01
    warmup: int = 30  # steps
    cooldown: float = 0.4  # the last share of the run, in which the rates fall to zero
    save_every: int = 200  # steps
    report_every: int = 50  # steps
    seed: int = 0


class Trainable(Protocol):
    """What the loop needs of a recipe; recipes/base.py has the rest."""

    settings: Rates
    terms: tuple[str, ...]  # of the loss
    tokenizer: WordPiece
    model: nn.Module  # with a dataclass `config` of its sizes

    def batch(self, step: int) -> list[Any]: ...
    def loss(self, model: nn.Module, batches: Sequence[Any], workers: Workers) -> dict[str, Tensor]: ...
    def matrices(self, model: nn.Module) -> list[nn.Parameter]: ...
    def check(self, model: nn.Module) -> dict[str, float]: ...


class Step(nn.Module):
    """A recipe's loss and its model as one module, for DDP must see the forward pass."""

    def __init__(self, recipe: Trainable, workers: Workers):
        super().__init__()
        self.model, self.recipe, self.workers = recipe.model, recipe, workers

    def forward(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        return self.recipe.loss(self.model, batches, self.workers)


def optimizers(
    model: nn.Module, matrices: Sequence[nn.Parameter], rates: Rates
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices; without what requires no gradient. Biases and norms do not decay."""
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    decayed = {"params": [p for p in rest if p.ndim >= 2], "weight_decay": rates.weight_decay}
    plain = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (decayed, plain) if group["params"]]
    tuned = []
    if matrices:
        tuned += [torch.optim.Muon(matrices, lr=rates.matrix_lr, weight_decay=0.0, momentum=0.95)]
    if groups:
        tuned += [torch.optim.AdamW(groups, lr=rates.lr, betas=(0.9, 0.98), eps=1e-8)]
    for optimizer in tuned:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return tuned


def rate(rates: Rates, step: int) -> float:
    """The share of the peak rate at a step: linear warm-up, flat, linear to zero."""
    left = (rates.steps - step) / max(1, round(rates.cooldown * rates.steps))
    return min(1.0, (step + 1) / max(1, rates.warmup)) * min(1.0, left)


def steps(
    recipe: Trainable,
    run: Run,
    workers: Workers = ONE_PROCESS,
    tick: Callable[[int, int], None] = lambda step, steps: None,
) -> Iterator[dict[str, Any]]:
    """Train the recipe's model in place, on from the run's checkpoint if there is one; yield records.

    metrics.jsonl holds the records too. `tick(step, steps)` is told of every step; `check` is asked at most
    twenty times. Each of several `workers` trains on its part of the batches and must be given the same
    arguments; the terms in the records are its own part's. Raises FloatingPointError at the first step whose
    loss or gradient is not finite, naming the term; the last checkpoint is then kept.
    """
    settings, device = recipe.settings, run.settings.get("device", "cpu")
    model = recipe.model.to(device).train()
    matrices = recipe.matrices(model)
    tuned = optimizers(model, matrices, settings)
    by_muon = {id(p) for p in matrices}
    clipped = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2 and id(p) not in by_muon]
    first, seconds, saved, means = 0, 0.0, None, {}
    # Process 0 decides, before it writes a first checkpoint that another might take for an old one.
    state = workers.broadcast(run.load() if workers.rank == 0 and run.checkpoint.exists() else None)
    if state:
        model.load_state_dict(state["model"])
        for optimizer, its_state in zip(tuned, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        first = saved = state["step"]
        seconds, means = state["seconds"], state["means"]
        run.forget_after(first)
    compute = workers.wrap(Step(recipe, workers))
    run.need_space(4 * tensor_bytes(model.state_dict()))  # a weight and at most three numbers beside it
    started = time.perf_counter() - seconds
    check_every = max(settings.report_every, settings.steps // 20)

    def save(step: int) -> None:
        run.save(
            {
                "step": step,
                "seconds": time.perf_counter() - started,
                "means": means,
                "tokens": recipe.tokenizer.tokens,
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
    tick(first, settings.steps)
    composing = 0.0  # seconds since the last record that went into making batches
    for step in range(first, settings.steps):
        asked = time.perf_counter()
        batches = [batch.to(device) for batch in workers.parts(recipe.batch(step))]
        composing += time.perf_counter() - asked
        try:
            terms = compute(batches)
        except NotFinite as error:  # a rung refused what the model computed
            stop(step, f"the forward pass ({error})", math.nan)
        for name, term in terms.items():
            if name not in recipe.terms:  # it would be summed, and never drawn
                fail("terms", f"must hold every term of the loss, {', '.join(terms)}", recipe.terms)
            if not torch.isfinite(term):
                stop(step, f"loss term {name}", float(term.detach()))
        for optimizer in tuned:
            optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            stop(step, "the norm of the gradient", float(norm))
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        for optimizer in tuned:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(settings, step)
            optimizer.step()
        for name, term in terms.items():
            means.setdefault(name, []).append(float(term.detach()))
        done = step + 1
        tick(done, settings.steps)
        if done % settings.report_every == 0 or done % check_every == 0 or done == settings.steps:
            record = {"step": done, "rows": done * settings.batch, "seconds": time.perf_counter() - started}
            record |= {name: sum(values) / len(values) for name, values in means.items()}
            record["composing"] = composing
            if done % check_every == 0 or done == settings.steps:
                record |= recipe.check(model.eval()) if workers.rank == 0 else {}
                model.train()
            means, composing = {}, 0.0
            run.log(record)
            yield record
        if done % settings.save_every == 0 or done == settings.steps:
            save(done)
            saved = done
    model.eval()


def train(recipe: Any, run: Run, screen: Screen, workers: Workers = ONE_PROCESS) -> Trained:
    """All steps, told line by line and with a bar; what they made, on the CPU."""
    workers.check_sizes(recipe.sizes_of_batches() if workers.size > 1 else ())
    settings, size = recipe.settings, sum(p.numel() for p in recipe.model.parameters())
    what = f"{settings.steps} steps of {settings.batch} rows"
    screen.say(f"{size:,} parameters, {recipe.summary}, {what}, in {run.folder}")
    with screen.bar("training") as tick:
        for record in steps(recipe, run, workers, tick):
            screen.say(progress_line(record, settings.steps))
    model = recipe.model.to("cpu")
    return Trained(model, recipe.tokenizer, run.settings, settings.steps, run.folder)


def measure(
    recipe: Any, trained: Trained, items: int, seed: int, device: str, screen: Screen
) -> dict[str, Any]:
    """The results of the recipe's evaluation, told."""
    trained.model.to(device)
    with screen.bar("evaluating", lines=True) as tick:
        results = recipe.evaluate(trained, items, seed, tick)
    trained.model.to("cpu")
    screen.say(recipe.report(results))
    return results


def finish(recipe: Any, run: Run, trained: Trained, items: int, screen: Screen) -> None:
    """Write eval.json, report.md, the model as one small file, and the pictures of a run that is trained."""
    results = measure(recipe, trained, items, TEST_SEED, run.settings["device"], screen)
    write_json(run.folder / "eval.json", results)
    write_text(run.folder / "report.md", recipe.report(results))
    tensors = recipe.to_published(trained.model)
    write_trained(trained, run.folder / f"{recipe.name}_tiny.safetensors", results, tensors)
    for path in recipe.draw(trained, run.folder, run.records()):
        screen.say(f"wrote {path}")
