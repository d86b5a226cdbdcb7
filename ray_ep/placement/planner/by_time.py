"""Search on the predicted time itself, for few ranks on unequal links: swaps that relieve the link a step waits for.

grouping.py adds up what visits to nodes cost; a step waits for its busiest link or port. Where links differ the two
part: shunning a node because of one slow link may only load another. With few ranks every swap can be judged by the
cost model's own time. For layers of which every expert has one slot: then the tokens that visit a rank are a set, and
the same ones whatever rank they start on.
E experts, R ranks, S slots, N nodes, U units whose load is compared (ranks, or nodes), B words of 64 tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.bits import common
from ray_ep.placement.compiled import kernel
from ray_ep.placement.cost.link_time import busiest
from ray_ep.placement.placement import Floats, Ints
from ray_ep.placement.planner.layer import Traffic
from ray_ep.placement.planner.problem import Problem

APART = 1.2
"""Ratio. Links that differ by this factor are unequal; less is the probe's noise."""
LARGEST = 1e6
"""Experts^2 x ranks^2. Larger layers are not searched like this: at the limit one start takes about 0.3 s."""
TIMED_SWEEPS = 20
"""Passes over all experts. A descent makes at most this many."""
KICKS, WORK = 48, 8e5
"""Kicks at most, and the product kicks x experts^2 x ranks^2 that bounds them for larger layers. A kick exchanges
some experts of the best plan at random; the search goes on from there."""
KICKED = 0.2
"""Share of the experts. A kick exchanges this many."""
NORM_WEIGHT = 0.3
"""Weight of the links' norm (fourth powers) beside the busiest link. It rewards relieving one of two equally busy
links."""
LEAST_SHARE = 1e-3
"""Share of the cost. A swap that gains less is not made."""


class ClusterTerms(NamedTuple):
    """What the kernels are told of the cluster; links, ports, node_ways and cards are those of `LinkSeconds`."""

    node_of: Any  # [R] numbers 0 to N - 1
    links: Any  # [R, R]
    ports: Any  # [2, 2, R]
    node_ways: Any  # [2, 3, R, N]
    unit_seconds: Any  # [U] of a unit for a load of 1
    size: Any  # bytes that a sampled token's visit stands for
    extra: Any  # of the second level, in seconds over size
    ways: Any  # 0 flat, 1 two levels, 2 the faster
    cards: Any  # [2, N]


class ExpertSeats(NamedTuple):
    """Where experts are [E], and what it costs that they move."""

    rank_of: Any
    on: Any  # node
    home: Any  # rank before
    unit_of: Any  # [R]
    stay: Any  # seconds that an expert must gain to move


class Visits(NamedTuple):
    """Sampled tokens that visit ranks, or nodes."""

    once: Any  # [places, B] which
    more: Any  # [places, B] those with several experts there
    count: Any  # [places]


class SwapState(NamedTuple):
    """What swaps change."""

    by_rank: Visits
    by_node: Visits
    busy: Any  # [U] load of each unit
    left: Any  # [B] scratch


def fits(problem: Problem, slots: Ints) -> bool:
    """Whether a layer [R, S] can be searched: unequal measured links, few ranks, one slot for every expert."""
    if problem.nodes < 2 or problem.prices.visit_seconds <= 0 or problem.experts**2 * problem.ranks**2 > LARGEST:
        return False
    if int((slots >= 0).sum()) != problem.experts:
        return False
    node_of, links = problem.links.node_of, problem.links.rank
    across = links[node_of[:, None] != node_of]  # both directions: a slow one hides in their sum
    return bool(across.max(initial=0.0) > APART * across.min(initial=np.inf))


