"""Where the time of each archetype goes: milliseconds of the picture's part, the text's part, their meeting.

The parts of all archetypes are taken in turn in one run, forward, on one thread, with random weights, whose
values cost no time. A dot product meets in a matrix of all pairs, as retrieval wants it; a transformer meets
pair by pair, which is why it is dear to search with.

Sources: Kim, Son and Kim 2021 (ViLT), figure 1 and table 6.
Left out: region detection, most of whose 885 ms in figure 1 are proposals and suppression; a GPU.
"""

from functools import partial
from statistics import median

import torch

from minivlp.bench.measure import interleaved
from minivlp.claims.archetypes import ARCHETYPES, Archetype, ArchetypeConfig, new_archetype
from minivlp.claims.settings import ClockSize
from minivlp.claims.verdict import Sample

PARTS = ("picture", "text", "meeting")
WORDS = 128  # of the vocabulary


@torch.inference_mode()
def clock(size: ClockSize, seed: int) -> dict[str, Sample]:
    """Samples "ms kind part" of a pair and "share kind", of the picture's part; medians over repetitions.

    The picture's part of `grid` and `patch` is the embedding alone. Seeds are repeated runs, one item each.
    """
    calls = {}
    for kind in ARCHETYPES:
        calls |= {f"{kind} {part}": call for part, call in parts(size, kind, seed).items()}
    times = interleaved(calls, least=4, seconds=size.seconds)
    found = {f"ms {name}": 1000 * median(values) / size.batch for name, values in times.items()}
    for kind in ARCHETYPES:
        turns = zip(*(times[f"{kind} {part}"] for part in PARTS), strict=True)
        found[f"share {kind}"] = median(turn[0] / sum(turn) for turn in turns)
    return {name: Sample([value], [0]) for name, value in found.items()}


def archetype(size: ClockSize, kind: str, seed: int) -> Archetype:
    """The archetype of this size."""
    sizes = {"dim": size.dim, "blocks": size.blocks, "heads": size.heads}
    config = ArchetypeConfig(kind, WORDS, size.words, **sizes, patch=size.patch, image_size=size.image_size)
    return new_archetype(config, seed).eval()


def parts(size: ClockSize, kind: str, seed: int) -> dict[str, object]:
    """One call a part of PARTS, for `size.batch` pictures and texts."""
    model = archetype(size, kind, seed)
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size.batch, 3, size.image_size, size.image_size, generator=draw)
    ids = torch.randint(5, WORDS, (size.batch, size.words), generator=draw)
    ids[:, -1] = model.config.eot
    mask = torch.ones_like(ids, dtype=torch.bool)
    seen, words = model.look(pixels), model.read(ids, mask)
    meet = partial(torch.mm, seen, words.T) if model.config.dot else partial(model.meet, seen, words, mask)
    return {"picture": partial(model.look, pixels), "text": partial(model.read, ids, mask), "meeting": meet}
