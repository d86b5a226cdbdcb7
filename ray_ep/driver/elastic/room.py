"""How many more ranks the cluster has room for, node by node: heard beside the steps. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future

from ray_ep.config.schema import Config
from ray_ep.driver.rebalance.rebalancer import beside
from ray_ep.errors import ClusterError

EVERY_S = 5.0
"""Seconds between two questions: what ranks take or give back shows within one or two."""


def check_growth(cfg: Config, local: bool, cpus: float) -> None:
    """Refuse more ranks than a local Ray, which does not grow, will ever have room for; `cpus` are all that it has.

    Raises:
        ClusterError: elastic.max_ranks is more.
    """
    most, each = cfg.elastic.max_ranks, cfg.cluster.cpus_per_rank
    if local and most * each > cpus:
        raise ClusterError(
            f"elastic.max_ranks={most} of {each:g} CPUs need {most * each:g} CPUs; this machine has {cpus:g}, and a "
            f"local Ray does not grow: allowed is up to {int(cpus / each + 1e-6)}"
        )


class Room:
    """What the cluster has free, as last heard: Ray does not answer while its head is away, so nobody waits for it.

    Args:
        ask: how many more ranks each node has room for; may take long, or raise.
    """

    def __init__(
        self,
        ask: Callable[[], Mapping[str, int]],
        clock: Callable[[], float] = time.monotonic,
        background: Callable[[Callable[[], Mapping[str, int]]], Future[Mapping[str, int]]] = beside,
    ):
        self._ask, self._clock, self._background = ask, clock, background
        self._asking: Future[Mapping[str, int]] | None = None
        self._heard: Mapping[str, int] | None = None
        self._next = clock()

    def __call__(self, avoid: Collection[str] = ()) -> dict[str, int] | None:
        """How many more ranks each node but those has room for; nodes without any are left out. None: not known."""
        if self._asking is not None and self._asking.done():
            self._heard = None if self._asking.exception() else self._asking.result()
            self._asking = None
        if self._asking is None and self._clock() >= self._next:
            self._next = self._clock() + EVERY_S
            self._asking = self._background(self._ask)
        if self._heard is None:
            return None
        return {node: count for node, count in self._heard.items() if count > 0 and node not in avoid}

    def forget(self) -> None:
        """What was heard does not hold: ranks have come, gone or been asked for."""
        self._heard = self._asking = None
        self._next = self._clock() + EVERY_S
