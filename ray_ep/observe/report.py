"""Writes report.html: one self-contained page about a run, made from its directory alone.

Here the figures are chosen and put into words; state/ reads, figures.py draws, report.html lays out.
Imports jinja2, PyYAML and its siblings; needs neither torch nor Ray, so a page can be made anywhere.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from ray_ep.driver.records import STANDING
from ray_ep.observe import figures
from ray_ep.observe.breakdown import breakdown, in_groups
from ray_ep.observe.routing import strongest_coactivation
from ray_ep.observe.state import RunState, masked
from ray_ep.observe.state.events import NEWEST
from ray_ep.observe.topology import heatmap
from ray_ep.placement.links.groups import contradictions
from ray_ep.placement.links.rows import HEAD, link_rows
from ray_ep.placement.topology import Topology

_MAX_RANKS = 64  # a wider placement table is a wall of numbers


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure at the head of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Experts:
    """Neighbouring experts of one rank, such as "0-7"; a replica stands alone."""

    text: str
    replica: bool


def write_report(run_dir: Path, running: bool = False) -> Path:
    """Write `run_dir`/report.html and return its path; files of the run that are missing leave their section out.

    The page replaces an older one in one move, so a reader never sees half of it. That of a `running` run says so, and
    loads itself again.
    """
    run_dir = Path(run_dir)
    page = _environment().get_template("report.html").render(_content(run_dir, RunState(run_dir), running))
    path = run_dir / "report.html"
    unfinished = path.with_name(".report.html.unfinished")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # half a page on a disk that is full
        raise
    return path


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _content(run_dir: Path, run: RunState, running: bool) -> dict[str, Any]:
    """The names that the template uses."""
    pairs, load = run.load.pairs("coactivation"), run.load.load
    company = None if pairs is None else strongest_coactivation(pairs)
    return {
        "name": run_dir.resolve().name,
        "model": _model(run),
        "force": str(run.setting("router.force", "none")),
        "running": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S") if running else "",
        "headlines": _headlines(run, running),
        "steps": len(run.steps.rows),
        "curves": _curves(run),
        "breakdown": _breakdown(run),
        "load": None if load is None else Markup(figures.expert_load(load)),
        "company": company,
        "company_figure": None if company is None else Markup(figures.coactivation(company.ratio)),
        "placement": _placement(run),
        "exchange": run.exchange,
        "links": _links(run.topology),
        "events": [_event(e) for e in run.events.newest if e["kind"] not in STANDING],
        "events_left_out": max(run.events.total - NEWEST, 0),
        "config": masked(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) if run.config else "",
    }


def _curves(run: RunState) -> list[tuple[str, str, Markup]]:
    """(title, caption, SVG) of each curve that has a point."""
    drawn = [
        ("Loss", "Dotted lines: steps with an event.", figures.loss(run)),
        ("Step time", "One slow step may reach beyond the frame.", figures.step_time(run)),
        ("Throughput", "Over all ranks. Dotted lines: steps with an event.", figures.throughput(run)),
        ("Worst expert load", "Max / mean expert load of the step's worst layer; 1 is even.", figures.worst_load(run)),
    ]
    return [(title, caption, Markup(svg)) for title, caption, svg in drawn if svg]


def _breakdown(run: RunState) -> dict[str, Any] | None:
    """Where a step's time goes; None where no step tells it."""
    phases = breakdown(run)
    if not phases:
        return None
    return {
        "phases": phases,
        "groups": in_groups(phases),
        "seconds": sum(p.seconds for p in phases),
        "figure": Markup(figures.step_bar(phases)),
    }


def _model(run: RunState) -> str:
    """The model in one line, from the configuration and the shape of the statistics."""
    path = run.setting("model.path", "")
    overrides = run.setting("model.overrides", {})
    over = overrides if isinstance(overrides, dict) and not path else {}  # a checkpoint ignores them
    layers, experts = run.load.load.shape if run.load.load is not None else (None, None)
    top_k = over.get("num_experts_per_tok")
    parts = [
        masked(str(path or run.setting("model.type", ""))),
        f"{over['num_hidden_layers']} layers" if "num_hidden_layers" in over else "",
        f"hidden size {over['hidden_size']}" if "hidden_size" in over else "",
        f"{layers} MoE layers of {experts} experts" if layers else "",
        f"top-{top_k}" if top_k else "",
        str(run.setting("model.dtype", "")),
    ]
    return ", ".join(part for part in parts if part)


