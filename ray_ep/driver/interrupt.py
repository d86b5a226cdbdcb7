"""SIGINT and SIGTERM as a wish that everybody who waits looks at. What is answered is said elsewhere. No Ray here."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """SIGINT and SIGTERM ask for a stop; a second one stops at once. Before `hold` the first does, too.

    The handler only notes the wish, since it may come in the middle of anything, of printing too. Whoever waits calls
    the object every moment: the first call after the signal says what will happen, through `tell`.

    Attributes:
        tell: called once, with the signal's name; raises KeyboardInterrupt where there is nothing to finish.
    """

    def __init__(self) -> None:
        self.asked = ""  # the signal's name
        self.tell: Callable[[str], None] = _leave
        self._told = self._held = False

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        if self.asked and not self._told:
            self._told = True
            self.tell(self.asked)
        return bool(self.asked)

    @contextmanager
    def caught(self) -> Iterator[Interrupt]:
        """Handle the signals inside; only Python's main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.getsignal(s) for s in _SIGNALS}
        self._take()
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def hold(self) -> None:
        """From now on a first signal waits until somebody looks; takes the signals again, for `ray.init` does, too."""
        self._held = True
        self._take()

    def _take(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for s in _SIGNALS:
                signal.signal(s, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        again, self.asked = self.asked, signal.Signals(number).name
        if again or not self._held:
            raise KeyboardInterrupt


def _leave(name: str) -> None:
    raise KeyboardInterrupt
