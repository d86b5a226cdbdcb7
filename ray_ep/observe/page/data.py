"""What the page asks for beside the run's state: every placement as what changed, and one layer's pairs and flows.

Pure NumPy over the state. L MoE layers, E experts, R ranks, S slots.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from ray_ep.observe.routing import pair_ratios
from ray_ep.observe.state import RunState
from ray_ep.placement.placement import Placement

MOST_VERSIONS = 300
"""Placements that can be looked at, the newest."""
MOST_NUMBERS = 600_000
"""Slots that those may have changed in all, so that a page stays small; older placements are left out."""
FLOWS = 200
"""Transitions from one layer to the next that are told, the greatest."""
PAIR_BYTES = 4_000_000
"""Of a file, for pairs: layers beyond are left out."""

_REACH = 3.0  # doublings to each side of chance that a packed ratio can hold


def placements(state: RunState, after: int = -1) -> dict[str, Any]:
    """Placements newer than `after`: {layers, experts, kept}, of which placements.js says what is in it.

    Each is told as what changed since the one before; the first, and one whose ranks are others, is told whole.
    """
    numbers = [n for n in state.placements.numbers[-MOST_VERSIONS:] if n > after]
    earlier = state.placements.read(after) if after >= 0 else None
    members = state.placements.members(after) if earlier is not None else ()
    kept: list[dict[str, Any]] = []
    for number in numbers:
        placement = state.placements.read(number)
        if placement is None:
            continue
        here = state.placements.members(number)
        kept.append({"version": number, "members": list(here), **_told(placement, earlier, members == here)})
        earlier, members = placement, here
    if after < 0:
        kept = _bounded(state, kept)
    layers, experts = (0, 0) if earlier is None else (earlier.num_layers, earlier.num_experts)
    return {"layers": layers, "experts": experts, "kept": kept}


def layer(state: RunState, number: int) -> dict[str, Any] | None:
    """One layer: `ratios`, packed (see `packed`), and `flows` [[expert, expert of the next layer, tokens]] with their
    sum `all`; None: neither is known."""
    pairs, flows = state.pairs("coactivation", number), state.pairs("transitions", number)
    found: dict[str, Any] = {}
    if pairs is not None:
        found["ratios"] = packed(pair_ratios(pairs))
    if flows is not None:
        greatest = np.argsort(-flows, axis=None, kind="stable")[:FLOWS]
        rows, columns = np.unravel_index(greatest, flows.shape)
        told = zip(rows.tolist(), columns.tolist(), flows[rows, columns].tolist(), strict=True)
        found |= {"flows": [[a, b, int(n)] for a, b, n in told if n > 0], "all": float(flows.sum())}
    return found or None


def layers(state: RunState) -> dict[str, Any]:
    """Every layer, by its number, as a file holds them; those beyond PAIR_BYTES have no ratios."""
    load = state.load.load
    count, experts = (0, 0) if load is None else load.shape
    room = int(PAIR_BYTES / max(experts * (experts - 1) * 2 / 3, 1))
    found = {}
    for number in range(count):
        told = layer(state, number)
        if told is not None:
            found[str(number)] = {k: v for k, v in told.items() if number < room or k != "ratios"}
    return found


def packed(ratios: np.ndarray) -> str:
    """ratios [E, E], symmetric, as base64 of a byte for each pair a < b, row by row.

    0: not known; else 1 to 255 for 1/8 to 8 by doublings, what is beyond held at the ends.
    """
    upper = ratios[np.triu_indices(len(ratios), k=1)]
    known = np.isfinite(upper)
    doublings = np.log2(np.maximum(np.where(known, upper, 1.0), 2.0**-_REACH))
    held = np.clip((doublings + _REACH) / (2 * _REACH), 0.0, 1.0)
    return base64.b64encode(np.where(known, 1 + np.rint(254 * held), 0).astype(np.uint8).tobytes()).decode()


def _told(placement: Placement, earlier: Placement | None, same_members: bool) -> dict[str, Any]:
    slots, owners = placement.slots, placement.owner
    if earlier is None or not same_members or earlier.slots.shape != slots.shape:
        _, ranks, width = slots.shape
        return {
            "ranks": ranks, "width": width, "slots": slots.reshape(-1).tolist(),
            "primary": owners.reshape(-1).tolist(),
        }  # fmt: skip
    at, owner_at = (np.flatnonzero(a != b) for a, b in ((slots, earlier.slots), (owners, earlier.owner)))
    return {
        "at": at.tolist(), "to": slots.reshape(-1)[at].tolist(),
        "owner_at": owner_at.tolist(), "owner_to": owners.reshape(-1)[owner_at].tolist(),
    }  # fmt: skip


def _bounded(state: RunState, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest that fit into MOST_NUMBERS, the first of them whole."""
    room, first = MOST_NUMBERS, len(kept)
    while first > 0:
        room -= sum(len(value) for value in kept[first - 1].values() if isinstance(value, list))
        if room < 0 and first < len(kept):
            break
        first -= 1
    if first == 0 or "slots" in kept[first]:
        return kept[first:]
    placement = state.placements.read(kept[first]["version"])
    if placement is None:
        return kept[first + 1 :]
    head = {key: kept[first][key] for key in ("version", "members")}
    return [{**head, **_told(placement, None, False)}, *kept[first + 1 :]]
