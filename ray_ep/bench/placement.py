"""`ray-ep bench placement`: the planner beside contiguous, random and load-only placements on routing not seen before.

Routing is drawn, a function of the seed: tokens of a topic like the same experts, and the mix of topics drifts. Plans
see the first window of tokens; figures are those of `predict` on the next one, which no plan saw. Links are fast inside
nodes (450 GB/s) and slow across (50 GB/s), as H800 nodes. Also how long planning the balance inside a step takes.
L layers, E experts, K top_k, R ranks, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

from ray_ep.errors import BadInput
from ray_ep.placement import (
    Placement,
    RoutingStatistics,
    StepCosts,
    StepRules,
    Topology,
    balance_step,
    contiguous,
    load_only,
    migration,
    plan,
    predict,
    random,
)
from ray_ep.placement.cost.predict import Prediction
from ray_ep.placement.in_step import rules as step
from ray_ep.placement.placement import Floats, Ints
from ray_ep.placement.planner.plan import warm

T = TypeVar("T")

WINDOW, SAMPLED = 8192, 4096
"""Tokens of a window, and how many of them are kept as sampled sets."""
TOPICS, LIKED = 24, 0.35
"""Kinds of tokens, and the share of the experts that a kind has feelings about."""
GUESTS, STEPS = 16, 20
"""Guests that a rank has room for, and times that balancing a layer is timed."""
INSIDE, ACROSS = 450e9, 50e9
"""Bytes per second between ranks of a node, and of different ones."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's layers and the cluster that they are placed on; groups: of experts, for the load-only balancer."""

    layers: int
    experts: int
    top_k: int
    nodes: int
    ranks_per_node: int
    slots: int
    groups: int = 8

    @property
    def ranks(self) -> int:
        """R."""
        return self.nodes * self.ranks_per_node


SHAPES = {
    "v3-32": Shape(8, 256, 8, 4, 8, 9),
    "v3-64": Shape(8, 256, 8, 8, 8, 5),
    "qwen-16": Shape(8, 128, 8, 4, 4, 10),
    "mixtral-8": Shape(8, 8, 2, 4, 2, 2, 4),
    "v3-64-whole": Shape(58, 256, 8, 8, 8, 5),
    "v3-256": Shape(8, 256, 8, 32, 8, 2),
    "v3-1024": Shape(8, 256, 8, 128, 8, 1),
    "olmoe-8": Shape(8, 64, 8, 1, 8, 8, 1),
}
"""Models and clusters that are planned for, by the name that --shape takes."""

SLOW_RANKS = {"none": "all ranks alike", "spread": "each fourth rank", "node": "the first quarter of the ranks"}
"""Which ranks compute slower, by the name that --slow takes."""


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """One placement's figures.

    Args:
        remote_nodes, remote_ranks: others that a token visits. balancedness, node_balancedness: mean load / max.
        step_seconds: predicted. seconds: that planning took, wall, the best of the repeats. moved: share of slots
            whose expert is new on its rank, replans only. kept: of a fresh plan's gain over the stale one, on the
            tokens that were planned for; None where nothing drifted.
    """

    shape: str
    seed: int
    name: str
    remote_nodes: float
    remote_ranks: float
    balancedness: float
    node_balancedness: float
    step_seconds: float
    seconds: float
    moved: float | None = None
    kept: float | None = None

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def line(self) -> str:
        """For the table."""
        end = "" if self.moved is None else f"{self.moved:8.3f}"
        end += "" if self.kept is None else f"{self.kept:8.2f}"
        return (
            f"{self.shape:12} {self.seed:4} {self.name:24} {self.remote_nodes:8.3f} {self.remote_ranks:8.3f} "
            f"{self.node_balancedness:8.3f} {self.balancedness:8.3f} {self.step_seconds * 1e3:9.2f} {self.seconds:8.3f}"
            f"{end}"
        )


