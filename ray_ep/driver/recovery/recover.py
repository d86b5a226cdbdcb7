"""Survivors of a loss form the next epoch, come to one step and are planned anew; if one more is lost, from the start.

What they come to is decided in decide.py. Every call is made between two steps. R ranks, E experts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedConfig

from ray_ep.collective import Membership
from ray_ep.config.schema import Config
from ray_ep.driver.forming import Formed, choice_on, placement_for, ways_on
from ray_ep.driver.rebalance.mover import facts_of
from ray_ep.driver.rebalance.recent import Facts
from ray_ep.driver.records import Event
from ray_ep.driver.recovery.decide import Decision, Survivor, Taken, decide
from ray_ep.driver.recovery.departures import Departures
from ray_ep.driver.run.saving import shelf_of
from ray_ep.driver.start import Plan
from ray_ep.errors import LostError, PlacementError, RankError
from ray_ep.moe import Choice
from ray_ep.placement import Placement, Topology, contiguous, slots_needed
from ray_ep.rank.data.corpus import Corpus
from ray_ep.rank.snapshot.copies import Key
from ray_ep.rank.snapshot.on_disk import Shelf
from ray_ep.rank.snapshot.restore import Rewind

JOIN_S = 10.0
"""Seconds that survivors wait for each other: they are all there, and have just said so."""

MOST_ATTEMPTS = 3
"""How often a round is tried again in which nobody was lost; a loss more is another matter."""

log = logging.getLogger("ray_ep.driver")


class SurvivingRanks(Protocol):
    """Of the driver's ranks what recovery asks for; the calls' own words are in actors/ranks.py."""

    membership: Membership
    where: list[dict[str, Any]]
    device: str

    def transports(self) -> list[list[str]]:
        """Transports that each rank's process could use."""

    def lose(self, lost: tuple[int, ...]) -> None:
        """Go on without these."""

    def states(self) -> dict[str, Survivor]:
        """What each member says of itself."""

    def settle(self, finish: int | None) -> None:
        """Half steps are finished or forgotten."""

    def join(self, timeout_s: float, transports: list[str], snapshots: bool, limit_s: float) -> None:
        """Form the group of the membership."""

    def regroup(self, placement: Placement, topology: Topology, fresh: tuple[int, ...] = ()) -> None:
        """On over it, each with what it has, `fresh` ones with what every rank has."""

    def restore(self, to: Rewind) -> None:
        """Back to a snapshot, and on over it."""

    def publish(self) -> None:
        """Replicas get their primaries' weights."""

    def migrate(self, placement: Placement, buffer_mb: float) -> None:
        """Experts move."""

    def build(
        self, cfg: Config, config: PreTrainedConfig, corpus: Corpus, placement: Placement, topology: Topology
    ) -> None:
        """Build the model anew."""

    def load(self, url: str, step: int) -> None:
        """Take on a checkpoint."""

    def choose_exchange(self, step: int) -> Choice:
        """The fastest way to exchange, timed anew."""

    def snapshot(self, step: int, shelf: Shelf | None) -> str:
        """Copy what each owns, to disk, too, if there is a shelf; why the one before is not there."""


