"""The planner: a placement that makes the predicted step short, and changes little of the one that is there.

Layers are independent (a token goes home after each), so they are planned in parallel, in threads: the kernels hold no
GIL. With a current placement every layer has three answers: stay, improve it swap by swap, or plan it anew.
L layers, E experts, R ranks, S slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.baselines import contiguous
from ray_ep.placement.cost.dispatch import deal, play
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.link_time import busiest
from ray_ep.placement.cost.predict import check_fit, predict
from ray_ep.placement.cost.sets import token_sets
from ray_ep.placement.placement import Ints, Placement
from ray_ep.placement.planner import by_time, fill, packing, relief, small, survive, swaps
from ray_ep.placement.planner.layer import Traffic
from ray_ep.placement.planner.problem import Problem
from ray_ep.placement.planner.replan import (
    SETTLE,
    WORTH,
    LayerChange,
    best_change,
    fresh_slots,
    layer_seconds,
    pays,
    settled,
)
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology

T = TypeVar("T")

CLEAR = 0.9
"""Share of the time that contiguous takes. A plan that a rough look finds below it is not compared exactly."""
SURE = 2048
"""Sampled tokens. With this many a rough look is right to a few percent."""


def plan(
    statistics: RoutingStatistics,
    topology: Topology,
    slots_per_rank: int | Sequence[int] | None = None,
    current: Placement | None = None,
    horizon_steps: float = 1000,
    level: str = "node",
    seed: int = 0,
    costs: StepCosts | None = None,
    survive_nodes: int = 0,
) -> Placement:
    """Decide replicas, nodes and ranks of every expert so that the predicted step time is low.

    Pure; a function of its arguments alone. Best with sampled token sets in `statistics`: pair counts, or loads alone,
    are turned into drawn sets. At most 4,096 sampled tokens a layer are used.

    Args:
        slots_per_rank: slots of a rank and layer, one number or one per rank; None: just enough for every expert. Of
            one number every slot is filled, but for those beyond the number of experts: a rank has no use for an expert
            twice. Of one per rank those stay empty where a replica would make a step longer.
        current: the placement to start from. A layer where nothing is gained comes back unchanged. None: the plan is
            never predicted slower than `contiguous` (unless it must survive, or no link is known).
        horizon_steps: steps over which moving pays back.
        level: node: ranks of a node are balanced inside each step, so nodes must be even; rank: ranks must be.
        seed: of the order in which the search looks at experts.
        costs: figures of the cost model, ranks' speeds among them.
        survive_nodes: nodes that may be lost, any of them, with a replica of every expert left; `survive.price` says
            what that costs.

    Returns:
        A placement; its version is the current one's plus one, or the same where every layer stays.

    Raises:
        PlacementError: fewer slots than experts (or than survive_nodes takes), or statistics, topology, costs and
            current that do not fit one another.
    """
    costs = costs or StepCosts()
    experts = np.shape(statistics.load)[1]
    if current is not None:
        check_fit(current, statistics, topology)
    sets = token_sets(statistics)
    if sets.size and (sets.min() < 0 or sets.max() >= experts):
        raise PlacementError(f"statistics: the sample names expert {sets.max()}: allowed are 0 to {experts - 1}")
    problem = Problem.of(topology, experts, sets.shape[2], slots_per_rank, level, horizon_steps, costs)
    survive.check_room(problem.room, experts, topology.node_of, survive_nodes)
    known = RoutingStatistics(statistics.load, sample=sets.astype(np.int32))

    asked = np.ndim(slots_per_rank or 0) == 0

    def planned(now: Placement | None) -> Placement:
        made = _planned(known, topology, problem, now, seed, survive_nodes)
        return _filled(made, now, known, problem, survive_nodes, asked)

    found = planned(current)
    if current is None and (survive_nodes or found.version):
        return _settled(replace(found, version=0), planned)
    return found


def _planned(
    statistics: RoutingStatistics,
    topology: Topology,
    problem: Problem,
    current: Placement | None,
    seed: int,
    survive_nodes: int,
) -> Placement:
    """The plan with a slot left empty where a replica there gains nothing; see `plan`."""
    assert statistics.sample is not None
    sets = np.asarray(statistics.sample, np.int64)
    layers, experts = statistics.load.shape
    start = None if current is None else _needed(current) if survive_nodes else current.slots
    width = int(problem.room.max(initial=0))
    plain = contiguous(layers, experts, problem.ranks, problem.room.tolist()) if current is None else None

    def one(i: int) -> tuple[LayerChange, bool]:
        traffic = Traffic.of(np.asarray(statistics.load[i], np.float64), sets[i], problem.ranks)
        now = None if start is None else _fitted(start[i], problem)
        if now is not None:
            table = None if current is None or survive_nodes else fill.shares_table(current, i)
            return best_change(replace(problem, shares=table), traffic, now, seed), False
        slots, seconds = settled(problem, traffic, fresh_slots(problem, traffic, seed), seed)
        doubtful = plain is not None and _doubtful(problem, traffic, seconds, plain.slots[i])
        return LayerChange(slots, slots, 0.0, 0.0, 0.0), doubtful

    found = _by_layer(one, range(layers))
    together = pays([change for change, _ in found])
    chosen = [c.slots if together or pays([c]) else c.before for c, _ in found]
    slots = np.stack(chosen) if found else np.zeros((0, problem.ranks, width), np.int64)
    doubt = [i for i, (_, doubtful) in enumerate(found) if doubtful]
    if plain is not None and doubt:
        slots[doubt] = _no_worse(slots, plain, problem, statistics, topology, doubt)
    if survive_nodes:
        return _secured(slots, statistics, sets, topology, problem, current, survive_nodes)
    if current is None:
        return Placement(slots, experts, primary=_primaries(slots, experts, None))
    padded = np.full((layers, problem.ranks, max(width, current.slots.shape[2])), -1, np.int64)
    padded[:, :, :width] = slots
    if (padded[:, :, : current.slots.shape[2]] == current.slots).all():
        return current
    primary = _primaries(slots, experts, current.owner)
    return Placement(slots, experts, current.version + 1, primary, fill.shares_kept(current, slots))


def _by_layer(one: Callable[[int], T], layers: Sequence[int]) -> list[T]:
    """What `one` makes of each layer, in threads."""
    with ThreadPoolExecutor(max(1, min(len(layers), os.cpu_count() or 1))) as pool:
        return list(pool.map(one, layers))


def _filled(
    made: Placement,
    current: Placement | None,
    statistics: RoutingStatistics,
    problem: Problem,
    survive_nodes: int,
    asked: bool,
) -> Placement:
    """The plan with every slot filled, `made` itself where all are; its version then is one up on the current one's.

    asked: one number of slots was given, so all are wanted full; else a layer stays as it is where that is slower.
    """
    assert statistics.sample is not None
    short = np.flatnonzero(fill.empty_slots(problem, made.slots).any(1)).tolist()
    if not short:
        return made
    width = max(made.slots.shape[2], int(problem.room.max()))
    slots, shares = np.full((*made.slots.shape[:2], width), -1, np.int64), np.ones((*made.slots.shape[:2], width))
    slots[:, :, : made.slots.shape[2]] = made.slots
    shares[:, :, : made.slots.shape[2]] = 1.0 if made.shares is None else made.shares
    sets = np.asarray(statistics.sample, np.int64)

    def one(i: int) -> fill.FilledLayer:
        load = np.asarray(statistics.load[i], np.float64)
        traffic = Traffic.of(load, sets[i], problem.ranks).as_predicted(load)
        before = fill.FilledLayer(slots[i], shares[i])
        full = fill.fill_layer(problem, traffic, before, current is None, survive_nodes > 0)
        return full if asked or not fill.slower(problem, traffic, full, before) else before

    for i, layer in zip(short, _by_layer(one, short), strict=True):
        slots[i], shares[i] = layer.slots, layer.shares
    if (slots[:, :, : made.slots.shape[2]] == made.slots).all() and (slots[:, :, made.slots.shape[2] :] < 0).all():
        return made
    primary = _primaries(slots, made.num_experts, made.owner)
    version = 1 if current is None else current.version + 1
    return Placement(slots, made.num_experts, version, primary, None if (shares == 1).all() else shares)


def _needed(current: Placement) -> Ints:
    """Slots [L, R, S] without the replicas that are there for safety alone."""
    return current.slots if current.shares is None else np.where(current.shares > 0, current.slots, -1)


def _secured(
    slots: Ints,
    statistics: RoutingStatistics,
    sets: Ints,
    topology: Topology,
    problem: Problem,
    current: Placement | None,
    nodes: int,
) -> Placement:
    """The plan [L, R, S] with every expert on nodes + 1 nodes; a layer that stays keeps its safety replicas too."""
    shares = np.ones(slots.shape)
    before = None if current is None else _needed(current)
    kept = None if current is None else survive.layers_that_survive(current, topology.node_of, nodes)
    for i in range(len(slots)):
        if current is not None and before is not None and kept is not None and kept[i]:
            fits = _fitted(current.slots[i], problem)
            needed = _fitted(before[i], problem)
            if fits is not None and current.slots.shape[2] == slots.shape[2] and (needed == slots[i]).all():
                slots[i] = current.slots[i]
                shares[i] = 1.0 if current.shares is None else current.shares[i]
                continue
        load = np.asarray(statistics.load[i], np.float64)
        slots[i], shares[i] = survive.secured(slots[i], load, problem.room, topology.node_of, nodes)
        if current is None or kept is None or not kept[i] or current.slots.shape[2] != slots.shape[2]:
            continue
        traffic = Traffic.of(load, sets[i], problem.ranks)
        was = layer_seconds(problem, traffic, current.slots[i], None if current.shares is None else current.shares[i])
        if was - layer_seconds(problem, traffic, slots[i], shares[i]) < WORTH * was:  # safety takes the gain back
            slots[i] = current.slots[i]
            shares[i] = 1.0 if current.shares is None else current.shares[i]
    if current is not None and current.slots.shape == slots.shape and (slots == current.slots).all():
        return current
    version = 0 if current is None else current.version + 1
    primary = _primaries(slots, problem.experts, None if current is None else current.owner)
    return Placement(slots, problem.experts, version, primary, shares)


def _fitted(current: Ints, problem: Problem) -> Ints | None:
    """Current slots [R, S] at the problem's width, or None where a rank holds more than it has room for."""
    width = int(problem.room.max())
    if ((current >= 0).sum(1) > problem.room).any():
        return None
    out = np.full((problem.ranks, width), -1, np.int64)
    for rank, row in enumerate(current):
        kept = row[row >= 0] if len(row) > problem.room[rank] else row
        out[rank, : len(kept)] = kept
    return out


