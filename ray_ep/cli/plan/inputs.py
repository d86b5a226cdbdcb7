"""What `ray-ep plan` is given: paths -> statistics, topology, current placement, costs; failures name the path.

Imports neither torch nor Ray (a .pt record imports torch).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_ep.cli.engines.files import read_map, read_placement, read_record
from ray_ep.cli.engines.formats import yaml_file
from ray_ep.errors import BadInput, PlacementError
from ray_ep.observe.state import RunState
from ray_ep.observe.state.case import costs_of, level_of, measured_of, whole_tokens
from ray_ep.placement import Placement, RoutingStatistics, StepCosts, Topology
from ray_ep.placement.compare import Measured
from ray_ep.placement.engines.records import Recorded
from ray_ep.placement.placement import files_by_version
from ray_ep.placement.planner.survive import fewest_slots
from ray_ep.placement.whatif.description import describe

ROUTING_FILE = Path("statistics") / "routing.npz"
"""Path of the routing statistics inside a run directory; each checkpoint rewrites it."""

COSTS = ("tokens_per_rank", "token_bytes", "expert_seconds", "expert_bytes", "optimizer_bytes")
"""Names of `StepCosts` that a user may give."""


@dataclass(frozen=True, slots=True)
class SourcedCosts:
    """Figures of the cost model, where they come from, and whether an expert's size among them is the model's own."""

    figures: StepCosts
    source: str
    sized: bool


def run_of(path: Path) -> RunState | None:
    """The run in a directory, as it is now; None: the path is something else."""
    return RunState(path) if (path / "config.yaml").is_file() else None


def read_recorded(path: Path, num_experts: int | None, routed: str | None = None) -> Recorded:
    """Statistics of a run directory, ray_ep's file, or another engine's record; routed: LAYERSxTOP_K of --routed."""
    if not (path / "config.yaml").is_file():
        return read_record(path, num_experts, _routed_shape(routed))
    if not (path / ROUTING_FILE).is_file():
        raise PlacementError(f"{path}: the run has no {ROUTING_FILE} yet: it is written with each checkpoint")
    return read_record(path / ROUTING_FILE, num_experts)


def _routed_shape(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,2})", text.strip())
    if match is None:
        raise BadInput(f"--routed {text!r}: expected LAYERSxTOP_K, all layers of the model, such as 61x8")
    return int(match[1]), int(match[2])


def read_topology(path: Path | None, run: RunState | None) -> tuple[Topology, tuple[float, ...] | None]:
    """A measured topology or a described one, and the ranks' speeds if they are not all alike.

    Args:
        path: topology.json, a run directory that has one, or a description in YAML; None: that of `run`.
        run: the run directory that the statistics come from, if they do.
    """
    if path is None:
        if run is None:
            raise PlacementError(
                "--topology is needed beside statistics that are not a run directory: a topology.json (ray-ep probe "
                "--out), a run directory, or a YAML description"
            )
        path = run.path
    if path.is_dir():
        path = path / "topology.json"
    if not path.is_file():
        raise PlacementError(f"{path}: no such file: expected a topology.json, a run directory or a YAML description")
    tree = yaml_file(path)
    if not (isinstance(tree, Mapping) and "node_of" in tree):
        described = describe(tree, str(path))
        return described.topology, described.speed
    try:
        return Topology.from_json(json.dumps(tree)), None
    except PlacementError as e:
        raise PlacementError(f"{path}: {e}") from None


def read_current(
    path: Path | None, run: RunState | None, ranks: int, recorded: Recorded
) -> tuple[Placement | None, tuple[str, ...]]:
    """The placement that runs now, and what of its file was left out, in sentences.

    Of the file, else the newest of the run; None where neither is there. A run's own placement is left out where
    another cluster is planned for.
    """
    notes: tuple[str, ...] = ()
    layers, experts = recorded.statistics.load.shape
    if path is not None:
        if not path.is_file():
            raise PlacementError(f"{path}: no such file: expected a placement")
        ids = None if recorded.engine == "ray_ep" else recorded.layer_ids
        placement, notes = read_map(path, ranks, ids, layers)
    else:
        files = [] if run is None else files_by_version(run.path / "placements")
        if not files:
            return None, ()
        path, placement = files[-1], read_placement(files[-1])
        if placement.num_ranks != ranks:
            return None, ()
    have = placement.num_layers, placement.num_experts
    if have != (layers, experts):
        raise PlacementError(
            f"{path}: a placement of {have[0]} layers x {have[1]} experts, the statistics are of {layers} x {experts}:"
            " they must be of one model"
        )
    if placement.num_ranks != ranks:
        raise PlacementError(f"{path}: a placement on {placement.num_ranks} ranks, the topology has {ranks}")
    return placement, notes


def read_costs(
    given: Sequence[str], run: RunState | None, recorded: Recorded, ranks: int, speed: tuple[float, ...] | None
) -> SourcedCosts:
    """Costs of the run's own model and steps where it tells, else the defaults; `given` NAME=VALUE wins."""
    own = {} if run is None else costs_of(run, recorded.statistics, ranks)
    if recorded.engine != "ray_ep":
        own = {"optimizer_bytes": 0.0}  # they serve
    named = dict(_cost(item) for item in given)
    defaults = [name for name in COSTS if name not in {**own, **named}]
    source = ", ".join(
        f"{what} {', '.join(names)}"
        for what, names in (
            ("given:", [n for n in COSTS if n in named]),
            ("the run's own:", [n for n in COSTS if n in own and n not in named and run is not None]),
            ("DeepSeek-V3's layer on an H800 for", defaults),
        )
        if names
    )
    figures = StepCosts(**whole_tokens({**own, **named}), speed=speed)
    return SourcedCosts(figures, source, "expert_bytes" not in defaults)


