"""Clusters that do not exist: what a step would take on them, predicted from recorded or invented routing.

Pure: the planner and the cost model, run on a described cluster. Sweeps answer "how many GPUs of which kind".
L layers, E experts, K top_k, R ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.baselines import contiguous
from ray_ep.placement.cost import StepCosts, predict
from ray_ep.placement.eplb import load_only
from ray_ep.placement.placement import Placement
from ray_ep.placement.planner import plan
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology

MOST_RANKS = 4096
"""The prediction holds tables of R x R links."""
PLANNED_SLOTS = 2048
"""Slots of a layer up to which the planner's search (quadratic in slots) is run; beyond, load is balanced alone."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster described by its link classes.

    Args:
        nodes: number of nodes; ranks_per_node: ranks of each.
        slots_per_rank: slots of a rank and layer; None: just enough for every expert.
        inside, across: bytes/s between two ranks of a node, and of different nodes.
        latency_inside, latency_across: seconds.
        speeds: relative speed of each kind of rank, in turn over the ranks; (1.0,) is an even cluster.

    Raises:
        PlacementError: numbers that are not positive, more than 4,096 ranks.
    """

    nodes: int
    ranks_per_node: int
    slots_per_rank: int | None = None
    inside: float = 450e9
    across: float = 50e9
    latency_inside: float = 3e-6
    latency_across: float = 1e-5
    speeds: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node", "inside", "across"):
            value = getattr(self, name)
            if not value > 0:
                raise PlacementError(f"cluster: {name}={value}: expected a positive number")
        for name in ("latency_inside", "latency_across"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise PlacementError(f"cluster: {name}={value}: expected a finite number, not negative")
        if not self.speeds or not all(np.isfinite(s) and s > 0 for s in self.speeds):
            raise PlacementError(f"cluster: speeds={self.speeds}: expected finite positive numbers")
        if self.ranks > MOST_RANKS:
            raise PlacementError(f"cluster: {self.ranks} ranks: at most {MOST_RANKS} can be simulated")

    @property
    def ranks(self) -> int:
        """R."""
        return self.nodes * self.ranks_per_node

    def topology(self) -> Topology:
        """Its links, as if measured."""
        node_of = np.repeat(np.arange(self.nodes), self.ranks_per_node)
        near = node_of[:, None] == node_of
        latency = np.where(near, self.latency_inside, self.latency_across)
        np.fill_diagonal(latency, 0.0)
        return Topology(np.where(near, self.inside, self.across), latency, node_of)

    def speed(self) -> tuple[float, ...]:
        """[R] relative speed of each rank."""
        return tuple(itertools.islice(itertools.cycle(self.speeds), self.ranks))


@dataclass(frozen=True, slots=True)
class Row:
    """One cluster under one placement, predicted.

    Args:
        placement: contiguous, load_only or plan; where a plan was asked for and the cluster is too large for the
            search, load_only is what was predicted and what is named.
        step_seconds, compute_seconds, traffic_seconds: of all MoE layers of a step.
        balancedness, node_balancedness: mean / max speed-weighted load (1 is perfect).
        remote_nodes, remote_ranks: others that a token visits in a layer, mean.
        bytes_across: that a rank's tokens send to other nodes in a step, both ways, a copy a node; bytes_inside: the
            further copies inside nodes, one a rank visited beyond the first of each other node.
        tokens_per_second: of the whole cluster, if the MoE layers were all.
    """

    cluster: Cluster
    placement: str
    step_seconds: float
    compute_seconds: float
    traffic_seconds: float
    balancedness: float
    node_balancedness: float
    remote_nodes: float
    remote_ranks: float
    bytes_across: float
    bytes_inside: float
    tokens_per_second: float


def simulate(
    cluster: Cluster,
    statistics: RoutingStatistics,
    placements: Sequence[str] = ("contiguous", "load_only", "plan"),
    costs: StepCosts | None = None,
    level: str = "node",
    seed: int = 0,
) -> list[Row]:
    """Predict a step on `cluster` under each of `placements`.

    Args:
        costs: figures of the cost model; its speed is taken from the cluster.
        level: node where ranks of a node are balanced inside each step; rank otherwise.

    Returns:
        one row per placement, in order.

    Raises:
        PlacementError: fewer slots than experts, a placement or level that is not known.
    """
    costs = replace(costs or StepCosts(), speed=cluster.speed())
    topology = cluster.topology()
    layers, experts = np.shape(statistics.load)
    slots = cluster.slots_per_rank
    known: dict[str, Callable[[], Placement]] = {
        "contiguous": lambda: contiguous(layers, experts, cluster.ranks, slots),
        "load_only": lambda: load_only(statistics.load, cluster.ranks, slots, topology.node_of),
        "plan": lambda: plan(statistics, topology, slots, level=level, seed=seed, costs=costs),
    }
    out = []
    for name in placements:
        if name not in known:
            raise PlacementError(f"placement={name!r}: allowed are {', '.join(known)}")
        large = name == "plan" and cluster.ranks * (slots or 1) > PLANNED_SLOTS
        chosen = "load_only" if large else name
        p = predict(known[chosen](), statistics, topology, costs, level)
        copies = costs.tokens_per_rank * costs.token_bytes * 2
        across = float(p.remote_nodes.sum()) * copies
        # Copies to other ranks, less those that only pass to another node: at least one rank of each node visited.
        inside = max(float(p.remote_ranks.sum() - p.remote_nodes.sum()), 0.0) * copies
        tokens = cluster.ranks * costs.tokens_per_rank / p.step_seconds if p.step_seconds > 0 else np.inf
        times = p.step_seconds, float(p.compute.sum()), float(p.traffic.sum())
        visits = float(p.remote_nodes.mean()), float(p.remote_ranks.mean())
        even = p.balancedness, p.node_balancedness
        out.append(Row(cluster, chosen, *times, *even, *visits, across, inside, tokens))
    return out


def sweep(
    cluster: Cluster,
    statistics: RoutingStatistics,
    nodes: Sequence[int] = (),
    ranks_per_node: Sequence[int] = (),
    slots_per_rank: Sequence[int | None] = (),
    placements: Sequence[str] = ("plan",),
    costs: StepCosts | None = None,
    level: str = "node",
) -> list[Row]:
    """`simulate` for every combination; an empty sequence keeps the cluster's own value. Raises as `simulate` does."""
    axes = (
        nodes or [cluster.nodes],
        ranks_per_node or [cluster.ranks_per_node],
        slots_per_rank or [cluster.slots_per_rank],
    )
    rows = []
    for n, r, s in itertools.product(*axes):
        one = replace(cluster, nodes=n, ranks_per_node=r, slots_per_rank=s)
        rows += simulate(one, statistics, placements, costs, level)
    return rows


