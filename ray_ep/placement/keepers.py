"""Who holds the second copy of whose state: a rank of another node, where there is one. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

NOBODY = -1
"""Keeper of a rank that is alone."""


def keepers(node_of: Sequence[int]) -> tuple[int, ...]:
    """[R] rank that keeps each rank's snapshots, the same on every rank.

    It is on another node if there are two, so that no single node takes both copies along; else it is another rank. The
    ranks of a node have as many keepers as they can, so that each keeps about as much.

    Args:
        node_of: [R] node of each rank.
    """
    ranks = len(node_of)
    if ranks < 2:
        return (NOBODY,) * ranks
    count = Counter(node_of)
    order = sorted(range(ranks), key=lambda r: (-count[node_of[r]], node_of[r], r))  # the fullest node first
    shift = count[node_of[order[0]]] % ranks or 1  # all on one node: its next rank
    found = [NOBODY] * ranks
    if 2 * shift <= ranks or len(count) == 1:
        for place, rank in enumerate(order):
            found[rank] = order[(place + shift) % ranks]
        return tuple(found)
    crowd, others = order[:shift], order[shift:]  # one node has more than half of the ranks
    for place, rank in enumerate(crowd):
        found[rank] = others[place % len(others)]
    for place, rank in enumerate(others):
        found[rank] = crowd[place]
    return tuple(found)
