"""Sigmoid against softmax over batch sizes: dual encoders for names of drawings, alike but for the loss.

Both have CLIP's towers, the same seeds, drawings and rates, and take the same number of steps at each batch
size; the sigmoid loss begins with SigLIP's scale and bias, the softmax with CLIP's scale. Asked is, for a
plain drawing of each of a hundred concepts: which of all names is its own?

Source: Zhai et al. 2023 (SigLIP), sections 4.1 and 4.2 and figure 2.
Left out: batches beyond hundreds; rates tuned for each loss and batch.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minivlp.claims.settings import NamingSize
from minivlp.claims.training import train
from minivlp.claims.verdict import Sample
from minivlp.data import EmojiVL, load_emojivl
from minivlp.data.names import named
from minivlp.evaluation.match import Matcher, ranks, similarities
from minivlp.models.dual import Dual
from minivlp.recipes.base import Recipe
from minivlp.recipes.dual import Clip, PairBatch
from minivlp.sigmoid import sigmoid_loss
from minivlp.training.workers import Workers


class SoftmaxNaming(Clip):
    """CLIP on some of the drawings, asked at its end alone."""

    check = Recipe.check


class SigmoidNaming(SoftmaxNaming):
    """The sigmoid loss with CLIP's towers; the recipe of SigLIP has towers of its own."""

    def sizes(self) -> dict[str, Any]:
        return super().sizes() | {"init_scale": 10.0, "init_bias": -10.0}

    def compare(self, model: Dual, batch: PairBatch, workers: Workers) -> Tensor:
        images, texts = model.encode_image(batch.pixels), model.encode_text(batch.ids)  # (B, embed)
        return sigmoid_loss(images, texts, model.scale, model.bias)


LOSSES = {"sigmoid": SigmoidNaming, "softmax": SoftmaxNaming}


def naming_experiment(size: NamingSize, seed: int, folder: Path, loss: str) -> dict[str, Sample]:
    """Samples "batch b" for each batch size: is the name of a drawing ranked first? Clusters are concepts."""
    emojivl, samples = _drawings(size), {}
    for batch in size.batches:
        recipe = LOSSES[loss](replace(size.train, seed=seed, batch=batch))
        recipe.emojivl = emojivl
        about = {"loss": loss, "seed": seed, "batch": batch, "size": asdict(size)}
        samples[f"batch {batch}"] = _named(train(recipe, folder / f"batch-{batch}", about), recipe)
    return samples


def _drawings(size: NamingSize) -> EmojiVL:
    """Some of the concepts, by some of the artists, of which the others have drawn nothing."""
    whole = load_emojivl()
    concepts = tuple(
        replace(c, artists=() if c.id % size.every else tuple(a for a in c.artists if a in size.artists))
        for c in whole.concepts
    )
    return EmojiVL(concepts, {artist: whole.sheets[artist] for artist in size.artists})


def _named(model: Dual, recipe: Clip) -> Sample:
    """For every training drawing, plain and centred: is its own name first among all?"""
    matcher, concepts = Matcher(model, recipe.tokenizer), recipe.concepts
    artists = [next(a for a in recipe.emojivl.seen_artists if a in c.artists) for c in concepts]
    pixels = recipe.batches.portraits.plain([c.id for c in concepts], artists)
    S = similarities(matcher.pictures(pixels), matcher.texts([named(c, "en") for c in concepts]))
    own = np.eye(len(concepts), dtype=bool)
    return Sample((ranks(S, own) < 1).astype(float).tolist(), [c.id for c in concepts])
