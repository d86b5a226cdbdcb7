"""The pages of a cluster's runs, for a server that must never wait long: asked of Ray's head, beside what it serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ray_ep.driver.actors.head import beside
from ray_ep.driver.actors.shown import NAMESPACE, PROXY, Page, pages

log = logging.getLogger(__name__)

FRESH_S = 1.0
"""For so long an answer is used again."""
ANSWER_S = 2.0
"""For an answer of Ray's head; without one the last is used."""


class HeadSilentError(Exception):
    """Ray's head has not answered yet; says why."""


class Found:
    """The pages that runs of a cluster have announced.

    Args:
        ask: looks them up, and may take as long as it likes. clock: seconds.

    Attributes:
        answered: a look has had an answer.
        why: the last look had none; "" while none was refused.
    """

    def __init__(self, ask: Callable[[], Mapping[str, Page]], clock: Callable[[], float] = time.monotonic):
        self._ask, self._clock = ask, clock
        self._asking: Future[Mapping[str, Page] | None] | None = None
        self._known: Mapping[str, Page] = {}
        self._since = float("-inf")
        self.answered, self.why = False, ""

    async def __call__(self) -> Mapping[str, Page]:
        """By name; after ANSWER_S without an answer what was known before. One question at a time is under way.

        Raises:
            HeadSilentError: there was none before.
        """
        if self._clock() - self._since < FRESH_S:
            return self._known
        if self._asking is None:
            self._asking = beside(self._answer)
        asking = self._asking
        await asyncio.wait([asyncio.wrap_future(asking)], timeout=ANSWER_S)
        if asking.done() and self._asking is asking:
            self._asking, known = None, asking.result()
            if known is not None:
                self._known, self._since, self.answered = known, self._clock(), True
        if not self.answered:
            raise HeadSilentError(self.why or f"no answer within {ANSWER_S:g} s")
        return self._known

    def _answer(self) -> Mapping[str, Page] | None:
        """None: the head refuses, or is not there."""
        try:
            return self._ask()
        except Exception as e:  # each of Ray's transports has errors of its own
            why = (str(e).splitlines() or [type(e).__name__])[0]
            if why != self.why:
                log.warning("Ray's head does not answer: %s", why)
            self.why = why
            return None


def of_cluster(address: str) -> Callable[[], Mapping[str, Page]]:
    """Asks Ray's head at HOST:PORT, which may not be there yet, or be away; and tells it that somebody looks."""
    client: list[Any] = []

    def ask() -> Mapping[str, Page]:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        try:
            if not client:
                client.append(GcsClient(address=address))
                client[0].internal_kv_put(PROXY, b"1", True, NAMESPACE, timeout=ANSWER_S)
            return pages(client[0], ANSWER_S)
        except BaseException:
            client.clear()  # another head may answer at the address next time
            raise

    return ask
