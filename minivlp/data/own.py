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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from minivlp.core.images import upright_rgb
from minivlp.core.require import fail

# Raster formats only: Pillow hands EPS and the like to outside programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


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


def captions_folder(path: str | Path, on_error: str = "skip") -> Captions:
    """A folder of images with a `captions.jsonl` (UTF-8; blank lines are ignored, other keys too).

    A bad line (malformed JSON, missing key, wrong type, empty caption, missing or broken image, image outside
    the folder) becomes a sentence in `.problems` with on_error="skip"; with "stop" the first one raises
    ValueError. In a list of captions the good ones stay. No file or no good line raises ValueError too.
    """
    collector = _Collector("path", path, on_error)
    file = collector.folder / "captions.jsonl"
    if not file.is_file():
        fail("path", "must be a folder with a captions.jsonl", str(path))
    with open(file, "rb") as lines:  # bytes, so that one line that is not UTF-8 costs that line only
        for number, line in enumerate(lines, start=1):
            if line.strip():
                collector.add(f"{file.name} line {number}", f"{file.name}:{number}", _parse(line, number))
    return collector.dataset()


def coco_captions(json_path: str | Path, image_folder: str | Path, on_error: str = "skip") -> Captions:
    """COCO captions JSON: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.

    One item an annotation, in the order of the file; a source reads "captions.json:annotations[3]". Bad
    entries are treated as in `captions_folder`; pictures without annotations are not looked at. Raises
    ValueError when the file is not of this form or no annotation is good.
    """
    collector, file = _Collector("image_folder", image_folder, on_error), Path(json_path)
    if not file.is_file():
        fail("json_path", "must be a file", str(json_path))
    content = _parse(file.read_bytes())
    lists = [content.get(key) for key in ("images", "annotations")] if isinstance(content, dict) else [None]
    if not all(isinstance(entries, list) for entries in lists):
        got = content if isinstance(content, _Bad) else f"is a {type(content).__name__} without them"
        fail("json_path", 'must hold {"images": [...], "annotations": [...]}', f"a file that {got}")
    images, annotations = lists
    names = {}
    for i, image in enumerate(images):
        problem = _wrong(image, {"id": (int, str), "file_name": str})
        if not problem and image["id"] in names:
            problem = f"id {image['id']!r} occurs twice"
        if problem:
            collector.report(f"{file.name} images[{i}]", problem)
        else:
            names[image["id"]] = image["file_name"]
    for i, annotation in enumerate(annotations):
        problem = _wrong(annotation, {"image_id": (int, str), "caption": str})
        if not problem and annotation["image_id"] not in names:
            problem = f"image_id {annotation['image_id']!r} is not among the images"
        where = f"annotations[{i}]"
        if problem:
            collector.report(f"{file.name} {where}", problem)
        else:
            record = {"image": names[annotation["image_id"]], "caption": annotation["caption"]}
            collector.add(f"{file.name} {where}", f"{file.name}:{where}", record)
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


class _Bad(str):
    """A sentence that stands in the place of a record that could not be read."""


def _parse(data: bytes, line: int = 1) -> object:
    """The JSON value in these bytes, or what is wrong with them."""
    try:
        return json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError:
        return _Bad("is not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return _Bad(f"is not valid JSON ({error})")


def _wrong(record: object, wanted: dict[str, type | tuple[type, ...]]) -> str | None:
    """What is wrong with the keys of a JSON object, None = nothing; `wanted` gives the types of each key."""
    if isinstance(record, _Bad):
        return record
    if not isinstance(record, dict):
        return f"must be a JSON object, got {type(record).__name__}"
    for key, types in wanted.items():
        names = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        if key not in record:
            return f"has no {key!r}"
        if not isinstance(record[key], types) or isinstance(record[key], bool):
            return f"{key!r} must be {names}, got {type(record[key]).__name__}"
    return None


class _Collector:
    """Gathers entries and problems; each distinct picture is checked once, however many captions it has."""

    def __init__(self, argument: str, folder: str | Path, on_error: str):
        if on_error not in ("skip", "stop"):
            fail("on_error", 'must be "skip" or "stop"', repr(on_error))
        if not Path(folder).is_dir():
            fail(argument, "must be a folder", str(folder))
        self.argument, self.folder, self.on_error = argument, Path(folder).resolve(), on_error
        self.entries, self.problems = [], []
        self._checked: dict[
            str, tuple[str, str | None]
        ] = {}  # name as written → (name in the folder, problem)

    def report(self, where: str, problem: str) -> None:
        if self.on_error == "stop":
            raise ValueError(f"{where}: {problem}")
        self.problems.append(f"{where}: {problem}")

    def add(self, where: str, source: str, record: object) -> None:
        """Take the captions of one record {"image", "caption"}, or report why not."""
        problem = _wrong(record, {"image": str, "caption": (str, list)})
        if problem:
            return self.report(where, problem)
        written, captions = record["image"], list(self._good_captions(where, record["caption"]))
        if not captions:
            return None
        if written not in self._checked:
            self._checked[written] = self._check(written)
        name, problem = self._checked[written]
        if problem:
            return self.report(where, f"image {written!r} {problem}")
        self.entries += [Entry(name, caption, source) for caption in captions]
        return None

    def _good_captions(self, where: str, captions: str | list) -> Iterator[str]:
        if captions == []:
            self.report(where, "the list of captions is empty")
        for i, caption in enumerate([captions] if isinstance(captions, str) else captions):
            label = "caption" if isinstance(captions, str) else f"caption {i + 1} of the list"
            if not isinstance(caption, str):
                self.report(where, f"{label} must be str, got {type(caption).__name__}")
            elif not caption.strip():
                self.report(where, f"{label} is empty")
            elif not _is_unicode(caption):
                self.report(where, f"{label} holds half a character (a lone surrogate)")
            else:
                yield caption.strip()

    def _check(self, written: str) -> tuple[str, str | None]:
        """The name of a picture in the folder, and what is wrong with it (None = nothing)."""
        try:
            path = (self.folder / written).resolve()  # follows links, so a link cannot lead outside either
            if not path.is_relative_to(self.folder):
                return written, "lies outside the folder"
            if not path.is_file() or not _is_unicode(written):
                return written, "does not exist"
            with Image.open(path, formats=FORMATS) as image:
                image.verify()  # checksums, where the format has them; then a real decode
            read_rgb(path)
        except Image.UnidentifiedImageError:
            return written, f"is not a picture of a known kind ({', '.join(FORMATS)})"
        except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
            return written, f"cannot be read ({error})"
        return path.relative_to(self.folder).as_posix(), None

    def dataset(self) -> Captions:
        if not self.entries:
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            fail(self.argument, "must yield at least one good caption", f"none{first}")
        return Captions(self.folder, self.entries, self.problems)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
