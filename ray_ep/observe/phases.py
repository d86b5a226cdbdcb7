"""What a start is at, for who waits: a line for each phase that takes longer than a moment, none for the others."""

from __future__ import annotations

import sys
import threading
from typing import TextIO

AFTER_S = 2.0
"""Seconds after which a command that still computes tells what it is doing."""


class Phases:
    """`phases("reading the data")` ends the phase before; `phases("")` ends the last. Use it as a context manager.

    Every line begins with `prefix`; `stream` is stderr by default, for stdout belongs to results.
    """

    def __init__(self, prefix: str = "", stream: TextIO | None = None, after_s: float = AFTER_S):
        self._prefix, self._after_s = prefix, after_s
        self._stream = sys.stderr if stream is None else stream
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Phases:
        """No phase yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """The last phase has ended, with an error or without."""
        self("")

    def __call__(self, name: str) -> None:
        """A phase begins."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # a line that is being printed is whole
            self._timer = None
        if name:
            self._timer = threading.Timer(self._after_s, self._say, [name])
            self._timer.daemon = True
            self._timer.start()

    def _say(self, name: str) -> None:
        self._stream.write(f"{self._prefix}ray-ep: {name} ...\n")
        self._stream.flush()
