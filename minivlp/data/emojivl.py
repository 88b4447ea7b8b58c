"""EmojiVL: 1,142 concepts with English and Chinese names, each drawn by up to six artists at 64 × 64 pixels.

A folder holds meta.json (which sheets there are, with their SHA-256), concepts.tsv (one row a concept) and
one sprite sheet per artist: tile i, counted line by line, is the drawing of concept i, and it is fully
transparent where an artist did not draw that concept. Sheets of other artists are read when meta.json lists
them.

Source: the credits and licences of the drawings and names are in data_tiny/ATTRIBUTION.md.
Left out: photographs; this is icon art. Faces and symbols are loaded, but scenes show countable objects only.
"""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from minivlp.core.files import packaged
from minivlp.core.require import fail

FOLDER = packaged("data")
TRAINING_ARTISTS = ("noto", "twemoji", "emojione", "blob", "fxemoji")
# The two nouns of the README's example, then the 30 one-word nouns that the training artists draw most alike
# (tests/test_data.py computes the ranking; the unseen artist has no say).
CPU_NOUNS = (
    *("dog", "guitar"),
    *("baseball", "bathtub", "tomato", "panda", "saxophone", "key", "sunflower", "candle", "snowflake"),
    *("tangerine", "cloud", "violin", "pineapple", "wrench", "trophy", "pushpin", "hamburger", "clipboard"),
    *("taxi", "pear", "dove", "spider", "tulip", "horse", "crown", "bear", "hammer", "monkey", "balloon"),
    "ladybug",
)


@dataclass(frozen=True)
class Concept:
    """One row of concepts.tsv. `noun` is the singular without article ('' for what is not an object)."""

    id: int
    char: str
    name_en: str
    name_zh: str
    tier: str
    noun: str
    article: str
    plural: str
    countable: bool
    split: str
    near: tuple[int, ...]
    artists: tuple[str, ...]
    keywords: tuple[str, ...]
    keywords_zh: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EmojiVL:
    """The loaded data set: `concepts[i]` is drawn by artist a as `sheets[a][i]`, (64, 64, 4) uint8 RGBA."""

    concepts: tuple[Concept, ...]
    sheets: Mapping[str, np.ndarray]

    @property
    def seen_artists(self) -> tuple[str, ...]:
        """The training artists that the data holds."""
        return tuple(a for a in TRAINING_ARTISTS if a in self.sheets)

    @property
    def unseen_artists(self) -> tuple[str, ...]:
        """The artists whose drawings training never shows."""
        return tuple(a for a in self.sheets if a not in TRAINING_ARTISTS)

    @property
    def shown_artists(self) -> tuple[str, ...]:
        """The artists whose drawings pictures and demos show: unseen ones where there are any."""
        return self.unseen_artists or tuple(self.sheets)

    def nouns(self, names: Sequence[str] | None = None) -> tuple[Concept, ...]:
        """The training concepts with these nouns; None = every countable one, in the order of the table.

        Raises ValueError for a noun that is not among them.
        """
        objects = [c for c in self.concepts if c.tier == "object" and c.split == "train"]
        known = {c.noun: c for c in objects if c.countable}
        for name in names or ():
            if name not in known:
                fail("names", "must be countable training nouns of concepts.tsv", repr(name))
        return tuple(known[name] for name in (known if names is None else names))


def trained_concepts(emojivl: EmojiVL, artists: Sequence[str]) -> list[Concept]:
    """The concepts that training shows: of split "train", drawn by at least one of these artists."""
    return [c for c in emojivl.concepts if c.split == "train" and set(c.artists) & set(artists)]


def load_emojivl(folder: str | Path | None = None) -> EmojiVL:
    """Read concepts.tsv and the sprite sheets listed in meta.json (default: data_tiny beside the package).

    The default folder is read once a process; the sheets are read-only arrays, each checked against its
    SHA-256. Raises FileNotFoundError for a missing file and ValueError for a damaged one, naming the file.
    """
    return _default() if folder is None else _read(Path(folder))


@cache
def _default() -> EmojiVL:
    return _read(FOLDER)


def _read(folder: Path) -> EmojiVL:
    for name in ("meta.json", "concepts.tsv"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"EmojiVL folder {folder} has no {name}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'meta.json'} is not valid JSON: {error}") from error
    table = folder / "concepts.tsv"
    try:
        with open(table, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table} is damaged: {error}") from error
    try:
        if len(rows) != meta["n"]:
            raise ValueError(f"{table} must have {meta['n']} rows, got {len(rows)}")
        sheets = {artist["name"]: _sheet(folder / artist["file"], artist, meta) for artist in meta["vendors"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} is not that of an EmojiVL folder: {error!r}") from error
    drawn = {name: sheet[..., 3].any((1, 2)) for name, sheet in sheets.items()}
    artists = [tuple(a for a in sheets if drawn[a][i]) for i in range(len(rows))]
    try:
        concepts = tuple(_concept(i, row, artists[i]) for i, row in enumerate(rows))
    except (KeyError, AttributeError, ValueError) as error:  # a column that is missing, or a row cut short
        raise ValueError(f"{table} is damaged: {error!r}") from error
    return EmojiVL(concepts, sheets)


def _concept(i: int, row: dict[str, str], artists: tuple[str, ...]) -> Concept:
    article, _, noun = row["noun_a"].partition(" ")
    return Concept(
        **{name: row[name] for name in ("char", "name_en", "name_zh", "tier", "split")},
        id=i,
        noun=noun,
        article=article,
        plural=row["noun_pl"],
        countable=row["countable"] == "1",
        near=tuple(int(k) for k in row["near"].split(",") if k),
        artists=artists,
        keywords=tuple(row["kw_en"].split("|")),
        keywords_zh=tuple(row["kw_zh"].split("|")),
    )


def _sheet(path: Path, artist: dict, meta: dict) -> np.ndarray:
    """One sprite sheet as (n, tile, tile, 4) uint8; tile i lies in column i % cols, line i // cols."""
    if not path.is_file():
        raise FileNotFoundError(f"sprite sheet {path} is missing")
    if hashlib.sha256(path.read_bytes()).hexdigest() != artist["sha256"]:
        raise ValueError(f"sprite sheet {path} is damaged: its SHA-256 is not the one in meta.json")
    pixels = np.asarray(Image.open(path).convert("RGBA"))
    t, columns, lines = meta["tile"], meta["cols"], -(-meta["n"] // meta["cols"])
    (high, wide), got = (lines * t, columns * t), pixels.shape
    if got[:2] != (high, wide):
        raise ValueError(f"sprite sheet {path} must be {wide} × {high} pixels, got {got[1]} × {got[0]}")
    tiles = pixels.reshape(lines, t, columns, t, 4).transpose(0, 2, 1, 3, 4)
    tiles = np.ascontiguousarray(tiles.reshape(-1, t, t, 4)[: meta["n"]])
    tiles.flags.writeable = False
    return tiles
