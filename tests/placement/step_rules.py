"""Rules of a step, and what a plan takes by them, pair by pair."""

import itertools

import numpy as np

from ray_ep.placement.in_step.rules import StepRules


def make_rules(holds, owner=None, node_of=None, speed=1.0, expert=0.0, pair=0.0, slots=99, min_pairs=0, fast=None):
    """Rules with the same cost on all links; nodes are the groups unless `fast` is given."""
    holds = np.asarray(holds, bool)
    ranks = holds.shape[1]
    off = 1.0 - np.eye(ranks)
    node_of = np.zeros(ranks, int) if node_of is None else np.asarray(node_of)
    return StepRules(
        holds,
        holds.argmax(1) if owner is None else owner,
        node_of,
        np.broadcast_to(np.asarray(speed, float), ranks),
        expert * off,
        pair * off,
        slots,
        min_pairs,
        node_of[:, None] == node_of[None] if fast is None else fast,
    )


def contiguous_holds(experts, ranks):
    return np.arange(experts)[:, None] * ranks // experts == np.arange(ranks)


def slow_flows(counts, quota, node_of):
    """[R, E, R] pairs of a source to a rank: itself, then its node, then the rest, both ascending."""
    left, room = counts.astype(int).copy(), quota.T.astype(int).copy()
    ranks, experts = counts.shape
    out = np.zeros((ranks, experts, ranks), int)
    for near in (lambda i, j: i == j, lambda i, j: node_of[i] == node_of[j], lambda i, j: True):
        for e, i, j in itertools.product(range(experts), range(ranks), range(ranks)):
            if near(i, j):
                x = min(left[i, e], room[j, e])
                out[i, e, j] += x
                left[i, e] -= x
                room[j, e] -= x
    return out


def rank_seconds(quota, guests, counts, rules):
    """[R] what balance_step minimises the maximum of."""
    between = slow_flows(counts, quota, rules.node_of).sum(1)
    travel = between * rules.pair_seconds
    seconds = between.sum(0) * rules.seconds_per_pair + travel.sum(0) + travel.sum(1)
    for _, a, b in guests:
        seconds[[a, b]] += rules.expert_seconds[a, b]
    return seconds
