"""What a denoiser tells apart by its errors, with no training for it, and what it draws.

    order        on pairs of objects that training never showed together, the error is smaller with the
                 caption than with the same with its nouns exchanged
    axis         … than with another relation
    named        a single drawing has its smallest error, among the classes, with its own noun
    named_apart  the same when each class gets noises of its own: then the noises decide

Sources: Li et al. 2023 (Diffusion Classifier), section 4.2 for shared noises; Krojer et al. 2023 for captions
told apart by denoising errors.
Left out: the evidence bound's weights; leaving out classes that are far behind.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data import Concept, EmojiVL, Scenes, scene_pixels
from minivlp.data.drawings import Portraits, Variation
from minivlp.data.probes import meaning, misrelated, swapped
from minivlp.diffusion import back, errors, even_levels
from minivlp.evaluation.interval import measured
from minivlp.evaluation.reading import BATCH, fitting_rows
from minivlp.evaluation.splits import Progress, Tick, evaluate_pairs, silent
from minivlp.evaluation.tables import scene_tables
from minivlp.models.denoiser import Denoiser
from minivlp.text import WordPiece

LEVELS = 8  # of noise, in every measure
CLASSES, DRAWINGS = 16, 96  # nouns that compete for a drawing, and how many are drawn
NAMES = {
    "order": "nouns exchanged, by the error",
    "axis": "another relation, by the error",
    "named": f"single drawings, among {CLASSES} nouns",
    "named_apart": "the same, each noun with noises of its own",
}


@torch.inference_mode()
def caption_errors(
    model: Denoiser,
    tokenizer: WordPiece,
    captions: Sequence[Sequence[str]],
    pixels: Tensor,
    T: int = LEVELS,
    seed: int = 0,
    tick: Tick = silent,
) -> np.ndarray:
    """`diffusion.errors` of C captions a picture, at T levels: captions n × C, pixels (n, 3, S, S) → (n, C).

    The captions of a picture share their noises, which come from the seed.
    """
    device, C = next(model.parameters()).device, len(captions[0])
    drawn, found = np.random.default_rng(seed), []
    for start in range(0, len(pixels), BATCH):
        x, rows = pixels[start : start + BATCH], captions[start : start + BATCH]
        noise = drawn.standard_normal((T, *x.shape), np.float32)
        texts = fitting_rows(tokenizer, [text for row in rows for text in row], model.config.max_text_len)
        given = model.given(*(torch.from_numpy(array).to(device) for array in texts))
        # Row r of a pass is caption r % C of picture r // C; every picture has captions of its own.
        own = torch.arange(len(x) * C, device=device)
        told = errors(
            lambda x_t, level, c, given=given, own=own: given(x_t, level, own),
            x.to(device), torch.arange(C, device=device), even_levels(T).to(device),
            torch.from_numpy(noise).to(device),
        )  # fmt: skip
        found.append(told.double().cpu().numpy())
        tick(len(x) * C)
    return np.concatenate(found)


def name_errors(
    model: Denoiser, tokenizer: WordPiece, nouns: Sequence[Concept], pixels: Tensor, **how: Any
) -> np.ndarray:
    """`caption_errors` of "a dog", "a guitar", … for each picture: (n, nouns)."""
    return caption_errors(model, tokenizer, [[alone(c) for c in nouns]] * len(pixels), pixels, **how)


def alone(concept: Concept) -> str:
    """What a single drawing is called: "a dog"."""
    return f"{concept.article} {concept.noun}"


@torch.inference_mode()
def draw(
    model: Denoiser,
    tokenizer: WordPiece,
    caption: str,
    n: int,
    rng: np.random.Generator,
    steps: int = 40,
    guidance: float = 2.0,
) -> Tensor:
    """n pictures (n, 3, S, S) for a caption, from noise in `steps` steps down.

    guidance (Ho and Salimans 2022): ε̂ is that without a caption, plus so many times the difference that the
    caption makes.
    """
    c, device = model.config, next(model.parameters()).device
    texts = fitting_rows(tokenizer, [caption, ""], c.max_text_len)
    given = model.given(*(torch.from_numpy(array).to(device) for array in texts))
    told = torch.arange(2, device=device).repeat_interleave(n)  # n times with the caption, n times without
    levels = torch.linspace(1, 0, steps + 1)[:-1] - 1 / (2 * steps)  # from just below 1, at which no x̂ is

    def fresh() -> Tensor:
        shape = (n, 3, c.image_size, c.image_size)
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(device)

    x = fresh()
    for level, lower in zip(levels, [*levels[1:], torch.tensor(0.0)], strict=True):
        t, s = (value.to(device).expand(n) for value in (level, lower))
        with_caption, without = given(x.repeat(2, 1, 1, 1), t.repeat(2), told).chunk(2)
        x = back(x, without + guidance * (with_caption - without), t, s, fresh())
    return x.clamp(-1, 1)


def evaluate_denoiser(
    model: Denoiser,
    tokenizer: WordPiece,
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    items: int = 1500,
    seed: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """All measures, in square pictures of `canvas` pixels; single drawings are of the first CLASSES nouns.

    Returns, ready for JSON, {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value",
    "low", "high", "chance", "objects", "items", "clusters"}}, …}}.
    """
    classes, portraits, named = nouns[:CLASSES], Portraits(emojivl, canvas), min(items, DRAWINGS)

    def measure(split: str, source: Scenes, tick: Tick) -> dict[str, dict]:
        scenes, rng = [source[i] for i in range(items)], np.random.default_rng(seed)
        captions = [[s.caption, swapped(s), misrelated(s, rng)] for s in scenes]
        told = caption_errors(model, tokenizer, captions, scene_pixels(scenes), seed=seed, tick=tick)
        pairs = [meaning(scene)[:2] for scene in scenes]
        found = {
            name: measured(told[:, 0] < told[:, k], pairs, chance=1 / 2, objects=1 / 2)
            for k, name in enumerate(("order", "axis"), 1)
        }
        which, pixels = drawings(portraits, classes, source.artists, named, rng)
        shared = name_errors(model, tokenizer, classes, pixels, seed=seed, tick=tick)
        apart = [
            name_errors(model, tokenizer, [noun], pixels, seed=seed + 1 + j, tick=tick)
            for j, noun in enumerate(classes)
        ]
        for name, told in (("named", shared), ("named_apart", np.concatenate(apart, 1))):
            hits = told.argmin(1) == which
            found[name] = measured(hits, which.tolist(), chance=1 / len(classes), objects=1)
        return found

    ticks = 3 * items + 2 * named * len(classes)
    return evaluate_pairs(measure, emojivl, nouns, canvas, seed, ticks, progress)


def drawings(
    portraits: Portraits,
    nouns: Sequence[Concept],
    artists: Sequence[str],
    n: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, Tensor]:
    """n single drawings by these artists, each changed a little: which of the nouns (n,), pixels."""
    drawn = [(i, a) for i, noun in enumerate(nouns) for a in artists if a in noun.artists]
    chosen = [drawn[k] for k in rng.integers(len(drawn), size=n)]
    which, by = np.array([i for i, _ in chosen]), [a for _, a in chosen]
    ids = [nouns[i].id for i in which]
    return which, portraits.varied(ids, by, by, rng, Variation(mix=0))


NOTE = """\
Captions: held-out pairs of objects, intervals clustered by them. *Objects alone* is the ceiling for one who
knows which objects a picture shows, but not where. Single drawings: intervals clustered by nouns.
"""


def report_denoiser(results: dict[str, Any]) -> str:
    """The results as Markdown: a table a split."""
    return scene_tables(results, NAMES, NOTE) + "\n"
