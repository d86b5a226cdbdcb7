"""What the planner minimises, in the units of its searches: one token's visit to another node, at the mean price, is 1.

Pure NumPy. "Node" here is a group of ranks joined by links that are faster than those between groups: the ranks of a
node by name, unless their measured links are no faster (then every rank is a node of its own).
L layers, E experts, R ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.baselines import room_of_ranks
from ray_ep.placement.cost import Links, StepCosts
from ray_ep.placement.placement import Floats, Ints
from ray_ep.placement.topology import Topology

FASTER = 1.5
"""Links inside a node must be this much faster than those across for its ranks to be planned as one node."""


STIFF = {"node": 1.9, "rank": 5.7}
"""Cost of squared relative deviation, in computes of an even rank; loads that drift make evenness worth more."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One cluster and one objective, the same for every layer.

    Args:
        experts: E. level: rank or node: what must be even.
        node_of: [R] numbers 0 to N - 1. room: [R] slots. speed: [R], their mean 1. source: [N] share of tokens that
            start on each node.
        pair: [N, N] price of a token from a node (row) that visits another, mean 1. visit_seconds: what 1 is.
        compute: a token's experts on an evenly loaded rank, in visits.
        stiff: cost of squared relative deviation from even load, of nodes at level node, of ranks at level rank.
        stay: cost of each slot filled anew; owned: of an expert whose only replica moves.
        costs, links: for predictions.
    """

    experts: int
    level: str
    node_of: Ints
    room: Ints
    speed: Floats
    source: Floats
    pair: Floats
    visit_seconds: float
    compute: float
    stiff: float
    stay: float
    owned: float
    costs: StepCosts
    links: Links

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.node_of)

    @property
    def nodes(self) -> int:
        """N."""
        return len(self.source)

    def price(self) -> Floats:
        """[N] mean price of a token's visit to each node, over where tokens start."""
        return self.source @ self.pair

    def with_even_links(self) -> Problem:
        """The same with every visit at the mean price."""
        return replace(self, pair=1.0 - np.eye(self.nodes))

    def node_speed(self) -> Floats:
        """[N] sum of the ranks' speeds."""
        return np.bincount(self.node_of, self.speed, self.nodes).astype(np.float64)

    def node_room(self) -> Ints:
        """[N] slots."""
        return np.bincount(self.node_of, self.room, self.nodes).astype(np.int64)

    @staticmethod
    def of(
        topology: Topology,
        experts: int,
        top_k: int,
        slots_per_rank: int | Sequence[int] | None,
        level: str,
        horizon_steps: float,
        costs: StepCosts,
    ) -> Problem:
        """Raises PlacementError for input that does not fit."""
        if level not in ("rank", "node"):
            raise PlacementError(f"level={level!r}: allowed are rank and node")
        if not horizon_steps > 0:
            raise PlacementError(f"horizon_steps={horizon_steps}: expected a positive number")
        ranks = topology.num_ranks
        room = np.minimum(room_of_ranks(experts, ranks, slots_per_rank), experts).astype(np.int64)
        node_of = group_ranks(topology)
        nodes = int(node_of.max()) + 1
        size = np.bincount(node_of)
        slow = 1.0 / topology.bandwidth
        np.fill_diagonal(slow, 0.0)
        member = (node_of[:, None] == np.arange(nodes)) / size  # [R, N]
        there = member.T @ slow @ member
        pair = costs.token_bytes * (there + there.T)
        np.fill_diagonal(pair, 0.0)
        known = pair[pair > 0]
        visit = float(known.mean()) if len(known) else 0.0
        if visit > 0:  # a link that nobody measured is taken for an average one
            pair = np.where((pair > 0) | np.eye(nodes, dtype=bool), pair / visit, 1.0)
        else:
            pair = 1.0 - np.eye(nodes)
        # The slowest unit's compute, in visits: how much a deviation of load may cost against traffic.
        compute = top_k * costs.expert_seconds / visit if visit > 0 else 3.0
        stiff = float(np.clip(compute, 1.0, 3.0)) * STIFF[level]
        step_unit = visit * costs.tokens_per_rank * ranks  # seconds a step of one visit by every token, on all links
        slot_seconds = float(slow[slow > 0].mean()) if visit > 0 else 0.0
        per_byte = slot_seconds / (horizon_steps * step_unit) if step_unit > 0 else 0.0
        stay = max(costs.expert_bytes * per_byte, 1e-6)
        owned = stay + costs.optimizer_bytes * per_byte
        speed = costs.speeds(ranks)
        links = Links.of(topology, node_of)
        source = size / ranks
        return Problem(
            experts,
            level,
            node_of,
            room,
            speed / speed.mean(),
            source,
            pair,
            visit,
            compute,
            stiff,
            stay,
            owned,
            costs,
            links,
        )


def group_ranks(topology: Topology) -> Ints:
    """[R] number of each rank's group: its node, or itself where links inside nodes are no faster than those across."""
    ranks = topology.num_ranks
    node_of: Ints = np.unique(topology.node_of, return_inverse=True)[1].astype(np.int64)
    near = (node_of[:, None] == node_of[None]) & ~np.eye(ranks, dtype=bool)
    far = node_of[:, None] != node_of[None]
    if not far.any():
        return np.arange(ranks, dtype=np.int64)
    if near.any():
        inside, across = np.median(topology.bandwidth[near]), np.median(topology.bandwidth[far])
        if np.isfinite(inside) and inside < FASTER * across:
            return np.arange(ranks, dtype=np.int64)
    return node_of
