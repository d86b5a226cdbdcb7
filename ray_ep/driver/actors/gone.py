"""Whether killed processes are gone, by the table of processes that Ray keeps. Kills nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ray._private.state import workers

from ray_ep.driver.actors.head import HEAD_S, within
from ray_ep.driver.actors.heartbeat import cut_off
from ray_ep.driver.actors.placing import nodes

_workers: Callable[[], dict[str, Any]] = workers

_POLL_S = 0.01
_POLITE_S = 1.0
"""After so long it is asked whether the nodes of killed processes that are still there answer at all."""
_GONE_S = 8.0
"""How long to wait for killed processes to go: Ray gives one that does not answer 5 s, then it sends SIGKILL."""


class Gone:
    """Looks after killed processes; each is told of by {rank, node, host, address, port, worker, pid}.

    Attributes:
        cut_off: nodes that did not answer when they were asked.
    """

    def __init__(self) -> None:
        self.cut_off: set[str] = set()

    def ask(self, where: Iterable[dict[str, Any]]) -> None:
        """Ask these processes' nodes whether they are there."""
        self.cut_off |= cut_off((w["node"], w["address"], w["port"]) for w in where)

    def awaited(self, killed: list[dict[str, Any]]) -> list[str]:
        """Wait until Ray says of every process that it is dead, or of its node; what it does not say that of."""
        alive = [where for where in killed if "worker" in where]
        began, asked = time.monotonic(), False
        told: tuple[set[str], set[str]] | None = None
        while alive:
            told = within(HEAD_S, _tables)
            if told is None:
                break
            there, up = told
            alive = [w for w in alive if w["worker"] in there and w["node"] in up]
            waited = time.monotonic() - began
            if waited > _POLITE_S and not asked:  # Ray takes up to a minute to miss a node
                self.ask(alive)
                asked = True
            if waited > _GONE_S or all(w["node"] in self.cut_off for w in alive):
                break
            time.sleep(_POLL_S)
        return [self._still_there(where, told is not None) for where in alive]

    def _still_there(self, where: dict[str, Any], told: bool) -> str:
        who = f"rank {where['rank']} (process {where['pid']} on {where['host']}, {where['address']})"
        if where["node"] in self.cut_off:
            return f"{who} was killed, but its node does not answer: whether it is gone is not known"
        if not told:
            return f"{who} was killed, but Ray's head does not answer: whether it is gone is not known"
        return f"{who} is still there {_GONE_S:g} s after it was killed"


def _tables() -> tuple[set[str], set[str]]:
    """Ids of the processes and of the nodes that Ray knows to be alive."""
    return set(_workers()), {n["NodeID"] for n in nodes() if n["Alive"]}
