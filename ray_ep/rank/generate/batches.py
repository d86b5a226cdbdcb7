"""What both kinds of batches of a rank have in common: how they are asked, and how a rank without work takes part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from ray_ep.moe import ExpertParallel
from ray_ep.rank.generate.requests import Request


class Batches(Protocol):
    """Requests of one rank, computed by a thread of its own, which alone may use the group outside of `pause`.

    Attributes:
        passes: over own tokens. idle_passes: without any. pass_seconds: in both. tokens: generated.
    """

    model: Any
    passes: int = 0
    idle_passes: int = 0
    pass_seconds: float = 0.0
    tokens: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request, answer included, that there is room for."""

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are kept now; about."""

    @property
    def failed(self) -> str:
        """Why the thread has ended; "": it has not."""

    def start(self) -> None:
        """Start the thread. Every rank does."""

    def submit(self, request: Request) -> None:
        """Take a request in, which is one that `admission.refusal` lets pass. Every one gets a last delta."""

    def cancel(self, id: str) -> None:
        """Have a request end early. After its `submit`, by the same thread."""

    def wake(self) -> None:
        """Some rank has work: begin the next round now."""

    def pause(self) -> AbstractContextManager[None]:
        """Inside: the thread waits between two passes. Every rank must enter it, and none waits for another before."""

    def end(self, hard: bool) -> None:
        """End the thread: when nobody has work left, or (hard) at once, failing what is open. Every rank does."""

    def idle(self) -> None:
        """Take part in a pass of the others with no tokens: nothing is scheduled, no cache is seen."""
        ep: ExpertParallel = self.model.ray_ep
        with self.timed():
            ep.idle_pass()
        self.idle_passes += 1

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around a pass."""
        began = time.perf_counter()
        yield
        self.pass_seconds += time.perf_counter() - began
