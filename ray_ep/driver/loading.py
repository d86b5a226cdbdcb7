"""While ranks read a checkpoint: how far they are, told every few seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ray_ep.rank.pretrained.reading import Read, words

EVERY_S = 5.0
"""Seconds between two looks."""


class Readers(Protocol):
    """Ranks that can be asked while they read."""

    def reads(self) -> list[Read]:
        """What each rank that answers has read."""
        ...


@contextmanager
def told(ranks: Readers, phase: Callable[[str], None], every_s: float = EVERY_S) -> Iterator[None]:
    """Inside: ranks read, and `phase` hears of it from a thread of its own."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            reads = ranks.reads()
            if not over.is_set() and any(r.total for r in reads):
                phase(f"loading the model: {words(reads)}")

    thread = threading.Thread(target=watch, name="reading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
