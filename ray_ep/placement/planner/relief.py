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

from ray_ep.placement.compiled import kernel
from ray_ep.placement.planner.grouping import common, common3

HOTTEST = 2
"""Busiest units whose slots are tried in each round, beside those of the busiest node."""
NEAR = 0.5
"""Exchanges found together are made together while each gains this share of the best of them, after those before it."""


@kernel
def _power(x: Any) -> Any:
    """x^16: of 64 numbers, 63 even and one a tenth larger, the 16-norm is within 30% of the largest and follows it."""
    y = x * x
    y = y * y
    y = y * y
    return y * y


@kernel
def _refresh(n: Any, node_at: Any, bits: Any, tokens: Any, gains: Any) -> Any:
    """Recompute who visits node n, and what each position would take from it or bring to it; -> visits."""
    absent, alone = tokens
    leave, enter = gains
    words = bits.shape[1]
    here = np.flatnonzero(node_at == n)
    for w in range(words):
        once, twice = np.uint64(0), np.uint64(0)
        for p in here:
            twice |= once & bits[p, w]
            once |= bits[p, w]
        absent[n, w], alone[n, w] = ~once, once & ~twice
    for q in range(bits.shape[0]):
        enter[n, q] = common(bits[q], absent[n])
    for p in here:
        leave[p] = common(bits[p], alone[n])
    return 64.0 * words - common(absent[n], absent[n])


@kernel
def _slope(cost: Any, x: Any) -> Any:
    """By how much cost . 16-norm of x, which is `cost` when all is even, changes with the sum of x^16."""
    total = max(_power(x).sum(), 1e-300)
    return cost * (total / x.shape[0]) ** (1.0 / 16.0) / (16.0 * total)


@kernel
def _gains(p: Any, load: Any, fixed: Any, at: Any, figures: Any, slopes: Any, floor: Any, out: Any) -> Any:
    """Gain of each exchange of position p -> out [P], which holds what p brings to the node of each position.

    In loops that are vectorised. Upper bounds, see _gain; 0 where a replica would leave its node.

    Returns:
        how many are above floor.
    """
    node_at, unit_at = at
    (x, inv, x16), (v, price, v16, leave, enter), (y, even, y16) = figures
    wx, wv, wy = slopes
    i, k, enter_i, none, found = node_at[p], unit_at[p], enter[node_at[p]], np.float32(0), 0
    for q in range(load.shape[0]):
        d, fi, fj = load[p] - load[q], leave[p] - enter_i[q], out[q] - leave[q]
        balance = x16[p] + x16[q] - _power(x[p] - d * inv[p]) - _power(x[q] + d * inv[q])
        flow = v16[p] + v16[q] - _power(v[p] - fi * price[p]) - _power(v[q] + fj * price[q])
        arrive = y16[p] + y16[q] - _power(y[p] - d * even) - _power(y[q] + d * even)
        gain = (wx if unit_at[q] != k else none) * balance + (wv if node_at[q] != i else none) * flow + wy * arrive
        out[q] = none if (node_at[q] != i) & (fixed[p] | fixed[q]) else gain
    for q in range(load.shape[0]):
        found += out[q] > floor
    return found


@kernel
def _top(x: Any) -> Any:
    """Maximum, 1 where there is nothing: no node is visited when every expert is on each."""
    return x.max() if x.max() > 0 else 1.0


@kernel
def _figures(load: Any, at: Any, state: Any, slopes: Any) -> Any:
    """What _gains looks at, by position [P] and in float32, and slopes: maxima are 1, or x^16 might overflow."""
    node_at, unit_at, rank_at = at
    x, v, y, inv, even, price, leave, enter = state
    top = _top(x), _top(v), _top(y)
    single = np.float32
    x1, v1, y1 = (x / top[0])[unit_at], (v / top[1])[node_at], (y / top[2])[rank_at]
    loads = x1.astype(single), (inv / top[0])[unit_at].astype(single), _power(x1).astype(single)
    flows = v1.astype(single), (price / top[1])[node_at].astype(single), _power(v1).astype(single), leave, enter
    arrivals = y1.astype(single), single(even / top[2]), _power(y1).astype(single)
    wx, wv, wy = slopes[0] * _power(top[0]), slopes[1] * _power(top[1]), slopes[2] * _power(top[2])
    return load.astype(single), (loads, flows, arrivals), (single(wx), single(wv), single(wy))


