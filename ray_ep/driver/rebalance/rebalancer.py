"""When to think about other places for the experts, and what became of it. Decides; moves nothing. No Ray, no torch.

Whether to move is decided (planner.verdict) beside the steps, in a thread; between steps its answer is picked up. After
a move the steps are timed, and a move that made them longer makes the next one harder to get.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

from ray_ep.config.schema import PlacementConfig
from ray_ep.driver.records import Event
from ray_ep.placement.planner.verdict import Question, Verdict, decide

COMPARED = 10
"""Steps before a move and after it whose medians are compared; the first one after it is left out."""
WORSE = 1.02
"""Steps longer by this factor than before the move were made worse by it; less is noise."""
MOST_CAUTION = 16.0
"""At most so many times must a move pay back after moves that disappointed."""

T = TypeVar("T")
Background = Callable[[Callable[[], Verdict]], "Future[Verdict]"]


def beside(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread that yields the processor to everything else; its end is not waited for at exit."""
    future: Future[T] = Future()

    def main() -> None:
        if sys.platform == "linux":  # there niceness belongs to a thread, and to those that it starts
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            future.set_result(work())
        except Exception as e:
            future.set_exception(e)

    threading.Thread(target=main, name="ray_ep-rebalance", daemon=True).start()
    return future


@dataclass(slots=True)
class MoveTrial:
    """A move whose gain is being measured."""

    verdict: Verdict
    step: int  # after which it was made
    before: float  # median step seconds
    seconds: float  # that it took
    after: list[float] = field(default_factory=list)  # step seconds since


