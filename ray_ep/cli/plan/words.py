"""What `ray-ep plan` says of the placements that it compared, a sentence each: what changes, and what that costs.

Whether to move is not said here but by placement.planner.verdict; every figure is the cost model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_ep.placement.compare import Candidate


def sentences(found: Sequence[Candidate], now: str, level: str, expert_bytes: float | None) -> list[str]:
    """What each placement but `now` changes and costs.

    Args:
        level: whose balancedness counts, rank or node.
        expert_bytes: of one expert's weights in one layer; None: not known, costs are given in slots.
    """
    old = next(c for c in found if c.name == now)
    return [_sentence(old, c, level, expert_bytes) for c in found if c is not old]


def assumed(found: Sequence[Candidate], nearest: bool) -> list[str]:
    """What predictions take for granted, where that makes a difference: where tokens go, and that visits are known.

    Args:
        nearest: the engine sends a token to the nearest replica; False: to any.
    """
    words = []
    if any(remote_nodes(c) is None for c in found):
        words.append("Remote nodes are unknown: only counts were recorded (SGLang: record in mode per_token).")
    if any(_extra_slots(c)[0] for c in found):
        other = "" if nearest else "; this engine may send it to any replica, near or far, and then visits more nodes"
        words.append(f"Assumed: a token goes to its nearest replica{other}.")
    return words


def remote_nodes(c: Candidate) -> float | None:
    """Other nodes that a token visits, mean over layers; None where that is not known."""
    visits = c.prediction.remote_nodes
    mean = float(np.mean(visits)) if len(visits) else 0.0
    return None if np.isnan(mean) else mean


def _sentence(old: Candidate, new: Candidate, level: str, expert_bytes: float | None) -> str:
    name = "node_balancedness" if level == "node" else "balancedness"
    before, after = (getattr(c.prediction, name) for c in (old, new))
    parts = [
        f"the busiest {level} has {1 / after:.2f}x the mean load (now {1 / before:.2f}x), so expert compute takes "
        f"{_change(before, after)}"
    ]
    was, is_ = remote_nodes(old), remote_nodes(new)
    if was is not None and is_ is not None:
        change = f", {_change(is_, was)} on the slow links" if was else ""
        parts.append(f"a token visits {is_:.2f} other nodes a layer (now {was:.2f}{change})")
    (more, fullest), (had, fullest_had) = _extra_slots(new), _extra_slots(old)
    moved = 0 if new.moving is None else new.moving.replicas
    cost = (
        f"costs {_amount(more - had, expert_bytes)} more memory in all, {_amount(fullest - fullest_had, expert_bytes)} "
        f"on the fullest rank, and {_amount(moved, expert_bytes)} moved once"
    )
    return f"{new.name}: {'; '.join(parts)}; {cost}."


def _extra_slots(c: Candidate) -> tuple[int, int]:
    """Filled slots beyond one an expert, over all layers; and slots of the fullest rank beyond an even share."""
    layers, experts, ranks = c.placement.num_layers, c.placement.num_experts, c.placement.num_ranks
    filled = (c.placement.slots >= 0).sum((0, 2))  # [R]
    return int(filled.sum()) - layers * experts, int(filled.max()) - layers * experts // ranks


def _change(a: float, b: float) -> str:
    """How much more or less `a` is than `b`."""
    ratio = 1.0 if a == b else a / max(b, 1e-12)
    return "as much" if abs(ratio - 1) < 0.005 else f"{abs(1 - ratio):.0%} {'less' if ratio < 1 else 'more'}"


def _amount(slots: int, expert_bytes: float | None) -> str:
    if expert_bytes is None:
        return f"{slots} slots"
    size = slots * expert_bytes
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if abs(size) >= s / 10 or not size), ("kB", 1e3))
    return f"{size / scale:.2f} {unit}"
