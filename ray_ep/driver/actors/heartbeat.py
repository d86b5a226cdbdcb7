"""Which ranks answer: each is asked every second while the driver waits; one that is silent for too long is lost.

`Pulse` decides, with the clock passed in. `Heartbeat` asks, through Ray. What follows from a loss is ranks.py's.

Uses private parts of Ray, its table of actors and its gRPC channel: pyproject pins the version range.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import state
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]
from ray.exceptions import RayError

from ray_ep.driver.actors.head import beside

PERIOD_S = 1.0
"""Seconds between two questions to a rank."""
LOOK_S = 0.2
"""Seconds between two looks at who has answered."""
HANGS = 12
"""A rank whose process answers is lost after this many times `cluster.silence_s`: a long call may keep the GIL."""
_LATE = 1.5
"""An actor that has not answered for so many times PERIOD_S is late: nobody waits for what it says."""
_PAUSE_S = 1.0
"""Between two looks that are further apart nobody listened: such a time counts against no rank, at any silence_s."""
_HEAD_S = 0.02
"""How long to wait for Ray's head, which answers in a millisecond: if it does not, the next look sees what it said."""
_CONNECT_S = 0.5
"""How long a node may take to answer a connection before it counts as cut off."""


@dataclass(slots=True)
class Heard:
    """What is known of one rank's answers, in seconds of one clock.

    Args:
        began: when it was started.
        at: when it or its process answered last; None: there is no process of it yet.
        beat: when its actor answered last.
        asked: when it was asked last.
        up: its actor has answered; before that only its process does.
    """

    began: float
    at: float | None = None
    beat: float = float("inf")
    asked: float = float("-inf")
    up: bool = False


class Pulse:
    """Who has answered when, and who is lost. Pure: `now` is passed in.

    A rank whose actor is up, or whose process is there, is lost when nothing has come from either for `silence_s`, or
    from the actor for HANGS times as long; one that is still starting (its node makes a process, it imports) when its
    actor is not up after `start_s`.
    """

    def __init__(self, ranks: int, silence_s: float, start_s: float, now: float):
        self.silence_s, self.start_s = silence_s, start_s
        self.heard = [Heard(now) for _ in range(ranks)]
        self._looked = now

    def look(self, now: float) -> None:
        """Somebody looks: after a pause everybody's silence begins anew."""
        gap, self._looked = now - self._looked, now
        if gap < _PAUSE_S:
            return
        for heard in self.heard:
            heard.began += gap
            heard.at = None if heard.at is None else now
            heard.beat += gap

    def due(self, now: float) -> list[int]:
        """Ranks to ask now."""
        return [rank for rank, heard in enumerate(self.heard) if now - heard.asked >= PERIOD_S]

    def asked(self, rank: int, now: float) -> None:
        """A rank was asked."""
        self.heard[rank].asked = now

    def answered(self, rank: int, now: float, up: bool) -> None:
        """A rank's actor (`up`) answered, or only its process, or its process was seen for the first time."""
        heard = self.heard[rank]
        heard.at, heard.up = now, heard.up or up
        heard.beat = now if up else heard.beat

    def late(self, now: float) -> set[int]:
        """Ranks whose actor does not answer now, lost or not."""
        since = [heard.beat if heard.up else heard.began for heard in self.heard]
        return {rank for rank, at in enumerate(since) if now - at > _LATE * PERIOD_S}

    def lost(self, now: float) -> dict[int, str]:
        """{rank: why} of the lost ones."""
        found = {}
        for rank, heard in enumerate(self.heard):
            if heard.at is not None and now - heard.at >= self.silence_s:
                found[rank] = f"has not answered for {now - heard.at:.1f} s (cluster.silence_s={self.silence_s:g})"
            elif now - heard.beat >= HANGS * self.silence_s:
                found[rank] = f"has not answered for {now - heard.beat:.0f} s, though its process does"
            elif not heard.up and now - heard.began >= self.start_s:
                found[rank] = f"has not started within {self.start_s:g} s (where that is too short: cluster.wait_s)"
        return found


