"""What was asked of a run and is carried out between two steps: a checkpoint, a placement, a pause, the end.

Who is a member is elastic's. Every call is made by the driver's loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from ray_ep.driver.records import Event
from ray_ep.driver.requests import Request, RequestKind, Why
from ray_ep.errors import BadInput, LostError
from ray_ep.placement import Placement
from ray_ep.placement.planner.verdict import Question, Verdict


class Saving(Protocol):
    """Of the run's saver what is used here."""

    def save_and_go_on(self, done: int) -> str:
        """Write a checkpoint; why it failed, which was told."""

    def url_of(self, done: int) -> str:
        """Where that checkpoint is."""


class Moving(Protocol):
    """Of the run's mover what is used here."""

    placement: Placement

    def question(self, left: int) -> Question:
        """What the planner knows. Raises BadInput."""

    def apply(self, placement: Placement, done: int, by: str, verdict: Verdict | None) -> tuple[str, Why | None]:
        """Have the experts moved."""


class Asked:
    """The requests that stand, and those that are due.

    Args:
        steps: of the whole run. publish: tells an operator.

    Attributes:
        stop: who asked for the end first.
        due: to be carried out, oldest first.
    """

    def __init__(self, steps: int, saver: Saving, publish: Callable[[Event], None]):
        self.steps, self.saver, self.publish = steps, saver, publish
        self.stop: Request | None = None
        self.due: deque[Request] = deque()
        self._stops: list[Request] = []
        self._pauses: list[Request] = []  # who asked for the pause; empty: it is not paused, nor is to be
        self._rests = ""  # that the pause has begun, in words

    @property
    def paused(self) -> bool:
        """Whether the next step waits for somebody to ask for it."""
        return bool(self._pauses)

    @property
    def why(self) -> str:
        """Who asked for the end, or else for the pause, to end a sentence with; "": nobody."""
        first = self._stops[:1] or self._pauses[:1]
        return f", as {first[0].by} asked" if first else ""

    def put(self, request: Request) -> None:
        """Take a request of any kind but those of elastic's, and a rebalance while the run steps."""
        if request.kind is RequestKind.REBALANCE:
            request.tell("the run is paused, and decides after a step: resume it first", Why.NOT_NOW)
        elif request.kind is RequestKind.RESUME:
            self._resume(request)
        elif request.kind not in (RequestKind.STOP, RequestKind.PAUSE):
            self.due.append(request)
        elif request.begin():
            (self._stops if request.kind is RequestKind.STOP else self._pauses).append(request)
            self.stop = self._stops[0] if self._stops else None
            if request.kind is RequestKind.PAUSE and self._rests:
                request.tell(self._rests)

    def rests(self, done: int, ranks: int, epoch: int) -> None:
        """No step follows the `done`-th for now: whoever asked for that is told."""
        still = "still " if self._rests else ""
        words = f"{still}paused after step {done}{self.why}: {ranks} ranks wait in epoch {epoch}"
        self._rests = words
        self.publish(Event("paused", words, {"by": self._pauses[0].by}))
        for request in self._pauses:
            request.tell(words)

    def serve(self, done: int, epoch: int, mover: Moving) -> None:
        """Carry out the oldest request that is due, after `done` steps.

        Raises:
            RankError: as saving and moving; who asked is told.
        """
        request = self.due.popleft()
        if not request.begin():
            return
        if why := request.outdated(epoch, mover.placement.version):
            request.tell(why, Why.CHANGED)
            return
        try:
            if request.kind is RequestKind.CHECKPOINT:
                self._save(request, done)
            elif request.kind is RequestKind.APPLY:
                placement, verdict = request.fields["placement"], request.fields.get("verdict")
                request.tell(*mover.apply(placement, done, request.by, verdict))
            else:
                self._know(request, done, mover)
        except LostError as e:
            request.tell(f"a rank was lost meanwhile: {str(e).splitlines()[0]}", Why.CHANGED)
            raise

    def ended(self, words: str) -> None:
        """The last checkpoint is written: who asked for the end is told."""
        for request in self._stops:
            request.tell(words)

    def _resume(self, request: Request) -> None:
        if not self._pauses:
            request.tell("the run is not paused", Why.NOT_NOW)
        elif request.begin():
            words = f"the run goes on, as {request.by} asked"
            for pause in self._pauses:
                pause.tell(f"{words}, before it had paused")
            self._pauses, self._rests = [], ""
            self.publish(Event("resumed", words, {"by": request.by}))
            request.tell(words)

    def _save(self, request: Request, done: int) -> None:
        if not done:
            request.tell("there is nothing to save before the first step", Why.NOT_NOW)
        elif why := self.saver.save_and_go_on(done):
            request.tell(why, Why.FAILED)
        else:
            url = self.saver.url_of(done)
            request.tell(f"the checkpoint of step {done} is {url}", value=url)

    def _know(self, request: Request, done: int, mover: Moving) -> None:
        try:
            question = mover.question(max(self.steps - done, 1))
        except BadInput as e:
            request.tell(f"nothing can be predicted yet: {e}", Why.NOT_NOW)
        else:
            request.tell("", value=question)
