"""`ray-ep rebalance`: asks a running job to consider other places for its experts now, by a file it leaves there."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

import click

from ray_ep.cli.loading import loading


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def rebalance(run: Path) -> None:
    """Ask the job that writes the run directory RUN to consider other places for its experts now.

    It decides after its next step, beside the steps, and moves experts where that pays back (placement.horizon_steps).
    What it decided, and why, is in RUN/events.jsonl, kind rebalance. Works with placement.every=0, too.

    \b
      ray-ep rebalance runs/20260701-123005
    """
    loading("rebalance", "torch")
    from ray_ep.driver.run.claim import holder, last_holder
    from ray_ep.driver.run.rundir import RunDir
    from ray_ep.errors import BadInput

    if not (run / "config.yaml").is_file():
        raise BadInput(f"{str(run)!r}: expected a run directory, with its config.yaml")
    if holder(run, unknown={}) is None:
        who = last_holder(run)
        by = f" (it was process {who['pid']} on host {who.get('host')})" if "pid" in who else ""
        command = shlex.join(["ray-ep", "train", f"run_dir={run}", "resume=auto"])
        raise BadInput(f"{str(run)!r}: this run has ended{by}: nobody is there to ask; to go on with it: {command}")
    try:
        RunDir(run).request(f"ray-ep rebalance, process {os.getpid()} on host {socket.gethostname()}")
    except OSError as e:
        raise BadInput(f"{str(run)!r}: cannot ask there: {e.strerror or e}") from None
    click.echo(f"asked: the job of {run} answers in {run / 'events.jsonl'} after its next step")
