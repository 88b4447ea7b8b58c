"""The experiments in the world of eight objects: one archetype trained in one way, then asked everything.

    heavy, towers, grid, patch, bag    the archetypes, words hidden by the curriculum
    unaligned                          patch without word-patch alignment
    words, pieces                      patch with whole words or single pieces hidden at random, and a
                                       vocabulary so small that most nouns fall to pieces

Left out: rates tuned for each; all take those of the main job.
"""

from dataclasses import asdict, replace
from pathlib import Path

from minivlp.claims.archetypes import ARCHETYPES, CONTROL
from minivlp.claims.exam import exam
from minivlp.claims.settings import WorldSize
from minivlp.claims.training import train
from minivlp.claims.verdict import Sample
from minivlp.claims.world import ArchetypeRecipe, world

VARIANTS = (*ARCHETYPES, CONTROL, "unaligned", "words", "pieces")


def paired(size: WorldSize, seed: int, folder: Path, variant: str) -> dict[str, Sample]:
    """Train one of VARIANTS with the seed, and ask it."""
    masked = variant in ("words", "pieces")
    place = world(size, size.pieces if masked else size.train.vocab_size)
    kind = variant if variant in (*ARCHETYPES, CONTROL) else "patch"
    settings = replace(size.train, seed=seed, **({"wpa_weight": 0.0} if variant == "unaligned" else {}))
    recipe = ArchetypeRecipe(settings, place, kind, variant if masked else "curriculum")
    about = {"variant": variant, "seed": seed, "size": asdict(size)}
    return exam(train(recipe, folder, about), place)
