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


class History:
    """Every placement of a run, told as what changed since the one before; each is read once, when somebody asks.

    The first, and one whose ranks are others, is told whole. Of very many the newest are kept. placements.js says what
    is in an entry.
    """

    def __init__(self, state: RunState):
        self._state = state
        self._kept: list[dict[str, Any]] = []
        self._seen = -1  # the newest version that was looked at
        self._last: Placement | None = None

    def after(self, version: int = -1) -> dict[str, Any]:
        """{layers, experts, kept}: entries of placements newer than `version`; all of them, if that is none of them."""
        self._look()
        numbers = [entry["version"] for entry in self._kept]
        first = numbers.index(version) + 1 if version in numbers else 0
        last = self._last
        layers, experts = (0, 0) if last is None else (last.num_layers, last.num_experts)
        return {"layers": layers, "experts": experts, "kept": self._kept[first:]}

    def _look(self) -> None:
        numbers = self._state.placements.numbers[-MOST_VERSIONS:]
        if self._seen not in numbers:  # the run began anew, or this does
            self._kept, self._last, self._seen = [], None, -1
        for number in (n for n in numbers if n > self._seen):
            self._seen = number
            placement = self._state.placements.read(number)
            if placement is None:
                continue
            members = list(self._state.placements.members(number))
            same = bool(self._kept) and self._kept[-1]["members"] == members
            earlier = self._last if same else None
            self._kept.append({"version": number, "members": members, **_told(placement, earlier)})
            self._last = placement
        self._forget()

    def _forget(self) -> None:
        """Of more than MOST_NUMBERS in all, or than MOST_VERSIONS, leave out the oldest; the first left is whole."""
        sizes = [sum(len(value) for value in entry.values() if isinstance(value, list)) for entry in self._kept]
        first = max(len(sizes) - MOST_VERSIONS, 0)
        while first < len(sizes) - 1 and sum(sizes[first:]) > MOST_NUMBERS:
            first += 1
        if not first:
            return
        self._kept = self._kept[first:]
        head = self._kept[0]
        placement = None if "slots" in head else self._state.placements.read(head["version"])
        if placement is not None:
            self._kept[0] = {"version": head["version"], "members": head["members"], **_told(placement, None)}


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
    newest = state.placements.newest
    count, experts = (0, 0) if newest is None else (newest.num_layers, newest.num_experts)
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


def _told(placement: Placement, earlier: Placement | None) -> dict[str, Any]:
    slots, owners = placement.slots, placement.owner
    if earlier is None or earlier.slots.shape != slots.shape:
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
