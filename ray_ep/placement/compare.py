"""Placements side by side under one routing and one cluster: predicted times, balance, traffic, what moves. Pure NumPy.

L layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.baselines import contiguous, random
from ray_ep.placement.cost.dispatch import dispatch_layer
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.predict import Migration, Prediction, migration
from ray_ep.placement.cost.sets import token_sets
from ray_ep.placement.links.groups import groups_of
from ray_ep.placement.placement import Floats, Placement
from ray_ep.placement.planner.load_only import load_only
from ray_ep.placement.planner.plan import plan
from ray_ep.placement.planner.survive import Price, price
from ray_ep.placement.planner.verdict import Question, Verdict, judge, predicted
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology

PLAN, CURRENT = "plan", "current"
"""Names of the two candidates that the others are compared with."""
FREE = "unprotected"
"""Name of the plan that need not outlive lost nodes, where the other must: safety's price is their difference."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is planned for.

    Args:
        slots: of a rank and layer, one number or one per rank; None: just enough for every expert.
        level: node or rank, what must be even; see `plan`.
        survive_nodes: nodes that the plan must be able to lose; see `plan`.
        free_slots: as `slots`, of the plan that need not.
    """

    statistics: RoutingStatistics
    topology: Topology
    slots: int | Sequence[int] | None
    level: str
    horizon_steps: float
    costs: StepCosts
    seed: int = 0
    survive_nodes: int = 0
    free_slots: int | Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run's steps took lately: step_seconds, and moe_seconds of them in the expert layers."""

    step_seconds: float
    moe_seconds: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement and what is predicted of it; `moving` from what it is compared with, None for that itself."""

    name: str
    placement: Placement
    prediction: Prediction
    moving: Migration | None
    moving_bytes: float


def candidates(case: Case, current: Placement | None) -> dict[str, Placement]:
    """The current placement (if any), contiguous, random, load-only (EPLB's kind) and the plan, by name.

    Where the plan must survive the loss of nodes, also one that need not.

    Raises:
        PlacementError: see `plan`.
    """
    layers, experts = case.statistics.load.shape
    ranks = case.topology.num_ranks
    found = {} if current is None else {CURRENT: current}
    found["contiguous"] = contiguous(layers, experts, ranks, case.slots)
    found["random"] = random(layers, experts, ranks, case.slots, case.seed)
    found["load-only"] = load_only(case.statistics.load, ranks, case.slots, case.topology.node_of)
    rest = current, case.horizon_steps, case.level, case.seed, case.costs
    if case.survive_nodes:
        found[FREE] = plan(case.statistics, case.topology, case.free_slots, *rest)
    found[PLAN] = plan(case.statistics, case.topology, case.slots, *rest, case.survive_nodes)
    return found


def compare(case: Case, placements: Mapping[str, Placement], now: str) -> list[Candidate]:
    """Predict each of the placements, and the move to it from the one named `now`.

    Raises:
        PlacementError: a name that is not there, placements that do not fit the case.
    """
    if now not in placements:
        raise PlacementError(f"compare: no placement {now!r}: allowed are {', '.join(placements)}")
    found = []
    for name, placement in placements.items():
        prediction = predicted(placement, case.statistics, case.topology, case.costs, case.level)
        moving = None if name == now else migration(placements[now], placement, case.topology, case.costs)
        size = 0.0 if moving is None else moving_bytes(moving, case.costs)
        found.append(Candidate(name, placement, prediction, moving, size))
    return found


def moving_bytes(moving: Migration, costs: StepCosts) -> float:
    """Weights of arriving replicas and optimizer state of changed owners."""
    return moving.replicas * costs.expert_bytes + moving.primaries * costs.optimizer_bytes


def question(case: Case, current: Placement, measured: Measured | None = None) -> Question:
    """What a running job would ask of the case."""
    step, moe = (None, None) if measured is None else (measured.step_seconds, measured.moe_seconds)
    return Question(
        case.statistics, case.topology, current, case.slots, case.costs, case.level, case.horizon_steps, step, moe,
        case.survive_nodes, case.seed,
    )  # fmt: skip


def verdict(case: Case, found: Sequence[Candidate], now: str, measured: Measured | None = None) -> Verdict:
    """Whether to move from the candidate named `now` to the plan: the answer that a running job would come to."""
    by_name = {c.name: c for c in found}
    old, new = by_name[now], by_name[PLAN]
    return judge(question(case, old.placement, measured), new.placement, old.prediction, new.prediction)


def safety(case: Case, placements: Mapping[str, Placement]) -> Price | None:
    """What it costs that the plan survives the loss of nodes; None where it need not."""
    if not case.survive_nodes:
        return None
    found = price(placements[PLAN], placements[FREE], case.statistics, case.topology, case.costs, case.level)
    return found if case.statistics.tells_visits else replace(found, remote_nodes=None, step_seconds=None)


def link_bytes(case: Case, placement: Placement) -> Floats:
    """[R, R] bytes that a rank (row) sends to another in a step's dispatches, all layers, one copy a destination rank;

    the results take the same way back.
    """
    node_of = groups_of(case.topology)
    sets = token_sets(case.statistics)
    total = np.zeros((placement.num_ranks, placement.num_ranks))
    for layer in range(placement.num_layers):
        total += dispatch_layer(placement, layer, sets[layer], node_of)[1][0]
    np.fill_diagonal(total, 0.0)
    return total * case.costs.tokens_per_rank * case.costs.token_bytes
