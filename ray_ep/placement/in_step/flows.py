"""Compiled kernels of a step's flows: which rank computes which source's pairs. search.py finds the quotas.

No fastmath: every rank must reach the same plan bit for bit, on whatever CPU it runs. `rows` is a quota transposed
to [R, E]: a rank's experts lie side by side. E experts, R ranks, G guests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel


@kernel
def nearest(counts: Any, start: Any, host: Any, holds: Any, node_of: Any) -> Any:
    """The split without balancing: the source itself, else its node's replicas evenly, else all replicas evenly.

    counts [R, E], hosts of expert e: host[start[e]:start[e + 1]] -> rows int64 [R, E].
    """
    ranks, experts = counts.shape
    rows = np.zeros((ranks, experts), np.int64)
    for i in range(ranks):
        for e in range(experts):
            c = counts[i, e]
            first, last = start[e], start[e + 1]
            if last == first + 1:
                rows[host[first], e] += c
            elif c > 0:
                if holds[e, i]:
                    rows[i, e] += c
                    continue
                near = 0
                for k in range(first, last):
                    near += node_of[host[k]] == node_of[i]
                among = near if near else last - first
                turn = 0
                for k in range(first, last):
                    if near == 0 or node_of[host[k]] == node_of[i]:
                        # What does not divide goes to a replica that differs from source to source.
                        rows[host[k], e] += c // among + ((turn - i - e) % among < c % among)
                        turn += 1
    return rows


@kernel
def single_rank(rows: Any) -> Any:
    """rows [R, E] -> int64 [E]: the only rank that computes an expert, -1 where it is split, -2 where nobody does."""
    ranks, experts = rows.shape
    only = np.full(experts, -2, np.int64)
    for r in range(ranks):
        for e in range(experts):
            if rows[r, e] > 0:
                only[e] = r if only[e] == -2 else -1
    return only


@kernel
def _meet(left: Any, room: Any, hosts: Any, node_of: Any, far: bool, note: Any) -> None:
    """Give what sources have `left` [R] to `hosts` with `room` [R], both ascending; `far`: to other nodes, too.

    note: (row of `out` per source or -1, out), where the pairs are added.
    """
    to_row, out = note
    begin = 0
    for i in range(len(left)):
        for k in range(begin, len(hosts)):
            if left[i] == 0:
                break
            r = hosts[k]
            if room[r] > 0 and (far or node_of[r] == node_of[i]):
                x = min(left[i], room[r])
                left[i] -= x
                room[r] -= x
                if to_row[i] >= 0:
                    out[to_row[i], r] += x
        while begin < len(hosts) and room[hosts[begin]] == 0:
            begin += 1


@kernel
def flows(counts: Any, rows: Any, only: Any, node_of: Any, source: int) -> Any:
    """Who sends what where: each source's pairs against the quotas; itself first, then its node, then the rest.

    Inside each of the three, sources and ranks meet in ascending order (prefix sums against prefix sums).

    Returns:
        source >= 0: int64 [E, R] of that source. source -1: int64 [R, R] sums over experts, of all sources.
    """
    ranks, experts = counts.shape
    one = source >= 0
    out = np.zeros((experts if one else ranks, ranks), np.int64)
    for i in range(source if one else 0, source + 1 if one else ranks):
        for e in range(experts):
            if only[e] >= 0:
                out[e if one else i, only[e]] += counts[i, e]
    left, room, hosts = np.empty(ranks, np.int64), np.empty(ranks, np.int64), np.empty(ranks, np.int64)
    to_row = np.full(ranks, -1, np.int64) if one else np.arange(ranks)
    for e in range(experts):
        if only[e] != -1 or (one and counts[source, e] == 0):
            continue
        if one:
            to_row[source] = e
        found = 0
        for r in range(ranks):
            own = min(counts[r, e], rows[r, e])
            left[r], room[r] = counts[r, e] - own, rows[r, e] - own
            if to_row[r] >= 0:
                out[to_row[r], r] += own
            hosts[found] = r
            found += room[r] > 0
        _meet(left, room, hosts[:found], node_of, False, (to_row, out))
        _meet(left, room, hosts[:found], node_of, True, (to_row, out))
    return out


@kernel
def rank_seconds(between: Any, per_pair: Any, pair_seconds: Any, guests: Any, expert_seconds: Any) -> Any:
    """Predicted seconds of each rank [R]: compute, pairs on both ends of their way, guests on both ends of theirs."""
    ranks = len(per_pair)
    seconds = np.zeros(ranks)
    for i in range(ranks):
        for j in range(ranks):
            seconds[j] += between[i, j] * per_pair[j]
            if i != j and between[i, j] > 0:
                seconds[i] += between[i, j] * pair_seconds[i, j]
                seconds[j] += between[i, j] * pair_seconds[i, j]
    for g in range(len(guests)):
        cost = expert_seconds[guests[g, 1], guests[g, 2]]
        seconds[guests[g, 1]] += cost
        seconds[guests[g, 2]] += cost
    return seconds
