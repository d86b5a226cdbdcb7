"""Hands records and events to whoever listens, in order, from one thread of its own: a slow listener slows no step.

What is said, and when, is decided elsewhere. Imports the records alone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Protocol

from ray_ep.driver.records import Event, StepRecord, now

LAST_S = 30.0
"""Seconds that the end of a broken run waits for listeners that hang: its processes are taken away after that."""

log = logging.getLogger("ray_ep.driver")


class Listener(Protocol):
    """Who wants to know: the run directory, the progress display, the page. Called from the publisher's thread."""

    def start(self, event: Event) -> None:
        """The ranks are ready."""

    def step(self, record: StepRecord) -> None:
        """One step is done."""

    def event(self, event: Event) -> None:
        """Something happened that an operator should see."""


Handing = Callable[[Listener], None]


class Publisher:
    """One queue and one thread before the listeners of a run; a context manager that waits for them at its end.

    A listener that raises is told of once, as an event, and is handed what follows as before.

    Args:
        listeners: the first is served first; what is to be on disk before it is shown comes first.

    Attributes:
        done: steps behind the run, which its events tell.
    """

    def __init__(self, listeners: Sequence[Listener]):
        self.done = 0
        self._listeners = tuple(listeners)
        self._queue: SimpleQueue[Handing | threading.Event | None] = SimpleQueue()
        self._own: deque[Handing] = deque()  # what listeners say themselves: goes out behind what they are handed
        self._raised: set[int] = set()  # numbers of the listeners that were told of
        self._thread = threading.Thread(target=self._serve, name="ray_ep-listeners", daemon=True)
        self._thread.start()

    def __enter__(self) -> Publisher:
        """Listeners are served from the beginning."""
        return self

    def __exit__(self, *error: object) -> None:
        """Everything is handed over, or LAST_S have passed; the thread has ended."""
        self.close()

    def start(self, event: Event) -> None:
        """The ranks are ready."""
        stamped = self._stamped(event)
        self._put(lambda listener: listener.start(stamped))

    def step(self, record: StepRecord) -> None:
        """One step is done."""
        self._put(lambda listener: listener.step(record))

    def event(self, event: Event) -> None:
        """Something happened; any thread may say so."""
        stamped = self._stamped(event)
        self._put(lambda listener: listener.event(stamped))

    def flush(self, limit_s: float | None = None) -> bool:
        """Wait until all listeners were handed what was said before this; whether they were, within `limit_s`.

        A signal that raises ends the wait.
        """
        if not self._thread.is_alive() or threading.current_thread() is self._thread:
            return True
        mark = threading.Event()
        self._queue.put(mark)
        return mark.wait(limit_s)

    def close(self, limit_s: float = LAST_S) -> None:
        """Hand over what is left, and end the thread; a listener that hangs longer is left behind, which is logged."""
        served = self.flush(limit_s)
        self._queue.put(None)
        if served:
            self._thread.join()
        else:
            log.error("listeners hang: not all records were handed over within limit_s=%g", limit_s)

    def _stamped(self, event: Event) -> Event:
        return replace(event, step=self.done, at=now())

    def _put(self, handing: Handing) -> None:
        if threading.current_thread() is self._thread:
            self._own.append(handing)
        elif self._thread.is_alive():
            self._queue.put(handing)
        else:
            self._hand(handing)

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._hand(item)

    def _hand(self, handing: Handing) -> None:
        self._own.append(handing)
        while self._own:
            following = self._own.popleft()
            for number, listener in enumerate(self._listeners):
                try:
                    following(listener)
                except Exception as e:  # of any kind: it is no reason to end a run
                    self._tell(number, listener, e)

    def _tell(self, number: int, listener: Listener, e: Exception) -> None:
        if number in self._raised:
            return
        self._raised.add(number)
        name, why = type(listener).__name__, f"{type(e).__name__}: {e}"
        fields = {"listener": name, "error": why}
        event = Event("listener", f"{name} raised {why}; the run goes on", fields, self.done)
        self._own.append(lambda other: other.event(event))
