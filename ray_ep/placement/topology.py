"""The interconnect of the ranks: who shares a node, how fast each link is. Pure NumPy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError


@dataclass(frozen=True, eq=False)
class Topology:
    """Links between ranks.

    Args:
        bandwidth: [R, R] bytes/s from a rank (row) to another (column), diagonal ignored; inf where not measured.
        latency: [R, R] seconds.
        node_of: [R] number of the node that holds each rank, as Ray says it.
        spread: [R, R] how much the times of a link vary, relative to their median; None where nothing was measured.
        measured: [R, R] bool, links that were timed themselves; the others have the values of their pair of nodes.
        groups: [R] number of the group of ranks joined by fast links, by measurement; None: not looked for.
        measured_at: seconds since 1970.
        joined: [R, R] kind of link between two ranks' GPUs as their driver says, a number of gpu_links.LINK_KINDS (0:
            not known); None: there is none that says.
        lanes: [R] how many of its ranks the node of each rank can have send to other nodes at once, each as fast as it
            is alone; fewer than they are where they share a network card. None: all of them.

    Raises:
        PlacementError: shapes that do not agree, NaN, zero or negative bandwidth, negative or infinite latency,
            negative spread, fewer than one lane.
    """

    bandwidth: npt.NDArray[np.float64]
    latency: npt.NDArray[np.float64]
    node_of: npt.NDArray[np.int64]
    spread: npt.NDArray[np.float64] | None = None
    measured: npt.NDArray[np.bool_] | None = None
    groups: npt.NDArray[np.int64] | None = None
    measured_at: float | None = None
    joined: npt.NDArray[np.int64] | None = None
    lanes: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("bandwidth", np.float64), ("latency", np.float64), ("node_of", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), kind))
        n = len(self.node_of)
        if self.node_of.ndim != 1 or self.bandwidth.shape != (n, n) or self.latency.shape != (n, n):
            raise PlacementError(
                f"topology: bandwidth {self.bandwidth.shape} and latency {self.latency.shape} do not fit {n} ranks"
            )
        good = (self.bandwidth > 0) | np.eye(n, dtype=bool)
        good &= (self.latency >= 0) & np.isfinite(self.latency)
        if not good.all():
            a, b = np.argwhere(~good)[0]
            raise PlacementError(
                "topology: bandwidth must be positive, latency not negative and finite, in every entry; from rank "
                f"{a} to rank {b} they are {self.bandwidth[a, b]:g} bytes/s and {self.latency[a, b]:g} s"
            )
        self._check_measurement()

    def _check_measurement(self) -> None:
        n = self.num_ranks
        square = (n, n)
        kinds = (
            ("spread", np.float64, square),
            ("measured", np.bool_, square),
            ("groups", np.int64, (n,)),
            ("joined", np.int64, square),
            ("lanes", np.float64, (n,)),
        )
        for name, kind, shape in kinds:
            if (value := getattr(self, name)) is None:
                continue
            value = np.asarray(value, kind)
            object.__setattr__(self, name, value)
            if value.shape != shape:
                raise PlacementError(f"topology: {name} {value.shape} does not fit {n} ranks, expected {shape}")
        if self.spread is not None and not (self.spread >= 0).all():
            raise PlacementError("topology: spread must not be negative, in every entry")
        if self.lanes is not None and not (self.lanes >= 1).all():
            raise PlacementError("topology: lanes must be at least 1, in every entry")
        if self.measured_at is not None and not np.isfinite(self.measured_at):
            raise PlacementError(f"topology: measured_at is {self.measured_at}, expected seconds since 1970")

    @property
    def num_ranks(self) -> int:
        """R, ranks."""
        return len(self.node_of)

    @staticmethod
    def of_nodes(node_of: list[int]) -> Topology:
        """Nodes known, links not measured (infinite bandwidth, no latency)."""
        n = len(node_of)
        return Topology(np.full((n, n), np.inf), np.zeros((n, n)), np.asarray(node_of, np.int64))

    def among(self, origin: Sequence[int], node_of: Sequence[int]) -> Topology:
        """What is known of the links under another membership.

        Who stays keeps the links between them. Of one that comes it is assumed, until its links are measured, that
        each is as fast as the median of those that join the same kind of ranks (inside a node, or between two); where
        there is none of that kind, as the best of all inside a node and as the worst of all between two. Its node has
        as many lanes as it had, a new node has one; it is in the group of its node's ranks if those are in one, else,
        with the others that come to the node, in a group of its own; how its GPU is joined is not known.

        Args:
            origin: [R'] rank here of each new rank, -1 for one that comes (`Membership.origin`).
            node_of: [R'] node of each.

        Raises:
            PlacementError: a rank that stays twice, is none or has changed its node; a node too many or too few.
        """
        where, nodes = np.asarray(origin, np.int64), np.asarray(node_of, np.int64)
        stay = where[where >= 0]
        if len(set(stay.tolist())) < len(stay) or not (where >= -1).all() or not (where < self.num_ranks).all():
            raise PlacementError(f"origin {list(origin)}: expected ranks 0 to {self.num_ranks - 1}, once each, or -1")
        if nodes.shape != where.shape or (nodes[where >= 0] != self.node_of[stay]).any():
            raise PlacementError(f"node_of {list(node_of)}: expected a node for each of {len(where)} ranks, as before")
        known = (where[:, None] >= 0) & (where[None] >= 0)
        near = nodes[:, None] == nodes[None]
        square = np.ix_(where, where)
        same = self.node_of[:, None] == self.node_of[None]

        def links(values: npt.NDArray[np.float64], best: Any, worst: Any, unknown: float) -> npt.NDArray[np.float64]:
            inside, across = (_median(values, kind) for kind in (same, ~same))
            off = values[~np.eye(self.num_ranks, dtype=bool)]
            least = (best(off), worst(off)) if len(off) else (unknown, unknown)
            assumed = np.where(near, least[0] if inside is None else inside, least[1] if across is None else across)
            return np.where(known, values[square], assumed)

        bandwidth = links(self.bandwidth, np.max, np.min, np.inf)
        latency = links(self.latency, np.min, np.max, 0.0)
        np.fill_diagonal(latency, np.where(where >= 0, self.latency.diagonal()[where], 0.0))
        return replace(
            self,
            bandwidth=bandwidth,
            latency=latency,
            node_of=nodes,
            spread=None if self.spread is None else np.where(known, self.spread[square], self.spread.max()),
            measured=None if self.measured is None else known & self.measured[square],
            groups=None if self.groups is None else _groups(self.groups[where], where, nodes),
            joined=None if self.joined is None else np.where(known, self.joined[square], 0),
            lanes=None if self.lanes is None else _lanes(self.lanes, self.node_of, nodes),
        )

    def by_groups(self) -> Topology | None:
        """Measured links, with the groups that they make in place of what nodes are called; None: not measured."""
        if self.groups is None or not np.isfinite(self.bandwidth).any():
            return None
        return replace(self, node_of=self.groups)

    def seconds(self, source: int, destination: int, size: float) -> float:
        """Time that a message of `size` bytes takes over a link that is otherwise idle."""
        return float(self.latency[source, destination] + size / self.bandwidth[source, destination])

    def to_json(self) -> str:
        """One JSON document; links that were not measured are null, what is not known is left out."""
        tree: dict[str, Any] = {
            "node_of": self.node_of.tolist(),
            "bandwidth": [[float(b) if np.isfinite(b) else None for b in row] for row in self.bandwidth],
            "latency": self.latency.tolist(),
        }
        for name in ("spread", "measured", "groups", "joined", "lanes"):
            if (value := getattr(self, name)) is not None:
                tree[name] = value.tolist()
        if self.measured_at is not None:
            tree["measured_at"] = self.measured_at
        return json.dumps(tree, indent=1)

    @staticmethod
    def from_json(text: str, where: str = "topology") -> Topology:
        """Parse `to_json`; raises PlacementError naming `where`."""
        try:
            tree = json.loads(text)
            rows = [[np.inf if b is None else float(b) for b in row] for row in tree["bandwidth"]]
            known = {k: np.asarray(tree[k]) for k in ("spread", "measured", "groups", "joined", "lanes") if k in tree}
            at = float(tree["measured_at"]) if "measured_at" in tree else None
            return Topology(
                np.asarray(rows), np.asarray(tree["latency"]), np.asarray(tree["node_of"]), measured_at=at, **known
            )
        except PlacementError as e:
            raise PlacementError(f"{where}: {str(e).removeprefix('topology: ')}") from None
        except (ValueError, KeyError, TypeError, OverflowError) as e:
            raise PlacementError(f"{where}: not a topology: {e!r}") from None


def _median(values: npt.NDArray[np.float64], kind: npt.NDArray[np.bool_]) -> float | None:
    """Of the links of a kind, the diagonal left out; None: there is none."""
    chosen = values[kind & ~np.eye(len(values), dtype=bool)]
    return float(np.median(chosen)) if len(chosen) else None


def _groups(
    groups: npt.NDArray[np.int64], where: npt.NDArray[np.int64], nodes: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """[R'] groups with those of ranks that come (`where` is -1); see `Topology.among`."""
    out, fresh = groups.copy(), int(groups.max(initial=-1)) + 1
    for node in dict.fromkeys(nodes[where < 0].tolist()):
        here = set(groups[(nodes == node) & (where >= 0)].tolist())
        out[(nodes == node) & (where < 0)] = here.pop() if len(here) == 1 else fresh
        fresh += 1
    return out


def _lanes(
    lanes: npt.NDArray[np.float64], before: npt.NDArray[np.int64], nodes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """[R'] lanes of each rank's node, by the nodes of before."""
    known = dict(zip(before.tolist(), lanes.tolist(), strict=True))
    return np.array([known.get(node, 1.0) for node in nodes.tolist()])