@kernel
def _barred(p: Any, q: Any, flat: Any, rank_at: Any, node_at: Any, fixed: Any) -> Any:
    """Whether two positions may not change experts: a rank would have one twice, or a replica leave its node."""
    a, b, r, t = flat[p], flat[q], rank_at[p], rank_at[q]
    barred = a == -2 or b == -2 or a == b or (node_at[p] != node_at[q] and (fixed[p] or fixed[q]))
    slots = flat.shape[0] // (rank_at[-1] + 1)
    for s in range(slots):
        x, y = t * slots + s, r * slots + s
        barred |= (a >= 0 and x != q and flat[x] == a) or (b >= 0 and y != p and flat[y] == b)
    return barred


@kernel
def _gain(p: Any, q: Any, items: Any, at: Any, state: Any, slopes: Any) -> Any:
    """What the exchange of two positions gains."""
    load, bits = items[:2]
    node_at, unit_at, rank_at, _, _, alone = at
    x, v, y, inv, even, price, leave, enter = state
    i, j, k, m, r, t = node_at[p], node_at[q], unit_at[p], unit_at[q], rank_at[p], rank_at[q]
    d = load[p] - load[q]
    gain = slopes[2] * (_power(y[r]) + _power(y[t]) - _power(y[r] - d * even) - _power(y[t] + d * even))
    if k != m:
        gain += slopes[0] * (_power(x[k]) + _power(x[m]) - _power(x[k] - d * inv[k]) - _power(x[m] + d * inv[m]))
    if i != j:  # tokens that chose both, alone on their node, keep visiting it
        fi = leave[p] - enter[i, q] - common3(bits[p], bits[q], alone[i])
        fj = enter[j, p] - leave[q] + common3(bits[p], bits[q], alone[j])
        gain += slopes[1] * (_power(v[i]) + _power(v[j]) - _power(v[i] - fi * price[i]) - _power(v[j] + fj * price[j]))
    return gain


@kernel
def _scan(flat: Any, items: Any, at: Any, runs: Any, state: Any, slopes: Any, limits: Any) -> Any:
    """For each hot position the partner whose exchange gains most a moved slot -> partner [P], gain a slot [P].

    0 where none pays, or far less than the best exchange of all. runs: positions next to each other on one node start
    there, and P.
    """
    load, _, fixed, had = items
    node_at, unit_at, rank_at, hot = at[:4]
    stay, room, least = limits
    count = load.shape[0]
    partner, rates, top = np.zeros(count, np.int64), np.zeros(count), 0.0
    rough, figures, steps = _figures(load, (node_at, unit_at, rank_at), state, slopes)
    gains, enter = np.empty(count, np.float32), state[7]
    for p in range(count):
        if not hot[p]:
            continue
        a, r, bar = flat[p], rank_at[p], NEAR * top
        floor = max(bar, least)  # in a register: most partners end at it
        for s in range(runs.shape[0] - 1):
            gains[runs[s] : runs[s + 1]] = enter[node_at[runs[s]], p]
        if _gains(p, rough, fixed, (node_at, unit_at), figures, steps, np.float32(floor), gains) == 0:
            continue
        for q in range(count):
            if gains[q] <= floor:
                continue
            b, t = flat[q], rank_at[q]
            new = int(had[a, r]) + int(had[b, t]) - int(had[a, t]) - int(had[b, r])
            if new > room or gains[q] <= max(stay * new, bar * new):
                continue
            if _barred(p, q, flat, rank_at, node_at, fixed):
                continue
            gain = _gain(p, q, items, at, state, slopes)
            if gain > max(stay * new, floor, bar * new):
                partner[p], bar = q, gain / max(new, 1)
                floor, rates[p] = max(bar, least), bar
        top = max(top, rates[p])
    return partner, rates


@kernel
def _best_wide(flat: Any, items: Any, at: Any, whole: Any, state: Any, costs: Any, limits: Any) -> Any:
    """The position p whose expert best goes everywhere in place of expert c, which comes to p; and slots filled anew.

    Few come into question, so they are judged by the maxima themselves: the norm's slope sees little of a large fall.
    limits: price of a move, moves that are left, least gain, and the gain a slot that is to be surpassed.
    """
    load, bits, fixed, had = items
    node_at, unit_at, rank_at, hot, absent, alone = at
    everywhere, total, marks, source = whole
    x, v, y, inv, even, price, leave, _ = state
    compute, traffic, inside = costs
    stay, room, least, rate = limits
    best = -1, -1, 0
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
                rate, best = gain / max(new, 1), (p, c, new)
    return best


