"""The planner: a placement that makes the predicted step short, and changes little of the one that is there.

Layers are independent (a token goes home after each), so they are planned in parallel, in threads: the kernels hold no
GIL. With a current placement every layer has three answers: stay, improve it swap by swap, or plan it anew.
L layers, E experts, R ranks, S slots.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement import layer, packing, relief, small, survive, swaps
from ray_ep.placement.cost import StepCosts, check_fit, token_sets
from ray_ep.placement.dispatch import simulate
from ray_ep.placement.layer import Traffic
from ray_ep.placement.link_time import busiest
from ray_ep.placement.placement import Ints, Placement
from ray_ep.placement.problem import STIFF, Problem
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology

WORTH = 0.015
"""A layer stays as it is unless its predicted time falls by this share and the noise of its loads: a search finds about
as much in any new sample of the same tokens' kind, and loses it on the next."""
MOVING = {"node": 0.1, "rank": 0.3}
"""What moving every slot of a layer must gain at least, as a share of its time: moves that gain less are left out."""
ANEW = 0.15
"""The same of planning a layer anew instead, against improving it: most of the gain lies in few moves."""
KEEP = 0.9
"""A fresh plan is taken only where improving the current one keeps less than this of its gain."""
UNEVEN = 1.05
"""Mean prices of nodes further apart than this are taken for different links, not for noise of the probe."""
SETTLE = 4
"""Most rounds in which a fresh plan is improved as if it were the current one."""
AFRESH = 0.3
"""A layer is also planned anew when improving it moves more than this share of its slots."""


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
        slots_per_rank: slots of a rank and layer, one number or one per rank; None: just enough for every expert.
        current: the placement to start from. A layer where nothing is gained comes back unchanged.
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
    layers, experts = np.shape(statistics.load)
    if current is not None:
        check_fit(current, statistics, topology)
    sets = token_sets(statistics)
    if sets.size and (sets.min() < 0 or sets.max() >= experts):
        raise PlacementError(f"statistics: the sample names expert {sets.max()}: allowed are 0 to {experts - 1}")
    problem = Problem.of(topology, experts, sets.shape[2], slots_per_rank, level, horizon_steps, costs)
    survive.check_room(problem.room, experts, topology.node_of, survive_nodes)
    start = None if current is None else _needed(current) if survive_nodes else current.slots

    def one(i: int) -> Ints:
        traffic = Traffic.of(np.asarray(statistics.load[i], np.float64), sets[i])
        now = None if start is None else _fitted(start[i], problem)
        if now is None:
            return _settled(problem, traffic, _fresh(problem, traffic, seed), seed)
        return _replan(problem, traffic, now, seed)

    with ThreadPoolExecutor(max(1, min(layers, os.cpu_count() or 1))) as pool:
        found = list(pool.map(one, range(layers)))
    width = int(problem.room.max(initial=0))
    slots = np.stack(found) if found else np.zeros((0, problem.ranks, width), np.int64)
    if survive_nodes:
        return _secured(slots, statistics, topology, problem, current, survive_nodes)
    if current is None:
        return Placement(slots, experts, primary=_primaries(slots, experts, None))
    padded = np.full((layers, problem.ranks, max(width, current.slots.shape[2])), -1, np.int64)
    padded[:, :, :width] = slots
    if (padded[:, :, : current.slots.shape[2]] == current.slots).all():
        return current
    primary = _primaries(slots, experts, current.owner)
    return Placement(slots, experts, current.version + 1, primary)


def _needed(current: Placement) -> Ints:
    """Slots [L, R, S] without the replicas that are there for safety alone."""
    return current.slots if current.shares is None else np.where(current.shares > 0, current.slots, -1)


