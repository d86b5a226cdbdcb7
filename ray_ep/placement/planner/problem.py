"""What the planner minimises, in the units of its searches: one token's visit to another node, at the mean price, is 1.

Pure NumPy. "Node" here is a group of ranks as `groups.groups_of` finds them, or, for searches that minimise what ranks
exchange, a rank by itself.
L layers, E experts, R ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.baselines import room_of_ranks
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.links import LinkSeconds
from ray_ep.placement.links.groups import groups_of
from ray_ep.placement.placement import Floats, Ints
from ray_ep.placement.topology import Topology

STIFF = {"node": 4.0, "rank": 12.0}
"""Penalty factor, by level. A unit whose load deviates by a share x of the mean costs this times x^2, in computes of
an even rank; ranks weigh more, for nothing evens them out inside the step."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One cluster and one objective, the same for every layer.

    Args:
        experts: E. level: rank or node: what must be even.
        node_of: [R] numbers 0 to N - 1. room: [R] slots. speed: [R], their mean 1.
        costs, links: for predictions; `links.node_of` are the groups, whatever the search takes for a node.
        prices: in the search's units.
        shares: [E, R] of one layer, how much of an expert's far tokens a replica there takes; None: even.
    """

    experts: int
    top_k: int
    level: str
    horizon_steps: float
    node_of: Ints
    room: Ints
    speed: Floats
    costs: StepCosts
    links: LinkSeconds
    prices: Prices
    shares: Floats | None = None

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.node_of)

    @property
    def nodes(self) -> int:
        """N."""
        return len(self.prices.pair)

    @property
    def source(self) -> Floats:
        """[N] share of tokens that start on each node."""
        return np.bincount(self.node_of, minlength=self.nodes) / self.ranks

    @property
    def unit_of(self) -> Ints:
        """[R] what must be even: the rank, or its group, as predictions see it."""
        return np.arange(self.ranks, dtype=np.int64) if self.level == "rank" else self.links.node_of

    def price(self) -> Floats:
        """[N] mean price of a token's visit to each node, over where tokens start."""
        return self.source @ self.prices.pair

    def views(self) -> list[Problem]:
        """What to search: grouped, or by rank where tokens cross once a rank; both where neither is sure to be better.

        The flat exchange sends a token once to each rank, so experts chosen together belong on one rank; but replicas
        that a whole group shares keep tokens near with fewer slots, and only the grouped search places those.
        """
        if self.nodes == 1:
            return [self.by_rank()]
        if self.costs.two_level is False and self.nodes < self.ranks:
            return [self, self.by_rank()]
        return [self]

    def by_rank(self) -> Problem:
        """The same with every rank a node of its own."""
        node_of = np.arange(self.ranks, dtype=np.int64)
        prices = Prices.of(self.links.crowded(), node_of, self.top_k, self.level, self.horizon_steps, self.costs)
        return replace(self, node_of=node_of, prices=prices)

    def with_even_links(self) -> Problem:
        """The same with every visit at the mean price."""
        return replace(self, prices=replace(self.prices, pair=1.0 - np.eye(self.nodes)))

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
        speed = costs.speeds(ranks)
        node_of = groups_of(topology)
        links = LinkSeconds.of(topology, node_of)
        prices = Prices.of(links.crowded(), node_of, top_k, level, horizon_steps, costs)
        return Problem(experts, top_k, level, horizon_steps, node_of, room, speed / speed.mean(), costs, links, prices)


@dataclass(frozen=True, slots=True)
class Prices:
    """What things cost in visits, for one choice of what a node is.

    Args:
        pair: [N, N] price of a token from a node (row) that visits another, mean 1. visit_seconds: what 1 is.
        compute: a token's experts on an evenly loaded rank.
        stiff: cost of squared relative deviation from even load, of nodes at level node, of ranks at level rank.
        stay: cost of each slot filled anew; owned: of an expert whose only replica moves.
    """

    pair: Floats
    visit_seconds: float
    compute: float
    stiff: float
    stay: float
    owned: float

    @staticmethod
    def of(slow: Floats, node_of: Ints, top_k: int, level: str, horizon_steps: float, costs: StepCosts) -> Prices:
        """From seconds a byte of the links [R, R], 0 where not measured, and the node of each rank [R]."""
        nodes = int(node_of.max()) + 1
        member = (node_of[:, None] == np.arange(nodes)) / np.bincount(node_of)  # [R, N]
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
        step_unit = visit * costs.tokens_per_rank * len(node_of)  # seconds a step of one visit by every token
        slot_seconds = float(slow[slow > 0].mean()) if visit > 0 else 0.0
        per_byte = slot_seconds / (horizon_steps * step_unit) if step_unit > 0 else 0.0
        stay = max(costs.expert_bytes * per_byte, 1e-6)
        return Prices(pair, visit, compute, stiff, stay, stay + costs.optimizer_bytes * per_byte)
