"""Whether experts should move: the one judge, for running jobs and for `ray-ep plan`, its answer with its reason.

Pure: a function of what was measured and predicted. When to ask, and the moving, are others' work. L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.predict import Prediction, migration, predict
from ray_ep.placement.migration import moves
from ray_ep.placement.placement import Placement
from ray_ep.placement.planner.fill import with_layers_of
from ray_ep.placement.planner.plan import plan
from ray_ep.placement.planner.replan import WORTH
from ray_ep.placement.planner.survive import survives
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology

LEAST_GAIN = 0.01
"""Share of a step's time. A move that promises to shorten the step by less stays undone: the noise of measuring the
step hides it."""


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a decision depends on.

    Args:
        slots: of a rank and layer, one number or one per rank; None: just enough for every expert.
        horizon_steps: within which a move must pay back.
        step_seconds: what a step takes now; moe_seconds: the expert layers of it, on the rank where they take longest.
            None: nothing was measured, a step is taken to be its expert layers as they are predicted.
        caution: how many times over; 1 until a move measured worse than it promised.
        slower: how many times longer than predicted moves have taken so far.
    """

    statistics: RoutingStatistics
    topology: Topology
    current: Placement
    slots: int | Sequence[int] | None
    costs: StepCosts
    level: str
    horizon_steps: float
    step_seconds: float | None = None
    moe_seconds: float | None = None
    survive_nodes: int = 0
    seed: int = 0
    caution: float = 1.0
    slower: float = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer.

    Args:
        placement: to move to; None: stay.
        words: why.
        step_seconds: predicted of a step then. gain: predicted, a step. cost: predicted seconds of the move.
        links: of `cost`, what the links alone should take.
    """

    placement: Placement | None
    words: str
    step_seconds: float
    gain: float = 0.0
    cost: float = 0.0
    links: float = 0.0


def decide(q: Question) -> Verdict:
    """Plan, predict, price, and move only where that pays back.

    Raises:
        PlacementError: statistics, topology, costs and placement that do not fit one another; too few slots.
    """
    new = plan(
        q.statistics, q.topology, q.slots, q.current, q.horizon_steps, q.level, q.seed, q.costs, q.survive_nodes
    )  # fmt: skip
    return judge(q, new, *(predicted(p, q.statistics, q.topology, q.costs, q.level) for p in (q.current, new)))


def predicted(
    placement: Placement, statistics: RoutingStatistics, topology: Topology, costs: StepCosts, level: str
) -> Prediction:
    """What decisions go by: `predict`, and of counts alone, without token sets, the compute of a step alone."""
    found = predict(placement, statistics, topology, costs, level)
    return found if statistics.tells_visits else found.of_compute_alone()


def judge(q: Question, new: Placement, now: Prediction, then: Prediction) -> Verdict:
    """Whether to move to a placement: what it gains against what moving takes, within the horizon.

    The cost model prices the expert layers alone. Its difference between two placements is what a move gains; what a
    step takes now is measured, and no more can be gained than the expert layers were measured to take.

    Args:
        now, then: `predicted` of the current placement and of the new one.

    Raises:
        PlacementError: placements that are not of one model on the topology's ranks.
    """
    if (q.current.slots < 0).any() and not q.survive_nodes:
        new, then = _without_idle(q.current, new, now, then)
    step = now.step_seconds if q.step_seconds is None else q.step_seconds
    moe = now.step_seconds if q.moe_seconds is None else q.moe_seconds
    found = moves(q.current, new)
    if not found:
        return Verdict(None, f"stay: no other places are worth a move (step {_milliseconds(step)})", step)
    before = now.step_seconds
    gain = (before - then.step_seconds) * min(1.0, moe / before if before > 0 else 1.0)
    links = migration(q.current, new, q.topology, q.costs).seconds
    cost = links * q.slower
    verdict = Verdict(new, "", step - gain, gain, cost, links)
    change = f"predicted step {_milliseconds(step, step - gain)}"
    count = f"{len(found)} expert{'s' * (len(found) != 1)}"
    lost = bool(q.survive_nodes) and not survives(q.current, q.topology.node_of, q.survive_nodes)
    if lost and survives(new, q.topology.node_of, q.survive_nodes):
        why = f"so that every expert outlives {q.survive_nodes} lost node(s)"
        return replace(verdict, words=f"move {count}: {change}, costs {_seconds(cost)}, {why}")
    if gain < LEAST_GAIN * q.caution * step:
        least = f"less than the {LEAST_GAIN * q.caution:.0%} that a move must promise"
        words = f"stay: to move {count} would gain too little: {change}, {least}{_careful(q)}"
        return replace(verdict, placement=None, words=words)
    steps = pays_back(cost, gain)
    if steps * q.caution > q.horizon_steps:
        most = q.horizon_steps / q.caution
        within = f"must within {most:.{0 if most >= 1 else 6}f} steps{_careful(q)}"
        back = f"costs {_seconds(cost)}, pays back in {_steps(steps)}"
        words = f"stay: to move {count} does not pay back: {change}, {back}, {within}"
        return replace(verdict, placement=None, words=words)
    return replace(verdict, words=f"move {count}: {change}, costs {_seconds(cost)}, pays back in {_steps(steps)}")


def pays_back(cost: float, gain: float) -> float:
    """Steps after which the seconds that a move takes are won back at `gain` seconds a step; inf: never."""
    return cost / gain if gain > 0 else float("inf")


def _without_idle(
    current: Placement, new: Placement, now: Prediction, then: Prediction
) -> tuple[Placement, Prediction]:
    """The plan, layers that gain next to nothing as they are: no slot is worth filling for its own sake."""
    kept = then.compute + then.traffic >= (1 - WORTH) * (now.compute + now.traffic)
    compute, traffic = (np.where(kept, a, b) for a, b in ((now.compute, then.compute), (now.traffic, then.traffic)))
    return with_layers_of(current, new, kept), replace(then, compute=compute, traffic=traffic)


def room_of(current: Placement, slots_per_rank: int) -> int | list[int]:
    """Slots that a plan may fill: as configured, or (0) as many of each rank as it fills in its fullest layer now.

    Raises:
        PlacementError: a placement of no layers.
    """
    if slots_per_rank:
        return slots_per_rank
    if not current.num_layers:
        raise PlacementError("a placement without layers has no slots")
    return [int(n) for n in (current.slots >= 0).sum(2).max(0)]


def _careful(q: Question) -> str:
    return f" ({q.caution:g} times as much as usual, since a move did not keep its promise)" if q.caution > 1 else ""


def _milliseconds(*seconds: float) -> str:
    """212 -> 171 ms, with as many digits as tell them apart."""
    digits = next((n for n, least in enumerate((0.1, 0.01, 1e-3)) if min(seconds) >= least), 4)
    return " -> ".join(f"{1e3 * s:.{digits}f}" for s in seconds) + " ms"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.2g} ms"


def _steps(steps: float) -> str:
    return f"{max(steps, 1):.0f} steps"
