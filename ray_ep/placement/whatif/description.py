"""A cluster described in words instead of measured: nodes, ranks, kinds of links, speeds -> a topology. Pure NumPy.

    nodes: 4                      # or a list: [{name: a, ranks: 8, count: 2}, {ranks: 4, speed: 0.5, inside: pcie}]
    ranks_per_node: 8
    lanes: 4                      # ranks of a node that can send to others at once at full speed; all, if not given
    links:
      inside: {bandwidth: 300 GB/s, latency: 5 us}     # between ranks of a node
      across: {bandwidth: 400 Gbit/s, latency: 20 us}  # between nodes
      slow: {bandwidth: 1 GB/s, latency: 50 us}        # further kinds, to be named below
    between:                      # pairs of nodes, by number or name, that another kind of link joins
      - {nodes: [0, 3], link: slow}
    speeds: [1, 1, 1, 0.5]        # compute speed of each node's ranks, relative

Bandwidth is what one rank gets, bytes/s where no unit is given; latency seconds. Opening files is ray_ep.cli's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.topology import Topology

MAX_RANKS = 4096
"""More would be a slip of the keyboard: [R, R] arrays of 10,000 ranks take a gigabyte each."""

_KEYS = ("nodes", "ranks_per_node", "lanes", "links", "between", "speeds")
_NODE_KEYS = ("name", "ranks", "count", "speed", "inside", "lanes")
_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*"


@dataclass(frozen=True, slots=True)
class ClusterDescription:
    """A cluster that was described.

    Args:
        topology: R ranks, nodes in the order of the description.
        speed: [R] relative compute speed of each rank; None: all alike.
        names: of the nodes.
    """

    topology: Topology
    speed: tuple[float, ...] | None
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    ranks: int
    speed: float
    inside: str
    lanes: float | None


def describe(tree: Any, where: str = "cluster") -> ClusterDescription:
    """A description as YAML reads it (see above) -> topology and speeds.

    Raises:
        PlacementError: a key that is unknown or missing, a value that is not what it should be; says where, and what
            is allowed.
    """
    if not isinstance(tree, Mapping):
        raise PlacementError(f"{where}: is no mapping: expected one with {', '.join(_KEYS)}")
    _known(tree, _KEYS, where)
    links = _links(tree.get("links"), where)
    nodes = _nodes(tree, where)
    for node in nodes:
        if node.inside not in links:
            raise PlacementError(f"{where}: node {node.name}: inside={node.inside!r}: {_allowed(links)}")
    node_of = np.repeat(np.arange(len(nodes)), [n.ranks for n in nodes])
    kind = np.full((len(nodes), len(nodes)), "across", object)
    kind[np.diag_indices(len(nodes))] = [n.inside for n in nodes]
    for a, b, link in _between(tree.get("between", []), [n.name for n in nodes], links, where):
        kind[a, b] = kind[b, a] = link
    names = list(links)
    index = np.array([[names.index(k) for k in row] for row in kind], np.int64)[np.ix_(node_of, node_of)]  # [R, R]
    bandwidth, latency = (np.array([links[n][i] for n in names])[index] for i in (0, 1))
    np.fill_diagonal(bandwidth, np.inf)
    np.fill_diagonal(latency, 0.0)
    speed = tuple(float(n.speed) for n in nodes for _ in range(n.ranks))
    lanes = np.array([n.lanes or n.ranks for n in nodes], np.float64)[node_of]
    topology = Topology(bandwidth, latency, node_of, lanes=lanes if any(n.lanes for n in nodes) else None)
    return ClusterDescription(topology, speed if len(set(speed)) > 1 else None, tuple(n.name for n in nodes))


def _nodes(tree: Mapping[str, Any], where: str) -> list[_Node]:
    """The nodes in order, `count` of each, with their speeds."""
    given = tree.get("nodes")
    if isinstance(given, int) and not isinstance(given, bool):
        given = [{"count": _count(given, f"{where}: nodes")}]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise PlacementError(f"{where}: nodes={given!r}: expected a number of nodes, or a list of them")
    nodes: list[_Node] = []
    for i, item in enumerate(given):
        here = f"{where}: nodes[{i}]"
        if not isinstance(item, Mapping):
            raise PlacementError(f"{here}: {item!r}: expected a mapping with {', '.join(_NODE_KEYS)}")
        _known(item, _NODE_KEYS, here)
        ranks = item.get("ranks", tree.get("ranks_per_node"))
        if ranks is None:
            raise PlacementError(f"{here}: no ranks: give ranks here or ranks_per_node for all nodes")
        ranks = _count(ranks, f"{here}: ranks")
        for copy in range(_count(item.get("count", 1), f"{here}: count")):
            name = str(item.get("name", len(nodes))) + (f"-{copy}" if "name" in item and "count" in item else "")
            speed = _positive(item.get("speed", 1.0), f"{here}: speed")
            lanes = item.get("lanes", tree.get("lanes"))
            lanes = None if lanes is None else _lanes(lanes, ranks, f"{here}: lanes")
            nodes.append(_Node(name, ranks, speed, str(item.get("inside", "inside")), lanes))
            if sum(n.ranks for n in nodes) > MAX_RANKS:
                raise PlacementError(f"{here}: more than {MAX_RANKS} ranks in all")
    if len({n.name for n in nodes}) < len(nodes):
        raise PlacementError(f"{where}: two nodes have one name: {', '.join(n.name for n in nodes)}")
    return _with_speeds(nodes, tree.get("speeds"), where)


def _with_speeds(nodes: list[_Node], speeds: Any, where: str) -> list[_Node]:
    if speeds is None:
        return nodes
    if not isinstance(speeds, Sequence) or isinstance(speeds, str) or len(speeds) != len(nodes):
        raise PlacementError(f"{where}: speeds={speeds!r}: expected a list of {len(nodes)} numbers, one a node")
    values = [_positive(s, f"{where}: speeds[{i}]") for i, s in enumerate(speeds)]
    return [replace(n, speed=s) for n, s in zip(nodes, values, strict=True)]


def _links(given: Any, where: str) -> dict[str, tuple[float, float]]:
    """Kinds of links by name: bandwidth in bytes/s, latency in seconds."""
    if not isinstance(given, Mapping) or not {"inside", "across"} <= given.keys():
        what = "it is missing" if given is None else repr(given)
        raise PlacementError(f"{where}: links: {what}: expected a mapping with inside, across and further kinds")
    found = {}
    for name, item in given.items():
        here = f"{where}: links: {name}"
        if not isinstance(item, Mapping) or "bandwidth" not in item:
            raise PlacementError(f"{here}: {item!r}: expected a mapping with bandwidth and latency")
        _known(item, ("bandwidth", "latency"), here)
        bandwidth = bytes_per_second(item["bandwidth"], f"{here}: bandwidth")
        found[str(name)] = (bandwidth, seconds(item.get("latency", 0.0), f"{here}: latency"))
    return found


def _between(given: Any, names: list[str], links: Mapping[str, Any], where: str) -> list[tuple[int, int, str]]:
    """(node, node, kind of link) of each exception."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise PlacementError(f"{where}: between={given!r}: expected a list of {{nodes: [a, b], link: KIND}}")
    found = []
    for i, item in enumerate(given):
        here = f"{where}: between[{i}]"
        pair = item.get("nodes") if isinstance(item, Mapping) else None
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or str(pair[0]) == str(pair[1]):
            raise PlacementError(f"{here}: {item!r}: expected {{nodes: [a, b], link: KIND}} with two different nodes")
        _known(item, ("nodes", "link"), here)
        for node in pair:
            if str(node) not in names:
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise PlacementError(f"{here}: no node {node!r}: allowed are {shown}")
        if str(item.get("link")) not in links:
            raise PlacementError(f"{here}: link={item.get('link')!r}: {_allowed(links)}")
        found.append((names.index(str(pair[0])), names.index(str(pair[1])), str(item["link"])))
    return found


