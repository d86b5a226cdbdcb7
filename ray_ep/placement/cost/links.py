"""How long the links and ports between ranks take a byte, and with that a layer's copies. The kernel is link_time.py.

Pure NumPy. R ranks, N nodes (groups of ranks joined by fast links, see `links.groups.groups_of`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.link_time import busiest
from ray_ep.placement.placement import Floats, Ints
from ray_ep.placement.topology import Topology


@dataclass(frozen=True, slots=True)
class LinkSeconds:
    """Seconds a byte of the links between ranks, and of the ports at their ends; zero where not measured.

    Messages to different peers run side by side; what they share is the port. Its speed is not measured, but it is at
    least that of its fastest link of the kind (inside the node, across), so slower links are slow by themselves. A
    close rank of another host, though of the same measured group, is reached by the port that all hosts are.
    Ranks of a node may share network cards: `Topology.lanes`.

    Args:
        rank: [R, R] of links. ports: [2, 2, R] out, into; inside the node, across.
        cards: [2, N] of a node's ranks together, out to other nodes, into; 0 where their ports alone limit them.
        node: [2, 3, R, N] there, back: link, port out, port in, means over a node's ranks.
        wait: [R] longest latency.
    """

    rank: Floats
    ports: Floats
    cards: Floats
    node: Floats
    wait: Floats
    node_of: Ints

    @staticmethod
    def of(topology: Topology, node_of: Ints) -> LinkSeconds:
        """From measured bandwidth [R, R]."""
        slow = 1.0 / topology.bandwidth
        np.fill_diagonal(slow, 0.0)
        latency = topology.latency.copy()
        np.fill_diagonal(latency, 0.0)
        near = node_of[:, None] == node_of
        ports = np.zeros((2, 2, len(node_of)))
        elsewhere = topology.node_of[:, None] != topology.node_of
        for kind, of_kind in enumerate((near, ~near | elsewhere)):
            known = np.where(of_kind & (slow > 0), slow, np.inf)
            for end in range(2):
                fastest = known.min(1 - end, initial=np.inf)
                ports[end, kind] = np.where(np.isfinite(fastest), fastest, 0.0)
        member = (node_of[:, None] == np.arange(node_of.max() + 1)) / np.bincount(node_of)  # [R, N]
        known = (slow > 0).astype(np.float64)
        out, into = ports[0, 1], ports[1, 1]
        there = slow @ member, out[:, None] * (known @ member), known @ (into[:, None] * member)
        back = slow.T @ member, into[:, None] * (known.T @ member), known.T @ (out[:, None] * member)
        cards = np.zeros((2, member.shape[1]))
        if topology.lanes is not None:
            lanes = topology.lanes @ member
            cards = np.where(lanes < np.bincount(node_of), ports[:, 1] @ member / lanes, 0.0)
        return LinkSeconds(slow, ports, cards, np.stack([np.stack(there), np.stack(back)]), latency.max(1), node_of)

    def crowded(self) -> Floats:
        """[R, R] seconds a byte while all ranks send: on a shared network card each has but its part."""
        size = np.bincount(self.node_of)
        out, into = (self.cards * size)[:, self.node_of]
        far = (self.node_of[:, None] != self.node_of) & (self.rank > 0)
        return np.where(far, np.maximum(self.rank, np.maximum(out[:, None], into)), self.rank)

    def seconds(self, copies: tuple[Floats, Floats], costs: StepCosts) -> float:
        """Dispatch and combine of one layer: the slowest link or busiest rank's port, both ways, and two latencies."""
        size = costs.token_bytes * costs.tokens_per_rank
        wait = 2 * float(self.wait.max())
        flat, across, inside = (
            x * size for x in busiest(copies, self.rank, self.ports, self.cards, self.node, self.node_of)
        )
        # A node's arrivals are shared out over its ranks; inside, each destination rank gets its copy from there.
        ranks_meet = int(np.bincount(self.node_of).max()) > 1
        two = across + inside + (wait if ranks_meet else 0.0)
        chosen: float = {True: two, False: flat, None: min(two, flat)}[costs.two_level]
        return chosen + wait
