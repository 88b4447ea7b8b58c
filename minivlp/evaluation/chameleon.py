"""What a Chameleon draws, writes and tells apart, on pairs of objects that training never showed together.

    order_drawn      a picture is more probable after its caption than after the same with its nouns exchanged
    order_written    the caption is more probable after the picture than the exchanged one
    axis_drawn, …    the same against the caption with another relation
    true             the caption that it writes, the likeliest word after each, is true of the picture

Beside them stand nats: of a caption with and without its picture, and of a picture's code with and without
its caption; one who knows the picture pays ln 2 nats a caption, for either object may be named first. The
PSNR of pictures made of codes is the ceiling for all that it can draw.

Sources: Lin et al. 2023 (VisualGPTScore) for captions told apart by their probability; Li et al. 2023
(Diffusion Classifier) for captions told apart by what they say about a picture.
Left out: FID and other measures of beauty.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data import RELATIONS, Concept, EmojiVL, Scenes, scene_pixels
from minivlp.data.probes import meaning, misrelated, swapped, true_captions
from minivlp.decoder import Guided, decode
from minivlp.evaluation.interval import measured
from minivlp.evaluation.reading import BATCH, fitting_rows
from minivlp.evaluation.splits import Progress, Tick, evaluate_pairs, silent
from minivlp.evaluation.tables import scene_tables
from minivlp.models.chameleon import Chameleon, Writing
from minivlp.text import WordPiece

NAMES = {
    "order_drawn": "nouns exchanged, by p(picture given caption)",
    "order_written": "nouns exchanged, by p(caption given picture)",
    "axis_drawn": "another relation, by p(picture given caption)",
    "axis_written": "another relation, by p(caption given picture)",
    "true": "written captions that are true",
}


@torch.inference_mode()
def nats(
    model: Chameleon,
    tokenizer: WordPiece,
    captions: Sequence[str],
    pixels: Tensor,
    image_first: bool,
    tick: Tick = silent,
) -> np.ndarray:
    """`Chameleon.nats` of caption i with picture i, in one order: (n, 2)."""
    device = next(model.parameters()).device
    rows = fitting_rows(tokenizer, captions, model.config.max_text_len)
    found = []
    for part in zip(*(t.split(BATCH) for t in (*map(torch.from_numpy, rows), pixels)), strict=True):
        ids, mask, seen = (t.to(device) for t in part)
        order = torch.full((len(ids),), image_first, device=device)
        found.append(model.nats(ids, mask, model.tokenise(seen), order).double().cpu().numpy())
        tick(len(ids))
    return np.concatenate(found)


def write(
    model: Chameleon, tokenizer: WordPiece, pixels: Tensor, rng: np.random.Generator | None = None
) -> list[str]:
    """A caption for each picture (B, 3, H, W): the likeliest word after each, or with rng a drawn one."""
    c, t, texts = model.config, tokenizer, []
    words = torch.zeros(c.vocab_size, dtype=torch.bool)
    words[: c.begin] = True
    words[[i for i in t.special_ids if i != t.sep_id]] = False
    allowed = words.expand(c.max_text_len - 1, -1).to(pixels.device)
    writing = Writing(model, model.layout(c.max_text_len, image_first=True))
    for part in pixels.split(BATCH):
        image = model.with_begin(model.tokenise(part))
        prefix = torch.cat([image, image.new_full((len(image), 1), t.cls_id)], 1)
        for row in decode(writing, prefix, allowed, rng, end=t.sep_id)[0].tolist():
            texts.append(t.decode(row[: row.index(t.sep_id)] if t.sep_id in row else row))
    return texts


def draw(
    model: Chameleon,
    tokenizer: WordPiece,
    caption: str,
    n: int,
    rng: np.random.Generator,
    guidance: float = 2.0,
) -> Tensor:
    """n pictures (n, 3, H, W) for a caption, drawn code by code; guidance as of `decoder.Guided`."""
    c, device = model.config, next(model.parameters()).device
    text = torch.from_numpy(fitting_rows(tokenizer, [caption], c.max_text_len)[0]).to(device)  # (1, L)
    begin = text.new_full((1,), c.begin)
    allowed = torch.arange(c.vocab_size, device=device).expand(c.grid**2, -1) > c.begin
    blind = Writing(model, model.layout(0))
    writing = Guided(Writing(model, model.layout(text.shape[1])), blind, begin, guidance)
    prefix = torch.cat([text, begin[None]], 1).expand(n, -1)
    return model.paint(decode(writing, prefix, allowed, rng)[0])


def psnr(model: Chameleon, pixels: Tensor) -> float:
    """Of pictures in [−1, 1] made of the model's codes, in decibels."""
    return float(10 * (4 / (model.paint(model.tokenise(pixels)) - pixels).square().mean()).log10())