@kernel
def _exchange(p: Any, q: Any, flat: Any, items: Any, node_at: Any, gains: Any) -> None:
    """Let two positions change experts; gains of nodes that neither is on move with them."""
    load, bits, fixed, _ = items
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
def _exchange_wide(p: Any, c: Any, flat: Any, items: Any, at: Any, whole: Any, enter: Any) -> None:
    """Put the expert of position p everywhere in place of expert c, which comes to p."""
    load, bits = items[:2]
    node_at, absent = at[0], at[4]
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
def relieve(who: Any, items: Any, whole: Any, where: Any, costs: Any, limits: Any) -> Any:
    """Exchange slots while that pays. `who`, `items` and who is `everywhere` in place.

    Args:
        who: [R, S] expert of each slot, -1 empty, -2 no slot; contiguous.
        items: load [P] tokens that each position computes, per token; bits [P, B] sampled tokens that visit the
            position's node for it, none of what is everywhere; fixed [P] replicas that stay on their node;
            had [E + 1, R] what was there before: an expert on a rank that had it is no move; the last row, for empty
            slots, True.
        whole: everywhere [E] experts with one replica on each node and no other; load [E], bits [E, B] of each expert;
            source [N] share of tokens that start on each node.
        where: node_of [R], unit_of [R], target [U] load that each unit should have, price [N] of a token's visit.
        costs: compute, inside: what the maxima of units and ranks cost when all is even; of nodes: their visits.
        limits: price of a move, moves that are left, least gain of an exchange (positive).

    Returns:
        moves made.
    """
    node_of, unit_of, target, price = where
    load, bits = items[:2]
    stay, left, least = limits
    nodes, count, flat = price.shape[0], load.shape[0], who.ravel()
    rank_at = np.arange(count) // who.shape[1]
    node_at, unit_at = node_of[rank_at], unit_of[rank_at]
    inv, even, v = 1.0 / target, who.shape[0] / max(load.sum(), 1e-300), np.zeros(nodes)
    tokens = np.zeros((nodes, bits.shape[1]), np.uint64), np.zeros((nodes, bits.shape[1]), np.uint64)
    gains = np.zeros(count, np.float32), np.zeros((nodes, count), np.float32)  # of tokens: whole numbers
    runs = np.append(np.flatnonzero(np.append(True, node_at[1:] != node_at[:-1])), count)
    for n in range(nodes):
        v[n] = _refresh(n, node_at, bits, tokens, gains) * price[n]
    costs = costs[0], v.sum(), costs[1]
    scale = v.sum() / nodes if v.sum() > 0 else 1.0
    v /= scale
    price = price / scale
    moved = 0
    while True:
        x = np.bincount(unit_at, load, target.shape[0]) * inv
        y = np.bincount(rank_at, load, who.shape[0]) * even
        slopes = _slope(costs[0], x), _slope(costs[1], v), _slope(costs[2], y)
        order = np.argsort(-x)
        hot = (node_at == np.argmax(v)) | ((rank_at == np.argmax(y)) & (costs[2] > 0))
        for h in range(min(HOTTEST, order.shape[0])):
            hot |= unit_at == order[h]
        at = node_at, unit_at, rank_at, hot, tokens[0], tokens[1]
        state = x, v, y, inv, even, price, gains[0], gains[1]
        partner, rates = _scan(flat, items, at, runs, state, slopes, (stay, left - moved, least))
        top = rates.max()
        wide, c, new = _best_wide(flat, items, at, whole, state, costs, (stay, left - moved, least, top))
        if wide >= 0:
            i = node_at[wide]
            _exchange_wide(wide, c, flat, items, at, whole, gains[1])
            v[i] = _refresh(i, node_at, bits, tokens, gains) * price[i]
            moved += new
            continue
        if top <= 0:
            return moved
        for p in np.argsort(-rates):
            q = partner[p]
            if rates[p] < NEAR * top:
                break
            a, b, r, t, had = flat[p], flat[q], rank_at[p], rank_at[q], items[3]
            new = int(had[a, r]) + int(had[b, t]) - int(had[a, t]) - int(had[b, r])  # below 0: moves taken back
            if moved + new > left or _barred(p, q, flat, rank_at, node_at, items[2]):
                continue
            slopes = _slope(costs[0], x), _slope(costs[1], v), _slope(costs[2], y)
            gain = _gain(p, q, items, at, state, slopes)
            if gain <= max(stay * new, least, NEAR * top * max(new, 1)):
                continue
            i, j, k, m, d = node_at[p], node_at[q], unit_at[p], unit_at[q], load[p] - load[q]
            x[k] -= d * inv[k]
            x[m] += d * inv[m]
            y[rank_at[p]] -= d * even
            y[rank_at[q]] += d * even
            _exchange(p, q, flat, items, node_at, gains)
            moved += new
            if i != j:
                v[i] = _refresh(i, node_at, bits, tokens, gains) * price[i]
                v[j] = _refresh(j, node_at, bits, tokens, gains) * price[j]
