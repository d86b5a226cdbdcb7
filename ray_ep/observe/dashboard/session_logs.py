"""What a run writes among the logs of the Ray session, for the Logs view of any dashboard: two listeners of the driver.

Of a driver that was not submitted as a job, Ray's dashboard has no log; its Jobs view leads to files with the job's id.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from ray_ep.driver.records import Event, StepRecord, now
from ray_ep.observe.dashboard.placement_text import placement_text
from ray_ep.observe.progress import COMMANDS, Progress
from ray_ep.observe.state import RunState

KINDS = ("members", "placement")
"""Events after which the placement's file is another one."""
Place = Callable[[Path, str], Path | None]
"""(run directory, what a file is) -> its path; None: nowhere."""


def session_file(run_dir: Path, what: str) -> Path | None:
    """`ray_ep-RUN-JOB.WHAT` among the logs of the Ray session that this process is in, on this node; None: in none."""
    import ray

    node = ray._private.worker._global_node if ray.is_initialized() else None
    if node is None:
        return None
    name = re.sub(r"[^\w.-]", "_", run_dir.resolve().name, flags=re.ASCII)
    return Path(node.get_logs_dir_path()) / f"ray_ep-{name}-{ray.get_runtime_context().get_job_id()}.{what}"


class PlacementLog:
    """Keeps `ray_ep-RUN-JOB.placement.txt` up to date while the run goes.

    Made from the run directory, as every other view of the run.

    Args:
        place: asked when there is something to write.
    """

    def __init__(self, run_dir: Path, place: Place = session_file):
        self._state, self._place = RunState(run_dir), place
        self._begun = False

    def start(self, event: Event) -> None:
        """The ranks are ready, and Ray is there."""
        self._begun = True
        self._write()

    def step(self, record: StepRecord) -> None:
        """Nothing: a step moves nobody."""

    def event(self, event: Event) -> None:
        """Write it anew where somebody has moved."""
        if self._begun and event.kind in KINDS:
            self._write()

    def _write(self) -> None:
        path = self._place(self._state.path, "placement.txt")
        if path is None:
            return
        self._state.refresh()
        part = path.with_suffix(".part")
        part.write_text(placement_text(self._state), encoding="utf-8")
        os.replace(part, path)


class DriverLog:
    """Writes `ray_ep-RUN-JOB.driver.log`: the lines that a terminal shows, each with its time; a context manager.

    Args:
        steps: of the whole run. prefix: before each line. place: asked at the start.
    """

    def __init__(self, run_dir: Path, steps: int, prefix: str = "", place: Place = session_file):
        self._run_dir, self._steps, self._prefix, self._place = run_dir, steps, prefix, place
        self._early: list[Event] = []  # said before the start
        self._file: TextIO | None = None
        self._shown: Progress | None = None

    def __enter__(self) -> DriverLog:
        """Nothing is written before the run has started."""
        return self

    def __exit__(self, *error: object) -> None:
        """All is written."""
        if self._shown is not None and self._file is not None:
            self._shown.__exit__(None, None, None)
            self._file.close()

    def start(self, event: Event) -> None:
        """The ranks are ready, and Ray is there."""
        path = self._place(self._run_dir, "driver.log")
        if path is None:
            return
        self._file = _Timed(path.open("ab"), encoding="utf-8")
        self._shown = Progress(self._steps, self._file, self._prefix)
        for said in self._early:
            self.event(said)
        self._shown.start(event)

    def step(self, record: StepRecord) -> None:
        """A line every few seconds."""
        if self._shown is not None:
            self._shown.step(record)

    def event(self, event: Event) -> None:
        """A line at once."""
        if self._shown is None:
            self._early.append(event)
        elif self._file is not None and event.kind in COMMANDS:
            self._file.write(f"{event.kind}: {event.words}\n")
        else:
            self._shown.event(event)


class _Timed(io.TextIOWrapper):
    """A file with the time before whatever is written."""

    def write(self, text: str) -> int:
        return super().write(f"{now().isoformat(timespec='seconds')} {text}")
