"""The pictures of a run: what the trained model answers, on scenes that training never showed.

Left out: choosing pretty examples. The scenes are the first ones of a fixed seed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minivlp import figures
from minivlp.batches import scene_pixels, text_rows
from minivlp.data import EmojiVL, Scene, Scenes
from minivlp.evaluate import rank
from minivlp.models.vilt import Vilt
from minivlp.pointing import plan
from minivlp.tasks import hide_relation, hide_slots
from minivlp.text import WordPiece
from minivlp.trained import Trained

SEED = 7


def draw_run(folder: Path, records: Sequence[dict], trained: Trained, emojivl: EmojiVL) -> list[Path]:
    """Write curves.png, masked_words.png, retrieval.png and alignment.png into the folder; return their paths."""
    model, tokenizer, nouns = trained.model, trained.tokenizer, trained.nouns(emojivl)
    artists = emojivl.unseen_artists or tuple(emojivl.sheets)
    unseen = Scenes(emojivl, nouns, artists, trained.canvas, pairs="held_out", seed=SEED)
    scenes = [unseen[i] for i in range(64)]
    paths = [folder / f"{name}.png" for name in ("curves", "masked_words", "retrieval", "alignment")]
    chance = {"masked_object": 1 / len(nouns), "masked_relation": 0.25, "itm_random": 0.5, "itm_swapped": 0.5}
    figures.curves(paths[0], records, chance)
    figures.masked_words(
        paths[1], [_filled(model, tokenizer, scene, i) for i, scene in enumerate(scenes[:6])]
    )
    figures.retrieval_grid(paths[2], [_retrieved(model, tokenizer, scenes, i) for i in range(5)])
    figures.alignment(paths[3], [aligned(model, tokenizer, scene) for scene in scenes[:5]])
    return paths


@torch.inference_mode()
def _filled(model: Vilt, tokenizer: WordPiece, scene: Scene, i: int) -> tuple:
    """One scene with its first noun, its relation or its second noun hidden in turn, and the model's five guesses."""
    if i % 3 == 1:
        text, answer = hide_relation(scene)
    else:
        text, ids = hide_slots(scene, [0 if i % 3 == 0 else 1], tokenizer)
        answer = tokenizer.decode(ids)
    ids, mask, labels = text_rows(tokenizer, [text], [tokenizer.encode(answer)])
    states = model.encode(ids, mask, scene_pixels([scene]))["text"]
    first = states[labels >= 0][:1]
    probabilities, best = model.mlm_logits(first)[0].softmax(-1).topk(5)
    guesses = [(tokenizer.tokens[int(k)], float(p)) for k, p in zip(best, probabilities, strict=True)]
    return scene.image, text, guesses, answer


def _retrieved(model: Vilt, tokenizer: WordPiece, scenes: Sequence[Scene], i: int) -> tuple:
    """Caption i with the five best of all pictures; the place of the right one among them, or None."""
    caption = scenes[i].caption
    best = np.argsort(-rank(model, tokenizer, caption, scene_pixels(scenes)))[:5]
    right = [place for place, k in enumerate(best) if scenes[k].caption == caption]
    return caption, [scenes[k].image for k in best], right[0] if right else None


def aligned(model: Vilt, tokenizer: WordPiece, scene: Scene, caption: str | None = None) -> tuple:
    """A row of `figures.alignment`: where 1,000 proximal steps transport each word (None = the scene's caption)."""
    words, heat = plan(model, tokenizer, scene, caption, iters=1000)
    return scene.image, words, heat, scene.boxes
