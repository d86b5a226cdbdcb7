"""Compiled search for the grouping of experts on nodes: exact swaps, judged a place at a time.

Items are kept sorted by place. A swap exchanges two items, so each position keeps its place for good, and the gains of
one item's swaps with all items of a place are one loop over neighbours in memory, which the compiler vectorises.
Those gains leave out that a token which chose both items stays: an upper bound, made exact where it beats the best.
I items, N nodes and place N, "everywhere" (see grouping.py), B words of 64 tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.bits import common, common3
from ray_ep.placement.compiled import kernel
from ray_ep.placement.planner.grouping import NodeGoals, away, part, visits_of

LEAST_SWAP = 2e-4
"""Visits of the mean token. A swap that gains less is not made: such swaps take long and fit noise."""


class Positions(NamedTuple):
    """Items in the order of their positions [I]."""

    load: Any
    leave: Any  # sampled tokens that would no longer visit the item's node without it
    own: Any  # variance of the item's load
    risk: Any  # [I, I] covariance of loads


class Places(NamedTuple):
    """What each position would bring to each place [N + 1, I]."""

    enter: Any  # sampled tokens that would visit it, too
    inter: Any  # covariance with what is there
    cost: Any  # of moves


class TokenSets(NamedTuple):
    """Sets of sampled tokens."""

    bits: Any  # [I, B] those that chose the item of each position
    absent: Any  # [N, B] those that do not visit a node
    alone: Any  # [N, B] those with one expert there


class Flow(NamedTuple):
    """What visits cost."""

    cost: Any  # [N + 1]
    visits: Any  # [N + 1] now
    steep: Any


class Evenness(NamedTuple):
    """How even nodes are [N]."""

    source: Any
    over: Any  # relative deviation from the target
    inv: Any  # 1 / target
    stiff: Any


class SwapTerms(NamedTuple):
    """What is the same for all swaps between two places: factors of what leaves each, of load, of risk on each."""

    here: Any
    here_steep: Any
    there: Any
    there_steep: Any
    load: Any
    load_square: Any
    near: Any
    far: Any


class GroupingState(NamedTuple):
    """Everything that swaps are judged by; `first` [N + 2]: positions first[n] to first[n + 1] are place n's."""

    first: Any
    items: Positions
    at: Places
    sets: TokenSets
    flow: Flow
    evenness: Evenness
    bulk: Any  # load above which an item that is everywhere stays so


@kernel
def _refresh(n: Any, first: Any, items: Positions, at: Places, sets: TokenSets) -> None:
    """Recompute a node's sets of tokens (absent: no visit, alone: one expert there), and all gains from them."""
    bits, absent, alone = sets
    leave, enter = items.leave, at.enter
    words = bits.shape[1]
    for w in range(words):
        once, twice = np.uint64(0), np.uint64(0)
        for p in range(first[n], first[n + 1]):
            twice |= once & bits[p, w]
            once |= bits[p, w]
        absent[n, w], alone[n, w] = ~once, once & ~twice
    for p in range(bits.shape[0]):
        enter[n, p] = common(bits[p], absent[n])
    for p in range(first[n], first[n + 1]):
        leave[p] = common(bits[p], alone[n])


@kernel
def _terms(i: Any, j: Any, flow: Flow, evenness: Evenness) -> SwapTerms:
    """What is the same for all swaps between places i and j: factors of flow, of load and of risk."""
    cost, visits, steep = flow
    source, over, inv, stiff = evenness
    nodes = source.shape[0]
    if i < nodes and j < nodes:
        x, y = 2.0 * (inv[j] * over[j] - inv[i] * over[i]), inv[i] * inv[i] + inv[j] * inv[j]
    else:  # one of the two is everywhere: every node's load changes
        x, y = 0.0, 0.0
        for n in range(nodes):
            c = (part(i, n, source) - part(j, n, source)) * inv[n]
            x -= 2.0 * c * over[n]
            y += c * c
    near, far = stiff * inv[i] * inv[i], stiff * inv[j] * inv[j]
    ci, cj = cost[i], cost[j]
    return SwapTerms(
        ci * (1.0 + 2.0 * steep * ci * visits[i]),
        steep * ci * ci,
        cj * (1.0 + 2.0 * steep * cj * visits[j]),
        steep * cj * cj,
        stiff * x,
        stiff * y,
        near,
        far,
    )


