"""Compiled packing of a node's experts on its ranks: replicas for the heaviest, then swaps until the ranks are even.

What is evened out is the ranks' load *and* its risk: experts that are busy together are put apart, so that a topic that
comes up later falls on all ranks alike (the covariance of a mean-variance portfolio). Pure numba, NumPy in and out.
M items (a replica of an expert on this node each), P ranks of the node.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel


@kernel
def add_replicas(load: Any, least: Any, had: Any, spare: int, ranks: int) -> Any:
    """Give `spare` more slots to the experts with the most load a replica; at most one replica a rank.

    load: [X] of the experts on this node, least: [X] replicas that they have, had: [X] replicas that they had before
    (kept unless another would gain a tenth more) -> replicas [X].
    """
    count = least.copy()
    for _ in range(spare):
        best, most = -1, -1.0
        for x in range(load.shape[0]):
            each = load[x] / max(count[x], 1) * (1.1 if count[x] < had[x] else 1.0)
            if count[x] < ranks and each > most:
                best, most = x, each
        if best < 0:
            break
        count[best] += 1
    return count


@kernel
def _may_join(expert: Any, where: Any, p: Any, rank: Any, leaving: Any) -> Any:
    """Whether item p may go to a rank that `leaving` leaves: no other replica of its expert is there."""
    for q in range(expert.shape[0]):
        if q != p and q != leaving and where[q] == rank and expert[q] == expert[p]:
            return False
    return True


@kernel
def _seat(p: Any, r: Any, where: Any, left: Any, inter: Any, joint: Any) -> None:
    where[p] = r
    left[r] -= 1
    for q in range(where.shape[0]):
        inter[q, r] += joint[p, q]


@kernel
def _stays(home: Any, p: Any, r: Any, u: Any, stay: Any) -> Any:
    """Gain from moves when item p goes from rank r to u: what it costs to be away from home."""
    return stay * ((1.0 if home[p] == u else 0.0) - (1.0 if home[p] == r else 0.0))


@kernel
def _begun(expert: Any, joint: Any, load: Any, room: Any, inv: Any, home: Any) -> Any:
    """Items on their ranks for a start: at home where there is room, then the heaviest where it adds least.

    Returns:
        rank [M] of each item, -1 for none; slots left [P]; sum of joint over the items of a rank [M, P].
    """
    items, ranks = load.shape[0], room.shape[0]
    where, left = np.full(items, -1, np.int64), room.copy()
    inter = np.zeros((items, ranks))  # sum of joint over the items of a rank
    for p in range(items):
        if home[p] >= 0 and left[home[p]] > 0:
            _seat(p, home[p], where, left, inter, joint)
    for p in np.argsort(-load, kind="mergesort"):
        best, best_cost = -1, np.inf
        for r in range(ranks):
            if where[p] < 0 and left[r] > 0 and _may_join(expert, where, p, r, -1):
                cost = (2.0 * inter[p, r] + joint[p, p]) * inv[r]
                if cost < best_cost:
                    best, best_cost = r, cost
        if best >= 0:
            _seat(p, best, where, left, inter, joint)
    return where, left, inter


@kernel
def pack_experts(  # noqa: C901 (one pass over its loops)
    expert: Any, joint: Any, load: Any, room: Any, speed: Any, home: Any, stay: Any, sweeps: int
) -> Any:
    """Spread items over ranks, minimising the sum over ranks of x' joint x / speed, x being the items on the rank.

    Args:
        expert: [M] whose replica an item is: two of one expert never share a rank.
        joint: [M, M] symmetric; load[p] * load[q] plus the risk that both are busy at once.
        load: [M]; room: [P] slots, their sum at least M; speed: [P] relative.
        home: [M] rank where the item is now, -1 for none; stay: cost of leaving it.

    Returns:
        rank [M], -1 for a replica that found no rank without its expert.
    """
    items, ranks = load.shape[0], room.shape[0]
    inv = 1.0 / speed
    where, left, inter = _begun(expert, joint, load, room, inv, home)
    for _ in range(sweeps):
        moved = False
        for p in range(items):
            r = where[p]
            if r < 0:
                continue
            best_q, best_u, best_gain = -1, -1, 1e-12
            for u in range(ranks):  # a free slot
                if u != r and left[u] > 0 and _may_join(expert, where, p, u, -1):
                    gain = (2.0 * inter[p, r] - joint[p, p]) * inv[r] - (2.0 * inter[p, u] + joint[p, p]) * inv[u]
                    gain += _stays(home, p, r, u, stay)
                    if gain > best_gain:
                        best_u, best_gain = u, gain
            for q in range(items):  # an exchange
                u = where[q]
                if u < 0 or u == r or expert[q] == expert[p]:
                    continue
                both = 2.0 * joint[p, q] - joint[p, p] - joint[q, q]
                here, there = 2.0 * (inter[p, r] - inter[q, r]) + both, 2.0 * (inter[q, u] - inter[p, u]) + both
                gain = here * inv[r] + there * inv[u] + _stays(home, p, r, u, stay) + _stays(home, q, u, r, stay)
                if gain > best_gain and _may_join(expert, where, p, u, q) and _may_join(expert, where, q, r, p):
                    best_q, best_u, best_gain = q, u, gain
            if best_u < 0:
                continue
            moved = True
            where[p] = best_u
            left[r] += 1
            left[best_u] -= 1
            if best_q >= 0:
                where[best_q] = r
                left[r] -= 1
                left[best_u] += 1
            for x in range(items):
                d = joint[p, x] - (joint[best_q, x] if best_q >= 0 else 0.0)
                inter[x, r] -= d
                inter[x, best_u] += d
        if not moved:
            break
    return where


@kernel
def _holds(row: Any, expert: Any) -> Any:
    """Whether an expert is in one of a rank's slots."""
    found = False
    for s in range(row.shape[0]):
        found |= row[s] == expert
    return found


