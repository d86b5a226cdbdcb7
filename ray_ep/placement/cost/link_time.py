"""Compiled: how long one layer's copies take over the links and the ports at their ends, in one pass over the links.

The formula and its reasons are `cost.Links`'; as whole arrays it would make a dozen temporaries of R x R numbers,
134 MB each at 4,096 ranks. R ranks, N nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel

TILE = 64
"""Ranks. Links are read in squares of this side: the way back of a row is a column."""


@kernel
def _longest(copies: Any, ways: Any, members: Any, node_of: Any, near: Any, far: Any) -> Any:
    """Seconds until copies [R, N] to nodes are there: ways link, out, into [3, R, N] s/byte; members share arrivals.

    near, far: [N] s/byte of the cards of the rank's node, and of the other one's.
    """
    link, out, into = ways[0], ways[1], ways[2]
    longest, arrived = 0.0, np.zeros(len(members))
    carried = np.zeros((2, len(members)))
    for s in range(len(copies)):
        sent = 0.0
        for n in range(len(members)):
            c = copies[s, n]
            longest = max(longest, c * link[s, n])
            sent += c * out[s, n]
            arrived[n] += c * into[s, n] / members[n]
            if n != node_of[s]:
                carried[0, node_of[s]] += c * near[node_of[s]]
                carried[1, n] += c * far[n]
        longest = max(longest, sent)
    return max(longest, arrived.max(), carried.max())


@kernel
def _between_ranks(to_rank: Any, arriving: Any, link: Any, ports: Any, cards: Any, node_of: Any, inside: Any) -> Any:
    """Dispatch and combine between ranks. inside: within nodes alone, arriving [R] from the node's others on top."""
    ranks = len(to_rank)
    load = np.zeros((2, 2, 2, ranks))  # there, back; sent, received; near, far: copies
    slowest = np.zeros(2)
    for top in range(0, ranks, TILE):
        for left in range(0, ranks, TILE):
            for s in range(top, min(top + TILE, ranks)):
                for r in range(left, min(left + TILE, ranks)):
                    near = node_of[s] == node_of[r]
                    if s == r or (inside and not near):
                        continue
                    far = 0 if near else 1
                    copies = to_rank[s, r] + (arriving[r] if inside else 0.0)
                    there, back = link[s, r], link[r, s]
                    if there > 0:
                        slowest[0] = max(slowest[0], copies * there)
                        load[0, 0, far, s] += copies
                        load[0, 1, far, r] += copies
                    if back > 0:
                        slowest[1] = max(slowest[1], copies * back)
                        load[1, 0, far, r] += copies
                        load[1, 1, far, s] += copies
    total = 0.0
    for way in range(2):
        longest = slowest[way]
        for end in range(2):
            carried = np.zeros(cards.shape[1])
            for r in range(ranks):
                taken = load[way, end, 0, r] * ports[end, 0, r] + load[way, end, 1, r] * ports[end, 1, r]
                longest = max(longest, taken)
                carried[node_of[r]] += load[way, end, 1, r] * cards[end, node_of[r]]
            longest = max(longest, carried.max())
        total += longest
    return total


@kernel
def busiest(copies: Any, link: Any, ports: Any, cards: Any, node_ways: Any, node_of: Any) -> Any:
    """Seconds for a message of one byte a copy, dispatch and combine together.

    Args:
        copies: to_rank [R, R] to other ranks, to_node [R, N] to other nodes.
        link: [R, R] seconds a byte, 0 where not measured.
        ports: [2, 2, R] seconds a byte of a rank's port: out, into; inside its node, across.
        cards: [2, N] seconds a byte that all ranks of a node together send to other nodes, receive from them; 0 where
            their ports alone limit that.
        node_ways: [2, 3, R, N] there, back: link, port out and port in of a rank's copies to a node (means).
        node_of: [R] numbers 0 to N - 1.

    Returns:
        flat: one copy a rank. across: one copy a node, across nodes. inside: what then travels inside nodes, the
        arrivals of a node being shared out over its ranks evenly and each rank getting its copy from there.
    """
    to_rank, to_node = copies
    ranks, nodes = to_node.shape
    members = np.zeros(nodes)
    for r in range(ranks):
        members[node_of[r]] += 1.0
    arriving = np.zeros(ranks)  # copies from other nodes, a member's share
    for s in range(ranks):
        for r in range(ranks):
            if node_of[s] != node_of[r]:
                arriving[r] += to_rank[s, r] / members[node_of[r]]
    flat = _between_ranks(to_rank, arriving, link, ports, cards, node_of, False)
    inside = _between_ranks(to_rank, arriving, link, ports, cards, node_of, True)
    across = 0.0
    for way in range(2):
        across += _longest(to_node, node_ways[way], members, node_of, cards[way], cards[1 - way])
    return flat, across, inside