def _headlines(run: RunState, running: bool) -> list[Headline]:
    """The figures at the head of the page; those that no step reported are left out."""
    if not run.steps.rows:
        return []
    last = int(run.steps.column("step")[-1])
    exchange, whole = np.nansum(run.steps.column("exchange_seconds")), np.nansum(run.steps.column("step_seconds"))
    loss, held_out = run.steps.column("loss"), run.steps.column("eval_loss")
    balance, tokens, ranks = (run.steps.column(c) for c in ("balancedness", "tokens_per_second", "world_size"))
    found = [
        _last("Loss" if running else "Final loss", loss, f"first {loss[0]:.4f}"),
        _last("Held-out loss", held_out[np.isfinite(held_out)], "last evaluation"),
        _median("Tokens/s", tokens, ",.0f", "median of the steps"),
        _median("Balancedness", balance, ".2f", "mean / max rank load, median"),
        Headline("Exchange", f"{exchange / whole:.0%}", "of step time") if whole > 0 else None,
        _peak(run.steps.column("peak_mib")),
        Headline("Ranks", f"{ranks[-1]:.0f}", _range(ranks)) if np.isfinite(ranks[-1]) else None,
        Headline("Steps", str(last), f"of {run.setting('optim.steps', last)}"),
    ]
    return [h for h in found if h is not None]


def _last(label: str, values: np.ndarray, note: str) -> Headline | None:
    """The last value, also where it is not finite: a run that diverged must not look well."""
    return Headline(label, f"{values[-1]:.4f}", note) if values.size else None


def _median(label: str, values: np.ndarray, form: str, note: str) -> Headline | None:
    known = values[np.isfinite(values)]
    return Headline(label, format(float(np.median(known)), form), note) if known.size else None


def _peak(mib: np.ndarray) -> Headline | None:
    known = mib[np.isfinite(mib) & (mib > 0)]
    if not known.size:
        return None
    peak = float(known.max())  # ranks that started anew began from less
    value = f"{peak / 1024:.1f} GiB" if peak >= 1024 else f"{peak:.0f} MiB"
    return Headline("Peak memory", value, "of the largest rank")


def _range(ranks: np.ndarray) -> str:
    low, high = int(np.nanmin(ranks)), int(np.nanmax(ranks))
    return "throughout" if low == high else f"between {low} and {high}"


def _event(event: dict[str, Any]) -> dict[str, Any]:
    step = "" if event["step"] is None else str(event["step"])
    return {**event, "time": event["time"][:19].replace("T", " "), "step": step}


def _placement(run: RunState) -> dict[str, Any] | None:
    """The placement's table, layers x ranks of `Experts`, and its summary; no table beyond 64 ranks."""
    placement = run.placements.newest
    if placement is None or not placement.num_layers:
        return None
    ranks, slots = placement.num_ranks, placement.slots.tolist()
    counts = [Counter(e for rank in layer for e in rank if e >= 0) for layer in slots]
    table = [[_cell(rank, count) for rank in layer] for layer, count in zip(slots, counts, strict=True)]
    return {
        "version": placement.version,
        "layers": placement.num_layers,
        "ranks": ranks,
        "slots": max(len(rank) for layer in slots for rank in layer),
        "replicas": sum(n - 1 for count in counts for n in count.values()),
        "empty": sum(e < 0 for layer in slots for rank in layer for e in rank),
        "table": table if ranks <= _MAX_RANKS else [],
    }


def _links(topology: Topology | None) -> dict[str, Any] | None:
    """The heat map of the measured links, their table, and where they are not what is said of the nodes."""
    if topology is None or not (figure := heatmap(topology)):
        return None
    return {
        "figure": Markup(figure),
        "head": HEAD,
        "rows": [row.cells() for row in link_rows(topology)],
        "contradictions": contradictions(topology),
        "ranks": topology.num_ranks,
        "nodes": len(set(topology.node_of.tolist())),
    }


def _cell(rank: list[int], count: Counter[int]) -> list[Experts]:
    """The experts of one rank in one layer; three or more neighbours without replicas become a range."""
    cell = [Experts(str(e), True) for e in sorted(rank) if count[e] > 1]
    run: list[int] = []
    for expert in [*sorted(e for e in rank if count[e] == 1), None]:
        if run and expert != run[-1] + 1:
            cell += [Experts(f"{run[0]}-{run[-1]}", False)] if len(run) > 2 else [Experts(str(e), False) for e in run]
            run = []
        if expert is not None:
            run.append(expert)
    return cell
