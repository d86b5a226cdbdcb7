"""The rebalancer's hands: between steps it asks the ranks for samples, has links watched (links.py) and experts moved.

When is decided in rebalancer.py, whether in placement.planner.verdict. Every call is made between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedConfig

from ray_ep.config.schema import Config, PlacementConfig
from ray_ep.driver.rebalance.links import Links
from ray_ep.driver.rebalance.rebalancer import Rebalancer, verdict_figures
from ray_ep.driver.rebalance.recent import Facts, MeasuredStep, Recent
from ray_ep.driver.records import Event
from ray_ep.driver.requests import Request, Why
from ray_ep.driver.run.standing import Cause, placement_event
from ray_ep.driver.states import State, States
from ray_ep.errors import BadInput, RankError
from ray_ep.moe import Balance
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.placement.cost.memory import state_bytes
from ray_ep.placement.links.groups import groups_of
from ray_ep.placement.planner.survive import check_room
from ray_ep.placement.planner.verdict import Question, Verdict, room_of
from ray_ep.placement.whatif.propose import misfit
from ray_ep.rank.results import StepResult

LOOK = 100
"""Steps between two looks at slowed links where placement.every is 0 and only imbalance asks."""


class MovingRanks(Protocol):
    """Of the driver's ranks what is used here."""

    def migrate(self, placement: Placement, buffer_mb: float) -> None:
        """Have the experts moved. Raises BadInput: every rank has refused, nothing has changed."""

    def sample(self) -> np.ndarray[Any, Any]:
        """[L, N, K] expert sets of the ranks' reservoirs of recent tokens."""

    def statistics(self) -> list[RoutingStatistics]:
        """Routing statistics of each rank since its making."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The part of a run's configuration that decisions depend on.

    Args:
        placement: its section.
        steps: of the whole run: none beyond them pays a move back.
        sample: tokens of the ranks' reservoirs, all together. seed: of the planner.
        in_step: balance inside the step, as configured.
    """

    placement: PlacementConfig
    steps: int
    sample: int
    seed: int
    in_step: str

    @staticmethod
    def of(cfg: Config) -> Scope:
        """That of a whole configuration."""
        return Scope(cfg.placement, cfg.optim.steps, cfg.statistics.sample, cfg.seed, cfg.balance.in_step)


