"""`ray-ep chaos`: disturbs a run on purpose and counts what it lost. A thin shell around ray_ep.chaos."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_ep.cli.loading import loading
from ray_ep.cli.table import table

if TYPE_CHECKING:
    from ray_ep.chaos.grounds import Ground
    from ray_ep.chaos.report import Curve
    from ray_ep.chaos.schedule import Wish
    from ray_ep.config.schema import Config

_PATH = click.Path(path_type=Path)

DEFAULTS = (
    "cluster.ranks=4",
    "cluster.cpus_per_rank=0.5",
    "optim.steps=1000000",  # it is ended from here
    "optim.learning_rate=0.0001",
    "optim.schedule=constant_with_warmup",
    "balance.in_step=off",
    # Each token visits all experts: of near ties another one is taken on another number of ranks.
    "model.overrides={num_experts: 8, num_experts_per_tok: 8, moe_intermediate_size: 32}",
    "eval.every=0",
    "checkpoint.every=100",
)
"""The run that is disturbed without a --config."""
GROWS = ("elastic.policy=available", "elastic.max_ranks=6")
"""And one that is given nodes: fixed, the default, asks sooner for ranks in place of lost ones."""


@click.command()
@click.option("--minutes", type=float, default=5.0, show_default=True, help="How long faults come.")
@click.option("--every", type=float, default=30.0, show_default=True, help="Mean seconds between two faults.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the schedule of faults.")
@click.option("--faults", help="One or several of the kinds below; kill,node,stop if not given.")
@click.option("--against", type=_PATH, metavar="RUN", help="Compare with this undisturbed run; see below.")
@click.option("--address", metavar="HOST:PORT", help="Disturb it on this cluster in place of raylets of its own.")
@click.option("--lab", type=_PATH, metavar="LAB.yaml", help="On a network lab (cluster/netlab; needs root).")
@click.option("--nodes", type=click.IntRange(2), help="Raylets that hold the ranks; one for two if not given.")
@click.option("--tolerance", type=float, default=1e-5, show_default=True, help="Largest relative difference of losses.")
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--json", "as_json", is_flag=True, help="Print what was counted as one JSON line.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def chaos(config: str | None, overrides: tuple[str, ...], as_json: bool, nodes: int | None, **given: Any) -> None:
    """Disturb a training run on purpose, and count what that cost.

    The run is made with faults, at a fixed seed and pace, then once more without for as many steps (or compared with
    --against). Told are faults by kind, steps lost, the largest difference of a loss, ETTR, and how long it took to go
    on. run_dir=DIR names the directory for both runs, chaos.json and chaos.html, else it is a new one under runs/.

    \b
    Faults:
      kill   SIGKILL of a rank's process
      node   a raylet is killed with its ranks; a new one comes 2 s later
      stop   SIGSTOP of a rank, for half of cluster.silence_s, or for twice: then it is lost
      drain  Ray is told that a node will go in 20 s; a new one comes
      add    one node more, for a run that grows (elastic.policy, elastic.max_ranks)
      cut    a host's cable is pulled, for three times cluster.silence_s            with --lab
      slow   a host's links have 5% of their bandwidth, for half of --every         with --lab
      With --address: kill, stop and drain; nodes are somebody's.

    Without --config: a small MoE on 4 ranks with no end of its own (see docs/elastic.md). Exit status 0: nothing was
    lost and losses are equal; 1: something was.

    \b
      ray-ep chaos --minutes 2 --every 15
      ray-ep chaos --minutes 30 --every 28 --faults kill,node,stop,drain,add --json
      ray-ep chaos --config runs/NAME/config.yaml --against runs/NAME --address HOST:PORT
    """
    cfg, wish, ground, against = _checked(config, overrides, nodes, given)
    folder = _folder(cfg)
    loading("chaos")
    from ray_ep.chaos.page import HEAD, facts, html, rows, verdict_of
    from ray_ep.chaos.run import chaos as disturbed
    from ray_ep.driver.interrupt import Interrupt

    with Interrupt().caught():
        found = disturbed(cfg, wish, ground(folder), folder, against, lambda words: click.echo(words, err=True))
    (folder / "chaos.html").write_text(html(found), encoding="utf-8")
    counted = found.report
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **counted.to_dict()}))
    else:
        click.echo("\n".join(facts(counted)))
        click.echo(table(HEAD, rows(counted)))
        click.echo("\n".join([*verdict_of(counted), f"done: {folder}/chaos.html"]))
    sys.exit(1 if counted.problems else 0)


def _checked(
    config: str | None, overrides: tuple[str, ...], nodes: int | None, given: Mapping[str, Any]
) -> tuple[Config, Wish, Callable[[Path], Callable[[], Ground]], Curve | None]:
    """What is to be done, as far as it can be refused from what was given alone. Raises BadInput."""
    from ray_ep.chaos import grounds
    from ray_ep.chaos.checks import check_nodes, check_run, recorded
    from ray_ep.chaos.schedule import Kind, Wish, kinds_of, schedule
    from ray_ep.config import load_config
    from ray_ep.errors import BadInput

    for name in ("minutes", "every", "tolerance"):
        if not 0 < given[name] < math.inf:
            raise BadInput(f"--{name} {given[name]:g}: expected more than 0")
    if sum(x is not None for x in (given["address"], given["lab"], nodes)) > 1:
        raise BadInput("--address, --lab, --nodes: a run is disturbed on one kind of cluster: give one of them")
    kind = grounds.JoinedCluster if given["address"] else grounds.NetworkLab if given["lab"] else grounds.OwnRaylets
    if given["lab"]:
        grounds.check_lab(given["lab"])
    default = "kill,stop" if given["address"] else "kill,node,stop"
    kinds = kinds_of(default if given["faults"] is None else given["faults"], kind.impossible)
    usual = () if config else (*DEFAULTS, *(GROWS if Kind.ADD in kinds else ()))
    cfg = load_config(config, (*usual, *overrides))
    check_run(cfg, kinds)
    nodes = nodes or max(2, math.ceil(cfg.cluster.ranks / 2))
    if kind is grounds.OwnRaylets:
        check_nodes(cfg, nodes)
    against = None if given["against"] is None else recorded(given["against"], cfg)
    wish = Wish(kinds, 60 * given["minutes"], given["every"], given["seed"], given["tolerance"])
    if not schedule(wish):
        raise BadInput(f"--minutes {given['minutes']:g} --every {given['every']:g}: no fault comes in that time")

    def ground(folder: Path) -> Callable[[], Ground]:
        if given["address"]:
            return lambda: grounds.JoinedCluster(given["address"], folder)
        if given["lab"]:
            return lambda: grounds.NetworkLab(given["lab"], folder)
        return lambda: grounds.OwnRaylets(cfg, nodes, folder)

    return cfg, wish, ground, against


def _folder(cfg: Config) -> Path:
    """Where all of it goes: made here, and empty. Raises BadInput."""
    from ray_ep.config.runs import RUNS
    from ray_ep.errors import BadInput

    path = Path(cfg.run_dir or f"{RUNS}/chaos-{datetime.now():%Y%m%d-%H%M%S}").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise BadInput(f"run_dir={str(path)!r} already holds files: give a new directory")
    except OSError as e:
        raise BadInput(f"run_dir={str(path)!r}: cannot write there: {e.strerror or e}") from None
    return path
