"""One step of a run and what belongs to it: experts that move, and what is due after it. Losses are loop.py's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from ray_ep.config.schema import Config
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.alarm import Alarm
from ray_ep.driver.elastic.around import Signs
from ray_ep.driver.elastic.elastic import Elastic
from ray_ep.driver.elastic.leaving import Leaving
from ray_ep.driver.elastic.resize import Resizer
from ray_ep.driver.elastic.room import Room
from ray_ep.driver.elastic.stragglers import Stragglers
from ray_ep.driver.ending import Activity
from ray_ep.driver.evaluation import Evaluator
from ray_ep.driver.forming import Formed
from ray_ep.driver.measures import provenance_of, step_record
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.rebalance.mover import Mover
from ray_ep.driver.records import Event, StepRecord
from ray_ep.driver.recovery.departures import Departures
from ray_ep.driver.recovery.recover import Recovery
from ray_ep.driver.requests import RequestKind, Requests, Where, Why
from ray_ep.driver.run.asked import Asked
from ray_ep.driver.run.sampling import Sampling
from ray_ep.driver.run.saving import Saver
from ray_ep.driver.run.standing import Cause, placement_event, state_event
from ray_ep.driver.start import Plan
from ray_ep.driver.states import State, States
from ray_ep.placement import Placement
from ray_ep.placement.planner.verdict import Question
from ray_ep.rank.results import StepResult

log = logging.getLogger("ray_ep.driver")


class Stepping:
    """The steps of one run on ranks that have formed.

    Args:
        ranks: placed.
        clock: seconds.

    Attributes:
        done: optimizer steps behind the run.
        formed: what the run goes on with, since the last change of membership. mover: of that membership.
        asked: what somebody asked for and is carried out between two steps.
        last: what the ranks said of the last step, and its seconds.
        unfinished: of a step that is made, while what is due after it is not done.
    """

    mover: Mover
    formed: Formed

    def __init__(
        self,
        cfg: Config,
        plan: Plan,
        ranks: Ranks,
        publisher: Publisher,
        requests: Requests,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.cfg, self.plan, self.ranks, self.publisher, self.requests = cfg, plan, ranks, publisher, requests
        self.states, self.activity = States(self.tell_state), Activity(cfg.batch.accumulation, clock)
        self.saver = Saver(cfg, plan, ranks, publisher, clock)
        held_out, keep, tell = len(plan.corpus.held_out), plan.run.held_out, publisher.event
        self.evaluator = Evaluator(cfg.eval, cfg.optim.steps, held_out, ranks, keep, tell)
        self.alarm = Alarm(cfg.router, tell)
        self.sampling = Sampling(ranks.sample, clock) if cfg.statistics.sample >= cfg.cluster.ranks else None
        leaving, placement = Leaving(), plan.placement
        departures = Departures(leaving.planned)
        self.recovery = Recovery(cfg, plan, ranks, self.saver.newest_there, tell, clock, departures)
        self.stragglers, room = Stragglers(cfg.batch), Room(ranks.room)
        signs = Signs(leaving.draining, room, room.forget, lambda: self.stragglers.slow, self.question)
        resizer = Resizer(cfg, plan, ranks, self.states, self.moved, tell, clock)
        self.elastic = Elastic(cfg, placement.num_experts, ranks, resizer, signs, departures, tell, clock)
        self.done = 0
        self.asked = Asked(cfg.optim.steps, self.saver, tell)
        self.unfinished: StepRecord | None = None

    def step_and_rebalance(self) -> StepRecord | None:
        """One step, after which experts move if that pays; None: the step was broken off."""
        stepped = self.step()
        if stepped is None:
            return None
        results, seconds = stepped
        for kind, words in (("balance", results[0].note), ("random-draws", results[0].warning)):
            if words:
                self.publisher.event(Event(kind, words))
        record = step_record(self.done, results, seconds, self.mover.topology, self.mover.placement)
        recorded = provenance_of(results, self.ranks.where, self.cfg.batch.length)
        record = replace(record, provenance=recorded) if recorded is not None else record
        self.unfinished = record
        if self.stopping():
            return record
        moved_s, stood_s = self.mover.after_step(self.done, results, seconds)
        return replace(record, migration_seconds=moved_s, rebalance_seconds=stood_s)

    def step(self) -> tuple[list[StepResult], float] | None:
        """One optimizer step on all ranks: what each says, and its seconds; None: broken off, and nothing has changed.

        After an error `done` is as before; ranks may have made the step or not.
        """
        began = time.perf_counter()
        with self.activity("step"):
            results = self.ranks.train_step(self.done)
        seconds = time.perf_counter() - began
        if results is None:
            return None
        self.done = self.publisher.done = self.done + 1
        self.recovery.stepped()
        self.last = results, seconds
        return results, seconds

    def finish_step(self, record: StepRecord) -> None:
        """What is due after a step: evaluate, publish, watch the routing, save."""
        if self.evaluator.due(self.done) and not self.stopping():
            began = time.perf_counter()
            with self.activity("evaluation"):
                loss = self.evaluator.evaluate(self.done)
            record = replace(record, eval_loss=loss, eval_seconds=time.perf_counter() - began)
        if self.sampling is not None:
            record = replace(record, sample=self.sampling.take())
        self.publisher.step(record)
        self.unfinished = None
        self.alarm.watch(self.done, record.load)
        if self.done < self.cfg.optim.steps and self.saver.due(self.done) and not self.stopping():
            with self.activity("saving"):
                self.saver.save_and_go_on(self.done)

    def now(self) -> Formed:
        """What the run goes on with, links and placement as they are now."""
        return replace(self.formed, topology=self.mover.topology, placement=self.mover.placement, done=self.done)

    def where(self) -> Where:
        """Where the run is, for who asks from another thread."""
        drained = tuple(self.elastic.orders.drained.copy())
        return Where(self.done, self.ranks.membership.epoch, self.mover.placement.version, drained)

    def moved(self, placement: Placement) -> None:
        """Ranks that leave have handed over: the present ones have another placement."""
        self.mover.placement = placement
        self.plan.run.placement(placement)
        self.publisher.event(placement_event(placement, Cause.HANDOVER, "what ranks that leave own goes to the others"))

    def tell_state(self, before: State, after: State, why: str) -> None:
        """The run is at something else; of one that has not begun nobody is told."""
        if self.plan.run.begun:
            self.publisher.event(state_event(before, after, why))

    def question(self) -> Question:
        """What the planner knows of the present ranks."""
        return self.mover.question(max(self.cfg.optim.steps - self.done, 1))

    def membership_after_step(self) -> Formed | None:
        """Name slow ranks, and let ranks come and go; what the run goes on with if they are others now."""
        members = self.ranks.membership.members
        results, seconds = self.last
        for event in self.stragglers.after_step(members, results):
            self.publisher.event(event)
            self.mover.asked = True  # a plan knows how fast each rank is
        return self.elastic.after_step(self.now(), self.mover.recent.load, results, seconds)

    def stopping(self) -> bool:
        """Sort what was asked for meanwhile; whether the end is among it."""
        for request in self.requests.take():
            log.info("request kind=%s by=%r", request.kind.value, request.by)
            if request.kind in (RequestKind.SCALE, RequestKind.DRAIN):
                self.elastic.orders.put(request, self.recovery.fresh)
            elif why := request.outdated(self.ranks.membership.epoch, self.mover.placement.version):
                request.tell(why, Why.CHANGED)
            elif request.kind is RequestKind.REBALANCE and not self.asked.paused:
                self.mover.ask(request)
            else:
                self.asked.put(request)
        return self.asked.stop is not None
