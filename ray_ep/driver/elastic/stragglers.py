"""Ranks that are there but slow, told by what their own work took them. Pure NumPy; who is to go, others decide.

R ranks. A rank has two kinds of work: rows of the batch (all but experts), and (token, expert) pairs (experts).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_ep.config.schema import BatchConfig
from ray_ep.driver.records import Event
from ray_ep.rank.results import StepResult
from ray_ep.rank.step.clock import STEP_PHASES
from ray_ep.rank.step.forward import shared

SLOW = 3.0
"""Times what others take for the same work, from which a rank counts as slow."""
WELL = 2.0
"""Times, under which it does so no more."""
JUDGED = 10
"""Steps whose median counts: one slow step, or a rank that was stopped for a while, is no slow rank."""

_ROWS = ("data", "forward", "dispatch_forward", "backward", "dispatch_backward")
_EXPERTS = ("experts_forward", "experts_backward")
"""Phases of a rank's own work; in the others it waits for ranks, too, or works on what it owns (update)."""

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Stragglers:
    """Names each slow rank once, and once more when it is as fast as others again.

    Attributes:
        slow: members that are slow now, in the order in which they became so.
    """

    def __init__(self, batch: BatchConfig):
        self.batch = batch
        self.slow: list[str] = []
        self._recent: dict[str, deque[float]] = {}

    def after_step(self, members: Sequence[str], results: Sequence[StepResult]) -> list[Event]:
        """What there is to say after a step, given the ids of its ranks [R] and what each said of it [R]."""
        self._recent = {m: self._recent.get(m, deque(maxlen=JUDGED)) for m in members}
        self.slow = [m for m in self.slow if m in members]
        if len(members) < 2:
            return []
        passes = self.batch.accumulation
        rows = [passes * (high - low) for low, high in shared(self.batch.sequences // passes, len(members))]
        for recent, times in zip(self._recent.values(), slowness(results, rows), strict=True):
            recent.append(float(times))
        return [event for rank, member in enumerate(members) if (event := self._judged(rank, member)) is not None]

    def _judged(self, rank: int, member: str) -> Event | None:
        times, was = float(np.median(self._recent[member])), member in self.slow
        if len(self._recent[member]) < JUDGED or (times >= WELL if was else times <= SLOW):
            return None
        fields = {"rank": rank, "member": member, "slow": not was, "times": times}
        what = f"rank {rank} ({member}) takes {times:.1f} times as long as the others for the same work"
        if was:
            self.slow.remove(member)
            return Event("straggler", f"{what}: it is slow no more", fields)
        self.slow.append(member)
        return Event("straggler", f"{what}, in the median of {JUDGED} steps (slow: over {SLOW:g})", fields)


def slowness(results: Sequence[StepResult], rows: Sequence[int]) -> Floats:
    """[R] seconds of each rank's own work over what it would take the median of the other ranks; 1 where nothing tells.

    Args:
        rows: [R] of the batch that each rank had.
    """
    seconds = np.stack([r.usage.phases for r in results])  # [R, phases]
    spent = np.stack([_of(seconds, _ROWS), _of(seconds, _EXPERTS)], 1)  # [R, 2]
    work = np.stack([np.asarray(rows, np.float64), [float(r.usage.pairs.sum()) for r in results]], 1)
    own, usual = np.zeros(len(results)), np.zeros(len(results))
    for kind in range(2):
        had = np.flatnonzero((work[:, kind] > 0) & (spent[:, kind] > 0))
        if len(had) > 1:
            own[had] += spent[had, kind]
            usual[had] += work[had, kind] * _median_of_others(spent[had, kind] / work[had, kind])
    return np.divide(own, usual, out=np.ones_like(own), where=usual > 0)


def _median_of_others(values: Floats) -> Floats:
    """[n] for each of n > 1 values the median of all others."""
    order, others = np.argsort(values), len(values) - 1
    place = np.empty_like(order)
    place[order] = np.arange(len(values))
    ranked = values[order]
    low, high = (ranked[at + (at >= place)] for at in ((others - 1) // 2, others // 2))
    middle: Floats = (low + high) / 2
    return middle


def _of(seconds: Floats, phases: Sequence[str]) -> Floats:
    total: Floats = seconds[:, [STEP_PHASES.index(name) for name in phases]].sum(1)
    return total
