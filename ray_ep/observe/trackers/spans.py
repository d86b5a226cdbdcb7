"""What a run did as spans of time, made of its records and events: pure, without OpenTelemetry.

    run
    step                  one optimizer step
    ├── step.data ...     its phases
    step.evaluation       on the held-out split
    rebalance             a decision, from the step after which it was asked for until it was there
    migration             experts move
    rebalance.measured    steps that were timed before a move was judged
    recovery              from the last sign of life of a lost rank to the end of the first step without it
    ├── recovery.detect   ... decide, regroup, restore, first_step
    resize                ranks come or go as planned, and its parts
    checkpoint            a save

Times are nanoseconds since 1970.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_ep.driver.ending import STATUS
from ray_ep.driver.records import Event, StepRecord
from ray_ep.driver.states import State
from ray_ep.errors import PlacementError
from ray_ep.placement import Placement
from ray_ep.placement.migration import moves

PREFIX = "ray_ep."
"""Before the name of every attribute."""
REMEMBERED = 1000
"""Steps whose end is remembered, the newest, for what follows from them later."""
LINKED = 100
"""Repeated steps that a recovery is linked to at most."""

_LEFT_OUT = ("phase_seconds", "max_expert_load", "migration_seconds", "rebalance_seconds", "eval_loss", "eval_seconds")

Value = str | bool | int | float | list[str]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Args:
        start, end: nanoseconds since 1970.
        key: by which later spans may be linked to it; "": by none.
        links: keys of earlier ones.
        failed: why it failed; "": it did not.
    """

    name: str
    start: int
    end: int
    attributes: Mapping[str, Value] = field(default_factory=dict)
    children: tuple[Span, ...] = ()
    key: str = ""
    links: tuple[str, ...] = ()
    failed: str = ""


