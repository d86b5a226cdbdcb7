"""The driver of a checked run, in layers of one concern each: run, recover, rebalance, step.

`run` steps until the end or until it is asked to stop. `step_with_recovery` makes one round, whoever is lost in it.
`step_and_rebalance` moves experts where that pays. `step` has all ranks make one optimizer step. Draws nothing itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from ray_ep.config.schema import Config
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.alarm import Alarm
from ray_ep.driver.ending import Activity, cause_of, ended
from ray_ep.driver.evaluation import Evaluator
from ray_ep.driver.forming import Formed, form, mover_of
from ray_ep.driver.measures import step_record
from ray_ep.driver.publisher import LAST_S, Publisher
from ray_ep.driver.rebalance.mover import Mover
from ray_ep.driver.records import Event, StepRecord
from ray_ep.driver.recovery.recover import Recovery
from ray_ep.driver.requests import Request, RequestKind, Requests
from ray_ep.driver.run.opening import notes_of, start_of
from ray_ep.driver.run.saving import Saver
from ray_ep.driver.start import Plan
from ray_ep.driver.states import State, States
from ray_ep.errors import LostError
from ray_ep.rank.results import StepResult

log = logging.getLogger("ray_ep.driver")


class Driver:
    """The steps of one run on its ranks. `form` comes first, then `run`, both inside `told`.

    Args:
        ranks: placed, in no group yet.
        clock: seconds.

    Attributes:
        done: optimizer steps behind the run.
        mover: made anew for each membership, by `adopt`.
        stop: who asked for the end.
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
        self.states, self.activity = States(), Activity(cfg.batch.accumulation, clock)
        self.saver = Saver(cfg, plan, ranks, publisher, clock)
        held_out, keep, tell = len(plan.corpus.held_out), plan.run.provenance, publisher.event
        self.evaluator = Evaluator(cfg.eval, cfg.optim.steps, held_out, ranks, keep, tell)
        self.alarm = Alarm(cfg.router, tell)
        self.recovery = Recovery(cfg, plan, ranks, self.saver.newest_there, tell, clock)
        self.done = 0
        self.stop: Request | None = None
        self.unfinished: StepRecord | None = None

    def form(self, ray: str = "a Ray", phase: Callable[[str], None] = lambda name: None) -> None:
        """Have the ranks form; then the run is there: its directory is made, and listeners hear what runs."""
        formed = form(self.cfg, self.plan, self.ranks, phase)
        self.plan.run.create(self.cfg)
        self.adopt(formed)
        phase("")
        self.publisher.start(start_of(self.cfg, self.plan, formed, ray))
        device = [Event("device", self.ranks.note, {"device": self.ranks.device})] if self.ranks.note else []
        for note in (*device, *notes_of(self.cfg, self.plan, formed)):
            self.publisher.event(note)
        self.saver.start()

    def adopt(self, formed: Formed) -> None:
        """Go on with ranks that have formed: whatever depends on who they are is derived here, and nowhere else."""
        run, self.formed = self.plan.run, formed
        run.exchange(formed.choice.to_dict())
        run.topology(formed.topology)
        run.placement(formed.placement)
        self.mover = mover_of(self.cfg, run, self.ranks, formed, self.states, self.publisher.event)
        self.done = self.publisher.done = formed.done
        self.states.to(State.STEPPING, f"{formed.topology.num_ranks} ranks are formed, {self.done} steps are done")

    def run(self) -> str:
        """Step until the end or until asked to stop, then save; returns done or interrupted.

        Raises:
            RankError, DivergedError: as below. SaveError: the last checkpoint could not be written.
        """
        while True:
            while (self.done < self.cfg.optim.steps or self.unfinished) and not self.stopping():
                self.step_with_recovery()
            try:
                return self.drain()
            except LostError as e:
                self.recover(e)

    def step_with_recovery(self) -> None:
        """One round, whoever is lost in it: a snapshot, a step, experts that move, and what is due after the step.

        The others go on without a rank that is lost: its step is made again if it did not count, else what was due
        after it is done by them.

        Raises:
            RankError: a rank raised an error of its own, or one was lost and the others cannot go on.
            DivergedError: a value is not finite, on every rank.
        """
        try:
            if self.recovery.due(self.done):
                self.recovery.take(self.done, self.mover.placement)
            record = self.unfinished or self.step_and_rebalance()
            if record is not None:
                self.finish_step(record)
        except LostError as e:
            self.recover(e)
            if self.unfinished is not None and self.unfinished.step > self.done:
                self.unfinished = None  # it is made again

    def recover(self, error: LostError) -> None:
        """Have those that are left go on; raises RankError if they cannot."""
        self.states.to(State.RECOVERING, cause_of(error))
        there = self.mover.topology, self.mover.placement
        now = replace(self.formed, topology=there[0], placement=there[1], done=self.done)
        self.adopt(self.recovery.recover(error, now, self.mover.recent.load))

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
        self.unfinished = record
        self.requests.poll()
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
        return results, seconds

    def finish_step(self, record: StepRecord) -> None:
        """What is due after a step: evaluate, publish, watch the routing, save."""
        if self.evaluator.due(self.done) and not self.stopping():
            with self.activity("evaluation"):
                record = replace(record, eval_loss=self.evaluator.evaluate(self.done))
        self.publisher.step(record)
        self.unfinished = None
        self.alarm.watch(self.done, record.load)
        if self.done < self.cfg.optim.steps and self.saver.due(self.done) and not self.stopping():
            with self.activity("saving"):
                self.saver.save_and_go_on(self.done)

    def drain(self) -> str:
        """The last save; returns done or interrupted. Raises SaveError; LostError: a rank was lost meanwhile."""
        self.states.to(State.DRAINING, f"after step {self.done}")
        with self.activity("saving"):
            if self.stopping():
                self.publisher.event(Event("interrupted", f"saving after step {self.done}"))
            self.saver.finish(self.done)
        self.publisher.flush()
        status = "interrupted" if self.stopping() else "done"
        self.states.to(State.STOPPED, status)
        return status

    def stopping(self) -> bool:
        """Carry out what was asked for meanwhile; whether that was the end."""
        for request in self.requests.take():
            log.info("request kind=%s by=%r", request.kind.value, request.by)
            if request.kind is RequestKind.STOP:
                self.stop = self.stop or request
            elif request.kind is RequestKind.REBALANCE:
                self.mover.asked = True
        return self.stop is not None

    def signalled(self, name: str) -> None:
        """A signal has come: ask for the end, say at once what follows, and have ranks leave what can be left."""
        self.ranks.stop()
        self.requests.put(Request(RequestKind.STOP, name))
        words = self.activity.answer(name, self.done, self.saver.ahead(self.activity.kept(self.done)))
        self.publisher.event(Event("signal", words, {"signal": name}))

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside: an error becomes an event of the run, if it has begun, and names the command that goes on.

        Listeners have it, or have had LAST_S for it, before the error leaves: the process may be killed next.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as e:
            if self.states.now is not State.STOPPED:
                self.states.to(State.STOPPED, cause_of(e))
            if self.plan.run.begun:
                self.publisher.event(ended(e, str(self.plan.run.path), self.saver.saved, self.done))
                self.publisher.flush(LAST_S)
            raise
