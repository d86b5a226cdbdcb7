"""What a layer that has a placement may change: a few moves, or all of it where the placement is a poor one.

Pure NumPy around the kernels' layer.py. E experts, R ranks, S slots, U units that must be even.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ray_ep.placement.cost.dispatch import play
from ray_ep.placement.placement import Floats, Ints
from ray_ep.placement.planner import by_time, layer, packing
from ray_ep.placement.planner.layer import Traffic
from ray_ep.placement.planner.problem import STIFF, Problem

MOST_MOVED = 0.2
"""Share of a layer's filled slots. Improving a layer fills at most this many anew, or FEW_SLOTS where that is more."""
FEW_SLOTS = 4
"""Slots. Improving even the smallest layer may fill this many anew."""
SPENT = 0.8
"""Share of the moves that are allowed. Relief that uses this share or more is followed by a wider search."""
MOVING = {"node": 0.25, "rank": 0.6}
"""Share of a layer's time, by level. A move pays if moving every slot at its rate would gain at least this share."""
UNEQUAL = {"node": 0.1, "rank": 0.3}
"""Share of a layer's time, by level. It replaces MOVING among unequal links, where the predicted time judges swaps."""
RELIEF = 0.05
"""Share of a layer's time. It replaces MOVING for exchanges that relieve the busiest rank."""
POOR = 0.4
"""Share of the filled slots. A placement that would move more than this to improve is also planned anew."""
POOR_GAIN = {"node": 0.12, "rank": 0.25}
"""Share of a layer's time, by level. A placement that gains more than this by a few moves is also planned anew."""
ANEW = 0.05
"""Share of a layer's time. A plan from nothing must gain this more, times the share of slots that it moves more."""
KEEP = 0.9
"""Share of a fresh plan's gain. Where the improved placement keeps this share, the fresh plan is not taken."""
WORTH = 0.015
"""Share of a layer's time. A layer moves only if its predicted time falls by more than this and the noise of its
loads: a search finds about as much in any new sample of the same kind of tokens, and loses it on the next one."""
UNEVEN = 1.05
"""Ratio. Where the dearest node's mean price exceeds the cheapest's by this factor, links differ; less is the
probe's noise."""
MANY_SLOTS = 2
"""Slots an expert. With this many, a plan with replicas that even out ranks competes with one that has them on all
nodes."""
SETTLE = 4
"""Rounds. A fresh plan is improved at most this often, as if it were the current one."""
PRICE_ROUNDS = 7
"""Rounds. The price of a move doubles at most this often, until the moves are few enough."""


@dataclass(frozen=True, slots=True)
class LayerChange:
    """What a layer could change.

    Args:
        before, slots: [R, S] now and then. gain: predicted seconds of it. now: seconds that the layer takes. noise: how
            many of them may be there by chance.
    """

    before: Ints
    slots: Ints
    gain: float
    now: float
    noise: float


def pays(changes: list[LayerChange]) -> bool:
    """Whether what these layers gain together is more than chance would give. Many layers tell that better than one."""
    gain, now, noise = (sum(getattr(c, name) for c in changes) for name in ("gain", "now", "noise"))
    return bool(gain > WORTH * now + noise)


def best_change(problem: Problem, traffic: Traffic, current: Ints, seed: int) -> LayerChange:
    """The best change of a layer's current slots [R, S]; its slots are `current` itself where none was found.

    First the busiest are relieved. Where that takes about all moves that are allowed, other replicas and other nodes
    may do better, and a poor placement is planned anew, however much that moves.
    """
    filled = int((current >= 0).sum())
    most = max(int(MOST_MOVED * filled), FEW_SLOTS)
    now = layer_seconds(problem, traffic, current)
    noise = _noise_seconds(problem, traffic, current)
    few = fastest_slots(
        problem, traffic, [_relieved(view, traffic, current, current, most) for view in problem.views()]
    )
    unequal = by_time.fits(problem, current)
    if unequal:
        few = _by_time(problem, traffic, current, few, UNEQUAL[problem.level] * now / filled, seed)
    moves = moved_slots(current, few)
    gain = now - layer_seconds(problem, traffic, few) if moves else 0.0
    if unequal or moves >= SPENT * most or gain > POOR_GAIN[problem.level] * now:
        few, gain = _more(problem, traffic, LayerChange(current, few, gain, now, noise), most, seed)
    return LayerChange(current, few, gain, now, noise) if gain > 0 else LayerChange(current, current, 0.0, now, noise)


