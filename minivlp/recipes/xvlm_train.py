"""Train an X-VLM: contrast, matching and masked words on regions and on pictures, and a box for each phrase.

    loss = InfoNCE(regions, texts) + matching + masked words + box loss,        all weights 1,

each the mean over its rows. The box of a phrase is read from the whole picture, the other terms from its
region. Matching has three pairs a row: the true one, its text with a hard wrong region and its region with a
hard wrong text, drawn by the similarities of the contrastive term (itm.py). A batch without boxes has a box
loss of 0.

The sizes and rates of a run are an XvlmTrain; ABLATIONS are changes to one: without the box loss, or without
regions, on captions of whole pictures alone. fit.py has the loop.

Sources: Zeng, Zhang and Li 2022 (X-VLM), section 3.3.
Left out: spans of hidden words, and gathering negatives from several processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.boxes import box_loss
from minivlp.data import CPU_NOUNS
from minivlp.infonce import infonce
from minivlp.itm import hard_negatives, itm_loss
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.xvlm import Xvlm, XvlmConfig, small_init, whole_picture
from minivlp.recipes.xvlm_rows import RegionRows
from minivlp.regions import region_mask, region_tokens


@dataclass(frozen=True)
class XvlmTrain:
    """Everything that decides a run's weights, besides the data. Rates are per step, sizes in pixels."""

    nouns: tuple[str, ...] | None = CPU_NOUNS  # None = all countable training nouns
    canvas: int = 48
    patch: int = 8
    dim: int = 96
    image_layers: int = 3
    text_layers: int = 1
    cross_layers: int = 2
    heads: int = 3
    hidden: int = 192
    embed: int = 96
    max_text_len: int = 24
    vocab_size: int = 512
    steps: int = 3000
    batch: int = 16  # pictures a step
    regions: float = 0.8  # share of the steps that show regions; the others show captions of whole pictures
    box_weight: float = 1.0
    mask: float = 0.25  # probability of hiding a word
    lr: float = 2e-3  # AdamW: embeddings, norms, biases, heads
    matrix_lr: float = 0.01  # Muon: matrices
    weight_decay: float = 0.01
    warmup: int = 30  # steps
    cooldown: float = 0.4  # the last share of the run, in which the rates fall to zero
    save_every: int = 200  # steps
    report_every: int = 50
    seed: int = 0


PRESETS = {"cpu": XvlmTrain()}
# What `--without` changes, to see what it is good for.
ABLATIONS = {"boxes": {"box_weight": 0.0}, "regions": {"regions": 0.0}}
SIZES = tuple(name for name in XvlmConfig.__dataclass_fields__ if name in XvlmTrain.__dataclass_fields__)


def xvlm_config(settings: Mapping[str, Any]) -> XvlmTrain:
    """What a run began with. Raises ValueError when its settings are none of this version."""
    try:
        return XvlmTrain(**settings["train"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the settings of the run are not of this version ({error})") from error


def new_xvlm(config: XvlmTrain, vocab_size: int) -> Xvlm:
    """An X-VLM of this size with fresh values from the seed (set for torch's default generator)."""
    torch.manual_seed(config.seed)
    sizes = {name: getattr(config, name) for name in SIZES}
    return small_init(Xvlm(XvlmConfig(**sizes | {"vocab_size": vocab_size, "image_size": config.canvas})))


def xvlm_loss(model: Xvlm, groups: Sequence[RegionRows], config: XvlmTrain) -> dict[str, Tensor]:
    """The terms of one step, each the mean over its rows, summed over the groups, already weighted."""
    terms: dict[str, Tensor] = {}
    for rows in groups:
        for name, term in _terms(model, rows, config).items():
            terms[name] = terms.get(name, 0) + term
    return terms


def _terms(model: Xvlm, rows: RegionRows, config: XvlmTrain) -> dict[str, Tensor]:
    patches = model.image_patches(rows.pixels)  # (B, N, D): the image encoder runs once
    words = model.text_words(rows.ids, rows.text_mask)  # (R, L, D)
    regions, real = region_tokens(patches[rows.picture], rows.inside), region_mask(rows.inside)
    x, y = model.image_vector(regions[:, 0]), model.text_vector(words)  # (R, embed)
    terms = {}
    if rows.contrast.any():
        terms["itc"] = infonce(x[rows.contrast], y[rows.contrast], model.scale)
    text, region, labels = matching_pairs(x, y, model.scale, rows, config.seed)
    if len(labels):
        fused = model.fuse(words[text], rows.text_mask[text], regions[region], real[region])
        terms["itm"] = itm_loss(model.itm_logits(fused[:, 0]), labels)
    some = (rows.labels != IGNORE).any(1)  # (R,)
    if some.any():
        hidden = model.text_words(rows.hidden[some], rows.text_mask[some])
        fused = model.fuse(hidden, rows.text_mask[some], regions[some], real[some])
        masked = rows.labels[some] != IGNORE  # (R', L)
        states = model.mlm_hidden(fused[masked])
        terms["mlm"] = mlm_loss(states, model.mlm_weight, model.mlm_bias, rows.labels[some][masked])
    if config.box_weight:
        at = rows.located
        everywhere = whole_picture(patches)[rows.picture[at]]  # (R', 1+N, D)
        fused = model.fuse(
            words[at], rows.text_mask[at], everywhere, everywhere.new_ones(everywhere.shape[:2]) > 0
        )
        terms["box"] = config.box_weight * box_loss(model.boxes(fused[:, 0]), rows.boxes[at])
    return terms


def matching_pairs(
    x: Tensor, y: Tensor, scale: Tensor, rows: RegionRows, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of texts, rows of regions, labels (3M,): M true pairs, M with wrong regions, M with wrong texts.

    x, y (R, embed) unit regions and texts. The wrong ones are drawn by (seed, step). Empty when all texts of
    the batch mean the same.
    """
    true = rows.match.nonzero()[:, 0]  # (M,)
    same = rows.same[true]
    if not len(true) or bool((same == same[0]).all()):
        none = true[:0]
        return none, none, none
    rng = np.random.default_rng((seed, rows.step, 1))
    S = (scale * y[true] @ x[true].T).detach().cpu().double().numpy()  # (M, M), texts by regions
    ids = same.cpu().numpy()
    region, text = (torch.from_numpy(hard_negatives(s, rng, ids)).to(true.device) for s in (S, S.T))
    labels = torch.zeros(3 * len(true), dtype=torch.long, device=true.device)
    labels[: len(true)] = 1
    return torch.cat([true, true, true[text]]), torch.cat([true, true[region], true]), labels
