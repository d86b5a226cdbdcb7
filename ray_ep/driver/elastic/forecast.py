"""What a step would take on another number of ranks, predicted by the planner for the run's own routing and links.

Pure; the answer is computed beside the steps. The same simulation stands behind `ray-ep simulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from ray_ep.driver.rebalance.rebalancer import beside
from ray_ep.errors import PlacementError
from ray_ep.placement import slots_needed
from ray_ep.placement.planner.verdict import Question
from ray_ep.placement.whatif.simulate import Given, simulate
from ray_ep.rank.results import StepResult
from ray_ep.rank.step.clock import STEP_PHASES

MEASURED = 25
"""Steps on the same ranks before one is predicted: as many as tell how fast each is."""
EVERY = 50
"""Steps between two predictions: the load changes slowly."""
LAYERS = 8
"""MoE layers that are predicted at most, evenly spaced: they stand for all."""

_FIXED = ("reduce", "norm", "update", "publish", "rest")
"""Phases that ranks do not share out: each sums over, and updates, the whole dense part."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a prediction depends on beside the planner's question.

    Args:
        fixed_s: of a step, what more ranks do not make shorter. node: of a rank more, as topologies number nodes.
    """

    question: Question
    fixed_s: float
    node: int


def fixed_seconds(results: Sequence[StepResult], seconds: float) -> float:
    """Of a step that took `seconds`, what more ranks do not make shorter: phases in which none shares, the driver's."""
    phases = np.mean([r.usage.phases for r in results], 0)
    kept = sum(float(phases[STEP_PHASES.index(name)]) for name in _FIXED)
    return kept + max(seconds - float(phases.sum()), 0.0)


def next_node(free: Mapping[str, int], where: Sequence[str], node_of: Sequence[int]) -> int:
    """Node of a rank more, as topologies number nodes: the one of the run's with most room, else a new one.

    Args:
        free: how many more ranks each node has room for. where, node_of: [R] node of each rank, by id and by number.
    """
    number = dict(zip(where, node_of, strict=True))
    ours = [node for node in free if node in number]
    return number[max(ours, key=lambda node: free[node])] if ours else max(node_of) + 1


def predicted(outlook: Outlook, counts: Collection[int]) -> dict[int, float]:
    """Seconds of a step on each of these numbers of ranks, and on the present one; {}: nothing is known to go by.

    The expert layers change as the planner predicts them, on the links that are known; what is neither theirs nor fixed
    is shared out evenly.

    Args:
        counts: the present number, one more, or fewer, whose last ranks go.

    Raises:
        PlacementError: figures that do not fit one another.
    """
    q = outlook.question
    now = q.topology.num_ranks
    step, moe = q.step_seconds, q.moe_seconds
    if step is None or moe is None or not q.costs.expert_seconds:
        return {}
    layers = {n: _layers(outlook, n) for n in {now, *counts} if n > 0}
    if not layers[now] > 0:
        return {}
    shared = max(step - moe - outlook.fixed_s, 0.0)
    return {n: step - moe - shared + shared * now / n + moe * s / layers[now] for n, s in layers.items()}


def _layers(outlook: Outlook, ranks: int) -> float:
    """Seconds of the expert layers of a step on so many ranks."""
    q = outlook.question
    now = q.topology.num_ranks
    stay, come = min(ranks, now), max(ranks - now, 0)
    node_of = [*q.topology.node_of.tolist()[:stay], *[outlook.node] * come]
    topology = q.topology.among([*range(stay), *[-1] * come], node_of)
    speed = None if q.costs.speed is None else (*q.costs.speed[:stay], *(1.0,) * come)
    costs = replace(q.costs, tokens_per_rank=q.costs.tokens_per_rank * now // ranks)
    experts = q.current.num_experts
    slots = max(q.slots, slots_needed(experts, ranks)) if isinstance(q.slots, int) else None
    cluster = Given(topology, speed, slots)
    (row,) = simulate(cluster, q.statistics, ("plan",), costs, q.level, q.seed, LAYERS)
    return row.step_seconds


class Forecast:
    """Predictions of a run whose ranks stay who they are, made one at a time beside the steps.

    Attributes:
        step_seconds: the newest, by number of ranks; empty: none yet.
    """

    def __init__(
        self, background: Callable[[Callable[[], dict[int, float]]], Future[dict[int, float]]] = beside
    ) -> None:
        self._background = background
        self.forget()

    def forget(self) -> None:
        """The ranks are others now."""
        self.step_seconds: Mapping[int, float] = {}
        self._asked: Future[dict[int, float]] | None = None
        self._steps, self._due = 0, MEASURED

    def stepped(self) -> bool:
        """One step is made; whether a prediction is due."""
        self._steps += 1
        if self._asked is not None and self._asked.done():
            answer, self._asked = self._asked, None
            error = answer.exception()
            if error is not None and not isinstance(error, PlacementError):
                raise error
            self.step_seconds = {} if error is not None else answer.result()
        return self._asked is None and self._steps >= self._due

    def ask(self, outlook: Outlook, counts: Collection[int]) -> None:
        """Begin a prediction."""
        self._due = self._steps + EVERY
        self._asked = self._background(lambda: predicted(outlook, counts))
