"""A topology's links as rows of a table: each of its own among few ranks, classes of them among many. Pure NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_ep.placement.links.groups import in_words
from ray_ep.placement.topology import Topology

EACH = 8
"""Ranks. Up to this many each link has a row; 9 ranks would have 72."""
SLOWER = 2.0
"""Factor. A link this many times slower than its class has a row of its own, below the classes."""
NAMED = 8
"""Links. At most this many slow ones are named, slowest first."""


@dataclass(frozen=True, slots=True)
class LinkRow:
    """One link in one direction, or a class of links.

    Args:
        name: for people. links: how many are in it. measured: how many of them were timed themselves.
        bandwidth: bytes/s, median. lowest, highest: of the links.
        latency: seconds, median. spread: how much the times of a link vary, median; None: not measured.
    """

    name: str
    links: int
    measured: int
    bandwidth: float
    lowest: float
    highest: float
    latency: float
    spread: float | None

    def cells(self) -> tuple[str, ...]:
        """As text: name, links, bandwidth, its range, latency, spread."""
        span = "" if self.links == 1 else f"{in_words(self.lowest)} to {in_words(self.highest)}"
        spread = "" if self.spread is None else f"{self.spread:.0%}"
        us = 1e6 * self.latency
        latency = f"{us:.3g} us" if us < 999.5 else f"{us:,.0f} us"
        return self.name, str(self.links), in_words(self.bandwidth), span, latency, spread


HEAD = ("link", "links", "bandwidth", "range", "latency", "spread")
"""Names of `LinkRow.cells`."""


def link_rows(topology: Topology) -> list[LinkRow]:
    """Rows of the links that are known; none where nothing was measured.

    Up to EACH ranks one row a link. Beyond: the links inside nodes, those between nodes, and each link that is SLOWER
    times slower than the median of its class, at most NAMED of them.
    """
    n = topology.num_ranks
    known = np.isfinite(topology.bandwidth) & ~np.eye(n, dtype=bool)
    if n <= EACH:
        return [_row(_name(topology, a, b), topology, _only(n, a, b)) for a, b in np.argwhere(known).tolist()]
    near = topology.node_of[:, None] == topology.node_of[None]
    rows, slow = [], []
    for name, members in (("inside nodes", known & near), ("between nodes", known & ~near)):
        if not members.any():
            continue
        row = _row(name, topology, members)
        rows.append(row)
        bad = members & (topology.bandwidth * SLOWER <= row.bandwidth)
        slow += [(float(topology.bandwidth[a, b] / row.bandwidth), a, b) for a, b in np.argwhere(bad).tolist()]
    return rows + [_row(_name(topology, a, b), topology, _only(n, a, b)) for _, a, b in sorted(slow)[:NAMED]]


def _name(topology: Topology, a: int, b: int) -> str:
    x, y = int(topology.node_of[a]), int(topology.node_of[b])
    return f"rank {a} to {b}, " + (f"in node {x}" if x == y else f"node {x} to {y}")


def _only(n: int, a: int, b: int) -> npt.NDArray[np.bool_]:
    one = np.zeros((n, n), bool)
    one[a, b] = True
    return one


def _row(name: str, topology: Topology, members: npt.NDArray[np.bool_]) -> LinkRow:
    """The links of `members` [R, R], at least one."""
    bandwidth = topology.bandwidth[members]
    spread = None if topology.spread is None else float(np.median(topology.spread[members]))
    measured = 0 if topology.measured is None else int(topology.measured[members].sum())
    return LinkRow(
        name,
        int(members.sum()),
        measured,
        float(np.median(bandwidth)),
        float(bandwidth.min()),
        float(bandwidth.max()),
        float(np.median(topology.latency[members])),
        spread,
    )


def shared_cards(topology: Topology) -> list[str]:
    """A sentence for each node whose ranks slow each other down when they send to other nodes."""
    if topology.lanes is None:
        return []
    found = []
    for node in np.unique(topology.node_of):
        ranks, lanes = int((topology.node_of == node).sum()), float(topology.lanes[topology.node_of == node][0])
        if lanes < ranks:
            found.append(
                f"node {node}: {ranks} ranks share the network: together they send as fast as {lanes:.2g} alone"
            )
    return found
