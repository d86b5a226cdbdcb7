"""What was asked under which id, so that a repeat changes nothing and is given the first one's answer. No gRPC."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import sha256

from ray_ep.driver.requests import Answer, Request, Where

REMEMBERED = 1000
"""Answered requests whose ids are remembered, the newest: a caller tries again within minutes."""
WAITING = 256
"""Requests that may wait for the driver at once."""


class Other(Exception):
    """The id was used for something else."""


class TooMany(Exception):
    """WAITING requests wait."""


@dataclass(slots=True)
class Known:
    """A request's answer, and how many calls wait for it.

    Args:
        digest: of its content. where: the run was when it was answered; None: it is not, or was not formed.
    """

    answer: Future[Answer]
    digest: bytes
    waiting: int = 0
    where: Where | None = None


class Once:
    """The requests of one run by id. Every call is made in one event loop."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Known] = OrderedDict()

    def known(self, number: str, content: bytes) -> Known | None:
        """The request of this id; None: there is none. Raises Other."""
        known = self._known.get(number)
        if known is not None and known.digest != sha256(content).digest():
            raise Other
        return known

    def begin(self, number: str, content: bytes, request: Request) -> Known:
        """A request of a new id. Raises TooMany."""
        answered = [n for n, k in self._known.items() if k.answer.done()]
        if len(self._known) - len(answered) >= WAITING:
            raise TooMany
        for old in answered[: max(len(self._known) - REMEMBERED + 1, 0)]:
            del self._known[old]
        self._known[number] = Known(request.answer, sha256(content).digest())
        return self._known[number]

    async def answer(self, number: str, known: Known) -> Answer:
        """What came of it.

        Whoever waits last and gives up (CancelledError) takes the request back, unless it was begun; its id is then as
        new.
        """
        known.waiting += 1
        try:
            return await asyncio.shield(asyncio.wrap_future(known.answer))
        except asyncio.CancelledError:
            if known.waiting == 1 and known.answer.cancel():
                self._known.pop(number, None)
            raise
        finally:
            known.waiting -= 1
