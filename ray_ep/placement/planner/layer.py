"""Plan one layer: which experts go everywhere, which to which node, and on which rank of it. NumPy around the kernels.

1. Replicas: experts too hot for one rank (or node) get several items, and what spare slots remain put the hottest
   experts on every node, where nearest-replica dispatch makes their tokens stay.
2. Nodes: swaps of items between nodes, and with those everywhere, on the exact visits of sampled tokens.
3. Ranks: items of a node are packed so that load and its risk are even.
E experts, R ranks, S slots, N nodes, I items (replicas that are placed on their own).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ray_ep.placement.bits import split_bits, token_bits
from ray_ep.placement.cost.dispatch import Dealt, deal, sources_of
from ray_ep.placement.placement import Floats, Ints
from ray_ep.placement.planner import gains, grouping, packing, relief, small, swaps
from ray_ep.placement.planner.forecast import expected_load
from ray_ep.placement.planner.problem import STIFF, Problem

HOT = 0.8
"""Share of a unit's even load. An expert with more than this gets a second replica."""
LESS = 1.03
"""Factor. Where slots are short, the load that one replica may bear grows by this factor until they suffice."""
RISK = 0.04
"""Weight of the loads' covariance beside the loads. It stands for how much topics' shares vary from window to
window."""
NODE_RISK = {"node": 0.12, "rank": 0.04}
"""Share of that weight between nodes, by level. It is low: tokens of a topic want few nodes, risk wants them apart."""
FLOW = 8.0
"""Penalty slope. A visit to a node with average traffic costs 9 times one to an idle node, so that no node becomes
the busiest, for which a step waits."""
RANK_MOVE = {"node": 80.0, "rank": 40.0}
"""Price of a move between ranks of a node, in moves between nodes, by level. It is high: evening out ranks that are
near the mean gains nothing."""
STARTS = 2
"""Greedy starts. A fresh search improves this many and keeps the best."""
FRESH_SWEEPS = 20
"""Passes over all items. A fresh search makes at most this many."""
CROWD = 64
"""Ranks. Each sampled token starts from one more rank for every 64 ranks: with few tokens a rank, the busiest would
look busier than it is."""
COARSE = 32
"""Words of 64 tokens. A fresh search with this many or more looks at half of them first."""
WARM_SWEEPS = 3
"""Passes over all items. A search from a current placement makes at most this many."""
LEAST_EXCHANGE = 0.0015
"""Visits of the mean token. An exchange of two slots that gains less is not made: it would even out the noise of
this sample."""
SMALL = 2e6
"""Additions. A layer whose sweep costs at most this many is refined slot by slot on its exact expectation."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is known of one layer's tokens.

    Args:
        load: [E] tokens of each expert, per token, as they are expected to be. bits: [E, B] sampled tokens that chose
            each expert.
        sets: [T, K] the sampled tokens. dealt: the same by source rank, of `dispatch.deal`. risk: [E, E] covariance of
            choices. tokens: how many were counted.
    """

    load: Floats
    bits: npt.NDArray[np.uint64]
    sets: Ints
    dealt: Dealt
    risk: Floats
    tokens: float

    @staticmethod
    def of(load: Floats, sets: Ints, ranks: int) -> Traffic:
        """From counts [E] and sampled sets [T, K], of tokens that start on that many ranks."""
        counts = np.asarray(load, np.float64)
        total = counts.sum()
        share = counts / total if total > 0 else np.full(len(counts), 1 / len(counts))
        share = share * sets.shape[1]
        bits = token_bits(sets, len(counts))
        cov = grouping.covariance(sets, share)
        dealt = deal(sets, len(counts), ranks, max(1, ranks // CROWD))
        return Traffic(expected_load(share, sets, cov), bits, sets, dealt, RISK * cov, total / max(sets.shape[1], 1))

    def as_predicted(self, load: Floats) -> Traffic:
        """What `cost.predict` goes by, for counts [E]: those as they are, and more draws of the tokens' sources."""
        ranks = len(self.dealt.tokens)
        dealt = deal(self.sets, len(load), ranks, sources_of(self.sets, ranks))
        share = load / max(load.sum(), 1) * self.sets.shape[1]
        return replace(self, load=share, dealt=dealt)


@dataclass(frozen=True, slots=True)
class Items:
    """Replicas to place. expert: [I], -1 for a slot left to step 3; home: [I] node now, N everywhere, -1 none."""

    expert: Ints
    home: Ints
    everywhere: int


def fresh_layer(problem: Problem, traffic: Traffic, seed: int, even_ranks: bool = False) -> Ints:
    """Slots [R, S] planned from nothing; even_ranks: see `choose_items`."""
    starts = 1 if even_ranks else STARTS  # many items: dear, and only one of two plans
    items = choose_items(problem, traffic.load, even_ranks)
    place = _group(problem, traffic, items, seed, starts)
    slots = _pack_nodes(problem, traffic, items, place, None, problem.prices.stay)
    if problem.nodes > 1:
        slots = relieved(problem, traffic, slots)
        if problem.level == "node":  # that was of nodes alone: their ranks are to be even, too
            items = items_of(problem, slots)
            slots = _pack_nodes(problem, traffic, items, items.home, None, problem.prices.stay)
    return _refine_small(problem, traffic, slots, seed)


def warm_layer(problem: Problem, traffic: Traffic, current: Ints, stay: float, owned: float, seed: int) -> Ints:
    """Slots [R, S] improved from `current` [R, S], each slot filled anew at the price `stay`, or `owned`."""
    items = items_of(problem, current)
    bits, load = _item_arrays(traffic, items)
    count = np.bincount(items.expert[items.expert >= 0], minlength=problem.experts)
    price = np.where(items.expert < 0, 0.0, np.where(count[items.expert] == 1, owned, stay))
    place = items.home.copy()
    empty = place < 0
    place[empty] = _free_places(problem, items)
    order = _orders(len(place), seed, WARM_SWEEPS)
    risk = _item_risk(problem, traffic, items)
    goals = _goals(problem, traffic, bits, place)
    swaps.improve_grouping(bits, load, risk, place, goals, items.home, price, order)
    return _pack_nodes(problem, traffic, items, place, current, RANK_MOVE[problem.level] * stay)


def relieved(
    problem: Problem, traffic: Traffic, slots: Ints, before: Ints | None = None, stay: float = 0.0, most: int = 1 << 30
) -> Ints:
    """Slots [R, S] with the busiest relieved by exchanges, so that at most `most` slots are new beside `before` [R, S].

    Each exchange gains `stay` for every slot that it fills anew, and at least LEAST_EXCHANGE. None: nothing is new.
    """
    ranks, width = slots.shape
    flat = slots.ravel()
    real = flat >= 0
    node_of = problem.node_of
    at = np.repeat(node_of, width)
    count = np.bincount(flat[real] * problem.nodes + at[real], minlength=problem.experts * problem.nodes)
    count = count.reshape(problem.experts, problem.nodes)
    everywhere = np.asarray((count > 0).all(1) & (problem.nodes > 1))
    expert, node = flat[real], at[real]
    single = ~everywhere[expert]
    load, bits = np.zeros(len(flat)), np.zeros((len(flat), traffic.bits.shape[1]), np.uint64)
    share = np.where(single, 1.0, problem.source[node])
    load[real] = traffic.load[expert] * share / np.where(single, count.sum(1)[expert], count[expert, node])
    bits[np.flatnonzero(real)[single]] = split_bits(traffic.bits, expert[single])
    fixed = np.zeros(len(flat), bool)
    fixed[real] = count.sum(1)[expert] > 1
    had = np.full((problem.experts + 1, ranks), before is None)
    if before is not None:
        had[before, np.arange(ranks)[:, None]] = True
    had[-1] = True  # emptying a slot is no move
    moved = int((~had[expert, np.flatnonzero(real) // width]).sum())
    speed = np.bincount(problem.unit_of, problem.speed)
    price = problem.price() / len(traffic.sets)
    where = gains.Units(node_of, problem.unit_of, traffic.load.sum() * speed / speed.sum(), price)
    who = np.where(np.arange(width)[None] < problem.room[:, None], slots, -2)
    alone = everywhere & (count.sum(1) == problem.nodes)
    whole = gains.Everywhere(alone, traffic.load, traffic.bits, problem.source)
    held = gains.Held(load, bits, fixed, had)
    limits = gains.ExchangeLimits(stay, most - moved, LEAST_EXCHANGE)
    costs = problem.prices.compute, _inside(problem)
    relief.relieve(who, held, whole, where, costs, limits)
    return np.where(who < 0, -1, who)


def _inside(problem: Problem) -> float:
    """What copies to ranks inside their nodes cost when all ranks get as many, one for each expert, in visits."""
    near = problem.links.rank[problem.node_of[:, None] == problem.node_of]
    if problem.prices.visit_seconds == 0 or not near.any():  # no link is known, or each rank is a node
        return 0.0
    copy = 2 * problem.costs.token_bytes * float(near[near > 0].mean()) / problem.prices.visit_seconds
    return problem.top_k * copy


def choose_items(problem: Problem, load: Floats, even_ranks: bool = False) -> Items:
    """Spend the spare slots: more replicas where one unit cannot bear an expert, then the hottest everywhere.

    even_ranks: ranks are the units, whatever the level.
    """
    nodes, experts = problem.nodes, problem.experts
    room = problem.node_room()
    by_load = np.argsort(-load, kind="stable")
    spare = int(room.sum()) - experts
    limit = HOT * float(load.sum()) / problem.ranks if even_ranks else _bulk(problem, load)
    wanted = _wanted(load, limit, spare, problem.ranks - 1)
    everywhere = min(spare // (nodes - 1), int(room.min())) if nodes > 1 else 0
    while everywhere and everywhere * (nodes - 1) + wanted[by_load[everywhere:]].sum() > spare:
        everywhere -= 1
    rest = by_load[everywhere:]
    extra = np.repeat(rest, wanted[rest])
    return _filled(problem, np.concatenate([np.arange(experts), extra]), None, everywhere)


def _wanted(load: Floats, limit: float, spare: int, most: int) -> Ints:
    """[E] replicas beyond the first, at most `most` each: none bears more than `limit`, or than `spare` slots allow."""
    wanted = np.zeros(len(load), np.int64)
    while limit > 0:
        wanted = np.clip(np.ceil(load / limit) - 1, 0, most).astype(np.int64)
        if wanted.sum() <= spare:
            break
        limit *= LESS
    return wanted


def items_of(problem: Problem, current: Ints) -> Items:
    """The replicas of a placement, as items at home."""
    nodes = problem.nodes
    on = np.zeros((problem.experts + 1, nodes), np.int64)
    np.add.at(on, (current, np.broadcast_to(problem.node_of[:, None], current.shape)), 1)
    on = on[:-1]
    everywhere = np.logical_and((on > 0).all(1), np.full(len(on), nodes > 1))
    expert, home = np.nonzero(on * ~everywhere[:, None])
    times = on[expert, home]
    hot = np.nonzero(everywhere)[0]
    experts = np.concatenate([hot, np.repeat(expert, times)])
    homes = np.concatenate([np.full(len(hot), nodes), np.repeat(home, times)])
    return _filled(problem, experts, homes, len(hot))


def _filled(problem: Problem, expert: Ints, home: Ints | None, everywhere: int) -> Items:
    """Add an empty item for every slot that is left."""
    left = int(problem.node_room().sum()) - everywhere * problem.nodes - (len(expert) - everywhere)
    home = np.full(len(expert), -1, np.int64) if home is None else home.astype(np.int64)
    empty = np.full(max(left, 0), -1, np.int64)
    return Items(np.concatenate([expert.astype(np.int64), empty]), np.concatenate([home, empty]), everywhere)


def _free_places(problem: Problem, items: Items) -> Ints:
    """Nodes of the empty items."""
    taken = np.bincount(items.home[items.home >= 0], minlength=problem.nodes + 1)[: problem.nodes]
    return np.repeat(np.arange(problem.nodes), problem.node_room() - items.everywhere - taken)


def _item_arrays(traffic: Traffic, items: Items) -> tuple[npt.NDArray[np.uint64], Floats]:
    """Tokens [I, B] and load [I] of each item: replicas share out their expert's."""
    real = items.expert[items.expert >= 0]
    count = np.bincount(real, minlength=len(traffic.load))
    bits = np.zeros((len(items.expert), traffic.bits.shape[1]), np.uint64)
    load = np.zeros(len(items.expert))
    bits[: len(real)] = split_bits(traffic.bits, real)
    load[: len(real)] = (traffic.load / np.maximum(count, 1))[real]
    return bits, load


def _item_risk(problem: Problem, traffic: Traffic, items: Items) -> Floats:
    """[I, I] covariance of the items' loads, weighted for nodes."""
    real = items.expert[items.expert >= 0]
    out = np.zeros((len(items.expert), len(items.expert)))
    part = 1.0 / np.maximum(np.bincount(real, minlength=len(traffic.load)), 1)[real]
    out[: len(real), : len(real)] = NODE_RISK[problem.level] * traffic.risk[np.ix_(real, real)] * np.outer(part, part)
    return out


def _goals(problem: Problem, traffic: Traffic, bits: npt.NDArray[np.uint64], place: Ints) -> grouping.NodeGoals:
    """What the search is told of nodes; `place` gives the traffic that is usual for one."""
    speed = problem.node_speed()
    target = traffic.load.sum() * speed / speed.sum()
    price = problem.price() / len(traffic.sets) * traffic.bits.shape[1] / bits.shape[1] / (1 + FLOW)
    usual = float((price * grouping.visits_of(bits, place, problem.nodes)).mean())
    steep = FLOW / (2 * usual) if usual > 0 else 0.0
    stiff = problem.prices.stiff / (1 + FLOW)
    return grouping.NodeGoals(problem.source, target, price, stiff, _bulk(problem, traffic.load), steep)


def _bulk(problem: Problem, load: Floats) -> float:
    """Load that one replica outside "everywhere" may bear."""
    return HOT * float(load.sum()) / (problem.ranks if problem.level == "rank" else problem.nodes)


def _orders(items: int, seed: int, sweeps: int) -> Ints:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((sweeps, items)), axis=1)


def _group(problem: Problem, traffic: Traffic, items: Items, seed: int, starts: int) -> Ints:
    """[I] node of each item, N for everywhere: the best of several greedy starts, each improved by swaps."""
    if problem.nodes == 1:
        return np.zeros(len(items.expert), np.int64)
    bits, load = _item_arrays(traffic, items)
    risk = _item_risk(problem, traffic, items)
    room = np.append(problem.node_room() - items.everywhere, items.everywhere)
    # Any spread tells what traffic is usual: items in turn over the nodes.
    goals = _goals(problem, traffic, bits, np.arange(len(load)) % problem.nodes)
    none, free = np.full(len(load), -1, np.int64), np.zeros(len(load))
    rng = np.random.default_rng(seed)
    # Hot experts go everywhere, so the order starts with them, whole; later starts shuffle the others a little.
    heat = np.where(items.expert >= 0, traffic.load[items.expert], -1.0) + 1e-9 * load
    # A first look at every other 64 tokens: most swaps are clear from those, and each costs half.
    few = np.ascontiguousarray(bits[:, ::2]) if bits.shape[1] >= COARSE else bits
    rough = _goals(problem, traffic, few, np.arange(len(load)) % problem.nodes)
    best, best_cost = none, np.inf
    for start in range(starts):
        shuffled = heat * (rng.uniform(0.7, 1.3, len(heat)) if start else 1.0)
        shuffled = np.where(load > _bulk(problem, traffic.load), np.inf, shuffled)
        order = np.argsort(-shuffled, kind="stable")
        place = grouping.start_grouping(few, load, room, rough, order)
        swaps.improve_grouping(
            few, load, risk, place, rough, none, free, _orders(len(load), seed + start, FRESH_SWEEPS)
        )
        cost = grouping.grouping_cost(few, load, place, rough)
        if cost < best_cost:
            best, best_cost = place, cost
    if few is not bits:
        swaps.improve_grouping(bits, load, risk, best, goals, none, free, _orders(len(load), seed, FRESH_SWEEPS))
    return best


def _pack_nodes(
    problem: Problem, traffic: Traffic, items: Items, place: Ints, current: Ints | None, stay: float
) -> Ints:
    """Slots [R, S]: each node's items on its ranks, those that are there already kept where that is no loss."""
    nodes, experts = problem.nodes, problem.experts
    slots = np.full((problem.ranks, int(problem.room.max(initial=0))), -1, np.int64)
    real = items.expert >= 0
    at = place[real] * experts + items.expert[real]
    times = np.bincount(at, minlength=(nodes + 1) * experts).reshape(nodes + 1, experts)
    weight = times * traffic.load / np.maximum(times.sum(0), 1)
    weight = weight[:nodes] + problem.source[:, None] * weight[nodes]
    scale = problem.prices.stiff / (traffic.load.sum() / problem.ranks) ** 2
    for n in range(nodes):
        members = np.nonzero(problem.node_of == n)[0]
        if current is not None and problem.level == "node":
            # Ranks are balanced inside the step: a node that keeps its experts keeps its slots.
            before = (items.home == n) | (items.home == nodes)
            if (((place == n) | (place == nodes)) == before)[real].all():
                slots[members] = current[members]
                continue
        least = np.minimum(times[n] + times[nodes], len(members))
        now = slots[members] if current is None else current[members]  # of nothing, or what is there
        ranks = problem.room[members], problem.speed[members], now
        slots[members] = packing.spread_on_ranks(
            weight[n], least, traffic.load, traffic.risk, scale, ranks, stay, FRESH_SWEEPS
        )
    return slots


def _refine_small(problem: Problem, traffic: Traffic, slots: Ints, seed: int, rounds: int = 8) -> Ints:
    """Where sums over all token sets are cheap, improve slot by slot on the exact expectation."""
    ranks, room = slots.shape
    if problem.nodes == 1 or problem.experts * problem.ranks * room > SMALL / 100:
        return slots
    sets, times = np.unique(np.sort(traffic.sets, 1), axis=0, return_counts=True)
    sweep = (ranks * room) * (problem.experts + ranks * room / 2)
    each = len(sets) * problem.nodes**2 * sets.shape[1] + problem.experts * ranks + problem.experts**2 * ranks
    if sweep * each > SMALL:
        return slots
    unit_of = problem.unit_of
    speed = np.bincount(unit_of, problem.speed)
    source = (problem.source / np.bincount(problem.node_of))[problem.node_of]
    target = traffic.load.sum() * speed / speed.sum()
    start = np.where(np.arange(room)[None] < problem.room[:, None], slots, -2)
    rng = np.random.default_rng(seed)
    ends = (ranks, room, ranks, room)
    kicks = np.stack([rng.integers(0, end, (rounds, 2)) for end in ends], axis=-1)
    weight = times / times.sum()
    stiff = problem.prices.stiff / STIFF[problem.level]
    goals = small.LayerGoals(
        problem.node_of, unit_of, source, target, problem.prices.compute, problem.prices.pair, stiff
    )  # fmt: skip
    best, _ = small.refine(sets, weight, traffic.load, traffic.risk, start, goals, kicks)
    return np.where(best < 0, -1, best)
