"""Replicas for the slots that a plan left empty: an engine's file has none, and the memory of a slot is there anyway.

A search leaves a slot empty where every expert that it would put there is on that rank already, or where a replica
gains nothing. Here each such slot gets the replica after which a step is predicted to be shortest, ranks to be evenest.
Where one that takes its part of the tokens would make a step longer, it takes fewer, or its own ranks' alone (share 0).
Pure NumPy. E experts, R ranks, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_ep.placement.placement import Floats, Ints, Placement
from ray_ep.placement.planner import replan
from ray_ep.placement.planner.layer import Traffic
from ray_ep.placement.planner.problem import Problem

FEW_EMPTY = 24
"""Empty slots of a layer. Up to this many are filled one by one; of more, all are filled by load at once."""
TRIED = 3
"""Experts, and ranks. Of each kind (hot, cold, on the busiest rank) this many are tried for a slot."""
SHARE_ROUNDS = 16
"""Rounds. The shares of the busiest rank's replicas are lessened at most this often."""
SAME_TIME = 1e-9
"""Share of a time. Two times that differ by less count as equal."""


@dataclass(frozen=True, slots=True)
class FilledLayer:
    """slots [R, S] of a layer and how much of its expert's far tokens each takes, shares [R, S]."""

    slots: Ints
    shares: Floats

    def put(self, rank: int, expert: int, share: float) -> FilledLayer:
        """With the expert in the first empty slot of the rank."""
        slots, shares = self.slots.copy(), self.shares.copy()
        at = rank, int(np.argmax(slots[rank] < 0))
        slots[at], shares[at] = expert, share
        return FilledLayer(slots, shares)

    def put_by_way_of(self, other: int, goes: int, rank: int, comes: int, share: float) -> FilledLayer:
        """With a replica of `goes` on rank `other` in place of `comes`, which moves to an empty slot of `rank`."""
        slots, shares = self.slots.copy(), self.shares.copy()
        place, home = int(np.argmax(slots[other] == comes)), int(np.argmax(slots[rank] == goes))
        to = int(np.argmax(slots[rank] < 0))
        slots[rank, to], shares[rank, to] = comes, shares[other, place]
        slots[other, place], shares[other, place] = goes, shares[rank, home] * share
        shares[rank, home] *= 1.0 if share == 1.0 else 1.0 - share
        return FilledLayer(slots, shares)


def empty_slots(problem: Problem, slots: Ints) -> Ints:
    """[..., R] slots that could hold one more expert, of slots [..., R, S]; a rank has no use for an expert twice."""
    return np.asarray(np.maximum(problem.room - (slots >= 0).sum(-1), 0), np.int64)


def fill_layer(problem: Problem, traffic: Traffic, layer: FilledLayer, free: bool, safe: bool = False) -> FilledLayer:
    """The layer with every slot filled.

    Args:
        free: experts may change places for it where that makes a step shorter; else only where a step would be longer.
        safe: they never may, for the nodes that an expert is on outlive the loss of others.
    """
    left, start = int(empty_slots(problem, layer.slots).sum()), layer
    found = [_by_load(problem, traffic.load, layer, *how) for how in ((False, 1.0), (False, 0.0), (True, 0.0))]
    if left <= FEW_EMPTY:
        for _ in range(left):
            layer = _one_more(problem, traffic, layer, free, safe)
        found.append(layer)
    best = min(found, key=lambda x: _value(problem, traffic, x))
    return _relieved(problem, traffic, best) if slower(problem, traffic, best, start) else best


def slower(problem: Problem, traffic: Traffic, layer: FilledLayer, before: FilledLayer) -> bool:
    """Whether a step is predicted to be longer than it was."""
    return _value(problem, traffic, layer)[0] > _value(problem, traffic, before)[0] * (1 + SAME_TIME)


def _value(problem: Problem, traffic: Traffic, layer: FilledLayer) -> tuple[float, float]:
    """Predicted seconds, and how uneven ranks are: the first counts, the other where that is the same."""
    seconds, load = replan.layer_figures(problem, traffic, layer.slots, layer.shares)
    return float(f"{seconds:.9g}"), float(np.square(load / problem.speed).sum())


def _relieved(problem: Problem, traffic: Traffic, layer: FilledLayer) -> FilledLayer:
    """The layer with less for the busiest rank's replicas and more for those elsewhere, while that gains."""
    value = _value(problem, traffic, layer)
    for _ in range(SHARE_ROUNDS):
        _, load = replan.layer_figures(problem, traffic, layer.slots, layer.shares)
        busiest = int(np.argmax(load / problem.speed))
        filled = layer.slots >= 0
        total = np.bincount(layer.slots[filled], layer.shares[filled], problem.experts)
        found = [(value, layer)]
        for slot, expert in enumerate(layer.slots[busiest]):
            mine = layer.shares[busiest, slot]
            if expert >= 0 and 0 < mine < total[expert]:  # others that take some are left
                for part in (0.0, 0.5, 0.8, 0.95):
                    shares = layer.shares.copy()
                    shares[busiest, slot] *= part
                    other = FilledLayer(layer.slots, shares)
                    found.append((_value(problem, traffic, other), other))
        best = min(found, key=lambda x: x[0])
        if best[1] is layer:
            return layer
        value, layer = best
    return layer


