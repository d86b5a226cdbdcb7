"""`ray_ep.train`, `ray_ep.probe` and `ray_ep.export`: the driver composed with its observers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from ray_ep.config import load_config
from ray_ep.config.schema import Config
from ray_ep.control.server import Control
from ray_ep.driver.actors.probe import probe_cluster
from ray_ep.driver.actors.shown import Shown
from ray_ep.driver.drive import drive
from ray_ep.driver.ending import STATUS
from ray_ep.driver.interrupt import Interrupt
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.records import Event
from ray_ep.driver.requests import Requests
from ray_ep.driver.run.rundir import RunDir, find_checkpoint
from ray_ep.driver.start import check_run
from ray_ep.errors import BadInput, CheckpointError
from ray_ep.observe.dashboard.reach import shown
from ray_ep.observe.dashboard.session_logs import DriverLog, PlacementLog
from ray_ep.observe.live import LivePage
from ray_ep.observe.metrics.listener import exported
from ray_ep.observe.page.report import write_report
from ray_ep.observe.phases import Phases
from ray_ep.observe.progress import Progress
from ray_ep.observe.provenance.files import ProvenanceFiles
from ray_ep.observe.trackers import check_trackers, trackers
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.rank.data.tokenizer import load_decoder
from ray_ep.rank.saved.export import export_checkpoint


@dataclass(frozen=True, slots=True)
class Run:
    """What is left of a run in its directory, read when it is asked for; what is not there is None or empty.

    L MoE layers, E experts, R ranks, S slots.

    Attributes:
        dir: the run directory.
        status: how it ended: done, interrupted or failed; unfinished: it goes on, or ended without a word.
        mark: goes before every line that is printed about it: it says so if the router was forced.
    """

    dir: Path
    status: str
    mark: str = ""

    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step, as in metrics.jsonl."""
        return RunDir(self.dir).metrics()

    def events(self) -> list[dict[str, Any]]:
        """What happened, oldest first, as in events.jsonl: time (ISO 8601, UTC), step, kind, message, and the
        figures behind the message as fields."""
        return RunDir(self.dir).events()

    @property
    def config(self) -> Config:
        """The whole configuration that it ran with."""
        return load_config(self.dir / "config.yaml")

    @property
    def placement(self) -> Placement | None:
        """Which expert sits where, as of last: `.slots`, int [L, R, S], expert or -1."""
        return RunDir(self.dir).newest_placement()

    @property
    def statistics(self) -> RoutingStatistics | None:
        """Routing as of the last checkpoint: `.load` [L, E] and `.coactivation` [L, E, E], in tokens."""
        path = self.dir / "statistics" / "routing.npz"
        return RoutingStatistics.load_file(path) if path.exists() else None

    @property
    def topology(self) -> Topology | None:
        """The links as measured last: `.bandwidth` [R, R] bytes/s, `.latency` [R, R] seconds, `.node_of` [R]."""
        path = self.dir / "topology.json"
        return Topology.from_json(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def report(self) -> Path:
        """The page."""
        return self.dir / "report.html"

    @property
    def checkpoint(self) -> str | None:
        """Path or URL of the newest whole checkpoint: what `resume` and `ray_ep.export` take."""
        try:
            return find_checkpoint(str(self.dir)).name
        except CheckpointError:
            return None


def open_run(run_dir: str | Path) -> Run:
    """A run of before, or one that still goes, from its directory. Starts nothing, changes nothing.

    Raises:
        BadInput: there is no run.
    """
    path = Path(run_dir)
    if not (path / "config.yaml").is_file():
        raise BadInput(f"{str(path)!r} is not a run directory: it has no config.yaml")
    run = Run(path, "unfinished")
    kinds = [e.get("kind") for e in run.events()]
    since = kinds[len(kinds) - kinds[::-1].index("start") :] if "start" in kinds else kinds  # a run may be resumed
    ended = [STATUS[kind] for kind in since if kind in STATUS]
    steps, cfg = run.metrics(), run.config
    done = bool(steps) and steps[-1]["step"] >= cfg.optim.steps
    status = ended[-1] if ended else "done" if done else "unfinished"
    return Run(path, status, _mark(cfg))


def _mark(cfg: Config) -> str:
    return "" if cfg.router.force == "none" else f"[router.force={cfg.router.force}] "


def train(cfg: Config) -> Run:
    """Train as the configuration says; blocks until the run is done or interrupted (SIGINT, SIGTERM).

    Args:
        cfg: from `ray_ep.load_config`.

    Returns:
        The run; its directory holds metrics, events, placements, statistics, checkpoints and report.html.

    Raises:
        BadInput: something the user gave is wrong; nothing was started and nothing overwritten.
        RankError: a rank raised or died; carries its traceback.
        SaveError: the last checkpoint could not be written.
    """
    prefix = _mark(cfg)
    check_trackers(cfg)
    with Interrupt().caught() as interrupt, Phases(prefix) as phase:
        phase("reading the data and the model's configuration")
        plan = check_run(cfg, datetime.now())
        try:
            with Progress(cfg.optim.steps, prefix=prefix) as progress:
                if plan.nothing_to_do:
                    progress.event(Event("resume", plan.nothing_to_do))
                    return Run(plan.run.path, "done", prefix)

                requests = Requests(interrupt)
                with _observed(cfg, plan.run, progress, requests) as (publisher, seen):
                    status = drive(cfg, plan, publisher, requests, interrupt, phase, seen)
        finally:
            if (plan.run.path / "config.yaml").exists() and not plan.nothing_to_do:
                _report(plan.run, prefix)
            plan.run.release()
    return Run(plan.run.path, status, prefix)


@contextmanager
def _observed(cfg: Config, run: RunDir, progress: Progress, requests: Requests) -> Iterator[tuple[Publisher, Shown]]:
    """Everybody who hears of a run or asks it; what they cannot do is told, and the run goes on."""

    def tell(kind: str) -> Callable[[str], None]:
        return lambda why: publisher.event(Event(kind, why))

    placed, decoder = PlacementLog(run.path), partial(load_decoder, cfg.data.tokenizer)
    with (
        LivePage(run.path, tell("report")) as page,
        DriverLog(run.path, cfg.optim.steps, _mark(cfg)) as log,
        trackers(cfg, run.path, tell("tracker")) as tracked,
        exported(cfg, run.path, tell("metrics")) as metrics,
        ProvenanceFiles(run.path, cfg.provenance, decoder, lambda e: publisher.event(e)) as records,
        Control(cfg.control, run, requests, lambda e: publisher.event(e)) as control,
        Publisher([run, progress, page, placed, log, *metrics, records, control, *tracked]) as publisher,  # ends first
        shown(cfg, run.path, tell("page"), control.buttons) as seen,
    ):
        yield publisher, seen


def _report(run: RunDir, prefix: str) -> None:
    """The page of a run that has ended; one that cannot be written is said, and no more."""
    try:
        write_report(run.path)
    except OSError as e:
        print(f"{prefix}ray-ep: {run.path}/report.html cannot be written: {e.strerror or e}", file=sys.stderr)


def probe(cfg: Config, budget_s: float = 20.0) -> Topology:
    """Measure the links between the ranks that `cfg.cluster` names, without a model; blocks for about `budget_s`.

    Raises:
        BadInput: fewer than two ranks, or a cluster that has no room for them.
        RankError: a rank died or was unreachable while probing, which names it.
    """
    with Interrupt().caught() as interrupt, Phases() as phase:
        return probe_cluster(cfg, budget_s, interrupt, phase)


def export(run: str, out: str, step: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Write a run's checkpoint as a plain transformers checkpoint; loses nothing at dtype float32.

    Args:
        run: a run directory, a directory of checkpoints (or its fsspec URL), or one `.../step-N`.
        out: a new directory.
        step: which checkpoint; None: the newest.
        dtype: of the written weights; None: the run's compute dtype.

    Returns:
        What was written: step, tensors, bytes, shards, files; where tokenizer and generation settings are from.

    Raises:
        CheckpointError: none there, or damaged. BadInput: `out` holds files. SaveError: it could not be written.
    """
    checkpoint = find_checkpoint(run, step, f"ray-ep export {{}} {shlex.quote(out)}")
    return {"step": checkpoint.step, **export_checkpoint(checkpoint, Path(out), dtype)}
