"""When routing has collapsed: a pure function of recent loads, its answer with its reason; and whom it is told.

NumPy only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from ray_ep.config.schema import RouterConfig
from ray_ep.driver.records import Event

JUDGED = 20
"""Steps whose loads are added up before they are judged; what was quiet for as long is told again."""


class Alarm:
    """Warns once when routing collapses, and again only after it had recovered for as long as a window.

    Args:
        publish: tells an operator.
    """

    def __init__(self, cfg: RouterConfig, publish: Callable[[Event], None]):
        self.cfg, self.publish = cfg, publish
        self._loads: deque[np.ndarray[Any, Any]] = deque(maxlen=JUDGED)
        self._last: dict[tuple[str, int], int] = {}  # step at which each alarm was last true

    def watch(self, done: int, load: np.ndarray[Any, Any]) -> None:
        """One more step, the `done`-th; load [L, E]: tokens that each expert received in it."""
        self._loads.append(load)
        if len(self._loads) < JUDGED:
            return
        for (alarm, layer), words in collapse(np.sum(self._loads, axis=0), self.cfg).items():
            if (alarm, layer) not in self._last or done - self._last[alarm, layer] > JUDGED:
                self.publish(Event("routing-collapse", f"step {done}: {words}", {"alarm": alarm, "layer": layer}))
            self._last[alarm, layer] = done


def collapse(load: np.ndarray, cfg: RouterConfig) -> dict[tuple[str, int], str]:
    """What is wrong with the loads [L, E] of the last JUDGED steps.

    Returns:
        {(kind, layer): sentence naming layer and experts}; empty if all is well. kind is starved or unbalanced.
    """
    found: dict[tuple[str, int], str] = {}
    for layer, row in enumerate(load):
        mean, top = float(row.mean()), int(row.argmax())
        if mean == 0:
            continue
        starved = np.nonzero(row < cfg.alarm_starved * mean)[0]
        if len(starved):
            names = ", ".join(map(str, starved[:8])) + (" ..." if len(starved) > 8 else "")
            found["starved", layer] = (
                f"layer {layer}: {len(starved)} of {len(row)} experts starve (under {cfg.alarm_starved:g} of "
                f"their fair load): {names}"
            )
        if mean / row[top] < cfg.alarm_balancedness:
            found["unbalanced", layer] = (
                f"layer {layer}: balancedness {mean / row[top]:.2f} is under {cfg.alarm_balancedness:g}; expert {top} "
                f"gets {row[top] / mean:.1f} times the mean load"
            )
    return found
