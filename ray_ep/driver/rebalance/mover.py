"""The rebalancer's hands: between steps it asks the ranks for samples, has links watched (links.py) and experts moved.

When and whether is decided in rebalance.py and verdict.py. Every call here is made between two steps of the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from transformers import PreTrainedConfig

from ray_ep.config.schema import Config
from ray_ep.driver.rebalance.links import Links, Ranks
from ray_ep.driver.rebalance.rebalancer import Rebalancer, Said
from ray_ep.driver.rebalance.recent import Facts, Recent, Step
from ray_ep.driver.rebalance.verdict import Question, Verdict, room_of
from ray_ep.driver.rundir import RunDir
from ray_ep.errors import BadInput, RankError
from ray_ep.moe import Balance
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.placement.links.groups import groups_of
from ray_ep.placement.planner.survive import check_room
from ray_ep.rank.results import StepResult

LOOK = 100
"""Steps between two looks at slowed links where placement.every is 0 and only imbalance asks."""


class Mover:
    """Rebalancing of one run.

    Args:
        event: tells an operator: kind, message.

    Attributes:
        placement: that the ranks have now.
    """

    def __init__(
        self,
        cfg: Config,
        run: RunDir,
        ranks: Ranks,
        topology: Topology,
        placement: Placement,
        facts: Facts,
        event: Callable[[str, str], None],
    ):
        self.cfg, self.run, self.ranks, self.facts, self.event = cfg, run, ranks, facts, event
        self.placement = placement
        self.rebalancer = Rebalancer(cfg.placement)
        self.recent = Recent(cfg.placement.decay)
        self.level = level_of(cfg, True)
        self.links = Links(ranks, topology, cfg.topology.budget_s, cfg.placement.every or LOOK, run.topology, event)
        self.watched = bool(cfg.topology.measure and (cfg.placement.every or cfg.placement.imbalance))

    @property
    def topology(self) -> Topology:
        """The links as they were measured last."""
        return self.links.topology

    def after_step(self, done: int, results: list[StepResult], seconds: float) -> dict[str, float]:
        """What is due after `done` steps, of which the last took `seconds`.

        Returns:
            metrics: rebalance_seconds, for which the job stood still for all this, and migration_seconds of them.
        """
        began = time.perf_counter()
        step = step_of(results, seconds)
        self.recent.add(step)
        self.level = level_of(self.cfg, Balance(*results[0].usage.balance).layers > 0)
        self._say(*self.rebalancer.stepped(seconds))
        moving = self._answer(done)
        asked = self.run.take_request()
        if self.watched and self.links.changed(done, step):
            self._say(self.rebalancer.links_changed())
        if self.rebalancer.due(done, self._imbalance(), asked):
            self._ask(done)
        return {"migration_seconds": moving, "rebalance_seconds": time.perf_counter() - began}

    def _imbalance(self) -> float:
        """Busiest over mean, where somebody wants to know."""
        if not self.cfg.placement.imbalance:
            return 1.0
        unit = groups_of(self.topology) if self.level == "node" else np.arange(self.topology.num_ranks)
        return self.recent.imbalance(unit.tolist())

    def _answer(self, done: int) -> float:
        """Move if a decision says so; returns the seconds that it took."""
        verdict, said = self.rebalancer.answer()
        self._say(said)
        return 0.0 if verdict is None else self.move(verdict, done)

    def move(self, verdict: Verdict, done: int) -> float:
        """Have the experts moved, after `done` steps; returns the seconds that it took. A refusal is told, and no more.

        Raises:
            RankError: a rank was lost; the others' group is then unusable.
        """
        placement = verdict.placement
        assert placement is not None
        began = time.perf_counter()
        try:
            self.ranks.call("migrate", placement, self.cfg.placement.migration_buffer_mb)
        except BadInput as e:  # every rank has refused: the old placement is whole
            self._say(self.rebalancer.failed(done, f"the move failed: {e}"))
            return time.perf_counter() - began
        except RankError as e:  # as in a step, the run is over; it may go on from here with the old placement
            self._say(self.rebalancer.failed(done, f"the move was broken off: {str(e).splitlines()[0]}"))
            raise
        seconds = time.perf_counter() - began
        self.placement = placement
        self.run.placement(placement)
        self.rebalancer.moved(verdict, done, seconds)
        self.links.moved()
        return seconds

    def _ask(self, done: int) -> None:
        left = self.cfg.optim.steps - done
        if left < 1:
            return
        try:
            question = self._question(left)
        except BadInput as e:
            self._say(self.rebalancer.failed(done, f"no decision: {e}"))
            return
        self.rebalancer.ask(done, question)

    def _question(self, left: int) -> Question:
        """Raises PlacementError: figures that cannot be."""
        cfg, recent = self.cfg.placement, self.recent
        return Question(
            statistics=self._statistics(),
            topology=self.topology,
            current=self.placement,
            slots=room_of(self.placement, cfg.slots_per_rank),
            costs=recent.costs(self.facts),
            level=self.level,
            step_seconds=recent.step_seconds(),
            moe_seconds=recent.moe_seconds(),
            horizon_steps=min(cfg.horizon_steps, left),
            survive_nodes=cfg.survive_nodes,
            seed=self.cfg.seed,
            caution=self.rebalancer.caution,
            slower=self.rebalancer.slower,
        )

    def _statistics(self) -> RoutingStatistics:
        """Decayed loads with the ranks' samples of recent tokens; without those, with pair counts of the whole run."""
        if self.cfg.statistics.sample >= self.topology.num_ranks:
            sample = np.concatenate(self.ranks.call("sample"), axis=1)
            return RoutingStatistics(self.recent.load, sample=sample)
        counted = RoutingStatistics.merge(self.ranks.call("statistics"), 0)
        return RoutingStatistics(self.recent.load, counted.coactivation)

    def _say(self, *said: Said | None) -> None:
        for s in said:
            if s is not None:
                self.event(s.kind, s.message)


