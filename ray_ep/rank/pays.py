"""Whether balance inside the step pays, decided by the run's own steps: some with it, some without, in turn.

Pure; all ranks feed it the same figures and so decide the same.
"""

from __future__ import annotations

from statistics import median

import numpy as np

WARM_STEPS = 2
"""Steps that are not counted: the first ones measure, compile and allocate."""

COMPARED_STEPS = 8
"""Steps with and steps without that are compared, in the order with, without, without, with: a drift touches both."""

EVEN = 1.02
"""Fullest rank's load over the mean up to which balance is off without a trial: there is nothing to gain."""

ASK_AGAIN = 0.1
"""The question is asked again when the imbalance has moved by this since the answer."""

LEAST = 50
"""Fewest steps between an answer and the next question."""


def uneven(load: np.ndarray) -> float:
    """Fullest over mean of load [L, ...], mean over layers; 1 is even."""
    return float((load.max(1) / np.maximum(load.mean(1), 1e-9)).mean())


def uneven_ranks(load: np.ndarray, owner: np.ndarray, ranks: int) -> float:
    """`uneven` of ranks if primaries did it all: load [L, E], owner [L, E] their ranks."""
    of_rank = np.zeros((len(load), ranks))
    for row, where, counts in zip(of_rank, owner, load, strict=True):
        np.add.at(row, where, counts)
    return uneven(of_rank)


class Pays:
    """Turns balance inside the step on and off.

    Use: `on` says how the next step runs; after it `step(seconds, imbalance)`.
    """

    def __init__(self) -> None:
        self.on = True
        self._warm = WARM_STEPS
        self._asked: dict[bool, list[float]] | None = {True: [], False: []}  # seconds with and without; None: answered
        self._recent: list[float] = []  # imbalances since the last answer
        self._answered = 1.0  # imbalance at it

    def step(self, seconds: float, imbalance: float) -> str:
        """Take one step's figures; a sentence when they gave an answer, else "".

        Args:
            seconds: that the step took up to its update.
            imbalance: load of the fullest rank over the mean if no pair were moved (1 is even).
        """
        if self._warm:
            self._warm -= 1
            return ""
        self._recent = [*self._recent, imbalance][-LEAST:]
        now = median(self._recent)
        if self._asked is None:
            if len(self._recent) == LEAST and abs(now - self._answered) >= ASK_AGAIN:
                self._asked, self.on = {True: [], False: []}, True
            return ""
        self._asked[self.on].append(seconds)
        count = sum(map(len, self._asked.values()))
        if now <= EVEN:
            return self._answer(False, now, f"the fullest rank has {now:.2f} of the mean load without it")
        if count < 2 * COMPARED_STEPS:
            self.on = count % 4 in (0, 3)
            return ""
        with_it, without = (median(self._asked[on]) for on in (True, False))
        return self._answer(
            with_it < without,
            now,
            f"a step takes {with_it * 1e3:.0f} ms with it and {without * 1e3:.0f} ms without, its update left out "
            f"({COMPARED_STEPS} of each, in turn); without it the fullest rank has {now:.2f} of the mean load",
        )

    def _answer(self, on: bool, imbalance: float, why: str) -> str:
        self.on, self._asked, self._recent, self._answered = on, None, [], imbalance
        return f"balance inside the step is {'on' if on else 'off'}: {why}"
