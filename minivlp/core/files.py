"""Write a file whole or not at all: beside its place, flushed to the disk, then renamed.

Left out: locks. Of two writers at once the last one to finish wins, with a whole file.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it appears, or replaces the old file, only once all is on disk.

    After an exception, or a power cut, the old file is still there as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # same disk: the rename is one step
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def packaged(name: str) -> Path:
    """The folder "data" or "weights" of the library: inside the package when installed, else in the clone."""
    package = Path(__file__).parents[1]
    installed = package / f"packaged_{name}"
    clone = {"data": "data_tiny", "weights": "chapters/weights"}[name]
    return installed if installed.is_dir() else package.parent / clone
