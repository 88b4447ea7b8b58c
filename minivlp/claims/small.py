"""What the experiments of less than a minute share: a few objects in small pictures, and new pairs of them.

Asked are pairs of the training split in pictures that no training seed draws; held-out pairs are too few.

Left out: checks during training; a model is asked at its end alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from minivlp.claims.exam import pair_of
from minivlp.claims.settings import Small
from minivlp.claims.training import train
from minivlp.claims.verdict import Sample
from minivlp.data import EmojiVL, Scene, Scenes, load_emojivl
from minivlp.data.probes import retrieval_sets
from minivlp.recipes.base import Recipe

TEST_SEED = 1_000_000  # of the test scenes


def trained(
    kind: type[Recipe], size: Small, seed: int, folder: Path, **changes: Any
) -> tuple[Recipe, nn.Module, Scenes]:
    """The recipe of this kind with its settings changed, its model trained, and the test scenes."""
    recipe, whole = kind(replace(size.train, seed=seed, **changes)), load_emojivl()
    recipe.check = lambda model: {}
    recipe.emojivl = EmojiVL(whole.concepts, {artist: whole.sheets[artist] for artist in size.artists})
    model = train(recipe, folder, {"kind": kind.__name__, "seed": seed, "size": asdict(size)} | changes)
    return recipe, model, Scenes(recipe.emojivl, recipe.nouns, canvas=size.train.canvas, seed=TEST_SEED)


def sample(values: Iterable[float], scenes: Sequence[Scene]) -> Sample:
    """A number of each scene; clusters are its pairs of objects."""
    return Sample([float(value) for value in values], [pair_of(scene) for scene in scenes])


def retrieval(score: Callable[[Sequence[str], Sequence[Scene]], np.ndarray], source: Scenes, size: Small):
    """Is a caption's picture strictly the first of its set? score(captions, scenes) → (captions, scenes)."""
    sets = retrieval_sets((source[i] for i in count(size.items)), size.sets, size.candidates)
    S = [score([scene.caption for scene in one], one) for one in sets]
    hits = [s.diagonal() > np.where(np.eye(len(s), dtype=bool), -np.inf, s).max(1) for s in S]
    return sample(np.concatenate(hits), [scene for one in sets for scene in one])
