"""How a run ends and what is said then: the answer to a signal, the cause of a failure and what it lost. No Ray."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_ep.driver.records import Event
from ray_ep.errors import DivergedError, RankError

STATUS = {"interrupted": "interrupted", "failed": "failed", "diverged": "failed"}
"""How a run ended, by the event that says so; without one it is done, goes on, or ended without a word."""


class Activity:
    """What the run is doing, so that whoever asks it to stop hears what is finished first.

    Args:
        passes: of a step; one of several is broken off between two of them.
        clock: seconds.
    """

    def __init__(self, passes: int, clock: Callable[[], float] = time.monotonic):
        self.passes, self.clock = passes, clock
        self.doing = ""
        self.step_s: float | None = None  # that the last step took
        self._began = 0.0

    @contextmanager
    def __call__(self, doing: str) -> Iterator[None]:
        """Inside: this is under way: step, evaluation or saving. An error leaves it as it was."""
        self.doing, self._began = doing, self.clock()
        yield
        if doing == "step":
            self.step_s = self.clock() - self._began
        self.doing = ""

    def answer(self, signal: str, done: int, saving: str) -> str:
        """What follows a signal.

        Args:
            done: steps behind the run. saving: what the last save will cost, such as "saving takes about 3 s".
        """
        if self.doing == "step" and self.passes > 1:
            left = None if self.step_s is None else self.step_s / self.passes
            return farewell(signal, f"step {done + 1} is broken off at its next pass", left, saving)
        if self.doing == "step":
            left = None if self.step_s is None else self.step_s - (self.clock() - self._began)
            return farewell(signal, f"step {done + 1} is finished first", left, saving)
        if self.doing == "evaluation":
            return farewell(signal, "the evaluation is broken off at its next part", None, saving)
        if self.doing == "saving":
            return farewell(signal, f"the checkpoint of step {done} is finished first", None, saving)
        return farewell(signal, "", None, saving)

    def kept(self, done: int) -> int:
        """Steps that the last checkpoint will hold if the run is asked to stop now."""
        return done + 1 if self.doing == "step" and self.passes == 1 else done


def farewell(name: str, doing: str, left_s: float | None, saving: str) -> str:
    """What follows a signal, for who waits for the end.

    Args:
        doing: what is finished or broken off first, such as "step 12 is finished first"; empty: nothing is under way.
        left_s: seconds that this should still take; None: not known.
        saving: such as "saving takes about 3 s".
    """
    if not doing:
        return f"{name}: {saving}"
    left = "it is not known how long that takes" if left_s is None else f"about {max(left_s, 1):.0f} s"
    return f"{name}: {doing} ({left}), then {saving}"


def ended(e: BaseException, run: str, saved: int, done: int) -> Event:
    """How a run ends that is broken off by `e`: failed, diverged or interrupted; an error gets what is lost as a note.

    Args:
        run: its directory. saved: step of the newest checkpoint, -1 without one. done: steps behind the run.
    """
    lost = what_is_lost(run, saved, done)
    fields = {"done": done, "saved": saved}
    if isinstance(e, KeyboardInterrupt):
        return Event("interrupted", f"stopped at once after step {done}; {lost}", fields)
    if isinstance(e, RankError):
        fields["rank"] = e.rank
    e.__notes__ = [*getattr(e, "__notes__", ()), lost]  # as add_note of Python 3.11
    kind = "diverged" if isinstance(e, DivergedError) else "failed"
    return Event(kind, f"{cause_of(e)}, after step {done}; {lost}", fields)


def what_is_lost(run: str, saved: int, done: int) -> str:
    """After a failure: what the newest checkpoint leaves out, and the command that goes on."""
    command = shlex.join(["ray-ep", "train", f"run_dir={run}", "resume=auto"])
    if saved < 0:
        return f"nothing was saved: {_steps(done)} lost; begin again with: {command}"
    return f"the newest checkpoint is of step {saved}: {_steps(done - saved)} lost; go on with: {command}"


def cause_of(e: BaseException) -> str:
    """An error in one sentence: of a rank's own traceback the last line."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def _steps(n: int) -> str:
    return "1 step is" if n == 1 else f"{n or 'no'} steps are"
