"""Compiled: what exchanges of two slots gain, as relief.py judges them, in 16-norms of what is busy.

R ranks, S slots, P = R * S positions, U units that must be even, N nodes, E experts, B words of 64 tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.bits import common, common3
from ray_ep.placement.compiled import kernel


class Held(NamedTuple):
    """What positions hold [P]."""

    load: Any  # tokens that a position computes, per token
    bits: Any  # [P, B] sampled tokens that visit its node for it, none of what is everywhere
    fixed: Any  # bool: a replica that stays on its node
    had: Any  # bool [E + 1, R] what was there before: an expert on a rank that had it is no move; last row True


class Everywhere(NamedTuple):
    """Experts with one replica on each node and no other."""

    these: Any  # bool [E]
    load: Any  # [E] of each expert
    bits: Any  # [E, B] of each expert
    source: Any  # [N] share of tokens that start on each node


class Units(NamedTuple):
    """What the step waits for."""

    node_of: Any  # [R]
    unit_of: Any  # [R]
    target: Any  # [U] load that each unit should have
    price: Any  # [N] of a token's visit


class TopCosts(NamedTuple):
    """What the maxima of units, of nodes and of ranks cost when all is even."""

    compute: Any
    traffic: Any
    inside: Any


class ExchangeLimits(NamedTuple):
    """What exchanges must keep to."""

    stay: Any  # price of a move
    left: Any  # moves that are left
    least: Any  # gain of an exchange, positive


class PositionSeats(NamedTuple):
    """Where positions are [P], which of them are looked at, and who visits nodes."""

    node: Any
    unit: Any
    rank: Any
    hot: Any  # bool: its slot may relieve the busiest
    absent: Any  # [N, B] sampled tokens that do not visit a node
    alone: Any  # [N, B] those with one position there


class Busy(NamedTuple):
    """How busy units, nodes and ranks are, relative to their means; and what changes that."""

    unit: Any
    node: Any
    rank: Any
    inv: Any  # [U] 1 / target
    even: Any  # 1 / a rank's mean load
    price: Any  # [N]
    leave: Any  # [P] sampled tokens that a position would take from its node
    enter: Any  # [N, P] and bring to another


class Slopes(NamedTuple):
    """By how much the cost changes with the sums of x^16 of units, nodes, ranks."""

    unit: Any
    node: Any
    rank: Any


class WideExchange(NamedTuple):
    """What the best wide exchange is: of the expert at a position with one that is everywhere; position -1: none."""

    position: Any
    expert: Any
    moves: Any


class Loads(NamedTuple):
    """Of the units of positions, in float32: how busy, 1 / target, x^16."""

    x: Any
    inv: Any
    x16: Any


class Flows(NamedTuple):
    """Of the nodes of positions, in float32."""

    v: Any
    price: Any
    v16: Any
    leave: Any
    enter: Any


class Arrivals(NamedTuple):
    """Of the ranks of positions, in float32."""

    y: Any
    even: Any
    y16: Any


@kernel
def power(x: Any) -> Any:
    """x^16: of 64 numbers, 63 even and one a tenth larger, the 16-norm is within 30% of the largest and follows it."""
    y = x * x
    y = y * y
    y = y * y
    return y * y


@kernel
def refreshed_visits(n: Any, node_at: Any, bits: Any, tokens: Any, gains: Any) -> Any:
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
def slope(cost: Any, x: Any) -> Any:
    """By how much cost . 16-norm of x, which is `cost` when all is even, changes with the sum of x^16."""
    total = max(power(x).sum(), 1e-300)
    return cost * (total / x.shape[0]) ** (1.0 / 16.0) / (16.0 * total)


@kernel
def gains_of(p: Any, load: Any, fixed: Any, at: Any, figures: Any, slopes: Slopes, floor: Any, out: Any) -> Any:
    """Gain of each exchange of position p -> out [P], which holds what p brings to the node of each position.

    In loops that are vectorised. Upper bounds, see exact_gain; 0 where a replica would leave its node.

    Returns:
        how many are above floor.
    """
    node_at, unit_at = at
    (x, inv, x16), (v, price, v16, leave, enter), (y, even, y16) = figures
    wx, wv, wy = slopes
    i, k, enter_i, none, found = node_at[p], unit_at[p], enter[node_at[p]], np.float32(0), 0
    for q in range(load.shape[0]):
        d, fi, fj = load[p] - load[q], leave[p] - enter_i[q], out[q] - leave[q]
        balance = x16[p] + x16[q] - power(x[p] - d * inv[p]) - power(x[q] + d * inv[q])
        flow = v16[p] + v16[q] - power(v[p] - fi * price[p]) - power(v[q] + fj * price[q])
        arrive = y16[p] + y16[q] - power(y[p] - d * even) - power(y[q] + d * even)
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
def figures_of(load: Any, at: PositionSeats, busy: Busy, slopes: Slopes) -> Any:
    """What gains_of looks at, by position [P] and in float32, and slopes: maxima are 1, or x^16 might overflow."""
    node_at, unit_at, rank_at = at.node, at.unit, at.rank
    x, v, y, inv, even, price, leave, enter = busy
    top = _top(x), _top(v), _top(y)
    single = np.float32
    x1, v1, y1 = (x / top[0])[unit_at], (v / top[1])[node_at], (y / top[2])[rank_at]
    loads = Loads(x1.astype(single), (inv / top[0])[unit_at].astype(single), power(x1).astype(single))
    price1 = (price / top[1])[node_at].astype(single)
    flows = Flows(v1.astype(single), price1, power(v1).astype(single), leave, enter)
    arrivals = Arrivals(y1.astype(single), single(even / top[2]), power(y1).astype(single))
    wx, wv, wy = slopes.unit * power(top[0]), slopes.node * power(top[1]), slopes.rank * power(top[2])
    return load.astype(single), (loads, flows, arrivals), Slopes(single(wx), single(wv), single(wy))


@kernel
def barred(p: Any, q: Any, flat: Any, rank_at: Any, node_at: Any, fixed: Any) -> Any:
    """Whether two positions may not change experts: a rank would have one twice, or a replica leave its node."""
    a, b, r, t = flat[p], flat[q], rank_at[p], rank_at[q]
    barred = a == -2 or b == -2 or a == b or (node_at[p] != node_at[q] and (fixed[p] or fixed[q]))
    slots = flat.shape[0] // (rank_at[-1] + 1)
    for s in range(slots):
        x, y = t * slots + s, r * slots + s
        barred |= (a >= 0 and x != q and flat[x] == a) or (b >= 0 and y != p and flat[y] == b)
    return barred


@kernel
def exact_gain(p: Any, q: Any, held: Held, at: PositionSeats, busy: Busy, slopes: Slopes) -> Any:
    """What the exchange of two positions gains."""
    load, bits = held.load, held.bits
    node_at, unit_at, rank_at, _, _, alone = at
    x, v, y, inv, even, price, leave, enter = busy
    i, j, k, m, r, t = node_at[p], node_at[q], unit_at[p], unit_at[q], rank_at[p], rank_at[q]
    d = load[p] - load[q]
    gain = slopes.rank * (power(y[r]) + power(y[t]) - power(y[r] - d * even) - power(y[t] + d * even))
    if k != m:
        gain += slopes.unit * (power(x[k]) + power(x[m]) - power(x[k] - d * inv[k]) - power(x[m] + d * inv[m]))
    if i != j:  # tokens that chose both, alone on their node, keep visiting it
        fi = leave[p] - enter[i, q] - common3(bits[p], bits[q], alone[i])
        fj = enter[j, p] - leave[q] + common3(bits[p], bits[q], alone[j])
        gain += slopes.node * (power(v[i]) + power(v[j]) - power(v[i] - fi * price[i]) - power(v[j] + fj * price[j]))
    return gain
