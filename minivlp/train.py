"""The training loop, and the main job's loss: masked words + matching + 0.1 · word-patch alignment.

One step: rows → states → loss terms → gradients → one update. The matrices of the blocks are updated by Muon
(momentum made orthogonal, which needs clearly fewer scenes here), everything else by AdamW. Everything random
depends on (seed, step), so a checkpoint needs no generator state and a resumed run ends in the same weights.

Sources: Kim, Son and Kim 2021 (ViLT), sections 3.2 and 4.2, for the objectives and AdamW's settings; Jordan
et al. 2024 for Muon, which ViLT does not use.
Left out: mixed precision, gradient accumulation, learning rates per layer.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minivlp.batches import Rows
from minivlp.data import CPU_NOUNS, Concept
from minivlp.ipot import alignment_masks, wpa
from minivlp.itm import itm_loss
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.models.vilt_start import start_small
from minivlp.questions import WORDS as QUESTION_WORDS
from minivlp.runs import Run, tensor_bytes
from minivlp.text import WordPiece

Loss = Callable[[Vilt, Sequence[Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's weights, besides the data. Rates are per step, sizes in pixels."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    canvas: int = 48
    patch: int = 8
    dim: int = 96
    layers: int = 4
    heads: int = 3
    hidden: int = 192
    max_text_len: int = 24
    vocab_size: int = 512
    steps: int = 4000
    batch: int = 64
    lr: float = 2e-3  # AdamW: embeddings, norms, biases, heads
    matrix_lr: float = 0.01  # Muon: the matrices of the blocks
    weight_decay: float = 0.01
    warmup: int = 30  # steps
    cooldown: float = 0.4  # the last share of the run, in which the rates fall to zero
    wpa_weight: float = 0.1
    mask: float = 0.15  # probability of hiding a word of one's own captions
    save_every: int = 200  # steps
    report_every: int = 50
    seed: int = 0


PRESETS = {
    "cpu": TrainConfig(),
    "gpu": TrainConfig(
        nouns=None, canvas=96, patch=16, dim=256, layers=6, heads=4, hidden=1024, vocab_size=2048,
        steps=30_000, batch=256, lr=1e-3, matrix_lr=0.005, warmup=300,
    ),
    "captions": TrainConfig(
        nouns=None, canvas=96, patch=16, dim=128, layers=4, heads=4, hidden=512, max_text_len=40,
        vocab_size=4096, steps=2000, batch=32,
    ),
}  # fmt: skip


def train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """What a run began with. Raises ValueError when its settings are none of this version."""
    try:
        return TrainConfig(**settings["train"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the settings of the run are not of this version ({error})") from error


def new_model(config: TrainConfig, vocab_size: int, **heads: Any) -> Vilt:
    """A ViLT of this size with fresh values from the seed (set for torch's default generator)."""
    torch.manual_seed(config.seed)
    sizes = ViltConfig(
        vocab_size=vocab_size,
        max_text_len=config.max_text_len,
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        hidden=config.hidden,
        patch=config.patch,
        image_size=config.canvas,
        **heads,
    )
    return start_small(Vilt(sizes))


def scene_texts(nouns: Sequence[Concept]) -> list[str]:
    """Every noun in every frame of the scenes and of the questions about them."""
    frames = (
        *("{a} left of the middle", "{a} right of {a}", "{a} above {a}", "{a} below {a}"),
        *("{a} between {a} and {a}", "one {n}", "two {p}", "three {p}", "four {p}"),
    )
    return [
        *(f.format(a=f"{c.article} {c.noun}", n=c.noun, p=c.plural) for c in nouns for f in frames),
        *QUESTION_WORDS,
    ]


def scene_tokenizer(nouns: Sequence[Concept], vocab_size: int) -> WordPiece:
    """A vocabulary learned from `scene_texts`."""
    return WordPiece.train(scene_texts(nouns), vocab_size, min_count=1)


def pretraining_loss(model: Vilt, groups: Sequence[Rows], wpa_weight: float) -> dict[str, Tensor]:
    """The loss terms of one step, each the mean over its rows in all groups, already weighted."""
    n_words = sum(int((g.labels != IGNORE).any(1).sum()) for g in groups)
    n_match = sum(int((g.match >= 0).sum()) for g in groups)
    n_align = sum(int((g.align != 0).sum()) for g in groups)
    terms = {"mlm": 0.0, "itm": 0.0, "wpa": 0.0}
    for g in groups:
        out = model.encode(g.ids, g.text_mask, g.pixels, g.pixel_mask)
        hidden = g.labels != IGNORE  # (B, L)
        states = model.mlm_hidden(out["text"][hidden])  # (masked words, D)
        share = int(hidden.any(1).sum()) / max(n_words, 1)
        terms["mlm"] += share * mlm_loss(states, model.mlm_weight, model.mlm_bias, g.labels[hidden])
        pair = g.match >= 0  # (B,)
        if pair.any():
            share = int(pair.sum()) / n_match
            terms["itm"] += share * itm_loss(model.itm_logits(out["pooled"][pair]), g.match[pair])
        aligned = g.align != 0
        if wpa_weight and aligned.any():
            distance = wpa(
                out["text"][aligned],
                out["image"][aligned, 1:],
                alignment_masks(g.text_mask[aligned]),
                out["image_mask"][aligned, 1:],
            )  # (B',)
            # ViLT: true pairs pulled together, wrong pairs pushed apart, over the number of both.
            terms["wpa"] += wpa_weight * (g.align[aligned] * distance).sum() / n_align
    return {name: term for name, term in terms.items() if torch.is_tensor(term)}


def optimizers(model: Vilt, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; biases and norms are not decayed."""
    matrices = [p for p in model.encoder.blocks.parameters() if p.ndim == 2]
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


def rate(config: TrainConfig, step: int) -> float:
    """The share of the peak rate at a step: linear warm-up, flat, linear to zero."""
    left = (config.steps - step) / max(1, round(config.cooldown * config.steps))
    return min(1.0, (step + 1) / max(1, config.warmup)) * min(1.0, left)


def fit(
    model: Vilt,
    source: Callable[[int], Sequence[Rows]],
    loss: Loss,
    config: TrainConfig,
    run: Run,
    tokenizer: WordPiece,
    check: Callable[[Vilt], dict[str, float]] = lambda model: {},
    device: str = "cpu",
    tick: Callable[[int, int], None] = lambda step, steps: None,
) -> Iterator[dict[str, Any]]:
    """Train `model` in place, on from the run's checkpoint if there is one; yield a record now and then.

    `source(step)` gives a step's rows, `loss(model, rows)` its weighted terms, `check(model)` accuracies on
    scenes that are not trained on, asked at most twenty times; `tick(step, steps)` is told of every step.
    Raises FloatingPointError at the first step whose loss or gradient is not finite, naming the term; the
    last checkpoint is then kept.
    """
    model.to(device).train()
    tuned = optimizers(model, config)
    first, seconds, saved, means = 0, 0.0, None, {}
    if run.checkpoint.exists():
        state = run.load()
        model.load_state_dict(state["model"])
        for optimizer, its_state in zip(tuned, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        first = saved = state["step"]
        seconds, means = state["seconds"], state["means"]
        run.forget_after(first)
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
    batches, waited = _ahead(source, first, config.steps), 0.0
    for step in range(first, config.steps):
        asked = time.perf_counter()
        groups = [rows.to(device) for rows in next(batches)]
        waited += time.perf_counter() - asked
        try:
            terms = loss(model, groups)
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
            record["waited"] = waited  # seconds since the last record in which training waited for rows
            if done % check_every == 0 or done == config.steps:
                record |= check(model.eval())
                model.train()
            means, waited = {}, 0.0
            run.log(record)
            yield record
        if done % config.save_every == 0 or done == config.steps:
            save(done)
            saved = done
    model.eval()


def _ahead(source: Callable[[int], Sequence], first: int, last: int) -> Iterator[Sequence]:
    """source(first) … source(last − 1), each made in a thread while the caller works with the one before."""
    if first == last:
        return
    with ThreadPoolExecutor(1) as composer:
        coming = composer.submit(source, first)
        for step in range(first + 1, last):
            rows, coming = coming.result(), composer.submit(source, step)
            yield rows
        yield coming.result()
