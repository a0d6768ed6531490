"""How far a long reading is: a bar on a terminal, a line now and then where the output goes to a file."""

import sys
import time
from datetime import timedelta
from typing import Any

FIRST, EVERY = 3.0, 15.0
"""Seconds to the first line, and from line to line, where there is no terminal."""


class Meter:
    """Shows the progress of one process through `total` bytes. Use it as a context manager.

    Arguments:
        what: is being done, as in "tokenizing".
        total: bytes that there are to read.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0.0
        self._began = time.monotonic()
        self._due = self._began + FIRST
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, delay=1)

    def add(self, count: float) -> None:
        """So many bytes more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := time.monotonic()) >= self._due:
            self._due = now + EVERY
            print(self.line(now - self._began), flush=True)

    def line(self, seconds: float) -> str:
        """The progress after so many seconds, for people."""
        share = self._done / max(self._total, 1)
        left = clock(seconds / share - seconds) if share > 0 else "?"
        return f"{self._what}: {share:.0%} of {self._total / 1e6:,.1f} MB, {left} left"

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))
