"""The page of a run while it goes: written again beside the steps, by a process of its own at the lowest priority.

A listener of the run starts that process and looks, step by step, how it went. A page that could not be written is told
once; the run goes on. The page of a run that has ended is the composition's to write (api.py).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ray_ep.driver.records import Event, StepRecord

EVERY_S = 90.0
"""Seconds at least between two pages: each takes a second of CPU, which ranks that fill the machine miss."""
NEWS_S = 45.0
"""Seconds between two pages where an evaluation or an event is to be shown."""

_ROOT = Path(__file__).parents[2]  # of the package, which the other process may not find by itself
_PR_SET_PDEATHSIG = 1
_CHILD = "import sys; sys.path.append(sys.argv[1]); from ray_ep.observe.live import write; write(*sys.argv[2:])"


class LivePage:
    """Keeps `run_dir`/report.html up to date while the run goes: a listener of the driver, and a context manager.

    Args:
        failed: told once, with the reason, if a page could not be written.
        clock: seconds, for tests.
        nice: of the writer; less than 19, the lowest priority, only where somebody waits for the page.
    """

    def __init__(
        self, run_dir: Path, failed: Callable[[str], None], clock: Callable[[], float] = time.monotonic, nice: int = 19
    ):
        self._run_dir, self._failed, self._clock, self._nice = run_dir.absolute(), failed, clock, nice
        self._writer: subprocess.Popen[str] | None = None
        self._began = -EVERY_S  # of the last page
        self._news = self._told = False

    def __enter__(self) -> LivePage:
        """No page before the run has started."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nobody writes the page any more once this returns."""
        if self._writer is not None and self._writer.poll() is None:
            self._writer.kill()
            with suppress(subprocess.TimeoutExpired):  # stuck in a file system: it will be gone when that answers
                self._writer.wait(5)

    def start(self, event: Event) -> None:
        """The first page."""
        self._news = True
        self._look()

    def step(self, record: StepRecord) -> None:
        """A page if one is due."""
        self._news |= record.eval_loss is not None
        self._look()

    def event(self, event: Event) -> None:
        """A page soon: the next step looks."""
        self._news = True

    def _look(self) -> None:
        if self._writer is not None:
            if self._writer.poll() is None:
                return
            _, said = self._writer.communicate()
            if self._writer.returncode not in (0, -signal.SIGTERM):  # Ray stops a job with all that it has started
                self._tell(said.strip().splitlines()[-1:] or [f"its writer ended with {self._writer.returncode}"])
            self._writer = None
        if self._clock() - self._began < (NEWS_S if self._news else EVERY_S):
            return
        self._began, self._news = self._clock(), False
        command = [sys.executable, "-c", _CHILD, str(_ROOT), str(self._run_dir), str(self._nice), str(os.getpid())]
        try:  # a session of its own: a terminal's Ctrl-C is for the driver
            self._writer = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            self._tell([str(e)])

    def _tell(self, why: list[str]) -> None:
        if not self._told:
            self._told = True
            self._failed(f"the page could not be written, the run goes on: {why[0]}")


def write(run_dir: str, nice: str, parent: str) -> None:
    """What the process of its own does; it ends with its parent, the driver, however that ends."""
    with suppress(OSError, AttributeError):  # Linux: SIGKILL when the thread that started this process ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it has ended before that
        return
    os.nice(int(nice))
    with suppress(OSError):  # Linux may give each session an equal share of the CPUs, whatever its processes' priority
        Path("/proc/self/autogroup").write_text(nice)
    if int(nice) == 19 and hasattr(os, "SCHED_IDLE"):  # Linux: runs only where nobody else wants to
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    from ray_ep.observe.page.report import write_report

    write_report(Path(run_dir), running=True)