def level_of(cfg: Config, balanced: bool) -> str:
    """What plans make even: as configured, or what balance inside the step leaves to them; `balanced`: it is on now."""
    if cfg.placement.level != "auto":
        return cfg.placement.level
    return "node" if balanced and cfg.balance.in_step != "off" else "rank"


def facts_of(cfg: Config, config: PreTrainedConfig, expert_parameters: int, kind: str) -> Facts:
    """What the price of a step and of a move depends on, beside what is measured.

    Args:
        config: of the model. expert_parameters: of one expert. kind: how tokens travel.
    """
    moments = 2 if cfg.optim.kind == "adamw" else int(cfg.optim.beta1 > 0)
    return Facts(
        tokens_per_rank=cfg.batch.sequences * cfg.batch.length // cfg.cluster.ranks,
        hidden=config.get_text_config().hidden_size,
        parameters=expert_parameters,
        item_bytes=2 if cfg.model.dtype == "bfloat16" else 4,
        state_bytes=4 * (1 + moments),  # a float32 master and as many moments
        passes=3 if cfg.model.gradient_checkpointing else 2,
        kind=kind,
    )


def check_survival(cfg: Config, topology: Topology, placement: Placement) -> None:
    """Raise PlacementError unless the nodes that the ranks were given have room for placement.survive_nodes."""
    if cfg.placement.survive_nodes:
        room = np.broadcast_to(room_of(placement, cfg.placement.slots_per_rank), (placement.num_ranks,))
        check_room(np.asarray(room, np.int64), placement.num_experts, topology.node_of, cfg.placement.survive_nodes)


def step_of(results: list[StepResult], seconds: float) -> Step:
    """What the ranks say of a step, rank by rank."""
    usage = [r.usage for r in results]
    return Step(
        load=results[0].load,
        pairs=np.stack([u.pairs for u in usage]),
        experts=np.array([u.expert_seconds for u in usage]),
        exchange=np.array([u.exchange_seconds for u in usage]),
        sent=np.stack([u.sent for u in usage]),
        seconds=seconds,
    )
