"""Questions to Ray's head, which may be away for a while: none of them returns before it is back.

So each is asked in a thread of its own, which is left behind where nobody waits any longer. Imports nothing of Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

HEAD_S = 3.0
"""How long to wait for an answer that takes milliseconds, on a busy head some more, before it counts as away."""

T = TypeVar("T")


def beside(ask: Callable[[], T]) -> Future[T]:
    """What `ask` returns or raises, once it does."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as e:
            answer.set_exception(e)

    threading.Thread(target=run, name="ask-ray", daemon=True).start()
    return answer


def within(limit_s: float, ask: Callable[[], T]) -> T | None:
    """What `ask` returns or raises; None if it has done neither after `limit_s`."""
    answer = beside(ask)
    wait([answer], limit_s)
    return answer.result() if answer.done() else None
