"""`ray_ep.train`, `ray_ep.probe` and `ray_ep.export`: the driver composed with its observers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_ep.config.schema import Config
from ray_ep.driver.interrupt import Interrupt
from ray_ep.driver.loop import drive
from ray_ep.driver.probe import probe_cluster
from ray_ep.driver.rundir import RunDir, find_checkpoint
from ray_ep.driver.start import check
from ray_ep.observe.phases import Phases
from ray_ep.observe.progress import Progress
from ray_ep.observe.report import write_report
from ray_ep.placement import Topology
from ray_ep.rank.export import export_checkpoint


@dataclass(frozen=True, slots=True)
class Run:
    """What is left of a run: its directory, its metrics, and how it ended (done or interrupted).

    `mark` goes before every line that is printed about it: it says so if the router was forced.
    """

    dir: Path
    status: str
    mark: str = ""

    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step, as in metrics.jsonl."""
        return RunDir(self.dir).metrics()


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
    prefix = "" if cfg.router.force == "none" else f"[router.force={cfg.router.force}] "
    with Interrupt().caught() as interrupt, Phases(prefix) as phase:
        phase("reading the data and the model's configuration")
        plan = check(cfg, datetime.now())
        try:
            with Progress(cfg.optim.steps, prefix=prefix) as progress:
                status = drive(cfg, plan, [progress], interrupt, phase)
        finally:
            if (plan.run.path / "config.yaml").exists():
                _report(plan.run, prefix)
    return Run(plan.run.path, status, prefix)


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
        What was written: step, tensors, bytes, shards.

    Raises:
        CheckpointError: none there, or damaged. BadInput: `out` holds files.
    """
    checkpoint = find_checkpoint(run, step)
    return {"step": checkpoint.step, **export_checkpoint(checkpoint, Path(out), dtype)}