def read_level(given: str | None, run: RunState | None, own: bool) -> tuple[str, str]:
    """What must be even, node or rank, and why: as given, as the run balances, else as engines do.

    Args:
        own: ray_ep recorded and will run it; others even nothing out in a step.
    """
    if given is not None:
        return given, "as given"
    if not own:
        return "rank", "nothing evens ranks out in a step there"
    if run is None:
        return "node", "ranks of a node are evened out in each step (--level rank where balance.in_step is off)"
    return level_of(run)


def unknown(statistics: RoutingStatistics) -> list[str]:
    """What counts alone do not tell, in a sentence; none where token sets were recorded."""
    if statistics.tells_visits:
        return []
    return [
        "of counts alone: which experts a token visits together, and how many, is not known, so traffic and remote "
        "nodes are left out (-), and a step is its compute, for one expert a token"
    ]


def measured_steps(run: RunState | None, options: Mapping[str, Any]) -> Measured | None:
    """What the run's last steps took, as the running job sees it; None: nothing is known, or other links or costs are.

    Args:
        options: of the command line; a topology or costs that are given there are not those of the run's steps.
    """
    if run is None or options["topology"] is not None or options["costs"]:
        return None
    return measured_of(run)


def _cost(item: str) -> tuple[str, float]:
    name, sep, text = item.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not sep or name not in COSTS or not np.isfinite(value) or value < 0:
        raise BadInput(
            f"--cost {item!r}: expected NAME=VALUE with a number that is not negative, NAME {', '.join(COSTS)}"
        )
    return name, value


def slots_of(text: str | None, current: Placement | None, ranks: int) -> int | tuple[int, ...] | None:
    """--slots: one number or one a rank, such as 9 or 9,9,5,5; without it those of the current placement."""
    if text is None:
        return None if current is None else current.slots.shape[2]
    try:
        numbers = tuple(int(x) for x in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or len(numbers) not in (1, ranks):
        raise BadInput(f"--slots {text!r}: expected a number of slots, or {ranks} with commas between, one a rank")
    return numbers[0] if len(numbers) == 1 else numbers


def safe_slots(
    slots: int | tuple[int, ...] | None, experts: int, topology: Topology, survive_nodes: int
) -> int | tuple[int, ...] | None:
    """Slots with which `survive_nodes` nodes may be lost: the given ones, else the fewest that do.

    Raises:
        PlacementError: no more nodes than may be lost.
    """
    if slots is not None or not survive_nodes:
        return slots
    return fewest_slots(experts, topology.node_of, survive_nodes)
