"""What is refused before anything starts: runs that cannot be disturbed, curves of other runs. Reads files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ray_ep.chaos.report import Curve, curve_of
from ray_ep.chaos.schedule import Kind
from ray_ep.config.load import beside_path, fields, old_values
from ray_ep.config.runs import settings_of
from ray_ep.config.schema import Config
from ray_ep.errors import BadInput

_DECIDE = ("seed", "model.", "data.", "batch.", "optim.", "router.", "exchange.float8")
"""Keys that a loss curve depends on, whatever cluster the run is on."""
_COSTS_RANKS = frozenset({Kind.KILL, Kind.NODE, Kind.CUT, Kind.STOP})


def check_run(cfg: Config, kinds: Collection[Kind]) -> None:
    """Raise BadInput for a configuration that cannot be disturbed so."""
    if cfg.resume != "no":
        raise BadInput(f"resume={cfg.resume!r}: a disturbed run starts anew: leave resume out")
    if cfg.cluster.address:
        raise BadInput(f"cluster.address={cfg.cluster.address!r}: give it as --address {cfg.cluster.address}")
    if cfg.cluster.ranks < 2:
        raise BadInput(f"cluster.ranks={cfg.cluster.ranks}: of one rank nothing is left: at least 2")
    elastic = cfg.elastic
    if Kind.ADD in kinds and (elastic.policy == "fixed" or elastic.max_ranks <= cfg.cluster.ranks):
        raise BadInput(
            f"--faults add: a run of elastic.policy={elastic.policy}, elastic.max_ranks={elastic.max_ranks} takes no "
            f"more than cluster.ranks={cfg.cluster.ranks}: elastic.policy=available and more elastic.max_ranks"
        )
    costly = sorted(k.value for k in _COSTS_RANKS & set(kinds))
    if costly and not cfg.snapshot.every:
        raise BadInput(f"--faults {','.join(costly)}: snapshot.every=0 ends a run with a lost rank: give 1 or more")
    if costly and elastic.min_ranks >= cfg.cluster.ranks:
        raise BadInput(
            f"--faults {','.join(costly)}: elastic.min_ranks={elastic.min_ranks} of "
            f"cluster.ranks={cfg.cluster.ranks} leaves no rank to lose"
        )


def cpus_of(cfg: Config, nodes: int) -> float:
    """CPUs of each of so many nodes that have room for all ranks together, as evenly as can be."""
    return math.ceil(cfg.cluster.ranks / nodes) * cfg.cluster.cpus_per_rank


def check_nodes(cfg: Config, nodes: int) -> None:
    """Raise BadInput where raylets on this machine cannot hold the ranks."""
    if cfg.cluster.device == "cuda":
        raise BadInput("cluster.device=cuda: raylets that are started here have no GPUs: give --address")
    if nodes > cfg.cluster.ranks:
        raise BadInput(f"--nodes {nodes}: more than cluster.ranks={cfg.cluster.ranks}: at most one node a rank")
    if cpus_of(cfg, nodes) % 1:
        raise BadInput(
            f"--nodes {nodes}: each has room for {math.ceil(cfg.cluster.ranks / nodes)} ranks of "
            f"{cfg.cluster.cpus_per_rank:g} CPUs, and Ray gives nodes whole CPUs: give another number, or "
            "cluster.cpus_per_rank=1 (they need not be there)"
        )


def recorded(run: Path, cfg: Config) -> Curve:
    """The curve of a run that was made before, undisturbed, with what decides a curve as in `cfg`.

    Raises:
        BadInput: no run, another configuration (which key, both values), no steps, or ranks were lost in it.
    """
    where = f"--against {run}"
    if not (run / "config.yaml").is_file():
        raise BadInput(f"{where}: expected a run directory, with its config.yaml")
    old, here = beside_path(old_values(settings_of(run))[0]), OmegaConf.structured(cfg)
    for key, _, default in fields():
        if key.startswith(_DECIDE):
            now = OmegaConf.select(here, key)
            now = OmegaConf.to_container(now) if OmegaConf.is_config(now) else now
            if old.get(key, default) != now:
                raise BadInput(
                    f"{where}: a run with {key}={old.get(key, default)!r}, here it is {now!r}: give --config "
                    f"{run / 'config.yaml'}"
                )
    if any(event.get("kind") == "recovered" for event in _lines(run / "events.jsonl")):
        raise BadInput(f"{where}: ranks were lost in that run: give an undisturbed one")
    steps = [(m["step"], m["loss"], m["step_seconds"]) for m in _lines(run / "metrics.jsonl") if m.get("loss")]
    if not steps:
        raise BadInput(f"{where}: that run made no steps")
    return curve_of(steps)


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # a crash may have cut a line short
            found.append(json.loads(line))
    return found