def swapped_by_time(problem: Problem, traffic: Traffic, slots: Ints, stay: float, seed: int) -> Ints:
    """Slots [R, S] better by swaps of experts between ranks, until none gains anything any more.

    Args:
        slots: of a layer that `fits`. stay: seconds a step that each expert must gain to move.
    """
    rng = np.random.default_rng(seed)
    kicks = min(KICKS, int(WORK / (problem.experts**2 * problem.ranks**2)))
    start = np.zeros(problem.experts, np.int64)
    start[slots[slots >= 0]] = np.nonzero(slots >= 0)[0]
    orders = np.argsort(rng.random((kicks + 1, TIMED_SWEEPS, problem.experts)), axis=2)
    swapped = rng.integers(0, problem.experts, (kicks, max(1, round(KICKED * problem.experts / 2)), 2))
    units = problem.unit_of
    what = traffic.bits, np.asarray(traffic.load, np.float64)
    best = descend(*what, start, units, float(stay), orders, swapped, _terms(problem, traffic, units))
    out = slots.copy()
    for r in range(problem.ranks):
        mine = np.flatnonzero(best == r)
        kept = np.isin(slots[r], mine)
        out[r, ~kept & (slots[r] >= 0)] = np.setdiff1d(mine, slots[r])
    return out


def _terms(problem: Problem, traffic: Traffic, units: Ints) -> ClusterTerms:
    costs, links = problem.costs, problem.links
    each = problem.ranks * costs.tokens_per_rank * costs.expert_seconds
    unit_seconds: Floats = each / np.bincount(units, problem.speed)
    size = costs.token_bytes * costs.tokens_per_rank / len(traffic.sets)
    meet = int(np.bincount(links.node_of).max()) > 1
    extra = 2 * float(links.wait.max()) / size if meet and size > 0 else 0.0
    ways = {False: 0, True: 1, None: 2}[costs.two_level]
    return ClusterTerms(
        links.node_of, links.rank, links.ports, links.node, unit_seconds, size, extra, ways, links.cards
    )  # fmt: skip


@kernel
def _recount(bits: Any, place: Any, n: Any, once: Any, more: Any) -> Any:
    """Recompute the tokens that visit place n, and those with several experts there; -> how many visit."""
    for w in range(bits.shape[1]):
        one, two = np.uint64(0), np.uint64(0)
        for e in range(len(place)):
            if place[e] == n:
                two |= one & bits[e, w]
                one |= bits[e, w]
        once[n, w], more[n, w] = one, two
    return float(common(once[n], once[n]))


@kernel
def _exchanged(bits: Any, n: Any, goes: Any, comes: Any, once: Any, more: Any, left: Any) -> Any:
    """How many tokens would visit place n if expert `goes` had left it and `comes` had come; left [B] is scratch."""
    for w in range(bits.shape[1]):
        left[w] = (once[n, w] & (~bits[goes, w] | more[n, w])) | bits[comes, w]
    return float(common(left, left))


@kernel
def _cost(to: Any, across: Any, busy: Any, terms: ClusterTerms, scratch: Any) -> Any:
    """Seconds of the slowest unit and the busiest link or port, and NORM_WEIGHT of the links' norm.

    Args:
        to: [R] sampled tokens that visit each rank; across: [N] each node. busy: [U] load of each unit.
    """
    node_of, links, ports, node_ways, unit_seconds, size, extra, ways, cards = terms
    to_rank, to_node = scratch
    ranks, total, slowest = len(to), 0.0, 0.0
    for s in range(ranks):
        for r in range(ranks):
            if r != s:
                to_rank[s, r] = to[r]
                both = to[r] * (links[s, r] + links[r, s])
                total += both * both * both * both
        for n in range(len(across)):
            if node_of[s] != n:
                to_node[s, n] = across[n]
    for u in range(len(busy)):
        slowest = max(slowest, busy[u] * unit_seconds[u])
    flat, out, inside = busiest((to_rank, to_node), links, ports, cards, node_ways, node_of)
    two = out + inside + extra
    longest = flat if ways == 0 else two if ways == 1 else min(flat, two)
    return slowest + size * (longest + NORM_WEIGHT * total**0.25)


