"""Compiled simulation of nearest-replica dispatch: which rank computes what, how many copies of a token travel.

The rule is that of `Placement.routes`: the source rank itself, else ranks of its node, else any, split by shares.
T tokens, K top_k, E experts, R ranks, N nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel


@kernel
def _draw(hosts: Any, weight: Any, node_of: Any, node: Any, turn: Any) -> Any:
    """One of `hosts` on `node` in proportion to weight; turn in [0, 1)."""
    total, count = 0.0, 0
    for h in hosts:
        if node_of[h] == node:
            total += weight[h]
            count += 1
    at, last = turn * (total if total > 0 else float(count)), -1
    for h in hosts:
        if node_of[h] == node:
            last = h
            at -= weight[h] if total > 0 else 1.0
            if at < 0:
                break
    return last


@kernel
def _smooth(to_rank: Any, to_node: Any, node_of: Any, members: Any) -> None:
    """What leaves a node does not depend on which of its ranks a token starts: average it over them. In place.

    Few sampled tokens start on each rank; the busiest of many such small samples would look busier than it is.
    """
    ranks, nodes = to_node.shape
    rank_mean, node_mean = np.zeros((nodes, ranks)), np.zeros((nodes, nodes))
    for s in range(ranks):
        rank_mean[node_of[s]] += to_rank[s] / members[node_of[s]]
        node_mean[node_of[s]] += to_node[s] / members[node_of[s]]
    for s in range(ranks):
        to_node[s] = node_mean[node_of[s]]
        for r in range(ranks):
            if node_of[r] != node_of[s]:
                to_rank[s, r] = rank_mean[node_of[s], r]


@kernel
def _hosts(held: Any, weight: Any, node_of: Any, members: Any) -> Any:
    """Who computes each expert's tokens; members: [N] ranks of each node.

    Returns:
        part: as of `simulate`. member [M], start [E + 1]: expert e's hosts are member[start[e] : start[e + 1]].
        below: [M] a host's share of tokens that may go to any host, and of those before it. on: [E, N] hosts there.
        only: [E, N] where a node's tokens go if one rank comes into question, else -1.
    """
    experts, ranks = held.shape
    nodes = members.shape[0]
    part = np.zeros((experts, ranks))
    start = np.zeros(experts + 1, np.int64)
    member, below = np.empty(held.sum(), np.int64), np.empty(held.sum())
    on, only = np.zeros((experts, nodes), np.int64), np.full((experts, nodes), -1, np.int64)
    at = 0
    for e in range(experts):
        for r in range(ranks):
            if held[e, r]:
                member[at] = r
                at += 1
                on[e, node_of[r]] += 1
                only[e, node_of[r]] = r
        start[e + 1] = at
    at = 0
    for e in range(experts):
        hosts = member[start[e] : start[e + 1]]
        away, total, ahead = 0.0, 0.0, 0.0
        near = np.zeros(nodes)
        for n in range(nodes):
            if on[e, n] == 0:
                away += members[n]
                only[e, n] = hosts[0] if len(hosts) == 1 else -1
            elif on[e, n] > 1:
                only[e, n] = -1
        for h in hosts:
            total += weight[e, h]
            near[node_of[h]] += weight[e, h]
        for h in hosts:
            n = node_of[h]
            mine = weight[e, h] / near[n] if near[n] > 0 else 1.0 / on[e, n]
            all_ = weight[e, h] / total if total > 0 else 1.0 / hosts.shape[0]
            part[e, h] = (1.0 + (members[n] - on[e, n]) * mine + away * all_) / ranks
            ahead += all_
            below[at] = ahead
            at += 1
        below[at - 1] = np.inf
    return part, member, start, below, on, only


@kernel
def simulate(sample: Any, held: Any, weight: Any, node_of: Any, nodes: int, sources: int) -> Any:
    """Dispatch sampled tokens, spread evenly over source ranks.

    Args:
        sample: [T, K]; held: [E, R] bool; weight: [E, R] share of each replica; node_of: [R] numbers 0 to N - 1.
        sources: ranks that each sampled token starts from, at most R; the more, the less noise.

    Returns:
        part: [E, R] share of the expert's tokens that a rank computes, exact for even sources.
        to_rank: [R, R] copies to each other rank, per token of the source rank (row), counted on the sample.
        to_node: [R, N] the same to other nodes, a node once.
    """
    ranks = held.shape[1]
    members = np.zeros(nodes)
    for r in range(ranks):
        members[node_of[r]] += 1.0
    part, member, start, below, on, only = _hosts(held, weight, node_of, members)
    to_rank, to_node = np.zeros((ranks, ranks)), np.zeros((ranks, nodes))
    seen, seen_node, tokens = np.full(ranks, -1), np.full(nodes, -1), np.zeros(ranks)
    golden = 0.6180339887498949
    for run in range(sample.shape[0] * sources):
        t, s = run // sources, (run // sources + run % sources * ranks // sources) % ranks
        home, moment = node_of[s], run // ranks * golden
        tokens[s] += 1.0
        for k in range(sample.shape[1]):
            e = sample[t, k]
            r = s if held[e, s] else only[e, home]
            if r < 0:
                turn = moment + e * 0.7548776662466927
                turn -= np.floor(turn)
                if on[e, home]:
                    r = _draw(member[start[e] : start[e + 1]], weight[e], node_of, home, turn)
                else:
                    i = start[e]
                    while below[i] <= turn:
                        i += 1
                    r = member[i]
            n = node_of[r]  # counted without branches, which nobody could foretell
            to_rank[s, r] += 1.0 * (seen[r] != run)
            to_node[s, n] += 1.0 * (seen_node[n] != run)
            seen[r], seen_node[n] = run, run
    for s in range(ranks):
        to_rank[s, s], to_node[s, node_of[s]] = 0.0, 0.0
        to_rank[s] /= max(tokens[s], 1.0)
        to_node[s] /= max(tokens[s], 1.0)
    _smooth(to_rank, to_node, node_of, members)
    return part, to_rank, to_node
