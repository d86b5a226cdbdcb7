"""What `ray-ep simulate` knows of a run's snapshots: whether they are taken, and what they hold beside experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_ep.observe.state import RunState
from ray_ep.observe.state.case import state_of
from ray_ep.placement.cost.memory import HELD, SnapshotMemory


def snapshots_of(run: RunState | None) -> SnapshotMemory:
    """Those of a run as it is configured; without one those that are taken by default."""
    if run is None:
        return SnapshotMemory()
    parameters = _dense(run.standing.model)
    dense = None if parameters is None else float(parameters * state_of(run))
    return SnapshotMemory(bool(run.setting("snapshot.every", 1)), bool(run.setting("snapshot.to_disk", False)), dense)


def words(snapshots: SnapshotMemory, optimizer_bytes: float) -> str:
    """What is counted of them, as a note below the table's head."""
    if not snapshots.taken:
        return "snapshots: none, snapshot.every is 0"
    if not optimizer_bytes:
        return "snapshots: none, nothing is trained (--cost optimizer_bytes=BYTES: masters and moments of one expert)"
    if snapshots.dense_bytes is None:
        return "snapshots: of experts alone, the size of the dense part is not known"
    return f"snapshots: {HELD * snapshots.dense_bytes / 1e6:,.0f} MB of them on every rank are of the dense part"


def _dense(start: Mapping[str, Any]) -> int | None:
    """Parameters that every rank has, of what a run said when it started; None: it did not say."""
    told = [start.get(name) for name in ("parameters", "layers", "experts", "expert_parameters")]
    numbers = [x for x in told if isinstance(x, int)]
    if len(numbers) < len(told):
        return None
    every, layers, experts, one = numbers
    return max(every - layers * experts * one, 0)