class Spans:
    """Makes spans of what a run tells, in its order.

    Args:
        run_dir: where its placements are, which tell how many experts a move took to other ranks.
        start: the event that says that it begins.
    """

    def __init__(self, run_dir: Path, start: Event):
        self._path, self._start = run_dir, start
        self._ends: OrderedDict[int, int] = OrderedDict()  # of steps
        self._migrating = 0  # since when, and with what; 0: not
        self._version: Value = -1  # of the placement that the last decision moves to
        self._told: dict[str, Callable[[Event], list[Span]]] = {
            "state": self._state,
            "rebalance": self._rebalance,
            "recovered": self._recovered,
            "elastic": self._resized,
            "checkpoint": self._checkpoint,
            "checkpoint-failed": self._not_saved,
        }

    def of_step(self, record: StepRecord) -> list[Span]:
        """A step, and the evaluation after it."""
        end = nanoseconds(record.at)
        start = end - _ns(record.step_seconds)
        self._ends[record.step] = end
        while len(self._ends) > REMEMBERED:
            self._ends.popitem(last=False)
        figures = {k: v for k, v in record.line().items() if k not in _LEFT_OUT}
        phases = laid_out("step", record.phase_seconds, start, end)
        step = Span("step", start, end, _attributes(figures), phases, _step(record.step))
        if record.eval_seconds is None:
            return [step]
        began = end + _ns(record.rebalance_seconds or 0.0)
        told = _attributes({"step": record.step, "eval_loss": record.eval_loss})
        return [step, Span("step.evaluation", began, began + _ns(record.eval_seconds), told, links=(step.key,))]

    def of_event(self, event: Event) -> list[Span]:
        """What an event ends; nothing for most."""
        told = self._told.get(event.kind)
        return [] if told is None else told(event)

    def of_run(self, end: datetime, status: str, why: str) -> Span:
        """The whole; `why`: the sentence of how it ended."""
        told = _attributes({**self._start.fields, "status": status})
        failed = why if status == STATUS["failed"] else ""
        return Span("run", nanoseconds(self._start.at), nanoseconds(end), told, key="run", failed=failed)

    def _state(self, event: Event) -> list[Span]:
        said, migrating = event.fields, State.MIGRATING.value
        if said.get("to") == migrating:
            self._migrating = nanoseconds(event.at)
        if said.get("from") != migrating or not self._migrating:
            return []
        start, self._migrating = self._migrating, 0
        told = {"step": event.step, "placement_version": self._version, "moved_experts": self._moved()}
        failed = event.words if said.get("to") not in (State.STEPPING.value, State.PAUSED.value) else ""
        links = (f"rebalance {self._version}",)
        key = f"migration {event.step}"
        return [Span("migration", start, nanoseconds(event.at), _attributes(told), (), key, links, failed)]

    def _moved(self) -> int | None:
        """Experts that came to another rank with the newest placement; None: its files do not tell."""
        try:
            version = int(str(self._version))
            files = [self._path / "placements" / f"{v:04d}.json" for v in (version - 1, version)]
            before, after = map(Placement.load, files)
            return len(moves(before, after))
        except (OSError, PlacementError, ValueError):
            return None

    def _rebalance(self, event: Event) -> list[Span]:
        said, end = event.fields, nanoseconds(event.at)
        told = {"step": event.step, "words": event.words, **said}
        if "moved_after" in said:
            start = self._ends.get(said["moved_after"], end)
            links = (f"migration {said['moved_after']}",)
            return [Span("rebalance.measured", start, end, _attributes(told), links=links)]
        start, failed = self._ends.get(said.get("asked_after", -1), end), "" if "moves" in said else event.words
        key = ""
        if said.get("moves"):
            self._version = said["placement_version"]
            key = f"rebalance {self._version}"
        return [Span("rebalance", start, end, _attributes(told), (), key, (), failed)]

    def _recovered(self, event: Event) -> list[Span]:
        said, done = event.fields, event.fields.get("done", 0)
        again = range(done + 1, done + 1 + min(said.get("repeated", 0), LINKED))
        return [self._of_clocks("recovery", event, tuple(map(_step, again)))]

    def _resized(self, event: Event) -> list[Span]:
        return [self._of_clocks("resize", event)] if event.fields.get("seconds") else []

    def _of_clocks(self, name: str, event: Event, links: tuple[str, ...] = ()) -> Span:
        """One that ended when it was told, and whose parts follow each other."""
        end, seconds = nanoseconds(event.at), event.fields.get("seconds", {})
        start = end - sum(map(_ns, seconds.values()))
        told = {"step": event.step, "words": event.words, **{k: v for k, v in event.fields.items() if k != "seconds"}}
        return Span(name, start, end, _attributes(told), laid_out(name, seconds, start, end), links=links)

    def _checkpoint(self, event: Event) -> list[Span]:
        end = nanoseconds(event.at)
        told = _attributes({"step": event.step, "url": event.fields.get("url")})
        return [Span("checkpoint", end - _ns(event.fields.get("seconds") or 0.0), end, told)]

    def _not_saved(self, event: Event) -> list[Span]:
        at = nanoseconds(event.at)
        return [Span("checkpoint", at, at, _attributes({"step": event.step}), failed=event.words)]


def laid_out(name: str, seconds: Mapping[str, float], start: int, end: int) -> tuple[Span, ...]:
    """Parts whose seconds are known, end to end in their order, none beyond `end`."""
    spans, at = [], start
    for part, took in seconds.items():
        until = min(at + _ns(max(took, 0.0)), end)
        spans.append(Span(f"{name}.{part}", at, until))
        at = until
    return tuple(spans)


def nanoseconds(at: datetime) -> int:
    """Since 1970."""
    return round(at.timestamp() * 1e6) * 1000


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _step(number: int) -> str:
    return f"step {number}"


def _attributes(figures: Mapping[str, Any]) -> dict[str, Value]:
    """Under the package's prefix; what no attribute can hold is left out, lists are of words."""
    told: dict[str, Value] = {}
    for name, value in figures.items():
        if isinstance(value, str | bool | int | float):
            told[PREFIX + name] = value
        elif isinstance(value, list | tuple):
            told[PREFIX + name] = [str(v) for v in value]
    return told