@kernel
def _look(
    bits: Any, load: Any, a: Any, now: Any, seats: ExpertSeats, state: SwapState, terms: ClusterTerms, scratch: Any
) -> Any:  # fmt: skip
    """The expert whose swap with expert a gains most; -1 if none gains more than LEAST_SHARE of `now`."""
    rank_of, on, home, unit_of, stay = seats
    once, more, to = state.by_rank
    node_once, node_more, across = state.by_node
    busy, left = state.busy, state.left
    i, best, best_gain = rank_of[a], -1, LEAST_SHARE * now
    for b in range(len(rank_of)):
        j = rank_of[b]
        if i == j:
            continue
        m, n, d = on[a], on[b], load[b] - load[a]
        old = to[i], to[j], across[m], across[n]
        to[i] = _exchanged(bits, i, a, b, once, more, left)
        to[j] = _exchanged(bits, j, b, a, once, more, left)
        if m != n:
            across[m] = _exchanged(bits, m, a, b, node_once, node_more, left)
            across[n] = _exchanged(bits, n, b, a, node_once, node_more, left)
        busy[unit_of[i]] += d
        busy[unit_of[j]] -= d
        moved = int(j != home[a]) + int(i != home[b]) - int(i != home[a]) - int(j != home[b])
        gain = now - _cost(to, across, busy, terms, scratch) - stay * moved
        busy[unit_of[i]] -= d
        busy[unit_of[j]] += d
        to[i], to[j], across[m], across[n] = old
        if gain > best_gain:
            best, best_gain = b, gain
    return best


@kernel
def _swaps(
    bits: Any, load: Any, rank_of: Any, home: Any, unit_of: Any, stay: Any, order: Any, terms: ClusterTerms
) -> Any:
    """Swap while that gains; rank_of [E] in place. -> the cost, moves from `home` [E] priced in."""
    node_of, words = terms.node_of, bits.shape[1]
    ranks, nodes = len(node_of), node_of.max() + 1
    on = node_of[rank_of]
    by_rank = Visits(np.zeros((ranks, words), np.uint64), np.zeros((ranks, words), np.uint64), np.zeros(ranks))
    by_node = Visits(np.zeros((nodes, words), np.uint64), np.zeros((nodes, words), np.uint64), np.zeros(nodes))
    busy = np.zeros(len(terms.unit_seconds))
    for r in range(ranks):
        by_rank.count[r] = _recount(bits, rank_of, r, by_rank.once, by_rank.more)
    for n in range(nodes):
        by_node.count[n] = _recount(bits, on, n, by_node.once, by_node.more)
    for e in range(len(load)):
        busy[unit_of[rank_of[e]]] += load[e]
    scratch = np.zeros((ranks, ranks)), np.zeros((ranks, nodes))
    state = SwapState(by_rank, by_node, busy, np.zeros(words, np.uint64))
    seats = ExpertSeats(rank_of, on, home, unit_of, stay)
    now = _cost(by_rank.count, by_node.count, busy, terms, scratch)
    for sweep in range(order.shape[0]):
        done = True
        for a in order[sweep]:
            b = _look(bits, load, a, now, seats, state, terms, scratch)
            if b < 0:
                continue
            done = False
            i, j, d = rank_of[a], rank_of[b], load[b] - load[a]
            busy[unit_of[i]] += d
            busy[unit_of[j]] -= d
            rank_of[a], rank_of[b], on[a], on[b] = j, i, on[b], on[a]
            for r in (i, j):
                by_rank.count[r] = _recount(bits, rank_of, r, by_rank.once, by_rank.more)
                by_node.count[node_of[r]] = _recount(bits, on, node_of[r], by_node.once, by_node.more)
            now = _cost(by_rank.count, by_node.count, busy, terms, scratch)
        if done:
            break
    return now + stay * (rank_of != home).sum()


@kernel
def descend(
    bits: Any, load: Any, start: Any, unit_of: Any, stay: Any, orders: Any, swapped: Any, terms: ClusterTerms
) -> Any:  # fmt: skip
    """Swaps of experts between ranks from `start`, then from kicked copies of the best, keeping what is better.

    Args:
        bits: [E, B] sampled tokens that chose each expert; load: [E] tokens of each, per token.
        start: [E] the rank of each expert now. unit_of: [R]. stay: seconds that an expert must gain to move.
        orders: [kicks + 1, sweeps, E] in which each sweep seeks partners. swapped: [kicks, pairs, 2] experts.

    Returns:
        [E] the rank of each expert.
    """
    best = start.copy()
    cost = _swaps(bits, load, best, start, unit_of, stay, orders[0], terms)
    for k in range(swapped.shape[0]):
        trial = best.copy()
        for pair in swapped[k]:
            trial[pair[0]], trial[pair[1]] = trial[pair[1]], trial[pair[0]]
        now = _swaps(bits, load, trial, start, unit_of, stay, orders[k + 1], terms)
        if now < cost:
            best, cost = trial, now
    return best
