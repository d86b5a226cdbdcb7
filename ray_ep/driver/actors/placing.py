"""Room for ranks on a cluster: a Ray placement group of one bundle for each, so that one is added or given up alone.

Ray cannot resize a group. Starts no actor. Imports Ray and config.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.heartbeat import LOOK_S
from ray_ep.errors import ClusterError

nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
resources: Callable[[], dict[str, float]] = ray.cluster_resources
_available: Callable[[], dict[str, float]] = ray.available_resources

_RETURNED_S = 0.1
"""Until what a removed group held can be had again: a group that asks earlier waits for Ray's next try, up to 1 s."""
_PINNED_S = 5.0
"""How long groups may wait for room that was theirs a moment ago: after that somebody else has taken it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Room for one rank: its placement group, and the node that it is on, by Ray's id, name and address."""

    group: PlacementGroup
    node: str
    host: str
    address: str
    port: int  # of the node's raylet


class Places:
    """Takes room for the ranks of one run.

    Args:
        cuda: each rank needs a GPU, too.
        interrupted: asked every moment of every wait; whether to leave it. May raise KeyboardInterrupt.
    """

    def __init__(self, cfg: ClusterConfig, name: str, cuda: bool, interrupted: Callable[[], bool]):
        self.cfg, self.name, self.cuda, self._interrupted = cfg, name, cuda, interrupted
        self._bundle = {"CPU": float(cfg.cpus_per_rank)} | ({"GPU": 1.0} if cuda else {})
        self._made = 0  # a group's name is never used twice

    def take(self, ranks: int) -> list[Place]:
        """Room for so many ranks on as few nodes as Ray packs them on, by host; all of them or none.

        One group of all bundles waits until there is room for all, and says where; groups of one take its place.

        Raises:
            ClusterError: there was no room within cluster.wait_s; nothing is held.
        """
        limit = time.monotonic() + self.cfg.wait_s
        while True:
            packed = placement_group([self._bundle] * ranks, strategy="PACK", name=self.name)
            try:
                if not self._ready([packed], limit):
                    raise self._no_room(ranks)
                packing = list(placement_group_table(packed)["bundles_to_node_id"].values())
            finally:
                remove_placement_group(packed)
            time.sleep(_RETURNED_S)
            if places := self._pinned(packing, min(limit, time.monotonic() + _PINNED_S)):
                return sorted(places, key=_by_host)
            if time.monotonic() > limit:  # somebody else was faster, each time
                raise self._no_room(ranks)

    def add(self) -> Place:
        """Room for one more rank, wherever it is.

        Raises:
            ClusterError: there was none within cluster.wait_s; nothing is held.
        """
        group = self._group()
        try:
            if not self._ready([group], time.monotonic() + self.cfg.wait_s):
                raise self._no_room(1)
            (node,) = placement_group_table(group)["bundles_to_node_id"].values()
            return _place(group, node)
        except BaseException:
            remove_placement_group(group)
            raise

    def give_up(self, place: Place) -> None:
        """Give one rank's room back; Ray kills an actor that is still in it."""
        remove_placement_group(place.group)

    def _pinned(self, where: list[str], limit: float) -> list[Place]:
        """A group of one bundle on each of these nodes; [] if not all can be had."""
        groups: list[PlacementGroup] = []
        try:
            groups += [self._group(node) for node in where]
            if self._ready(groups, limit):
                return [_place(group, node) for group, node in zip(groups, where, strict=True)]
        except BaseException:
            for group in groups:
                remove_placement_group(group)
            raise
        for group in groups:
            remove_placement_group(group)
        return []

    def _group(self, node: str = "") -> PlacementGroup:
        self._made += 1
        pin = [{"ray.io/node-id": node}] if node else None
        name = f"{self.name}-place-{self._made}"
        made: PlacementGroup = placement_group([self._bundle], name=name, bundle_label_selector=pin)
        return made

    def _ready(self, groups: list[PlacementGroup], limit: float) -> bool:
        """Whether all groups have their room before the limit."""
        waiting = [group.ready() for group in groups]
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)
            if waiting and self._interrupted():
                raise KeyboardInterrupt
            if waiting and time.monotonic() > limit:
                return False
        return True

    def _no_room(self, ranks: int) -> ClusterError:
        each = f"{self.cfg.cpus_per_rank:g} CPUs{' and a GPU' if self.cuda else ''}"
        return ClusterError(
            f"the cluster could not place {ranks} ranks of {each} within cluster.wait_s={self.cfg.wait_s:g} s; it has "
            f"{_have()}, free now: {_free()}"
        )


def check_cpus(cfg: ClusterConfig, local: bool) -> None:
    """Refuse at once what no waiting can give: more CPUs than a local Ray has. Raises ClusterError."""
    need, have = cfg.ranks * cfg.cpus_per_rank, resources().get("CPU", 0.0)
    if need > have and local:  # a cluster that was joined may grow: there the placement waits
        raise ClusterError(
            f"cluster.ranks={cfg.ranks} of {cfg.cpus_per_rank:g} CPUs need {need:g} CPUs; this machine has {have:g}: "
            "lower cluster.ranks or cluster.cpus_per_rank (fractions such as 0.5 are allowed)"
        )


def check_growth(cfg: ClusterConfig, most: int, local: bool) -> None:
    """Refuse at once more ranks than a local Ray, which does not grow, ever has room for. Raises ClusterError.

    Args:
        most: elastic.max_ranks.
    """
    need, have = most * cfg.cpus_per_rank, resources().get("CPU", 0.0)
    if need > have and local:
        raise ClusterError(
            f"elastic.max_ranks={most} of {cfg.cpus_per_rank:g} CPUs need {need:g} CPUs; this machine has {have:g}, "
            f"and a local Ray does not grow: allowed is up to {int(have / cfg.cpus_per_rank + 1e-6)}"
        )


def _place(group: PlacementGroup, node: str) -> Place:
    found = next(n for n in nodes() if n["NodeID"] == node)
    return Place(group, node, found["NodeManagerHostname"], found["NodeManagerAddress"], found["NodeManagerPort"])


def _by_host(place: Place) -> tuple[int, str, str]:
    """Places in the order of their nodes' addresses: Ray's own differs from run to run.

    So a placement or a topology of one run fits the next one on the same hosts.
    """
    try:
        return int(ip_address(place.address)), "", place.node
    except ValueError:  # a name
        return 0, place.address, place.node


def _have() -> str:
    cpus = [n["Resources"].get("CPU", 0.0) for n in nodes() if n["Alive"]]
    gpus = sum(n["Resources"].get("GPU", 0.0) for n in nodes() if n["Alive"])
    return f"{len(cpus)} node(s) with {' + '.join(f'{c:g}' for c in cpus)} CPUs and {gpus:g} GPUs"


def _free() -> str:
    return ", ".join(f"{k} {v:g}" for k, v in sorted(_available().items()) if k in ("CPU", "GPU")) or "nothing"
