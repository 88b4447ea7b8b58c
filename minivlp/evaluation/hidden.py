"""What a caption says of what is hidden in its picture: the same patches predicted with it and without it.

Of every picture 30, 60, 85 and 100 % of the patches are hidden, and a model's cost for them is taken three
times: reading the picture's own caption, an empty one, and one that is false of the picture.

    gain_85     the cost without a caption less the cost with its own, at 85 % hidden, mean over pictures

The unit of the cost is the model's. A model that predicts codes costs nats, summed over the hidden patches of
a picture, each predicted without knowing the others. Such a sum of marginal gains may exceed the information
that the caption has about the picture, as two patches may both show the same dog; it is a bound of nothing.
A model that predicts colours costs the mean absolute error of a hidden colour, in levels of 255. With a width
b it would be a Laplace likelihood, |x − x̂| / b + ln 2b nats, but the colours of a patch hang together, and a
sum over them would count one edge many times: so it is left in levels.

"seen" pictures are new ones drawn by the training artists, "unseen" ones by all others; pairs of nouns are
held out. The 95 % interval is the mean ± 1.96 standard errors, clustered by pair of nouns (interval.py).

Left out: gains by the chain rule, patch after patch, which only an autoregressive model has.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.probes import false_captions
from minivlp.evaluation.reading import BATCH
from minivlp.evaluation.splits import Progress, Tick, artists_by_split, evaluate_splits
from minivlp.evaluation.tables import tables
from minivlp.targets import hide_patches
from minivlp.text import WordPiece

SHARES = (0.3, 0.6, 0.85, 1.0)
# cost(pixels (B, 3, H, W), hidden (B, N), ids (B, L), mask (B, L)) → (B,)
Cost = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def hide_rows(
    shares: Sequence[float], side: int, rng: np.random.Generator, block: int | None = None
) -> Tensor:
    """Hidden patches of pictures of side² patches, a share of each, singly or in blocks: (n, side²) bool."""
    # Random blocks take long to cover the whole picture, and then it does not matter that they are blocks.
    blocks = [block if share < 1 else None for share in shares]
    rows = [hide_patches((side, side), s, rng, b) for s, b in zip(shares, blocks, strict=True)]
    return torch.from_numpy(np.stack(rows))


@torch.inference_mode()
def costs(
    cost: Cost,
    tokenizer: WordPiece,
    scenes: Sequence[Scene],
    texts: Sequence[str],
    hidden: Tensor,
    device: Any = "cpu",
) -> np.ndarray:
    """The cost of picture i's hidden patches, hidden (n, N), when text i is read: (n,) float64."""
    found = []
    for start in range(0, len(scenes), BATCH):
        rows = slice(start, start + BATCH)
        ids, _, mask = (torch.from_numpy(x) for x in tokenizer.batch(texts[rows]))
        what = (scene_pixels(scenes[rows]), hidden[rows], ids, mask)
        found.append(cost(*(x.to(device) for x in what)).double().cpu().numpy())
    return np.concatenate(found)


def evaluate_hidden(
    cost: Cost,
    tokenizer: WordPiece,
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    patch: int,
    items: int,
    seed: int,
    progress: Progress,
    device: Any = "cpu",
) -> dict:
    """The gain of a caption at every share of SHARES; items: pictures, the same for all shares.

    progress(done, total) is told the pictures. Returns, ready for JSON, {"seen": {"gain_30": float, …},
    "unseen": {…}, "details": {"seen": {"gain_30": {"value", "low", "high", "own", "none", "other", "items",
    "clusters"}, …}, …, "artists", "canvas", "seed"}}. Raises ValueError when items is < 2.
    """
    if items < 2:
        fail("items", "must be at least 2", items)
    artists = artists_by_split(emojivl)

    def measure(split: str, tick: Tick) -> dict[str, dict]:
        source = Scenes(emojivl, nouns, artists[split], canvas, pairs="held_out", seed=seed)
        scenes, rng = [source[i] for i in range(items)], np.random.default_rng(seed)
        captions = [scene.caption for scene in scenes]
        others = [captions[j] for j in false_captions(scenes, rng)]
        read = {"own": captions, "none": [""] * items, "other": others}
        clusters = [tuple(sorted(scene.objects)) for scene in scenes]
        measures = {}
        for share in SHARES:
            hidden = hide_rows([share] * items, canvas // patch, rng)
            found = {k: costs(cost, tokenizer, scenes, texts, hidden, device) for k, texts in read.items()}
            beside = {name: float(values.mean()) for name, values in found.items()}
            measures[f"gain_{round(100 * share)}"] = mean_of(found["none"] - found["own"], clusters) | beside
            tick(items)
        return measures

    return evaluate_splits(artists, measure, len(SHARES) * items, progress, canvas=canvas, seed=seed)


def mean_of(values: np.ndarray, clusters: Sequence) -> dict[str, float]:
    """The mean of numbers (n,) with its 95 % interval, clustered."""
    number = {cluster: g for g, cluster in enumerate(dict.fromkeys(clusters))}
    mean, G = float(values.mean()), len(number)
    sums = np.bincount([number[cluster] for cluster in clusters], values - mean)  # (G,)
    reach = 1.96 * float(np.sqrt(G / max(G - 1, 1) * (sums**2).sum())) / len(values)
    ends = {"low": mean - reach, "high": mean + reach}
    return {"value": mean} | ends | {"items": len(values), "clusters": G}


COLUMNS = {"gain": "{value:.3f}", "95 % interval": "{low:.3f} to {high:.3f}"} | {
    head: f"{{{name}:.3f}}"
    for head, name in (("own caption", "own"), ("no caption", "none"), ("another's", "other"))
}


def report_hidden(results: Mapping[str, Any], unit: str) -> str:
    """The results of `evaluate_hidden` as Markdown, one table a split."""
    details = results["details"]

    def about(split: str) -> str:
        return f"Held-out pairs, {details['canvas']} pixels square; cost in {unit}."

    return tables(details, about, lambda name: name.replace("gain_", "hidden: ") + " %", COLUMNS, "")
