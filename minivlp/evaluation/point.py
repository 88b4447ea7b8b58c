"""Where does a word point? The transport plan between a caption's words and the patches of its picture.

ViLT's alignment loss moves the mass of the words to the patches at the least cost, 1 − cosine of their final
states. Nothing tells training where an object is: that the plan of "dog" lands on the dog is learnt from
captions alone, and the boxes of the scenes are there to check it.

Sources: Kim, Son and Kim 2021 (ViLT), sections 3.2 and 4.7. Training takes 50 proximal steps; pictures take
1,000 (`plan(..., iters=1000)`), and `figures.alignment` draws them in standard deviations as the paper does.
Left out: attention maps, which say what a layer mixes, not what it aligns.
"""

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.core.require import fail
from minivlp.data import Scene, scene_pixels
from minivlp.ipot import alignment_masks, ipot
from minivlp.sinkhorn import cosine
from minivlp.text import WordPiece


def transport(states: dict[str, Tensor], iters: int = 50) -> Tensor:
    """The plan between words and patches of `model.encode`'s states, (B, L, N), for captions without padding.

    As in training, [CLS], [SEP] and the image's class token take no part; the rows of the first two are 0.
    """
    text, patches = states["text"], states["image"][:, 1:]  # (B, L, D), (B, N, D)
    words = alignment_masks(torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))
    return ipot(1 - cosine(text, patches), iters=iters, row_mask=words)


def patches_inside(scene: Scene, patch: int) -> np.ndarray:
    """Which patches have their centre in which box: (boxes, N) bool, patches row-major."""
    H, W = scene.image.shape[:2]
    y, x = np.mgrid[patch / 2 : H : patch, patch / 2 : W : patch].reshape(2, -1)  # (N,) each
    x1, y1, x2, y2 = scene.boxes.T[..., None]  # (boxes, 1) each
    return (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)


@torch.inference_mode()
def plan(
    model: nn.Module, tokenizer: WordPiece, scene: Scene, caption: str | None = None, iters: int = 50
) -> tuple[list[str], np.ndarray]:
    """The plan of a scene with its own or another caption: `(words, plan (words, rows, columns))`.

    The rows of the pieces of a word are added up; the whole plan sums to 1. Raises ValueError for a caption
    without words.
    """
    caption = scene.caption if caption is None else caption
    ids, word_ids, _ = tokenizer.batch([caption], model.config.max_text_len)
    if ids.shape[1] == 2:
        fail("caption", "must hold at least one word", repr(caption))
    pixels = scene_pixels([scene]).to(next(model.parameters()).device)
    words = torch.from_numpy(ids).to(pixels.device)
    states = model.encode(words, torch.ones_like(words, dtype=torch.bool), pixels)
    pieces = transport(states, iters)[0].float().cpu().numpy()  # (L, N)
    groups: dict[int, list[int]] = {}
    for position in range(1, ids.shape[1] - 1):
        word = int(word_ids[0, position])
        # An unknown or hidden word has no number: it stands alone.
        groups.setdefault(word if word >= 0 else -position, []).append(position)
    names = [tokenizer.decode(ids[0, positions]) for positions in groups.values()]
    rows, columns = (side // model.config.patch for side in scene.image.shape[:2])
    summed = np.stack([pieces[positions].sum(0) for positions in groups.values()])  # (words, N)
    return names, summed.reshape(-1, rows, columns)
