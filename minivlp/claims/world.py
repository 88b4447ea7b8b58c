"""A world of eight objects: what the archetypes are trained on, and the loss of each.

Pictures are small, objects are drawn by few artists, and pairs are those of the training split, in new
pictures for the test: the question is whether words are bound to places, not whether drawings are recognised.

Every archetype sees the same examples in the same steps, as recipes/vilt_batches.py makes them: half to be
matched (true, random, or the right objects in the wrong places), half with hidden words:

    grid, patch            matching and word-patch alignment on the first half, masked words on the second,
                           as ViLT
    heavy, towers, bag     matching on the first half by the dot product, and InfoNCE over all true pairs,
                           the second half with its words uncovered, as CLIP

so a dot product is told about swapped words as often as the transformer, and has its own objective besides.
No two texts in an InfoNCE are true of one picture.

Source: Yuksekgonul et al. 2023, section 4, for dual encoders taught with swapped captions.
Left out: negatives beyond the batch.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.claims.archetypes import Archetype, ArchetypeConfig, new_archetype
from minivlp.claims.settings import WorldSize
from minivlp.data import RELATIONS, Concept, EmojiVL, Scene, Scenes, load_emojivl
from minivlp.data.names import scene_texts
from minivlp.data.probes import meaning
from minivlp.infonce import infonce
from minivlp.itm import itm_loss
from minivlp.mlm import IGNORE, mask_tokens
from minivlp.recipes.base import Recipe
from minivlp.recipes.vilt import ViltRecipe, ViltSettings, pretraining_loss
from minivlp.recipes.vilt_batches import Part, SceneBatches, ViltBatch, stage_at
from minivlp.text import WordPiece
from minivlp.training.workers import ONE_PROCESS, Workers

MASKINGS = ("curriculum", "words", "pieces")


@dataclass(frozen=True)
class World:
    """The objects, who draws them, and the words: what training and tests share."""

    emojivl: EmojiVL
    nouns: tuple[Concept, ...]
    tokenizer: WordPiece
    size: WorldSize

    def batches(self, seed: int, masking: str) -> "WorldBatches":
        """Training batches from the seed; masking: how words are hidden, one of MASKINGS."""
        t = self.size.train
        scenes = (self.emojivl, self.nouns, self.tokenizer, self.size.stages, t.steps, t.batch, seed)
        return WorldBatches(masking, t.mask, *scenes)

    def scenes(self, seed: int) -> Scenes:
        """Pairs in pictures that no training seed draws."""
        sizes = self.size.stages[-1].parts[-1].sizes
        return Scenes(
            self.emojivl, self.nouns, canvas=self.size.train.canvas, sizes=sizes, seed=TEST_SEED + seed
        )

    def sizes(self, kind: str) -> ArchetypeConfig:
        t = self.size.train
        return ArchetypeConfig(
            kind, len(self.tokenizer), t.max_text_len, t.dim, t.layers, t.heads, t.patch, t.canvas
        )


TEST_SEED = 1_000_000


@lru_cache(maxsize=4)
def world(size: WorldSize, vocab_size: int) -> World:
    """The world of this size with a vocabulary of at most `vocab_size` tokens."""
    whole = load_emojivl()
    emojivl = EmojiVL(whole.concepts, {artist: whole.sheets[artist] for artist in size.artists})
    nouns = emojivl.nouns(size.train.nouns)
    return World(emojivl, nouns, WordPiece.train(scene_texts(nouns), vocab_size, min_count=1), size)


@dataclass(frozen=True, kw_only=True)
class PairedBatch(ViltBatch):
    """Examples with what a dual encoder needs besides."""

    whole: Tensor  # (B, L') the text of each example with no word hidden
    whole_mask: Tensor  # (B, L') bool
    contrast: Tensor  # (B,) bool, true pairs, no text of which is true of another's picture


class WorldBatches(SceneBatches):
    """`batches(step)` → one PairedBatch. Hidden is what the curriculum says, or words or pieces at random."""

    def __init__(self, masking: str, mask: float, *scenes):
        super().__init__(*scenes)
        self.masking, self.mask = masking, mask

    def _masked(self, part: Part, scene: Scene, rng: np.random.Generator) -> tuple[str, Sequence[int]]:
        """As the curriculum says, or nothing yet: pieces are chosen once all texts are cut."""
        return super()._masked(part, scene, rng) if self.masking == "curriculum" else (scene.caption, ())

    def __call__(self, step: int) -> list[PairedBatch]:
        rng = np.random.default_rng((self.seed, step))
        stage = stage_at(self.stages, step / self.steps)
        parts = [self._drawn(part, step, rng) for part in stage.parts]
        batch, t = self._joined(parts), self.tokenizer
        scenes = list(chain(*(part.scenes for part in parts)))
        texts = list(chain(*(part.texts for part in parts)))
        paired = batch.paired.tolist()
        whole = [text if m else scene.caption for m, text, scene in zip(paired, texts, scenes, strict=True)]
        ids, word_ids, mask = t.batch(whole)
        tensors = vars(batch)
        if self.masking != "curriculum":
            hidden, labels = mask_tokens(
                ids, word_ids, rng, len(t), t.mask_id, t.special_ids, self.mask, self.masking == "words"
            )
            hidden[paired], labels[paired] = ids[paired], IGNORE
            arrays = {"ids": hidden, "text_mask": mask, "labels": labels}
            tensors = tensors | {name: torch.from_numpy(array) for name, array in arrays.items()}
        # Within one kind of scene it is known which texts are true.
        last = len(scenes) - len(parts[-1].scenes)
        true = [i for i in range(last, len(scenes)) if batch.match[i] != 0]
        contrast = np.zeros(len(scenes), bool)
        contrast[without_shared_facts([facts(scenes[i]) for i in true], true)] = True
        arrays = {"whole": ids, "whole_mask": mask, "contrast": contrast}
        return [PairedBatch(**tensors, **{name: torch.from_numpy(array) for name, array in arrays.items()})]


def facts(scene: Scene) -> set[Hashable]:
    """What scenes of this kind can say of the picture, in all wordings."""
    if scene.kind == "pair":
        return {meaning(scene)}
    if scene.kind != "pick":
        return {scene.caption}
    axis, first = RELATIONS[scene.relation]
    named, other = scene.objects
    return {(named, axis, first), (other, axis, not first)}  # they lie on opposite sides of the middle


def without_shared_facts(said: Sequence[set[Hashable]], rows: Sequence[int]) -> list[int]:
    """The rows, first come first served, that share no fact with one before them that was taken."""
    taken, used = [], set()
    for row, mine in zip(rows, said, strict=True):
        if not mine & used:
            taken.append(row)
            used |= mine
    return taken


class ArchetypeRecipe(ViltRecipe):
    """One archetype in the world, asked at its end alone (exam.py)."""

    terms = (*ViltRecipe.terms, "infonce")
    check = Recipe.check

    def __init__(self, settings: ViltSettings, place: World, kind: str, masking: str):
        """kind: of archetype; masking: one of MASKINGS."""
        super().__init__(settings)
        self.tokenizer = place.tokenizer
        self.model = new_archetype(place.sizes(kind), settings.seed)
        self.batches = place.batches(settings.seed, masking)

    def loss(
        self, model: Archetype, batches: Sequence[PairedBatch], workers: Workers = ONE_PROCESS
    ) -> dict[str, Tensor]:
        return archetype_loss(model, batches, self.settings.wpa_weight)

    def matrices(self, model: Archetype) -> list[nn.Parameter]:
        """Those of the blocks, and for a transformer over both those of its heads."""
        return Recipe.matrices(self, model) if model.config.dot else super().matrices(model.net)


def archetype_loss(model: Archetype, batches: Sequence[PairedBatch], wpa_weight: float) -> dict[str, Tensor]:
    """The terms of one step, by the archetype."""
    if not model.config.dot:
        return pretraining_loss(model.net, batches, wpa_weight)
    (batch,) = batches
    model.net.clamp_scale()
    x, y = model.look(batch.pixels), model.read(batch.whole, batch.whole_mask)  # (B, D)
    paired, terms = batch.paired, {}
    if paired.any():
        score = model.meet(x[paired], y[paired], batch.whole_mask[paired])
        terms["itm"] = itm_loss(torch.stack([torch.zeros_like(score), score], 1), batch.match[paired])
    if batch.contrast.any():
        terms["infonce"] = infonce(x[batch.contrast], y[batch.contrast], model.net.scale)
    return terms
