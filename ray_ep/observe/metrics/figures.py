"""The figures that a run exports, as they are now: written by one thread, taken by another. Pure; the table alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import isfinite

from ray_ep.observe.metrics.table import METRICS, Kind

Key = tuple[str, tuple[str, ...]]
"""A series: name of the metric, values of its tags in the table's order."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Figures of one moment.

    Args:
        gauges: what is so now. totals: what has come together so far.
        observed: values of histograms since the figures before were taken.
    """

    gauges: dict[Key, float]
    totals: dict[Key, float]
    observed: list[tuple[str, float]]


class Figures:
    """Series and their values. Counters whose tags are known before a run are there from the start, at 0.

    So Prometheus sees each of them grow: of a series that begins with its first event it counts that as none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gauges: dict[Key, float] = {}
        counters = [m for m in METRICS.values() if m.kind is Kind.COUNTER]
        self._totals: dict[Key, float] = {(m.name, tags): 0.0 for m in counters for tags in m.series}
        self._observed: list[tuple[str, float]] = []

    def put(self, name: str, value: float, *tags: object) -> None:
        """A gauge is so now; one that is not finite is left out until it is again."""
        key = _key(name, Kind.GAUGE, tags)
        with self._lock:
            if isfinite(value):
                self._gauges[key] = float(value)
            else:
                self._gauges.pop(key, None)

    def forget(self, *names: str) -> None:
        """Nothing is known of these gauges."""
        with self._lock:
            self._gauges = {key: value for key, value in self._gauges.items() if key[0] not in names}

    def add(self, name: str, value: float, *tags: object) -> None:
        """A counter grows; what is negative or not finite is nothing."""
        key = _key(name, Kind.COUNTER, tags)
        with self._lock:
            self._totals[key] = self._totals.get(key, 0.0) + (float(value) if isfinite(value) and value > 0 else 0.0)

    def count(self, name: str, total: float, *tags: object) -> None:
        """A counter has come to `total`, which is never less than before."""
        key = _key(name, Kind.COUNTER, tags)
        with self._lock:
            self._totals[key] = float(total)

    def observe(self, name: str, value: float) -> None:
        """A histogram has one value more."""
        _key(name, Kind.HISTOGRAM, ())
        with self._lock:
            self._observed.append((name, float(value)))

    def take(self) -> Taken:
        """Everything as it is; what was observed is handed out once."""
        with self._lock:
            observed, self._observed = self._observed, []
            return Taken(dict(self._gauges), dict(self._totals), observed)


def _key(name: str, kind: Kind, tags: tuple[object, ...]) -> Key:
    metric = METRICS[name]
    assert metric.kind is kind, (name, kind)
    assert len(tags) == len(metric.tags), (name, tags)
    return name, tuple(map(str, tags))
