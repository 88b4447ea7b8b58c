"""Your own pictures with captions: a folder with `captions.jsonl`, or COCO captions; bad lines are reported.

`captions.jsonl` holds one JSON object a line, the caption a string or a list of strings:

    {"image": "x.jpg", "caption": "a dog left of a guitar"}

Every distinct picture is verified and decoded once when the dataset is made, so that a broken one is
reported then and not in the middle of a training run. This takes somewhat longer than decoding every
picture once. Pixels are not kept: `dataset[i]` decodes again, and memory grows with the captions only.

How a picture's pixels are read: core/images.py.

Sources: Lin et al. 2014 (COCO) and Chen et al. 2015 (COCO captions), for the layout of the JSON file.
Left out: downloads, archives and shards; noticing the same picture under two names.
"""

import hashlib
import json
import operator
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from minivlp.core.images import upright_rgb
from minivlp.core.require import fail

# Raster formats only: Pillow hands EPS and the like to outside programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Fits = Callable[[int, int], object]  # of the height and width of a picture


@dataclass(frozen=True, eq=False)
class CaptionedImage:
    """image (H, W, 3) uint8 RGB; caption; source, where the caption was read ("captions.jsonl:7")."""

    image: np.ndarray
    caption: str
    source: str


class Entry(NamedTuple):
    """One caption and the name of its picture, relative to the folder."""

    name: str
    caption: str
    source: str


