"""The status of a run as its directory and its driver tell it: read once for all who ask, and told to all who watch."""

from __future__ import annotations

import asyncio
import math
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
SENT = 100
"""Statuses a second at most for all watchers together: one takes 0.2 ms of a processor that ranks may need."""


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
        self._news, self._reading = asyncio.Event(), asyncio.Lock()
        self._newest, self._number, self._read_at = b"", 0, float("-inf")
        self._next, self._end = self._loop.create_future(), self._loop.create_future()  # the next status, and the last
        self.watchers, self._over = 0, False

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
                    self._newest, self._number = read, self._number + 1
                    self._let_go(ended=self._over)
        return self._newest

    async def watch(self, every_s: float) -> AsyncIterator[bytes]:
        """The status now and after each change, until the end; at most one in `every_s` seconds, the newest.

        More than SENT times `every_s` watchers are sent one less often. All who look as often are sent it together,
        which takes half of what one after another takes.
        """
        self.watchers += 1
        due = self._loop.time()
        try:
            yield await self.now()
            seen = self._number
            while not (self._end.done() and seen == self._number):
                due = self._together(due, max(every_s, self.watchers / SENT))
                # Not `wait_for`, which makes a task each time.
                await asyncio.wait([self._end], timeout=due - self._loop.time())
                if seen == self._number and not self._end.done():
                    await asyncio.wait([self._next])
                if seen != self._number:
                    seen = self._number
                    yield self._newest
        finally:
            self.watchers -= 1

    async def keep(self) -> None:
        """Show watchers what is new, for as long as the run goes."""
        while not self._end.done():
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
        self._let_go(ended=True)

    def _together(self, since: float, period_s: float) -> float:
        """When somebody is sent another status who was sent one at `since` or later: on a beat that all share."""
        return math.ceil(max(since + period_s, self._loop.time()) / period_s - 1e-6) * period_s

    def _let_go(self, ended: bool) -> None:
        """Who waits for another status goes on; at the end, who waits for its turn, too."""
        waited, self._next = self._next, self._loop.create_future()
        waited.set_result(None)
        if ended and not self._end.done():
            self._end.set_result(None)

    def _read(self) -> bytes:
        self._state.refresh()
        tree = self._state.snapshot("run", "membership", "events")
        self._over = tree["run"]["state"] == "stopped"
        rows = self._state.steps.rows
        evaluated = next((row["eval_loss"] for row in reversed(rows) if isinstance(row.get("eval_loss"), float)), None)
        status = status_message(tree, rows[-1] if rows else {}, self._where(), evaluated)
        return pb.StatusResponse(status=status).SerializeToString(deterministic=True)
