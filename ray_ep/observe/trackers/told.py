"""What a tracker is made with, and the figures of a step as it gets them. Imports no tracker's library."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray_ep.driver.records import Event, StepRecord

IDS = "tracking.json"
"""File of the run directory: what the run is called there, so that it goes on with the same one after `resume=auto`."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a tracker is made with.

    Args:
        project: experiment or project that the run belongs to.
        run_dir: the run's; its last part is its name. config: plain, as config.yaml has it.
        start: the event that says that the run begins; the first step that will be told is the one after its own.
    """

    project: str
    run_dir: Path
    config: dict[str, Any]
    start: Event

    def known(self, tracker: str) -> str | None:
        """The id of this run at a tracker, if it has one."""
        return self._ids().get(tracker)

    def keep(self, tracker: str, run_id: str) -> None:
        """Remember the id; where that cannot be written, a run that goes on is another one there."""
        part = self.run_dir / f"{IDS}.{tracker}.part"
        with suppress(OSError):
            part.write_text(json.dumps({**self._ids(), tracker: run_id}), encoding="utf-8")
            os.replace(part, self.run_dir / IDS)

    def _ids(self) -> dict[str, str]:
        try:
            ids = json.loads((self.run_dir / IDS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in ids.items()} if isinstance(ids, dict) else {}


class Tracker(Protocol):
    """What is made of a library; called from one thread, and a call may take its time."""

    def step(self, record: StepRecord) -> None:
        """One step, without its arrays."""

    def event(self, event: Event) -> None:
        """Something happened."""

    def close(self, status: str) -> None:
        """The run has ended: done, interrupted or failed."""


def figures(record: StepRecord) -> dict[str, float]:
    """Numbers of a step by name, as metrics.jsonl has them; those of a list by its place, of a mapping by its key."""
    line = record.line()
    del line["step"]
    return {name: float(value) for name, value in flat(line, "/").items() if isinstance(value, int | float)}


def flat(tree: dict[str, Any], between: str = ".") -> dict[str, Any]:
    """{path: value} of what is in mappings and lists of mappings' values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{key}{between}{k}": v for k, v in flat(value, between).items()}
        elif isinstance(value, list) and between == "/":
            found |= {f"{key}{between}{place}": v for place, v in enumerate(value)}
        else:
            found[key] = value
    return found