def _secured(
    slots: Ints,
    statistics: RoutingStatistics,
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


def _fresh(problem: Problem, traffic: Traffic, seed: int) -> Ints:
    """Slots [R, S] of one layer planned from nothing.

    The search adds links' times up while a step waits for the busiest: where links differ, shunning a slow one may only
    load its other direction, so a plan that takes all for equal competes on the predicted time.
    """
    slots = layer.fresh_layer(problem, traffic, seed)
    price = problem.price()
    found = [slots]
    if problem.nodes > 1 and price.max() > UNEVEN * price.min():
        found.append(layer.fresh_layer(problem.with_even_links(), traffic, seed))
    found += [relief.relieved(problem, traffic, x, 0.0, seed) for x in found if relief.fits(problem, x)]
    return min(found, key=lambda x: layer_seconds(problem, traffic, x)) if len(found) > 1 else slots


def _settled(problem: Problem, traffic: Traffic, slots: Ints, seed: int) -> Ints:
    """Slots [R, S] replanned until they stay, so that a later plan from the same figures finds nothing to move.

    Nearly always the first look changes nothing; replicas that filled spare slots may find better places in it.
    """
    for _ in range(SETTLE):
        better = _replan(problem, traffic, slots, seed)
        if better is slots:
            break
        slots = better
    return slots


def _replan(problem: Problem, traffic: Traffic, current: Ints, seed: int) -> Ints:
    """Slots [R, S] of one layer: stay, a few moves, or a fresh plan: what gains most after the price of its moves."""
    filled = int((current >= 0).sum())
    # A layer's cost in the units of the search, spread over its slots, gives the price of a move there. Where compute
    # is far dearer than traffic the search weighs it no more than `stiff` says: nor may a move cost more than that.
    compute = min(problem.compute, problem.stiff / STIFF[problem.level])
    price = max(problem.stay, MOVING[problem.level] * (compute + problem.nodes / 4) / filled)
    prices = price, price + problem.owned - problem.stay
    few = layer.warm_layer(problem, traffic, current, *prices, seed)
    now = layer_seconds(problem, traffic, current)
    unequal = relief.fits(problem, current)
    if unequal:
        few = _relieved(problem, traffic, current, few, MOVING[problem.level] * now / filled, seed)
    moves = moved_slots(current, few)
    if not moves and not unequal:
        return current
    gain = now - layer_seconds(problem, traffic, few)
    if unequal or moves > AFRESH * filled:  # among unequal links a few swaps may not get away from a slow one
        fresh = _fresh(problem, traffic, seed)
        more = now - layer_seconds(problem, traffic, fresh)
        if KEEP * more > gain and more - gain > ANEW * now * (moved_slots(current, fresh) - moves) / filled:
            few, gain = fresh, more
    worth = gain > WORTH * now and gain > WORTH * now + _noise_seconds(problem, traffic, current)
    return few if worth else current


def _relieved(problem: Problem, traffic: Traffic, current: Ints, few: Ints, least: float, seed: int) -> Ints:
    """The better one of `few` and of swaps judged by the predicted time; each move must gain `least` seconds."""
    step_unit = problem.visit_seconds * problem.costs.tokens_per_rank * problem.ranks
    each = max(problem.owned * step_unit, least)
    found = few, relief.relieved(problem, traffic, current, each, seed)
    return min(found, key=lambda x: layer_seconds(problem, traffic, x) + each * moved_slots(current, x))


def _noise_seconds(problem: Problem, traffic: Traffic, current: Ints) -> float:
    """By how much a layer's slowest unit is expected to look slower than the mean one by chance alone.

    A plan from one window of tokens looks uneven on the next, and evening that out again gains nothing: of U units
    the busiest is as far above the mean as the largest of U normal draws (Blom's approximation).
    """
    unit = np.arange(problem.ranks) if problem.level == "rank" else problem.node_of
    units = int(unit.max()) + 1
    if units < 2 or not traffic.tokens:
        return 0.0
    speed = np.bincount(unit, problem.speed)
    share = 1.0 / np.bincount(current[current >= 0], minlength=problem.experts)
    variance = np.zeros(units)
    for u in range(units):
        here = current[unit == u]
        here = here[here >= 0]
        variance[u] = share[here] @ traffic.risk[here[:, None], here] @ share[here] / (layer.RISK * traffic.tokens)
    variance = np.maximum(variance, 0.0)
    relative = float(np.sqrt(variance / speed**2).mean()) * speed.sum() / traffic.load.sum()
    even = traffic.load.sum() * problem.costs.tokens_per_rank * problem.costs.expert_seconds
    return float(NormalDist().inv_cdf((units - 0.375) / (units + 0.25)) * relative * even)


def moved_slots(before: Ints, after: Ints) -> int:
    """Slots of `after` [R, S] whose expert was not on that rank in `before` [R, S]."""
    there = (after[:, :, None] == before[:, None, :]).any(2)
    return int(((after >= 0) & ~there).sum())


def layer_seconds(problem: Problem, traffic: Traffic, slots: Ints) -> float:
    """Predicted seconds of one layer (see cost.predict), with traffic in units of visits where no link is measured."""
    ranks = problem.ranks
    held = np.zeros((problem.experts + 1, ranks), bool)
    held[slots, np.arange(ranks)[:, None]] = True
    part, to_rank, to_node = simulate(
        traffic.sets, held[:-1], held[:-1].astype(np.float64), problem.node_of, problem.nodes, 1
    )
    load = traffic.load @ part * ranks * problem.costs.tokens_per_rank
    unit = np.arange(ranks) if problem.level == "rank" else problem.node_of
    compute = (np.bincount(unit, load) / np.bincount(unit, problem.speed)).max() * problem.costs.expert_seconds
    if problem.visit_seconds == 0:
        visits = float(to_node.sum()) * problem.costs.tokens_per_rank
        return float(compute) * (1 + visits / (ranks * problem.costs.tokens_per_rank * problem.compute))
    return float(compute) + problem.links.seconds((to_rank, to_node), problem.costs)


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


KERNELS = (packing.pack, packing.add_replicas, swaps.improve_grouping, small.refine, relief.descend, simulate, busiest)
"""What `warm` compiles; a test checks that no plan compiles another."""
