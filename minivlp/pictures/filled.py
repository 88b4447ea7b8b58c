"""Hidden patches filled in by a model, without a caption and with one: a sheet of them, and the demo.

Left out: drawing from probabilities. A patch is filled with the model's one best guess.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.names import read_caption
from minivlp.evaluation.hidden import hide_rows
from minivlp.patch import from_patches, to_patches
from minivlp.pictures.sheets import contact_sheet
from minivlp.text import WordPiece, split_words
from minivlp.training.run import need_writable
from minivlp.training.screen import Screen

# fill(pixels (B, 3, H, W), hidden (B, N), ids (B, L), mask (B, L)) → patches (B, N, 3pp) in [−1, 1]
Fill = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SHOWN, SEED, TRIES, OTHERS = 6, 11, 2000, 4
SHARE, GREY = 0.85, 0.0  # of the patches that are hidden; their colour


@torch.inference_mode()
def filled_sheet(path: Path, fill: Fill, tokenizer: WordPiece, scenes: Sequence[Scene], patch: int) -> None:
    """Draw under each caption its picture, what is seen of it, and what fills it without and with it."""
    pixels, texts = scene_pixels(scenes), [scene.caption for scene in scenes]
    n, _, H, W = pixels.shape
    hidden = hide_rows([SHARE] * n, H // patch, np.random.default_rng(SEED))
    patches, rows = to_patches(pixels, patch), {}
    rows["the picture"], rows["what is seen"] = patches, patches.masked_fill(hidden[..., None], GREY)
    for label, read in (("no caption", [""] * n), ("its caption", texts)):
        ids, _, mask = (torch.from_numpy(x) for x in tokenizer.batch(read))
        rows[label] = torch.where(hidden[..., None], fill(pixels, hidden, ids, mask), patches)
    images = {}
    for label, cut in rows.items():
        whole = from_patches(cut, patch, H, W).clamp(-1, 1).add(1).mul(127.5).round()
        images[label] = whole.byte().permute(0, 2, 3, 1).numpy()  # (n, H, W, 3)
    sheets = [
        (text, [(image[i], label, label == "its caption") for label, image in images.items()])
        for i, text in enumerate(texts)
    ]
    contact_sheet(path, sheets)


def filled_demo(
    query: str, fill: Fill, tokenizer: WordPiece, emojivl: EmojiVL, nouns: Sequence[Concept], canvas: int,
    patch: int, folder: Path, screen: Screen,
) -> None:  # fmt: skip
    """Fill in pictures of which the query is the caption, by artists that training never showed, if any.

    Writes demo.png into the folder. Raises ValueError for a word that the model has never read, and for what
    is no caption of two objects.
    """
    caption, named = read_caption(query, nouns)
    need_writable(folder / "demo.png", make_folder=True)
    few, scenes = named + [c for c in nouns if c not in named][:OTHERS], []
    source = Scenes(emojivl, few, emojivl.shown_artists, canvas, pairs="all", seed=SEED)
    for scene in map(source.__getitem__, range(TRIES)):
        scenes += [scene] if " ".join(split_words(scene.caption)) == caption else []
        if len(scenes) == SHOWN:
            break
    if not scenes:
        fail("caption", 'must be of two objects, as "a dog left of a guitar"', repr(caption))
    filled_sheet(folder / "demo.png", fill, tokenizer, scenes, patch)
    screen.say(f"{len(scenes)} pictures, {SHARE:.0%} of their patches hidden; wrote {folder / 'demo.png'}")
