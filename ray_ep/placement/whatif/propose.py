"""What another placement would bring to a running job: predicted as its own rebalancer does. Pure; moves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_ep.placement.cost.predict import migration
from ray_ep.placement.placement import Placement
from ray_ep.placement.planner.plan import plan
from ray_ep.placement.planner.verdict import Question, Verdict, judge, predicted


@dataclass(frozen=True, slots=True)
class Proposal:
    """A placement beside the present one.

    Args:
        placement: proposed. verdict: whether a job would move to it, and why; its seconds.
        step_seconds: of a step now.
        moved_slots, moved_primaries: slots that get another expert, experts that get another owner.
        balancedness, predicted_balancedness: mean over maximum predicted load of ranks, now and then.
    """

    placement: Placement
    verdict: Verdict
    step_seconds: float
    moved_slots: int
    moved_primaries: int
    balancedness: float
    predicted_balancedness: float


def misfit(placement: Placement, current: Placement, room: int | Sequence[int] | None) -> str:
    """Why ranks that hold `current` cannot have a placement; "": they may.

    Args:
        room: slots of a rank and layer, one number or one per rank; None: not limited.
    """
    sizes = [(p.num_layers, p.num_experts, p.num_ranks) for p in (placement, current)]
    if sizes[0] != sizes[1]:
        names = ["{} layers x {} experts on {} ranks".format(*size) for size in sizes]
        return f"the placement is for {names[0]}, the run has {names[1]}"
    if room is None:
        return ""
    most, filled = np.broadcast_to(room, (current.num_ranks,)), (placement.slots >= 0).sum(2).max(0)
    for rank in np.flatnonzero(filled > most).tolist():
        return (
            f"the placement fills {filled[rank]} slots of rank {rank}, which has {most[rank]} (a run has room for more "
            "with placement.slots_per_rank)"
        )
    return ""


def propose(q: Question, placement: Placement | None = None) -> Proposal:
    """Predict a placement; None: the one that the planner finds.

    Raises:
        PlacementError: it does not fit the question.
    """
    if placement is None:
        placement = plan(
            q.statistics, q.topology, q.slots, q.current, q.horizon_steps, q.level, q.seed, q.costs, q.survive_nodes
        )
    now, then = (predicted(p, q.statistics, q.topology, q.costs, q.level) for p in (q.current, placement))
    verdict = judge(q, placement, now, then)
    moving = migration(q.current, placement, q.topology, q.costs)
    step = now.step_seconds if q.step_seconds is None else q.step_seconds
    return Proposal(placement, verdict, step, moving.replicas, moving.primaries, now.balancedness, then.balancedness)
