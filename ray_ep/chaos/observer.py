"""What is seen of a run from outside: its steps, recoveries and changes of membership, with the time they were seen at.

Reads the lines that a run appends to metrics.jsonl and events.jsonl. Imports the standard library alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_S = 0.02
"""Seconds between two looks: the error of every time that is told."""


@dataclass(frozen=True, slots=True)
class Step:
    """A line of metrics.jsonl: a step, counted from 1, that was made in `epoch` by `ranks`; seen `at`."""

    at: float
    number: int
    loss: float
    seconds: float
    epoch: int
    ranks: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """An event of kind recovered.

    Args:
        at: when it was seen: after the first step that was made without the lost ones, before that step's line.
        repeated: steps that were made again. seconds: of each of its clocks.
    """

    at: float
    lost: tuple[str, ...]
    epoch: int
    ranks: int
    repeated: int
    seconds: Mapping[str, float]
    words: str


@dataclass(frozen=True, slots=True)
class Switch:
    """An event of kind elastic that tells who came and who left between two steps, and the seconds that it took."""

    at: float
    come: tuple[str, ...]
    left: tuple[str, ...]
    seconds: float


class Observer:
    """Watches one run directory from a thread of its own while used as a context manager.

    Args:
        clock: seconds.

    Attributes:
        steps, recoveries, switches: as they came.
        failures, planned: ranks that were lost, and that left as planned, as the run counts them.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic):
        self._run_dir, self._clock = run_dir, clock
        self.steps: list[Step] = []
        self.recoveries: list[Recovery] = []
        self.switches: list[Switch] = []
        self.failures = self.planned = 0
        self._read: dict[str, int] = {}  # bytes of each file that were read
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray_ep-observer", daemon=True)

    def __enter__(self) -> Observer:
        """Watching begins; the files need not be there yet."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """All that was written before is seen."""
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        """Read what is new. A step's line is written after the event of the recovery before it, so it is read first."""
        now = self._clock()
        steps, events = self._new_lines("metrics.jsonl"), self._new_lines("events.jsonl")
        for event in events:
            fields = event.get("fields", {})
            if event.get("kind") == "recovered":
                self.recoveries.append(_recovery(now, event))
            elif event.get("kind") == "elastic" and "come" in fields:
                took = sum(fields["seconds"].values())
                self.switches.append(Switch(now, tuple(fields["come"]), tuple(fields["left"]), took))
            self.failures = fields.get("failures", self.failures)
            self.planned = fields.get("planned_leaves", self.planned)
        for line in steps:
            self.steps.append(_step(now, line))

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            self.look()
        self.look()

    def _new_lines(self, name: str) -> list[dict[str, Any]]:
        path, begin = self._run_dir / name, self._read.get(name, 0)
        try:
            with open(path, "rb") as file:
                file.seek(begin)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read[name] = begin + len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _step(now: float, line: dict[str, Any]) -> Step:
    loss = line.get("loss")
    return Step(
        at=now,
        number=line["step"],
        loss=float("nan") if loss is None else loss,
        seconds=line["step_seconds"],
        epoch=line["epoch"],
        ranks=line["world_size"],
    )


def _recovery(now: float, event: dict[str, Any]) -> Recovery:
    fields = event["fields"]
    return Recovery(
        at=now,
        lost=tuple(fields["lost"]),
        epoch=fields["epoch"],
        ranks=fields["ranks"],
        repeated=fields["repeated"],
        seconds=fields["seconds"],
        words=event["message"],
    )