class Mover:
    """Rebalancing of one run under one membership.

    Args:
        keep: is given each placement that the ranks have moved to.
        publish: tells an operator.

    Attributes:
        placement: that the ranks have now.
        asked: somebody wants a decision after the next step.
        askers: requests that a decision answers, when it is made.
    """

    def __init__(
        self,
        scope: Scope,
        ranks: MovingRanks,
        links: Links,
        placement: Placement,
        facts: Facts,
        states: States,
        keep: Callable[[Placement], None],
        publish: Callable[[Event], None],
    ):
        self.scope, self.ranks, self.links, self.facts, self.states = scope, ranks, links, facts, states
        self.placement, self.keep, self.publish = placement, keep, publish
        self.rebalancer = Rebalancer(scope.placement)
        self.recent = Recent(scope.placement.decay)
        self.level = level_of(scope, True)
        self.asked = False
        self.askers: list[Request] = []
        self._heard = 0  # of the askers, those whom the decision under way answers

    @property
    def topology(self) -> Topology:
        """The links as they were measured last."""
        return self.links.topology

    def after_step(self, done: int, results: list[StepResult], seconds: float) -> tuple[float, float]:
        """What is due after `done` steps, of which the last took `seconds`.

        Returns:
            seconds that a move took, and those for which the job stood still for all this, the move included.

        Raises:
            RankError: a rank was lost meanwhile.
        """
        began = time.perf_counter()
        step = step_of(results, seconds)
        self.recent.add(step)
        self.level = level_of(self.scope, Balance(*results[0].usage.balance).layers > 0)
        self._say(*self.rebalancer.stepped(seconds))
        moving = self._answer(done)
        asked, self.asked = self.asked, False
        if self.links.changed(done, step):
            self._say(self.rebalancer.links_changed())
        if self.rebalancer.due(done, self._imbalance(), asked):
            self._ask(done)
        return moving, time.perf_counter() - began

    def ask(self, *requests: Request) -> None:
        """Decide after the next step, beside the steps, and answer these."""
        asking = [r for r in requests if r.begin()]
        self.askers += asking
        self.asked = self.asked or bool(asking)

    def apply(self, placement: Placement, done: int, by: str, verdict: Verdict | None) -> tuple[str, Why | None]:
        """Have experts moved to a placement of somebody's, after `done` steps; what came of it.

        Args:
            verdict: what was predicted of it; None: nothing could be.

        Raises:
            RankError: as `move`.
        """
        if why := misfit(placement, self.placement, room_of(self.placement, self.scope.placement.slots_per_rank)):
            return why, Why.NEVER
        if _same(placement, self.placement):
            return f"version {self.placement.version} is that placement: nothing moves", None
        predicted = verdict or Verdict(None, "nothing could be predicted of it", 0.0)
        new = replace(placement, version=self.placement.version + 1)
        forced = replace(predicted, placement=new, words=f"move, as {by} asked; the planner says: {predicted.words}")
        figures = {"asked_after": done, "reason": f"asked by {by}", **verdict_figures(forced)}
        self._say(Event("rebalance", forced.words, figures))
        self.rebalancer.outdated("experts have moved as somebody asked")
        self.move(forced, done, Cause.ASKED)
        if self.placement is not new:
            return "the ranks refused it: the event `rebalance` says why; the placement is as it was", Why.FAILED
        return f"experts have moved to version {new.version}; the planner says: {predicted.words}", None

    def _imbalance(self) -> float:
        """Busiest over mean, where somebody wants to know."""
        if not self.scope.placement.imbalance:
            return 1.0
        unit = groups_of(self.topology) if self.level == "node" else np.arange(self.topology.num_ranks)
        return self.recent.imbalance(unit.tolist())

    def _answer(self, done: int) -> float:
        """Move if a decision says so; returns the seconds that it took."""
        verdict, said = self.rebalancer.answer()
        self._say(said)
        seconds = 0.0 if verdict is None else self.move(verdict, done)
        if said is not None and not self.rebalancer.wants:  # else its question did not hold: another one follows
            moved = verdict is None or self.placement is verdict.placement
            self._tell(said.words, None if "moves" in said.fields and moved else Why.FAILED)
        return seconds

    def _tell(self, words: str, refused: Why | None) -> None:
        """Answer whom the decision under way answers."""
        heard, self.askers, self._heard = self.askers[: self._heard], self.askers[self._heard :], 0
        for request in heard:
            request.tell(words, refused)

    def move(self, verdict: Verdict, done: int, cause: Cause = Cause.REBALANCE) -> float:
        """Have the experts moved, after `done` steps; returns the seconds that it took. A refusal is told, and no more.

        Raises:
            RankError: a rank was lost; the others' group is then unusable, the state stays at migrating.
        """
        placement = verdict.placement
        assert placement is not None
        began = time.perf_counter()
        try:
            with self.states.during(State.MIGRATING, f"placement version {placement.version} after step {done}"):
                refused = self._refusal(placement)
        except RankError as e:  # it may go on from here with the old placement
            self._say(self.rebalancer.failed(done, f"the move was broken off: {str(e).splitlines()[0]}"))
            raise
        seconds = time.perf_counter() - began
        if refused:
            self._say(self.rebalancer.failed(done, f"the move failed: {refused}"))
            return seconds
        self.placement = placement
        self.keep(placement)
        self.publish(placement_event(placement, cause, verdict.words))
        self.rebalancer.moved(verdict, done, seconds)
        self.links.moved()
        return seconds

    def _refusal(self, placement: Placement) -> str:
        """Move; why the ranks would not, empty if they have. Every rank refuses: the old placement is whole then."""
        try:
            self.ranks.migrate(placement, self.scope.placement.migration_buffer_mb)
        except BadInput as e:
            return str(e)
        return ""

    def _ask(self, done: int) -> None:
        left = self.scope.steps - done
        self._heard = len(self.askers)
        if left < 1:
            self._tell("no step is left for which experts could move", Why.NOT_NOW)
            return
        try:
            question = self.question(left)
        except BadInput as e:
            self._say(self.rebalancer.failed(done, f"no decision: {e}"))
            self._tell(f"no decision: {e}", Why.FAILED)
            return
        self.rebalancer.ask(done, question)

    def question(self, left: int) -> Question:
        """What a decision depends on now, with so many steps left; asks the ranks for samples.

        Raises:
            PlacementError: figures that cannot be. LostError: a rank was lost meanwhile.
        """
        cfg, recent = self.scope.placement, self.recent
        costs, slots = recent.costs(self.facts), room_of(self.placement, cfg.slots_per_rank)
        if costs.speed is not None and isinstance(slots, int):  # a replica on a slow rank may hold all others up
            slots = [slots] * self.topology.num_ranks
        return Question(
            statistics=self._statistics(),
            topology=self.topology,
            current=self.placement,
            slots=slots,
            costs=costs,
            level=self.level,
            step_seconds=recent.step_seconds(),
            moe_seconds=recent.moe_seconds(),
            horizon_steps=min(cfg.horizon_steps, left),
            survive_nodes=cfg.survive_nodes,
            seed=self.scope.seed,
            caution=self.rebalancer.caution,
            slower=self.rebalancer.slower,
        )

    def _statistics(self) -> RoutingStatistics:
        """Decayed loads with the ranks' samples of recent tokens; without those, with pair counts of the whole run."""
        load: np.ndarray[Any, Any] = self.recent.load
        if self.scope.sample >= self.topology.num_ranks:
            return RoutingStatistics(load, sample=self.ranks.sample())
        return RoutingStatistics(load, RoutingStatistics.merge(self.ranks.statistics(), 0).coactivation)

    def _say(self, *said: Event | None) -> None:
        for event in said:
            if event is not None:
                self.publish(event)