def evaluate_chameleon(
    model: Chameleon,
    tokenizer: WordPiece,
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    items: int = 1500,
    seed: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """All measures on held-out pairs of `nouns`, in square pictures of `canvas` pixels.

    Returns, ready for JSON, {"seen": {measure: float}, "unseen": {…}, "details": {"seen": {measure: {"value",
    "low", "high", "chance", "objects", "items", "clusters"}}, …, "nats": {"seen": {"caption",
    "caption_alone", "code", "code_alone", "psnr"}, …}}}.
    """
    told = {}

    def measure(split: str, source: Scenes, tick: Tick) -> dict[str, dict]:
        scenes, rng = [source[i] for i in range(items)], np.random.default_rng(seed)
        pixels, pairs = scene_pixels(scenes), [meaning(scene)[:2] for scene in scenes]
        texts = {"own": [scene.caption for scene in scenes], "order": [swapped(scene) for scene in scenes]}
        texts["axis"] = [misrelated(scene, rng) for scene in scenes]
        written, pictured = (
            {name: nats(model, tokenizer, t, pixels, first, tick) for name, t in texts.items()}
            for first in (True, False)
        )
        codes = model.config.grid**2
        told[split] = {
            "caption": float(written["own"][:, 0].mean()),
            "caption_alone": float(pictured["own"][:, 0].mean()),
            "code": float(pictured["own"][:, 1].mean() / codes),
            "code_alone": float(written["own"][:, 1].mean() / codes),
            "psnr": psnr(model, pixels.to(model.codebook.device)),
        }
        hits = {}
        for name in ("order", "axis"):
            hits[f"{name}_drawn"] = pictured["own"][:, 1] < pictured[name][:, 1]
            hits[f"{name}_written"] = written["own"][:, 0] < written[name][:, 0]
        measures = {name: measured(hit, pairs, chance=1 / 2, objects=1 / 2) for name, hit in hits.items()}
        own = write(model, tokenizer, pixels.to(model.codebook.device))
        true = [text in true_captions(scene) for text, scene in zip(own, scenes, strict=True)]
        n = len(source.nouns)
        chance = {"chance": 1 / (2 * n * (n - 1)), "objects": 1 / len(RELATIONS)}
        return {name: measures[name] for name in NAMES if name in measures} | {
            "true": measured(true, pairs, **chance)
        }

    results = evaluate_pairs(measure, emojivl, nouns, canvas, seed, 6 * items, progress)
    results["details"]["nats"] = told
    return results


NOTE = """\
Held-out pairs of objects; intervals are clustered by them. *Objects alone* is the ceiling for one who knows
which objects a picture shows, but not where.
"""


def report_chameleon(results: dict[str, Any]) -> str:
    """The results as Markdown: a table a split, then nats."""
    lines = [scene_tables(results, NAMES, NOTE)]
    for split, n in results["details"]["nats"].items():
        lines.append(
            f"By {split} artists: {n['caption']:.2f} nats a caption with its picture and "
            f"{n['caption_alone']:.2f} without, {n['code']:.3f} nats a code with its caption and "
            f"{n['code_alone']:.3f} without; pictures made of codes have a PSNR of {n['psnr']:.1f} dB."
        )
    return "\n\n".join(lines) + "\n"