def _more(problem: Problem, traffic: Traffic, relief: LayerChange, most: int, seed: int) -> tuple[Ints, float]:
    """Slots [R, S] that gain more than relief alone does, or those of `relief`; and what they gain."""
    current, now = relief.before, relief.now
    few, gain = relief.slots, relief.gain
    filled = int((current >= 0).sum())
    dear = 1.0
    for _ in range(PRICE_ROUNDS):
        found = [_improved(view, traffic, current, dear, most, seed) for view in problem.views()]
        some = fastest_slots(problem, traffic, found)
        moves = moved_slots(current, some)
        more = now - layer_seconds(problem, traffic, some) if moves else 0.0
        unequal = by_time.fits(problem, current)  # there a few swaps may not get away from a slow link
        if dear == 1 and (unequal or moves > POOR * filled or max(gain, more) > POOR_GAIN[problem.level] * now):
            fresh = fresh_slots(problem, traffic, seed)
            anew = now - layer_seconds(problem, traffic, fresh)
            extra = moved_slots(current, fresh) - moved_slots(current, few)
            if KEEP * anew > gain and anew - gain > ANEW * now * extra / filled:
                return fresh, anew
        if moves <= most:
            return (some, more) if more > gain else (few, gain)
        dear *= 2
    return few, gain


def _by_time(problem: Problem, traffic: Traffic, current: Ints, few: Ints, least: float, seed: int) -> Ints:
    """The better one of `few` and of swaps judged by the predicted time; each move must gain `least` seconds."""
    step_unit = problem.prices.visit_seconds * problem.costs.tokens_per_rank * problem.ranks
    each = max(problem.prices.owned * step_unit, least)
    found = few, by_time.swapped_by_time(problem, traffic, current, each, seed)
    return min(found, key=lambda x: layer_seconds(problem, traffic, x) + each * moved_slots(current, x))


def _relieved(problem: Problem, traffic: Traffic, slots: Ints, current: Ints, most: int) -> Ints:
    """Slots [R, S] with the busiest relieved, at most `most` of them new beside `current` [R, S]."""
    if problem.nodes == 1 or moved_slots(current, slots) > most:
        return slots
    return layer.relieved(
        problem, traffic, slots, current, max(problem.prices.stay, RELIEF * _each(problem, current)), most
    )


def _each(problem: Problem, current: Ints) -> float:
    """A layer's cost in the units of the search, spread over its filled slots: what the price of a move is a share of.

    Where compute is far dearer than traffic the search weighs it no more than `stiff` says: nor may a move cost more.
    """
    compute = min(problem.prices.compute, problem.prices.stiff / STIFF[problem.level])
    return (compute + problem.nodes / 4) / int((current >= 0).sum())


def _improved(problem: Problem, traffic: Traffic, current: Ints, dear: float, most: int, seed: int) -> Ints:
    """Slots [R, S] of one layer after moves that are each worth `dear` times their price, then the busiest relieved."""
    stay = problem.prices.stay
    price = dear * max(stay, MOVING[problem.level] * _each(problem, current))
    slots = layer.warm_layer(problem, traffic, current, price, price + problem.prices.owned - stay, seed)
    return _relieved(problem, traffic, slots, current, most)


def settled(problem: Problem, traffic: Traffic, slots: Ints, seed: int) -> tuple[Ints, float]:
    """Slots [R, S] replanned until they stay, so that a later plan from the same figures finds nothing to move.

    Nearly always the first look changes nothing; replicas that filled spare slots may find better places in it.
    Also returns the predicted seconds.
    """
    seconds = 0.0
    for _ in range(SETTLE):
        change = best_change(problem, traffic, slots, seed)
        if not pays([change]):
            return slots, change.now
        slots, seconds = change.slots, change.now - change.gain
    return slots, seconds


