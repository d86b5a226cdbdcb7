"""Compiled search for a few moves: exchanges of two slots, from the current placement, that relieve the busiest.

A step waits for its busiest unit and its busiest node. Sums of squares, which lead the search for a whole plan, spend
moves on units near the mean; here both maxima are 16-norms, so that what counts is the top, and the exchange that gains
most a moved slot comes first. The number of moved slots is bounded.
R ranks, S slots, P = R * S positions, U units that must be even, N nodes, B words of 64 tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel
from ray_ep.placement.search import common, common3

HOTTEST = 2
"""Busiest units whose slots are tried in each round, beside those of the busiest node."""


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
    for w in range(words):
        once, twice = np.uint64(0), np.uint64(0)
        for p in range(bits.shape[0]):
            if node_at[p] == n:
                twice |= once & bits[p, w]
                once |= bits[p, w]
        absent[n, w], alone[n, w] = ~once, once & ~twice
    for p in range(bits.shape[0]):
        if node_at[p] == n:
            leave[p] = common(bits[p], alone[n])
        else:
            enter[n, p] = common(bits[p], absent[n])
    return 64.0 * words - common(absent[n], absent[n])


@kernel
def _anew(expert: Any, rank: Any, had: Any) -> Any:
    """1 where a slot of the rank is filled anew by this expert."""
    return 1 if expert >= 0 and not had[expert, rank] else 0


@kernel
def _clashes(who: Any, rank: Any, leaving: Any, expert: Any) -> Any:
    """Whether the rank has the expert already, in another slot than the one that is left."""
    clash = False
    for s in range(who.shape[1]):
        clash |= expert >= 0 and s != leaving and who[rank, s] == expert
    return clash


@kernel
def _gains(p: Any, load: Any, at: Any, loads: Any, flows: Any, ranks: Any, factors: Any, out: Any) -> None:
    """Gain of each exchange of position p -> out [P], in a loop that is vectorised. Upper bounds, see _best."""
    node_at, unit_at = at
    x, inv, x16 = loads
    v, price, v16, leave, enter = flows
    y, even, y16 = ranks
    wx, wv, wy = factors
    i, k = node_at[p], unit_at[p]
    enter_i, joins = enter[i], enter[:, p]
    for q in range(load.shape[0]):
        out[q] = joins[node_at[q]]
    for q in range(load.shape[0]):
        d, fi, fj = load[p] - load[q], leave[p] - enter_i[q], out[q] - leave[q]
        balance = x16[p] + x16[q] - _power(x[p] - d * inv[p]) - _power(x[q] + d * inv[q])
        flow = v16[p] + v16[q] - _power(v[p] - fi * price[p]) - _power(v[q] + fj * price[q])
        arrive = y16[p] + y16[q] - _power(y[p] - d * even) - _power(y[q] + d * even)
        out[q] = (wx if unit_at[q] != k else 0.0) * balance + (wv if node_at[q] != i else 0.0) * flow + wy * arrive


@kernel
def _best(who: Any, items: Any, at: Any, loads: Any, flows: Any, ranks: Any, factors: Any, limits: Any) -> Any:
    """The exchange of positions that gains most a moved slot -> p, q, slots moved; p is -1 where none pays.

    loads and flows: figures of units and nodes by position [P].
    """
    load, bits, fixed, had = items
    node_at, unit_at, hot, alone = at
    v, price, _, leave, enter = flows
    stay, room, least = limits
    slots, best = who.shape[1], (-1, -1, 0)
    rate, gains = 0.0, np.empty(load.shape[0])
    for p in range(load.shape[0]):
        r, a = p // slots, who[p // slots, p % slots]
        if a == -2 or not hot[p]:
            continue
        i = node_at[p]
        _gains(p, load, (node_at, unit_at), loads, flows, ranks, factors, gains)
        for q in range(load.shape[0]):
            if gains[q] <= max(rate, least):
                continue
            j, t, b = node_at[q], q // slots, who[q // slots, q % slots]
            if b == -2 or a == b or (i != j and (fixed[p] or fixed[q])):
                continue
            if _clashes(who, t, q % slots, a) or _clashes(who, r, p % slots, b):
                continue
            new = _anew(a, t, had) + _anew(b, r, had) - _anew(a, r, had) - _anew(b, t, had)
            gain = gains[q]
            if i != j:  # tokens that chose both, alone on their node, keep visiting it
                fi, fj = leave[p] - enter[i, q], enter[j, p] - leave[q]
                gi, gj = fi - common3(bits[p], bits[q], alone[i]), fj + common3(bits[p], bits[q], alone[j])
                less = _power(v[p] - gi * price[p]) - _power(v[p] - fi * price[p])
                less += _power(v[q] + gj * price[q]) - _power(v[q] + fj * price[q])
                gain -= factors[1] * less
            if new <= room and gain > max(stay * new, least, rate * max(new, 1)):
                rate, best = gain / max(new, 1), (p, q, new)
    return best[0], best[1], best[2], rate


@kernel
def _exchange(p: Any, q: Any, who: Any, items: Any, node_at: Any, gains: Any) -> None:
    """Let two positions change experts; gains of nodes that neither is on move with them."""
    load, bits, fixed, _ = items
    leave, enter = gains
    slots = who.shape[1]
    r, s, t, u = p // slots, p % slots, q // slots, q % slots
    who[r, s], who[t, u] = who[t, u], who[r, s]
    load[p], load[q] = load[q], load[p]
    fixed[p], fixed[q] = fixed[q], fixed[p]
    for w in range(bits.shape[1]):
        bits[p, w], bits[q, w] = bits[q, w], bits[p, w]
    for n in range(enter.shape[0]):
        enter[n, p], enter[n, q] = enter[n, q], enter[n, p]
    if node_at[p] == node_at[q]:
        leave[p], leave[q] = leave[q], leave[p]


@kernel
def _norm(x: Any) -> Any:
    """16-norm, 1 where all are 1."""
    return (_power(x).sum() / x.shape[0]) ** (1.0 / 16.0)


@kernel
def _wider(who: Any, items: Any, at: Any, whole: Any, state: Any, factors: Any, limits: Any) -> Any:
    """The expert of position p that best goes everywhere in place of c -> p, c, slots moved, gain a moved slot.

    p is -1 where none pays.
    """
    load, bits, fixed, had = items
    node_at, unit_at, hot, alone, absent = at
    everywhere, source, total, marks = whole
    x, v, y, inv, price, even, leave = state
    stay, room, least = limits
    slots, best, rate = who.shape[1], (-1, -1, 0), 0.0
    before = factors[0] * _norm(x) + factors[1] * _norm(v) + factors[2] * _norm(y)
    for p in range(load.shape[0]):
        a, i = who[p // slots, p % slots], node_at[p]
        if a < 0 or fixed[p] or not hot[p]:
            continue
        for c in range(total.shape[0]):
            if not everywhere[c] or total[c] >= total[a]:
                continue
            x2, y2, new = x.copy(), y.copy(), 0
            for s in range(load.shape[0]):
                r, n = s // slots, node_at[s]
                if s == p:
                    d = total[c] - total[a]
                    new += _anew(c, r, had) - _anew(a, r, had)
                elif who[r, s % slots] == c:
                    d = (total[a] - total[c]) * source[n]
                    new += _anew(a, r, had) - _anew(c, r, had)
                else:
                    continue
                x2[unit_at[s]] += d * inv[unit_at[s]]
                y2[r] += d * even
            fewer = leave[p] - common(marks[c], absent[i]) - common3(marks[c], bits[p], alone[i])
            v2 = v.copy()
            v2[i] -= fewer * price[i]
            gain = before - factors[0] * _norm(x2) - factors[1] * _norm(v2) - factors[2] * _norm(y2)
            if new <= room and gain > max(stay * new, least, rate * max(new, 1)):
                rate, best = gain / max(new, 1), (p, c, new)
    return best[0], best[1], best[2], rate


@kernel
def _widen(p: Any, c: Any, who: Any, items: Any, at: Any, whole: Any, gains: Any) -> None:
    """Put the expert of position p everywhere in place of c."""
    load, bits, fixed, _ = items
    node_at, absent = at[0], at[4]
    everywhere, source, total, marks = whole
    enter = gains[1]
    slots = who.shape[1]
    a = who[p // slots, p % slots]
    everywhere[a], everywhere[c] = True, False
    for s in range(load.shape[0]):
        r, n = s // slots, node_at[s]
        if s != p and who[r, s % slots] == c:
            who[r, s % slots], load[s] = a, total[a] * source[n]
    who[p // slots, p % slots] = c
    load[p], bits[p] = total[c], marks[c]
    for m in range(enter.shape[0]):
        enter[m, p] = common(bits[p], absent[m])


@kernel
def relieve(
    who: Any, load: Any, bits: Any, fixed: Any, where: Any, weights: Any, had: Any, limits: Any, whole: Any
) -> Any:  # fmt: skip
    """Exchange slots while that pays. `who`, `load`, `bits`, `fixed` in place.

    Args:
        who: [R, S] expert of each slot, -1 empty, -2 no slot. load: [P] tokens that each position computes, per token.
        bits: [P, B] sampled tokens that visit the position's node for it. fixed: [P] replicas that stay on their node.
        where: node_of [R], unit_of [R], target [U] load that each unit should have.
        weights: compute, traffic: what the two maxima cost when all is even; price [N] of a sampled token's visit.
        had: [E, R] bool, what was there before; an expert on a rank that had it is no move.
        limits: price of a move, moves that are left, least gain of an exchange (positive).

    Returns:
        moves made.
    """
    node_of, unit_of, target = where
    compute, traffic, inside, price = weights
    stay, left, least = limits
    units, nodes, count, slots = target.shape[0], price.shape[0], load.shape[0], who.shape[1]
    node_at, unit_at, rank_at = np.empty(count, np.int64), np.empty(count, np.int64), np.arange(count) // slots
    y, even = np.zeros(who.shape[0]), who.shape[0] / load.sum()
    inv, x, v, hot = 1.0 / target, np.zeros(units), np.zeros(nodes), np.zeros(count, np.bool_)
    tokens = np.zeros((nodes, bits.shape[1]), np.uint64), np.zeros((nodes, bits.shape[1]), np.uint64)
    gains = np.zeros(count), np.zeros((nodes, count))
    for p in range(count):
        node_at[p], unit_at[p] = node_of[p // slots], unit_of[p // slots]
        x[unit_at[p]] += load[p] * inv[unit_at[p]]
        y[rank_at[p]] += load[p] * even
    for n in range(nodes):
        v[n] = _refresh(n, node_at, bits, tokens, gains) * price[n]
    scale = v.sum() / nodes if v.sum() > 0 else 1.0
    v /= scale
    price = price / scale
    items = load, bits, fixed, had
    moved = 0
    while True:
        x16, v16, y16 = _power(x), _power(v), _power(y)
        over, flow, high = max(x16.sum(), 1e-300), max(v16.sum(), 1e-300), max(y16.sum(), 1e-300)
        # Slopes of the norms, each 1 when all is even.
        wx = compute * (over / units) ** (1.0 / 16.0) / (16.0 * over)
        wv = traffic * (flow / nodes) ** (1.0 / 16.0) / (16.0 * flow)
        wy = inside * (high / y.shape[0]) ** (1.0 / 16.0) / (16.0 * high)
        order = np.argsort(-x)
        hot[:] = node_at == np.argmax(v)
        if inside > 0:
            hot |= rank_at == np.argmax(y)
        for h in range(min(HOTTEST, units)):
            hot |= unit_at == order[h]
        at = node_at, unit_at, hot, tokens[1]
        loads = x[unit_at], inv[unit_at], x16[unit_at]
        flows = v[node_at], price[node_at], v16[node_at], gains[0], gains[1]
        ranks = y[rank_at], even, y16[rank_at]
        p, q, new, rate = _best(who, items, at, loads, flows, ranks, (wx, wv, wy), (stay, left - moved, least))
        around = node_at, unit_at, hot, tokens[1], tokens[0]
        state = x, v, y, inv, price, even, gains[0]
        pw, c, neww, ratew = _wider(who, items, around, whole, state, (compute, traffic, inside), (stay, left - moved, least))
        if pw >= 0 and ratew > rate:
            moved += neww
            _widen(pw, c, who, items, around, whole, gains)
            v[node_at[pw]] = _refresh(node_at[pw], node_at, bits, tokens, gains) * price[node_at[pw]]
            x[:] = 0.0
            y[:] = 0.0
            for s in range(count):
                x[unit_at[s]] += load[s] * inv[unit_at[s]]
                y[rank_at[s]] += load[s] * even
            continue
        if p < 0:
            return moved
        d, moved = load[p] - load[q], moved + new
        x[unit_at[p]] -= d * inv[unit_at[p]]
        x[unit_at[q]] += d * inv[unit_at[q]]
        y[rank_at[p]] -= d * even
        y[rank_at[q]] += d * even
        _exchange(p, q, who, items, node_at, gains)
        if node_at[p] != node_at[q]:
            for n in (node_at[p], node_at[q]):
                v[n] = _refresh(n, node_at, bits, tokens, gains) * price[n]
