"""What is asked of a running job, whoever asks: one queue that the loop takes from between steps. No Ray.

Signals and calls over the network (ray_ep.control) are turned into requests elsewhere. Each is answered once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Any


class RequestKind(Enum):
    """What can be asked for."""

    STOP = "stop"  # save and end, after the step that is under way
    REBALANCE = "rebalance"  # consider other places for the experts now
    SCALE = "scale"  # go on with `ranks` ranks; 0: with as many as elastic.policy says
    DRAIN = "drain"  # have all ranks leave `node` (id or its beginning, host, address); with `undo`: no more
    CHECKPOINT = "checkpoint"  # save now; the answer's value is the checkpoint's URL
    PAUSE = "pause"  # make no step until `resume`
    RESUME = "resume"  # go on
    APPLY = "apply"  # move experts to `placement`
    QUESTION = "question"  # what the planner knows: the answer's value is a verdict.Question


class Why(Enum):
    """Why something that was asked is not done."""

    NEVER = "never"  # it cannot be, whenever it is asked
    UNKNOWN = "unknown"  # it names what is not there
    NOT_NOW = "not now"  # not in the run's present state
    CHANGED = "changed"  # the epoch or the placement is another one than the request names, or a rank was lost
    FAILED = "failed"  # it was tried
    ENDED = "ended"  # the run has ended


@dataclass(frozen=True, slots=True)
class Where:
    """Where a run is: steps done, epoch of its membership, version of its placement, nodes that orders leave."""

    done: int
    epoch: int
    version: int
    drained: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request.

    Args:
        words: a sentence. refused: None: it was done. value: as its kind says.
    """

    words: str
    refused: Why | None = None
    value: Any = None


@dataclass(frozen=True, slots=True)
class Request:
    """One wish.

    Args:
        by: who asked, for people: a signal's name, a user's token and address.
        fields: what else was said, as the kind says.
        if_epoch, if_version: of the membership and of the placement that it is meant for; None: whatever they are.
        answer: is told once. Who asked may cancel it, until it is begun.
    """

    kind: RequestKind
    by: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    if_epoch: int | None = None
    if_version: int | None = None
    answer: Future[Answer] = field(default_factory=Future, compare=False, repr=False)

    def begin(self) -> bool:
        """From now on it cannot be cancelled; False: it was."""
        return self.answer.running() or (not self.answer.done() and self.answer.set_running_or_notify_cancel())

    def tell(self, words: str, refused: Why | None = None, value: Any = None) -> None:
        """Answer it; what was cancelled, or answered before, stays so."""
        with suppress(InvalidStateError):
            self.answer.set_result(Answer(words, refused, value))

    def outdated(self, epoch: int, version: int) -> str:
        """Why it is not meant for this membership and placement; "": it is."""
        if self.if_epoch not in (None, epoch):
            return f"if_epoch={self.if_epoch}: the run is in epoch {epoch}"
        if self.if_version not in (None, version):
            return f"if_placement_version={self.if_version}: the placement has version {version}"
        return ""


class Requests:
    """Requests in the order in which they came; any thread, and a signal's handler, may put one.

    Args:
        look: called before each `take`: notices what has come and puts it, at no cost.

    Attributes:
        where: where the run is now, once it has formed; any thread may ask.
    """

    where: Callable[[], Where]

    def __init__(self, look: Callable[[], object] = bool):
        self._look = look
        self._queue: SimpleQueue[Request] = SimpleQueue()  # its put is reentrant, as signal handlers need it
        self._open: dict[int, Request] = {}  # not answered yet, by identity
        self._closed = ""

    def put(self, request: Request) -> None:
        """Ask; after the end it is answered at once."""
        self._open[id(request)] = request
        request.answer.add_done_callback(lambda _: self._open.pop(id(request), None))
        self._queue.put(request)
        if self._closed:  # looked at last: `close` sees this request, or this line sees `close`
            request.tell(self._closed, Why.ENDED)

    def take(self) -> list[Request]:
        """What was asked since the last call, but for what was given up since."""
        self._look()
        taken: list[Request] = []
        while True:
            try:
                request = self._queue.get_nowait()
            except Empty:
                return taken
            if not request.answer.done():
                taken.append(request)

    def close(self, words: str) -> None:
        """The run ends: whatever waits, and whatever comes, is answered so. No request waits for another attempt."""
        self._closed = words
        for request in list(self._open.values()):
            request.tell(words, Why.ENDED)
