"""Compiled search for a few moves: exchanges of two slots, from the current placement, that relieve the busiest.

A step waits for its busiest unit, its busiest node, and inside nodes for the rank at which most tokens arrive. Sums of
squares, which lead the search for a whole plan, spend moves on units near the mean; here the maxima are 16-norms, so
that what counts is the top, and the exchange that gains most a moved slot comes first. Where an expert outgrows one of
those that are everywhere, the two change parts. The number of moved slots is bounded.
R ranks, S slots, P = R * S positions, U units that must be even, N nodes, B words of 64 tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.bits import common, common3
from ray_ep.placement.compiled import kernel
from ray_ep.placement.planner.gains import (
    Busy,
    Everywhere,
    ExchangeLimits,
    Held,
    PositionSeats,
    Slopes,
    TopCosts,
    Units,
    WideExchange,
    barred,
    exact_gain,
    figures_of,
    gains_of,
    refreshed_visits,
    slope,
)

HOTTEST = 2
"""Units. Each round tries the slots of this many of the busiest, beside those of the busiest node."""
NEAR = 0.5
"""Share of the best gain. Exchanges found in one scan are made together while each still gains this share."""


@kernel
def _scan(
    flat: Any, held: Held, at: PositionSeats, runs: Any, busy: Busy, slopes: Slopes, limits: ExchangeLimits
) -> Any:
    """For each hot position the partner whose exchange gains most a moved slot -> partner [P], gain a slot [P].

    0 where none pays, or far less than the best exchange of all. runs: positions next to each other on one node start
    there, and P.
    """
    load, _, fixed, had = held
    node_at, unit_at, rank_at, hot, _, _ = at
    stay, room, least = limits
    count = load.shape[0]
    partner, rates, top = np.zeros(count, np.int64), np.zeros(count), 0.0
    rough, figures, steps = figures_of(load, at, busy, slopes)
    gains, enter = np.empty(count, np.float32), busy.enter
    for p in range(count):
        if not hot[p]:
            continue
        a, r, bar = flat[p], rank_at[p], NEAR * top
        floor = max(bar, least)  # in a register: most partners end at it
        for s in range(runs.shape[0] - 1):
            gains[runs[s] : runs[s + 1]] = enter[node_at[runs[s]], p]
        if gains_of(p, rough, fixed, (node_at, unit_at), figures, steps, np.float32(floor), gains) == 0:
            continue
        for q in range(count):
            if gains[q] <= floor:
                continue
            b, t = flat[q], rank_at[q]
            new = int(had[a, r]) + int(had[b, t]) - int(had[a, t]) - int(had[b, r])
            if new > room or gains[q] <= max(stay * new, bar * new):
                continue
            if barred(p, q, flat, rank_at, node_at, fixed):
                continue
            gain = exact_gain(p, q, held, at, busy, slopes)
            if gain > max(stay * new, floor, bar * new):
                partner[p], bar = q, gain / max(new, 1)
                floor, rates[p] = max(bar, least), bar
        top = max(top, rates[p])
    return partner, rates


@kernel
def _best_wide(
    flat: Any, held: Held, at: PositionSeats, whole: Everywhere, busy: Busy, costs: TopCosts, limits: ExchangeLimits,
    rate: Any,
) -> Any:  # fmt: skip
    """The position p whose expert best goes everywhere in place of expert c, which comes to p; and slots filled anew.

    Few come into question, so they are judged by the maxima themselves: the norm's slope sees little of a large fall.
    rate: the gain a slot that is to be surpassed.
    """
    load, bits, fixed, had = held
    node_at, unit_at, rank_at, hot, absent, alone = at
    everywhere, total, marks, source = whole
    x, v, y, inv, even, price, leave, _ = busy
    compute, traffic, inside = costs
    stay, room, least = limits
    best = WideExchange(-1, -1, 0)
    busiest, fullest, crowded = x.max(), v.max(), y.max()
    for c in range(total.shape[0]):
        if not everywhere[c]:
            continue
        places = np.flatnonzero(flat == c)
        for p in range(load.shape[0]):
            a, i = flat[p], node_at[p]
            if a < 0 or fixed[p] or not hot[p] or total[c] >= total[a]:
                continue
            k, d = unit_at[p], total[a] - total[c]
            most = compute * d * inv[k] if x[k] == busiest else 0.0  # only what falls at the top is a gain
            most += traffic * leave[p] * price[i] if v[i] == fullest else 0.0
            most += inside * d * even if y[rank_at[p]] == crowded else 0.0
            if most <= max(least, rate):
                continue
            x2, v2, y2 = x.copy(), v.copy(), y.copy()
            new = int(had[a, rank_at[p]]) - int(had[c, rank_at[p]])
            x2[k] -= d * inv[k]
            y2[rank_at[p]] -= d * even
            for s in places:
                part = d * source[node_at[s]]
                new += int(had[c, rank_at[s]]) - int(had[a, rank_at[s]])
                x2[unit_at[s]] += part * inv[unit_at[s]]
                y2[rank_at[s]] += part * even
            enters = common(marks[c], absent[i]) + common3(marks[c], bits[p], alone[i])
            v2[i] += (enters - leave[p]) * price[i]
            gain = compute * (busiest - x2.max()) + traffic * (fullest - v2.max()) + inside * (crowded - y2.max())
            if new <= room and gain > max(stay * new, least, rate * max(new, 1)):
                rate, best = gain / max(new, 1), WideExchange(p, c, new)
    return best


@kernel
def _exchange(p: Any, q: Any, flat: Any, held: Held, node_at: Any, gains: Any) -> None:
    """Let two positions change experts; gains of nodes that neither is on move with them."""
    load, bits, fixed, _ = held
    leave, enter = gains
    flat[p], flat[q] = flat[q], flat[p]
    load[p], load[q] = load[q], load[p]
    fixed[p], fixed[q] = fixed[q], fixed[p]
    for w in range(bits.shape[1]):
        bits[p, w], bits[q, w] = bits[q, w], bits[p, w]
    for n in range(enter.shape[0]):
        enter[n, p], enter[n, q] = enter[n, q], enter[n, p]
    if node_at[p] == node_at[q]:
        leave[p], leave[q] = leave[q], leave[p]


@kernel
def _exchange_wide(p: Any, c: Any, flat: Any, held: Held, at: PositionSeats, whole: Everywhere, enter: Any) -> None:
    """Put the expert of position p everywhere in place of expert c, which comes to p."""
    load, bits, node_at, absent = held.load, held.bits, at.node, at.absent
    everywhere, total, marks, source = whole
    a = flat[p]
    everywhere[a], everywhere[c] = True, False
    for s in range(load.shape[0]):
        if flat[s] == c:
            flat[s], load[s] = a, total[a] * source[node_at[s]]
    flat[p], load[p], bits[p] = c, total[c], marks[c]
    for n in range(enter.shape[0]):
        enter[n, p] = common(marks[c], absent[n])


@kernel
def _exchange_together(
    flat: Any, held: Held, at: PositionSeats, busy: Busy, costs: TopCosts, limits: ExchangeLimits, partner: Any,
    rates: Any,
) -> Any:  # fmt: skip
    """Make exchanges [P] of positions and their partners, best first, while they gain as foreseen; -> moves made."""
    load, bits, fixed, had = held
    node_at, unit_at, rank_at, _, absent, alone = at
    x, v, y, inv, even, price, leave, enter = busy
    stay, left, least = limits
    tokens, gains, top, moved = (absent, alone), (leave, enter), rates.max(), 0
    for p in np.argsort(-rates):
        q = partner[p]
        if rates[p] < NEAR * top:
            break
        a, b, r, t = flat[p], flat[q], rank_at[p], rank_at[q]
        new = int(had[a, r]) + int(had[b, t]) - int(had[a, t]) - int(had[b, r])  # below 0: moves taken back
        if moved + new > left or barred(p, q, flat, rank_at, node_at, fixed):
            continue
        slopes = Slopes(slope(costs.compute, x), slope(costs.traffic, v), slope(costs.inside, y))
        gain = exact_gain(p, q, held, at, busy, slopes)
        if gain <= max(stay * new, least, NEAR * top * max(new, 1)):
            continue
        i, j, k, m, d = node_at[p], node_at[q], unit_at[p], unit_at[q], load[p] - load[q]
        x[k] -= d * inv[k]
        x[m] += d * inv[m]
        y[r] -= d * even
        y[t] += d * even
        _exchange(p, q, flat, held, node_at, gains)
        moved += new
        if i != j:
            v[i] = refreshed_visits(i, node_at, bits, tokens, gains) * price[i]
            v[j] = refreshed_visits(j, node_at, bits, tokens, gains) * price[j]
    return moved


@kernel
def relieve(who: Any, held: Held, whole: Everywhere, where: Units, prices: Any, limits: ExchangeLimits) -> Any:
    """Exchange slots while that pays. `who`, `held` and who is everywhere in place.

    Args:
        who: [R, S] expert of each slot, -1 empty, -2 no slot; contiguous.
        prices: compute, inside: what the maxima of units and ranks cost when all is even; of nodes: their visits.

    Returns:
        moves made.
    """
    node_of, unit_of, target, price = where
    load, bits = held.load, held.bits
    stay, left, least = limits
    nodes, count, flat = price.shape[0], load.shape[0], who.ravel()
    rank_at = np.arange(count) // who.shape[1]
    node_at, unit_at = node_of[rank_at], unit_of[rank_at]
    inv, even, v = 1.0 / target, who.shape[0] / max(load.sum(), 1e-300), np.zeros(nodes)
    tokens = np.zeros((nodes, bits.shape[1]), np.uint64), np.zeros((nodes, bits.shape[1]), np.uint64)
    gains = np.zeros(count, np.float32), np.zeros((nodes, count), np.float32)  # of tokens: whole numbers
    runs = np.append(np.flatnonzero(np.append(True, node_at[1:] != node_at[:-1])), count)
    for n in range(nodes):
        v[n] = refreshed_visits(n, node_at, bits, tokens, gains) * price[n]
    costs = TopCosts(prices[0], v.sum(), prices[1])
    scale = v.sum() / nodes if v.sum() > 0 else 1.0
    v /= scale
    price = price / scale
    moved = 0
    while True:
        x = np.bincount(unit_at, load, target.shape[0]) * inv
        y = np.bincount(rank_at, load, who.shape[0]) * even
        slopes = Slopes(slope(costs.compute, x), slope(costs.traffic, v), slope(costs.inside, y))
        order = np.argsort(-x)
        hot = (node_at == np.argmax(v)) | ((rank_at == np.argmax(y)) & (costs.inside > 0))
        for h in range(min(HOTTEST, order.shape[0])):
            hot |= unit_at == order[h]
        at = PositionSeats(node_at, unit_at, rank_at, hot, tokens[0], tokens[1])
        busy = Busy(x, v, y, inv, even, price, gains[0], gains[1])
        now = ExchangeLimits(stay, left - moved, least)
        partner, rates = _scan(flat, held, at, runs, busy, slopes, now)
        top = rates.max()
        wide, c, new = _best_wide(flat, held, at, whole, busy, costs, now, top)
        if wide >= 0:
            i = node_at[wide]
            _exchange_wide(wide, c, flat, held, at, whole, gains[1])
            v[i] = refreshed_visits(i, node_at, bits, tokens, gains) * price[i]
            moved += new
            continue
        if top <= 0:
            return moved
        moved += _exchange_together(flat, held, at, busy, costs, now, partner, rates)
