"""The run directory: where it is, what was there before, and everything the driver writes into it. No Ray."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ray_ep.config.schema import Config
from ray_ep.errors import CheckpointError, ConfigError, PlacementError
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.rank.checkpoint import Checkpoint, Directory

RUNS = "runs"
"""Parent of run directories that the user did not name."""

REQUEST = "rebalance"
"""File in a run directory that asks for a decision about the placement."""


class RunDir:
    """One run's directory; also a listener that keeps `metrics.jsonl` and `events.jsonl`.

    Once the run has begun, a record that cannot be written does not end it: that is said once.

    Attributes:
        begun: `create` was called.
        say: who is told what could not be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.begun = False
        self.say: Callable[[str], None] = lambda message: print(message, file=sys.stderr)
        self._silent = False  # it was said

    def create(self, cfg: Config) -> None:
        """Make the directory and write the resolved configuration."""
        for part in ("", "placements", "statistics", "provenance"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        self.write("config.yaml", OmegaConf.to_yaml(cfg))
        self.begun = True

    def write(self, name: str, text: str) -> None:
        """Replace a file whole: a reader never sees half of it."""
        part = self.path / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path / name)

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """Inside: `name` is written; if it cannot be, the run goes on without it."""
        try:
            yield
        except OSError as e:
            if not self._silent:
                self._silent = True
                self.say(
                    f"{self.path / name} cannot be written: {e.strerror or e}: the run goes on without its records"
                )

    def start(self, description: str) -> None:
        """Listener: the run begins."""
        self.event("start", description)

    def step(self, metrics: dict[str, Any]) -> None:
        """Listener: one line of metrics.jsonl."""
        self._append("metrics.jsonl", metrics)

    def event(self, kind: str, message: str) -> None:
        """Listener: one line of events.jsonl."""
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._append("events.jsonl", {"time": time, "kind": kind, "message": message})

    def placement(self, placement: Placement) -> None:
        """Keep a placement under its version."""
        name = f"placements/{placement.version:04d}.json"
        with self._spared(name):
            self.write(name, placement.to_json())

    def newest_placement(self) -> Placement | None:
        """The placement that the run had last; None: none that can be read."""
        for path in sorted((self.path / "placements").glob("*.json"), key=lambda p: (len(p.name), p.name))[::-1]:
            with suppress(PlacementError):
                return Placement.load(path)
        return None

    def request(self) -> None:
        """Ask the driver of this run to consider other places for the experts after its next step."""
        (self.path / REQUEST).touch()

    def take_request(self) -> bool:
        """Whether somebody asked for that; asks are then taken for heard."""
        try:
            (self.path / REQUEST).unlink()
        except OSError:
            return False
        return True

    def exchange(self, choice: dict[str, Any]) -> None:
        """Keep how tokens travel, and the timings of the ways that it was chosen from."""
        with self._spared("exchange.json"):
            self.write("exchange.json", json.dumps(choice, indent=1))

    def topology(self, topology: Topology) -> None:
        """Keep the topology."""
        with self._spared("topology.json"):
            self.write("topology.json", topology.to_json())

    def statistics(self, statistics: RoutingStatistics) -> None:
        """Keep the routing statistics so far."""
        part, name = self.path / "statistics" / "routing.part.npz", "statistics/routing.npz"
        with self._spared(name):
            try:
                statistics.save(part)
                os.replace(part, self.path / name)
            finally:
                part.unlink(missing_ok=True)

    def provenance(self, step: int, parts: list[list[dict[str, np.ndarray]]]) -> None:
        """Keep which expert on which rank answered for which held-out token: experts, ranks [L, T, K]."""
        if not any(parts):
            return
        layers = list(zip(*[p for p in parts if p], strict=True))
        arrays = {
            k: np.stack([np.concatenate([r[k] for r in layer]) for layer in layers]) for k in ("experts", "ranks")
        }
        name = f"provenance/step-{step:06d}.npz"
        with self._spared(name):
            try:
                np.savez_compressed(self.path / name, **arrays)
            except OSError:
                (self.path / name).unlink(missing_ok=True)
                raise

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, one a step: of a step that was repeated after a resume the last one counts."""
        path = self.path / "metrics.jsonl"
        by_step = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):  # a crash may have cut a line short
                tree = json.loads(line)
                by_step[tree["step"]] = tree
        return [by_step[step] for step in sorted(by_step)]

    def _append(self, name: str, tree: dict[str, Any]) -> None:
        with self._spared(name), open(self.path / name, "ab", buffering=0) as f:
            whole, line = f.tell(), (json.dumps(tree) + "\n").encode()
            try:
                if f.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    f.truncate(whole)  # half a line would spoil the next one
                raise


def choose(cfg: Config, now: datetime) -> RunDir:
    """The directory of this run, not yet created.

    Raises:
        ConfigError: it holds another run and nothing is to be resumed, or it is not a directory one can write to.
    """
    if cfg.run_dir:
        path = Path(cfg.run_dir)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run_dir={cfg.run_dir!r} is a file: give a new or empty directory")
        if path.is_dir() and any(path.iterdir()) and not _goes_on(cfg.resume, path):
            raise ConfigError(
                f"run_dir={cfg.run_dir!r} already holds files: give a new directory, or resume=auto to go on with it"
            )
        return RunDir(path)
    if cfg.resume == "auto":
        old = [p.parent for p in Path(RUNS).glob("*/config.yaml") if re.match(r"\d{8}-\d{6}", p.parent.name)]
        if old:
            return RunDir(max(old, key=lambda p: (p.name[:15], len(p.name), p.name)))
    base = Path(RUNS) / now.strftime("%Y%m%d-%H%M%S")
    path, n = base, 1
    while path.exists():
        n += 1
        path = base.with_name(f"{base.name}-{n}")
    return RunDir(path)


def _goes_on(resume: str, path: Path) -> bool:
    """Whether `resume` goes on with the run in `path`, so that writing there overwrites nothing of another run."""
    here, there = path.resolve(), Path(resume).resolve()
    return resume == "auto" or (resume != "no" and here in (there, *there.parents))


def checkpoint_url(cfg: Config, run: RunDir) -> str:
    """Where the run's checkpoints go."""
    return str(cfg.checkpoint.dir or run.path / "checkpoints")


def find_checkpoint(where: str, step: int | None = None) -> Checkpoint:
    """The newest checkpoint (or that of `step`) of a run directory, a directory of checkpoints, or a `.../step-N`.

    Raises:
        CheckpointError: there is none.
    """
    head, _, tail = where.rstrip("/").rpartition("/")
    if tail.startswith("step-") and tail[5:].isdigit():
        directory, steps = Directory(head or "."), [int(tail[5:])]
    else:
        directory = Directory(_checkpoints_of(where))
        steps = [s for s in directory.steps() if step in (None, s)]
    if not steps:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(f"{where!r}: no complete {which} there (a run, its checkpoints, or one step-N of them)")
    return Checkpoint(directory, steps[-1])


def _checkpoints_of(where: str) -> str:
    """Where a run directory keeps its checkpoints; anything else is such a directory itself."""
    config = Path(where) / "config.yaml"
    if not config.is_file():
        return where
    try:
        named = OmegaConf.select(OmegaConf.load(config), "checkpoint.dir")
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as e:
        raise CheckpointError(f"{where!r}: its config.yaml is damaged: {str(e).splitlines()[0]}") from None
    return str(named or Path(where) / "checkpoints")