class Heartbeat:
    """Asks ranks' actors whether they are there, and of one that starts or is late its process.

    That answers without the GIL: neither an import nor a long call hides it.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        silence_s: float,
        start_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._actors, self._clock = actors, clock
        self._looked = clock()
        self._pulse = Pulse(len(actors), silence_s, start_s, self._looked)
        self._pings: dict[int, Any] = {}  # not answered yet
        self._knocks: dict[int, Any] = {}
        self._dead: dict[int, Exception] = {}  # what Ray raised for them
        self._asked: dict[int, Future[Process | None]] = {}  # where a rank runs
        self._found: dict[int, Process] = {}  # for good: Ray starts none of them again

    def look(self) -> tuple[dict[int, str], dict[int, Exception]]:
        """Ask who is due and hear who has answered; at most every LOOK_S, else nothing is done.

        Returns:
            {rank: why it counts as lost}, {rank: what Ray raised for it: it is dead}.
        """
        now = self._clock()
        if now - self._looked < LOOK_S:
            return {}, {}
        self._looked = now
        self._pulse.look(now)
        self._hear(now)
        for rank in self._pulse.due(now):
            self._ask(rank, now)
        return self._pulse.lost(now), dict(self._dead)

    def late(self) -> set[int]:
        """Ranks whose actor does not answer at the moment, lost or not."""
        now = self._clock()
        self._hear(now)
        return self._pulse.late(now)

    def silent_s(self, ranks: Iterable[int]) -> float:
        """Seconds since the last sign of life of the one of them that was heard first; 0 if none was ever heard."""
        heard = [at for at in (self._pulse.heard[rank].at for rank in ranks) if at is not None]
        return self._clock() - min(heard) if heard else 0.0

    def _hear(self, now: float) -> None:
        for rank, knock in list(self._knocks.items()):
            if knock.done():
                del self._knocks[rank]
                if knock.code().name not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                    self._pulse.answered(rank, now, up=False)
        if not self._pings:
            return
        rank_of = {ping: rank for rank, ping in self._pings.items()}
        for ping in ray.wait(list(rank_of), num_returns=len(rank_of), timeout=0)[0]:
            rank = rank_of[ping]
            del self._pings[rank]
            try:
                ray.get(ping)
                self._pulse.answered(rank, now, up=True)
            except RayError as e:
                self._dead[rank] = e

    def _ask(self, rank: int, now: float) -> None:
        self._pulse.asked(rank, now)
        if rank not in self._pings:
            self._pings[rank] = self._actors[rank].ping.remote()
        heard = self._pulse.heard[rank]
        late = now - heard.beat > _LATE * PERIOD_S
        if (heard.up and not late) or rank in self._knocks:
            return
        if process := self._process(rank):
            if heard.at is None:
                self._pulse.answered(rank, now, up=False)
            self._knocks[rank] = _knock(process.address, self._pulse.silence_s)

    def _process(self, rank: int) -> Process | None:
        """Where a rank runs, as soon as Ray's head has said so; while that is away, what it said before."""
        if rank in self._found:
            return self._found[rank]
        if rank not in self._asked:
            self._asked[rank] = beside(partial(process_of, self._actors[rank]))
        asked = self._asked[rank]
        wait([asked], _HEAD_S)
        if asked.done():
            del self._asked[rank]
            if asked.exception() is None and (found := asked.result()) is not None:
                self._found[rank] = found
        return self._found.get(rank)


@dataclass(frozen=True, slots=True)
class Process:
    """An actor's process, as Ray's table of actors has it: HOST:PORT where it listens, Ray's id of it, its number."""

    address: str
    worker: str
    pid: int


def process_of(actor: Any) -> Process | None:
    """Where an actor runs, also while it starts; None: it has no process yet, or no more."""
    told = state._connect_and_get_accessor().get_actor_info(actor._actor_id)
    data = ActorTableData.FromString(told) if told else ActorTableData()
    if not data.address.port or not data.pid:
        return None
    return Process(f"{data.address.ip_address}:{data.address.port}", data.address.worker_id.hex(), data.pid)


def _knock(address: str, limit_s: float) -> Any:
    """Ask a process of Ray for its figures: threads answer that need no GIL."""
    channel = init_grpc_channel(address)
    knock = channel.unary_unary("/ray.rpc.CoreWorkerService/GetCoreWorkerStats").future(b"", timeout=limit_s)
    knock.add_done_callback(lambda _: channel.close())
    return knock


def cut_off(places: Iterable[tuple[str, str, int]]) -> set[str]:
    """Which nodes do not answer, given NODE, HOST, PORT of each; all are asked at once."""
    asked = sorted(set(places))
    with ThreadPoolExecutor(max(1, len(asked))) as pool:
        answers = pool.map(lambda place: reachable(*place[1:]), asked)
        return {node for (node, _, _), answer in zip(asked, answers, strict=True) if not answer}


def reachable(host: str, port: int) -> bool:
    """Whether a node's kernel takes a connection: it does so for a process that is stopped, too."""
    with suppress(OSError):
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
        return True
    return False
