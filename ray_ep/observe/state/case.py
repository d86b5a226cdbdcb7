"""What a run tells a planner: its routing, its links, what its steps cost, what must be even; `ray-ep plan` asks here.

With `ray_ep.placement.compare` any placement can be tried on a run that goes or has ended. Imports the placement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ep.driver.rebalance.recent import NOW
from ray_ep.errors import BadInput
from ray_ep.observe.state.files import number
from ray_ep.observe.state.run_state import RunState
from ray_ep.placement.compare import Case, Measured
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.memory import state_bytes
from ray_ep.placement.statistics import RoutingStatistics

_MOST = 1e15  # of any cost: a figure beyond is none
_WENT_WITHOUT = 10  # steps: so many of the newest are looked at


def case_of(run: RunState, slots: int | Sequence[int] | None = None) -> Case:
    """What is planned for when the experts of `run` are: its routing so far, its links, its own costs.

    Args:
        slots: of a rank and layer, one number or one per rank; None: as many as its placement has.

    Raises:
        BadInput: the run has no placement, no links or no routing yet; the message says which.
    """
    placement, topology, statistics = run.placements.newest, run.topology, run.load.statistics
    if placement is None or topology is None or statistics is None:
        parts = (("placements", placement), ("topology.json", topology), ("statistics", statistics))
        missing = next(name for name, part in parts if part is None)
        raise BadInput(f"{run.path}: {missing} cannot be read there: a run has them after its first steps")
    costs = StepCosts(**whole_tokens(costs_of(run, statistics, topology.num_ranks)))
    width = placement.slots.shape[2] if slots is None else slots
    horizon = number(run.setting("placement.horizon_steps", 1000.0))
    return Case(statistics, topology, width, level_of(run)[0], horizon, costs)


def costs_of(run: RunState, statistics: RoutingStatistics, ranks: int) -> dict[str, float]:
    """Of the fields of `StepCosts` those that the run tells, by its model and its steps so far.

    A token's hidden state crosses in forward and in backward, so it counts twice.
    """
    model = _model(run)
    size = 2 if run.setting("model.dtype", "") == "bfloat16" else 4
    hidden = number(model.get("hidden_size"))
    ffn = number(model.get("moe_intermediate_size") or model.get("intermediate_size"))
    parameters = number(run.standing.model.get("expert_parameters"))
    if not parameters > 0:
        parameters = 3 * hidden * ffn  # gate, up and down
    sequences, length = (number(run.setting(f"batch.{name}", None)) for name in ("sequences", "length"))
    found = {
        "tokens_per_rank": sequences * length / ranks,
        "token_bytes": 2 * hidden * size,
        "expert_bytes": parameters * size,
        "optimizer_bytes": parameters * state_of(run),
    }
    expert, world, tokens = (run.steps.column(name) for name in ("expert_seconds", "world_size", "tokens"))
    with np.errstate(all="ignore"):  # figures of a file may be anything
        seconds = expert * world / tokens
    seconds = seconds[np.isfinite(seconds)]
    sample = statistics.sample
    if len(seconds) and sample is not None and sample.shape[1]:
        found["expert_seconds"] = float(np.median(seconds)) / (len(statistics.load) * sample.shape[2])
    return {k: v for k, v in found.items() if 0 < v < _MOST}


def whole_tokens(costs: Mapping[str, float]) -> dict[str, Any]:
    """`costs` as StepCosts takes them: tokens are whole, and at least one."""
    tokens = {k: max(1, round(v)) for k, v in costs.items() if k == "tokens_per_rank"}
    return {**costs, **tokens}


def state_of(run: RunState) -> int:
    """Bytes of a parameter's master and moments, as the run is configured."""
    return state_bytes(run.setting("optim.kind", "adamw"), number(run.setting("optim.beta1", 0.9)))


def level_of(run: RunState) -> tuple[str, str]:
    """What must be even, node or rank, and why: as the run balances."""
    said = run.setting("placement.level", None)
    if said in ("node", "rank"):
        return said, f"the run's placement.level is {said}"
    mode = run.setting("balance.in_step", "auto")
    if mode in ("off", False):  # YAML's own reading of a bare off
        return "rank", "the run's balance.in_step is off: nothing evens the ranks of a node out in a step"
    if mode == "auto" and _went_without(run):
        return "rank", "the run's balance.in_step is auto, and its last steps went without: it did not pay"
    return "node", f"the run's balance.in_step is {mode}: ranks of a node are evened out in each step"


def measured_of(run: RunState) -> Measured | None:
    """What the run's last steps took, as the running job sees it; None: not known."""
    step, exchange, expert = (run.steps.column(f"{name}_seconds") for name in ("step", "exchange", "expert"))
    last = np.stack([step, exchange + expert])[:, -NOW:]
    last = last[:, np.isfinite(last).all(0)]
    if not last.size:
        return None
    whole, moe = np.median(last, axis=1).tolist()
    return Measured(whole, moe) if whole > 0 and moe > 0 else None


def _went_without(run: RunState) -> bool:
    """Whether the run's last steps were not balanced: their imbalance is then that of the places alone."""
    last = run.steps.rows[-_WENT_WITHOUT:]
    figures = [[number(row.get(name)) for name in ("guests", "imbalance_before", "balancedness")] for row in last]
    return bool(last) and all(not guests and abs(before * even - 1) < 1e-9 for guests, before, even in figures)


def _model(run: RunState) -> Mapping[str, Any]:
    """The transformers configuration: whole in a checkpoint's manifest, else what the run's configuration overrides."""
    for path in sorted(run.path.glob("checkpoints/step-*/manifest.json"), reverse=True):
        model = _manifest(path).get("model")
        if isinstance(model, Mapping):
            return model
    overrides = run.setting("model.overrides", {})
    return overrides if isinstance(overrides, Mapping) else {}


def _manifest(path: Path) -> Mapping[str, Any]:
    """{} where it is missing or damaged: costs then have their defaults."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, Mapping) else {}
