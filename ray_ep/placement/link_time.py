"""Compiled: how long the busiest rank sends or receives in one layer, in one pass over the links.

The formula and its reasons are `cost.Links`'; as whole arrays it would make a dozen temporaries of R x R numbers,
134 MB each at 4,096 ranks. R ranks, N nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel

TILE = 64
"""Links are read in squares of so many ranks: the way back of a row is a column."""


@kernel
def _across(to_node: Any, way: Any, members: Any) -> Any:
    """The longest that a rank sends copies to nodes [R, N], or receives its share of its node's; way [R, N] s/byte."""
    longest, into = 0.0, np.zeros(len(members))
    for s in range(len(to_node)):
        out = 0.0
        for n in range(len(members)):
            out += to_node[s, n] * way[s, n]
            into[n] += to_node[s, n] * way[s, n] / members[n]
        longest = max(longest, out)
    return max(longest, into.max())


@kernel
def busiest(to_rank: Any, to_node: Any, rank: Any, node: Any, home: Any, node_of: Any) -> Any:
    """Seconds for a message of one byte a copy, dispatch and combine together.

    Args:
        to_rank: [R, R] copies to other ranks, to_node: [R, N] to other nodes. node_of: [R] numbers 0 to N - 1.
        rank: [R, R] seconds a byte; node: [R, N] from a rank to a node; home: [R, N] from a node to a rank.

    Returns:
        flat: one copy a rank. across: one copy a node, across nodes. inside: what then travels inside nodes, the
        arrivals of a node being shared out over its ranks evenly and each rank getting its copy from there.
    """
    ranks, nodes = to_node.shape
    members = np.zeros(nodes)
    for r in range(ranks):
        members[node_of[r]] += 1.0
    sent, received = np.zeros((2, ranks)), np.zeros((2, ranks))  # there, back
    arriving = np.zeros(ranks)  # copies from other nodes
    for top in range(0, ranks, TILE):
        for left in range(0, ranks, TILE):
            for s in range(top, min(top + TILE, ranks)):
                for r in range(left, min(left + TILE, ranks)):
                    copies = to_rank[s, r]
                    there, back = copies * rank[s, r], copies * rank[r, s]
                    sent[0, s] += there
                    sent[1, s] += back
                    received[0, r] += there
                    received[1, r] += back
                    if node_of[s] != node_of[r]:
                        arriving[r] += copies
    flat = max(sent[0].max(), received[0].max()) + max(sent[1].max(), received[1].max())
    sent[:], received[:] = 0.0, 0.0
    for s in range(ranks):
        for r in range(ranks):
            if node_of[s] == node_of[r] and s != r:
                copies = to_rank[s, r] + arriving[r] / members[node_of[r]]
                there, back = copies * rank[s, r], copies * rank[r, s]
                sent[0, s] += there
                sent[1, s] += back
                received[0, r] += there
                received[1, r] += back
    inside = max(sent[0].max(), received[0].max()) + max(sent[1].max(), received[1].max())
    return flat, _across(to_node, node, members) + _across(to_node, home, members), inside
