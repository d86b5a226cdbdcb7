"""Compiled search for the grouping of experts on nodes: exact swaps on sampled token sets, held as bit sets.

A token visits a node once, however many of its experts lie there. Every expert has the set of sampled tokens that chose
it (one bit a token), every node the set of tokens that do not visit it and of those that have exactly one expert there:
the change of visits by any swap is then a few population counts, exact, without a counter to keep.
Besides the N nodes there is one more place, number N, "everywhere": its experts have a replica on every node, so their
tokens never travel, and their load is spread as the tokens' sources are.
E experts, N nodes, B words of 64 tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.bits import common, ones
from ray_ep.placement.compiled import kernel


class NodeGoals(NamedTuple):
    """What a search for a grouping is told of nodes."""

    source: Any  # [N] share of tokens that start on each node
    target: Any  # [N] load that each node should have
    price: Any  # [N] cost of one sampled token's visit
    stiff: Any  # cost of squared relative deviation from the target
    bulk: Any  # load above which an expert that is everywhere must stay so
    steep: Any  # how much more a visit costs per unit of traffic that the node has already: none becomes the bottleneck


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
def start_grouping(bits: Any, load: Any, room: Any, goals: NodeGoals, order: Any) -> Any:
    """Greedy start: experts in `order` [E], each to the node where it adds least; the first room[N] go everywhere.

    Args:
        bits: [E, B]; load: [E]; room: [N + 1] experts that fit on each node, and everywhere.

    Returns:
        place [E], N for everywhere.
    """
    source, target, price, stiff = goals.source, goals.target, goals.price, goals.stiff
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
def grouping_cost(bits: Any, load: Any, place: Any, goals: NodeGoals) -> Any:
    """Priced visits, steeper where a node has many, + stiff * imbalance of a grouping."""
    source, target, price, stiff, _, steep = goals
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
