"""When a run saves, and what becomes of it if that fails: periodic saves are tried again, the last one must succeed."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from typing import Any, Protocol

from omegaconf import OmegaConf

from ray_ep.config.schema import CheckpointConfig, Config
from ray_ep.driver.rundir import checkpoint_url
from ray_ep.driver.start import Plan
from ray_ep.errors import DivergedError, RankError, SaveError
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.saved.directory import Directory


class Ranks(Protocol):
    """What saving needs of the ranks."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method on all ranks."""


class Saver:
    """Checkpoints of one run.

    Args:
        event: tells an operator: kind, message.
        clock: seconds.

    Attributes:
        saved: step of the newest checkpoint; -1: none.
        seconds: that the last save took; None: none was made yet.
    """

    def __init__(
        self,
        cfg: Config,
        plan: Plan,
        ranks: Ranks,
        event: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.cfg, self.plan, self.ranks, self.event, self.clock = cfg, plan, ranks, event, clock
        self.directory = Directory(checkpoint_url(cfg, plan.run))
        self.saved = -1 if plan.checkpoint is None else plan.checkpoint.step
        self.seconds: float | None = None
        self._since = clock()  # the last save, or the last try

    def start(self) -> None:
        """The first step begins: from now on minutes count."""
        self._since = self.clock()

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps: by their number, or by the time since the last save."""
        cfg = self.cfg.checkpoint
        by_step = bool(cfg.every) and done % cfg.every == 0
        return by_step or (bool(cfg.every_minutes) and self.clock() - self._since >= 60 * cfg.every_minutes)

    def save(self, done: int, statistics: RoutingStatistics) -> str:
        """Write a checkpoint of `done` steps if there is none yet, and drop the oldest; why it failed, empty if not.

        What failed leaves the older ones as they are.

        Raises:
            RankError: a rank was lost meanwhile. DivergedError: a weight is not finite.
        """
        if self.saved == done:
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
        self.saved, self._since, self.seconds = done, self.clock(), self.clock() - began
        self.event("checkpoint", f"{self.directory.url}/step-{done:06d}")
        try:
            self.directory.prune(self.cfg.checkpoint.keep)
        except Exception as e:
            self.event("checkpoint-kept", str(e))  # the new one is safe, so the run goes on
        return ""

    def save_and_go_on(self, done: int, statistics: RoutingStatistics) -> None:
        """A periodic save: if it fails that is told, and the next one tries again."""
        if why := self.save(done, statistics):
            self.event("checkpoint-failed", f"{why}; the run goes on, the next checkpoint tries again")

    def finish(self, done: int, statistics: RoutingStatistics) -> None:
        """The last save.

        Raises:
            SaveError: it failed; the message says which checkpoint is the newest good one.
        """
        if why := self.save(done, statistics):
            raise SaveError(why)

    def newest(self) -> str:
        """Which checkpoint is the newest good one, in words."""
        if self.saved < 0:
            return "there is no older checkpoint"
        return f"the newest good checkpoint is of step {self.saved}"

    def ahead(self, done: int) -> str:
        """What the last save will cost, for who waits for it."""
        if self.saved == done:
            return "there is nothing left to save"
        if self.seconds is not None:
            return f"saving takes about {max(self.seconds, 1):.0f} s"
        return f"{self._bytes() / 1e6:.0f} MB are saved, for the first time: how long that takes is not known yet"

    def _bytes(self) -> int:
        """Of one checkpoint: float32 masters and moments."""
        parameters = sum(_product(shape) for shape in self.plan.signature.values())
        return 4 * parameters * (3 if self.cfg.optim.kind == "adamw" else 2)

    def _write(self, done: int, statistics: RoutingStatistics) -> None:
        with self.directory.saving(done):
            parts = self.ranks.call("save", self.directory.url, done)
            for error in parts:
                if isinstance(error, SaveError):
                    raise error
            manifest = {
                "format": 1,
                "step": done,
                "serial": self.directory.next_serial(),
                "tensors": {k: v for part in parts for k, v in part.items()},
                "signature": self.plan.signature,
                "config": OmegaConf.to_container(self.cfg),
                "model": self.plan.config.to_dict(),
                "data": self.plan.corpus.source,
            }
            self.directory.commit(done, manifest, statistics)


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


def what_is_lost(run: str, saved: int, done: int) -> str:
    """After a failure: what the newest checkpoint leaves out, and the command that goes on."""
    command = shlex.join(["ray-ep", "train", f"run_dir={run}", "resume=auto"])
    if saved < 0:
        return f"nothing was saved: {_steps(done)} lost; begin again with: {command}"
    return f"the newest checkpoint is of step {saved}: {_steps(done - saved)} lost; go on with: {command}"


def cause_of(e: BaseException) -> str:
    """An error in one sentence: of a rank's own traceback the last line."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def _steps(n: int) -> str:
    return "1 step is" if n == 1 else f"{n or 'no'} steps are"


def _product(shape: list[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