class Rebalancer:
    """Knows when a decision is due, makes it beside the steps, and judges the moves by what steps took afterwards.

    Between steps its owner calls in this order: `stepped`; `answer` (and after a move `moved`, or `failed`);
    `links_changed`, where they have; `due`, and where that names a reason `ask`, or `failed`.

    Attributes:
        caution, slower: see verdict.Question.
    """

    def __init__(
        self, cfg: PlacementConfig, clock: Callable[[], float] = time.monotonic, background: Background = beside
    ):
        self.cfg, self.clock, self.background = cfg, clock, background
        self.caution = self.slower = 1.0
        self._seconds: deque[float] = deque(maxlen=COMPARED)
        self._trial: MoveTrial | None = None
        self._planning: Future[Verdict] | None = None
        self._asked = (0, "")  # step and reason of the decision that is being made
        self._stale = ""  # why its question does not hold any more
        self._wanted = ""  # reason for the next decision
        self._urgent = False
        self._considered = 0  # step of the last decision
        self._waits_since: float | None = None  # no progress since then
        self._alerted = False

    def stepped(self, seconds: float) -> list[Event]:
        """One step is done; says how the last move did, once it can be told, and whether nothing moves on."""
        said: list[Event] = []
        self._seconds.append(seconds)
        if self._trial is not None:
            self._trial.after.append(seconds)
            if len(self._trial.after) > COMPARED:
                said.append(self._judge(self._trial))
                self._trial = None
        alert, waited = self.cfg.alert_s, self._waited()
        if alert and not self._alerted and waited > alert:
            self._alerted = True
            step, reason = self._asked
            said.append(
                Event(
                    "rebalance-alert",
                    f"no progress for {waited:.3g} s (placement.alert_s={alert:g}): no decision since it was asked for "
                    f"after step {step} ({reason}); the placement stays",
                    {"waited_seconds": waited, "asked_after": step, "reason": reason},
                )
            )
        return said

    def links_changed(self) -> Event | None:
        """The topology is another one: a decision is due, one being made does not hold, steps before and after differ.

        Returns:
            what to say of a move whose gain cannot be measured for that.
        """
        self._wanted, self._urgent = "links have changed", True
        self.outdated("links have changed meanwhile")
        self.caution = 1.0  # the move that disappointed may have done so since a link had slowed by then
        self._seconds.clear()
        trial, self._trial = self._trial, None
        if trial is None:
            return None
        return Event(
            "rebalance",
            f"the gain of the move of step {trial.step} was not measured: links have changed meanwhile; "
            f"{1e3 * trial.verdict.gain:.3g} ms a step were predicted",
            {"moved_after": trial.step, "gain_predicted": trial.verdict.gain},
        )

    @property
    def wants(self) -> bool:
        """Whether a decision is to be begun at the next `due`, whatever that is told."""
        return bool(self._wanted)

    def outdated(self, why: str) -> None:
        """What is being decided does not hold: its answer is none, and says why."""
        if self._planning is not None:
            self._stale = self._stale or why

    def due(self, step: int, imbalance: float, on_demand: bool = False) -> str:
        """The reason to decide now, after `step` steps; empty: none, or not yet.

        Args:
            imbalance: busiest over mean rank (or node) of recent steps.
            on_demand: somebody asked.
        """
        if on_demand and not self._urgent:
            self._wanted, self._urgent = "on demand", True
        elif not self._wanted:
            self._wanted = self._regular(step, imbalance)
        if not self._wanted or self._planning is not None or (self._trial is not None and not self._urgent):
            return ""
        return self._wanted

    def ask(self, step: int, question: Question) -> None:
        """Begin the decision that `due` named, beside the steps."""
        self._begin(step)
        self._planning = self.background(lambda: decide(question))

    def answer(self) -> tuple[Verdict | None, Event | None]:
        """The decision that was begun, if it is made by now: a verdict to move by, and what to say.

        With placement.mode=advise there is no verdict to move by, ever.
        """
        if self._planning is None or not self._planning.done():
            return None, None
        future, self._planning = self._planning, None
        stale, self._stale = self._stale, ""
        error = future.exception()
        if error is not None:
            return None, self._failure(f"no decision: {type(error).__name__}: {error}")
        if stale:
            return None, self._say(f"no decision: {stale}")
        verdict = future.result()
        figures = verdict_figures(verdict)
        if verdict.placement is not None and self.cfg.mode == "advise":
            words = f"advised, and nothing moves (placement.mode=advise): {verdict.words}"
            verdict, figures = replace(verdict, placement=None, words=words), {**figures, "moves": False}
        said = self._say(verdict.words, figures)
        if verdict.placement is None:
            self._progress()
            return None, said
        return verdict, said

    def moved(self, verdict: Verdict, step: int, seconds: float) -> None:
        """The move was made after `step` steps and took that long."""
        self._progress()
        if verdict.links > 0:  # between what links promise and what was seen now, for neither is the whole truth
            self.slower = max((self.slower * seconds / verdict.links) ** 0.5, 1.0)
        before = median(self._seconds or [verdict.step_seconds + verdict.gain])
        self._trial = MoveTrial(verdict, step, before, seconds)
        self._seconds.clear()

    def failed(self, step: int, message: str) -> Event:
        """A question could not be put, or a move not be made; what to say."""
        if self._wanted:
            self._begin(step)
        return self._failure(message)

    def _regular(self, step: int, imbalance: float) -> str:
        every, most = self.cfg.every, self.cfg.imbalance
        if every and step % every == 0:
            return f"every {every} steps"
        if most and imbalance > most and step - self._considered >= self.cfg.decay:  # else the figures are the old ones
            return f"the busiest computes {imbalance:.2f} times the mean"
        return ""

    def _begin(self, step: int) -> None:
        self._asked, self._considered = (step, self._wanted), step
        self._wanted, self._urgent = "", False
        if self._waits_since is None:
            self._waits_since = self.clock()

    def _progress(self) -> None:
        self._waits_since, self._alerted = None, False

    def _waited(self) -> float:
        return 0.0 if self._waits_since is None else self.clock() - self._waits_since

    def _say(self, words: str, fields: dict[str, Any] | None = None) -> Event:
        step, reason = self._asked
        fields = {"asked_after": step, "reason": reason, **(fields or {})}
        return Event("rebalance", f"{words} (asked after step {step}: {reason})", fields)

    def _failure(self, message: str) -> Event:
        return self._say(f"{message}; the placement stays")

    def _judge(self, trial: MoveTrial) -> Event:
        """Measured against predicted gain; adjusts the caution."""
        after = median(trial.after[1:])
        gain, promised = trial.before - after, trial.verdict.gain
        words = (
            f"measured after the move of step {trial.step}: step {1e3 * trial.before:.4g} -> {1e3 * after:.4g} ms over "
            f"{COMPARED} steps, {1e3 * gain:.3g} ms gained where {1e3 * promised:.3g} ms were predicted; the move took "
            f"{trial.seconds:.3g} s, predicted {trial.verdict.cost:.3g} s"
        )
        if after > WORSE * trial.before:
            self.caution = min(2 * self.caution, MOST_CAUTION)
            words += f"; steps got longer: the next move must promise {self.caution:g} times as much as usual"
        elif gain >= promised / 2:
            self.caution = max(self.caution / 2, 1.0)
        fields = {
            "moved_after": trial.step, "step_seconds_before": trial.before, "step_seconds_after": after,
            "gain_measured": gain, "gain_predicted": promised, "move_seconds": trial.seconds,
            "move_predicted": trial.verdict.cost, "caution": self.caution,
        }  # fmt: skip
        return Event("rebalance", words, fields)


def verdict_figures(verdict: Verdict) -> dict[str, Any]:
    """What a verdict says beside its sentence: predicted seconds, and the version of the placement to move to."""
    placement = verdict.placement
    return {
        "moves": placement is not None,
        "placement_version": None if placement is None else placement.version,
        "step_predicted": float(verdict.step_seconds),
        "gain_predicted": float(verdict.gain),
        "move_predicted": float(verdict.cost),
    }
