"""The status of a run as its directory and its driver tell it: read once for all who ask, and told to all who watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from ray_ep.control.messages import status_message
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.requests import Where
from ray_ep.observe.state import RunState

FRESH_S = 0.2
"""Seconds for which a status counts as new: however many ask, it is read so often at most."""
UNTOLD_S = 1.0
"""Seconds after which watchers are shown what nobody told of."""


class Board:
    """The newest status, as bytes of a StatusResponse, which are those of a WatchStatusResponse, too.

    Every call but `tell` is made in one event loop, that of its making.

    Args:
        state: of the run's directory; read here alone. where: what the driver says.

    Attributes:
        watchers: how many watch.
    """

    def __init__(self, state: RunState, where: Callable[[], Where]):
        self._state, self._where = state, where
        self._loop = asyncio.get_running_loop()
        self._news, self._changed, self._reading = asyncio.Event(), asyncio.Condition(), asyncio.Lock()
        self._newest, self._number, self._read_at = b"", 0, float("-inf")
        self.watchers, self._over, self._ended = 0, False, False

    def tell(self) -> None:
        """There is something new; any thread may say so."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)

    def outdated(self) -> None:
        """A change was carried out: whoever asked for it sees it in the next status."""
        self._read_at = float("-inf")

    async def now(self) -> bytes:
        """What the run is at."""
        async with self._reading:
            if time.monotonic() - self._read_at >= FRESH_S:
                self._read_at = time.monotonic()  # of its beginning: what changes meanwhile is read again
                read = await asyncio.to_thread(self._read)
                if read != self._newest:
                    async with self._changed:
                        self._newest, self._number = read, self._number + 1
                        self._ended = self._ended or self._over
                        self._changed.notify_all()
        return self._newest

    async def watch(self, every_s: float) -> AsyncIterator[bytes]:
        """The status now and after each change, until the end; at most one in `every_s` seconds, the newest."""
        self.watchers += 1
        try:
            yield await self.now()
            seen = self._number
            while not (self._ended and seen == self._number):
                await self._pause(every_s)
                if await self._after(seen):
                    seen = self._number
                    yield self._newest
        finally:
            self.watchers -= 1

    async def keep(self) -> None:
        """Show watchers what is new, for as long as the run goes."""
        while not self._ended:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), UNTOLD_S)
            self._news.clear()
            if self.watchers:
                await self.now()
            await asyncio.sleep(FRESH_S)

    async def end(self) -> None:
        """The run has ended: watchers are shown its last status, and let go."""
        self._read_at = float("-inf")
        await self.now()
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def _after(self, number: int) -> bool:
        """Wait for another status than the one of this number, or the end; whether there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended or self._number != number)
            return self._number != number

    async def _pause(self, seconds: float) -> None:
        """So long, or until the end."""
        async with self._changed:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._ended), seconds)

    def _read(self) -> bytes:
        self._state.refresh()
        tree = self._state.snapshot("run", "membership", "events")
        self._over = tree["run"]["state"] == "stopped"
        rows = self._state.steps.rows
        evaluated = next((row["eval_loss"] for row in reversed(rows) if isinstance(row.get("eval_loss"), float)), None)
        status = status_message(tree, rows[-1] if rows else {}, self._where(), evaluated)
        return pb.StatusResponse(status=status).SerializeToString(deterministic=True)
