"""Clusters to be simulated: an even one told by its link classes, or one that was measured or described rank by rank.

Pure NumPy. R ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.topology import Topology

MOST_RANKS = 4096
"""The prediction holds tables of R x R links."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster described by its link classes.

    Args:
        nodes: number of nodes; ranks_per_node: ranks of each.
        slots_per_rank: slots of a rank and layer; None: just enough for every expert.
        inside, across: bytes/s between two ranks of a node, and of different nodes.
        latency_inside, latency_across: seconds.
        speeds: relative speed of each kind of rank, in turn over the ranks; (1.0,) is an even cluster.
        lanes: as of `Topology`, of every node; None: all ranks.

    Raises:
        PlacementError: numbers that are not positive, fewer than one lane, more than 4,096 ranks.
    """

    nodes: int
    ranks_per_node: int
    slots_per_rank: int | None = None
    inside: float = 450e9
    across: float = 50e9
    latency_inside: float = 3e-6
    latency_across: float = 1e-5
    speeds: tuple[float, ...] = (1.0,)
    lanes: float | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node", "inside", "across"):
            value = getattr(self, name)
            if not value > 0:
                raise PlacementError(f"cluster: {name}={value}: expected a positive number")
        for name in ("latency_inside", "latency_across"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise PlacementError(f"cluster: {name}={value}: expected a finite number, not negative")
        if not self.speeds or not all(np.isfinite(s) and s > 0 for s in self.speeds):
            raise PlacementError(f"cluster: speeds={self.speeds}: expected finite positive numbers")
        if self.ranks > MOST_RANKS:
            raise PlacementError(f"cluster: {self.ranks} ranks: at most {MOST_RANKS} can be simulated")

    @property
    def ranks(self) -> int:
        """R."""
        return self.nodes * self.ranks_per_node

    def topology(self) -> Topology:
        """Its links, as if measured."""
        node_of = np.repeat(np.arange(self.nodes), self.ranks_per_node)
        near = node_of[:, None] == node_of
        latency = np.where(near, self.latency_inside, self.latency_across)
        np.fill_diagonal(latency, 0.0)
        lanes = None if self.lanes is None else np.full(self.ranks, self.lanes)
        return Topology(np.where(near, self.inside, self.across), latency, node_of, lanes=lanes)

    def speed(self) -> tuple[float, ...]:
        """[R] relative speed of each rank."""
        return tuple(itertools.islice(itertools.cycle(self.speeds), self.ranks))


@dataclass(frozen=True, slots=True)
class Given:
    """A cluster that was measured, or described rank by rank.

    Args:
        links: of its R ranks. speeds: [R] relative compute speed; None: all alike.
        slots_per_rank: as of `Cluster`.

    Raises:
        PlacementError: speeds of another number of ranks, more than 4,096 ranks.
    """

    links: Topology
    speeds: tuple[float, ...] | None = None
    slots_per_rank: int | None = None

    def __post_init__(self) -> None:
        if self.speeds is not None and len(self.speeds) != self.ranks:
            raise PlacementError(f"cluster: {len(self.speeds)} speeds for {self.ranks} ranks")
        if self.ranks > MOST_RANKS:
            raise PlacementError(f"cluster: {self.ranks} ranks: at most {MOST_RANKS} can be simulated")

    @property
    def ranks(self) -> int:
        """R."""
        return self.links.num_ranks

    @property
    def nodes(self) -> int:
        """How many nodes hold its ranks."""
        return len(np.unique(self.links.node_of))

    def topology(self) -> Topology:
        """Its links."""
        return self.links

    def speed(self) -> tuple[float, ...]:
        """[R] relative speed of each rank."""
        return (1.0,) * self.ranks if self.speeds is None else self.speeds

    def even(self) -> Cluster:
        """A cluster of other sizes can be made of: as many nodes with as many ranks as its largest, all links of a kind

        with the median of the measured ones, the speeds of its ranks in turn. What was not measured is as in `Cluster`.
        """
        node_of = self.links.node_of
        per_node = int(np.unique(node_of, return_counts=True)[1].max())
        near = node_of[:, None] == node_of
        off = ~np.eye(self.ranks, dtype=bool)
        found: dict[str, float] = {}
        for kind, members in (("inside", near & off), ("across", ~near)):
            known = members & np.isfinite(self.links.bandwidth)
            if known.any():
                found[kind] = float(np.median(self.links.bandwidth[known]))
                found[f"latency_{kind}"] = float(np.median(self.links.latency[known]))
        lanes = None if self.links.lanes is None else float(np.median(self.links.lanes))
        return Cluster(
            self.nodes, per_node, self.slots_per_rank, **found, speeds=_shortest(self.speed()), lanes=lanes
        )  # fmt: skip


def _shortest(speeds: tuple[float, ...]) -> tuple[float, ...]:
    """(1.0,) of ones, else the speeds as they are: they are given out in turn."""
    return (speeds[0],) if len(set(speeds)) == 1 else speeds
