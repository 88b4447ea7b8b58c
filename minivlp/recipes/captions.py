"""ViLT on your own pictures and captions: its own recipe, checked on pictures that are kept back.

Left out: retrieval and intervals; with your own captions nobody knows which caption is true of which picture.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivlp.core.require import fail
from minivlp.data.augment import rand_augment
from minivlp.data.own import Captions, captions_folder, coco_captions, split
from minivlp.evaluation.splits import Progress
from minivlp.itm import derangement
from minivlp.mlm import IGNORE, mask_tokens
from minivlp.models.published.pixels import resized
from minivlp.models.vilt import Vilt, vilt_pixels
from minivlp.recipes.base import Recipe
from minivlp.recipes.vilt import PRESETS, ViltRecipe, ViltSettings
from minivlp.recipes.vilt_batches import RANDOM_PAIR, TRUE_PAIR, ViltBatch
from minivlp.text import WordPiece
from minivlp.training.run import read_json
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained

CHECKED, EVALUATED = 4, 16  # batches of kept-back captions, during training and at its end


class CaptionBatches:
    """`batches(step)` → one ViltBatch: words hidden whole, and half of the matching pairs wrong."""

    def __init__(self, captions: Captions, tokenizer: WordPiece, settings: ViltSettings, augment: bool):
        self.captions, self.tokenizer, self.settings, self.augment = captions, tokenizer, settings, augment

    def __call__(self, step: int) -> list[ViltBatch]:
        s, t, rng = self.settings, self.tokenizer, np.random.default_rng((self.settings.seed, step))
        n = min(s.batch, len(self.captions))
        items = [self.captions[int(i)] for i in rng.choice(len(self.captions), n, replace=False)]
        images = [rand_augment(item.image, rng) if self.augment else item.image for item in items]
        pixels, pixel_mask = vilt_pixels(images, s.canvas, s.patch)  # shorter side canvas
        ids, word_ids, mask = t.batch([item.caption for item in items], s.max_text_len)
        hidden, labels = mask_tokens(ids, word_ids, rng, len(t), t.mask_id, t.special_ids, s.mask)
        picture, match = np.arange(n), np.ones(n, np.int64)
        if n > 1:
            wrong = rng.permutation(n)[: n // 2]
            picture[wrong], match[wrong] = derangement(n, rng)[wrong], 0
            # Two captions of one picture, or one caption twice, are no wrong pair.
            for i in wrong:
                j = picture[i]
                if items[i].caption == items[j].caption or np.array_equal(items[i].image, items[j].image):
                    picture[i], match[i] = i, 1
        nothing, unused = np.full_like(labels, IGNORE), np.full(n, -1)
        # An empty caption has no word to align.
        align = np.where(match == 1, TRUE_PAIR, RANDOM_PAIR) * (word_ids >= 0).any(1)
        masked = (hidden, mask, labels, unused, np.zeros(n), np.arange(n))
        matched = (ids, mask, nothing, match, align, picture)
        both = [torch.from_numpy(np.concatenate([a, b])) for a, b in zip(masked, matched, strict=True)]
        ids, mask, labels, match, align, picture = both
        return [ViltBatch(ids, mask, labels, match, align.float(), pixels[picture], pixel_mask[picture])]


class CaptionsRecipe(ViltRecipe):
    """ViLT on a folder of captioned pictures."""

    presets = {
        "captions": ViltSettings(
            nouns=None, canvas=96, patch=16, dim=128, layers=4, heads=4, hidden=512, max_text_len=40,
            vocab_size=4096, steps=2000, batch=32,
        ),
        **PRESETS,
    }  # fmt: skip
    chance = {"itm_random": 1 / 2}

    @classmethod
    def begin(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        paths = {"images": None} | {k: flags[k] for k in ("captions", "images") if k in flags}
        _check_paths(**paths)
        return super().begin(flags) | paths | {"on_error": flags.get("on_error", "skip")}

    @cached_property
    def data_sets(self) -> tuple[Captions, Captions]:
        """(training split, kept-back split), after telling what is left out.

        Raises ValueError for what is no such data, for the first bad entry with on_error "stop", and when
        there are not two different pictures.
        """
        if self.data:
            fail("--data", "must be left out for a run on own captions", self.data)
        path, on_error = Path(self.about["captions"]), self.about["on_error"]
        # Refuses a picture so narrow that a side would be less than a patch, which would stop the run later.
        fits = partial(resized, size=self.settings.canvas, multiple=self.settings.patch)
        if path.suffix == ".json":
            data = coco_captions(path, self.about["images"] or path.parent, on_error, fits)
        else:
            data = captions_folder(path, on_error, fits)
        for problem in data.problems:
            self.say(f"skipped: {problem}")
        return split(data)

    @property
    def summary(self) -> str:
        training, held = self.data_sets
        return f"{len(training)} captions to train on, {len(held)} kept back, {len(self.tokenizer)} tokens"

    def vocabulary(self) -> WordPiece:
        return WordPiece.train(self.data_sets[0].texts, self.settings.vocab_size)

    @cached_property
    def batches(self) -> Callable[[int], list[ViltBatch]]:
        return CaptionBatches(self.data_sets[0], self.tokenizer, self.settings, augment=True)

    def sizes_of_batches(self) -> set[int]:
        return {2 * min(self.settings.batch, len(self.data_sets[0]))}

    @torch.inference_mode()
    def check(self, model: Vilt, steps: int = CHECKED) -> dict[str, float]:
        """masked_word and itm_random, in [0, 1], on `steps` batches of kept-back captions.

        itm_random is the mean of the accuracies on true and on wrong pairs, so guessing gives 1/2 however
        many there are of each. A measure for which there is nothing to ask is left out.
        """
        device = next(model.parameters()).device
        batches = CaptionBatches(self.data_sets[1], self.tokenizer, self.settings, augment=False)
        words, pairs = [], {0: [], 1: []}
        for step in range(steps):
            for b in batches(step):
                b = b.to(device)
                out = model.encode(b.ids, b.text_mask, b.pixels, b.pixel_mask)
                hidden = b.labels != IGNORE  # (B, L)
                words.append(model.mlm_logits(out["text"][hidden]).argmax(-1) == b.labels[hidden])
                verdict = model.itm_logits(out["pooled"]).argmax(-1)  # (B,)
                for truth, hits in pairs.items():
                    hits.append(verdict[b.match == truth] == truth)
        words, (wrong, true) = torch.cat(words), map(torch.cat, pairs.values())
        values = {"masked_word": float(words.float().mean())} if len(words) else {}
        if len(wrong) and len(true):
            values["itm_random"] = float((wrong.float().mean() + true.float().mean()) / 2)
        return values

    def evaluate(self, trained: Trained, items: int, seed: int, progress: Progress) -> dict[str, Any]:
        """{"kept_back": {measure: float}, "details": {"captions", "pictures", "sha256", "step"}}.

        Without itm_random when no wrong pair can be made of it. Kept-back captions that are no longer those
        of the run's eval.json are told.
        """
        held, before = self.data_sets[1], trained.folder / "eval.json"
        pairs = json.dumps(list(zip(held.names, held.texts, strict=True))).encode()
        details = {"captions": len(held), "pictures": len(set(held.names)), "step": trained.step}
        details["sha256"] = hashlib.sha256(pairs).hexdigest()
        known = read_json(before).get("details", {}).get("sha256") if before.is_file() else None
        if known not in (None, details["sha256"]):
            self.say(f"the kept-back captions are not those of {before}: the numbers do not compare")
        return {"kept_back": self.check(trained.model, EVALUATED), "details": details}

    def report(self, results: Mapping[str, Any]) -> str:
        sizes, values = results["details"], results["kept_back"]
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in values.items()) or "nothing"
        line = f"on {sizes['captions']} kept-back captions of {sizes['pictures']} pictures: {numbers}"
        if "itm_random" in values:
            return line
        why = "no wrong pair can be made of the pictures that are kept back"
        return f"{line}\nmatching is not measured: {why}"

    draw = Recipe.draw

    def demo(self, trained: Trained, query: str, folder: Path, device: str, screen: Screen) -> None:
        fail("--run", "must be a run on scenes, which the demo can draw", "one on own captions")


def _check_paths(captions: str, images: str | None) -> None:
    """Raise ValueError, before anything is read, for what cannot be a data set."""
    path = Path(captions)
    coco = path.suffix == ".json"
    if not (path if coco else path / "captions.jsonl").is_file():
        fail("--captions", "must be a folder with captions.jsonl, or a COCO JSON file", captions)
    if images and not coco:
        fail("--images", "must come with a COCO JSON file as --captions", images)
    if coco and not Path(images or path.parent).is_dir():
        fail("--images", "must be a folder", images)
