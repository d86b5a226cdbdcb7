"""The run directory: where it is, what was there before, and everything the driver writes into it. No Ray."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ray_ep.config.paths import is_url
from ray_ep.config.runs import RUNS, checkpoints_of, newest, remember
from ray_ep.config.schema import Config
from ray_ep.driver.records import Event, StepRecord
from ray_ep.driver.run.claim import LOCK, Claim, holder, in_use
from ray_ep.driver.run.window import Window
from ray_ep.driver.states import State
from ray_ep.errors import CheckpointError, ConfigError, PlacementError
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.placement.placement import files_by_version
from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory

_PARTS = ("placements", "statistics", "held_out")


class RunDir:
    """One run's directory; also a listener that keeps `metrics.jsonl` and `events.jsonl`.

    Once the run has begun, a record that cannot be written does not end it: that is said once.

    Attributes:
        begun: `create` was called.
        say: who is told what could not be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.claims: list[Claim] = []  # of this directory, and of a checkpoint.dir elsewhere on this machine
        self.begun = False
        self.say: Callable[[str], None] = lambda message: print(message, file=sys.stderr)
        self._silent = False  # it was said
        self._window = Window(path / "statistics")

    def create(self, cfg: Config) -> None:
        """Make the directory and write the resolved configuration: from here on the run is there.

        Raises:
            ConfigError: that cannot be written.
        """
        fresh = not (self.path / ".gitignore").exists()
        try:
            for part in ("", *_PARTS):
                (self.path / part).mkdir(parents=True, exist_ok=True)
            self.write(".gitignore", "*\n")  # neither a commit nor the copy for a job shall hold checkpoints
            self.write("config.yaml", OmegaConf.to_yaml(cfg))
        except OSError as e:
            for part in _PARTS:
                with suppress(OSError):
                    (self.path / part).rmdir()
            if fresh:
                (self.path / ".gitignore").unlink(missing_ok=True)
            raise ConfigError(f"run_dir={str(self.path)!r}: cannot write there: {e.strerror or e}") from None
        for claim in self.claims:
            claim.began = True
        self.begun = True
        remember(self.path)

    def release(self) -> None:
        """Let others have the directory; of a run that was never created nothing is left."""
        for claim in self.claims[::-1]:
            claim.release()

    def write(self, name: str, text: str) -> None:
        """Replace a file whole: a reader never sees half of it."""
        part = self.path / f"{name}.part"
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.path / name)
        except OSError:
            with suppress(OSError):
                part.unlink()  # half a file on a disk that is full
            raise

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

    def start(self, event: Event) -> None:
        """Listener: the run begins."""
        self.event(event)

    def step(self, record: StepRecord) -> None:
        """Listener: one line of metrics.jsonl; now and then where the tokens of recent steps went."""
        self._append("metrics.jsonl", record.line())
        if self._window.due(record):
            self._keep_window()
        self._window.add(record)
        if record.sample is not None:
            self._keep_sample(record.sample)

    def event(self, event: Event) -> None:
        """Listener: one line of events.jsonl."""
        if event.kind == "state" and event.fields.get("to") == State.STOPPED.value:
            self._keep_window()
        self._append("events.jsonl", event.line())

    def _keep_sample(self, sample: np.ndarray) -> None:
        """Replace that of before; the experts of a layer are few enough for 16 bits."""
        part, name = self.path / "statistics" / "sample.part.npz", "statistics/sample.npz"
        with self._spared(name):
            try:
                np.savez(part, allow_pickle=False, sample=sample.astype(np.int16))
                os.replace(part, self.path / name)
            finally:
                part.unlink(missing_ok=True)

    def _keep_window(self) -> None:
        with self._spared("statistics"):
            self._window.write()

    def placement(self, placement: Placement) -> None:
        """Keep a placement under its version."""
        name = f"placements/{placement.version:04d}.json"
        with self._spared(name):
            self.write(name, placement.to_json())

    def newest_placement(self) -> Placement | None:
        """The placement that the run had last; None: none that can be read."""
        for path in reversed(files_by_version(self.path / "placements")):
            with suppress(PlacementError):
                return Placement.load(path)
        return None

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

    def held_out(self, step: int, parts: list[list[dict[str, np.ndarray]]]) -> None:
        """Keep which expert on which rank answered for which held-out token: experts, ranks [L, T, K]."""
        if not any(parts):
            return
        layers = list(zip(*[p for p in parts if p], strict=True))
        arrays = {
            k: np.stack([np.concatenate([r[k] for r in layer]) for layer in layers]) for k in ("experts", "ranks")
        }
        name = f"held_out/step-{step:06d}.npz"
        with self._spared(name):
            try:
                np.savez_compressed(self.path / name, allow_pickle=False, **arrays)
            except OSError:
                (self.path / name).unlink(missing_ok=True)
                raise

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, one a step: one that was made again takes the place of its line and later ones."""
        found: list[dict[str, Any]] = []
        for tree in self._lines("metrics.jsonl"):
            while found and found[-1]["step"] >= tree["step"]:
                found.pop()
            found.append(tree)
        return found

    def events(self) -> list[dict[str, Any]]:
        """Lines of events.jsonl."""
        return list(self._lines("events.jsonl"))

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):  # a crash may have cut a line short
                yield json.loads(line)

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


def claimed(cfg: Config, now: datetime) -> RunDir:
    """The directory of this run, taken: nobody else writes there until its `release`.

    Raises:
        ConfigError: as `choose` does, or another process has it, or it cannot be written to; nothing is left behind.
    """
    while True:
        run = choose_run_dir(cfg, now)
        try:
            new = not cfg.run_dir and not (run.path / "config.yaml").exists()
            run.claims.append(Claim(run.path, now, new))
            if cfg.run_dir:
                choose_run_dir(cfg, now)  # another run may have filled it, and ended, before it was taken
            saves = Path(cfg.checkpoint.dir or run.path)
            if not is_url(cfg.checkpoint.dir) and saves.resolve() != run.path.resolve():
                run.claims.append(Claim(saves, now, key="checkpoint.dir"))
        except FileExistsError:  # by another run of this second
            continue
        except BaseException:
            run.release()
            raise
        return run


def choose_run_dir(cfg: Config, now: datetime) -> RunDir:
    """The directory of this run, not yet created.

    Raises:
        ConfigError: it holds another run and nothing is to be resumed, or it is not a directory one can write to.
    """
    if cfg.run_dir:
        path = Path(cfg.run_dir)
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(f"run_dir={cfg.run_dir!r} is a file: give a new or empty directory")
            filled = path.is_dir() and any(p.name != LOCK for p in path.iterdir())
        except (OSError, ValueError) as e:
            raise ConfigError(f"run_dir={cfg.run_dir!r}: {getattr(e, 'strerror', None) or e}") from None
        if filled and not _goes_on(cfg.resume, path):
            who = holder(path)
            raise ConfigError(
                f"run_dir={cfg.run_dir!r} already holds files: give a new directory, or resume=auto to go on with it"
                if who is None
                else in_use(path, who)
            )
        return RunDir(path)
    found = newest() if cfg.resume == "auto" else None
    return RunDir(found or _dated(now))


def _dated(now: datetime) -> Path:
    """A directory under runs/ that is not there yet, named after the time."""
    base = Path(RUNS).absolute() / now.strftime("%Y%m%d-%H%M%S")
    path, n = base, 1
    while path.exists():
        n += 1
        path = base.with_name(f"{base.name}-{n}")
    return path


def _goes_on(resume: str, path: Path) -> bool:
    """Whether `resume` goes on with the run in `path`, so that writing there overwrites nothing of another run."""
    if resume in ("auto", "no"):
        return resume == "auto"
    there, kept = Path(resume).resolve(), checkpoints_of(str(path))
    inside = any(p.resolve() in (there, *there.parents) for p in (path, Path(kept)))
    return inside or f"{resume}/".startswith(f"{kept}/")  # a URL


def checkpoint_url(cfg: Config, run: RunDir) -> str:
    """Where the run's checkpoints go."""
    return str(cfg.checkpoint.dir or run.path / "checkpoints")


