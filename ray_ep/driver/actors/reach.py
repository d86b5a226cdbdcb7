"""Before anything is built: whether every node can read and write what the run needs, and where its directory lies."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ray_ep.errors import ClusterError
from ray_ep.rank.reach import SHOWS_S, DirectoryTrial, seen
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.saved.disk import in_one_line

SHARE_IT = "checkpoint.dir must be a path that all nodes share, or a URL such as s3://bucket/run"
"""What to do where a rank cannot write where the others do."""


class ReachingRanks(Protocol):
    """What is needed of the ranks here."""

    where: list[dict[str, Any]]
    """Node and host of each."""

    def reach(self, trial: DirectoryTrial) -> list[list[str]]:
        """What each rank's node cannot read or write, in words."""


def try_nodes(
    ranks: ReachingRanks,
    url: str,
    reads: tuple[tuple[str, str], ...] = (),
    patience_s: float = SHOWS_S,
) -> None:
    """Have one rank of each node read what the driver wrote into the directory `url`, and write for the driver.

    Leaves nothing there.

    Args:
        reads: (what the user calls it, file or directory) that every node must read.

    Raises:
        ClusterError: something failed; the message names the node, the path and what is needed.
    """
    nodes: dict[str, int] = {}
    for rank, w in enumerate(ranks.where):
        nodes.setdefault(w["node"], rank)
    trial = DirectoryTrial(url, uuid.uuid4().hex, tuple(nodes.values()), reads)
    directory = Directory(url)
    made = _missing(directory)
    try:
        try:
            directory.fs.makedirs(directory.root, exist_ok=True)
            directory.fs.pipe_file(f"{directory.root}/{trial.file()}", trial.name.encode())
        except Exception as e:  # each file system has errors of its own
            raise ClusterError(
                f"{url}: no checkpoint can be written there: {in_one_line(e)}: set checkpoint.dir"
            ) from None
        said = ranks.reach(trial)
        for rank in trial.ranks:
            found = said[rank]
            if not found and (why := seen(url, trial.file(rank), trial.name, patience_s)):
                found = [f"what it wrote into {url} is not there for the driver: {why}"]
            if found:
                read = all(" cannot be read: " in f for f in found)
                need = "every node must have it under that path" if read else SHARE_IT
                raise ClusterError(f"rank {rank} on node {ranks.where[rank]['host']}: {'; '.join(found)}: {need}")
    finally:
        for rank_or_driver in (None, *trial.ranks):
            with suppress(Exception):
                directory.fs.rm_file(f"{directory.root}/{trial.file(rank_or_driver)}")
        for path in made:
            with suppress(OSError):
                path.rmdir()


def in_job_copy(path: Path) -> bool:
    """Whether a path lies in the copy of its working directory that `ray job submit` makes for a job, and deletes."""
    return "working_dir_files" in path.absolute().parts and "runtime_resources" in path.absolute().parts


def _missing(directory: Directory) -> list[Path]:
    """Local directories that must be made for this one, the innermost first."""
    if "file" not in directory.fs.protocol:
        return []
    root = Path(directory.root)
    return [p for p in (root, *root.parents) if not p.exists()]
