"""How long a learner's code may take, and the line where it stood when its time was over.

A thread cannot be killed, and Python code does not run while a call of C does not return. So there are two
clocks:

    Clock   after SECONDS a signal raises TooLong in the learner's code, in whatever line it stands, asleep or
            awake. It needs Unix and the main thread.
    hard    after HARD · SECONDS in one example, for what the first cannot reach: a call of C that never comes
            back, and Windows. faulthandler writes in which line each thread stands and ends the process.

Threads that the learner's code leaves running are not waited for at the end (`leave`). A file that calls
os._exit ends the process at once, without a word: nothing here can stop that.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = float(os.environ.get("MINIVLP_LIMIT", 10))  # an attempt at a law
HARD = 6
AGAIN = 0.05  # seconds until the signal comes again, should the learner's code catch TooLong
SCREEN = 2  # the file descriptor of the hard clock; pytest's settings put the terminal here

STRAYS: dict[threading.Thread, str] = {}  # threads left running, and whose they are


class TooLong(BaseException):
    """Raised in the learner's code when its time is over; no `except Exception` catches it."""


class Clock:
    """The time that the code of one file has left."""

    def __init__(self, file: str | None, seconds: float | None = None):
        self.file, self.left = file, SECONDS if seconds is None else seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Raise TooLong in the code of `file` (None: anywhere) when the time is over."""
        soft = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if not soft:
            yield
            return
        began, handler = time.monotonic(), signal.signal(signal.SIGALRM, self._ring)
        timer = signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)
            self.left -= time.monotonic() - began

    def _ring(self, number: int, frame: types.FrameType | None) -> None:
        """Only where the learner's code is at work: the laws' own must not be torn apart."""
        while frame and self.file not in (None, frame.f_code.co_filename):
            frame = frame.f_back
        if frame:
            raise TooLong


@contextmanager
def hard() -> Iterator[None]:
    """End the process when this takes HARD · SECONDS, and say in which line it stood."""
    faulthandler.dump_traceback_later(HARD * SECONDS, exit=True, file=SCREEN)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def threads_of(owner: str) -> Iterator[None]:
    """Note which threads are started meanwhile and left running."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
        STRAYS.update(dict.fromkeys(left, owner))


def leave(code: int) -> int:
    """The exit code; where a learner's thread still runs, the process ends here without waiting for it."""
    left = {owner: thread for thread, owner in STRAYS.items() if thread.is_alive()}
    if left:
        for owner, thread in left.items():
            print(f"{owner} has left {thread.name} running, which is not waited for", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