@kernel
def _gains(p: Any, i: Any, j: Any, first: Any, items: Positions, at: Places, terms: SwapTerms, out: Any) -> None:
    """Gain of each swap of position p of place i with a position of place j -> out[: positions of j]. Upper bounds."""
    lo, hi = first[j], first[j + 1]
    load, leave, own, risk = items
    enter, inter, cost = at
    a1, a2, b1, b2, lin, quad, near, far = terms
    both = near + far
    la, ea, ld = leave[p], enter[j, p], load[p]
    base = 2.0 * (near * inter[i, p] - far * inter[j, p]) - both * own[p] + cost[i, p] - cost[j, p]
    load, leave, own, risk = load[lo:hi], leave[lo:hi], own[lo:hi], risk[p, lo:hi]
    enter, here, there, ci, cj = enter[i, lo:hi], inter[i, lo:hi], inter[j, lo:hi], cost[i, lo:hi], cost[j, lo:hi]
    for t in range(load.shape[0]):
        fi, fj, d = la - enter[t], leave[t] - ea, load[t] - ld
        gain = fi * (a1 - a2 * fi) + fj * (b1 - b2 * fj) + d * (lin - quad * d)
        gain += both * (2.0 * risk[t] - own[t]) + 2.0 * (far * there[t] - near * here[t])
        out[t] = gain + base + cj[t] - ci[t]


@kernel
def _both(p: Any, q: Any, i: Any, j: Any, items: Positions, at: Places, terms: SwapTerms, sets: TokenSets) -> Any:
    """What the upper bound counts too much: tokens that chose both items, alone on their node, keep visiting it."""
    bits, alone, leave, enter = sets.bits, sets.alone, items.leave, at.enter
    fi, fj = leave[p] - enter[i, q], leave[q] - enter[j, p]
    a1, a2, b1, b2 = terms.here, terms.here_steep, terms.there, terms.there_steep
    x = common3(bits[p], bits[q], alone[i]) if i < alone.shape[0] else 0
    y = common3(bits[p], bits[q], alone[j]) if j < alone.shape[0] else 0
    return x * (a1 - a2 * (2.0 * fi - x)) + y * (b1 - b2 * (2.0 * fj - y))


@kernel
def _exchange(p: Any, q: Any, items: Positions, at: Places, bits: Any, who: Any) -> None:
    """Let two positions change items."""
    who[p], who[q] = who[q], who[p]
    for x in (items.load, items.leave, items.own):
        x[p], x[q] = x[q], x[p]
    for y in (at.enter, at.inter, at.cost):
        for n in range(y.shape[0]):
            y[n, p], y[n, q] = y[n, q], y[n, p]
    risk = items.risk
    for w in range(bits.shape[1]):
        bits[p, w], bits[q, w] = bits[q, w], bits[p, w]
    for t in range(who.shape[0]):
        risk[p, t], risk[q, t] = risk[q, t], risk[p, t]
    for t in range(who.shape[0]):
        risk[t, p], risk[t, q] = risk[t, q], risk[t, p]


@kernel
def _sorted(bits: Any, load: Any, risk: Any, who: Any, nodes: Any, home: Any, stay: Any) -> Any:
    """Items' figures in the order of positions, and room for those that the search keeps up to date."""
    count = who.shape[0]
    own, far = np.empty(count), np.empty((count, count))
    cost = np.empty((nodes + 1, count))
    for p in range(count):
        a = who[p]
        own[p] = risk[a, a]
        for q in range(count):
            far[p, q] = risk[a, who[q]]
        for n in range(nodes + 1):
            cost[n, p] = stay[a] * away(n, home[a], nodes)
    items = Positions(load[who], np.zeros(count), own, far)
    return items, Places(np.zeros((nodes + 1, count)), np.zeros((nodes + 1, count)), cost), bits[who]


@kernel
def _filled_in(first: Any, items: Positions, at: Places, sets: TokenSets, source: Any, inv: Any) -> Any:
    """Compute all that swaps keep up to date; -> relative deviation of nodes from their targets [N]."""
    nodes = source.shape[0]
    over = np.full(nodes, -1.0)
    for n in range(nodes + 1):
        if n < nodes:
            _refresh(n, first, items, at, sets)
        for p in range(first[n], first[n + 1]):
            at.inter[n] += items.risk[p]
            for m in range(nodes):
                over[m] += items.load[p] * part(n, m, source) * inv[m]
    return over


