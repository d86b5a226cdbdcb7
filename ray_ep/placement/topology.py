"""The interconnect of the ranks: who shares a node, how fast each link is. Pure NumPy."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError


@dataclass(frozen=True, eq=False)
class Topology:
    """Links between ranks.

    Args:
        bandwidth: [R, R] bytes/s from a rank (row) to another (column), diagonal ignored; inf where not measured.
        latency: [R, R] seconds.
        node_of: [R] number of the node that holds each rank.

    Raises:
        PlacementError: shapes that do not agree, NaN, zero or negative bandwidth, negative latency.
    """

    bandwidth: npt.NDArray[np.float64]
    latency: npt.NDArray[np.float64]
    node_of: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, kind in (("bandwidth", np.float64), ("latency", np.float64), ("node_of", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), kind))
        n = len(self.node_of)
        if self.node_of.ndim != 1 or self.bandwidth.shape != (n, n) or self.latency.shape != (n, n):
            raise PlacementError(
                f"topology: bandwidth {self.bandwidth.shape} and latency {self.latency.shape} do not fit {n} ranks"
            )
        off = ~np.eye(n, dtype=bool)
        if not (self.bandwidth[off] > 0).all() or not (self.latency >= 0).all():
            raise PlacementError("topology: bandwidth must be positive and latency not negative, in every entry")

    @property
    def num_ranks(self) -> int:
        """R, ranks."""
        return len(self.node_of)

    @staticmethod
    def of_nodes(node_of: list[int]) -> Topology:
        """Nodes known, links not measured (infinite bandwidth, no latency)."""
        n = len(node_of)
        return Topology(np.full((n, n), np.inf), np.zeros((n, n)), np.asarray(node_of, np.int64))

    def to_json(self) -> str:
        """One JSON document; links that were not measured are null."""
        bandwidth = [[float(b) if np.isfinite(b) else None for b in row] for row in self.bandwidth]
        return json.dumps(
            {"node_of": self.node_of.tolist(), "bandwidth": bandwidth, "latency": self.latency.tolist()}, indent=1
        )

    @staticmethod
    def from_json(text: str, where: str = "topology") -> Topology:
        """Parse `to_json`; raises PlacementError naming `where`."""
        try:
            tree = json.loads(text)
            rows = [[np.inf if b is None else float(b) for b in row] for row in tree["bandwidth"]]
            return Topology(np.asarray(rows), np.asarray(tree["latency"]), np.asarray(tree["node_of"]))
        except (ValueError, KeyError, TypeError) as e:
            raise PlacementError(f"{where}: not a topology: {e!r}") from None
