"""The interconnect of the ranks: who shares a node, how fast each link is. Pure NumPy."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
        joined: [R, R] kind of link between two ranks' GPUs as their driver says, a number of gpu_links.KINDS (0: not
            known); None: there is none that says.
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
        off = ~np.eye(n, dtype=bool)
        if not (self.bandwidth[off] > 0).all() or not ((self.latency >= 0) & np.isfinite(self.latency)).all():
            raise PlacementError(
                "topology: bandwidth must be positive, latency not negative and finite, in every entry"
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
        except (ValueError, KeyError, TypeError, OverflowError) as e:
            raise PlacementError(f"{where}: not a topology: {e!r}") from None
