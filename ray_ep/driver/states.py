"""What a run is at, as a state machine: the states, the one table of moves between them, one log line a move.

Nothing is done here; the loop does it. Imports nothing of ray_ep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

log = logging.getLogger("ray_ep.driver")


class State(Enum):
    """What a run is at."""

    FORMING = "forming"  # ranks join, measure, build and load; no step is made
    STEPPING = "stepping"  # steps follow one another; evaluations and periodic saves come between them
    MIGRATING = "migrating"  # experts move between two steps; the old placement holds until all have moved
    RESIZING = "resizing"  # ranks come or go between two steps; the membership of before holds until all have switched
    PAUSED = (
        "paused"  # no step is made until somebody asks for it; ranks are watched, and may come, go and move experts
    )
    RECOVERING = "recovering"  # a rank was lost; who is left decides the membership and the step to go on from
    DRAINING = "draining"  # no further step is begun; the last checkpoint is written
    STOPPED = "stopped"  # the end, whichever way it came


TRANSITIONS: dict[State, frozenset[State]] = {
    State.FORMING: frozenset({State.STEPPING, State.STOPPED}),
    State.STEPPING: frozenset(
        {State.MIGRATING, State.RESIZING, State.PAUSED, State.RECOVERING, State.DRAINING, State.STOPPED}
    ),
    State.PAUSED: frozenset(
        {State.STEPPING, State.MIGRATING, State.RESIZING, State.RECOVERING, State.DRAINING, State.STOPPED}
    ),
    State.MIGRATING: frozenset({State.STEPPING, State.PAUSED, State.RECOVERING, State.STOPPED}),
    State.RESIZING: frozenset({State.STEPPING, State.RECOVERING, State.STOPPED}),
    State.RECOVERING: frozenset({State.STEPPING, State.DRAINING, State.STOPPED}),
    State.DRAINING: frozenset({State.RECOVERING, State.STOPPED}),
    State.STOPPED: frozenset(),
}
"""States that a run may go to next, by the state that it is in; any other move raises."""


class IllegalTransition(RuntimeError):
    """A move that the table does not have: a mistake in the driver."""


class States:
    """The state of one run; begins as forming.

    Args:
        tell: told each move: from, to and why.

    Attributes:
        now: the state. why: the reason for it.
    """

    def __init__(self, tell: Callable[[State, State, str], None] = lambda before, after, why: None) -> None:
        self.now, self.why, self._tell = State.FORMING, "", tell

    def to(self, state: State, why: str) -> None:
        """Go to `state`. Raises IllegalTransition."""
        if state not in TRANSITIONS[self.now]:
            allowed = ", ".join(sorted(s.value for s in TRANSITIONS[self.now])) or "none: it is the end"
            raise IllegalTransition(f"from {self.now.value} to {state.value} ({why}): allowed are {allowed}")
        log.info("state from=%s to=%s why=%r", self.now.value, state.value, why)
        before, self.now, self.why = self.now, state, why
        self._tell(before, state, why)

    @contextmanager
    def during(self, state: State, why: str) -> Iterator[None]:
        """Inside: `state`, then the one before again, for the reason that it had.

        After an error it stays: whoever catches that goes on from it.
        """
        before, reason = self.now, self.why
        self.to(state, why)
        yield
        self.to(before, reason)
