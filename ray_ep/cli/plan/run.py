"""What `ray-ep plan` does with its arguments: read, plan, compare, write; and its answer as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_ep.cli.engines.files import write_placement
from ray_ep.cli.plan import inputs as plan_inputs
from ray_ep.cli.plan.words import assumed, remote_nodes, sentences
from ray_ep.cli.table import table
from ray_ep.cli.units import in_bytes, in_seconds
from ray_ep.errors import BadInput, PlacementError
from ray_ep.placement import Placement
from ray_ep.placement.compare import PLAN, Candidate, Case, candidates, compare, safety, verdict
from ray_ep.placement.cost.predict import Prediction
from ray_ep.placement.engines.records import Recorded
from ray_ep.placement.planner.survive import Price, survives
from ray_ep.placement.planner.verdict import pays_back

HEAD = ("placement", "step", "of now", "compute", "traffic", "ranks", "nodes", "remote", "moved", "bytes", "pays back")
"""Heads of the table's columns."""

LEGEND = (
    "ranks, nodes: balancedness, mean / max load (1 is even); remote: other nodes that a token visits a layer; "
    "moved: slots with another expert than now"
)
"""What the table's columns mean, printed below it."""

NEAREST = ("ray_ep", "tensorrt-llm")
"""Engines whose tokens go to the nearest replica."""


@dataclass(frozen=True, slots=True)
class Planned:
    """Everything that is said of one plan.

    Args:
        now: name of the candidate that the others are compared with.
        words: the advice, a sentence each. notes: what was read and assumed.
        written: the plan's file; None: nowhere. numbers: what that holds.
        safety: what outliving lost nodes costs; None: not asked for.
    """

    case: Case
    recorded: Recorded
    costs: plan_inputs.SourcedCosts
    now: str
    found: tuple[Candidate, ...]
    words: tuple[str, ...]
    notes: tuple[str, ...]
    written: str | None
    numbers: str | None
    safety: Price | None


def planned(path: Path, options: dict[str, Any]) -> Planned:
    """Read what the options name, plan, compare, and write the plan where they say.

    Raises:
        BadInput: something given is wrong; nothing was written.
    """
    run = plan_inputs.run_of(path)
    recorded = plan_inputs.read_recorded(path, options["experts"], options["routed"])
    engine = options["engine"] or (recorded.engine if recorded.engine != "vllm" else "ray_ep")
    out: Path | None = options["out"]
    if out is None and options["engine"] is not None:
        raise BadInput(f"--engine {engine}: give --out FILE, too")
    topology, speed = plan_inputs.read_topology(options["topology"], run)
    ranks = topology.num_ranks
    current, left = plan_inputs.read_current(options["current"], run, ranks, recorded)
    costs = plan_inputs.read_costs(options["costs"], run, recorded, ranks, speed)
    slots = plan_inputs.slots_of(options["slots"], current, ranks)
    level, why = plan_inputs.read_level(options["level"], run, recorded.engine == engine == "ray_ep")
    lost = options["survive_nodes"]
    safe = plan_inputs.safe_slots(slots, recorded.statistics.load.shape[1], topology, lost)
    case = Case(
        recorded.statistics, topology, safe, level, options["horizon"], costs.figures, options["seed"], lost, slots
    )
    placements = candidates(case, current)
    now = next(iter(placements))
    found = tuple(compare(case, placements, now))
    told = [
        c
        for c in found
        if c.name in (now, PLAN) or (c.name == "load-only" and survives(c.placement, topology.node_of, lost))
    ]
    size = costs.figures.expert_bytes if costs.sized else None
    nearest = recorded.engine in NEAREST and engine in NEAREST
    notes = (*_notes(recorded, case, costs, why), *left)
    where = numbers = None
    if out is not None:
        written = placements[PLAN]
        write_placement(written, engine, out, recorded.layer_ids, recorded.num_layers)
        where, numbers = f"{out} ({engine})", _in_numbers(written)
    price = safety(case, placements)
    answer = verdict(case, found, now, plan_inputs.measured_steps(run, options))
    words = [answer.words, *_safety_in_words(price, lost), *sentences(told, now, level, size), *assumed(told, nearest)]
    return Planned(case, recorded, costs, now, found, tuple(words), notes, where, numbers, price)


def _in_numbers(placement: Placement) -> str:
    """Of a written plan: layers, slots, replicas."""
    slots, (layers, ranks, width) = placement.slots, placement.slots.shape
    filled = (slots >= 0).sum(2)
    each = f"{width}" if (filled == width).all() else f"{filled.min()} to {filled.max()}"
    replicas = int(filled.sum()) - layers * placement.num_experts
    return (
        f"{layers} layers, {ranks} ranks x {each} slots, {placement.num_experts} experts and "
        f"{replicas / max(layers, 1):g} replicas a layer"
    )


def _safety_in_words(price: Price | None, lost: int) -> list[str]:
    if price is None:
        return []
    nodes = "any node" if lost == 1 else f"any {lost} nodes"
    return [f"{nodes} may go and every expert keeps a replica; that costs, against the unprotected plan: {price}"]


