"""What a run needs on every node, tried before anything is built: a place to write that all share, files to read.

The driver's part is ray_ep/driver/actors/reach.py. fsspec only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fsspec  # type: ignore[import-untyped]

from ray_ep.rank.saved.disk import in_one_line

SHOWS_S = 5.0
"""Seconds that a new file may take to show on other machines: network file systems are late."""


@dataclass(frozen=True, slots=True)
class DirectoryTrial:
    """What is tried.

    Args:
        url: directory or fsspec URL where checkpoints go.
        name: of this trial, unlike any other.
        ranks: who try, one on each node.
        reads: (what the user calls it, file or directory) that each must read.
    """

    url: str
    name: str
    ranks: tuple[int, ...]
    reads: tuple[tuple[str, str], ...] = ()

    def file(self, rank: int | None = None) -> str:
        """Name of the file that a rank, or the driver, leaves for the others."""
        return f".trial-{self.name}" + ("" if rank is None else f"-{rank}")

    def on_rank(self, rank: int, patience_s: float = SHOWS_S) -> list[str]:
        """Read what the driver wrote, write for it, read the rest; what failed, in words."""
        if rank not in self.ranks:
            return []
        said = [f"{what}={path!r} cannot be read: {why}" for what, path in self.reads if (why := unreadable(path))]
        why = seen(self.url, self.file(), self.name, patience_s)
        if why:
            return [*said, f"what the driver wrote into {self.url} is not there for it: {why}"]
        try:
            fs, root = fsspec.core.url_to_fs(self.url)
            fs.pipe_file(f"{root}/{self.file(rank)}", self.name.encode())
        except Exception as e:  # each file system has errors of its own
            said.append(f"it cannot write into {self.url}: {in_one_line(e)}")
        return said


def seen(url: str, file: str, text: str, patience_s: float, sleep: Callable[[float], None] = time.sleep) -> str:
    """Why `file` in the directory `url` does not hold `text`; empty if it does."""
    why, waited = "", 0.0
    while True:
        try:
            fs, root = fsspec.core.url_to_fs(url)
            fs.invalidate_cache()
            got = fs.cat_file(f"{root}/{file}").decode()
            why = "" if got == text else "it holds something else"
        except Exception as e:  # each file system has errors of its own
            why = in_one_line(e)
        if not why or waited >= patience_s:
            return why
        sleep(0.5)
        waited += 0.5


def unreadable(path: str) -> str:
    """Why a file (or URL), or one of the files of a local directory, cannot be read; empty if all can."""
    try:
        if "://" not in path and Path(path).is_dir():
            for file in sorted(p for p in Path(path).iterdir() if p.suffix in (".json", ".safetensors")):
                with open(file, "rb") as f:
                    f.read(1)
            return ""
        with fsspec.open(path, "rb") as f:
            f.read(1)
    except Exception as e:  # each file system has errors of its own
        return in_one_line(e)
    return ""