def _settled(made: Placement, again: Callable[[Placement], Placement]) -> Placement:
    """A plan, planned again until it stays: what safety displaced or filled may have better places now."""
    for _ in range(SETTLE):
        before, made = made, again(made)
        if made is before:
            break
    return replace(made, version=0)


def _no_worse(
    slots: Ints, plain: Placement, problem: Problem, statistics: RoutingStatistics, topology: Topology, doubt: list[int]
) -> Ints:
    """Slots [D, R, S] of a plan's layers `doubt` [D], with those of `plain` in the ones that `predict` finds faster so.

    The search leads by sums; a step waits for maxima, and on odd clusters the two may disagree.
    """
    assert statistics.sample is not None
    known = RoutingStatistics(statistics.load[doubt], sample=statistics.sample[doubt])
    both = plain.slots[doubt], slots[doubt]
    a, b = (
        predict(Placement(x.copy(), problem.experts), known, topology, problem.costs, problem.level) for x in both
    )  # fmt: skip
    better = a.compute + a.traffic < b.compute + b.traffic
    return np.where(better[:, None, None], *both)


def _doubtful(problem: Problem, traffic: Traffic, seconds: float, plain: Ints) -> bool:
    """Whether a layer of that many predicted seconds is not clearly faster than with slots `plain` [R, S].

    Not asked where no link is known: `predict` sees no traffic there, and would take what balances by luck.
    """
    if not problem.links.rank.any():
        return False
    rough = len(traffic.sets) < SURE or problem.prices.visit_seconds == 0  # tokens of no bytes: visits cost nothing
    return rough or seconds > CLEAR * layer_seconds(problem, traffic, plain)


