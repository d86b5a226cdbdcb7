"""What a step costs under a placement, predicted: compute, traffic over the measured links, and the price of moving.

The model is alpha-beta: a layer takes as long as its slowest rank computes, plus what its slowest link or its busiest
rank's port takes, both ways (dispatch and combine), a token counted once per destination. Kernels are in dispatch.py.
L layers, E experts, R ranks, N nodes, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.cost.dispatch import deal, simulate
from ray_ep.placement.cost.link_time import busiest
from ray_ep.placement.links.groups import groups_of
from ray_ep.placement.migration import held, moves
from ray_ep.placement.placement import Floats, Ints, Placement
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology

DRAWS = 32768
"""Dispatches of sampled tokens that a layer's prediction plays through."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The figures that the cost model multiplies; the defaults are DeepSeek-V3's layer in bf16 on an H800.

    Args:
        tokens_per_rank: tokens that each rank brings to a layer in a step.
        token_bytes: of one token's hidden state, one way.
        expert_seconds: one token through one expert on a rank of speed 1, forward and backward if the job trains.
        expert_bytes: weights of one expert: what a new replica costs to send.
        optimizer_bytes: master weights and optimizer state of one expert: what a primary costs on top.
        speed: [R] relative compute speed of each rank; None: all 1.
        two_level: one copy a node across nodes, then inside the node; False: one copy a rank; None: the faster.
    """

    tokens_per_rank: int = 4096
    token_bytes: float = 7168 * 2
    expert_seconds: float = 0.22e-6
    expert_bytes: float = 3 * 7168 * 2048 * 2
    optimizer_bytes: float = 3 * 7168 * 2048 * 12
    speed: tuple[float, ...] | None = None
    two_level: bool | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_per_rank", "token_bytes", "expert_seconds", "expert_bytes", "optimizer_bytes"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0:
                raise PlacementError(f"costs: {name}={value}: expected a finite number, not negative")
        if self.speed is not None and not all(np.isfinite(s) and s > 0 for s in self.speed):
            raise PlacementError(f"costs: speed={self.speed}: expected finite positive numbers, one a rank")

    def speeds(self, ranks: int) -> Floats:
        """[R] relative speed; raises PlacementError when their number is not R."""
        if self.speed is None:
            return np.ones(ranks)
        if len(self.speed) != ranks:
            raise PlacementError(f"costs: speed has {len(self.speed)} entries for {ranks} ranks")
        return np.asarray(self.speed, np.float64)


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
    links = Links.of(topology, node_of)
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


def dispatch_layer(
    placement: Placement, layer: int, sample: Ints, node_of: Ints
) -> tuple[Floats, tuple[Floats, Floats]]:
    """part [E, R] of each expert's tokens that a rank computes, and copies (to ranks [R, R], across to nodes [R, N])

    that the mean token of each source rank sends.
    """
    weight = np.zeros((placement.num_experts + 1, placement.num_ranks))
    slots = placement.slots[layer]
    ranks = np.broadcast_to(np.arange(placement.num_ranks)[:, None], slots.shape)
    share = 1.0 if placement.shares is None else placement.shares[layer]
    np.add.at(weight, (slots, ranks), share)
    nodes = int(node_of.max()) + 1
    dealt = deal(sample, placement.num_experts, placement.num_ranks, sources_of(sample, placement.num_ranks))
    part, to_rank, to_node = simulate(dealt, held(placement, layer), weight[:-1], node_of, nodes)
    return part, (to_rank, to_node)


def sources_of(sample: Ints, ranks: int) -> int:
    """Ranks that each sampled token starts from, so that a layer plays DRAWS dispatches through."""
    return int(np.clip(DRAWS // max(len(sample), 1), 1, ranks))


def token_sets(statistics: RoutingStatistics, limit: int = 4096, top_k: int | None = None, seed: int = 0) -> Ints:
    """[L, T, K] expert sets of tokens: the sample, at most `limit` of it, or sets drawn to fit the counts."""
    if statistics.sample is not None and statistics.sample.shape[1]:
        have = statistics.sample.shape[1]
        pick = slice(None) if have <= limit else np.linspace(0, have - 1, limit).astype(np.int64)
        return np.ascontiguousarray(statistics.sample[:, pick], np.int64)
    return _drawn_sets(statistics, min(limit, 2048), top_k, seed)


def _drawn_sets(statistics: RoutingStatistics, tokens: int, top_k: int | None, seed: int) -> Ints:
    """Sets whose experts are drawn one after the other, each in proportion to its counts with those before."""
    load = np.asarray(statistics.load, np.float64)
    layers, experts = load.shape
    pairs = statistics.coactivation
    if top_k is None:
        chosen = load.sum()
        together = 0.0 if pairs is None else float(np.sum(pairs)) - chosen
        top_k = int(np.clip(round(1 + together / max(chosen, 1)), 1, experts))
    rng = np.random.default_rng(seed)
    out = np.empty((layers, tokens, top_k), np.int64)
    rows = np.arange(tokens)
    for layer in range(layers):
        alone = load[layer] + 1e-9 * max(load[layer].max(), 1)
        odds = np.tile(np.log(alone), (tokens, 1))
        for k in range(top_k):
            pick = np.argmax(odds + rng.gumbel(size=odds.shape), axis=1)  # a draw in proportion to exp(odds)
            out[layer, :, k] = pick
            if pairs is not None:
                lift = np.log((pairs[layer] + 1e-3) / np.outer(alone, alone) * alone.sum())
                odds = odds + lift[pick]
            odds[rows, pick] = -np.inf
    return out


@dataclass(frozen=True, slots=True)
class Links:
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
    def of(topology: Topology, node_of: Ints) -> Links:
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
        return Links(slow, ports, cards, np.stack([np.stack(there), np.stack(back)]), latency.max(1), node_of)

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
