"""When a run saves, and what becomes of it if that fails: periodic saves are tried again, the last one must succeed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from omegaconf import OmegaConf

from ray_ep.config.schema import CheckpointConfig, Config
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.records import Event
from ray_ep.driver.run.on_disk import newest_step, snapshots_url
from ray_ep.driver.run.rundir import checkpoint_url
from ray_ep.driver.start import Plan
from ray_ep.errors import DivergedError, RankError, SaveError
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.snapshot.on_disk import Shelf


class SavingRanks(Protocol):
    """What saving needs of the ranks."""

    def save(self, url: str, step: int) -> list[dict[str, list[Any]]]:
        """Write a checkpoint; each rank's part of the manifest. Raises SaveError."""

    def statistics(self) -> list[RoutingStatistics]:
        """Routing statistics of each rank since its making."""


class Saver:
    """Checkpoints of one run, and the routing statistics that go into them.

    Args:
        cfg: the whole, for a checkpoint holds it; `checkpoint`, `statistics`, `seed` and the optimizer's kind are read.
        clock: seconds.

    Attributes:
        seconds: that the last save took; None: none was made yet.
    """

    def __init__(
        self,
        cfg: Config,
        plan: Plan,
        ranks: SavingRanks,
        publisher: Publisher,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.cfg, self.plan, self.ranks, self.publisher, self.clock = cfg, plan, ranks, publisher, clock
        self.directory = Directory(checkpoint_url(cfg, plan.run))
        self._snapshots = snapshots_url(cfg, plan.run)
        self._saved = -1 if plan.checkpoint is None else plan.checkpoint.step
        self._owed = plan.checkpoint is not None and plan.checkpoint.directory.url == self._snapshots
        self.seconds: float | None = None
        self._since = clock()  # the last save, or the last try
        self._earlier = plan.checkpoint.statistics() if plan.checkpoint else None  # counted before a resume

    @property
    def saved(self) -> int:
        """Step from which `resume=auto` would go on: of the newest checkpoint or snapshot on disk; -1: none."""
        return max(self._saved, newest_step(self._snapshots))

    def start(self) -> None:
        """The first step begins: from now on minutes count, and snapshots of before that it does not go on from go."""
        self._since = self.clock()
        if not self._owed:
            self._drop_snapshots()

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps: by their number, or by the time since the last save.

        A run that goes on from a snapshot on disk saves at once: the next snapshots take the place of that one.
        """
        cfg = self.cfg.checkpoint
        if self._owed:
            return True
        by_step = bool(cfg.every) and done % cfg.every == 0
        return by_step or (bool(cfg.every_minutes) and self.clock() - self._since >= 60 * cfg.every_minutes)

    def save(self, done: int) -> str:
        """Write a checkpoint of `done` steps if there is none yet, and drop the oldest; why it failed, empty if not.

        The records of its steps are handed to all listeners before it counts as whole. What failed leaves the older
        checkpoints as they are.

        Raises:
            RankError: a rank was lost meanwhile. DivergedError: a weight is not finite.
        """
        statistics = self._statistics()
        self.plan.run.statistics(statistics)
        if self._saved == done and not self._owed:
            return ""
        began = self.clock()
        try:
            self._write(done, statistics)
        except (RankError, DivergedError):
            raise
        except Exception as e:  # each file system has errors of its own
            self._since = self.clock()
            why = (str(e).strip().splitlines() or [type(e).__name__])[0]
            if self.directory.url not in why:
                why = f"step {done} could not be saved into {self.directory.url}: {why}"
            return f"{why}; {self.newest()}"
        self._saved, self._since, self.seconds, self._owed = done, self.clock(), self.clock() - began, False
        url = self.url_of(done)
        self.publisher.event(Event("checkpoint", url, {"url": url, "seconds": self.seconds}))
        try:
            self.directory.prune(self.cfg.checkpoint.keep)
        except Exception as e:
            self.publisher.event(Event("checkpoint-kept", str(e)))  # the new one is safe, so the run goes on
        self._drop_snapshots()  # all are older
        return ""

    def url_of(self, done: int) -> str:
        """Where the checkpoint of `done` steps is, once it is written."""
        return f"{self.directory.url}/step-{done:06d}"

    def save_and_go_on(self, done: int) -> str:
        """A save that is not the last: if it fails that is told, and the next one tries again; why it failed."""
        if why := self.save(done):
            words = f"{why}; the run goes on, the next checkpoint tries again"
            self.publisher.event(Event("checkpoint-failed", words, {"newest": self._saved}))
        return why

    def finish(self, done: int) -> None:
        """The last save.

        Raises:
            SaveError: it failed; the message says which checkpoint is the newest good one.
        """
        if why := self.save(done):
            raise SaveError(why)

    def newest_there(self) -> tuple[str, int] | None:
        """Directory and step of the newest checkpoint, or of a newer snapshot on disk; None: there is none."""
        if (step := self.saved) < 0:
            return None
        if step > self._saved:
            return self._snapshots, step
        resumed = self.seconds is None and self.plan.checkpoint is not None
        return (self.plan.checkpoint.directory if resumed and self.plan.checkpoint else self.directory).url, self._saved

    def newest(self) -> str:
        """Which checkpoint is the newest good one, in words."""
        if self._saved < 0:
            return "there is no older checkpoint"
        return f"the newest good checkpoint is of step {self._saved}"

    def ahead(self, done: int) -> str:
        """What the last save will cost, for who waits for it."""
        if self._saved == done and not self._owed:
            return "there is nothing left to save"
        if self.seconds is not None:
            return f"saving takes about {max(self.seconds, 1):.0f} s"
        return f"{self._bytes() / 1e6:.0f} MB are saved, for the first time: how long that takes is not known yet"

    def _drop_snapshots(self) -> None:
        """Remove the snapshots on disk, as far as that can be done."""
        if self._snapshots:
            with suppress(OSError, ValueError):
                Directory(self._snapshots).empty()

    def _bytes(self) -> int:
        """Of one checkpoint: float32 masters and moments."""
        parameters = sum(_product(shape) for shape in self.plan.signature.values())
        return 4 * parameters * (3 if self.cfg.optim.kind == "adamw" else 2)

    def _write(self, done: int, statistics: RoutingStatistics) -> None:
        with self.directory.saving(done):
            parts = self.ranks.save(self.directory.url, done)
            tensors = {k: v for part in parts for k, v in part.items()}
            which = {"step": done, "serial": self.directory.next_serial(), "tensors": tensors}
            manifest = {**manifest_of(self.cfg, self.plan), **which}
            self.publisher.flush()
            self.directory.commit(done, manifest, statistics)

    def _statistics(self) -> RoutingStatistics:
        """Of all ranks, those before a resume included."""
        parts = self.ranks.statistics()
        parts = parts if self._earlier is None else [self._earlier, *parts]
        return RoutingStatistics.merge(parts, self.cfg.statistics.sample, self.cfg.seed)


def manifest_of(cfg: Config, plan: Plan) -> dict[str, Any]:
    """What the manifests of all checkpoints of a run say."""
    return {
        "format": 1,
        "signature": {n: shape for n, shape in plan.signature.items() if n not in plan.base},
        "frozen": list(plan.frozen),
        "config": OmegaConf.to_container(cfg),
        "model": plan.config.to_dict(),
        "data": plan.corpus.source,
    }


def shelf_of(cfg: Config, plan: Plan) -> Shelf | None:
    """Where snapshots are written on disk; None: they are not."""
    if not cfg.snapshot.to_disk:
        return None
    counted = plan.checkpoint.statistics() if plan.checkpoint else None
    return Shelf(snapshots_url(cfg, plan.run), manifest_of(cfg, plan), counted)


def when(checkpoint: CheckpointConfig) -> str:
    """How often a run saves, for its start line."""
    often = []
    if checkpoint.every:
        often.append(f"every {checkpoint.every} steps (checkpoint.every)")
    if checkpoint.every_minutes:
        n = checkpoint.every_minutes
        often.append(f"every {'minute' if n == 1 else f'{n:g} minutes'} (checkpoint.every_minutes)")
    if not often:
        return "a checkpoint only at the end (checkpoint.every_minutes=0)"
    return f"a checkpoint {' and '.join(often)}"


def _product(shape: list[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
