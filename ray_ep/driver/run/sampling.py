"""When ranks are asked for samples of recent tokens, for whoever looks at the run: so seldom that no step feels it.

A sample is small where pair counts are not: [L, N, K] expert sets of a few thousand tokens. No Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

FIRST_S = 10.0
"""From the first step to the first sample."""
EVERY_S = 60.0
"""From one sample to the next, at least."""
SHARE = 1000.0
"""Times what the last one took is stepped before the next."""


class Sampling:
    """Samples of one run.

    Args:
        ask: the ranks, between two steps; [L, N, K] expert sets, the same tokens in each layer. clock: seconds.
    """

    def __init__(self, ask: Callable[[], np.ndarray], clock: Callable[[], float] = time.monotonic):
        self._ask, self._clock = ask, clock
        self._next: float | None = None

    def take(self) -> np.ndarray | None:
        """After a step: a sample, or None where none is due. Raises LostError: a rank was lost meanwhile."""
        began = self._clock()
        if self._next is None:
            self._next = began + FIRST_S
        if began < self._next:
            return None
        found = self._ask()
        ended = self._clock()
        self._next = ended + max(EVERY_S, SHARE * (ended - began))
        return found