def fresh_slots(problem: Problem, traffic: Traffic, seed: int) -> Ints:
    """Slots [R, S] of one layer planned from nothing.

    The search adds links' times up while a step waits for the busiest: where links differ, shunning a slow one may only
    load its other direction, so a plan that takes all for equal competes on the predicted time.
    """
    found = []
    plenty = problem.level == "node" and problem.room.sum() >= MANY_SLOTS * problem.experts
    for view in problem.views():
        found.append(layer.fresh_layer(view, traffic, seed))
        if plenty:
            found.append(layer.fresh_layer(view, traffic, seed, even_ranks=True))
        price = view.price()
        if view.nodes > 1 and price.max() > UNEVEN * price.min():
            found.append(layer.fresh_layer(view.with_even_links(), traffic, seed))
    best = fastest_slots(problem, traffic, found)
    if not by_time.fits(problem, best):
        return best
    return fastest_slots(problem, traffic, [best, by_time.swapped_by_time(problem, traffic, best, 0.0, seed)])


def fastest_slots(problem: Problem, traffic: Traffic, found: list[Ints]) -> Ints:
    """Of several slots [R, S] the first of those predicted to be fastest."""
    return found[0] if len(found) == 1 else min(found, key=lambda x: layer_seconds(problem, traffic, x))


def _noise_seconds(problem: Problem, traffic: Traffic, current: Ints) -> float:
    """By how much a layer's slowest unit is expected to look slower than the mean one by chance alone.

    A plan from one window of tokens looks uneven on the next, and evening that out again gains nothing: of U units
    the busiest is as far above the mean as the largest of U normal draws (Blom's approximation).
    """
    unit = problem.unit_of
    units = int(unit.max()) + 1
    if units < 2 or not traffic.tokens:
        return 0.0
    speed = np.bincount(unit, problem.speed)
    share = 1.0 / np.bincount(current[current >= 0], minlength=problem.experts)
    variance = packing.unit_risk(current, unit, share, traffic.risk, units) / (layer.RISK * traffic.tokens)
    variance = np.maximum(variance, 0.0)
    relative = float(np.sqrt(variance / speed**2).mean()) * speed.sum() / traffic.load.sum()
    even = traffic.load.sum() * problem.costs.tokens_per_rank * problem.costs.expert_seconds
    return float(NormalDist().inv_cdf((units - 0.375) / (units + 0.25)) * relative * even)


def moved_slots(before: Ints, after: Ints) -> int:
    """Slots of `after` [R, S] whose expert was not on that rank in `before` [R, S]."""
    there = (after[:, :, None] == before[:, None, :]).any(2)
    return int(((after >= 0) & ~there).sum())


def layer_seconds(problem: Problem, traffic: Traffic, slots: Ints, shares: Floats | None = None) -> float:
    """Predicted seconds of one layer (see cost.predict), with traffic in units of visits where no link is measured."""
    return layer_figures(problem, traffic, slots, shares)[0]


def layer_figures(
    problem: Problem, traffic: Traffic, slots: Ints, shares: Floats | None = None
) -> tuple[float, Floats]:
    """The same, and tokens [R] that each rank computes."""
    ranks = problem.ranks
    held = np.zeros((problem.experts + 1, ranks), bool)
    held[slots, np.arange(ranks)[:, None]] = True
    weight = held.astype(np.float64)
    if problem.shares is not None:
        weight[:-1] *= problem.shares
    if shares is not None:
        weight[slots, np.arange(ranks)[:, None]] = shares
    groups = problem.links.node_of
    part, to_rank, to_node = play(traffic.dealt, held[:-1], weight[:-1], groups, int(groups.max()) + 1)
    load = np.einsum("e,er->r", traffic.load, part)  # no BLAS: its threads disturb
    load = load * ranks * problem.costs.tokens_per_rank
    unit = problem.unit_of
    compute = (np.bincount(unit, load) / np.bincount(unit, problem.speed)).max() * problem.costs.expert_seconds
    if not problem.links.rank.any():
        visits = float((to_node if to_node.shape[1] > 1 else to_rank).sum()) * problem.costs.tokens_per_rank
        return float(compute) * (1 + visits / (ranks * problem.costs.tokens_per_rank * problem.prices.compute)), load
    return float(compute) + problem.links.seconds((to_rank, to_node), problem.costs), load