def find_checkpoint(where: str, step: int | None = None, command: str = "") -> Checkpoint:
    """The newest checkpoint (or that of `step`) of a run directory, a directory of checkpoints, or a `.../step-N`.

    A damaged one is not passed over; `command` is what to do then, `{}` for the path of a whole one beside it.

    Raises:
        CheckpointError: there is none.
    """
    head, _, tail = where.rstrip("/").rpartition("/")
    if re.fullmatch(r"step-\d+", tail) and not (Path(where) / "config.yaml").is_file():
        directory, named = Directory(head or ("/" if where.startswith("/") else ".")), int(tail[5:])
        proper = f"step-{named:06d}"
        if tail != proper and directory.fs.exists(f"{directory.root}/{tail}"):
            raise CheckpointError(
                f"{where!r} is no checkpoint: those are named step-N with six digits, such as {proper}"
            )
        if step not in (None, named):
            raise CheckpointError(f"{where!r} is not the checkpoint of step {step}: give the run, or that of the step")
        return Checkpoint(directory, named, command)
    try:
        directory = Directory(checkpoints_of(where))
    except ConfigError as e:
        raise CheckpointError(str(e)) from None
    steps = [e.step for e in directory.entries()]
    if not steps or step not in (None, *steps):
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        have = f"; there are those of steps {', '.join(map(str, sorted(steps)))}" if steps else ""
        raise CheckpointError(
            f"{where!r}: no complete {which} there (a run, its checkpoints, or one step-N of them){have}"
        )
    return Checkpoint(directory, steps[-1] if step is None else step, command)
