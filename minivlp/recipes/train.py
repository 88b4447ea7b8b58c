"""The main job: a ViLT from fresh values, and its loss, masked words + matching + 0.1 · word-patch alignment.

Rows that say so also have their words and patches read apart (apart.py): a fourth term, which ViLT does not
have. Without it words come to point at their own object in one run and not in the next.

The sizes and rates of a run are a TrainConfig; a preset is one with other values. fit.py has the loop.

Sources: Kim, Son and Kim 2021 (ViLT), section 3.2.
Left out: ViLT's own sizes (models/vilt.py's defaults), for which no laptop is enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlp.data import CPU_NOUNS, Concept
from minivlp.ipot import alignment_masks, wpa_fused
from minivlp.itm import itm_loss
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.vilt import Vilt, ViltConfig, small_init
from minivlp.recipes.noun_contrast import apart_loss
from minivlp.recipes.questions import WORDS as QUESTION_WORDS
from minivlp.recipes.vilt_batches import Rows
from minivlp.text import WordPiece
from minivlp.training.workers import ALONE, Workers


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
    steps: int = 2800
    batch: int = 64
    lr: float = 2e-3  # AdamW: embeddings, norms, biases, heads
    matrix_lr: float = 0.01  # Muon: matrices
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
    return small_init(Vilt(sizes))


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


def pretraining_loss(
    model: Vilt, groups: Sequence[Rows], wpa_weight: float, workers: Workers = ALONE
) -> dict[str, Tensor]:
    """The weighted terms of one step: means over hidden words, rows that serve matching, and rows read apart.

    A row read apart is compared with all others of its group. Of several workers each has its part of the
    rows, and the mean of what they return is the whole.
    """
    hidden_words = sum(int((g.labels != IGNORE).sum()) for g in groups)
    matched = sum(int((g.match >= 0).sum()) for g in groups)
    apart = [0 if g.noun is None else int(g.noun.any(1).sum()) for g in groups]
    counts = workers.mean((hidden_words, matched, *apart), groups[0].ids.device)
    words, pairs, *apart = (max(n, 1) for n in counts)
    terms = {"mlm": 0.0, "itm": 0.0, "wpa": 0.0, "apart": 0.0}
    for g, n in zip(groups, apart, strict=True):
        out = model.encode(g.ids, g.text_mask, g.pixels, g.pixel_mask)
        hidden = g.labels != IGNORE  # (B, L)
        states = model.mlm_hidden(out["text"][hidden])  # (hidden words, D)
        loss = mlm_loss(states, model.mlm_weight, model.mlm_bias, g.labels[hidden])
        terms["mlm"] += int(hidden.sum()) / words * loss
        pair = g.match >= 0  # (B,)
        if pair.any():
            loss = itm_loss(model.itm_logits(out["pooled"][pair]), g.match[pair])
            terms["itm"] += int(pair.sum()) / pairs * loss
        aligned = g.align != 0
        if wpa_weight and aligned.any():
            distance = wpa_fused(
                out["text"][aligned],
                out["image"][aligned, 1:],
                alignment_masks(g.text_mask[aligned]),
                out["image_mask"][aligned, 1:],
            )  # (B',)
            # As in ViLT: true pairs pulled together, wrong pairs pushed apart, over all matching rows.
            terms["wpa"] += wpa_weight * (g.align[aligned] * distance).sum() / pairs
        if g.noun is not None:
            read = g.noun.any(1)
            pairs_apart = (z[read] for z in (g.captions, g.caption_mask, g.noun, g.pixels))
            terms["apart"] += n / sum(apart) * apart_loss(model, *pairs_apart, workers)
    return {name: term for name, term in terms.items() if torch.is_tensor(term)}
