"""Compiled search for the grouping of experts on nodes: exact swaps, judged a place at a time.

Items are kept sorted by place. A swap exchanges two items, so each position keeps its place for good, and the gains of
one item's swaps with all items of a place are one loop over neighbours in memory, which the compiler vectorises.
Those gains leave out that a token which chose both items stays: an upper bound, made exact where it beats the best.
I items, N nodes and place N, "everywhere" (see search.py), B words of 64 tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel
from ray_ep.placement.planner.grouping import away, common, common3, part, visits_of

LEAST = 2e-4
"""Gain that a swap must have, in visits of the mean token: smaller ones take long and fit noise."""


@kernel
def _refresh(n: Any, first: Any, items: Any, at: Any, sets: Any) -> None:
    """Recompute a node's sets of tokens (absent: no visit, alone: one expert there), and all gains from them."""
    bits, leave, absent, alone = sets[0], items[1], sets[1], sets[2]
    enter = at[0]
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
def _terms(i: Any, j: Any, flow: Any, nodes_: Any) -> Any:
    """What is the same for all swaps between places i and j: factors of flow, of load and of risk."""
    cost, visits, steep = flow
    source, over, inv, stiff = nodes_
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
    return (
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
def _gains(p: Any, i: Any, j: Any, first: Any, items: Any, at: Any, terms: Any, out: Any) -> None:
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
def _both(p: Any, q: Any, i: Any, j: Any, items: Any, at: Any, terms: Any, sets: Any) -> Any:
    """What the upper bound counts too much: tokens that chose both items, alone on their node, keep visiting it."""
    bits, alone, leave, enter = sets[0], sets[2], items[1], at[0]
    fi, fj = leave[p] - enter[i, q], leave[q] - enter[j, p]
    a1, a2, b1, b2 = terms[:4]
    x = common3(bits[p], bits[q], alone[i]) if i < alone.shape[0] else 0
    y = common3(bits[p], bits[q], alone[j]) if j < alone.shape[0] else 0
    return x * (a1 - a2 * (2.0 * fi - x)) + y * (b1 - b2 * (2.0 * fj - y))


@kernel
def _exchange(p: Any, q: Any, items: Any, at: Any, bits: Any, who: Any) -> None:
    """Let two positions change items."""
    who[p], who[q] = who[q], who[p]
    for x in items[:3]:
        x[p], x[q] = x[q], x[p]
    for y in at:
        for n in range(y.shape[0]):
            y[n, p], y[n, q] = y[n, q], y[n, p]
    risk = items[3]
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
    items = load[who], np.zeros(count), own, far
    return items, (np.zeros((nodes + 1, count)), np.zeros((nodes + 1, count)), cost), bits[who]


@kernel
def improve_grouping(  # noqa: C901 (one pass over its loops)
    bits: Any, load: Any, risk: Any, place: Any, world: Any, home: Any, stay: Any, order: Any
) -> Any:
    """Swap pairs of items between places while that lowers price . visits + stiff * imbalance + moves. In place.

    Args:
        bits, load, world: as for `start_grouping`; place: [I], changed in place.
        risk: [I, I] covariance of loads; what is everywhere bears none, since it falls on all nodes alike.
        home: [I] where each item is now, -1 for none; stay: [I] cost of each slot that it fills anew.
        order: [sweeps, I] the order in which each sweep seeks partners.

    Returns:
        swaps made.
    """
    source, target, price, stiff, bulk, steep = world
    nodes, count = target.shape[0], load.shape[0]
    who = np.argsort(place, kind="mergesort")
    items, at, mine = _sorted(bits, load, risk, who, nodes, home, stay)
    sets = mine, np.zeros((nodes, bits.shape[1]), np.uint64), np.zeros((nodes, bits.shape[1]), np.uint64)
    first = np.searchsorted(place[who], np.arange(nodes + 2))
    cost, inv, visits = np.zeros(nodes + 1), np.zeros(nodes + 1), np.zeros(nodes + 1)
    cost[:nodes], inv[:nodes] = price, 1.0 / target  # visits of "everywhere" cost nothing
    visits[:nodes] = visits_of(bits, place, nodes)
    over = np.full(nodes, -1.0)  # relative deviation from the target
    for n in range(nodes + 1):
        if n < nodes:
            _refresh(n, first, items, at, sets)
        for p in range(first[n], first[n + 1]):
            at[1][n] += items[3][p]
            for m in range(nodes):
                over[m] += items[0][p] * part(n, m, source) * inv[m]
    seat, gains = np.argsort(who), np.empty(count)
    looked, changed = np.full(count, -1), np.zeros(nodes + 1, np.int64)
    swaps = 0
    for sweep in range(order.shape[0]):
        before = swaps
        for a in order[sweep]:
            p, i = seat[a], place[a]
            best, best_j, best_gain = -1, -1, LEAST
            for j in range(nodes + 1):
                if i == j or max(changed[i], changed[j]) <= looked[a] or (i == nodes and items[0][p] > bulk):
                    continue
                terms = _terms(i, j, (cost, visits, steep), (source, over, inv, stiff))
                _gains(p, i, j, first, items, at, terms, gains)
                for q in range(first[j], first[j + 1]):
                    gain = gains[q - first[j]]
                    if gain <= best_gain or (j == nodes and items[0][q] > bulk):
                        continue
                    gain -= _both(p, q, i, j, items, at, terms, sets)
                    if gain > best_gain:
                        best, best_j, best_gain = q, j, gain
            looked[a] = swaps
            if best < 0:
                continue
            j, b, d = best_j, who[best], items[0][best] - items[0][p]
            at[1][i] += items[3][best] - items[3][p]
            at[1][j] -= items[3][best] - items[3][p]
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
                    visits[n] = 64.0 * bits.shape[1] - common(sets[1][n], sets[1][n])
                else:
                    items[1][x] = 0.0
        if swaps == before:
            break
    return swaps
