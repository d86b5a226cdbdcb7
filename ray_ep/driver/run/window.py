"""Where the tokens of recent steps went, summed for whoever looks: one file for each placement, written now and then.

Sums and writes on the thread that records are handed to; asks nobody. L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ray_ep.driver.records import StepRecord

EVERY_S = 5.0
"""Seconds from one writing to the next, at least."""
KEPT = 100
"""Files that are kept, those of the newest placements."""


class Window:
    """Loads under the present placement: of all its steps, and of the newest 5 to 10 seconds.

    Args:
        folder: of the files `load-NNNN.npz`, N the placement's version; their arrays are in `arrays`.
        clock: seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic):
        self.folder, self.clock = folder, clock
        self.version = -1
        self._whole: list[np.ndarray] = []  # load of all steps, the last steps' numbers
        self._recent: list[_Sum] = []  # at most two: one that is written, one that grows
        self._written = -EVERY_S

    def due(self, record: StepRecord) -> bool:
        """Whether `write` is to be called before a step is added."""
        return bool(self._recent) and (record.placement_version != self.version or self._late())

    def add(self, record: StepRecord) -> None:
        """Count a step."""
        if record.placement_version != self.version or not self._fits(record):
            self.version, self._recent, self._whole = record.placement_version, [], []
        if not self._whole:
            self._whole = [np.zeros_like(record.load, np.float64), np.array([record.step, record.step])]
        self._whole[0] += record.load
        self._whole[1][1] = record.step
        if not self._recent or self._recent[-1].closed:
            self._recent = [*self._recent[-1:], _Sum(record)]
        self._recent[-1].add(record)

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is to write.

        load [L, E] tokens that each expert received since `steps` [2], the first and the last; of the newest steps
        (recent_steps [2], recent_seconds that they took) recent [L, E] likewise, ranks [L, R] tokens that each rank
        computed, sent [R, R] bytes from rank to rank.
        """
        recent = self._recent
        return {
            "load": self._whole[0],
            "steps": self._whole[1],
            "recent": np.sum([s.load for s in recent], axis=0),
            "ranks": np.sum([s.ranks for s in recent], axis=0),
            "sent": np.sum([s.sent for s in recent], axis=0),
            "recent_steps": np.array([recent[0].first, recent[-1].last]),
            "recent_seconds": np.float64(sum(s.seconds for s in recent)),
        }

    def write(self) -> None:
        """Write what was counted, if anything was. Raises OSError: nothing is left half written."""
        if not self._recent or self._recent[-1].closed:
            return
        self._written, self._recent[-1].closed = self.clock(), True
        part = self.folder / "load.part.npz"
        try:
            with part.open("wb") as file:
                np.savez(file, **self.arrays())  # type: ignore[arg-type]
            os.replace(part, self.folder / f"load-{self.version:04d}.npz")
        finally:
            part.unlink(missing_ok=True)
        (self.folder / f"load-{self.version - KEPT:04d}.npz").unlink(missing_ok=True)

    def _late(self) -> bool:
        return self.clock() - self._written >= EVERY_S and not self._recent[-1].closed

    def _fits(self, record: StepRecord) -> bool:
        last = self._recent[-1] if self._recent else None
        return last is None or (last.load.shape, last.sent.shape) == (record.load.shape, record.sent.shape)


class _Sum:
    """Sums over some steps."""

    def __init__(self, record: StepRecord):
        self.load, self.ranks, self.sent = (
            np.zeros(a.shape, np.float64) for a in (record.load, record.rank_load, record.sent)
        )
        self.seconds, self.first, self.last, self.closed = 0.0, record.step, record.step, False

    def add(self, record: StepRecord) -> None:
        """Count one."""
        self.load += record.load
        self.ranks += record.rank_load
        self.sent += record.sent
        self.seconds += record.step_seconds
        self.last = record.step