def _primaries(slots: Ints, experts: int, before: Ints | None) -> Ints:
    """[L, E] owner of each expert: as before where it still holds the expert, else the holder that owns fewest."""
    layers, ranks = slots.shape[:2]
    primary = np.full((layers, experts), -1, np.int64)
    for i in range(layers):
        held = np.zeros((experts + 1, ranks), bool)
        held[slots[i], np.arange(ranks)[:, None]] = True
        held = held[:-1]
        if before is not None:
            keep = held[np.arange(experts), before[i]]
            primary[i, keep] = before[i, keep]
        times = held.sum(1)
        alone = (primary[i] < 0) & (times == 1)
        primary[i, alone] = held[alone].argmax(1)
        owns = np.bincount(primary[i][primary[i] >= 0], minlength=ranks)
        for e in np.nonzero(primary[i] < 0)[0]:
            hosts = np.nonzero(held[e])[0]
            primary[i, e] = hosts[np.argmin(owns[hosts])]
            owns[primary[i, e]] += 1
    return primary


def warm() -> None:
    """Compile the planner's kernels, or load them from numba's cache, so that no plan waits for it."""
    load = np.array([[3, 2, 1, 1], [1, 1, 2, 3]])
    sample = np.array([[[0, 1], [2, 3]], [[3, 2], [1, 0]]], np.int32)
    statistics = RoutingStatistics(load, sample=sample)
    said = [Topology.of_nodes(nodes) for nodes in ([0, 0, 1, 1], [0, 1, 2, 3])]
    bandwidth = np.asarray(1e9 * np.arange(1, 17).reshape(4, 4), np.float64)
    unequal = Topology(bandwidth, np.zeros((4, 4)), np.arange(4))
    for topology, slots in zip((*said, unequal), (2, 2, 1), strict=True):
        first = plan(statistics, topology, slots)
        plan(RoutingStatistics(load[::-1], sample=sample), topology, slots, current=first)


KERNELS = (
    packing.spread_on_ranks, packing.unit_risk, swaps.improve_grouping, relief.relieve, small.refine, by_time.descend,
    deal, play, busiest,
)  # fmt: skip
"""What `warm` compiles; a test checks that no plan compiles another."""
