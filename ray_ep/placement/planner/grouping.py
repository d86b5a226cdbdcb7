"""Compiled search for the grouping of experts on nodes: exact swaps on sampled token sets, held as bit sets.

A token visits a node once, however many of its experts lie there. Every expert has the set of sampled tokens that chose
it (one bit a token), every node the set of tokens that do not visit it and of those that have exactly one expert there:
the change of visits by any swap is then a few population counts, exact, without a counter to keep.
Besides the N nodes there is one more place, number N, "everywhere": its experts have a replica on every node, so their
tokens never travel, and their load is spread as the tokens' sources are.
E experts, N nodes, B words of 64 tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel

_M1, _M2, _M4 = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
_H, _S1, _S2, _S4, _S56 = (
    np.uint64(0x0101010101010101),
    np.uint64(1),
    np.uint64(2),
    np.uint64(4),
    np.uint64(56),
)


@kernel
def ones(x: Any) -> Any:
    """Bits set in a word; LLVM turns this into its population count."""
    x = x - ((x >> _S1) & _M1)
    x = (x & _M2) + ((x >> _S2) & _M2)
    x = (x + (x >> _S4)) & _M4
    return (x * _H) >> _S56


@kernel
def common(a: Any, b: Any) -> Any:
    """Tokens in both sets [B]."""
    total = np.uint64(0)
    for w in range(a.shape[0]):
        total += ones(a[w] & b[w])
    return np.int64(total)


@kernel
def common3(a: Any, b: Any, c: Any) -> Any:
    """Tokens in all three sets [B]."""
    total = np.uint64(0)
    for w in range(a.shape[0]):
        total += ones(a[w] & b[w] & c[w])
    return np.int64(total)


@kernel
def token_bits(sample: Any, experts: int) -> Any:
    """sample [T, K] -> [E, B] which tokens chose each expert."""
    bits = np.zeros((experts, (sample.shape[0] + 63) // 64), np.uint64)
    for t in range(sample.shape[0]):
        for k in range(sample.shape[1]):
            bits[sample[t, k], t >> 6] |= np.uint64(1) << np.uint64(t & 63)
    return bits


@kernel
def part(place: Any, n: Any, source: Any) -> Any:
    """Share of an expert's load that node n bears when the expert lies at `place`."""
    if place == source.shape[0]:
        return source[n]
    return 1.0 if place == n else 0.0


@kernel
def away(place: Any, home: Any, nodes: Any) -> Any:
    """Slots that an expert fills anew: those of every other node when it goes everywhere, none where it is already."""
    if place == home or home == nodes or home < 0:
        return 0.0
    return float(nodes - 1) if place == nodes else 1.0


@kernel
def start_grouping(bits: Any, load: Any, room: Any, world: Any, order: Any) -> Any:
    """Greedy start: experts in `order` [E], each to the node where it adds least; the first room[N] go everywhere.

    Args:
        bits: [E, B]; load: [E]; room: [N + 1] experts that fit on each node, and everywhere.
        world: source [N] share of tokens that start on each node; target [N] load that each node should have;
            price [N] cost of one sampled token's visit; stiff: cost of squared relative deviation from the target;
            bulk: load above which an expert that is everywhere must stay so; steep: how much more a visit to a node
            costs per unit of traffic that the node has already, so that no node becomes the bottleneck.

    Returns:
        place [E], N for everywhere.
    """
    source, target, price, stiff = world[:4]
    nodes = target.shape[0]
    place = np.full(load.shape[0], -1, np.int64)
    left, weight = room.copy(), np.zeros(nodes)
    absent = np.full((nodes, bits.shape[1]), ~np.uint64(0), np.uint64)
    for e in order:
        if left[nodes] > 0:
            left[nodes] -= 1
            place[e] = nodes
            for n in range(nodes):
                weight[n] += load[e] * source[n]
            continue
        best, best_cost = -1, np.inf
        for n in range(nodes):
            if left[n] > 0:
                after, before = (weight[n] + load[e]) / target[n], weight[n] / target[n]
                cost = price[n] * common(bits[e], absent[n]) + stiff * (after * after - before * before)
                if cost < best_cost:
                    best, best_cost = n, cost
        place[e] = best
        left[best] -= 1
        weight[best] += load[e]
        for w in range(bits.shape[1]):
            absent[best, w] &= ~bits[e, w]
    return place


@kernel
def visits_of(bits: Any, place: Any, nodes: int) -> Any:
    """[N] sampled tokens that visit each node."""
    out = np.zeros(nodes)
    for n in range(nodes):
        for w in range(bits.shape[1]):
            here = np.uint64(0)
            for e in range(place.shape[0]):
                if place[e] == n:
                    here |= bits[e, w]
            out[n] += np.float64(ones(here))
    return out


@kernel
def grouping_cost(bits: Any, load: Any, place: Any, world: Any) -> Any:
    """Priced visits, steeper where a node has many, + stiff * imbalance of a grouping."""
    source, target, price, stiff, _, steep = world
    total = 0.0
    flow = price * visits_of(bits, place, target.shape[0])
    for n in range(target.shape[0]):
        weight = 0.0
        for e in range(place.shape[0]):
            weight += load[e] * part(place[e], n, source)
        x = weight / target[n] - 1.0
        total += flow[n] + steep * flow[n] * flow[n] + stiff * x * x
    return total


@kernel
def split_bits(bits: Any, item: Any) -> Any:
    """Deal each expert's tokens out to its items in turn: [E, B], item [I] expert of each -> [I, B]."""
    total = np.zeros(bits.shape[0], np.int64)
    number = np.empty(item.shape[0], np.int64)
    for x in range(item.shape[0]):
        number[x] = total[item[x]]
        total[item[x]] += 1
    out = np.zeros((item.shape[0], bits.shape[1]), np.uint64)
    for x in range(item.shape[0]):
        e = item[x]
        if total[e] == 1:
            out[x] = bits[e]
            continue
        turn = 0
        for w in range(bits.shape[1]):
            left = bits[e, w]
            while left:
                rest = left & (left - np.uint64(1))
                if turn % total[e] == number[x]:
                    out[x, w] |= left ^ rest
                turn += 1
                left = rest
    return out


@kernel
def covariance(sets: Any, load: Any) -> Any:
    """[E, E] how much more often than by chance two experts are in one of sets [T, K], per token (load [E] of each)."""
    experts, tokens = load.shape[0], sets.shape[0]
    count, out = np.zeros((experts, experts), np.int32), np.empty((experts, experts))
    for t in range(tokens):
        for a in sets[t]:
            for b in sets[t]:
                count[a, b] += 1
    for a in range(experts):
        for b in range(experts):
            out[a, b] = count[a, b] / tokens - load[a] * load[b]
    return out
