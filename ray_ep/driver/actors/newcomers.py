"""Ranks on their way into a run that steps on: room is asked for, an actor starts in it, its model is built.

Each is looked at between two steps, and nothing here waits but for a node's first file. The membership is ranks.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from ray_ep.driver.actors.head import HEAD_S, beside, within
from ray_ep.driver.actors.placing import Place, Places
from ray_ep.errors import ClusterError

AGAIN_S = 30.0
"""After a newcomer failed, nobody is asked for so long; after each one more that fails, twice as long."""
MOST_AGAIN_S = 600.0
"""At most so long."""


class Stage(Enum):
    """How far a newcomer is."""

    WAITING = "waiting"  # for room: the cluster has none yet
    STARTING = "starting"  # its process starts and imports
    TRYING = "trying"  # whether its node reads and writes what the run needs there
    BUILDING = "building"  # its model is built
    READY = "ready"  # it can be taken in


@dataclass(slots=True)
class Newcomer:
    """One rank on its way.

    Args:
        member: its id, of its own for ever. group: its room, once Ray's head has heard of it.
        where: host, node and process, as `Ranks.where` has them; complete when its actor is up.
        call: what it was asked last; while its node is tried, a future.
    """

    member: str
    group: Future[PlacementGroup]
    began: float
    stage: Stage = Stage.WAITING
    place: Place | None = None
    actor: Any = None
    where: dict[str, Any] = field(default_factory=dict)
    call: Any = None


class Newcomers:
    """All newcomers of a run.

    Args:
        start: starts an actor in its place, for a member.
        prepare: tries the node of one whose actor is up, and has it build its model: returns the call. May take long,
            and raise; called beside the steps.
        limit_s: for start and build together, and for each answer after that.
    """

    def __init__(
        self,
        places: Places,
        start: Callable[[Place, str], Any],
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._places, self._start, self._limit_s, self._clock = places, start, limit_s, clock
        self.prepare: Callable[[Newcomer], Any] | None = None
        self._coming: list[Newcomer] = []
        self._failures, self._not_before = 0, float("-inf")

    def count(self, *stages: Stage) -> int:
        """How many are at one of these stages."""
        return sum(n.stage in stages for n in self._coming)

    @property
    def actors(self) -> list[Any]:
        """Actors of those that have one."""
        return [n.actor for n in self._coming if n.actor is not None]

    def ask(self, members: list[str]) -> None:
        """Ask for room for these; while others have failed shortly before, for none."""
        if self._clock() < self._not_before:
            return
        self._coming += [Newcomer(member, beside(self._places.ask), self._clock()) for member in members]

    def withdraw(self, count: int | None = None) -> None:
        """Give up so many, those that are least far first, of equals the newest; None: all."""
        newest_first = self._coming[::-1]
        order = sorted(newest_first, key=lambda n: list(Stage).index(n.stage))
        for newcomer in order[:count]:
            self._give_up(newcomer)

    def poll(self) -> list[str]:
        """Look at each; of those that failed, and were given up, why."""
        failed = []
        for newcomer in list(self._coming):
            try:
                self._look(newcomer)
            except Exception as e:  # of whatever kind: the run goes on without it
                self._give_up(newcomer)
                host = f" on {newcomer.place.host}" if newcomer.place else ""
                why = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
                failed.append(f"{newcomer.member}{host} does not come: {why}")
        if not failed:
            return []
        self._failures += 1
        wait_s = min(AGAIN_S * 2 ** (self._failures - 1), MOST_AGAIN_S)
        self._not_before = self._clock() + wait_s
        return [f"{why}; none is asked for in {wait_s:.0f} s" for why in failed]

    def take(self) -> list[Newcomer]:
        """Those that are ready; they are nobody's here any more."""
        ready = [n for n in self._coming if n.stage is Stage.READY]
        self._coming = [n for n in self._coming if n.stage is not Stage.READY]
        if ready:
            self._failures = 0
        return ready

    def _look(self, newcomer: Newcomer) -> None:
        """Let one go on as far as it comes at once."""
        if newcomer.stage is Stage.WAITING:
            if newcomer.group.done():
                newcomer.place = self._places.have(newcomer.group.result())
            if newcomer.place is None:
                return
            newcomer.actor = self._start(newcomer.place, newcomer.member)
            newcomer.call, newcomer.began = newcomer.actor.where.remote(), self._clock()
            newcomer.stage = Stage.STARTING
        trying = newcomer.stage is Stage.TRYING
        if not (newcomer.call.done() if trying else ray.wait([newcomer.call], timeout=0)[0]):
            if self._clock() - newcomer.began > self._limit_s:
                raise ClusterError(f"it has not come up within {self._limit_s:g} s")
            return
        if newcomer.stage is Stage.STARTING:
            place = newcomer.place
            assert place is not None
            assert self.prepare is not None
            there = {"node": place.node, "host": place.host, "address": place.address, "port": place.port}
            newcomer.where = {**there, **ray.get(newcomer.call)}
            newcomer.call, newcomer.stage = beside(partial(self.prepare, newcomer)), Stage.TRYING
        elif trying:
            newcomer.call, newcomer.stage = newcomer.call.result(), Stage.BUILDING
        else:  # it is asked from now on whether it is still there
            ray.get(newcomer.call)
            newcomer.stage, newcomer.began = Stage.READY, self._clock()
            newcomer.call = newcomer.actor.ping.remote()

    def _give_up(self, newcomer: Newcomer) -> None:
        self._coming.remove(newcomer)
        within(HEAD_S, lambda: self._take_away(newcomer))

    def _take_away(self, newcomer: Newcomer) -> None:
        """Returns when Ray's head knows of it."""
        try:
            if newcomer.actor is not None:
                ray.kill(newcomer.actor, no_restart=True)
        finally:  # its room goes, whatever becomes of it
            if newcomer.group.exception() is None:  # else room could not even be asked for
                self._places.withdraw(newcomer.group.result())
