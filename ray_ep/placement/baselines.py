"""Placements that need no statistics: contiguous (what other systems fix at start-up) and random. Pure NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.placement import Ints, Placement


def slots_needed(experts: int, ranks: int) -> int:
    """The fewest slots a rank needs so that every expert has one."""
    return -(-experts // ranks)


def contiguous(layers: int, experts: int, ranks: int, slots_per_rank: int | Sequence[int] | None = None) -> Placement:
    """Experts in order, an even share a rank; slots left over hold replicas of the next ranks' experts.

    Args:
        slots_per_rank: one number, or one per rank; None: just enough.

    Raises:
        PlacementError: fewer slots than experts.
    """
    order = np.tile(np.arange(experts, dtype=np.int64), (layers, 1))
    return _fill(order, ranks, slots_per_rank)


def random(
    layers: int, experts: int, ranks: int, slots_per_rank: int | Sequence[int] | None = None, seed: int = 0
) -> Placement:
    """Like `contiguous`, over a random order of the experts of each layer (a function of `seed`)."""
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(experts) for _ in range(layers)]) if layers else np.zeros((0, experts), np.int64)
    return _fill(order.astype(np.int64), ranks, slots_per_rank)


def _fill(order: Ints, ranks: int, slots_per_rank: int | Sequence[int] | None) -> Placement:
    """Deal each layer's `order` [L, E] out to the ranks, then fill what is left with replicas, first to last."""
    layers, experts = order.shape
    room = room_of_ranks(experts, ranks, slots_per_rank)
    share = _even_shares(experts, room)
    slots = np.full((layers, ranks, max(room)), -1, np.int64)
    starts = np.concatenate([[0], np.cumsum(share)])
    for rank in range(ranks):
        own = order[:, starts[rank] : starts[rank + 1]]
        spare = min(room[rank], experts) - own.shape[1]
        others = np.concatenate([order[:, starts[rank + 1] :], order[:, : starts[rank]]], axis=1)
        slots[:, rank, : own.shape[1]] = own
        slots[:, rank, own.shape[1] : own.shape[1] + spare] = others[:, :spare]
    primary = np.empty((layers, experts), np.int64)
    np.put_along_axis(primary, order, np.repeat(np.arange(ranks), share)[None].repeat(layers, 0), 1)
    return Placement(slots, experts, primary=primary)


def room_of_ranks(experts: int, ranks: int, slots_per_rank: int | Sequence[int] | None) -> list[int]:
    """Slots of each rank; raises PlacementError where they do not fit the ranks or hold too few experts."""
    if slots_per_rank is None:
        slots_per_rank = slots_needed(experts, ranks)
    room = [slots_per_rank] * ranks if isinstance(slots_per_rank, int) else [int(s) for s in slots_per_rank]
    if len(room) != ranks:
        raise PlacementError(f"slots_per_rank has {len(room)} entries for {ranks} ranks")
    if sum(min(s, experts) for s in room) < experts or min(room) < 0:
        raise PlacementError(
            f"slots_per_rank={slots_per_rank} on {ranks} ranks gives {sum(room)} slots for {experts} experts: "
            f"at least {slots_needed(experts, ranks)} a rank are needed"
        )
    return room


def _even_shares(experts: int, room: list[int]) -> list[int]:
    """How many experts each rank owns: as even as the slots allow, earlier ranks first."""
    share = [0] * len(room)
    for _ in range(experts):
        free = [r for r in range(len(room)) if share[r] < room[r]]
        share[min(free, key=lambda r: (share[r], r))] += 1
    return share
