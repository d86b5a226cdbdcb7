"""What a step under a placement would take, and what a change of placement costs: one predictor for everybody.

The model is alpha-beta: a layer takes as long as its slowest rank computes, plus what its slowest link or its busiest
rank's port takes, both ways (dispatch and combine), a token counted once per destination. Kernels are in dispatch.py.
L layers, E experts, R ranks, N nodes, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.cost.dispatch import dispatch_layer
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.links import LinkSeconds
from ray_ep.placement.cost.sets import token_sets
from ray_ep.placement.links.groups import groups_of
from ray_ep.placement.migration import moves
from ray_ep.placement.placement import Floats, Placement
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted step under a placement.

    Args:
        compute: [L] seconds of the slowest rank (or of the slowest node, its ranks even).
        traffic: [L] seconds of dispatch and combine.
        rank_load: [L, R] tokens that each rank computes in a step.
        remote_nodes: [L] other nodes that a token visits, mean. remote_ranks: [L] other ranks.
        balancedness: mean over layers of speed-weighted mean rank load / max (1 is perfect).
        node_balancedness: the same for nodes.
    """

    compute: Floats
    traffic: Floats
    rank_load: Floats
    remote_nodes: Floats
    remote_ranks: Floats
    balancedness: float
    node_balancedness: float
    step_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_seconds", float(self.compute.sum() + self.traffic.sum()))

    def of_compute_alone(self) -> Prediction:
        """The same without what only token sets tell: no traffic counted, visits not a number."""
        unknown = np.full(len(self.compute), np.nan)
        return replace(self, traffic=np.zeros(len(self.compute)), remote_nodes=unknown, remote_ranks=unknown)


def predict(
    placement: Placement,
    statistics: RoutingStatistics,
    topology: Topology,
    costs: StepCosts | None = None,
    level: str = "rank",
) -> Prediction:
    """Predict the expert layers' part of a step.

    Tokens start evenly on all ranks and go to the nearest replica (see `Placement.routes`). Loads come from
    `statistics.load`; traffic from its sampled token sets, or sets drawn to fit its counts where there is no sample.

    Args:
        level: rank: the slowest rank holds the layer up; node: ranks of a node are balanced inside the step.

    Raises:
        PlacementError: placement, statistics and topology do not fit one another.
    """
    costs = costs or StepCosts()
    check_fit(placement, statistics, topology)
    if level not in ("rank", "node"):
        raise PlacementError(f"level={level!r}: allowed are rank and node")
    ranks, layers = placement.num_ranks, placement.num_layers
    speed = costs.speeds(ranks)
    node_of = groups_of(topology)
    links = LinkSeconds.of(topology, node_of)
    sample = token_sets(statistics)
    compute, traffic, nodes, others = np.zeros(layers), np.zeros(layers), np.zeros(layers), np.zeros(layers)
    rank_load = np.zeros((layers, ranks))
    even, node_even = np.ones(layers), np.ones(layers)
    node_speed = np.bincount(node_of, speed)
    for i in range(layers):
        part, copies = dispatch_layer(placement, i, sample[i], node_of)
        chosen = statistics.load[i].sum()
        rank_load[i] = statistics.load[i] @ part / max(chosen, 1) * sample.shape[2] * ranks * costs.tokens_per_rank
        by_rank = rank_load[i] / speed
        by_node = np.bincount(node_of, rank_load[i]) / node_speed
        compute[i] = (by_rank if level == "rank" else by_node).max() * costs.expert_seconds
        traffic[i] = links.seconds(copies, costs)
        nodes[i] = copies[1].sum() / ranks
        others[i] = copies[0].sum() / ranks
        fair = rank_load[i].sum() / speed.sum()
        if fair > 0:
            even[i], node_even[i] = fair / by_rank.max(), fair / by_node.max()
    mean = (float(even.mean()), float(node_even.mean())) if layers else (1.0, 1.0)
    return Prediction(compute, traffic, rank_load, nodes, others, *mean)


def check_fit(placement: Placement, statistics: RoutingStatistics, topology: Topology) -> None:
    """Raise PlacementError unless the three are of one model and one cluster."""
    have = (placement.num_layers, placement.num_experts)
    if have != np.shape(statistics.load):
        layers, experts = np.shape(statistics.load)
        raise PlacementError(
            f"the placement is for {have[0]} layers x {have[1]} experts, the statistics for {layers} x {experts}"
        )
    if placement.num_ranks != topology.num_ranks:
        raise PlacementError(f"the placement has {placement.num_ranks} ranks, the topology {topology.num_ranks}")


@dataclass(frozen=True, slots=True)
class Migration:
    """What changing placements moves.

    Args:
        replicas: (layer, rank, expert) that arrive with weights alone. primaries: owners that change, whose optimizer
            state travels too.
        slots: filled slots of the new placement.
        seconds: of the rank that sends or receives longest.
    """

    replicas: int
    primaries: int
    slots: int
    seconds: float

    @property
    def moved(self) -> float:
        """Share of slots whose expert is new on its rank."""
        return self.replicas / max(self.slots, 1)


def migration(old: Placement, new: Placement, topology: Topology, costs: StepCosts | None = None) -> Migration:
    """Price a change of placement (see migration.moves): weights of arriving replicas, state of new primaries.

    Raises:
        PlacementError: the placements are not of one model on the topology's ranks.
    """
    costs = costs or StepCosts()
    slow = 1.0 / topology.bandwidth
    sent, received = np.zeros(new.num_ranks), np.zeros(new.num_ranks)
    found = moves(old, new, slow)
    for m in found:
        size = m.weights * costs.expert_bytes + m.state * costs.optimizer_bytes
        seconds = size * slow[m.source, m.target] + topology.latency[m.source, m.target]
        sent[m.source] += seconds
        received[m.target] += seconds
    replicas, primaries = sum(m.weights for m in found), sum(m.state for m in found)
    seconds = float(np.maximum(sent, received).max(initial=0.0))
    return Migration(replicas, primaries, int((new.slots >= 0).sum()), seconds)
