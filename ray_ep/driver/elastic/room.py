"""How many more ranks the cluster has room for, node by node: asked of Ray beside the steps. Imports Ray and config."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future

from ray._private.state import state

from ray_ep.config.schema import Config
from ray_ep.driver.rebalance.rebalancer import beside
from ray_ep.errors import ClusterError

EVERY_S = 5.0
"""Seconds between two questions: what ranks take or give back shows within one or two."""

Resources = Mapping[str, float]


def room_by_node(available: Mapping[str, Resources], bundle: Resources, avoid: Collection[str] = ()) -> dict[str, int]:
    """How many bundles fit into what each node has free; nodes without room for one are left out.

    Args:
        available: free resources by node. bundle: of one rank. avoid: nodes that are no use.
    """
    found = {
        node: min(int(free.get(name, 0.0) / need + 1e-6) for name, need in bundle.items())
        for node, free in available.items()
        if node not in avoid
    }
    return {node: count for node, count in found.items() if count}


def bundle_of(cfg: Config, cuda: bool) -> dict[str, float]:
    """What one rank takes."""
    return {"CPU": float(cfg.cluster.cpus_per_rank)} | ({"GPU": 1.0} if cuda else {})


def check_growth(cfg: Config, local: bool, cpus: float) -> None:
    """Refuse more ranks than a local Ray, which cannot grow, will ever have room for; `cpus` are all that it has.

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
        bundle: of one rank.
        ask: free resources by node; may take long, or raise.
    """

    def __init__(
        self,
        bundle: Resources,
        ask: Callable[[], Mapping[str, Resources]] = state.available_resources_per_node,
        clock: Callable[[], float] = time.monotonic,
        background: Callable[[Callable[[], Mapping[str, Resources]]], Future[Mapping[str, Resources]]] = beside,
    ):
        self._bundle, self._ask, self._clock, self._background = bundle, ask, clock, background
        self._asking: Future[Mapping[str, Resources]] | None = None
        self._heard: Mapping[str, Resources] | None = None
        self._next = 0.0

    def __call__(self, avoid: Collection[str] = ()) -> dict[str, int] | None:
        """How many more ranks each node has room for; None: not known."""
        if self._asking is not None and self._asking.done():
            self._heard = None if self._asking.exception() else self._asking.result()
            self._asking = None
        if self._asking is None and self._clock() >= self._next:
            self._next = self._clock() + EVERY_S
            self._asking = self._background(self._ask)
        return None if self._heard is None else room_by_node(self._heard, self._bundle, avoid)

    def forget(self) -> None:
        """What was heard does not hold: ranks have come, gone or been asked for."""
        self._heard = self._asking = None
        self._next = self._clock() + EVERY_S
