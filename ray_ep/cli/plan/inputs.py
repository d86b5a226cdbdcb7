"""What `ray-ep plan` is given: paths -> statistics, topology, current placement, costs; failures name the path.

Imports neither torch nor Ray (a .pt record imports torch).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ray_ep.cli.engines.files import read_map, read_placement, read_record
from ray_ep.cli.engines.formats import file_text, yaml_file
from ray_ep.driver.rebalance.recent import NOW
from ray_ep.errors import BadInput, PlacementError
from ray_ep.placement import Placement, RoutingStatistics, StepCosts, Topology
from ray_ep.placement.compare import Measured
from ray_ep.placement.cost.memory import state_bytes
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


def run_of(path: Path) -> Path | None:
    """The run directory, if the path is one that has recorded statistics or a topology."""
    return path if path.is_dir() and (path / "config.yaml").is_file() else None


def read_recorded(path: Path, num_experts: int | None, routed: str | None = None) -> Recorded:
    """Statistics of a run directory, ray_ep's file, or another engine's record; routed: LAYERSxTOP_K of --routed."""
    if run_of(path) is None:
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


def read_topology(path: Path | None, run: Path | None) -> tuple[Topology, tuple[float, ...] | None]:
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
        path = run
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
    path: Path | None, run: Path | None, ranks: int, recorded: Recorded
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
        files = [] if run is None else files_by_version(run / "placements")
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
    given: Sequence[str], run: Path | None, recorded: Recorded, ranks: int, speed: tuple[float, ...] | None
) -> SourcedCosts:
    """Costs of the run's own model and steps where it tells, else the defaults; `given` NAME=VALUE wins."""
    own = {} if run is None else run_costs(run, recorded, ranks)
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
    values: dict[str, Any] = {**own, **named}
    if "tokens_per_rank" in values:
        values["tokens_per_rank"] = max(1, round(values["tokens_per_rank"]))
    figures = replace(StepCosts(**values), speed=speed)
    return SourcedCosts(figures, source, "expert_bytes" not in defaults)


def read_level(given: str | None, run: Path | None, own: bool) -> tuple[str, str]:
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
    config = run_config(run)
    said = _section(config, "placement").get("level")
    if said in ("node", "rank"):
        return said, f"the run's placement.level is {said}"
    mode = _section(config, "balance").get("in_step", "auto")
    if mode in ("off", False):  # YAML's own reading of a bare off
        return "rank", "the run's balance.in_step is off: nothing evens the ranks of a node out in a step"
    if mode == "auto" and _went_without(run):
        return "rank", "the run's balance.in_step is auto, and its last steps went without: it did not pay"
    return "node", f"the run's balance.in_step is {mode}: ranks of a node are evened out in each step"


def _went_without(run: Path, steps: int = 10) -> bool:
    """Whether the run's last steps were not balanced: their imbalance is then that of the places alone."""
    last = [x for x in _lines(run / "metrics.jsonl") if isinstance(x, Mapping)][-steps:]
    try:
        return bool(last) and all(
            not x["guests"] and abs(x["imbalance_before"] * x["balancedness"] - 1) < 1e-9 for x in last
        )
    except (KeyError, TypeError):
        return False


def unknown(statistics: RoutingStatistics) -> list[str]:
    """What counts alone do not tell, in a sentence; none where token sets were recorded."""
    if statistics.tells_visits:
        return []
    return [
        "of counts alone: which experts a token visits together, and how many, is not known, so traffic and remote "
        "nodes are left out (-), and a step is its compute, for one expert a token"
    ]


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def run_costs(run: Path, recorded: Recorded, ranks: int) -> dict[str, float]:
    """What a run's directory tells about its steps; figures that it does not tell are left out.

    A token's hidden state crosses in forward and in backward, so it counts twice.
    """
    config = run_config(run)
    model = _model(run, config)
    batch, settings = _section(config, "batch"), _section(config, "model")
    size = 2 if settings.get("dtype") == "bfloat16" else 4
    hidden, ffn = model.get("hidden_size"), model.get("moe_intermediate_size") or model.get("intermediate_size")
    parameters = started(run).get("expert_parameters")
    if not isinstance(parameters, int) and isinstance(hidden, int) and isinstance(ffn, int):
        parameters = 3 * hidden * ffn  # gate, up and down
    found: dict[str, float] = {}
    if all(isinstance(batch.get(k), int) for k in ("sequences", "length")):
        found["tokens_per_rank"] = batch["sequences"] * batch["length"] / ranks
    if isinstance(hidden, int):
        found["token_bytes"] = 2.0 * hidden * size
    if isinstance(parameters, int):
        found["expert_bytes"] = float(parameters * size)
        found["optimizer_bytes"] = float(parameters * state_of(config))
    load = recorded.statistics.load
    seconds = []
    for line in _lines(run / "metrics.jsonl"):
        try:
            seconds.append(line["expert_seconds"] * line["world_size"] / line["tokens"])
        except (KeyError, TypeError, ZeroDivisionError):
            continue
    sample = recorded.statistics.sample
    if seconds and sample is not None and sample.shape[1]:
        found["expert_seconds"] = float(np.median(seconds)) / (len(load) * sample.shape[2])
    return {k: v for k, v in found.items() if np.isfinite(v) and v > 0}


def run_config(run: Path) -> Mapping[str, Any]:
    """The configuration in a run's directory; empty where it is damaged."""
    return _mapping(run / "config.yaml")


def state_of(config: Mapping[str, Any]) -> int:
    """Bytes of a parameter's master and moments, as a run's configuration has them."""
    optim = _section(config, "optim")
    return state_bytes(optim.get("kind", "adamw"), optim.get("beta1", 0.9))


def started(run: Path) -> Mapping[str, Any]:
    """What a run said of its model when it last started; empty where it is not known."""
    events = (x for x in reversed(_lines(run / "events.jsonl")) if isinstance(x, Mapping) and x.get("kind") == "start")
    return _section(next(events, {}), "fields")


def measured_steps(run: Path | None, options: Mapping[str, Any]) -> Measured | None:
    """What the run's last steps took, as the running job sees it; None: nothing is known, or other links or costs are.

    Args:
        options: of the command line; a topology or costs that are given there are not those of the run's steps.
    """
    if run is None or options["topology"] is not None or options["costs"]:
        return None
    last = []
    for line in _lines(run / "metrics.jsonl")[-NOW:]:
        try:
            last.append((line["step_seconds"], line["exchange_seconds"] + line["expert_seconds"]))
        except (KeyError, TypeError):
            continue
    step, moe = np.median(last, axis=0).tolist() if last else (0.0, 0.0)
    return Measured(step, moe) if np.isfinite(step + moe) and step > 0 and moe > 0 else None


def _model(run: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformers configuration: whole in a checkpoint's manifest, else what the run's configuration overrides."""
    for path in sorted(run.glob("checkpoints/step-*/manifest.json"), reverse=True):
        model = _mapping(path).get("model")
        if isinstance(model, Mapping):
            return model
    overrides = _section(config, "model").get("overrides")
    return overrides if isinstance(overrides, Mapping) else {}


def _mapping(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON mapping; empty where the file is missing or damaged: costs then have their defaults."""
    try:
        tree = json.loads(file_text(path)) if path.suffix == ".json" else yaml.safe_load(file_text(path))
    except (PlacementError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, Mapping) else {}


def _lines(path: Path) -> list[Any]:
    """Objects of a .jsonl file; lines that a killed run left half written are skipped."""
    found = []
    for line in file_text(path).splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


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
