"""Carries faults out on a ground: whom a fault hits of those that are there, and what has to follow it later."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from ray_ep.chaos.grounds import Ground
from ray_ep.chaos.schedule import Fault, Kind

NEW_NODE_S = 2.0
"""Seconds from a lost node to the start of one in its place: a cloud takes longer, a warm pool does not."""
DRAIN_S = 20.0
"""Seconds that a drained node is given."""
SLOW_PART = 0.05
"""Of its bandwidth that a slowed host has left."""

Done = tuple[str, tuple[str, ...]]
"""What was done, in words; members that it hit."""


class NotNow(Exception):
    """A fault that cannot be carried out at the moment; its words say why."""


class Faults:
    """Faults on one run.

    Args:
        session: of the run's driver.
        silence_s: after which a rank counts as lost.
        least: ranks that no fault of ours leaves fewer of.
        slow_s: how long a link is slowed.
        clock: seconds.
    """

    def __init__(
        self,
        ground: Ground,
        session: int,
        silence_s: float,
        least: int,
        slow_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ground, self._session, self._silence_s, self._least = ground, session, silence_s, least
        self._slow_s, self._clock = slow_s, clock
        self._nodes = len(self._workers())  # so many are there when all is well
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._do = {
            Kind.KILL: self._kill, Kind.NODE: self._kill_node, Kind.STOP: self._stop, Kind.CUT: self._cut,
            Kind.SLOW: self._slow, Kind.DRAIN: self._drain, Kind.ADD: self._add,
        }  # fmt: skip

    def inject(self, fault: Fault) -> Done:
        """Do it; what was done, in words, and which members of the run it hit.

        Raises:
            NotNow: it cannot be done at the moment, and nothing was.
            ClusterError: the cluster does not do it.
        """
        return self._do[fault.kind](fault)

    def tend(self) -> None:
        """Do what is due of what follows earlier faults: wake, heal, replace. Raises ClusterError."""
        now = self._clock()
        due = [action for at, action in self._later if at <= now]
        self._later = [(at, action) for at, action in self._later if at > now]
        for action in due:
            action()

    def _kill(self, fault: Fault) -> Done:
        rank = self._one_rank(fault)
        self._send(rank, signal.SIGKILL)
        return f"SIGKILL to {_named(rank)}", _members([rank])

    def _stop(self, fault: Fault) -> Done:
        rank = self._one_rank(fault)
        seconds = self._silence_s * (2.0 if fault.long else 0.5)
        self._send(rank, signal.SIGSTOP)
        self._after(seconds, lambda: self._send(rank, signal.SIGCONT))
        return f"{_named(rank)} stopped for {seconds:g} s", _members([rank])

    def _kill_node(self, fault: Fault) -> Done:
        node, ranks = self._one_node(fault)
        self._ground.agent.ask("end_node", node=node["node"], number=signal.SIGKILL)
        self._after(NEW_NODE_S, lambda: self._replace(node["address"], node["node"]))
        return f"node {node['node'][:8]} killed, with {_count(ranks)}", _members(ranks)

    def _drain(self, fault: Fault) -> Done:
        node, ranks = self._one_node(fault)
        self._ground.agent.ask("drain", node=node["node"], seconds=DRAIN_S)
        self._after(DRAIN_S, lambda: self._end_drained(node["node"]))
        later = DRAIN_S * self._ground.in_place + NEW_NODE_S
        self._after(later, lambda: self._replace(node["address"], node["node"]))
        return f"node {node['node'][:8]} with {_count(ranks)} will go in {DRAIN_S:g} s", _members(ranks)

    def _add(self, fault: Fault) -> Done:
        if len(self._workers()) > self._nodes:
            raise NotNow("there is one node more already")
        self._ground.new_node("")
        return "one node more", ()

    def _cut(self, fault: Fault) -> Done:
        node, ranks = self._one_node(fault)
        self._ground.cut(node["address"])
        self._after(3 * self._silence_s, lambda: self._heal(node["address"]))
        return f"host {node['address']} cut off, with {_count(ranks)}", _members(ranks)

    def _slow(self, fault: Fault) -> Done:
        node, ranks = self._one_node(fault)
        self._ground.slow(node["address"], SLOW_PART)
        self._after(self._slow_s, lambda: self._ground.slow(node["address"], 1.0))
        words = f"host {node['address']} with {_count(ranks)}: links at {SLOW_PART:.0%} for {self._slow_s:g} s"
        return words, _members(ranks)

    def _heal(self, address: str) -> None:
        self._ground.heal(address)
        self._replace(address)

    def _replace(self, address: str, going: str = "") -> None:
        """A node in place of one that is lost or `going`, unless there are enough without that."""
        if len([n for n in self._workers() if n["node"] != going]) < self._nodes:
            self._ground.new_node(address)

    def _end_drained(self, node: str) -> None:
        """Nothing happens at a deadline by itself: a cloud takes the machine away."""
        if Kind.NODE not in self._ground.impossible and node in {n["node"] for n in self._workers()}:
            self._ground.agent.ask("end_node", node=node, number=signal.SIGTERM)

    def _one_rank(self, fault: Fault) -> dict[str, Any]:
        ranks = self._ranks()
        if len(ranks) <= self._least:
            raise NotNow(f"{_count(ranks)} left")
        return ranks[int(fault.pick * len(ranks))]

    def _one_node(self, fault: Fault) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A node that has ranks, and these; never the head, never one without which too few ranks are left."""
        ranks = self._ranks()
        found = []
        for node in self._workers():
            there = [r for r in ranks if r["node"] == node["node"]]
            if there and len(ranks) - len(there) >= self._least:
                found.append((node, there))
        if not found:
            raise NotNow(f"no node can be spared: {_count(ranks)} left")
        return found[int(fault.pick * len(found))]

    def _ranks(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ground.agent.ask("ranks", session=self._session)
        return found

    def _workers(self) -> list[dict[str, Any]]:
        return [n for n in self._ground.agent.ask("nodes") if not n["head"]]

    def _send(self, rank: dict[str, Any], number: int) -> None:
        self._ground.agent.ask("send", node=rank["node"], pid=rank["pid"], number=number)

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((self._clock() + seconds, action))


def _members(ranks: list[dict[str, Any]]) -> tuple[str, ...]:
    """The name of a rank's actor is ep/RUN/rankN; its member of the run is rank-N."""
    return tuple(f"rank-{rank['name'].rpartition('/rank')[2]}" for rank in ranks)


def _named(rank: dict[str, Any]) -> str:
    return f"{_members([rank])[0]} (process {rank['pid']}, node {rank['node'][:8]})"


def _count(ranks: list[dict[str, Any]]) -> str:
    return f"{len(ranks)} ranks" if len(ranks) != 1 else "1 rank"
