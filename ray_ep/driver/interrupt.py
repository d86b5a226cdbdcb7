"""SIGINT and SIGTERM as a wish that the step loop looks at. No Ray here."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """SIGINT and SIGTERM ask for a stop at the next safe point; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def caught(self) -> Iterator[Interrupt]:
        """Handle the signals inside; only Python's main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.getsignal(s) for s in _SIGNALS}
        self.hold()
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def hold(self) -> None:
        """Take the signals (again: `ray.init` installs handlers of its own); raise if a stop was asked for."""
        if threading.current_thread() is threading.main_thread():
            for s in _SIGNALS:
                signal.signal(s, self._ask)
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
