"""Which ranks are near each other by the measurements, and where that contradicts what is said. Pure NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ray_ep.placement.topology import Topology

MESSAGE = 1 << 20
"""Bytes by whose time two ranks are near or far: latency and bandwidth in one figure, at a size that exchanges have."""


def find_groups(topology: Topology, gap: float = 2.0) -> Topology:
    """The topology with `groups`: ranks joined by links that are fast beside the others.

    Single linkage: the spanning tree of the fastest links is cut at the widest step between the times of its
    sorted links, where that step is at least a factor of `gap`. Without such a step all links are alike: one group,
    or the said nodes where no two ranks share one, for then nothing says that the links are fast.
    """
    far = distances(topology)
    tree = _spanning_tree(far)
    times = np.sort([far[a, b] for a, b in tree])
    steps = times[1:] / times[:-1]
    if len(steps) and steps.max() >= gap:
        limit = times[int(steps.argmax())]
        groups = _joined(topology.num_ranks, [(a, b) for a, b in tree if far[a, b] <= limit])
    elif len(set(topology.node_of.tolist())) == topology.num_ranks:
        groups = _numbered(topology.node_of)
    else:
        groups = np.zeros(topology.num_ranks, np.int64)
    return replace(topology, groups=groups)


def distances(topology: Topology) -> npt.NDArray[np.float64]:
    """[R, R] seconds of a MESSAGE in the slower of the two directions."""
    one_way = np.maximum(topology.latency + MESSAGE / topology.bandwidth, 1e-12)
    return np.maximum(one_way, one_way.T)


def _spanning_tree(far: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """Prim's algorithm: the R - 1 shortest links that join all ranks."""
    near, parent = far[0].copy(), np.zeros(len(far), np.int64)
    near[0] = np.inf
    tree = []
    for _ in range(len(far) - 1):
        b = int(near.argmin())
        tree.append((int(parent[b]), b))
        closer = (far[b] < near) & np.isfinite(near)
        near[closer], parent[closer] = far[b][closer], b
        near[b] = np.inf
    return tree


def _joined(count: int, links: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    label = np.arange(count)
    for a, b in links:
        label[label == label[b]] = label[a]
    return _numbered(label)


def _numbered(label: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Labels as 0, 1, ... in order of their first rank."""
    order = list(dict.fromkeys(label.tolist()))
    return np.array([order.index(x) for x in label.tolist()], np.int64)
