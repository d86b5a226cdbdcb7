"""What `ray-ep simulate` does with its arguments: read, predict; and its answer as text and as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_ep.cli.plan import inputs as plan_inputs
from ray_ep.cli.simulate import inputs as simulate_inputs
from ray_ep.cli.simulate.inputs import Clusters
from ray_ep.cli.simulate.snapshots import snapshots_of, words
from ray_ep.cli.table import table
from ray_ep.cli.units import in_bytes, in_seconds
from ray_ep.errors import BadInput, PlacementError
from ray_ep.observe.state import RunState
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.engines.records import Recorded
from ray_ep.placement.whatif.answer import Option, answer
from ray_ep.placement.whatif.simulate import PLANNED_SLOTS, simulate

HEAD = (
    "cluster", "slots", "placement", "step", "compute", "traffic", "ranks", "nodes", "remote", "across", "memory",
    "snapshots", "tokens/s", "a GPU",
)  # fmt: skip
"""Heads of the table's columns."""

LEGEND = (
    "ranks, nodes: balancedness, mean / max load (1 is even); remote: other nodes that a token visits a layer; across: "
    "what a rank's tokens send to other nodes in a step, both ways; memory: of the fullest rank, for experts; "
    "snapshots: host memory that they take of the rank that holds most"
)
"""What the table's columns mean, printed below it."""

