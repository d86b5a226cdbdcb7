"""`ray-ep rebalance`, `scale` and `drain`: ask a running job for something, by a file left in its run directory.

What can be refused from that directory alone is refused here. Neither torch nor Ray is loaded.
"""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ray_ep.driver.requests import RequestKind

_RUN = click.argument("run", type=click.Path(path_type=Path))


@click.command()
@_RUN
def rebalance(run: Path) -> None:
    """Ask the job that writes the run directory RUN to consider other places for its experts now.

    It decides after its next step, beside the steps, and moves experts where that pays back (placement.horizon_steps).
    What it decided, and why, is in RUN/events.jsonl, kind rebalance. Works with placement.every=0, too.

    \b
      ray-ep rebalance runs/20260701-123005
    """
    from ray_ep.driver.requests import RequestKind

    _check_runs(run)
    _ask(run, RequestKind.REBALANCE, "rebalance")


@click.command()
@_RUN
@click.argument("ranks", metavar="N")
def scale(run: Path, ranks: str) -> None:
    """Ask the job that writes the run directory RUN to go on with N ranks; N=auto: with as many as elastic.policy says.

    It keeps that number, whatever the policy, until it is asked for another one. New ranks start beside the steps and
    join between two; where the cluster has no room for them within elastic.wait_s, the run goes on without. Allowed are
    elastic.min_ranks to elastic.max_ranks. What comes of it is in RUN/events.jsonl, kind elastic.

    \b
      ray-ep scale runs/20260701-123005 4
      ray-ep scale runs/20260701-123005 auto
    """
    from ray_ep.config.load import from_dict
    from ray_ep.config.runs import settings_of
    from ray_ep.driver.elastic.limits import scale_refusal
    from ray_ep.driver.requests import RequestKind
    from ray_ep.errors import BadInput

    if ranks != "auto" and not (ranks.isdecimal() and int(ranks)):
        raise BadInput(f"N={ranks!r}: expected a number of ranks from 1 on, or auto")
    count = 0 if ranks == "auto" else int(ranks)
    _check_runs(run)
    if count and (why := scale_refusal(from_dict(settings_of(run)), count)):
        raise BadInput(f"{str(run)!r}: {why}")
    _ask(run, RequestKind.SCALE, "scale", ranks=count)


@click.command()
@_RUN
@click.argument("node")
def drain(run: Path, node: str) -> None:
    """Ask the job that writes the run directory RUN to have all its ranks leave NODE.

    NODE is a node's id as Ray says it, or the beginning of it, or its host's name or address. The ranks hand over what
    they own and go: no step is made again. No new rank of the run is placed there. What comes of it is in
    RUN/events.jsonl, kind elastic.

    \b
      ray-ep drain runs/20260701-123005 10.0.3.17
    """
    from ray_ep.driver.requests import RequestKind

    _check_runs(run)
    _ask(run, RequestKind.DRAIN, "drain", node=node)


def _check_runs(run: Path) -> None:
    """Raise BadInput unless a process runs in the directory."""
    from ray_ep.driver.run.claim import holder, last_holder
    from ray_ep.errors import BadInput

    if not (run / "config.yaml").is_file():
        raise BadInput(f"{str(run)!r}: expected a run directory, with its config.yaml")
    if holder(run, unknown={}) is None:
        who = last_holder(run)
        by = f" (it was process {who['pid']} on host {who.get('host')})" if "pid" in who else ""
        command = shlex.join(["ray-ep", "train", f"run_dir={run}", "resume=auto"])
        raise BadInput(f"{str(run)!r}: this run has ended{by}: nobody is there to ask; to go on with it: {command}")


def _ask(run: Path, kind: RequestKind, verb: str, **fields: int | str) -> None:
    """Leave the request there. Raises BadInput."""
    from ray_ep.driver.requests import Request
    from ray_ep.driver.run.asking import ask
    from ray_ep.errors import BadInput

    by = f"ray-ep {verb}, process {os.getpid()} on host {socket.gethostname()}"
    try:
        ask(run, Request(kind, by, fields))
    except OSError as e:
        raise BadInput(f"{str(run)!r}: cannot ask there: {e.strerror or e}") from None
