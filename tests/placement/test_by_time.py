"""Layers on unequal links: the search by the predicted time, and replans that get away from a slow link."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ray_ep.placement import RoutingStatistics, StepCosts, Topology, contiguous, plan, predict
from ray_ep.placement.planner import by_time
from ray_ep.placement.planner.layer import Traffic
from ray_ep.placement.planner.problem import Problem
from ray_ep.placement.planner.replan import layer_seconds, moved_slots

COSTS = StepCosts(tokens_per_rank=768, token_bytes=1024.0, expert_seconds=8e-6, expert_bytes=49152.0, two_level=False)


def cluster(node_of=(0, 1, 2, 3), seed=0, slow=()):
    """Links of 10 to 40 MB/s between nodes, 1 GB/s inside; slow: pairs of ranks with 1 MB/s both ways."""
    rng, nodes = np.random.default_rng(seed), np.array(node_of)
    bandwidth = np.where(nodes[:, None] == nodes, 1e9, rng.choice([1e7, 2e7, 4e7], (len(nodes), len(nodes))))
    for a, b in slow:
        bandwidth[a, b] = bandwidth[b, a] = 1e6
    return Topology(bandwidth, np.zeros_like(bandwidth), nodes)


def statistics(experts, top_k=2, layers=2, tokens=1500, seed=0):
    """Tokens of as many topics as there are pairs of experts, each mostly with the experts of its topic."""
    rng = np.random.default_rng(seed)
    sets = np.empty((layers, tokens, top_k), np.int32)
    for layer in sets:
        order = rng.permutation(experts).reshape(-1, top_k)
        share = rng.dirichlet(np.full(len(order), 2.0))
        for t, topic in enumerate(rng.choice(len(order), tokens, p=share)):
            odds = np.full(experts, 0.2 / experts)
            odds[order[topic]] += 0.8 / top_k
            layer[t] = rng.choice(experts, top_k, replace=False, p=odds)
    load = np.stack([np.bincount(s.ravel(), minlength=experts) for s in sets])
    return RoutingStatistics(load, sample=sets)


def layer_of(stats, topology, costs=COSTS, level="rank"):
    problem = Problem.of(topology, stats.load.shape[1], stats.sample.shape[2], None, level, 1000, costs)
    return problem, Traffic.of(stats.load[0].astype(float), stats.sample[0].astype(np.int64), problem.ranks)


@pytest.mark.parametrize("two_level", [False, True, None])
@pytest.mark.parametrize("node_of", [(0, 1, 2, 3, 4, 5), (0, 0, 1, 1, 2, 2)])
def test_it_shortens_the_predicted_time_and_leaves_slots_in_their_places(node_of, two_level):
    costs = replace(COSTS, two_level=two_level)
    stats, topology = statistics(18), cluster(node_of, slow=[(0, 2), (0, 3), (1, 2), (1, 3)])
    problem, traffic = layer_of(stats, topology, costs)
    start = contiguous(1, 18, 6).slots[0]
    assert by_time.fits(problem, start)
    slots = by_time.swapped_by_time(problem, traffic, start, 0.0, 0)
    assert sorted(slots.ravel()) == list(range(18))
    stay = (slots[:, :, None] == start[:, None, :]).any(2)
    assert (slots[stay] == start[stay]).all()
    assert layer_seconds(problem, traffic, slots) < 0.9 * layer_seconds(problem, traffic, start)


def test_with_few_experts_it_finds_the_best_of_all_placements():
    stats, topology = statistics(8, tokens=400), cluster(slow=[(1, 3)])
    problem, traffic = layer_of(stats, topology)
    found = by_time.swapped_by_time(problem, traffic, contiguous(1, 8, 4).slots[0], 0.0, 0)
    best = min(layer_seconds(problem, traffic, s) for s in every_placement(8, 4))
    assert layer_seconds(problem, traffic, found) <= 1.03 * best


def every_placement(experts, ranks):
    """All ways to give each of the ranks as many experts."""
    each = experts // ranks

    def rest(left):
        if not left:
            yield []
            return
        for first in itertools.combinations(sorted(left), each):
            for more in rest(left - set(first)):
                yield [first, *more]

    return (np.array(p) for p in rest(set(range(experts))))


def test_a_price_that_no_move_pays_moves_nothing():
    problem, traffic = layer_of(statistics(16), cluster(slow=[(0, 2)]))
    start = contiguous(1, 16, 4).slots[0]
    assert (by_time.swapped_by_time(problem, traffic, start, 1e3, 0) == start).all()
    free, dear = (by_time.swapped_by_time(problem, traffic, start, stay, 0) for stay in (0.0, 0.02))
    assert moved_slots(start, dear) < moved_slots(start, free)


def test_layers_that_it_is_not_for_are_left_alone():
    start = contiguous(1, 16, 4).slots[0]
    equal = Topology(np.full((4, 4), 1e7), np.zeros((4, 4)), np.arange(4))
    assert not by_time.fits(layer_of(statistics(16), equal)[0], start)
    assert not by_time.fits(layer_of(statistics(16), Topology.of_nodes([0, 1, 2, 3]))[0], start)
    assert not by_time.fits(layer_of(statistics(16), cluster())[0], np.pad(start, ((0, 0), (0, 1)), mode="edge"))


@pytest.mark.slow
def test_replans_get_away_from_a_link_that_slowed_nearly_as_well_as_plans_from_nothing():
    """Summed over draws: how much one slow link costs differs by what plans put there by chance."""
    seconds = []
    for seed, link in enumerate([(0, 1), (0, 2), (1, 3), (2, 3)]):
        stats, slowed = statistics(32, top_k=4, seed=seed), cluster(seed=seed, slow=[link])
        before = plan(stats, cluster(seed=seed), level="rank", costs=COSTS)
        again = plan(stats, slowed, None, before, 1000, "rank", 0, COSTS)
        fresh = plan(stats, slowed, level="rank", costs=COSTS)
        seconds.append([predict(p, stats, slowed, COSTS).step_seconds for p in (before, again, fresh)])
        assert plan(stats, slowed, None, again, 1000, "rank", 0, COSTS) is again  # and stays there
    now, after, best = np.sum(seconds, axis=0)
    assert best < 0.85 * now
    assert now - after > 0.9 * (now - best)


@pytest.mark.parametrize("level", ["node", "rank"])
@pytest.mark.parametrize("link", [(0, 2), (1, 2)])
def test_a_slow_link_between_two_nodes_of_two_ranks_is_planned_around(link, level):
    """Two nodes have one price for a visit to the other, whichever of their ranks' links is slow."""
    stats, costs = statistics(32, top_k=4, seed=1), replace(COSTS, expert_seconds=8e-8)
    usual = Topology(np.kron([[4e7, 1e7], [1e7, 4e7]], np.ones((2, 2))), np.zeros((4, 4)), np.array([0, 0, 1, 1]))
    before = plan(stats, usual, level=level, costs=costs)
    bandwidth = usual.bandwidth.copy()
    bandwidth[link] = bandwidth[link[::-1]] = 1.2e6
    slowed = replace(usual, bandwidth=bandwidth)
    again = plan(stats, slowed, None, before, 1000, level, 0, costs)
    now, after = (predict(p, stats, slowed, costs, level).step_seconds for p in (before, again))
    assert after < 0.9 * now
