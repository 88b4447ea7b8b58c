"""Sigmoid against softmax over batch sizes: dual encoders for names of drawings, alike but for the loss.

Both have the same towers, seeds, drawings and rates and take the same number of steps at each batch size;
the sigmoid loss begins with SigLIP's scale and bias, the softmax with CLIP's scale. Asked is, for a plain
drawing of each of a hundred concepts: which of all names is its own?

Source: Zhai et al. 2023 (SigLIP), sections 4.1 and 4.2 and figure 2.
Left out: batches beyond hundreds; rates tuned for each loss and batch.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlp.claims.settings import NamesSize
from minivlp.claims.training import train
from minivlp.claims.verdict import Sample
from minivlp.data import TRAINING_ARTISTS, EmojiVL, load_emojivl, trained_concepts
from minivlp.data.drawings import Portraits
from minivlp.data.names import name_tokenizer, named
from minivlp.evaluation.match import Matcher, ranks, similarities
from minivlp.infonce import infonce
from minivlp.models.dual import Dual, DualConfig, small_init
from minivlp.recipes.dual_train import DualTrain, PairSource
from minivlp.sigmoid import sigmoid_loss
from minivlp.text import WordPiece

LOSSES = ("sigmoid", "softmax")


def names(size: NamesSize, seed: int, folder: Path, loss: str) -> dict[str, Sample]:
    """Samples "batch b" for each batch size: is the name of a drawing ranked first? Clusters are concepts."""
    emojivl = _drawings(size)
    tokenizer = name_tokenizer(trained_concepts(emojivl, TRAINING_ARTISTS), "en")
    found = {}
    for batch in size.batches:
        config = replace(size.train, seed=seed, batch=batch)
        model = _dual(size, config, loss, tokenizer)
        source = PairSource(emojivl, tokenizer, config)
        about = {"loss": loss, "seed": seed, "batch": batch, "size": asdict(size)}
        job = (source, partial(_loss, kind=loss), config, tokenizer, folder / f"batch-{batch}", about)
        found[f"batch {batch}"] = _named(train(model, *job), tokenizer, emojivl, source.portraits)
    return found


def _drawings(size: NamesSize) -> EmojiVL:
    """Some of the concepts, by some of the artists, of which the others have drawn nothing."""
    whole = load_emojivl()
    concepts = tuple(
        replace(c, artists=() if c.id % size.every else tuple(a for a in c.artists if a in size.artists))
        for c in whole.concepts
    )
    return EmojiVL(concepts, {artist: whole.sheets[artist] for artist in size.artists})


def _dual(size: NamesSize, config: DualTrain, loss: str, tokenizer: WordPiece) -> Dual:
    """CLIP's form for both; `dual_train.new_dual` would give the sigmoid loss towers of its own."""
    torch.manual_seed(config.seed)
    fields = {name: getattr(config, name) for name in ("embed", "patch", "max_text_len")}
    shared = ("dim", "layers", "heads", "hidden")
    fields |= {f"text_{name}": getattr(config, f"text_{name}") for name in shared}
    fields |= {f"image_{name}": getattr(config, name) for name in shared}
    if loss == "sigmoid":
        fields |= {"init_scale": size.init_scale, "init_bias": size.init_bias}
    sizes = DualConfig(len(tokenizer), image_size=config.canvas, eot=tokenizer.sep_id, **fields)
    return small_init(Dual(sizes))


def _loss(model: Dual, groups: list, kind: str) -> dict[str, Tensor]:
    (pairs,) = groups
    model.clamp_scale()
    x, y = model.encode_image(pairs.pixels), model.encode_text(pairs.ids)  # (B, embed)
    if kind == "sigmoid":
        return {"sigmoid": sigmoid_loss(x, y, model.scale, model.bias)}
    return {"infonce": infonce(x, y, model.scale)}


def _named(model: Dual, tokenizer: WordPiece, emojivl: EmojiVL, portraits: Portraits) -> Sample:
    """For every training drawing, plain and centred: is its own name first among all?"""
    matcher = Matcher(model, tokenizer)
    concepts = trained_concepts(emojivl, TRAINING_ARTISTS)
    asked = [(c, next(a for a in TRAINING_ARTISTS if a in c.artists)) for c in concepts]
    pixels = portraits.plain([c.id for c, _ in asked], [a for _, a in asked])
    S = similarities(matcher.pictures(pixels), matcher.texts([named(c, "en") for c in concepts]))
    own = np.eye(len(concepts), dtype=bool)
    return Sample((ranks(S, own) < 1).astype(float).tolist(), [c.id for c in concepts])