@dataclass(frozen=True, slots=True)
class Balanced:
    """The balance inside a step on the experts' contiguous places: means over layers.

    Args:
        before, after: slowest rank's time over the mean, without and with it. guests: a layer, all ranks together.
        milliseconds: that `balance_step` takes for a layer, the median layer's best.
    """

    shape: str
    seed: int
    before: float
    after: float
    guests: float
    milliseconds: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def line(self) -> str:
        """For below the table."""
        return (
            f"{self.shape:12} {self.seed:4} balance inside a step: {self.milliseconds:.3f} ms a layer, slowest rank "
            f"{self.before:.2f} times the mean before, {self.after:.3f} after, {self.guests:.1f} guests"
        )


TITLE = (
    f"{'shape':12} {'seed':>4} {'placement':24} {'remote':>8} {'remote':>8} {'balanced':>8} {'balanced':>8} "
    f"{'step':>9} {'planned':>8} {'moved':>7} {'kept':>7}\n"
    f"{'':42} {'nodes':>8} {'ranks':>8} {'nodes':>8} {'ranks':>8} {'ms':>9} {'s':>8}"
)
"""Head of the table."""


def trace(shape: Shape, seed: int, windows: int, drift: float) -> Ints:
    """[L, windows * WINDOW, K] expert sets; all windows but the first take `drift` of their tokens from another mix."""
    rng = np.random.default_rng(seed)
    mix, other = rng.dirichlet(np.full(TOPICS, 0.5)), rng.dirichlet(np.full(TOPICS, 0.5))
    later = (1 - drift) * mix + drift * other
    topic = np.concatenate([rng.choice(TOPICS, WINDOW, p=mix), rng.choice(TOPICS, (windows - 1) * WINDOW, p=later)])
    out = np.empty((shape.layers, len(topic), shape.top_k), np.int32)
    for layer in range(shape.layers):
        liking = rng.normal(0, 2, (TOPICS, shape.experts)) * (rng.random((TOPICS, shape.experts)) < LIKED)
        score = rng.normal(0, 0.5, shape.experts) + liking[topic] + rng.gumbel(0, 0.6, (len(topic), shape.experts))
        out[layer] = np.argpartition(-score, shape.top_k, axis=1)[:, : shape.top_k]
    return out.astype(np.int64)


def statistics(sets: Ints, experts: int) -> RoutingStatistics:
    """Loads of sets [L, T, K], and the first of them as the sample."""
    load = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in sets])
    return RoutingStatistics(load, sample=sets[:, :SAMPLED].astype(np.int32))


def cluster(shape: Shape) -> Topology:
    """Nodes of equal ranks."""
    node_of = np.repeat(np.arange(shape.nodes), shape.ranks_per_node)
    bandwidth = np.where(node_of[:, None] == node_of, INSIDE, ACROSS)
    return Topology(bandwidth, np.zeros_like(bandwidth), node_of)


