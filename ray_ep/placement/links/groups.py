"""Which ranks are near each other by the measurements, and where that contradicts what is said. Pure NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import numpy.typing as npt

from ray_ep.placement.links.gpu_links import LINK_KINDS, NVLINK
from ray_ep.placement.links.probe import Pair
from ray_ep.placement.topology import Topology

MESSAGE = 1 << 20
"""Bytes. The time of such a message says whether two ranks are near: latency and bandwidth in one figure, at a size
that exchanges have."""
FASTER = 1.5
"""Factor. Links inside a node at least this much faster than those across make its ranks one group."""


def groups_of(topology: Topology) -> npt.NDArray[np.int64]:
    """[R] number of each rank's group of fast links, 0 to N - 1: what plans and predictions take for its node.

    The measured groups, or else the nodes by name. Where nothing joins some ranks of several nodes better than the
    others, each rank is a group of its own: one measured group over several nodes, or links inside the nodes that are
    less than `FASTER` times as fast as those across.
    """
    alone = np.arange(topology.num_ranks, dtype=np.int64)
    node_of = _numbered(topology.node_of)
    far = node_of[:, None] != node_of
    if not far.any():
        return node_of if topology.groups is None else _numbered(topology.groups)
    if topology.groups is not None:
        return _numbered(topology.groups) if len(set(topology.groups.tolist())) > 1 else alone
    near = ~far & ~np.eye(topology.num_ranks, dtype=bool)
    if near.any():
        inside, across = np.median(topology.bandwidth[near]), np.median(topology.bandwidth[far])
        if np.isfinite(inside) and inside < FASTER * across:
            return alone
    return node_of


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


def best_of(first: Topology, second: Topology) -> Topology:
    """Of two measurements of the same links the faster of each, in the time of a MESSAGE; groups are looked for anew.

    What disturbs a measurement only adds time: a rank that was kept from its processor has slow links once, not twice.
    """
    better = second.latency + MESSAGE / second.bandwidth < first.latency + MESSAGE / first.bandwidth
    spread, measured = first.spread, first.measured
    if spread is not None and second.spread is not None:
        spread = np.where(better, second.spread, spread)
    if measured is not None and second.measured is not None:
        measured = measured | second.measured
    mixed = replace(
        second,
        bandwidth=np.where(better, second.bandwidth, first.bandwidth),
        latency=np.where(better, second.latency, first.latency),
        spread=spread,
        measured=measured,
    )
    return find_groups(mixed)


def contradictions(topology: Topology, kinds: Mapping[Pair, str] | None = None, factor: float = 4.0) -> list[str]:
    """Where the measured links are not what is said of them, one sentence each; empty: they agree.

    A rank whose best link inside its node is `factor` times slower than the links of the node's other ranks; a pair
    inside a node that is so beside the node's other pairs (or, where it has none, beside other nodes' pairs, or the
    links between nodes); nodes said to be apart whose link is as fast as those inside; a pair said to have a certain
    kind of link that is `factor` times slower than the others of that kind; a pair said to be joined by NVLink that the
    measured groups hold apart; and ranks said to share a node of which the driver of the GPUs knows but one.

    Args:
        topology: measured; its node_of is what Ray says.
        kinds: what the driver of the GPUs says, by pair of ranks: "NVLink", "PCIe", ...; None: the topology's `joined`.
        factor: of the time of a MESSAGE in the slower direction.
    """
    far = distances(topology)
    nodes = _pairs_inside(topology)
    found: list[str] = []
    right: list[Pair] = []
    for node, pairs in nodes.items():
        slow = _slow_ranks(topology, far, node, pairs, factor)
        found += slow.values()
        nodes[node] = [p for p in pairs if not slow.keys() & set(p)]
    for node, pairs in nodes.items():
        elsewhere = [p for other, theirs in nodes.items() if other != node for p in theirs] if len(pairs) == 1 else []
        odd = _slow_pairs(topology, far, node, pairs, elsewhere, factor)
        found += odd.values()
        right += [p for p in pairs if p not in odd]
    kinds = _said_kinds(topology) if kinds is None else kinds
    odd_kinds = _odd_kinds(topology, far, kinds, factor)
    return found + _near_nodes(topology, far, right) + odd_kinds + _parted(topology, kinds) + _strangers(topology)


def _pairs_inside(topology: Topology) -> dict[int, list[Pair]]:
    """Pairs of ranks that are said to share a node, by node."""
    found: dict[int, list[Pair]] = {}
    for node in dict.fromkeys(topology.node_of.tolist()):
        found[node] = list(combinations(np.flatnonzero(topology.node_of == node).tolist(), 2))
    return found


def _slow_ranks(
    topology: Topology, far: npt.NDArray[np.float64], node: int, pairs: list[Pair], factor: float
) -> dict[int, str]:
    """Ranks of a node of whom no link to the others is as it should be, in words."""
    found = {}
    for r in sorted({x for p in pairs for x in p}):
        own, others = [p for p in pairs if r in p], [p for p in pairs if r not in p]
        best = min(own, key=lambda p: far[p])
        if others and far[best] >= factor * _median(far, others):
            found[r] = (
                f"rank {r} is said to share node {node} with ranks {_list([x for p in own for x in p if x != r])} but "
                f"its best link there has {_speed(topology, [best])} where the node's others have "
                f"{_speed(topology, others)}"
            )
    return found


def _slow_pairs(
    topology: Topology,
    far: npt.NDArray[np.float64],
    node: int,
    pairs: list[Pair],
    elsewhere: list[Pair],
    factor: float,
) -> dict[Pair, str]:
    """Pairs of a node that are slow beside its others; a lone pair beside other nodes', or beside what leaves it."""
    found = {}
    for a, b in pairs:
        others, whose = [p for p in pairs if p != (a, b)], "the node's others have"
        if not others and elsewhere:
            others, whose = elsewhere, "other nodes' ranks have"
        elif not others:
            away = np.flatnonzero(topology.node_of != node).tolist()
            others, whose = [(x, y) for x in (a, b) for y in away], "their links to other nodes have"
        if others and far[a, b] >= factor * _median(far, others):
            found[a, b] = (
                f"ranks {a} and {b} are said to share node {node} but their link has {_speed(topology, [(a, b)])} "
                f"where {whose} {_speed(topology, others)}"
            )
    return found


