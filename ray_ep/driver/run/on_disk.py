"""Where a run has its snapshots on disk, and whether the one there is newer than its checkpoints. No Ray."""

from __future__ import annotations

from ray_ep.config.paths import is_url
from ray_ep.config.schema import Config
from ray_ep.driver.run.rundir import RunDir, checkpoint_url
from ray_ep.errors import CheckpointError
from ray_ep.rank.saved.checkpoint import QUICK, Checkpoint
from ray_ep.rank.saved.directory import Directory


def snapshots_url(cfg: Config, run: RunDir) -> str:
    """The directory of a run's snapshots on disk; "" where checkpoints go to a store, which has none."""
    url = checkpoint_url(cfg, run)
    return "" if is_url(url) else f"{url}/snapshots"


def newest_step(url: str) -> int:
    """Step of the newest whole snapshot in this directory; -1: there is none."""
    return max(Directory(url).steps(), default=-1) if url else -1


def newer_snapshot(cfg: Config, run: RunDir, than: int) -> tuple[Checkpoint | None, str]:
    """The snapshot on disk if it is of a later step than this, and what to tell of one that is damaged.

    Every checkpoint that is written removes the snapshots of before it: what is there came after it.
    """
    url = snapshots_url(cfg, run)
    step = newest_step(url)
    if step <= than:
        return None, ""
    try:
        found = Checkpoint(Directory(url), step)
        found.verify(QUICK)
    except CheckpointError as e:
        return None, f"the snapshot of step {step} on disk is passed over: {e}"
    return found, ""
