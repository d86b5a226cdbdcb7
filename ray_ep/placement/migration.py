"""What a change of placement moves, and in which rounds: pure, so that every rank computes the same and nobody asks.

Moving the bytes is ray_ep.moe.migrate's task, pricing them cost.py's. L MoE layers, E experts, R ranks, S slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.placement import Floats, Placement


@dataclass(frozen=True, slots=True)
class Move:
    """One expert of one layer goes from one rank to another.

    Args:
        weights: the target holds no replica yet: the compute weights travel.
        state: the target becomes the primary: master weights and optimizer state travel, from the primary until now.
    """

    layer: int
    expert: int
    source: int
    target: int
    weights: bool
    state: bool


@dataclass(frozen=True, slots=True)
class MovePart:
    """Bytes start to stop of a move's payload; `move` is its number in the list of moves."""

    move: int
    start: int
    stop: int


def moves(old: Placement, new: Placement, distance: npt.ArrayLike | None = None) -> list[Move]:
    """The difference between two placements, by layer and expert; what stays on its rank is not in it.

    A new primary gets all from the old one. A new replica gets weights from the nearest rank that has them in `old`; of
    equally near ones from the one that has sent fewest so far, then the lowest.

    Args:
        distance: [R, R] how far the second rank is from the first, in any unit; None: all equally far.

    Raises:
        PlacementError: the two are not of one model on one set of ranks.
    """
    if (old.num_layers, old.num_experts, old.num_ranks) != (new.num_layers, new.num_experts, new.num_ranks):
        sizes = [f"{p.num_layers} layers x {p.num_experts} experts on {p.num_ranks} ranks" for p in (old, new)]
        raise PlacementError(
            f"the two placements are not of one model on one set of ranks: from {sizes[0]} to {sizes[1]}; between "
            "memberships move from `old.among(origin)`"
        )
    ranks = new.num_ranks
    far = np.zeros((ranks, ranks)) if distance is None else np.asarray(distance, np.float64)
    if far.shape != (ranks, ranks):
        raise PlacementError(f"distance has shape {far.shape}: expected [{ranks}, {ranks}]")
    found: list[Move] = []
    sent = np.zeros(ranks, np.int64)
    for layer in range(new.num_layers):
        before = held(old, layer)
        arrives = held(new, layer) & ~before
        changed = old.owner[layer] != new.owner[layer]
        for e in np.nonzero(arrives.any(1) | changed)[0].tolist():
            target = int(new.owner[layer, e])
            if changed[e]:
                source = int(old.owner[layer, e])
                found.append(Move(layer, e, source, target, bool(arrives[e, target]), True))
                arrives[e, target] = False
                sent[source] += 1
            for r in np.nonzero(arrives[e])[0].tolist():
                source = _nearest(np.nonzero(before[e])[0], far[:, r], sent)
                found.append(Move(layer, e, source, r, True, False))
                sent[source] += 1
    return found


def move_rounds(moves: Sequence[Move], sizes: Sequence[int], ranks: int, buffer_bytes: int) -> list[list[MovePart]]:
    """Split moves into exchanges in which no rank sends or receives more than `buffer_bytes`.

    Large payloads are cut. Links of the busiest ranks come first, and no link of a round waits while both its ends have
    room, so there are at most about twice as many rounds as the busiest rank's bytes need.

    Args:
        sizes: bytes of each move's payload.

    Returns:
        Rounds of parts; the parts of a move are in order, none is empty.

    Raises:
        PlacementError: buffer_bytes is less than 1.
    """
    if buffer_bytes < 1:
        raise PlacementError(f"buffer_bytes={buffer_bytes}: expected at least 1")
    left = np.zeros((ranks, ranks), np.int64)  # bytes still to go on each link
    waiting: dict[tuple[int, int], deque[MovePart]] = {}
    for i, (move, size) in enumerate(zip(moves, sizes, strict=True)):
        if size:
            left[move.source, move.target] += size
            waiting.setdefault((move.source, move.target), deque()).append(MovePart(i, 0, size))
    out: list[list[MovePart]] = []
    while left.any():
        source, target = np.nonzero(left)
        busiest = np.maximum(left.sum(1)[source], left.sum(0)[target])
        order = np.lexsort((target, source, -left[source, target], -busiest))
        room_out, room_in = [buffer_bytes] * ranks, [buffer_bytes] * ranks
        parts: list[MovePart] = []
        for s, t in zip(source[order].tolist(), target[order].tolist(), strict=True):
            if not (room := min(room_out[s], room_in[t])):
                continue
            taken = _take(waiting[s, t], room)
            size = sum(p.stop - p.start for p in taken)
            room_out[s] -= size
            room_in[t] -= size
            left[s, t] -= size
            parts += taken
        out.append(parts)
    return out


def held(placement: Placement, layer: int) -> npt.NDArray[np.bool_]:
    """[E, R] whether a rank has a slot with the expert."""
    out = np.zeros((placement.num_experts + 1, placement.num_ranks), bool)
    out[placement.slots[layer], np.arange(placement.num_ranks)[:, None]] = True  # empty slots fill the extra row
    return out[:-1]


def _nearest(hosts: npt.NDArray[np.int64], far: Floats, sent: npt.NDArray[np.int64]) -> int:
    return int(hosts[np.lexsort((hosts, sent[hosts], far[hosts]))[0]])


def _take(queue: deque[MovePart], room: int) -> list[MovePart]:
    """Up to `room` bytes from the head of a queue, the last part cut to fit."""
    taken: list[MovePart] = []
    while queue and room:
        part = queue.popleft()
        cut = min(part.stop, part.start + room)
        taken.append(MovePart(part.move, part.start, cut))
        room -= cut - part.start
        if cut < part.stop:
            queue.appendleft(MovePart(part.move, cut, part.stop))
    return taken