class Captions:
    """Captioned pictures in the order of the file: `len(d)`, `d[i]` → CaptionedImage, `for item in d`.

    `names[i]` names the picture of item i (equal names = captions of one picture); `problems` holds one
    sentence for every line or entry left out.
    """

    def __init__(self, folder: Path, entries: Iterable[Entry], problems: list[str]):
        self.folder, self.problems = folder, problems
        self._entries = tuple(entries)
        self.names = tuple(entry.name for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> CaptionedImage:
        """Decode item `index`. Raises ValueError when its picture was damaged after the dataset was made."""
        name, caption, source = self._entries[operator.index(index)]
        try:
            return CaptionedImage(read_rgb(self.folder / name), caption, source)
        except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
            raise ValueError(f"{source}: image {name!r} can no longer be read ({error})") from error

    @property
    def texts(self) -> list[str]:
        """All captions, without decoding a picture."""
        return [entry.caption for entry in self._entries]

    def subset(self, indices: Iterable[int]) -> "Captions":
        """The items at these indices, in this order, with the same `problems`."""
        return Captions(self.folder, [self._entries[i] for i in indices], self.problems)


def captions_folder(path: str | Path, on_error: str = "skip", fits: Fits = lambda *size: None) -> Captions:
    """A folder of images with a `captions.jsonl` (UTF-8; blank lines are ignored, other keys too).

    A bad line (malformed JSON, missing key, wrong type, empty caption, missing or broken image, image outside
    the folder) becomes a sentence in `.problems` with on_error="skip"; with "stop" the first one raises
    ValueError. In a list of captions the good ones stay. `fits(height, width)` may raise ValueError for an
    image that the model cannot take, which is bad too. No file or no good line raises ValueError.
    """
    collector = _Collector("path", path, on_error, fits)
    file = collector.folder / "captions.jsonl"
    if not file.is_file():
        fail("path", "must be a folder with a captions.jsonl", str(path))
    with open(file, "rb") as lines:  # bytes, so that one line that is not UTF-8 costs that line only
        for number, line in enumerate(lines, start=1):
            where = f"{file.name} line {number}"
            with collector.entry(where):
                if line.strip():
                    name, captions = _values(_parse(line, number), {"image": str, "caption": (str, list)})
                    collector.add(where, f"{file.name}:{number}", name, captions)
    return collector.dataset()


def coco_captions(
    json_path: str | Path, image_folder: str | Path, on_error: str = "skip", fits: Fits = lambda *size: None
) -> Captions:
    """COCO captions JSON: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.

    One item an annotation, in the order of the file; a source reads "captions.json:annotations[3]". Bad
    entries are treated as in `captions_folder`; pictures without annotations are not looked at. Raises
    ValueError when the file is not of this form or no annotation is good.
    """
    collector, file, names = _Collector("image_folder", image_folder, on_error, fits), Path(json_path), {}
    if not file.is_file():
        fail("json_path", "must be a file", str(json_path))
    try:
        images, annotations = _values(_parse(file.read_bytes()), {"images": list, "annotations": list})
    except _Bad as problem:
        rule = 'must hold {"images": [...], "annotations": [...]}'
        fail("json_path", rule, f"a file whose content {problem}")
    for i, image in enumerate(images):
        with collector.entry(f"{file.name} images[{i}]"):
            key, name = _values(image, {"id": (int, str), "file_name": str})
            if key in names:
                raise _Bad(f"id {key!r} occurs twice")
            names[key] = name
    for i, annotation in enumerate(annotations):
        where = f"{file.name} annotations[{i}]"
        with collector.entry(where):
            key, caption = _values(annotation, {"image_id": (int, str), "caption": str})
            if key not in names:
                raise _Bad(f"image_id {key!r} is not among the images")
            collector.add(where, f"{file.name}:annotations[{i}]", names[key], caption)
    return collector.dataset()


def split(dataset: Captions, validation: float = 0.1) -> tuple[Captions, Captions]:
    """(training part, validation part); the captions of one picture stay together.

    A picture validates when the SHA-256 of its name, read as a number in [0, 1), is below `validation`, so
    it keeps its side when others are added. In small sets neither side stays empty: the picture with the
    lowest number always validates, the one with the highest always trains. Raises ValueError when
    `validation` is not inside (0, 1) or there is only one picture.
    """
    if not 0 < validation < 1:
        fail("validation", "must lie inside (0, 1)", validation)
    number = {n: int.from_bytes(hashlib.sha256(os.fsencode(n)).digest()[:8]) / 2**64 for n in dataset.names}
    if len(number) < 2:
        fail("dataset", "must hold at least two different images to be split", len(number))
    lowest, highest = min(number, key=number.get), max(number, key=number.get)
    validates = {n for n in number if n == lowest or (number[n] < validation and n != highest)}
    sides = [[], []]
    for i, name in enumerate(dataset.names):
        sides[name in validates].append(i)
    return dataset.subset(sides[0]), dataset.subset(sides[1])


def read_rgb(path: str | Path) -> np.ndarray:
    """Decode a picture to (H, W, 3) uint8 RGB. Raises what Pillow raises on a bad file."""
    with Image.open(path, formats=FORMATS) as image:
        return upright_rgb(image)


class _Bad(Exception):
    """What is wrong with an entry."""


def _parse(data: bytes, line: int = 1) -> object:
    """The JSON value in these bytes."""
    try:
        return json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise _Bad("is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise _Bad(f"is not valid JSON ({error})") from None


def _values(record: object, wanted: dict[str, type | tuple[type, ...]]) -> list:
    """The values of these keys of a JSON object, each of one of the types of its key."""
    if not isinstance(record, dict):
        raise _Bad(f"must be a JSON object, got {type(record).__name__}")
    for key, types in wanted.items():
        names = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        if key not in record:
            raise _Bad(f"has no {key!r}")
        if not isinstance(record[key], types) or isinstance(record[key], bool):
            raise _Bad(f"{key!r} must be {names}, got {type(record[key]).__name__}")
    return [record[key] for key in wanted]


class _Collector:
    """Gathers entries and problems; each distinct picture is checked once, however many captions it has."""

    def __init__(self, argument: str, folder: str | Path, on_error: str, fits: Fits):
        if on_error not in ("skip", "stop"):
            fail("on_error", 'must be "skip" or "stop"', repr(on_error))
        if not Path(folder).is_dir():
            fail(argument, "must be a folder", str(folder))
        self.argument, self.folder, self.on_error = argument, Path(folder).resolve(), on_error
        self.fits, self.entries, self.problems = fits, [], []
        self._checked: dict[str, tuple[str, str]] = {}  # name as written → (name in the folder, problem)

    @contextmanager
    def entry(self, where: str) -> Iterator[None]:
        """What is bad in here is left out and reported, or stops everything."""
        try:
            yield
        except _Bad as problem:
            if self.on_error == "stop":
                raise ValueError(f"{where}: {problem}") from None
            self.problems.append(f"{where}: {problem}")

    def add(self, where: str, source: str, written: str, captions: str | list) -> None:
        """Take the good captions of one picture."""
        if captions == []:
            raise _Bad("the list of captions is empty")
        good = []
        for i, caption in enumerate([captions] if isinstance(captions, str) else captions):
            label = "caption" if isinstance(captions, str) else f"caption {i + 1} of the list"
            with self.entry(where):
                if not isinstance(caption, str):
                    raise _Bad(f"{label} must be str, got {type(caption).__name__}")
                if not caption.strip():
                    raise _Bad(f"{label} is empty")
                if not _is_unicode(caption):
                    raise _Bad(f"{label} holds half a character (a lone surrogate)")
                good.append(caption.strip())
        if good and written not in self._checked:
            self._checked[written] = self._check(written)
        name, problem = self._checked[written] if good else ("", "")
        if problem:
            raise _Bad(f"image {written!r} {problem}")
        self.entries += [Entry(name, caption, source) for caption in good]

    def _check(self, written: str) -> tuple[str, str]:
        """The name of a picture in the folder, and what is wrong with it ("" = nothing)."""
        try:
            path = self._place(written)
            if not path.is_relative_to(self.folder):
                a_link = Path(os.path.normpath(self.folder / written)).is_relative_to(self.folder)
                return written, "lies outside the folder" + " (it is a link)" * a_link
            if not path.is_file() or not _is_unicode(written):
                return written, "does not exist"
            with Image.open(path, formats=FORMATS) as image:
                image.verify()  # checksums, where the format has them; then a real decode
            height, width, _ = read_rgb(path).shape
        except Image.UnidentifiedImageError:
            return written, f"is not a picture of a known kind ({', '.join(FORMATS)})"
        except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
            return written, f"cannot be read ({error})"
        try:
            self.fits(height, width)
        except ValueError as error:
            return written, f"does not fit ({error})"
        return path.relative_to(self.folder).as_posix(), ""

    def _place(self, written: str) -> Path:
        """Where the picture lies, links followed: also under a name from Windows, or one whose accents are
        composed otherwise, as macOS writes them."""
        slashed = written.replace("\\", "/")
        names = [written, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))]
        places = [(self.folder / name).resolve() for name in names]
        return next((place for place in places if place.is_file()), places[0])

    def dataset(self) -> Captions:
        if not self.entries:
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            fail(self.argument, "must yield at least one good caption", f"none{first}")
        return Captions(self.folder, self.entries, self.problems)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
