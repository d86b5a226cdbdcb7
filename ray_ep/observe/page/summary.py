"""What is said of a run in figures and words on its page: model, headlines, phases, links, configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import yaml

from ray_ep.observe.breakdown import breakdown, in_groups
from ray_ep.observe.state import RunState, masked
from ray_ep.placement.links.groups import contradictions
from ray_ep.placement.links.rows import HEAD, link_rows


def summary(state: RunState, running: bool) -> dict[str, Any]:
    """For the page.

    - model: one line. force: router.force, "" where the router chooses itself.
    - headlines: each label, value, note.
    - phases: each name, seconds, share, colour, group, words, in the order of the stack; breakdown: their groups.
    - links: head and rows of a table, contradictions, nodes; None: not measured.
    - config: YAML without secrets.
    """
    phases, force = breakdown(state), str(state.setting("router.force", "none"))
    config = state.snapshot("run")["run"]["config"]
    return {
        "model": _model(state),
        "force": "" if force == "none" else force,
        "headlines": _headlines(state, running),
        "phases": [
            {"name": p.name, "seconds": p.seconds, "share": p.share, "colour": p.colour, "words": p.words}
            for p in phases
        ],
        "breakdown": in_groups(phases) if phases else "",
        "links": _links(state),
        "config": masked(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)) if config else "",
    }


def _model(state: RunState) -> str:
    """The model in one line, from the configuration and the shape of what was counted."""
    told = state.snapshot("model")["model"]
    path, overrides = state.setting("model.path", ""), state.setting("model.overrides", {})
    over = overrides if isinstance(overrides, dict) and not path else {}  # a checkpoint ignores them
    parts = [
        masked(str(path or told.get("type") or "")),
        f"{over['num_hidden_layers']} layers" if "num_hidden_layers" in over else "",
        f"hidden size {over['hidden_size']}" if "hidden_size" in over else "",
        f"{told['layers']} MoE layers of {told['experts']} experts" if told.get("layers") else "",
        f"top-{told['top_k']}" if told.get("top_k") else "",
        str(told.get("dtype") or ""),
    ]
    return ", ".join(part for part in parts if part)


def _headlines(state: RunState, running: bool) -> list[dict[str, str]]:
    """The figures at the head of the page; those that no step reported are left out."""
    column = state.steps.column
    steps = column("step")
    if not steps.size:
        return []
    last = int(steps[-1])
    exchange, whole = np.nansum(column("exchange_seconds")), np.nansum(column("step_seconds"))
    loss, held_out = column("loss"), column("eval_loss")
    balance, tokens, ranks = (column(c) for c in ("balancedness", "tokens_per_second", "world_size"))
    found = [
        _last("Loss" if running else "Final loss", loss, f"first {loss[0]:.4f}"),
        _last("Held-out loss", held_out[np.isfinite(held_out)], "last evaluation"),
        _median("Tokens/s", tokens, ",.0f", "median of the steps"),
        _median("Balancedness", balance, ".2f", "mean / max rank load, median"),
        _said("Exchange", f"{exchange / whole:.0%}", "of step time") if whole > 0 else None,
        _peak(column("peak_mib")),
        _said("Ranks", f"{ranks[-1]:.0f}", _range(ranks[np.isfinite(ranks)])) if np.isfinite(ranks[-1]) else None,
        _said("Steps", str(last), f"of {state.setting('optim.steps', last)}"),
    ]
    return [h for h in found if h is not None]


def _said(label: str, value: str, note: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _last(label: str, values: np.ndarray, note: str) -> dict[str, str] | None:
    """The last value, also where it is not finite: a run that diverged must not look well."""
    return _said(label, f"{values[-1]:.4f}", note) if values.size else None


def _median(label: str, values: np.ndarray, form: str, note: str) -> dict[str, str] | None:
    known = values[np.isfinite(values)]
    return _said(label, format(float(np.median(known)), form), note) if known.size else None


def _peak(mib: np.ndarray) -> dict[str, str] | None:
    known = mib[np.isfinite(mib) & (mib > 0)]
    if not known.size:
        return None
    peak = float(known.max())  # ranks that started anew began from less
    return _said("Peak memory", f"{peak / 1024:.1f} GiB" if peak >= 1024 else f"{peak:.0f} MiB", "of the largest rank")


def _range(ranks: np.ndarray) -> str:
    low, high = int(np.nanmin(ranks)), int(np.nanmax(ranks))
    return "throughout" if low == high else f"between {low} and {high}"


def _links(state: RunState) -> dict[str, Any] | None:
    topology = state.topology
    if topology is None or not np.isfinite(topology.bandwidth[~np.eye(topology.num_ranks, dtype=bool)]).any():
        return None
    return {
        "head": list(HEAD),
        "rows": [list(row.cells()) for row in link_rows(topology)],
        "contradictions": list(contradictions(topology)),
        "nodes": len(set(topology.node_of.tolist())),
    }