@kernel
def _arranged(expert: Any, where: Any, now: Any, room: Any) -> Any:
    """Slots [P, S]: what stays on its rank keeps its slot, newcomers fill the others in ascending order."""
    out = np.full(now.shape, -1, np.int64)
    for newcomer in range(2):
        for p in range(len(where)):
            r, s = where[p], 0
            if r < 0 or _holds(now[r, : room[r]], expert[p]) == newcomer:
                continue
            while (out[r, s] >= 0) if newcomer else (now[r, s] != expert[p]):
                s += 1
            out[r, s] = expert[p]
    return out


@kernel
def spread_on_ranks(
    weight: Any, least: Any, load: Any, risk: Any, scale: Any, ranks: Any, stay: Any, sweeps: int
) -> Any:
    """A node's experts on its ranks: replicas in spare slots, all packed; what stays on a rank keeps its slot.

    Args:
        weight: [E] load of each expert that this node bears; least: [E] replicas that it has here, 0: none.
        load: [E] of each expert in all; risk: [E, E] covariance of those; scale: cost of squared load.
        ranks: room [P] slots, speed [P], now [P, S] expert in each slot, -1 for none.
        stay, sweeps: see `pack`.

    Returns:
        [P, S] expert in each slot.
    """
    room, speed, now = ranks
    mine = np.flatnonzero(least)
    had = np.zeros(len(mine), np.int64)
    for x in range(len(mine)):
        for r in range(len(room)):
            had[x] += _holds(now[r], mine[x])
    count = add_replicas(weight[mine], least[mine], had, room.sum() - least.sum(), len(room))
    which = np.repeat(mine, count)
    each, share, home = np.empty(len(which)), np.empty(len(which)), np.full(len(which), -1, np.int64)
    at = 0
    for x in range(len(mine)):
        e, turn = mine[x], at  # the k-th replica is at home on the k-th rank that has one
        for r in range(len(room)):
            if turn < at + count[x] and _holds(now[r], e):
                home[turn] = r
                turn += 1
        for p in range(at, at + count[x]):
            each[p] = weight[e] / count[x]
            share[p] = each[p] / max(load[e], 1e-30)
        at += count[x]
    joint = np.empty((at, at))
    for p in range(at):
        for q in range(at):
            joint[p, q] = scale * (each[p] * each[q] + risk[which[p], which[q]] * share[p] * share[q])
    return _arranged(which, pack_experts(which, joint, each, room, speed, home, stay, sweeps), now, room)


@kernel
def unit_risk(slots: Any, unit_of: Any, share: Any, risk: Any, units: int) -> Any:
    """[U] variance of units' loads: slots [R, S], unit_of [R], share [E] of an expert's load that each replica bears.

    risk: [E, E] covariance of experts' loads.
    """
    out = np.zeros(units)
    for r in range(slots.shape[0]):
        for q in range(slots.shape[0]):
            if unit_of[q] == unit_of[r]:
                for a in slots[r]:
                    for b in slots[q]:
                        if a >= 0 and b >= 0:
                            out[unit_of[r]] += share[a] * share[b] * risk[a, b]
    return out
