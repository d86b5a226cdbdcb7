"""Where the time of train steps goes on one rank, by phase. Imports nothing of the package.

The layers' own time (dispatch, exchange, experts) is taken out of the phase that it falls into.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

INSIDE = ("dispatch", "exchange", "experts")
"""What MoE layers do, counted forward and backward (a recomputation is backward): planning, packing and summing rows;
all-to-alls, waiting for other ranks included; expert products."""

STEP_PHASES = (
    "data", "forward", *(f"{what}_forward" for what in INSIDE), "backward", *(f"{what}_backward" for what in INSIDE),
    "reduce", "norm", "update", "publish", "rest",
)  # fmt: skip
"""In the order of a step. forward, backward: the model outside of its experts, and the losses; reduce: gradients summed
over ranks and replicas; norm: of the whole gradient; update: clip, optimizer, compute weights; publish: to replicas."""

_INSIDE_OF = {"exchange": "exchange", "experts": "experts"}
"""Phases of the meter that have one of their own here; the others are dispatch."""


class Device(Protocol):
    """What times work on a device: `ray_ep.moe`'s meter."""

    def lap(self, began: Any, add: Callable[[float], None]) -> Any:
        """The present moment there; `add` takes the seconds since `began` once it has come."""


class StepClock:
    """Seconds of each phase since its making: of the host, or of a device, where what has not ended counts later.

    Args:
        layers: seconds that the MoE layers have spent so far, by phase of `ray_ep.moe.PHASES`; it goes on changing.
        clock: seconds, for tests.
        device: where the phases' work is done; None: the host does it.
    """

    def __init__(
        self,
        layers: Mapping[str, float],
        clock: Callable[[], float] = time.perf_counter,
        device: Device | None = None,
    ):
        self.seconds = dict.fromkeys(STEP_PHASES, 0.0)
        self._layers, self._clock, self._device = layers, clock, device
        self._phase, self._inside = "", self._spent()
        self._since: Any = None if device else 0.0  # seconds, or a moment on the device

    def enter(self, phase: str) -> None:
        """From now on time counts for `phase` ("": for none)."""
        if self._device is not None:
            self._since = self._device.lap(self._since, partial(self._add, self._phase))
        else:
            now = self._clock()
            self._add(self._phase, now - self._since)
            self._since = now
        self._phase = phase

    def _add(self, phase: str, seconds: float) -> None:
        inside = self._spent()
        if phase:
            self.seconds[phase] += seconds
            way = "backward" if phase == "backward" else "forward"
            for what, spent in inside.items():
                self.seconds[f"{what}_{way}"] += spent - self._inside[what]
                self.seconds[phase] -= spent - self._inside[what]
        self._inside = inside

    def _spent(self) -> dict[str, float]:
        found = dict.fromkeys(INSIDE, 0.0)
        for name, spent in self._layers.items():
            found[_INSIDE_OF.get(name, "dispatch")] += spent
        return found