class Recovery:
    """What a run needs to go on after a loss: snapshots, and what to do then.

    Args:
        newest: directory and step of the newest checkpoint, if there is one.
        publish: tells an operator. clock: seconds.
        departures: counts lost ranks, too.
    """

    def __init__(
        self,
        cfg: Config,
        plan: Plan,
        ranks: SurvivingRanks,
        newest: Callable[[], tuple[str, int] | None],
        publish: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
        departures: Departures | None = None,
    ):
        self.cfg, self.plan, self.ranks, self.newest = cfg, plan, ranks, newest
        self.publish, self.clock, self.departures = publish, clock, departures or Departures()
        self.snapshots: list[Taken] = []
        self._shelf = shelf_of(cfg, plan)
        self._since: float | None = None  # recovered, and no step was made yet
        self._told: list[tuple[str, dict[str, Any]]] = []  # of each recovery since the last step: words, fields
        self._tried = (-1, 0)  # a step, and how often nobody was lost in it

    @property
    def fresh(self) -> bool:
        """Whether the run goes on from a loss, and no step was made yet."""
        return bool(self._told)

    def due(self, done: int) -> bool:
        """Whether a snapshot is to be taken after `done` steps."""
        every, newest = self.cfg.snapshot.every, self.snapshots[-1].key if self.snapshots else None
        if not every or (self.ranks.membership.size < 2 and self._shelf is None):
            return False
        fresh = newest is not None and newest.epoch == self.ranks.membership.epoch
        return not fresh or (newest is not None and done >= newest.step + every)

    def take(self, done: int, placement: Placement) -> None:
        """Have a snapshot taken of the state after `done` steps.

        Raises:
            LostError: a rank was lost, or what was sent before did not arrive.
        """
        members = self.ranks.membership
        if why := self.ranks.snapshot(done, self._shelf):
            self.publish(Event("snapshot-not-on-disk", f"{why}; the run goes on, the next snapshot tries again"))
        # That the one before has arrived is known now, so nothing older is of use.
        self.snapshots = [*self.snapshots[-1:], Taken(Key(members.epoch, done), members, placement)]

    def stepped(self) -> None:
        """A step is made: of recoveries before it everything is known now, and told."""
        for words, fields in self._told:
            took = {**fields["seconds"], "first_step": self.clock() - (self._since or 0.0)}
            each = ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in took.items())
            self.publish(Event("recovered", f"{words} (seconds: {each})", {**fields, "seconds": took}))
        self._told.clear()

    def recover(self, error: LostError, now: Formed, load: np.ndarray) -> Formed:
        """Go on with those that are left; what they go on with. It is told after their first step (`stepped`).

        Args:
            now: what the run went on with before the loss; `done` are the steps behind it. Members that are not in
                it, since they were lost or the others were while these came, are given what every rank has.
            load: [L, E] of recent steps, to plan by; empty: not known.

        Raises:
            RankError: nobody can go on, and why.
        """
        before, lost, go_back = now.membership, error.lost, False
        there = zip(self.ranks.membership.members, self.ranks.where, strict=True)
        node_of = {member: where["node"] for member, where in there}
        self._check_tries(error, now.done)
        while True:
            self._check_room(error, lost)
            began = self.clock()
            self.ranks.lose(lost)
            try:
                survivors = {m: said for m, said in self.ranks.states().items() if m in before.members}
                found = decide(before, now.placement, survivors, self.snapshots, go_back)
                if isinstance(found, str):
                    found = self._from_checkpoint(error, found)
                go_back = go_back or found.snapshot is not None
                formed, seconds = self._carried_out(found, before, now, load, began)
            except LostError as again:  # of those that were left
                log.warning("recovery lost=%s why=%r", again.lost, str(again).splitlines()[0])
                lost = again.lost
                self._check_tries(again, now.done)
            except PlacementError as e:  # some had moved experts already, when others had not
                if go_back:
                    raise RankError(error.rank, f"{error}\nno snapshot fits: {e}") from error
                lost, go_back = (), True
            else:
                self._note(error, found, node_of, now.done, {"detect": error.silent_s, **seconds})
                return formed

    def _carried_out(
        self, decision: Decision, before: Membership, now: Formed, load: np.ndarray, began: float
    ) -> tuple[Formed, dict[str, float]]:
        """Have the survivors do it; the seconds of each part."""
        cfg, members = self.cfg, self.ranks.membership
        self.ranks.settle(decision.finish)
        decided = self.clock()
        ways = ways_on(cfg, self.ranks, now.choice)
        self.ranks.join(cfg.cluster.collective_timeout_s, ways, bool(cfg.snapshot.every), JOIN_S)
        joined = self.clock()
        topology = now.topology.among(members.origin(before), members.node_of)
        if decision.checkpoint:
            return self._begun_again(
                decision, now, topology, joined, {"decide": decided - began, "regroup": joined - decided}
            )
        if decision.snapshot is None:
            placement = now.placement.among(members.origin(before))
            placement = replace(placement, version=now.placement.version + 1)
            self.ranks.regroup(placement, topology, members.fresh(before))
            self.ranks.publish()
        else:
            placement = self._restored(decision.snapshot, decision, now, topology)
        better = placement_for(cfg, placement, topology, load)
        if better is not None:
            self.ranks.migrate(better, cfg.placement.migration_buffer_mb)
            placement = better
        choice = choice_on(cfg, self.ranks, now.choice, decision.done)
        restored = self.clock()
        facts = self._facts(choice)
        seconds = {"decide": decided - began, "regroup": joined - decided, "restore": restored - joined}
        return Formed(members, topology, placement, choice, facts, decision.done), seconds

    def _restored(self, taken: Taken, decision: Decision, now: Formed, topology: Topology) -> Placement:
        """All go back to a snapshot; the placement that they have then: owners alone, with keepers for lost ones."""
        members = self.ranks.membership
        keeper_of = {
            taken.membership.rank_of(gone): members.rank_of(keeper) for gone, keeper in decision.keepers.items()
        }
        wards: dict[int, list[int]] = {}
        for gone, keeper in keeper_of.items():
            wards.setdefault(keeper, []).append(gone)
        placement = taken.placement.primaries().among(members.origin(taken.membership), keeper_of)
        placement = replace(placement, version=now.placement.version + 1)
        fresh = members.fresh(taken.membership)
        self.ranks.restore(Rewind(taken.key, taken.placement, placement, topology, wards, fresh))
        return placement

    def _from_checkpoint(self, error: LostError, why: str) -> Decision:
        """The newest checkpoint in place of a snapshot; raises RankError if there is none."""
        found = self.newest()
        if found is None:
            keep = "snapshot.every=1 and ranks on more nodes" if self.snapshots else "a snapshot"
            raise RankError(error.rank, f"{error}\n{why}, and there is no checkpoint: {keep} would have saved it")
        url, step = found
        return Decision(step, None, None, f"{why}: all go back to the checkpoint of step {step}", checkpoint=url)

    def _begun_again(
        self, decision: Decision, now: Formed, topology: Topology, joined: float, seconds: dict[str, float]
    ) -> tuple[Formed, dict[str, float]]:
        """All build the model anew and take on a checkpoint."""
        before, ranks = now.placement, self.ranks.membership.size
        slots = max(self.cfg.placement.slots_per_rank, slots_needed(before.num_experts, ranks))
        placement = contiguous(before.num_layers, before.num_experts, ranks, slots)
        placement = replace(placement, version=before.version + 1)
        self.ranks.build(self.cfg, self.plan.config, self.plan.corpus, placement, topology)
        self.ranks.load(decision.checkpoint, decision.done)
        choice = self.ranks.choose_exchange(decision.done)
        formed = Formed(self.ranks.membership, topology, placement, choice, self._facts(choice), decision.done)
        return formed, {**seconds, "restore": self.clock() - joined}

    def _facts(self, choice: Choice) -> Facts:
        plan, ranks = self.plan, self.ranks.membership.size
        return facts_of(self.cfg, plan.config, plan.expert_parameters, choice.kind, ranks)

    def _check_room(self, error: LostError, lost: tuple[int, ...]) -> None:
        """Raise RankError if too few are left."""
        left, least = self.ranks.membership.size - len(lost), self.cfg.elastic.min_ranks
        if not self.cfg.snapshot.every:
            raise RankError(error.rank, f"{error}\nsnapshot.every=0: a run without snapshots ends with a lost rank")
        if left < max(least, 1):
            raise RankError(error.rank, f"{error}\n{left} ranks are left, elastic.min_ranks={least}")

    def _check_tries(self, error: LostError, done: int) -> None:
        """Raise RankError if the same round has failed too often with nobody lost in it."""
        if error.lost:
            return
        step, times = self._tried
        self._tried = (done, times + 1 if step == done else 1)
        if self._tried[1] > MOST_ATTEMPTS:
            raise RankError(error.rank, f"{error}\nit failed {MOST_ATTEMPTS} times, with every rank still there")

    def _note(
        self, error: LostError, decision: Decision, node_of: dict[str, str], done: int, seconds: dict[str, float]
    ) -> None:
        """Remember what there is to say of a recovery; `node_of` the members of before it, by Ray's id of a node."""
        members, again = self.ranks.membership, max(done - decision.done, 0)
        gone = [m for m in node_of if m not in members.members]
        why, planned = self.departures.lost([node_of[m] for m in gone])
        what = f"; {again} steps are made again" if again > 1 else "; 1 step is made again" if again else ""
        cause = str(error).splitlines()[0].removesuffix(":")  # a traceback may follow
        count = f"{members.size} ranks go" if members.size > 1 else "1 rank goes"
        plan = f", {'as planned' if planned else 'planned in part'}: {why}" if why else ""
        words = f"{cause.partition('. ')[0]}{plan}; {count} on in epoch {members.epoch}: {decision.words}{what}"
        words += f"; stacks of {len(node_of)} ranks: {error.stacks}" if error.stacks else ""
        log.info("recovered lost=%s epoch=%d done=%d repeated=%d", gone, members.epoch, decision.done, again)
        fields = {
            "lost": gone, "cause": cause, "planned": planned, "why": why, "failures": self.departures.failures,
            "planned_leaves": self.departures.planned_leaves, "epoch": members.epoch, "ranks": members.size,
            "done": decision.done, "repeated": again, "seconds": seconds, "stacks": error.stacks,
        }  # fmt: skip
        self._told.append((words, fields))
        self._since = self.clock()
