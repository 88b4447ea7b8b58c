"""The pictures of a run: what the trained model answers, on scenes that training never showed.

Left out: choosing pretty examples. The scenes are the first ones of a fixed seed.
"""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch

from minivlp.data import EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.probes import hide_relation, hide_slots, retrieval_sets, text_rows
from minivlp.evaluation.point import plan
from minivlp.evaluation.rank import rank
from minivlp.models.vilt import Vilt
from minivlp.pictures import figures
from minivlp.text import WordPiece
from minivlp.training.trained import Trained

SEED = 7


def draw_answers(folder: Path, trained: Trained, emojivl: EmojiVL) -> list[Path]:
    """Write masked_words, retrieval and alignment.png into the folder; return their paths."""
    model, tokenizer, nouns = trained.model, trained.tokenizer, trained.nouns(emojivl)
    unseen = Scenes(emojivl, nouns, emojivl.shown_artists, trained.canvas, pairs="held_out", seed=SEED)
    scenes = [unseen[i] for i in range(6)]
    (candidates,) = retrieval_sets((unseen[i] for i in count()), 1)
    paths = [folder / f"{name}.png" for name in ("masked_words", "retrieval", "alignment")]
    figures.masked_words(paths[0], [_filled(model, tokenizer, scene, i) for i, scene in enumerate(scenes)])
    figures.retrieval_grid(paths[1], [_retrieved(model, tokenizer, candidates, i) for i in range(5)])
    figures.alignment(paths[2], [aligned(model, tokenizer, scene) for scene in scenes[:5]])
    return paths


@torch.inference_mode()
def _filled(model: Vilt, tokenizer: WordPiece, scene: Scene, i: int) -> tuple:
    """A row of `figures.masked_words`: the first noun, the relation or the second noun hidden, in turn.

    Of a noun of several pieces the first is guessed.
    """
    if i % 3 == 1:
        text, answer = hide_relation(scene)
        pieces = tokenizer.encode(answer)
    else:
        text, pieces = hide_slots(scene, [0 if i % 3 == 0 else 1], tokenizer)
    ids, mask, labels = text_rows(tokenizer, [text], [pieces])
    states = model.encode(ids, mask, scene_pixels([scene]))["text"]
    first = states[labels >= 0][:1]  # (1, D)
    probabilities, best = model.mlm_logits(first)[0].softmax(-1).topk(5)
    guesses = [(tokenizer.tokens[int(k)], float(p)) for k, p in zip(best, probabilities, strict=True)]
    return scene.image, text, guesses, tokenizer.tokens[pieces[0]]


def _retrieved(model: Vilt, tokenizer: WordPiece, scenes: Sequence[Scene], i: int) -> tuple:
    """A row of `figures.retrieval_grid`: caption i, true of picture i alone, and the five best pictures."""
    hidden = hide_slots(scenes[i], range(len(scenes[i].slots)), tokenizer)
    scores = rank(model, tokenizer, scenes[i].caption, hidden, scenes)
    best = np.argsort(-scores)[:5].tolist()
    return scenes[i].caption, [scenes[k].image for k in best], best.index(i) if i in best else None


def aligned(model: Vilt, tokenizer: WordPiece, scene: Scene, caption: str | None = None) -> tuple:
    """A row of `figures.alignment`: the plan of a caption (None = the scene's) after 1,000 proximal steps."""
    words, heat = plan(model, tokenizer, scene, caption, iters=1000)
    return scene.image, words, heat, scene.boxes
