"""The frame of an evaluation: drawings by the training artists ("seen") and by all others ("unseen")."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from minivlp.data import Concept, EmojiVL, Scenes

CANDIDATES = 64  # pictures that compete for a caption
Progress = Callable[[int, int], None]  # (done, total)
Tick = Callable[[int], None]  # so many more are done


def silent(*numbers: int) -> None:
    """The progress of a measurement that nobody watches."""


def artists_by_split(emojivl: EmojiVL) -> dict[str, list[str]]:
    """{"seen": the training artists that the data holds, "unseen": all others}."""
    return {"seen": list(emojivl.seen_artists), "unseen": list(emojivl.unseen_artists)}


def evaluate_splits(
    artists: Mapping[str, Sequence[str]],
    measure: Callable[[str, Tick], dict[str, dict]],
    ticks: int,
    progress: Progress,
    value: Callable[[dict], float] = itemgetter("value"),
    **about: Any,
) -> dict[str, Any]:
    """Measure every split that has artists; a split without any is {}.

    measure(split, tick) → {measure: numbers}; it calls tick(n) until `ticks` are done. value: the one number
    of a measure. about: what else the details say. Returns, ready for JSON, {"seen": {measure: value},
    "unseen": {…}, "details": {"seen": {measure: numbers}, "unseen": {…}, "artists", **about}}.
    """
    done, total = 0, ticks * sum(map(bool, artists.values()))

    def tick(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    details = {split: measure(split, tick) if artists[split] else {} for split in artists}
    values = {split: {name: value(m) for name, m in details[split].items()} for split in artists}
    return values | {"details": details | {"artists": dict(artists)} | about}


def evaluate_pairs(
    measure: Callable[[str, Scenes, Tick], dict[str, dict]],
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    seed: int,
    ticks: int,
    progress: Progress,
) -> dict[str, Any]:
    """`evaluate_splits` on scenes of pairs of these nouns that training never shows together.

    measure(split, scenes, tick) → {measure: numbers}; the details also hold the canvas, the seed and the
    "nouns" that each split's artists drew.
    """
    artists, about = artists_by_split(emojivl), {"canvas": canvas, "seed": seed}
    sources = {
        split: Scenes(emojivl, nouns, names, pairs="held_out", **about)
        for split, names in artists.items()
        if names
    }
    drawn = {split: [concept.noun for concept in source.nouns] for split, source in sources.items()}

    def one(split: str, tick: Tick) -> dict[str, dict]:
        return measure(split, sources[split], tick)

    return evaluate_splits(artists, one, ticks, progress, nouns=drawn, **about)
