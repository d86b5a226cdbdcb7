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
from ray_ep.placement.baselines import contiguous, slots_needed
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.memory import SnapshotMemory
from ray_ep.placement.cost.predict import Prediction, predict
from ray_ep.placement.placement import Placement
from ray_ep.placement.planner.load_only import load_only
from ray_ep.placement.planner.plan import plan
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.whatif.clusters import Cluster, Given

__all__ = ["Cluster", "Given", "Row", "grid", "simulate", "spread", "sweep", "synthetic"]

PLANNED_SLOTS = 2048
"""Slots of a layer up to which the planner's search (quadratic in slots) is run; beyond, load is balanced alone."""


@dataclass(frozen=True, slots=True)
class Row:
    """One cluster under one placement, predicted.

    Args:
        placement: contiguous, load_only or plan; where a plan was asked for and the cluster is too large for the
            search, load_only is what was predicted and what is named.
        step_seconds, compute_seconds, traffic_seconds: of all MoE layers of a step.
        balancedness, node_balancedness: mean / max speed-weighted load (1 is perfect).
        remote_nodes, remote_ranks: others that a token visits in a layer, mean; NaN, as bytes are, of counts alone:
            then a step is its compute.
        bytes_across: that a rank's tokens send to other nodes in a step, both ways, a copy a node; bytes_inside: the
            further copies inside nodes, one a rank visited beyond the first of each other node.
        tokens_per_second: of the whole cluster, if the MoE layers were all.
        memory_bytes: of the fullest rank, for weights of its slots and optimizer state of the experts it owns.
        snapshot_bytes: host memory that snapshots take of the rank that holds most; 0: none are taken.
        tokens_per_rank: that each rank brings to a step.
        slots_per_rank: of a layer.
    """

    cluster: Cluster | Given
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
    memory_bytes: float
    snapshot_bytes: float
    tokens_per_rank: float
    slots_per_rank: int


def simulate(
    cluster: Cluster | Given,
    statistics: RoutingStatistics,
    placements: Sequence[str] = ("contiguous", "load_only", "plan"),
    costs: StepCosts | None = None,
    level: str = "node",
    seed: int = 0,
    most_layers: int | None = None,
    snapshots: SnapshotMemory | None = None,
) -> list[Row]:
    """Predict a step on `cluster` under each of `placements`.

    Args:
        costs: figures of the cost model; its speed is taken from the cluster.
        level: node where ranks of a node are balanced inside each step; rank otherwise.
        most_layers: of more layers, so many are predicted, evenly spaced, and stand for all; None: all are.
        snapshots: that a run takes of what `costs.optimizer_bytes` counts; None: as by default, of experts alone.

    Returns:
        one row per placement, in order.

    Raises:
        PlacementError: fewer slots than experts, a placement or level that is not known.
    """
    costs = replace(costs or StepCosts(), speed=cluster.speed())
    topology = cluster.topology()
    nodes = topology.node_of.tolist()
    stand_for = len(statistics.load)
    statistics = spread(statistics, most_layers)
    layers, experts = np.shape(statistics.load)
    if not layers:
        raise PlacementError("statistics: no layers to simulate")
    stand_for /= layers
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
        large = name == "plan" and cluster.ranks * (slots or slots_needed(experts, cluster.ranks)) > PLANNED_SLOTS
        chosen = "load_only" if large else name
        placement = known[chosen]()
        p = predict(placement, statistics, topology, costs, level)
        if not statistics.tells_visits:
            p = p.of_compute_alone()
        kept = (snapshots or SnapshotMemory()).most(placement, nodes, costs.optimizer_bytes * stand_for)
        out.append(_row(cluster, chosen, placement, p, costs, stand_for, kept))
    return out


def _row(
    cluster: Cluster | Given,
    name: str,
    placement: Placement,
    p: Prediction,
    costs: StepCosts,
    stand_for: float,
    snapshot_bytes: float,
) -> Row:
    """`stand_for`: layers of the model to a predicted one."""
    copies = costs.tokens_per_rank * costs.token_bytes * 2 * stand_for
    across = float(p.remote_nodes.sum()) * copies
    # Copies to other ranks, less those that only pass to another node: at least one rank of each node visited.
    inside = max(float(p.remote_ranks.sum() - p.remote_nodes.sum()), 0.0) * copies
    compute, traffic = float(p.compute.sum()) * stand_for, float(p.traffic.sum()) * stand_for
    step = compute + traffic
    filled = (placement.slots >= 0).sum((0, 2))
    owned = np.bincount(placement.owner.ravel(), minlength=cluster.ranks)
    memory = float((filled * costs.expert_bytes + owned * costs.optimizer_bytes).max()) * stand_for
    return Row(
        cluster,
        name,
        step,
        compute,
        traffic,
        p.balancedness,
        p.node_balancedness,
        float(p.remote_nodes.mean()),
        float(p.remote_ranks.mean()),
        across,
        inside,
        cluster.ranks * costs.tokens_per_rank / step if step > 0 else np.inf,
        memory,
        snapshot_bytes,
        costs.tokens_per_rank,
        placement.slots.shape[2],
    )


def spread(statistics: RoutingStatistics, most_layers: int | None) -> RoutingStatistics:
    """At most `most_layers` layers, evenly spaced, first and last among them; raises PlacementError below 1."""
    if most_layers is None or most_layers >= len(statistics.load):
        return statistics
    if most_layers < 1:
        raise PlacementError(f"most_layers={most_layers}: expected at least 1")
    pick = np.round(np.linspace(0, len(statistics.load) - 1, most_layers)).astype(np.int64)
    pairs, sample = statistics.coactivation, statistics.sample
    return RoutingStatistics(
        statistics.load[pick],
        None if pairs is None else pairs[pick],
        sample=None if sample is None else sample[pick],
    )


def grid(
    cluster: Cluster,
    nodes: Sequence[int] = (),
    ranks_per_node: Sequence[int] = (),
    slots_per_rank: Sequence[int | None] = (),
) -> list[Cluster]:
    """The cluster in every combination of sizes; an empty sequence keeps its own. Raises as `Cluster` does."""
    axes = (
        nodes or [cluster.nodes],
        ranks_per_node or [cluster.ranks_per_node],
        slots_per_rank or [cluster.slots_per_rank],
    )
    return [replace(cluster, nodes=n, ranks_per_node=r, slots_per_rank=s) for n, r, s in itertools.product(*axes)]


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
    rows = []
    for one in grid(cluster, nodes, ranks_per_node, slots_per_rank):
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