def _near_nodes(topology: Topology, far: npt.NDArray[np.float64], inside: list[Pair]) -> list[str]:
    nodes = [np.flatnonzero(topology.node_of == n).tolist() for n in dict.fromkeys(topology.node_of.tolist())]
    if not inside or len(nodes) < 2:
        return []
    limit = 1.25 * _median(far, inside)
    near, apart = [], list(combinations(range(len(nodes)), 2))
    for x, y in apart:
        links = [(a, b) for a in nodes[x] for b in nodes[y]]
        if _median(far, links) <= limit:
            near.append((x, y, links))
    numbers = list(dict.fromkeys(topology.node_of.tolist()))
    if len(near) == len(apart) > 1:
        return [
            f"{len(nodes)} nodes are said to be apart but their links, {_speed(topology, near[0][2])}, are as fast as "
            f"those inside them, {_speed(topology, inside)}"
        ]
    return [
        f"nodes {numbers[x]} and {numbers[y]} are said to be apart but the link between them, "
        f"{_speed(topology, links)}, is as fast as those inside nodes, {_speed(topology, inside)}"
        for x, y, links in near
    ]


def _odd_kinds(topology: Topology, far: npt.NDArray[np.float64], kinds: Mapping[Pair, str], factor: float) -> list[str]:
    found = []
    for (a, b), kind in kinds.items():
        others = [p for p, k in kinds.items() if k == kind and set(p) != {a, b}]
        if others and far[a, b] >= factor * _median(far, others):
            found.append(
                f"ranks {a} and {b} are said to be joined by {kind} but their link has {_speed(topology, [(a, b)])} "
                f"where others of that kind have {_speed(topology, others)}"
            )
    return found


def _said_kinds(topology: Topology) -> dict[Pair, str]:
    if topology.joined is None:
        return {}
    pairs = np.argwhere(np.triu(topology.joined, 1) > 0).tolist()
    return {(a, b): LINK_KINDS[topology.joined[a, b]] for a, b in pairs}


def _parted(topology: Topology, kinds: Mapping[Pair, str]) -> list[str]:
    """NVLink, of all kinds, makes a group of ranks: pairs that it joins and whose measured groups differ."""
    groups = topology.groups
    if groups is None:
        return []
    return [
        f"ranks {a} and {b} are said to be joined by NVLink but by measurement they are in different groups of fast "
        f"links: theirs has {_speed(topology, [(a, b)])}"
        for (a, b), kind in kinds.items()
        if kind == LINK_KINDS[NVLINK] and groups[a] != groups[b]
    ]


def _strangers(topology: Topology) -> list[str]:
    """Ranks of one node by Ray whose GPUs are both known to drivers, but not to the same one."""
    joined = topology.joined
    if joined is None:
        return []
    asked = np.any(joined > 0, axis=1).tolist()
    return [
        f"ranks {a} and {b} are said to share node {node} but the driver of rank {a}'s GPU does not know rank {b}'s"
        for node, pairs in _pairs_inside(topology).items()
        for a, b in pairs
        if joined[a, b] == 0 and asked[a] and asked[b]
    ]


def _times(far: npt.NDArray[np.float64], pairs: list[Pair]) -> npt.NDArray[np.float64]:
    a, b = zip(*pairs, strict=True)
    return far[list(a), list(b)]


def _median(far: npt.NDArray[np.float64], pairs: list[Pair]) -> float:
    return float(np.median(_times(far, pairs)))


def _speed(topology: Topology, pairs: list[Pair]) -> str:
    """Bandwidth of links in their slower direction; the latency too, where most of a MESSAGE's time is that."""
    bandwidth = _median(np.minimum(topology.bandwidth, topology.bandwidth.T), pairs)
    latency = _median(np.maximum(topology.latency, topology.latency.T), pairs)
    words = in_words(bandwidth)
    return words if latency < MESSAGE / bandwidth else f"{words} after {1e3 * latency:.3g} ms"


def in_words(bandwidth: float) -> str:
    """Bytes/s for people: "3.1 GB/s"."""
    for size, unit in ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")):
        if bandwidth >= size:
            return f"{bandwidth / size:.2g} {unit}" if bandwidth < 100 * size else f"{bandwidth / size:.0f} {unit}"
    return f"{bandwidth:.2g} B/s"


def _list(ranks: list[int]) -> str:
    words = [str(r) for r in sorted(ranks)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


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