def synthetic(
    layers: int,
    experts: int,
    top_k: int,
    tokens: int = 4096,
    zipf: float = 0.5,
    topics: int = 16,
    focus: float = 2.0,
    seed: int = 0,
) -> RoutingStatistics:
    """Invented routing: experts' popularity falls as rank^-zipf, and tokens of a topic share preferences.

    Args:
        tokens: sampled, and counted. zipf: 0 is even. topics: their shares are drawn from a flat Dirichlet.
        focus: how much a topic's preferences (log-odds, normal, for a third of the experts) weigh; 0 is none.

    Raises:
        PlacementError: sizes that are not positive, top_k above experts, negative zipf or focus.
    """
    if min(layers, experts, top_k, tokens, topics) < 1 or top_k > experts:
        raise PlacementError(
            f"synthetic routing: layers={layers}, experts={experts}, top_k={top_k}, tokens={tokens}, topics={topics}: "
            "expected at least 1 each and top_k at most experts"
        )
    if not (np.isfinite(zipf) and zipf >= 0 and np.isfinite(focus) and focus >= 0):
        raise PlacementError(f"synthetic routing: zipf={zipf}, focus={focus}: expected finite numbers, not negative")
    rng = np.random.default_rng(seed)
    topic = rng.choice(topics, tokens, p=rng.dirichlet(np.ones(topics)))
    sample = np.empty((layers, tokens, top_k), np.int32)
    load = np.empty((layers, experts), np.int64)
    for i in range(layers):
        popular = -zipf * np.log(rng.permutation(experts) + 1.0)
        liking = focus * rng.normal(size=(topics, experts)) * (rng.random((topics, experts)) < 1 / 3)
        odds = popular + liking[topic] + rng.gumbel(size=(tokens, experts))  # the k largest: draws without replacement
        sample[i] = np.argpartition(-odds, top_k - 1, axis=1)[:, :top_k]
        load[i] = np.bincount(sample[i].ravel(), minlength=experts)
    return RoutingStatistics(load, sample=sample)
