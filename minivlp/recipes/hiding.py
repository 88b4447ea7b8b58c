"""What FLAVA and MaskVLM share: hidden patches are asked about with a caption and without one.

A recipe of this kind says what a hidden patch costs (`cost`), in which unit, and what the model would fill
it with (`fill`); its model compares pictures and texts by `image_vector` and `text_vector` of their states.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.data import Scenes, scene_pixels
from minivlp.evaluation.hidden import Cost, costs, evaluate_hidden, hide_rows, report_hidden
from minivlp.evaluation.splits import Progress
from minivlp.pictures.filled import Fill, filled_demo, filled_sheet
from minivlp.recipes.base import WEIGHTS, Recipe
from minivlp.text import WordPiece
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained, read_trained

CHECK_SEED = 1  # of what is hidden of them
DRAWN, DRAWN_SEED = 6, 7  # pictures that are drawn filled in


@torch.no_grad()
def same_projections(model: nn.Module) -> None:
    """Let both sides enter the space of comparison by one orthogonal map, in place.

    What brings a picture and its text together there then brings their states together, and words that are
    like patches are words that patches look at. With two maps of small random numbers a caption was worth
    nothing to a hidden patch of a FLAVA after half of its run (tried).
    """
    nn.init.orthogonal_(model.image_project.weight)
    model.text_project.load_state_dict(model.image_project.state_dict())


class HidingRecipe(Recipe):
    """A recipe whose model fills in hidden patches."""

    unit = ""  # of the cost

    def cost(self, model: nn.Module) -> Cost:
        """What the hidden patches of pictures cost (evaluation/hidden.py)."""
        raise TypeError(f"{type(self).__name__} must have a cost")

    def fill(self, model: nn.Module) -> Fill:
        """What the model would fill hidden patches with (pictures/filled.py)."""
        raise TypeError(f"{type(self).__name__} must have a fill")

    @cached_property
    def vilt(self) -> dict[str, Any]:
        """The shipped ViLT, with whose blocks and vocabulary the model begins (models/published/start.py)."""
        return read_trained(WEIGHTS / "vilt_tiny.safetensors")

    def vocabulary(self) -> WordPiece:
        return WordPiece(self.vilt["tokens"])

    @property
    def chance(self) -> dict[str, float]:
        return {"found": 1 / self.checked}

    @torch.inference_mode()
    def check(self, model: nn.Module) -> dict[str, float]:
        """The gain of a caption at 85 % hidden; the share of captions that find their picture of all."""
        scenes, device = self.fresh, next(model.parameters()).device
        captions = [scene.caption for scene in scenes]
        side, rng = self.settings.canvas // self.settings.patch, np.random.default_rng(CHECK_SEED)
        hidden = hide_rows([0.85] * len(scenes), side, rng)
        own, none = (
            costs(self.cost(model), self.tokenizer, scenes, texts, hidden, device)
            for texts in (captions, [""] * len(scenes))
        )
        ids, _, mask = (torch.from_numpy(x).to(device) for x in self.tokenizer.batch(captions))
        x = model.image_vector(model.image_states(scene_pixels(scenes).to(device)))
        best = (model.text_vector(model.text_states(ids, mask)) @ x.T).argmax(1).cpu()
        found = (best == torch.arange(len(scenes))).float().mean()
        return {"gain_85": float((none - own).mean()), "found": float(found)}

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        s, model = self.settings, trained.model
        what = (trained.tokenizer, self.emojivl, self.nouns, s.canvas, s.patch, items, seed, progress)
        return evaluate_hidden(self.cost(model), *what, next(model.parameters()).device)

    def report(self, results: Mapping[str, Any]) -> str:
        return report_hidden(results, self.unit)

    def draw(self, trained: Trained, folder: Path, records: Sequence[dict]) -> list[Path]:
        """curves.png, and filled.png with unseen pictures filled in without their captions and with them."""
        about, path = {"canvas": trained.canvas, "pairs": "held_out"}, folder / "filled.png"
        source = Scenes(self.emojivl, self.nouns, self.emojivl.shown_artists, **about, seed=DRAWN_SEED)
        scenes = [source[i] for i in range(DRAWN)]
        filled_sheet(path, self.fill(trained.model), trained.tokenizer, scenes, self.settings.patch)
        return [*super().draw(trained, folder, records), path]

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        sizes = trained.canvas, self.settings.patch
        what = (trained.tokenizer, self.emojivl, self.nouns, *sizes, folder, screen)
        filled_demo(query, self.fill(trained.model), *what)

    @staticmethod
    def to_published(model: nn.Module) -> dict[str, Tensor]:
        """Rounded to float16."""
        return {name: tensor.half() for name, tensor in model.state_dict().items()}
