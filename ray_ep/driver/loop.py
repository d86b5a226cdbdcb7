"""The driver of a checked run, in layers of one concern each: run, recover, rebalance, step.

`run` steps until the end or until it is asked to stop. `step_with_recovery` makes one round, whoever is lost in it.
`step_and_rebalance` moves experts where that pays. `step` has all ranks make one optimizer step. Draws nothing itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_ep.driver.ending import cause_of, ended
from ray_ep.driver.forming import Formed, form, mover_of
from ray_ep.driver.hang.keeping import Hangs
from ray_ep.driver.publisher import LAST_S
from ray_ep.driver.records import Event
from ray_ep.driver.requests import Request, RequestKind
from ray_ep.driver.run.opening import first_words, notes_of, start_of
from ray_ep.driver.run.standing import Cause, members_event, placement_event
from ray_ep.driver.states import State
from ray_ep.driver.stepping import Stepping
from ray_ep.errors import LostError

REST_S = 0.2
"""Seconds between two looks at the ranks, and at what is asked, in a pause."""

log = logging.getLogger("ray_ep.driver")


class Driver(Stepping):
    """A run from its forming to its end. `form` comes first, then `run`, both inside `told`."""

    def form(self, ray: str = "a Ray", phase: Callable[[str], None] = lambda name: None) -> None:
        """Have the ranks form; then the run is there: its directory is made, and listeners hear what runs."""
        formed = form(self.cfg, self.plan, self.ranks, phase)
        self.plan.run.create(self.cfg)
        self.ranks.hangs = Hangs(self.plan.run.path, lambda: self.done)
        self.adopt(formed, Cause.START, first_words(self.cfg, self.plan))
        self.requests.where = self.where
        phase("")
        self.publisher.start(start_of(self.cfg, self.plan, formed, ray))
        device = [Event("device", self.ranks.note, {"device": self.ranks.device})] if self.ranks.note else []
        for note in (*device, *notes_of(self.cfg, self.plan, formed)):
            self.publisher.event(note)
        self.saver.start()

    def adopt(self, formed: Formed, cause: Cause, words: str) -> None:
        """Go on with ranks that have formed: whatever depends on who they are is derived here, and nowhere else.

        Args:
            cause: why they have this placement, and in `words`.
        """
        run, self.formed = self.plan.run, formed
        run.exchange(formed.choice.to_dict())
        run.topology(formed.topology)
        run.placement(formed.placement)
        waiting = self.mover.askers if hasattr(self, "mover") else []
        self.mover = mover_of(self.cfg, run, self.ranks, formed, self.states, self.publisher.event)
        self.mover.ask(*waiting)
        self.done = self.publisher.done = formed.done
        self.states.to(State.STEPPING, f"{formed.topology.num_ranks} ranks are formed, {self.done} steps are done")
        self.publisher.event(members_event(formed.membership, self.ranks.where, self.ranks.device))
        self.publisher.event(placement_event(formed.placement, cause, words))

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
            if self.unfinished is None and not self.carry_out():
                return
            if self.recovery.due(self.done):
                self.recovery.take(self.done, self.mover.placement)
            record = self.unfinished or self.step_and_rebalance()
            if record is not None:
                self.finish_step(record)
                self.resize()
        except LostError as e:
            self.recover(e)
            if self.unfinished is not None and self.unfinished.step > self.done:
                self.unfinished = None  # it is made again

    def carry_out(self) -> bool:
        """Do what was asked for between two steps, and wait while the run is paused; whether a step follows.

        Raises:
            LostError: a rank was lost meanwhile, also in a pause.
        """
        while not self.stopping():
            if self.asked.due:
                with self.activity("saving" if self.asked.due[0].kind is RequestKind.CHECKPOINT else ""):
                    self.asked.serve(self.done, self.ranks.membership.epoch, self.mover)
            elif self.asked.paused:
                self.rest()
            else:
                if self.states.now is State.PAUSED:
                    self.states.to(State.STEPPING, "resumed")
                return True
        return False

    def rest(self) -> None:
        """A moment of a pause: ranks are watched, and may come and go. Raises LostError."""
        if self.states.now is not State.PAUSED:
            self.states.to(State.PAUSED, f"after step {self.done}{self.asked.why}")
            self.asked.rests(self.done, self.ranks.membership.size, self.ranks.membership.epoch)
        self.ranks.beat()
        if self.recovery.due(self.done):
            self.recovery.take(self.done, self.mover.placement)
        formed = self.elastic.after_step(self.now(), self.mover.recent.load, (), 0.0)
        if formed is not None:
            self.joined(formed)
        time.sleep(REST_S)

    def resize(self) -> None:
        """Ranks come and go, where that is due and steps follow. Raises LostError: one was lost meanwhile."""
        if self.done < self.cfg.optim.steps and not self.stopping():
            formed = self.membership_after_step()
            if formed is not None:
                self.joined(formed)

    def joined(self, formed: Formed) -> None:
        """Ranks have come or gone as planned."""
        epoch, size = formed.membership.epoch, formed.membership.size
        self.adopt(formed, Cause.MEMBERSHIP, f"ranks came or went: {size} ranks in epoch {epoch}")

    def recover(self, error: LostError) -> None:
        """Have those that are left go on; raises RankError if they cannot."""
        why = cause_of(error)
        self.states.to(State.RECOVERING, why)
        self.adopt(self.recovery.recover(error, self.now(), self.mover.recent.load), Cause.LOSS, why)

    def drain(self) -> str:
        """The last save; returns done or interrupted. Raises SaveError; LostError: a rank was lost meanwhile."""
        self.states.to(State.DRAINING, f"after step {self.done}{self.asked.why}")
        with self.activity("saving"):
            if self.stopping():
                self.publisher.event(Event("interrupted", f"saving after step {self.done}"))
            self.saver.finish(self.done)
        status = "interrupted" if self.stopping() else "done"
        self.states.to(State.STOPPED, status)
        self.publisher.flush()
        self.asked.ended(f"the run has ended after step {self.done}, which is saved")
        self.requests.close(f"the run has ended ({status} after step {self.done})")
        return status

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
            self.requests.close(f"the run has ended: {cause_of(e)}")
            if self.plan.run.begun:
                self.publisher.event(ended(e, str(self.plan.run.path), self.saver.saved, self.done))
                self.publisher.flush(LAST_S)
            raise