def _notes(recorded: Recorded, case: Case, costs: plan_inputs.SourcedCosts, why: str) -> tuple[str, ...]:
    """What was read and assumed."""
    topology, (layers, experts) = case.topology, case.statistics.load.shape
    slots = "as many slots as experts" if case.slots is None else f"{case.slots} slots a rank"
    sample = case.statistics.sample
    tokens = 0 if sample is None else sample.shape[1]
    notes = [
        f"{layers} layers x {experts} experts on {topology.num_ranks} ranks of {len(np.unique(topology.node_of))} "
        f"node(s), {slots}; level {case.level}; recorded by {recorded.engine}, {tokens} sampled tokens",
        f"level {case.level}: {why}",
        f"costs: {costs.source}",
        *recorded.notes,
        *plan_inputs.unknown(case.statistics),
    ]
    most = max([case.slots] if isinstance(case.slots, int) else case.slots or [0])
    if most > experts:
        notes.append(f"{most} slots for {experts} experts: {experts} are filled, more would hold an expert twice")
    known = topology.bandwidth[~np.eye(topology.num_ranks, dtype=bool)]
    if len(known) and not np.isfinite(known).all():
        notes.append("links are not all measured: those count as infinitely fast (ray-ep probe measures them)")
    return tuple(notes)


def text(planned: Planned) -> str:
    """For the terminal: notes, the table, the advice."""
    by_name = {c.name: c for c in planned.found}
    old = by_name[planned.now].prediction
    rows = [_row(c, old) for c in planned.found]
    lines = [*planned.notes, "", table(HEAD, rows), LEGEND, "", *planned.words]
    return "\n".join([*lines, f"{planned.numbers}", f"written: {planned.written}"] if planned.written else lines)


def _row(c: Candidate, old: Prediction) -> tuple[str, ...]:
    p = c.prediction
    of_now = p.step_seconds / old.step_seconds if old.step_seconds else 1.0
    moved = ("-", "-", "-")
    if c.moving is not None and not c.moving.replicas and not c.moving.primaries:
        moved = ("0", "0 B", "-")
    elif c.moving is not None:
        steps = pays_back(c.moving.seconds, old.step_seconds - p.step_seconds)
        moved = (
            str(c.moving.replicas),
            in_bytes(c.moving_bytes),
            f"{steps:.3g} steps" if np.isfinite(steps) else "never",
        )
    remote = remote_nodes(c)
    return (
        c.name, in_seconds(p.step_seconds), f"{of_now:.2f}", in_seconds(float(p.compute.sum())),
        "-" if remote is None else in_seconds(float(p.traffic.sum())), f"{p.balancedness:.3f}",
        f"{p.node_balancedness:.3f}", "-" if remote is None else f"{remote:.2f}", *moved,
    )  # fmt: skip


def tree(planned: Planned) -> dict[str, Any]:
    """For --json: SI units."""
    case = planned.case
    by_name = {c.name: c for c in planned.found}
    old = by_name[planned.now].prediction
    return {
        "layers": case.statistics.load.shape[0],
        "experts": case.statistics.load.shape[1],
        "ranks": case.topology.num_ranks,
        "nodes": len(np.unique(case.topology.node_of)),
        "level": case.level,
        "engine": planned.recorded.engine,
        "compared_with": planned.now,
        "placements": [_figures(c, old) for c in planned.found],
        "survive_nodes": case.survive_nodes,
        "survival_price": None if planned.safety is None else asdict(planned.safety),
        "advice": list(planned.words),
        "notes": list(planned.notes),
        "written": planned.written,
        "wrote": planned.numbers,
    }


def _figures(c: Candidate, old: Prediction) -> dict[str, Any]:
    p = c.prediction
    steps = None if c.moving is None else pays_back(c.moving.seconds, old.step_seconds - p.step_seconds)
    remote = remote_nodes(c)
    return {
        "name": c.name,
        "step_seconds": p.step_seconds,
        "compute_seconds": float(p.compute.sum()),
        "traffic_seconds": None if remote is None else float(p.traffic.sum()),
        "balancedness": p.balancedness,
        "node_balancedness": p.node_balancedness,
        "remote_nodes": remote,
        "moved_slots": None if c.moving is None else c.moving.replicas,
        "moved_owners": None if c.moving is None else c.moving.primaries,
        "migration_bytes": c.moving_bytes,
        "migration_seconds": 0.0 if c.moving is None else c.moving.seconds,
        "pays_back_steps": steps if steps is not None and np.isfinite(steps) else None,
    }


def draw(planned: Planned, html: Path | None, plots: Path | None) -> None:
    """Write the page, the heat maps, or both; raises PlacementError where a path cannot be written."""
    from ray_ep.observe.page.plans import heat_maps
    from ray_ep.observe.page.sheet import sheet_page
    from ray_ep.observe.page.svg import heat_svg

    maps = heat_maps(planned.case, planned.found, planned.now)
    try:
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            for heat in maps:
                (plots / f"{heat.name}.svg").write_text(heat_svg(heat), encoding="utf-8")
        if html is not None:
            by_name = {c.name: c for c in planned.found}
            rows = [_row(c, by_name[planned.now].prediction) for c in planned.found]
            words = ("Advice", planned.words)
            page = sheet_page("Placements compared", planned.notes, (HEAD, *rows), LEGEND, words, maps)
            html.write_text(page, encoding="utf-8")
    except OSError as e:
        raise PlacementError(f"{e.filename}: {e.strerror or e}") from None
