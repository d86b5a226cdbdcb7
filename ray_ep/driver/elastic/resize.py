"""Ranks come and go between two steps: newcomers are prepared beside the steps, leavers hand over, then all switch.

Who is to come or go, and when, is elastic.py's. What follows from a loss meanwhile is recovery's. R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from omegaconf import OmegaConf

from ray_ep.config.schema import Config
from ray_ep.driver.actors.cluster import transports
from ray_ep.driver.actors.newcomers import Newcomer, Stage
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.actors.reach import try_nodes
from ray_ep.driver.forming import Formed, choice_on, placement_for, reads_of, ways_on
from ray_ep.driver.rebalance.mover import facts_of
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import checkpoint_url
from ray_ep.driver.start import Plan
from ray_ep.driver.states import State, States
from ray_ep.errors import LostError, PlacementError
from ray_ep.placement import Placement, Topology

PARTS = ("hand_over", "regroup", "give", "move")
"""Of a switch: a snapshot arrives, and leavers' experts go to others; the group is formed; newcomers get what every
rank has; experts move."""
ANSWER_S = 60.0
"""How long the node of a newcomer may take for its first files."""


class Resizer:
    """Newcomers on their way, and the switch between two steps.

    Args:
        moved: told the placement that the present ranks have once leavers have handed over.
        publish: tells an operator. clock: seconds.
    """

    def __init__(
        self,
        cfg: Config,
        plan: Plan,
        ranks: Ranks,
        states: States,
        moved: Callable[[Placement], None],
        publish: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.cfg, self.plan, self.ranks = cfg, plan, ranks
        self.states, self.moved, self.publish, self.clock = states, moved, publish, clock
        self._took: dict[str, float] = {}
        self._corpus: Any = None  # where every newcomer finds it
        ranks.newcomers.prepare = self._prepared

    @property
    def took(self) -> dict[str, float]:
        """Seconds of each of PARTS of the last switch."""
        return self._took

    @property
    def waiting(self) -> int:
        """Ranks that were asked for and have no room yet."""
        return self.ranks.newcomers.count(Stage.WAITING)

    @property
    def joining(self) -> int:
        """Ranks that have room and start, or build their model."""
        return self.ranks.newcomers.count(Stage.STARTING, Stage.TRYING, Stage.BUILDING)

    @property
    def ready(self) -> int:
        """Ranks that the next switch takes in."""
        return self.ranks.newcomers.count(Stage.READY)

    def ask(self, count: int) -> None:
        """Ask the cluster for room for so many ranks more; returns at once. Soon after a failure it asks for none."""
        self.ranks.ask(count)

    def withdraw(self, count: int | None = None) -> None:
        """Give up so many newcomers, those that are least far first; None: all."""
        self.ranks.newcomers.withdraw(count)

    def avoid(self, nodes: Collection[str]) -> None:
        """From now on ask for room on none of these nodes."""
        self.ranks.avoid(nodes)

    def poll(self) -> None:
        """Let newcomers go on, between steps; those that failed are gone, and told."""
        for why in self.ranks.newcomers.poll():
            self.publish(Event("newcomer", why))

    def switch(self, now: Formed, leave: Collection[int], load: np.ndarray) -> Formed:
        """Ranks `leave` hand over what they own and go, all that are ready come in; what the run goes on with.

        Args:
            load: [L, E] of recent steps, to plan by; empty: not known.

        Raises:
            LostError: a rank was lost, or they cannot go on together. Recovery goes on from `now`, with the placement
                that `moved` was told last.
            PlacementError: the others have no room for what leavers own; nothing has changed.
        """
        began, before = self.clock(), self.ranks.membership
        self.states.to(State.RESIZING, f"{self.ready} ranks come and {len(leave)} go after step {now.done}")
        self.ranks.end_snapshot()
        if leave:
            try:
                now = self._handed_over(now, leave, load)
            except PlacementError as e:
                self.states.to(State.STEPPING, f"nobody leaves: {e}")
                raise
            self.moved(now.placement)
        handed = self.clock()
        come = self.ranks.newcomers.take()
        self.ranks.lose(leave, come)
        members = self.ranks.membership
        ways = ways_on(self.cfg, self.ranks, now.choice)
        self.ranks.join(self.cfg.cluster.collective_timeout_s, ways, bool(self.cfg.snapshot.every))
        joined = self.clock()
        origin = members.origin(before)
        topology = now.topology.among(origin, members.node_of)
        placement = replace(now.placement.among(origin), version=now.placement.version + 1)
        try:
            self.ranks.regroup(placement, topology, members.fresh(before))
        except PlacementError as e:  # the group of before is gone: recovery forms another one
            raise LostError(0, f"ranks could not go on together in epoch {members.epoch}: {e}", ()) from e
        given = self.clock()
        placement = self._spread(placement, topology, load)
        choice = choice_on(self.cfg, self.ranks, now.choice, now.done)
        facts = facts_of(self.cfg, self.plan.config, self.plan.expert_parameters, choice.kind, members.size)
        ends = handed, joined, given, self.clock()
        starts = began, *ends
        self._took = {part: end - start for part, start, end in zip(PARTS, starts, ends, strict=False)}
        return Formed(members, topology, placement, choice, facts, now.done)

    def _spread(self, placement: Placement, topology: Topology, load: np.ndarray) -> Placement:
        """Experts move to ranks that came; the placement then, the one of before where these have no room for them."""
        better = placement_for(self.cfg, placement, topology, load)
        if better is None:
            return placement
        try:
            self.ranks.migrate(better, self.cfg.placement.migration_buffer_mb)
        except PlacementError as e:
            self.publish(Event("newcomer", f"experts stay where they are, and ranks that came hold none: {e}"))
            return placement
        return better

    def _handed_over(self, now: Formed, leave: Collection[int], load: np.ndarray) -> Formed:
        """What leavers own moves to the others, on the group that all are in; their statistics, too."""
        stay = [rank for rank in range(now.membership.size) if rank not in leave]
        if not stay:
            raise PlacementError("every rank is to leave: nobody would be left")
        topology = now.topology.among(stay, [now.membership.node_of[rank] for rank in stay])
        heirs = {gone: number % len(stay) for number, gone in enumerate(sorted(leave))}
        placement = now.placement.primaries().among(stay, heirs)
        placement = placement_for(self.cfg, placement, topology, load) or placement
        back = [stay.index(rank) if rank in stay else -1 for rank in range(now.membership.size)]
        placement = replace(placement.among(back), version=now.placement.version + 1)
        self.ranks.migrate(placement, self.cfg.placement.migration_buffer_mb)
        self.ranks.bequeath(leave, stay[0])
        return replace(now, placement=placement)

    def _prepared(self, newcomer: Newcomer) -> Any:
        """Try the node of a newcomer, and have it build its model; the call."""
        usable: list[str] = ray.get(newcomer.actor.transports.remote(), timeout=ANSWER_S)
        transports(self.cfg.exchange.transport, self.ranks.device, [usable])
        try_nodes(_Alone(newcomer), checkpoint_url(self.cfg, self.plan.run), reads_of(self.cfg))
        if self._corpus is None:
            self._corpus = ray.put(self.plan.corpus)
        cfg, placement = OmegaConf.to_container(self.cfg), self.plan.placement
        shape = placement.num_layers, placement.num_experts
        return newcomer.actor.prepare.remote(cfg, self.plan.config, self._corpus, *shape)


class _Alone:
    """One newcomer as `try_nodes` asks ranks."""

    def __init__(self, newcomer: Newcomer):
        self.where, self._actor = [newcomer.where], newcomer.actor

    def reach(self, trial: object) -> list[list[str]]:
        """What its node cannot read or write, in words."""
        found: list[list[str]] = [ray.get(self._actor.reach.remote(trial, 0), timeout=ANSWER_S)]
        return found
