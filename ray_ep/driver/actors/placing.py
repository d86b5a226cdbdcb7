"""Room for ranks on a cluster: a Ray placement group of one bundle for each, so that one is added or given up alone.

Ray cannot resize a group. Starts no actor. Imports Ray and config.

Uses private functions of Ray, what is free by node and which nodes drain: pyproject pins the version range.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import ray
from ray._private.state import state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.blocks import choose, next_block, room_of
from ray_ep.driver.actors.heartbeat import LOOK_S
from ray_ep.errors import ClusterError

nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
resources: Callable[[], dict[str, float]] = ray.cluster_resources
_available: Callable[[], dict[str, float]] = ray.available_resources
_free_by_node: Callable[[], dict[str, dict[str, float]]] = state.available_resources_per_node
_draining: Callable[[], dict[str, int]] = state.get_draining_nodes

NODE = "ray.io/node-id"
"""The label that every node has: its id."""

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


@dataclass(frozen=True, slots=True)
class _Asked:
    """Room that was asked for: what Ray has ready once it is there, and the block that it must be in, if any."""

    ready: Any
    block: str


class Places:
    """Takes room for the ranks of one run.

    Args:
        cuda: each rank needs a GPU, too.
        interrupted: asked every moment of every wait; whether to leave it. May raise KeyboardInterrupt.

    Attributes:
        avoided: nodes on which no more room is asked for.
    """

    def __init__(self, cfg: ClusterConfig, name: str, cuda: bool, interrupted: Callable[[], bool]):
        self.cfg, self.name, self.cuda, self._interrupted = cfg, name, cuda, interrupted
        self._bundle = {"CPU": float(cfg.cpus_per_rank)} | ({"GPU": 1.0} if cuda else {})
        self._made = 0  # a group's name is never used twice
        self._asked: dict[PlacementGroup, _Asked] = {}
        self._held: dict[PlacementGroup, str] = {}  # node of each place
        self.avoided: frozenset[str] = frozenset()

    def take(self, ranks: int) -> list[Place]:
        """Room for so many ranks on few nodes, by host; all of them or none. With cluster.block_label in few blocks.

        Whoever says where (`choose`, or a group of all bundles, which Ray packs), groups of one take the places.

        Raises:
            ClusterError: there was no room within cluster.wait_s, or no node has the label; nothing is held.
        """
        limit = time.monotonic() + self.cfg.wait_s
        while True:
            where = self._in_blocks(ranks) if self.cfg.block_label else self._packed(ranks, limit)
            if where and (places := self._pinned(where, min(limit, time.monotonic() + _PINNED_S))):
                self._held |= {place.group: place.node for place in places}
                return sorted(places, key=_by_host)
            if time.monotonic() > limit:  # somebody else was faster, each time
                raise self._no_room(ranks)
            if not where:
                self._packed(ranks, limit)  # until there is room

    def room(self) -> dict[str, int]:
        """How many ranks more each node has room for now; those that drain or are avoided are left out."""
        leaving, there = self.avoided | set(_draining()), [n for n in nodes() if n["Alive"]]
        whole = room_of({n["NodeID"]: n["Resources"] for n in there if n["NodeID"] not in leaving}, self._bundle)
        free, held = room_of(_free_by_node(), self._bundle), Counter(self._held.values())
        # What was taken a moment ago may not be in Ray's figures yet.
        return {node: max(min(free.get(node, 0), count - held[node]), 0) for node, count in whole.items()}

    def ask(self) -> PlacementGroup:
        """Ask for room for one more rank, on any node that does not drain: a pending group, which an autoscaler serves.

        Returns at once: `have` tells when the room is there, `withdraw` gives it up. With cluster.block_label in a
        block that has room now, best in one with ranks of this run, else on any node that may come.
        """
        block = self._next_block() if self.cfg.block_label else ""
        group = self._group(self._elsewhere() | ({self.cfg.block_label: block} if block else {}))
        self._asked[group] = _Asked(group.ready(), block)
        return group

    def have(self, group: PlacementGroup) -> Place | None:
        """The room that was asked for, once; None: not yet. Ray's head is asked only when there is some."""
        if not ray.wait([self._asked[group].ready], timeout=0)[0]:
            return None
        told = placement_group_table(group)
        if told["state"] != "CREATED":  # its node has died since: Ray looks for another
            return None
        del self._asked[group]
        (self._held[group],) = told["bundles_to_node_id"].values()
        return _place(group, self._held[group])

    def withdraw(self, group: PlacementGroup) -> None:
        """What was asked for is not needed any more."""
        self._asked.pop(group, None)
        self._held.pop(group, None)
        remove_placement_group(group)

    def give_up(self, place: Place) -> None:
        """Give one rank's room back; Ray kills an actor that is still in it."""
        self.withdraw(place.group)

    def _packed(self, ranks: int, limit: float) -> list[str]:
        """Where Ray packs a group of all ranks once there is room for all; nothing is held.

        Raises:
            ClusterError: not before the limit.
        """
        selector = self._elsewhere()
        labels = [selector] * ranks if selector else None
        packed = placement_group([self._bundle] * ranks, "PACK", self.name, bundle_label_selector=labels)
        try:
            if not self._ready([packed], limit):
                raise self._no_room(ranks)
            where = list(placement_group_table(packed)["bundles_to_node_id"].values())
        finally:
            remove_placement_group(packed)
        time.sleep(_RETURNED_S)
        return where

    def _in_blocks(self, ranks: int) -> list[str]:
        """A node for each rank in as few blocks as hold them now; [] if they do not."""
        return choose(self.room(), self._block_of(), ranks)

    def _next_block(self) -> str:
        """The block that has room for one more; "": none has."""
        room, block_of = self.room(), self._block_of()
        used = Counter(block_of.get(node, "") for node in self._held.values())
        coming = Counter(asked.block for asked in self._asked.values())
        for node, holds in room.items():  # what is asked for may not be in Ray's figures yet
            taken = min(holds, coming[block_of.get(node, "")])
            room[node] -= taken
            coming[block_of.get(node, "")] -= taken
        return next_block(room, block_of, used)

    def _block_of(self) -> dict[str, str]:
        """The value of cluster.block_label of each node that has one. Raises ClusterError: none has."""
        label, there = self.cfg.block_label, [n for n in nodes() if n["Alive"]]
        block_of = {n["NodeID"]: n["Labels"][label] for n in there if n["Labels"].get(label)}
        if not block_of:
            others = ", ".join(sorted({key for n in there for key in n["Labels"]}))
            raise ClusterError(
                f"cluster.block_label={label!r}: no node has this label; labels that nodes have: {others}; "
                f"`ray start --labels={label}=NAME` gives one"
            )
        return block_of

    def _elsewhere(self) -> dict[str, str]:
        """The selector of nodes that may be used: none that drains, is avoided or, if blocks are wanted, is in none."""
        not_these = self.avoided | set(_draining())
        if self.cfg.block_label:
            not_these |= {n["NodeID"] for n in nodes() if n["Alive"]} - self._block_of().keys()
        return {NODE: f"!in({','.join(sorted(not_these))})"} if not_these else {}

    def _pinned(self, where: list[str], limit: float) -> list[Place]:
        """A group of one bundle on each of these nodes; [] if not all can be had."""
        groups: list[PlacementGroup] = []
        try:
            groups += [self._group({NODE: node}) for node in where]
            if self._ready(groups, limit):
                return [_place(group, node) for group, node in zip(groups, where, strict=True)]
        except BaseException:
            for group in groups:
                remove_placement_group(group)
            raise
        for group in groups:
            remove_placement_group(group)
        return []

    def _group(self, selector: dict[str, str]) -> PlacementGroup:
        """A group for one rank, on a node whose labels fit."""
        self._made += 1
        name, labels = f"{self.name}-place-{self._made}", [selector] if selector else None
        made: PlacementGroup = placement_group([self._bundle], name=name, bundle_label_selector=labels)
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
        each += f", on nodes with the label {self.cfg.block_label}," if self.cfg.block_label else ""
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
