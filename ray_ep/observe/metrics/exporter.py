"""Hands figures to Ray's metrics, which Prometheus scrapes from every node. The one module here that knows Ray."""

from __future__ import annotations

import string
from typing import Any
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge, Histogram

from ray_ep.observe.metrics.figures import Key, Taken
from ray_ep.observe.metrics.table import METRICS, SECONDS, Kind

_ASCII = string.printable  # all that Ray takes in a tag; the rest becomes %XX


class Total(Counter):
    """A counter that can be shown before it has counted anything."""

    def show(self, tags: dict[str, str]) -> None:
        """The series is there from now on, at 0 if it is new."""
        self._record(0.0, tags=tags)


class Exporter:
    """Sends the figures of one run; Ray must be connected.

    Args:
        run: the value of the tag of that name.
    """

    def __init__(self, run: str):
        self._run = run
        self._made: dict[str, Any] = {}  # a Gauge, Total or Histogram by name
        self._sent: dict[Key, float] = {}

    def send(self, figures: Taken) -> None:
        """All gauges once more, for one that is not set again fades; of counters what has come since the last call."""
        for (name, tags), value in figures.gauges.items():
            self._metric(name).set(value, tags=self._tags(name, tags))
        for key, total in figures.totals.items():
            name, tags = key
            more = total - self._sent.get(key, 0.0)
            if more > 0:
                self._metric(name).inc(more, tags=self._tags(name, tags))
            elif key not in self._sent:
                self._metric(name).show(self._tags(name, tags))
            self._sent[key] = total
        for name, value in figures.observed:
            self._metric(name).observe(value, tags=self._tags(name, ()))

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            metric = METRICS[name]
            tags = ("run", *metric.tags)
            if metric.kind is Kind.HISTOGRAM:
                self._made[name] = Histogram(name, metric.meaning, list(SECONDS), tags)
            else:
                kind = Gauge if metric.kind is Kind.GAUGE else Total
                self._made[name] = kind(name, metric.meaning, tags)
        return self._made[name]

    def _tags(self, name: str, values: tuple[str, ...]) -> dict[str, str]:
        tags = {"run": self._run, **dict(zip(METRICS[name].tags, values, strict=True))}
        return {tag: quote(value, safe=_ASCII) for tag, value in tags.items()}
