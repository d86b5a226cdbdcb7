"""RUN/hangs: a directory for each hang, a file for each rank and one for the driver. Asks nobody but by asking.py."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray_ep.collective import Membership
from ray_ep.driver.actors.head import within
from ray_ep.driver.hang.asking import everybody
from ray_ep.driver.records import now
from ray_ep.rank import stacks

HANGS = "hangs"
"""Directory of the run's own that holds them."""
KEPT = 20
"""Hangs that are kept, the newest; of each rank a file of at most stacks.MOST characters and a few."""

WRITE_S = 0.3
"""Most seconds that are waited for the disk; what is not written by then is written beside the recovery."""

log = logging.getLogger("ray_ep.driver")


class Hangs:
    """What everybody was at when ranks hung, on disk before any of them is killed or released.

    Args:
        run_dir: the run's.
        done: says how many steps are done.
    """

    def __init__(self, run_dir: Path, done: Callable[[], int]):
        self.path, self.done = run_dir / HANGS, done

    def keep(
        self,
        membership: Membership,
        actors: Sequence[Any],
        where: Sequence[dict[str, Any]],
        silent: Mapping[int, str],
        failed: Callable[[], Mapping[int, Exception]],
    ) -> str:
        """Ask everybody, and write it down; the directory, or "" where it could not be: that ends no run.

        Args:
            silent: {rank: how it is silent} of those that do not answer.
            failed: asked when everybody has answered: {rank: what it raised} of those that have come back by then.
        """
        try:
            told, raised = everybody(actors, where, silent), failed()
            step, at = self.done(), now().isoformat(timespec="milliseconds")
            head = f"{at}, {step} steps were done, epoch {membership.epoch}"
            files = {"driver.txt": f"The driver. {head}.\n\n{stacks.own(asking=True)}"}
            for rank, said in enumerate(told):
                w = where[rank]
                lines = [f"Rank {rank} ({membership.members[rank]}) on {w['host']}, process {w.get('pid', 'unknown')}."]
                lines += [
                    f"{head}.",
                    silent.get(rank, ""),
                    f"It raised:\n{_plain(raised[rank])}\n" if rank in raised else "",
                ]
                files[f"rank{rank}.txt"] = stacks.cut("\n".join(filter(None, lines)) + f"\n\n{said}\n")
            name = f"step-{step:06d}-epoch-{membership.epoch}"
            within(WRITE_S, partial(self._write, name, files))
            return str(self.path / name)
        except Exception as e:  # of any kind: a run goes on without it
            log.warning("what ranks were at cannot be kept in %s: %s: %s", self.path, type(e).__name__, e)
            return ""

    def _write(self, name: str, files: Mapping[str, str]) -> None:
        """All of it at once: nobody sees a part."""
        part, whole = self.path / f".{name}.part", self.path / name
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for file, text in files.items():
            (part / file).write_text(text, encoding="utf-8", errors="replace")
        shutil.rmtree(whole, ignore_errors=True)  # of the same epoch before a resume
        os.replace(part, whole)
        kept = sorted((p for p in self.path.glob("step-*") if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)
        for old in kept[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def _plain(error: Exception) -> str:
    """Its words without the colours that Ray gives them."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))
