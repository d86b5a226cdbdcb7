"""One `ray-ep train` in a process of its own, for the benches that measure whole runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ray_ep.driver.run.rundir import RunDir
from ray_ep.errors import BadInput, RayEPError

LOOK_S = 0.02
"""Seconds between two looks for a new line of metrics.jsonl: a stat of one file."""
STOP_S = 60.0
"""Seconds that a run which was told to stop may take for it."""


@dataclass(frozen=True, slots=True)
class OwnRun:
    """What a run left, which itself is gone.

    Args:
        metrics: one dict a step. told_at: when the lines of metrics.jsonl were seen first: (lines that were there,
            monotonic seconds), ascending.
    """

    metrics: list[dict[str, Any]]
    told_at: list[tuple[int, float]]

    def seconds(self, after: int, window: int) -> list[float]:
        """Mean seconds of a step in each window of so many steps, after the first `after` ones.

        All that happens between two steps is in it. What is left at the end is no window, unless it is the only one.
        """
        told = [t for t in self.told_at if t[0] >= after]
        ends = [told[0]]
        for now in told[1:]:
            if now[0] >= ends[-1][0] + window:
                ends.append(now)
        ends = ends if len(ends) > 1 else [told[0], told[-1]]
        return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(ends)]


def own_run(config: Path, what: str) -> OwnRun:
    """Train as the file `config` says, whose run_dir is `run` beside it; blocks until it is done.

    Args:
        what: which bench asks, for its errors.

    Raises:
        BadInput, RayEPError: the run was refused, or failed; its last lines are in the message.
    """
    folder = config.parent
    with tempfile.TemporaryFile("w+") as said:
        code = "from ray_ep.cli import main; main()"
        command = [sys.executable, "-c", code, "train", "--config", str(config)]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said}
        # elsewhere: where it starts, resume=auto would take it for the newest run
        with subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet) as child:  # type: ignore[call-overload]
            try:
                told_at = _watched(child, folder / "run" / "metrics.jsonl")
            except BaseException:
                _stop(child)
                raise
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    if child.returncode:
        kind = BadInput if child.returncode == 2 else RayEPError
        raise kind(f"{what}: ray-ep train failed:\n  " + "\n  ".join(lines[-12:]))
    with tempfile.TemporaryDirectory(dir=folder) as rest:  # the next run begins anew, and a checkpoint is large
        metrics = RunDir((folder / "run").rename(f"{rest}/run")).metrics()
    return OwnRun(metrics, told_at)


def _watched(child: subprocess.Popen[bytes], path: Path) -> list[tuple[int, float]]:
    """When a run's steps were told, until it has ended."""
    told_at: list[tuple[int, float]] = []
    size = lines = 0
    while child.poll() is None:
        now = path.stat().st_size if path.exists() else 0
        if now > size:
            with path.open("rb") as file:
                file.seek(size)
                lines += file.read(now - size).count(b"\n")
            told_at.append((lines, time.monotonic()))
            size = now
        time.sleep(LOOK_S)
    return told_at


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Have a run end at once, and take its ranks and Ray along: a second signal stops it without saving."""
    for patience in (1.0, STOP_S):
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue
    child.kill()
