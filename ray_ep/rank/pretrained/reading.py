"""How far a rank is in reading its part of a checkpoint: bytes, of how many, and since when. Holds no tensors."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TRIM_BYTES = 16 << 20
"""After so many bytes the C library gives back what it has freed: what is stacked leaves holes as large as itself."""


@dataclass(frozen=True, slots=True)
class Read:
    """What a rank has read so far.

    Args:
        done, total: bytes, quantised ones as they are in the file.
        seconds: since it began, until now or until it had all.
    """

    done: int
    total: int
    seconds: float


class Reading:
    """Counts while a checkpoint is read, from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._began = self._ended = clock()
        self._done = self._total = self._kept = 0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone

    def begin(self, total: int) -> None:
        """So many bytes are going to be read."""
        with self._lock:
            self._began, self._ended, self._done, self._total = self._clock(), 0.0, 0, total

    def add(self, size: int) -> None:
        """So many more were read."""
        with self._lock:
            self._done, self._kept = self._done + size, self._kept + size
            trim = self._kept >= _TRIM_BYTES
            self._kept = 0 if trim else self._kept
        if trim:
            self._give_back()

    def end(self) -> None:
        """All is there."""
        self._ended = self._clock()
        self._give_back()

    def so_far(self) -> Read:
        """Where it stands."""
        with self._lock:
            return Read(self._done, self._total, (self._ended or self._clock()) - self._began)

    def _give_back(self) -> None:
        if self._trim is not None:
            self._trim(0)


def words(reads: Sequence[Read]) -> str:
    """All ranks together, for people: `3.2 of 12.0 GB, 850 MB/s`; the rate is that of the slowest rank's time."""
    done, total = (sum(getattr(r, name) for r in reads) for name in ("done", "total"))
    seconds = max((r.seconds for r in reads), default=0.0)
    unit, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    rate = f", {done / seconds / 1e6:,.0f} MB/s" if seconds > 0 else ""
    return f"{done / size:,.1f} of {total / size:,.1f} {unit}{rate}"
