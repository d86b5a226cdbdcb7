"""Compiled search for small layers (few experts, as Mixtral's): slot by slot, on the exact expected cost.

With few experts replicas lie on some nodes and not on others, so what a token visits depends on where it starts and on
which far replica it draws. Few experts also have few distinct token sets: their expectation is summed, and every
change of a slot is judged by it. The cost of a sweep grows with slots^2, sets and nodes^2: for small layers only.
E experts, R ranks, S slots, N nodes, U distinct token sets of K experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.compiled import kernel

BUSIEST = 0.7
"""Share of the cost that the maxima make up; the sums make up the rest. A step waits for the maxima."""


class LayerGoals(NamedTuple):
    """What the search is told of the cluster."""

    node_of: Any  # [R]
    unit_of: Any  # [R] what is to be balanced: the rank itself, or its node
    source: Any  # [R] share of tokens that start on a rank
    target: Any  # [U] load that each unit should have
    compute: Any  # time of a unit at its target, in visits
    price: Any  # [N, N] of a token from a node (row) that visits another
    stiff: Any  # price of unbalance


@kernel
def _split(slots: Any, node_of: Any, source: Any, near: Any, far: Any, part: Any) -> Any:
    """Where tokens go under nearest-replica dispatch, replicas drawn evenly; whether every expert has a slot.

    Fills near [E, N] (the node serves its own tokens), far [E, N] (share of far tokens that a node gets) and
    part [E, R] (share of the expert's tokens that a rank computes).
    """
    experts, nodes = near.shape
    ranks = slots.shape[0]
    for e in range(experts):
        hosts = 0
        on = np.zeros(nodes)
        held = np.zeros(ranks)
        for r in range(ranks):
            for s in range(slots.shape[1]):
                if slots[r, s] == e:
                    held[r] = 1.0
            hosts += int(held[r])
            on[node_of[r]] += held[r]
        if hosts == 0:
            return False
        away = 0.0  # tokens that start on nodes without the expert
        home = np.zeros(nodes)  # tokens that start on a rank without it, on a node with it
        for r in range(ranks):
            if on[node_of[r]] == 0:
                away += source[r]
            elif held[r] == 0:
                home[node_of[r]] += source[r]
        for n in range(nodes):
            near[e, n] = on[n] > 0
            far[e, n] = on[n] / hosts
        for r in range(ranks):
            part[e, r] = 0.0
            if held[r] > 0:
                part[e, r] = source[r] + home[node_of[r]] / on[node_of[r]] + away / hosts
    return True


@kernel
def _cost(  # noqa: C901 (one pass over its loops)
    sets: Any, weight: Any, load: Any, risk: Any, slots: Any, goals: LayerGoals, scratch: Any
) -> Any:
    """Expected time of a layer, in visits: BUSIEST of the slowest unit and the busiest node, the rest of all of them.

    The sums (price of visits + stiff * (squared relative deviation of loads + risk)) lead the search over changes that
    leave the busiest as it is, and keep it from leaning on figures that the next tokens will not repeat.
    """
    node_of, unit_of, source, target, compute, price, stiff = goals
    near, far, part = scratch
    if not _split(slots, node_of, source, near, far, part):
        return np.inf
    nodes, units, experts = price.shape[0], target.shape[0], load.shape[0]
    start = np.zeros(nodes)
    for r in range(node_of.shape[0]):
        start[node_of[r]] += source[r]
    total = 0.0
    into, out = np.zeros(nodes), np.zeros(nodes)
    for u in range(sets.shape[0]):
        for s in range(nodes):
            for n in range(nodes):
                if n == s or start[s] == 0:
                    continue
                missed = 1.0
                for k in range(sets.shape[1]):
                    e = sets[u, k]
                    if near[e, s] == 0:
                        missed *= 1.0 - far[e, n]
                flow = weight[u] * start[s] * price[s, n] * (1.0 - missed)
                total += flow
                out[s] += flow
                into[n] += flow
    busiest, slowest = 0.0, 0.0
    for n in range(nodes):
        if start[n] > 0:
            busiest = max(busiest, max(out[n], into[n]) / start[n])
    share = np.zeros((units, experts))
    for r in range(unit_of.shape[0]):
        for e in range(experts):
            share[unit_of[r], e] += part[e, r]
    for u in range(units):
        have, var = 0.0, 0.0
        for e in range(experts):
            have += share[u, e] * load[e]
            if share[u, e] > 0:
                for f in range(experts):
                    var += share[u, e] * share[u, f] * risk[e, f]
        slowest = max(slowest, have / target[u])
        x = have / target[u] - 1.0
        total += stiff * (x * x + var / (target[u] * target[u]))
    return BUSIEST * (busiest + compute * slowest) + (1.0 - BUSIEST) * total


@kernel
def _holds(slots: Any, rank: Any, expert: Any) -> Any:
    return np.any(slots[rank] == expert)


@kernel
def _descend(sets: Any, weight: Any, load: Any, risk: Any, slots: Any, goals: LayerGoals, scratch: Any) -> Any:
    """Change single slots, or exchange two, while that lowers the cost. `slots` in place; -> cost."""
    ranks, room, experts = slots.shape[0], slots.shape[1], load.shape[0]
    cost = _cost(sets, weight, load, risk, slots, goals, scratch)
    better = True
    while better:
        better = False
        for r in range(ranks):
            for s in range(room):
                if slots[r, s] == -2:
                    continue
                for e in range(experts):
                    old = slots[r, s]
                    if _holds(slots, r, e):
                        continue
                    slots[r, s] = e
                    now = _cost(sets, weight, load, risk, slots, goals, scratch)
                    if now < cost - 1e-12:
                        cost, better = now, True
                    else:
                        slots[r, s] = old
                for q in range(r + 1, ranks):
                    for t in range(room):
                        a, b = slots[r, s], slots[q, t]
                        if b == -2 or a == b or _holds(slots, r, b) or _holds(slots, q, a):
                            continue
                        slots[r, s], slots[q, t] = b, a
                        now = _cost(sets, weight, load, risk, slots, goals, scratch)
                        if now < cost - 1e-12:
                            cost, better = now, True
                        else:
                            slots[r, s], slots[q, t] = a, b
    return cost


@kernel
def refine(sets: Any, weight: Any, load: Any, risk: Any, slots: Any, goals: LayerGoals, kicks: Any) -> Any:
    """Descend from `slots`, then from kicked copies of the best, keeping what is better (iterated local search).

    Args:
        sets: [U, K] distinct token sets; weight: [U] share of the tokens with each.
        load: [E] tokens of each expert per token; risk: [E, E] covariance that is to be kept off any one unit.
        slots: [R, S] expert of each slot, -1 empty, -2 no slot.
        kicks: [rounds, 2, 2] pairs of (rank, slot) that change places before each descent.

    Returns:
        slots [R, S] and their cost.
    """
    experts, nodes, ranks = load.shape[0], goals.price.shape[0], slots.shape[0]
    scratch = (np.zeros((experts, nodes)), np.zeros((experts, nodes)), np.zeros((experts, ranks)))
    best = slots.copy()
    cost = _descend(sets, weight, load, risk, best, goals, scratch)
    for kick in kicks:
        trial = best.copy()
        for pair in kick:
            r, s, q, t = pair
            a, b = trial[r, s], trial[q, t]
            if a == -2 or b == -2 or a == b or _holds(trial, r, b) or _holds(trial, q, a):
                continue
            trial[r, s], trial[q, t] = b, a
        now = _descend(sets, weight, load, risk, trial, goals, scratch)
        if now < cost - 1e-12:
            best, cost = trial, now
    return best, cost
