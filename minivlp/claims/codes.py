"""A VQ-VAE whose dead codes are put on vectors that exist, and one whose dead codes stay dead.

    z = E(patch),  codes and their loss by vq.py,  loss = mean (patch − D(quantised))² + that loss

It reads the pictures of a Chameleon, in place of whose k-means it would stand. Codes begin as numbers of unit
variance, wherever the vectors are. A restart moves, before each step, those that no patch of its pictures
chooses. Asked are new pictures: the perplexity of their codes, K when all are used alike and 1 for one, and
the error of the pictures made of them in decibels (PSNR).

Sources: van den Oord et al. 2017 (VQ-VAE); Łańcucki et al. 2020 for restarts.
Left out: convolutions; codes that follow a running mean, and k-means before the first step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.claims.settings import Small
from minivlp.claims.small import trained
from minivlp.claims.verdict import Sample
from minivlp.data import scene_pixels
from minivlp.patch import to_patches
from minivlp.recipes.base import Terms
from minivlp.recipes.chameleon import ChameleonRecipe, ChameleonSettings
from minivlp.training.workers import ONE_PROCESS, Workers
from minivlp.vq import nearest_fused, perplexity, restart_dead, vq_fused


class Autoencoder(nn.Module):
    """A code for every patch. Initial values use torch's default generator."""

    def __init__(self, config: ChameleonSettings):
        super().__init__()
        self.config, D, w = config, config.dim, 3 * config.patch**2
        self.encode = nn.Sequential(nn.Linear(w, w), nn.ReLU(), nn.Linear(w, D))
        self.decode = nn.Sequential(nn.Linear(D, w), nn.ReLU(), nn.Linear(w, w))
        self.codes = nn.Parameter(torch.randn(config.codes, D))


class Plain(ChameleonRecipe):
    """The VQ-VAE on pictures of pairs."""

    terms = ("picture", "codes")
    restart = False

    def new_model(self) -> Autoencoder:
        return Autoencoder(self.settings)

    def batch(self, step: int) -> list[Any]:
        return [*super().batch(step), torch.tensor(step)]

    def patches(self, pixels: Tensor) -> Tensor:
        """All patches of pictures (B, 3, H, W): (M, 3·p·p)."""
        return to_patches(pixels, self.settings.patch).flatten(0, 1)

    def loss(self, model: Autoencoder, batches: Sequence[Any], workers: Workers = ONE_PROCESS) -> Terms:
        patches, step = self.patches(batches[0].pixels), int(batches[1])
        z = model.encode(patches)  # (M, D)
        if self.restart:
            rng = np.random.default_rng((self.settings.seed, step))
            model.codes.data = restart_dead(model.codes, nearest_fused(z, model.codes), z, rng)
        quantised, loss = vq_fused(z, model.codes)
        return {"picture": (model.decode(quantised) - patches).square().mean(), "codes": loss}


class Restarted(Plain):
    """The same, with restarts."""

    restart = True


KINDS = {"plain": Plain, "restarted": Restarted}


def coded(size: Small, seed: int, folder: Path, kind: type[Plain]) -> dict[str, Sample]:
    """Samples "perplexity" and "decibels" of one item each, for all test pictures are one text of codes."""
    recipe, model, source = trained(kind, size, seed, folder)
    patches = recipe.patches(scene_pixels([source[i] for i in range(size.items)]))
    with torch.no_grad():
        ids = nearest_fused(model.encode(patches), model.codes)
        error = (model.decode(model.codes[ids]) - patches).square().mean()
    found = {"perplexity": perplexity(ids, len(model.codes)), "decibels": float(10 * (4 / error).log10())}
    return {name: Sample([value], [0]) for name, value in found.items()}
