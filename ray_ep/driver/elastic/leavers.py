"""Which ranks leave: all of a node together, and of those only as many as a run can do without. Pure.

Which nodes are to be left, and when, is elastic.py's. A node is named by Ray's id; `where` are `Ranks.where`: of each
rank its node, host and address.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Where = Sequence[Mapping[str, Any]]


def node_named(name: str, where: Where) -> tuple[str, str]:
    """(id of the one node with ranks that somebody means, ""), or ("", why there is none).

    Args:
        name: a node's id or the beginning of it, or its host's name or address.
    """
    known = {str(w["node"]): w for w in where}
    found = [n for n, w in known.items() if name and (n.startswith(name) or name in (w["host"], w.get("address")))]
    if len(found) == 1:
        return found[0], ""
    if found:
        return "", f"{name!r} names {len(found)} nodes: give the id of one: {', '.join(found)}"
    named = ", ".join(f"{n} (host {w['host']}, {w.get('address', '')})" for n, w in known.items())
    return "", f"no rank is on a node {name!r}: those with ranks are {named}"


def ranks_on(nodes: Collection[str], where: Where) -> dict[str, list[int]]:
    """The ranks on each of these nodes, in the order of `nodes`; nodes without ranks are left out."""
    found = {node: [rank for rank, w in enumerate(where) if w["node"] == node] for node in nodes}
    return {node: ranks for node, ranks in found.items() if ranks}


def surplus(count: int, where: Where, but: Collection[int] = ()) -> list[int]:
    """So many ranks that a run can give back: whole nodes with few ranks before parts of nodes, the last ones first.

    Args:
        but: ranks that go anyway.
    """
    by_node: dict[str, list[int]] = {}
    for rank, w in enumerate(where):
        if rank not in but:
            by_node.setdefault(w["node"], []).append(rank)
    order = sorted(by_node.values(), key=lambda ranks: (len(ranks), -ranks[-1]))
    return sorted([rank for ranks in order for rank in ranks[::-1]][:count])


def can_go(groups: Sequence[Sequence[int]], active: int, ready: int, least: int) -> list[int]:
    """Of groups of ranks that are to leave, in order, those that can now, each whole; their ranks.

    At least one of the ranks that hold the model stays, to give it to those that come.

    Args:
        ready: newcomers that come in meanwhile. least: ranks that must be left.
    """
    gone: list[int] = []
    for group in groups:
        left = active - len(gone) - len(group)
        if left >= 1 and left + ready >= least:
            gone += group
    return sorted(gone)
