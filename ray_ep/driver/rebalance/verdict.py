"""Whether experts should move: a pure function of what was measured; its answer with its reason in words. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_ep.errors import PlacementError
from ray_ep.placement import (
    Placement,
    RoutingStatistics,
    StepCosts,
    Topology,
    migration,
    moves,
    plan,
    predict,
)
from ray_ep.placement.planner.fill import with_layers_of
from ray_ep.placement.planner.replan import WORTH
from ray_ep.placement.planner.survive import survives

LEAST = 0.01
"""A move must promise to shorten the step by this share, for less would be lost in the noise of its measurement."""


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a decision depends on.

    Args:
        slots: of a rank and layer, one number or one per rank.
        step_seconds: what a step takes now; moe_seconds: the expert layers of it, on the rank where they take longest.
        horizon_steps: within which a move must pay back.
        caution: how many times over; 1 until a move measured worse than it promised.
        slower: how many times longer than predicted moves have taken so far.
    """

    statistics: RoutingStatistics
    topology: Topology
    current: Placement
    slots: int | Sequence[int]
    costs: StepCosts
    level: str
    step_seconds: float
    moe_seconds: float
    horizon_steps: int
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

    The cost model prices the expert layers alone. Its difference between two placements is what a move gains; what a
    step takes now is measured, and no more can be gained than the expert layers were measured to take.

    Raises:
        PlacementError: statistics, topology, costs and placement that do not fit one another; too few slots.
    """
    new = plan(
        q.statistics, q.topology, q.slots, q.current, q.horizon_steps, q.level, q.seed, q.costs, q.survive_nodes
    )  # fmt: skip
    if (q.current.slots < 0).any() and not q.survive_nodes:
        new = _without_idle(q, new)
    found = moves(q.current, new)
    if not found:
        return Verdict(None, f"stay: no other places are worth a move (step {_ms(q.step_seconds)})", q.step_seconds)
    before, after = (
        predict(p, q.statistics, q.topology, q.costs, q.level).step_seconds for p in (q.current, new)
    )  # fmt: skip
    gain = (before - after) * min(1.0, q.moe_seconds / before if before > 0 else 1.0)
    links = migration(q.current, new, q.topology, q.costs).seconds
    cost = links * q.slower
    then = q.step_seconds - gain
    verdict = Verdict(new, "", then, gain, cost, links)
    step = f"predicted step {_ms(q.step_seconds, then)}"
    count = f"{len(found)} expert{'s' * (len(found) != 1)}"
    lost = bool(q.survive_nodes) and not survives(q.current, q.topology.node_of, q.survive_nodes)
    if lost and survives(new, q.topology.node_of, q.survive_nodes):
        why = f"so that every expert outlives {q.survive_nodes} lost node(s)"
        return _with(verdict, f"move {count}: {step}, costs {_s(cost)}, {why}")
    if gain < LEAST * q.caution * q.step_seconds:
        least = f"less than the {LEAST * q.caution:.0%} that a move must promise"
        return _with(verdict, f"stay: to move {count} would gain too little: {step}, {least}{_careful(q)}", stays=True)
    steps = cost / gain
    if steps * q.caution > q.horizon_steps:
        within = f"must within {q.horizon_steps / q.caution:.0f} steps{_careful(q)}"
        words = f"stay: to move {count} does not pay back: {step}, costs {_s(cost)}, pays back in {steps:.0f} steps"
        return _with(verdict, f"{words}, {within}", stays=True)
    return _with(verdict, f"move {count}: {step}, costs {_s(cost)}, pays back in {max(steps, 1):.0f} steps")


def _without_idle(q: Question, new: Placement) -> Placement:
    """The plan, layers that gain next to nothing as they are: no slot is worth filling for its own sake."""
    now, then = (predict(p, q.statistics, q.topology, q.costs, q.level) for p in (q.current, new))
    least = (1 - WORTH) * (now.compute + now.traffic)
    return with_layers_of(q.current, new, then.compute + then.traffic >= least)


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


def _with(v: Verdict, words: str, stays: bool = False) -> Verdict:
    return Verdict(None if stays else v.placement, words, v.step_seconds, v.gain, v.cost, v.links)


def _careful(q: Question) -> str:
    return f" ({q.caution:g} times as much as usual, since a move did not keep its promise)" if q.caution > 1 else ""


def _ms(*seconds: float) -> str:
    """212 -> 171 ms, with as many digits as tell them apart."""
    digits = 0 if min(seconds) >= 0.1 else 1 if min(seconds) >= 0.01 else 2
    return " -> ".join(f"{1e3 * s:.{digits}f}" for s in seconds) + " ms"


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.2g} ms"
