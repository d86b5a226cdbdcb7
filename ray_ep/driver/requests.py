"""What is asked of a running job, whoever asks: one queue that the loop takes from between steps. No Ray.

Signals, files of `ray-ep rebalance`, `scale` and `drain` and, later, calls over the network are turned into requests
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Any


class RequestKind(Enum):
    """What can be asked for."""

    STOP = "stop"  # save and end, after the step that is under way
    REBALANCE = "rebalance"  # consider other places for the experts now
    SCALE = "scale"  # go on with `ranks` ranks; 0: with as many as elastic.policy says
    DRAIN = "drain"  # have all ranks leave `node`: a node's id or the beginning of it, its host's name or address


@dataclass(frozen=True, slots=True)
class Request:
    """One wish.

    Args:
        by: who asked, for people: a signal's name, a command and its process.
        fields: what else was said, as the kind says.
    """

    kind: RequestKind
    by: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Requests:
    """Requests in the order in which they came; any thread, and a signal's handler, may put one.

    Args:
        look: called before each `take`: notices what has come and puts it, at no cost.
        polled: asked by `poll`, once a step: may cost a system call.
    """

    def __init__(self, look: Callable[[], object] = bool, polled: Iterable[Callable[[], Request | None]] = ()):
        self._look, self._polled = look, tuple(polled)
        self._queue: SimpleQueue[Request] = SimpleQueue()  # its put is reentrant, as signal handlers need it

    def put(self, request: Request) -> None:
        """Ask."""
        self._queue.put(request)

    def poll(self) -> None:
        """Fetch all that waits in files."""
        for ask in self._polled:
            while (request := ask()) is not None:
                self.put(request)

    def take(self) -> list[Request]:
        """What was asked since the last call."""
        self._look()
        taken = []
        while True:
            try:
                taken.append(self._queue.get_nowait())
            except Empty:
                return taken