def bytes_per_second(value: Any, where: str = "bandwidth") -> float:
    """A number of bytes/s, or text such as "25 GB/s" or "400 Gbit/s"; raises PlacementError naming `where`."""
    match = (
        re.fullmatch(_NUMBER + r"([kMGT]|[KMG]i)?(B|bit|bps)(?:/s|ps)?\s*", value) if isinstance(value, str) else None
    )
    if match:
        number, prefix, unit = match.groups()
        value = float(number) * _PREFIX[prefix or ""] / (1 if unit == "B" else 8)
    return _positive(value, where, 'such as 25e9, "25 GB/s" or "400 Gbit/s"')


def seconds(value: Any, where: str = "latency") -> float:
    """A number of seconds, or text such as "20 us"; raises PlacementError naming `where`."""
    match = re.fullmatch(_NUMBER + r"(s|ms|us|µs|ns)\s*", value) if isinstance(value, str) else None
    if match:
        value = float(match.group(1)) * _SECONDS[match.group(2)]
    number = _number(value)
    if number is None or not (math.isfinite(number) and number >= 0):
        raise PlacementError(f'{where}={value!r}: expected a time that is not negative, such as 2e-5 or "20 us"')
    return number


def _positive(value: Any, where: str, such: str = "such as 1.0") -> float:
    number = _number(value)
    if number is None or not (math.isfinite(number) and number > 0):
        raise PlacementError(f"{where}={value!r}: expected a positive number, {such}")
    return number


def _lanes(value: Any, ranks: int, where: str) -> float:
    lanes = _number(value)
    if lanes is None or not 1 <= lanes <= ranks:
        raise PlacementError(f"{where}={value!r}: expected a number from 1 to the node's {ranks} ranks")
    return lanes


def _number(value: Any) -> float | None:
    """None where it is none; YAML reads 25e9, without a dot, as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANKS:
        raise PlacementError(f"{where}={value!r}: expected a number from 1 to {MAX_RANKS}")
    return value


def _known(tree: Mapping[Any, Any], keys: Sequence[str], where: str) -> None:
    for key in tree:
        if key not in keys:
            raise PlacementError(f"{where}: unknown key {key!r}: allowed are {', '.join(keys)}")


def _allowed(links: Mapping[str, Any]) -> str:
    return f"no such kind of link: allowed are {', '.join(links)}"
