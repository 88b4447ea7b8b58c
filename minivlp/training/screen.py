"""What a run shows: plain lines on stdout, and on a terminal a bar on stderr with the time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tick = Callable[[int, int], None]  # how much is done in all, of how much


def any_terminal() -> None:
    """Let characters that the terminal lacks be shown as "?": they must not end the work."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no need of it
            stream.reconfigure(errors="replace")


class Screen:
    """`say` prints a line; `bar` shows how far a task is."""

    def __init__(self, silent: bool = False):
        self._bar, self._silent = None, silent

    def say(self, text: str) -> None:
        """Print at once, above the bar where there is one; a silent screen says nothing."""
        if self._silent:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    @contextmanager
    def bar(self, what: str, lines: bool = False) -> Iterator[Tick]:
        """Yield `tick(done, total)`, to be told how much is done.

        Where stderr is no terminal there is no bar, but, with `lines`, a line at each quarter.
        """
        if self._silent or not sys.stderr.isatty():
            yield self._quarters(what) if lines else lambda done, total: None
            return
        from tqdm import tqdm

        with tqdm(desc=what, leave=False, dynamic_ncols=True) as bar:

            def tick(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            self._bar = bar
            try:
                yield tick
            finally:
                self._bar = None

    def _quarters(self, what: str) -> Tick:
        started, said = time.perf_counter(), 0

        def tick(done: int, total: int) -> None:
            nonlocal said
            if done * 4 // total > said:
                said = done * 4 // total
                seconds = time.perf_counter() - started
                left = seconds / done * (total - done)
                self.say(f"{what} {done / total:4.0%}  {seconds:5.0f} s  {left:4.0f} s left")

        return tick


def progress_line(record: dict, steps: int) -> str:
    """One line of metrics.jsonl for the reader, with the time that the run has left."""
    left = record["seconds"] / record["step"] * (steps - record["step"])
    numbers = "  ".join(f"{k} {v:.3f}" for k, v in record.items() if k not in ("step", "rows", "seconds"))
    return f"step {record['step']:5d}/{steps}  {record['seconds']:5.0f} s  {left:4.0f} s left  {numbers}"
