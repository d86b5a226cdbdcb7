"""Compiled simulation of nearest-replica dispatch: which rank computes what, how many copies of a token travel.

The rule is that of `Placement.routes`: the source rank itself, else ranks of its node, else any, split by shares.
T tokens, K top_k, E experts, R ranks, N nodes, B words of 64 tokens of a rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.bits import ones
from ray_ep.placement.compiled import kernel
from ray_ep.placement.migration import held
from ray_ep.placement.placement import Floats, Ints, Placement

DRAWS = 32768
"""A layer's prediction plays this many dispatches of sampled tokens through. More take longer and vary less."""


class Dealt(NamedTuple):
    """Sampled tokens by the rank that they start from."""

    bits: Any  # [R, E, B] which of a rank's tokens chose each expert, 64 in a word
    moment: Any  # [R, 64 * B] position of each token in the sequence that draws among replicas
    tokens: Any  # [R] how many start there


class Hosts(NamedTuple):
    """Who computes each expert's tokens; expert e's hosts are member[start[e] : start[e + 1]]."""

    part: Any  # as of `play`
    member: Any  # [M]
    start: Any  # [E + 1]
    below: Any  # [M] a host's share of tokens that may go to any host, and of those before it
    on: Any  # [E, N] hosts there
    only: Any  # [N, E] where a node's tokens go if one rank comes into question, else -1


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
def _hosts(held: Any, weight: Any, node_of: Any, members: Any) -> Hosts:
    """Who computes each expert's tokens; members: [N] ranks of each node."""
    experts, ranks = held.shape
    nodes = members.shape[0]
    part = np.zeros((experts, ranks))
    start = np.zeros(experts + 1, np.int64)
    member, below = np.empty(held.sum(), np.int64), np.empty(held.sum())
    on, only = np.zeros((experts, nodes), np.int64), np.full((nodes, experts), -1, np.int64)
    at = 0
    for e in range(experts):
        for r in range(ranks):
            if held[e, r]:
                member[at] = r
                at += 1
                on[e, node_of[r]] += 1
                only[node_of[r], e] = r
        start[e + 1] = at
    at = 0
    for e in range(experts):
        hosts = member[start[e] : start[e + 1]]
        away, total, ahead = 0.0, 0.0, 0.0
        near = np.zeros(nodes)
        for n in range(nodes):
            if on[e, n] == 0:
                away += members[n]
                only[n, e] = hosts[0] if len(hosts) == 1 else -1
            elif on[e, n] > 1:
                only[n, e] = -1
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
    return Hosts(part, member, start, below, on, only)


@kernel
def deal(sample: Any, experts: int, ranks: int, sources: int) -> Dealt:
    """Spread sampled tokens [T, K] evenly over source ranks, each token over `sources` of them, at most R.

    The more sources, the less noise.
    """
    words = (sample.shape[0] * sources + 64 * ranks - 1) // (64 * ranks)
    bits, moment = np.zeros((ranks, experts, words), np.uint64), np.zeros((ranks, 64 * words))
    tokens = np.zeros(ranks, np.int64)
    golden = 0.6180339887498949
    for s in range(ranks):
        at = 0
        for u in range(sources):
            for t in range((s - u * ranks // sources) % ranks, sample.shape[0], ranks):
                moment[s, at] = (t * sources + u) // ranks * golden
                for k in range(sample.shape[1]):
                    bits[s, sample[t, k], at >> 6] |= np.uint64(1) << np.uint64(at & 63)
                at += 1
        tokens[s] = at
    return Dealt(bits, moment, tokens)


@kernel
def play(dealt: Dealt, held: Any, weight: Any, node_of: Any, nodes: int) -> Any:
    """Dispatch sampled tokens: those of a rank that choose an expert travel together where one rank takes them all.

    Args:
        dealt: of `deal`; held: [E, R] bool; weight: [E, R] share of each replica; node_of: [R] numbers 0 to N - 1.

    Returns:
        part: [E, R] share of the expert's tokens that a rank computes, exact for even sources.
        to_rank: [R, R] copies to each other rank, per token of the source rank (row), counted on the sample.
        to_node: [R, N] the same to other nodes, a node once.
    """
    experts, ranks = held.shape
    members = np.zeros(nodes)
    for r in range(ranks):
        members[node_of[r]] += 1.0
    part, member, start, below, on, only = _hosts(held, weight, node_of, members)
    bits, moment, tokens = dealt
    own = np.ascontiguousarray(held.T)
    to_rank, to_node = np.zeros((ranks, ranks)), np.zeros((ranks, nodes))
    there, near = np.zeros(ranks, np.uint64), np.zeros(nodes, np.uint64)
    for s in range(ranks):
        home = node_of[s]
        for w in range(bits.shape[2]):
            there[:] = 0
            near[:] = 0
            for e in range(experts):
                r = s if own[s, e] else only[home, e]
                if r >= 0:
                    there[r] |= bits[s, e, w]
                    continue
                word = bits[s, e, w]
                while word:  # one by one
                    rest = word & (word - np.uint64(1))
                    turn = moment[s, 64 * w + np.int64(ones((word ^ rest) - np.uint64(1)))] + e * 0.7548776662466927
                    turn -= np.floor(turn)
                    if on[e, home]:
                        r = _draw(member[start[e] : start[e + 1]], weight[e], node_of, home, turn)
                    else:
                        i = start[e]
                        while below[i] <= turn:
                            i += 1
                        r = member[i]
                    there[r] |= word ^ rest
                    word = rest
            for r in range(ranks):
                to_rank[s, r] += ones(there[r])
                near[node_of[r]] |= there[r]
            for n in range(nodes):
                to_node[s, n] += ones(near[n])
        to_rank[s, s], to_node[s, home] = 0.0, 0.0
        to_rank[s] /= max(tokens[s], 1)
        to_node[s] /= max(tokens[s], 1)
    _smooth(to_rank, to_node, node_of, members)
    return part, to_rank, to_node


def dispatch_layer(
    placement: Placement, layer: int, sample: Ints, node_of: Ints
) -> tuple[Floats, tuple[Floats, Floats]]:
    """part [E, R] of each expert's tokens that a rank computes, and copies (to ranks [R, R], across to nodes [R, N])

    that the mean token of each source rank sends.
    """
    weight = np.zeros((placement.num_experts + 1, placement.num_ranks))
    slots = placement.slots[layer]
    ranks = np.broadcast_to(np.arange(placement.num_ranks)[:, None], slots.shape)
    share = 1.0 if placement.shares is None else placement.shares[layer]
    np.add.at(weight, (slots, ranks), share)
    nodes = int(node_of.max()) + 1
    dealt = deal(sample, placement.num_experts, placement.num_ranks, sources_of(sample, placement.num_ranks))
    part, to_rank, to_node = play(dealt, held(placement, layer), weight[:-1], node_of, nodes)
    return part, (to_rank, to_node)


def sources_of(sample: Ints, ranks: int) -> int:
    """Ranks that each sampled token starts from, so that a layer plays DRAWS dispatches through."""
    return int(np.clip(DRAWS // max(len(sample), 1), 1, ranks))