def _by_load(problem: Problem, load: Floats, layer: FilledLayer, coldest: bool, share: float) -> FilledLayer:
    """All empty slots at once: the experts with most load a replica (or the coldest) to the rank with most room."""
    slots, shares = layer.slots.copy(), layer.shares.copy()
    free = empty_slots(problem, slots)
    count = np.bincount(slots[slots >= 0], minlength=problem.experts)
    while free.any():
        each = load / count
        order = np.argsort(each if coldest else -each, kind="stable")
        rank = int(np.argmax(free))
        expert = int(order[~np.isin(order, slots[rank])][0])
        at = rank, int(np.argmax(slots[rank] < 0))
        slots[at], shares[at] = expert, share
        count[expert] += 1
        free[rank] -= 1
    return FilledLayer(slots, shares)


def _one_more(problem: Problem, traffic: Traffic, layer: FilledLayer, free: bool, safe: bool) -> FilledLayer:
    """The layer with one more slot filled, on the rank that has least to do of those with room."""
    seconds, load = replan.layer_figures(problem, traffic, layer.slots, layer.shares)
    each = load / problem.speed
    rank = int(np.argmin(np.where(empty_slots(problem, layer.slots) > 0, each, np.inf)))
    found = [(_value(problem, traffic, x), x) for x in _replicas(traffic.load, layer, rank, int(np.argmax(each)))]
    best = min(found, key=lambda x: x[0])
    if not safe and (free or best[0][0] > seconds * (1 + SAME_TIME)):
        others = _exchanges(traffic.load, layer, rank, each)
        best = min([best, *((_value(problem, traffic, x), x) for x in others)], key=lambda x: x[0])
    return best[1]


def _replicas(load: Floats, layer: FilledLayer, rank: int, busiest: int) -> Iterator[FilledLayer]:
    """A replica on `rank` of an expert that is hot, cold, or on the busiest rank."""
    each = load / np.maximum(np.bincount(layer.slots[layer.slots >= 0], minlength=len(load)), 1)
    others = np.setdiff1d(np.arange(len(load)), layer.slots[rank])
    by_load = others[np.argsort(-each[others], kind="stable")]
    there = by_load[np.isin(by_load, layer.slots[busiest])]
    for expert in dict.fromkeys([*by_load[:TRIED], *there[:TRIED], *by_load[-TRIED:]]):
        for share in (1.0, 0.0):
            yield layer.put(rank, int(expert), share)


def _exchanges(load: Floats, layer: FilledLayer, rank: int, busy: Floats) -> Iterator[FilledLayer]:
    """A replica of one of the rank's own experts on another rank, one of whose coldest comes to the rank instead."""
    each = load / np.maximum(np.bincount(layer.slots[layer.slots >= 0], minlength=len(load)), 1)
    mine = layer.slots[rank][layer.slots[rank] >= 0]
    hot = mine[np.argsort(-each[mine], kind="stable")][:TRIED]
    for other in np.argsort(busy, kind="stable")[: TRIED + 1]:
        theirs = np.setdiff1d(layer.slots[other][layer.slots[other] >= 0], mine)
        cold = theirs[np.argsort(each[theirs], kind="stable")][:TRIED]
        for goes in np.setdiff1d(hot, layer.slots[other]):
            for comes in cold:
                for share in (1.0, 0.5, 0.75):
                    yield layer.put_by_way_of(int(other), int(goes), rank, int(comes), share)


def shares_table(current: Placement, layer: int) -> Floats | None:
    """[E, R] share of each replica of a layer of the current placement, 1 where it has none; None: all even."""
    if current.shares is None or (current.shares[layer] == 1).all():
        return None
    table = np.ones((current.num_experts + 1, current.num_ranks))
    table[current.slots[layer], np.arange(current.num_ranks)[:, None]] = current.shares[layer]
    return table[:-1]


def shares_kept(current: Placement, slots: Ints) -> Floats | None:
    """[L, R, S] shares that the current placement gives what it has, 1 for what is new; None: even, as there."""
    if current.shares is None:
        return None
    kept = np.ones(slots.shape)
    ranks = np.broadcast_to(np.arange(slots.shape[1])[:, None], slots.shape[1:])
    for i, row in enumerate(slots):
        table = shares_table(current, i)
        if table is not None:
            kept[i] = np.where(row < 0, 1.0, table[row, ranks])
    return None if (kept == 1).all() else kept


def with_layers_of(current: Placement, new: Placement, kept: npt.NDArray[np.bool_]) -> Placement:
    """The new placement with the `kept` [L] layers of the current one."""
    layers, ranks = new.slots.shape[:2]
    width = max(current.slots.shape[2], new.slots.shape[2])
    slots, shares = np.full((layers, ranks, width), -1, np.int64), np.ones((layers, ranks, width))
    for p, mine in ((current, kept), (new, ~kept)):
        slots[mine, :, : p.slots.shape[2]] = p.slots[mine]
        shares[mine, :, : p.slots.shape[2]] = 1.0 if p.shares is None else p.shares[mine]
    owner = np.where(kept[:, None], current.owner, new.owner)
    return Placement(slots, new.num_experts, new.version, owner, None if (shares == 1).all() else shares)