def look_every(cfg: Config) -> int:
    """Steps between two looks at slowed links; 0: none are watched, for nothing would be made of what is found."""
    watched = cfg.topology.measure and (cfg.placement.every or cfg.placement.imbalance)
    return (cfg.placement.every or LOOK) if watched else 0


def level_of(scope: Scope, balanced: bool) -> str:
    """What plans make even: as configured, or what balance inside the step leaves to them; `balanced`: it is on now."""
    if scope.placement.level != "auto":
        return scope.placement.level
    return "node" if balanced and scope.in_step != "off" else "rank"


def facts_of(cfg: Config, config: PreTrainedConfig, expert_parameters: int, kind: str, ranks: int) -> Facts:
    """What the price of a step and of a move depends on, beside what is measured.

    Args:
        config: of the model. expert_parameters: of one expert. kind: how tokens travel. ranks: how many there are.
    """
    return Facts(
        tokens_per_rank=cfg.batch.sequences * cfg.batch.length // ranks,
        hidden=config.get_text_config().hidden_size,
        parameters=expert_parameters,
        item_bytes=2 if cfg.model.dtype == "bfloat16" else 4,
        state_bytes=state_bytes(cfg.optim.kind, cfg.optim.beta1),
        passes=3 if cfg.model.gradient_checkpointing else 2,
        kind=kind,
    )


def check_survival(cfg: PlacementConfig, topology: Topology, placement: Placement) -> None:
    """Raise PlacementError unless the nodes that the ranks were given have room for placement.survive_nodes."""
    if cfg.survive_nodes:
        room = np.broadcast_to(room_of(placement, cfg.slots_per_rank), (placement.num_ranks,))
        check_room(np.asarray(room, np.int64), placement.num_experts, topology.node_of, cfg.survive_nodes)


def _same(a: Placement, b: Placement) -> bool:
    """Whether every slot, owner and share is the same."""
    shares = [np.ones(1) if p.shares is None else p.shares for p in (a, b)]
    pairs = ((a.slots, b.slots), (a.owner, b.owner), (shares[0], shares[1]))
    return all(np.array_equal(x, y) for x, y in pairs)


def step_of(results: list[StepResult], seconds: float) -> MeasuredStep:
    """What the ranks say of a step, rank by rank."""
    usage = [r.usage for r in results]
    return MeasuredStep(
        load=results[0].load,
        pairs=np.stack([u.pairs for u in usage]),
        experts=np.array([u.expert_seconds for u in usage]),
        exchange=np.array([u.exchange_seconds for u in usage]),
        sent=np.stack([u.sent for u in usage]),
        seconds=seconds,
    )
