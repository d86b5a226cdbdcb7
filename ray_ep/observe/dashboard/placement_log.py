"""A text file of a run's placement among the logs of the Ray session, for the Logs view of any dashboard.

A listener of the driver. What it writes is made from the run directory, as every other view of the run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ray_ep.driver.records import Event, StepRecord
from ray_ep.observe.state import RunState

KINDS = ("members", "placement")
"""Events after which the file is another one."""
MOST_LINES = 2000
"""Of layers and versions; a longer file is a wall of numbers."""


def session_logs() -> Path | None:
    """The logs of the Ray session that this process is in, on this node; None: it is in none."""
    import ray

    node = ray._private.worker._global_node if ray.is_initialized() else None
    return None if node is None else Path(node.get_logs_dir_path())


class PlacementLog:
    """Keeps `ray_ep-RUN.placement.txt` up to date while the run goes; a listener.

    Args:
        logs: asked for the folder, when there is something to write; None: nowhere.
    """

    def __init__(self, run_dir: Path, logs: Callable[[], Path | None] = session_logs):
        self._state, self._logs = RunState(run_dir), logs
        self._begun = False

    def start(self, event: Event) -> None:
        """The ranks are ready, and Ray is there."""
        self._begun = True
        self._write()

    def step(self, record: StepRecord) -> None:
        """Nothing: a step moves nobody."""

    def event(self, event: Event) -> None:
        """Write it anew where somebody has moved."""
        if self._begun and event.kind in KINDS:
            self._write()

    def _write(self) -> None:
        folder = self._logs()
        if folder is None:
            return
        self._state.refresh()
        name = re.sub(r"[^\w.-]", "_", self._state.path.resolve().name)
        path = folder / f"ray_ep-{name}.placement.txt"
        part = path.with_suffix(".part")
        part.write_text(placement_text(self._state), encoding="utf-8")
        os.replace(part, path)


def placement_text(state: RunState) -> str:
    """Who holds which expert, and which placements there were and why, the newest first."""
    tree = state.snapshot("run", "membership", "placement")
    ranks, placement = tree["membership"]["ranks"], tree["placement"]
    lines = [f"run {tree['run']['path']}, epoch {tree['membership']['epoch']}, placement {placement['version']}", ""]
    lines += [f"rank {r['rank']} ({r['member']}): {r['host']} ({r['address']}), {r['device']}" for r in ranks]
    lines += ["", "experts of each layer by rank; * owns the expert, others are its replicas"]
    for layer, (slots, primary) in enumerate(zip(placement["slots"], placement["primary"], strict=True)):
        held = [_held(experts, primary, rank) for rank, experts in enumerate(slots)]
        lines.append(f"layer {layer}: " + " | ".join(f"rank {rank}: {words}" for rank, words in enumerate(held)))
    lines += ["", "placements, the newest first"]
    for version in reversed(placement["versions"]):
        moved = f", {version['moved']} experts moved" if version.get("moved") else ""
        lines.append(f"{version['version']}, after step {version.get('step')}: {version.get('words', '')}{moved}")
    return "\n".join(lines[:MOST_LINES]) + "\n"


def _held(experts: list[int], primary: list[int], rank: int) -> str:
    return " ".join(f"{e}{'*' if primary[e] == rank else ''}" for e in sorted(experts) if e >= 0) or "none"
