"""The steps of a run, as many as a page can draw: of a long run every Nth step, and the newest ones all.

Which steps are kept depends on what the file says alone, never on when it was read. Imports NumPy.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ray_ep.observe.state.files import number, objects, plain

NEWEST = 1000
"""Steps that are kept whole, the newest; of the older ones at most as many again, evenly spread."""
MOST_COLUMNS = 64
"""Figures of a step that are kept; a line has about thirty."""

_STEP = re.compile(rb'\{"step": (\d{1,15}), .*\}')  # a whole line as the driver writes it
_AVERAGED = 1000  # steps: what a long run's step takes now, not what it took days ago


class Steps:
    """Lines of metrics.jsonl by step; a step that is made again takes the place of its line and of all later ones."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}
        self._first: int | None = None
        self._last = 0  # the latest that there ever was: what is kept depends on it
        self._newest = 0
        self._again = 0  # how often a run went back

    @property
    def stride(self) -> int:
        """Of the older steps those are kept whose number is a multiple of this, a power of two."""
        span = 0 if self._first is None else self._last - self._first
        return 1 << max(-(-span // NEWEST) - 1, 0).bit_length()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Lines that are kept, in the order of steps."""
        return [self._rows[step] for step in sorted(self._rows) if self._kept(step)]

    def add(self, lines: list[bytes]) -> bool:
        """Take on lines; whether there was a step among them. Those that would not be kept are not even parsed."""
        told: list[tuple[int, bytes | dict[str, Any]]] = []
        for line in lines:
            if found := _STEP.fullmatch(line):
                told.append((int(found[1]), line))
            else:
                told += [(int(s), o) for o in objects([line]) if abs(s := number(o.get("step"))) < 1e15]
        for step, _ in told:
            self._first = step if self._first is None else min(self._first, step)
            self._last = max(self._last, step)
        for step, what in told:
            if step <= self._newest:
                self._again += 1
                self._rows = {number: row for number, row in self._rows.items() if number < step}
            self._newest = step
            if self._kept(step):
                rows = objects([what]) if isinstance(what, bytes) else [what]
                for row in rows:
                    self._rows[step] = {**row, "step": step}
        if len(self._rows) > 2 * NEWEST + 2:
            self._rows = {step: row for step, row in self._rows.items() if self._kept(step)}
        return bool(told)

    def column(self, name: str) -> np.ndarray:
        """One figure over the steps that are kept, float64 [steps]; NaN where a step lacks it."""
        return np.array([number(row.get(name)) for row in self.rows], dtype=np.float64)

    def phase_seconds(self) -> dict[str, np.ndarray]:
        """Seconds of each phase by name, float64 [steps], over the newest half of the steps that tell, at most 1000.

        A phase that a step lacks took it no time; NaN is what cannot be a time.
        """
        told = [row for row in self.rows if isinstance(row.get("phase_seconds"), dict) and row["phase_seconds"]]
        if not told:
            return {}
        first, last = told[0]["step"], told[-1]["step"]
        before = max(first - 1 + (last - first + 1) // 2, last - _AVERAGED)
        return _phases([row["phase_seconds"] for row in told if row["step"] > before])

    def snapshot(self, mark: str = "") -> dict[str, Any]:
        """Columns over the steps that are kept, None where a step lacks a figure; see the room's docstring.

        Args:
            mark: of an earlier snapshot, which is to be gone on with: only steps after it, if it still holds.
        """
        rows, here = self.rows, f"{self.stride}/{self._again}/"
        told = mark.removeprefix(here)
        after = int(told) if mark.startswith(here) and re.fullmatch(r"-?\d{1,15}", told) else None
        rows = rows if after is None else [row for row in rows if row["step"] > after]
        names: dict[str, None] = {}
        for row in rows:
            names |= {k: None for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        columns = {n: plain(np.array([number(r.get(n)) for r in rows])) for n in list(names)[:MOST_COLUMNS]}
        phases = _phases([p if isinstance(p := row.get("phase_seconds"), dict) else {} for row in rows])
        hottest = rows[-1].get("max_expert_load") if rows else None
        loads = np.array([number(load) for load in hottest]) if isinstance(hottest, list) else np.zeros(0)
        return {
            "step": [row["step"] for row in rows],
            "after": after,
            "mark": f"{here}{self._newest}",
            "stride": self.stride,
            "columns": {**columns, "worst_expert_load": [worst(row.get("max_expert_load")) for row in rows]},
            "phase_seconds": {n: plain(s) for n, s in phases.items()},
            "max_expert_load": plain(loads),
        }

    def _kept(self, step: int) -> bool:
        return step > self._last - NEWEST or step % self.stride == 0 or step == self._first


def worst(value: Any) -> float | None:
    """The greatest figure of a list; None: there is none."""
    known = [n for v in value if np.isfinite(n := number(v))] if isinstance(value, list) else []
    return max(known, default=None)


def _phases(told: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = list(dict.fromkeys(str(name) for phases in told for name in phases))[:MOST_COLUMNS]
    columns = {n: np.array([number(phases.get(n, 0.0)) for phases in told], dtype=np.float64) for n in names}
    return {n: np.where(seconds >= 0, seconds, np.nan) for n, seconds in columns.items()}