LINKS_IN_A_MINUTE = 58 * 4096**2
"""Links, summed over rows and layers, that are all predicted: DeepSeek-V3 once on 4,096 ranks, about half a minute."""
LEAST_LAYERS = 4
"""Not fewer layers than these stand for all."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """The rows, the sentence that answers, and what was read and assumed."""

    options: tuple[Option, ...]
    answer: str
    notes: tuple[str, ...]


def simulated(path: Path | None, options: Mapping[str, Any]) -> Simulated:
    """Read what the options name and predict every row.

    Raises:
        BadInput: something given is wrong.
    """
    placements = simulate_inputs.placements(options["placements"])
    recorded = simulate_inputs.routing(path, options["synthetic"], options["experts"], options["routed"])
    run = None if path is None else plan_inputs.run_of(path)
    statistics = recorded.statistics
    clusters = simulate_inputs.clusters(options, run, statistics.load.shape[1])
    if options["tokens"] and any(c.startswith("tokens_per_rank=") for c in options["costs"]):
        raise BadInput("--tokens and --cost tokens_per_rank: give one of them")
    level, why = plan_inputs.read_level(options["level"], run, recorded.engine in ("ray_ep", "synthetic"))
    most = options["layers"] or affordable_layers(clusters, len(statistics.load), len(placements))
    snapshots = snapshots_of(run)
    rows = []
    for kind, cluster in clusters.found:
        costs, source = _costs(options, run, recorded, cluster.ranks)
        found = simulate(cluster, statistics, placements, costs, level, options["seed"], most, snapshots)
        rows += [Option(kind, row) for row in found]
    notes = [*_notes(recorded, rows, level, most, placements), f"level {level}: {why}", f"costs: {source}"]
    notes.append(words(snapshots, costs.optimizer_bytes))
    notes += [*plan_inputs.unknown(statistics), *clusters.notes]
    said = answer(rows) if statistics.tells_visits else f"Of compute alone, whatever links take: {answer(rows)}"
    return Simulated(tuple(rows), said, tuple(notes))


def affordable_layers(clusters: Clusters, layers: int, placements: int) -> int:
    """How many layers can be predicted, on all clusters together, in about a minute."""
    links = placements * sum(c.ranks**2 for _, c in clusters.found)
    return min(layers, max(LEAST_LAYERS, LINKS_IN_A_MINUTE // links))


def _costs(options: Mapping[str, Any], run: RunState | None, recorded: Recorded, ranks: int) -> tuple[StepCosts, str]:
    costs = plan_inputs.read_costs(options["costs"], run, recorded, ranks, None)
    if not options["tokens"]:
        return costs.figures, costs.source
    share = max(1, round(options["tokens"] / ranks))
    return replace(costs.figures, tokens_per_rank=share), f"{costs.source}; {options['tokens']} tokens a step in all"


def _notes(recorded: Recorded, rows: Sequence[Option], level: str, most: int, placements: Sequence[str]) -> list[str]:
    layers, experts = recorded.statistics.load.shape
    notes = [f"{layers} layers x {experts} experts; level {level}", *recorded.notes]
    if most < layers:
        notes.append(f"{most} of the {layers} layers, evenly spaced, are predicted and stand for all (--layers)")
    if "plan" in placements and any(o.row.placement == "load_only" for o in rows) and "load_only" not in placements:
        notes.append(
            f"load-only: clusters of more than {PLANNED_SLOTS} slots a layer are too large for the planner's search: "
            "balanced by load alone"
        )
    return notes


def text(found: Simulated) -> str:
    """For the terminal: notes, the table, the answer."""
    priced = _priced(found)
    rows = [_cells(o, priced) for o in found.options]
    return "\n".join([*found.notes, "", table(_head(priced), rows), LEGEND, "", found.answer])


def lines(found: Simulated) -> list[str]:
    """One JSON document a row in SI units, and one with the answer and the notes."""
    last = {"answer": found.answer, "notes": list(found.notes)}
    return [json.dumps(x) for x in (*map(_figures, found.options), last)]


def draw(found: Simulated, html: Path) -> None:
    """Write the page; raises PlacementError where it cannot be written."""
    from ray_ep.observe.page.plans import growth
    from ray_ep.observe.page.sheet import sheet_page

    named: dict[str, list[tuple[int, float]]] = {}
    for o in found.options:
        kind = "" if o.gpu is None else f"{o.gpu.name}, "
        slots = o.row.cluster.slots_per_rank
        many = "just enough slots" if slots is None else f"{slots} slots"
        name = f"{kind}{many}, {o.row.placement.replace('_', '-')}"
        named.setdefault(name, []).append((o.row.cluster.ranks, o.tokens_per_gpu))
    priced = _priced(found)
    table_rows = [_head(priced), *(_cells(o, priced) for o in found.options)]
    words = ("Answer", [found.answer])
    try:
        page = sheet_page("Clusters compared", found.notes, table_rows, LEGEND, words, [growth(named)])
        html.write_text(page, encoding="utf-8")
    except OSError as e:
        raise PlacementError(f"{e.filename}: {e.strerror or e}") from None


def _head(priced: bool) -> tuple[str, ...]:
    return (*HEAD, "for 1") if priced else HEAD


def _priced(found: Simulated) -> bool:
    return any(o.tokens_per_price is not None for o in found.options)


def _cells(o: Option, priced: bool) -> tuple[str, ...]:
    r = o.row
    per_node = r.cluster.ranks / r.cluster.nodes
    kind = "" if o.gpu is None else f" {o.gpu.name}"
    unknown = math.isnan(r.remote_nodes)
    cells = (
        f"{r.cluster.nodes} x {per_node:g}{kind}", str(r.slots_per_rank), r.placement.replace("_", "-"),
        in_seconds(r.step_seconds), in_seconds(r.compute_seconds),
        "-" if unknown else in_seconds(r.traffic_seconds), f"{r.balancedness:.3f}", f"{r.node_balancedness:.3f}",
        "-" if unknown else f"{r.remote_nodes:.2f}", "-" if unknown else in_bytes(r.bytes_across),
        in_bytes(r.memory_bytes) + ("" if o.fits else " (!)"),
        in_bytes(r.snapshot_bytes) if r.snapshot_bytes else "-", f"{r.tokens_per_second:,.0f}",
        f"{o.tokens_per_gpu:,.0f}",
    )  # fmt: skip
    price = o.tokens_per_price
    return (*cells, "-" if price is None else f"{price:,.0f}") if priced else cells


def _figures(o: Option) -> dict[str, Any]:
    r = o.row
    unknown = math.isnan(r.remote_nodes)
    return {
        "gpu": None if o.gpu is None else o.gpu.name,
        "nodes": r.cluster.nodes,
        "ranks": r.cluster.ranks,
        "slots_per_rank": r.slots_per_rank,
        "tokens_per_rank": r.tokens_per_rank,
        "placement": r.placement.replace("_", "-"),
        "step_seconds": r.step_seconds,
        "compute_seconds": r.compute_seconds,
        "traffic_seconds": None if unknown else r.traffic_seconds,
        "balancedness": r.balancedness,
        "node_balancedness": r.node_balancedness,
        "remote_nodes": None if unknown else r.remote_nodes,
        "remote_ranks": None if unknown else r.remote_ranks,
        "bytes_across": None if unknown else r.bytes_across,
        "bytes_inside": None if unknown else r.bytes_inside,
        "memory_bytes": r.memory_bytes,
        "snapshot_bytes": r.snapshot_bytes,
        "fits": o.fits,
        "tokens_per_second": r.tokens_per_second,
        "tokens_per_gpu": o.tokens_per_gpu,
        "tokens_per_price": o.tokens_per_price,
    }