@kernel
def _best_swap(p: Any, i: Any, looked: Any, changed: Any, state: GroupingState, gains: Any) -> Any:
    """Position and place whose swap with position p of place i gains most; -1 where none gains LEAST_SWAP.

    looked, changed: of how many swaps p was compared last, and [N + 1] when a place changed; gains [I]: scratch.
    """
    first, items, at, sets, flow, evenness, bulk = state
    nodes = evenness.source.shape[0]
    best, best_j, best_gain = -1, -1, LEAST_SWAP
    for j in range(nodes + 1):
        if i == j or max(changed[i], changed[j]) <= looked or (i == nodes and items.load[p] > bulk):
            continue
        terms = _terms(i, j, flow, evenness)
        _gains(p, i, j, first, items, at, terms, gains)
        for q in range(first[j], first[j + 1]):
            gain = gains[q - first[j]]
            if gain <= best_gain or (j == nodes and items.load[q] > bulk):
                continue
            gain -= _both(p, q, i, j, items, at, terms, sets)
            if gain > best_gain:
                best, best_j, best_gain = q, j, gain
    return best, best_j


@kernel
def improve_grouping(
    bits: Any, load: Any, risk: Any, place: Any, goals: NodeGoals, home: Any, stay: Any, order: Any
) -> Any:
    """Swap pairs of items between places while that lowers price . visits + stiff * imbalance + moves; -> swaps made.

    Args:
        bits, load, goals: as for `start_grouping`; place: [I], changed in place.
        risk: [I, I] covariance of loads; what is everywhere bears none, since it falls on all nodes alike.
        home: [I] where each item is now, -1 for none; stay: [I] cost of each slot that it fills anew.
        order: [sweeps, I] the order in which each sweep seeks partners.
    """
    source, target, price, stiff, bulk, steep = goals
    nodes, count = target.shape[0], load.shape[0]
    who = np.argsort(place, kind="mergesort")
    items, at, mine = _sorted(bits, load, risk, who, nodes, home, stay)
    absent = np.zeros((nodes, bits.shape[1]), np.uint64)
    sets = TokenSets(mine, absent, np.zeros_like(absent))
    first = np.searchsorted(place[who], np.arange(nodes + 2))
    cost, inv, visits = np.zeros(nodes + 1), np.zeros(nodes + 1), np.zeros(nodes + 1)
    cost[:nodes], inv[:nodes] = price, 1.0 / target  # visits of "everywhere" cost nothing
    visits[:nodes] = visits_of(bits, place, nodes)
    over = _filled_in(first, items, at, sets, source, inv)
    flow, evenness = Flow(cost, visits, steep), Evenness(source, over, inv, stiff)
    state = GroupingState(first, items, at, sets, flow, evenness, bulk)
    seat, gains = np.argsort(who), np.empty(count)
    looked, changed, swaps = np.full(count, -1), np.zeros(nodes + 1, np.int64), 0
    for sweep in range(order.shape[0]):
        before = swaps
        for a in order[sweep]:
            p, i = seat[a], place[a]
            best, j = _best_swap(p, i, looked[a], changed, state, gains)
            looked[a] = swaps
            if best < 0:
                continue
            b, d = who[best], items.load[best] - items.load[p]
            at.inter[i] += items.risk[best] - items.risk[p]
            at.inter[j] -= items.risk[best] - items.risk[p]
            _exchange(p, best, items, at, mine, who)
            place[a], place[b], seat[a], seat[b] = j, i, best, p
            swaps += 1
            for n in range(nodes):
                over[n] += d * (part(i, n, source) - part(j, n, source)) * inv[n]
                if n in (i, j) or nodes in (i, j):
                    changed[n] = swaps
            changed[i] = changed[j] = swaps
            for n, x in ((i, p), (j, best)):
                if n < nodes:
                    _refresh(n, first, items, at, sets)
                    visits[n] = 64.0 * bits.shape[1] - common(absent[n], absent[n])
                else:
                    items.leave[x] = 0.0
        if swaps == before:
            break
    return swaps