def speeds(shape: Shape, slow: str) -> Floats:
    """[R] 1, and 0.5 for the quarter that `slow` names; raises BadInput."""
    if slow not in SLOW_RANKS:
        raise BadInput(f"bench placement: --slow={slow}: allowed are {', '.join(SLOW_RANKS)}")
    speed = np.ones(shape.ranks)
    if slow == "spread":
        speed[::4] = 0.5
    elif slow == "node":
        speed[: shape.ranks // 4] = 0.5
    return speed


def run_placement(
    name: str, seed: int = 7, drift: float = 0.15, slow: str = "none", repeats: int = 2
) -> Iterator[PlacementRow]:
    """Rows of one shape, as they are ready: each planner, then replans at both levels.

    Raises:
        BadInput: a shape or a kind of slow ranks that is not there, drift that is no share.
    """
    shape = _shape(name)
    if not 0 <= drift <= 1:
        raise BadInput(f"bench placement: --drift={drift}: expected a share from 0 to 1")
    costs, topology = StepCosts(speed=tuple(speeds(shape, slow))), cluster(shape)
    warm()
    sets = trace(shape, seed, 2, drift)
    seen, later = statistics(sets[:, :WINDOW], shape.experts), statistics(sets[:, WINDOW:], shape.experts)
    size = shape.layers, shape.experts, shape.ranks, shape.slots

    def row(what: str, level: str, make: Callable[[], Placement]) -> tuple[PlacementRow, Placement]:
        placement, seconds = _timed(make, repeats)
        p = predict(placement, later, topology, costs, level)
        figures = float(p.remote_nodes.mean()), float(p.remote_ranks.mean()), p.balancedness, p.node_balancedness
        return PlacementRow(name, seed, f"{what}, {level}", *figures, p.step_seconds, seconds), placement

    def load_only_in(groups: int) -> Placement:
        return load_only(seen.load, shape.ranks, shape.slots, topology.node_of, groups)

    for level in ("node", "rank"):
        yield row("contiguous", level, lambda: contiguous(*size))[0]
        yield row("random", level, lambda: random(*size, seed=seed))[0]
        yield row("load-only", level, lambda: load_only_in(1))[0]
        if shape.groups % shape.nodes == 0 and shape.experts % shape.groups == 0:
            yield row("load-only by groups", level, lambda: load_only_in(shape.groups))[0]

        def planned(s: RoutingStatistics, now: Placement | None = None, level: str = level) -> Placement:
            return plan(s, topology, shape.slots, now, level=level, costs=costs)

        first, old = row("plan", level, lambda: planned(seen))
        yield first
        for what, s in (("replan, same tokens", seen), ("replan, drift", later)):
            found, new = row(what, level, lambda s=s, old=old: planned(s, old))  # type: ignore[misc]
            moved = migration(old, new, topology, costs).moved
            kept = None if s is seen else _kept([predict(p, s, topology, costs, level) for p in (old, new, planned(s))])
            yield PlacementRow(**{**asdict(found), "moved": moved, "kept": kept})


def run_balance(name: str, seed: int = 7, drift: float = 0.15, slow: str = "none") -> Balanced:
    """Time `balance_step` for inference on the tokens of one window, as many from each rank.

    Raises:
        BadInput: as `run_placement`.
    """
    shape, costs = _shape(name), StepCosts()
    sets = trace(shape, seed, 1, drift)
    placement, topology = contiguous(shape.layers, shape.experts, shape.ranks, shape.slots), cluster(shape)
    seconds, found, took = costs.expert_seconds / speeds(shape, slow), [], []
    step.warm()
    for layer in range(shape.layers):
        sizes = costs.expert_bytes, seconds, costs.token_bytes
        rules = StepRules.of(placement, layer, topology, *sizes, guest_slots=GUESTS, training=False)
        parts = np.array_split(sets[layer], shape.ranks)
        counts = np.stack([np.bincount(p.ravel(), minlength=shape.experts) for p in parts])
        counts = counts * round(costs.tokens_per_rank / len(parts[0]))
        plan_, best = _timed(lambda counts=counts, rules=rules: balance_step(counts, rules), STEPS)  # type: ignore[misc]
        found.append((plan_.before, plan_.after, len(plan_.guests)))
        took.append(best)
    before, after, guests = np.mean(found, axis=0).tolist()
    return Balanced(name, seed, before, after, guests, float(np.median(took)) * 1e3)


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise BadInput(f"bench placement: --shape={name}: allowed are {', '.join(SHAPES)}")
    return SHAPES[name]


def _kept(predictions: list[Prediction]) -> float | None:
    """Share of the gain from the stale placement to the fresh one that the replan has; None where there is none."""
    stale, new, fresh = (p.step_seconds for p in predictions)
    return None if fresh >= stale else (stale - new) / (stale - fresh)


def _timed(make: Callable[[], T], repeats: int) -> tuple[T, float]:
    """What `make` gives, and the least wall seconds that it took."""
    best = float("inf")
    for _ in range(max(repeats, 1)):
        start = time.perf_counter()
        found = make()
        best = min(best, time.perf_counter() - start)
    return found, best
