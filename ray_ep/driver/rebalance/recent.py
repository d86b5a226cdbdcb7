"""What recent steps say: decayed loads and times, and from them the figures of the cost model. Pure NumPy, no Ray.

L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_ep.placement import StepCosts

NOW = 5
"""Steps whose median is what a step takes now: as many as a slow link needs to be noticed."""
USUAL = 25
"""Steps whose median is what a pair takes on a rank: a slow while, or the first step, is not the rank's speed."""
ALIKE = 1.25
"""Ranks whose seconds a pair differ by less are taken for equally fast: timing noise is no reason to move experts."""
FEW = 0.05
"""Share of the mean pairs. A rank that computed less says nothing about its speed."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a step's costs depend on beside what is measured.

    Args:
        tokens_per_rank: in a step. hidden: size of a token's hidden state. parameters: of one expert.
        item_bytes: of a compute weight. state_bytes: of what a primary keeps of one parameter beside it.
        passes: times a hidden state crosses each way in a step: forward and backward (and a recomputation).
        kind: how tokens travel: flat, two_level or all_gather.
    """

    tokens_per_rank: int
    hidden: int
    parameters: int
    item_bytes: int
    state_bytes: int
    passes: int
    kind: str


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step as the ranks measured it.

    Args:
        load: [L, E] tokens each expert received. pairs: [R, L] (token, expert) pairs each rank computed.
        experts, exchange: [R] seconds; waiting for peers counts as exchange.
        sent: [R, R] bytes from rank (row) to rank.
        seconds: of the whole step.
    """

    load: np.ndarray
    pairs: np.ndarray
    experts: np.ndarray
    exchange: np.ndarray
    sent: np.ndarray
    seconds: float


class Recent:
    """Figures of the last steps. Loads are decayed sums; what a pair or a step takes is a median.

    Args:
        half_life: in steps.
    """

    def __init__(self, half_life: float):
        self.keep = 0.5 ** (1 / half_life)
        self.load = np.zeros((0, 0))  # [L, E]
        self._last: deque[MeasuredStep] = deque(maxlen=NOW)
        self._usual: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=USUAL)  # pairs, seconds of experts: each [R]

    def add(self, step: MeasuredStep) -> None:
        """One more step; those before count a little less."""
        load = step.load.astype(np.float64)
        self.load = self.keep * self.load + load if self._last else load
        self._usual.append((step.pairs.sum(1).astype(np.float64), step.experts.astype(np.float64)))
        self._last.append(step)

    def step_seconds(self) -> float:
        """What a step takes now."""
        return float(np.median([s.seconds for s in self._last]))

    def moe_seconds(self) -> float:
        """What the expert layers take of it: exchange and experts of the rank where they take longest."""
        return float(np.median([(s.experts + s.exchange).max() for s in self._last]))

    def imbalance(self, units: Sequence[int]) -> float:
        """Pairs of the busiest unit over the mean unit, mean over layers; units [R]: which unit a rank belongs to.

        A layer without pairs is even.
        """
        pairs = np.sum([s.pairs for s in self._last], axis=0)  # [R, L]
        number = np.unique(units, return_inverse=True)[1]
        total = np.zeros((number.max() + 1, pairs.shape[1]))
        np.add.at(total, number, pairs)
        each = total / np.bincount(number)[:, None]
        mean = pairs.mean(0)
        return float(np.divide(each.max(0), mean, out=np.ones_like(mean), where=mean > 0).mean())

    def costs(self, facts: Facts) -> StepCosts:
        """Figures of the cost model; those that nothing was measured of yet are 0."""
        seconds, speed = self._speeds()
        weights = float(facts.parameters * facts.item_bytes)
        crosses = 0 if facts.kind == "all_gather" else facts.passes  # there every token goes everywhere in any case
        return StepCosts(
            tokens_per_rank=facts.tokens_per_rank,
            token_bytes=float(facts.hidden * facts.item_bytes * crosses),
            expert_seconds=seconds,
            expert_bytes=weights,
            # A primary's master weight travels instead of the compute weight that is its rounding.
            optimizer_bytes=max(facts.parameters * facts.state_bytes - weights, 0.0),
            speed=speed,
            two_level={"flat": False, "two_level": True}.get(facts.kind),
        )

    def _speeds(self) -> tuple[float, tuple[float, ...] | None]:
        """(Seconds a pair on a usual rank, relative speed of each rank; None: all alike)."""
        if not self._usual:
            return 0.0, None
        pairs, experts = (np.stack(x) for x in zip(*self._usual, strict=True))
        told = (pairs > 0) & (experts > 0)  # [steps, R]
        known = (pairs.sum(0) > FEW * max(pairs.sum(0).mean(), 1e-9)) & told.any(0)  # [R]
        if not known.any():
            return 0.0, None
        each = np.ones(len(known))
        of_pair = np.divide(experts, pairs, out=np.full(pairs.shape, np.nan), where=told)
        each[known] = np.nanmedian(of_pair[:, known], axis=0)
        usual = float(np.median(each[known]))
        ratio = np.where(known, each / usual, 1.0)
        if len(pairs) < NOW or ratio.max() < ALIKE * ratio.min():  # of a few steps one may be the first, or a slow one
            return usual, None
        return usual, tuple((1 / ratio).tolist())
