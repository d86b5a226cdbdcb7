"""The planner's parts by hand and against slow references."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_ep.placement import (
    Placement,
    RoutingStatistics,
    StepCosts,
    Topology,
    load_only,
    migration,
    predict,
)
from ray_ep.placement.bits import token_bits
from ray_ep.placement.cost.dispatch import deal, play
from ray_ep.placement.planner import grouping, packing, swaps
from ray_ep.placement.planner.forecast import DRIFT, expected_load


def test_load_only_by_hand():
    # 3 ranks x 2 slots for 4 experts with loads 8 4 3 1: the two spare slots go to expert 0 (8, then 8/2 = 4 ties
    # with expert 1, the first of equals wins), so expert 0 has 3 replicas of 8/3 beside 4, 3 and 1.
    p = load_only([[8, 4, 3, 1]], 3, 2)
    assert [len(p.ranks_of(0, e)) for e in range(4)] == [3, 1, 1, 1]
    # Heaviest first, always to the lightest rank: 4 -> rank 0, 3 -> rank 1, 8/3 -> rank 2, then 0, 1 and 1 by load.
    assert sorted(sorted(row) for row in p.slots[0].tolist()) == [[0, 1], [0, 2], [0, 3]]


def test_whole_groups_go_to_nodes_in_the_hierarchical_variant():
    p = load_only([[9, 9, 1, 1, 5, 5, 4, 4]], 4, 2, [0, 0, 1, 1], expert_groups=4)
    on = [set(p.slots[0, r].ravel().tolist()) for r in ([0, 1], [2, 3])]
    assert on == [{0, 1, 2, 3}, {4, 5, 6, 7}]  # 18 first, then 10 and 8 to the other node, 2 where room is left


def test_a_prediction_by_hand():
    # 2 nodes x 1 rank; expert 0 on both, 1 on rank 0, 2 on rank 1; tokens choose {0, 1} or {0, 2}, half each.
    placement = Placement(np.array([[[0, 1], [0, 2]]]), 3)
    sample = np.array([[[0, 1], [0, 2]] * 8], np.int32)
    stats = RoutingStatistics(np.array([[16, 8, 8]]), sample=sample)
    topology = Topology(np.full((2, 2), 1e6), np.array([[0, 1e-3], [1e-3, 0]]), np.array([0, 1]))
    costs = StepCosts(tokens_per_rank=100, token_bytes=10, expert_seconds=1e-3, speed=(1.0, 0.5))
    p = predict(placement, stats, topology, costs)
    # Each rank computes its own 100 tokens' expert 0, and all 100 tokens of the expert that it alone has.
    assert p.rank_load[0].tolist() == [200, 200]
    assert p.compute[0] == pytest.approx(200 / 0.5 * 1e-3)
    assert p.balancedness == pytest.approx((400 / 1.5) / (200 / 0.5))
    # Half of each rank's tokens visit the other: 50 copies of 10 bytes, there and back, and a latency each way.
    assert p.remote_nodes[0] == pytest.approx(0.5)
    assert p.traffic[0] == pytest.approx(2 * (50 * 10 / 1e6) + 2 * 1e-3)


def test_a_migration_by_hand():
    topology = Topology(np.array([[1, 1e6, 1e6], [1e6, 1, 4e6], [1e6, 4e6, 1]]), np.zeros((3, 3)), np.array([0, 1, 1]))
    old = Placement(np.array([[[0, 1], [1, -1], [2, -1]]]), 3, primary=np.array([[0, 0, 2]]))
    new = Placement(np.array([[[0, -1], [1, -1], [2, 1]]]), 3, primary=np.array([[0, 1, 2]]))
    got = migration(old, new, topology, StepCosts(expert_bytes=8e6, optimizer_bytes=3e6))
    # Expert 1 arrives on rank 2, fetched over rank 1's faster link (2 s); its owner's state goes from 0 to 1 (3 s).
    assert (got.replicas, got.primaries, got.slots) == (1, 1, 4)
    assert got.moved == 0.25
    assert got.seconds == pytest.approx(3.0)


@st.composite
def dispatches(draw):
    """A placement with shares on nodes of ranks, and token sets."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    experts, ranks = draw(st.integers(2, 6)), draw(st.integers(2, 5))
    node_of = np.unique(rng.integers(0, 3, ranks), return_inverse=True)[1].astype(np.int64)
    slots = np.stack([rng.permutation(experts)[: max(1, -(-experts // ranks) + 1)] for _ in range(ranks)])
    missing = np.setdiff1d(np.arange(experts), slots)
    slots = np.concatenate([slots, np.full((ranks, max(len(missing), 1)), -1)], 1)
    slots[0, slots.shape[1] - max(len(missing), 1) :][: len(missing)] = missing
    sets = np.stack([rng.permutation(experts)[:2] for _ in range(64)])
    return Placement(slots[None], experts), node_of, sets


@settings(deadline=None, max_examples=40)
@given(dispatches())
def test_simulated_dispatch_splits_as_the_routes_of_the_placement(case):
    placement, node_of, sets = case
    ranks, experts = placement.num_ranks, placement.num_experts
    held = np.array([[r in placement.ranks_of(0, e) for r in range(ranks)] for e in range(experts)])
    dealt = deal(sets.astype(np.int64), experts, ranks, ranks)
    part, to_rank, to_node = play(dealt, held, held.astype(float), node_of, int(node_of.max()) + 1)
    expected = np.zeros((experts, ranks))
    for source in range(ranks):
        for e, row in enumerate(placement.routes(0, source, node_of)):
            expected[e] += np.bincount(row, minlength=ranks) / len(row) / ranks
    assert np.abs(part - expected).max() < 1 / 32  # routes come in 32nds
    assert part.sum(1) == pytest.approx(np.ones(experts))
    for source in range(ranks):
        if (node_of == node_of[source]).sum() == 1:  # elsewhere the means over a node's ranks are given
            must = [[r for r in placement.routes(0, source, node_of)[e] if r != source] for e in range(experts)]
            certain = np.mean([any(len(must[e]) == 32 for e in s) for s in sets])
            assert to_node[source].sum() >= certain - 1e-9
            assert to_rank[source].sum() >= to_node[source].sum() - 1e-9


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(3, 9), st.integers(2, 3))
@example(742, 3, 2)  # a swap that gains less than swaps.LEAST_SWAP
def test_swaps_of_the_search_lower_the_cost_that_is_counted_token_by_token(seed, experts, nodes):
    rng = np.random.default_rng(seed)
    sets = np.stack([rng.permutation(experts)[:2] for _ in range(100)]).astype(np.int64)
    load = np.bincount(sets.ravel(), minlength=experts) / 100
    bits = token_bits(sets, experts)
    place = rng.permutation(np.arange(experts) % nodes)
    for n in range(nodes):
        visits = sum(any(place[e] == n for e in s) for s in sets)
        assert grouping.visits_of(bits, place, nodes)[n] == visits
    even = np.full(nodes, 1 / nodes), np.full(nodes, 2 / nodes), np.full(nodes, 0.01)
    goals = grouping.NodeGoals(*even, 0.7, 10.0, 0.0)

    def cost(place):
        visits = sum(len({int(place[e]) for e in s}) for s in sets)
        uneven = [(load[place == n].sum() * nodes / 2 - 1) ** 2 for n in range(nodes)]
        return 0.01 * visits + 0.7 * sum(uneven)

    assert grouping.grouping_cost(bits, load, place, goals) == pytest.approx(cost(place))
    found, none = place.copy(), np.full(experts, -1)
    order = np.argsort(rng.random((20, experts)), axis=1)
    zero = np.zeros((experts, experts))
    swaps.improve_grouping(bits, load, zero, found, goals, none, np.zeros(experts), order)
    assert (np.bincount(found, minlength=nodes) == np.bincount(place, minlength=nodes)).all()
    assert cost(found) <= cost(place) + 1e-9
    for a, b in itertools.combinations(range(experts), 2):  # no single swap is left that gains what one must
        swapped = found.copy()
        swapped[a], swapped[b] = found[b], found[a]
        assert cost(swapped) >= cost(found) - swaps.LEAST_SWAP - 1e-9


def test_packing_gives_a_rank_of_half_speed_half_the_load():
    # 6 equal experts on 3 ranks with 4 slots each; loads over speeds are even at 1.2, 2.4 and 2.4 of them.
    load, speed = np.ones(6), np.array([0.5, 1.0, 1.0])
    where = packing.pack_experts(np.arange(6), np.ones((6, 6)), load, np.full(3, 4), speed, np.full(6, -1), 0.0, 20)
    assert sorted(np.bincount(where, minlength=3) / speed) == [2, 2, 3]
    assert np.bincount(where, minlength=3)[0] == 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_packing_is_near_the_best_of_all_packings(seed):
    rng = np.random.default_rng(seed)
    load = rng.uniform(0.1, 1, 6)
    room, speed = np.array([2, 2, 2]), np.ones(3)
    where = packing.pack_experts(np.arange(6), np.outer(load, load), load, room, speed, np.full(6, -1), 0.0, 20)
    assert (np.bincount(where, minlength=3) == 2).all()

    def cost(where):
        return sum(load[np.array(where) == r].sum() ** 2 for r in range(3))

    every = [w for w in itertools.product(range(3), repeat=6) if np.bincount(w, minlength=3).tolist() == [2, 2, 2]]
    assert cost(where) <= 1.05 * min(cost(w) for w in every)


def test_rare_topics_weigh_more_in_the_load_that_is_expected():
    # 90 tokens choose {0, 1}, 10 choose {2, 3}: the pairs' densities say that the second topic is rarer.
    sets = np.array([[0, 1]] * 90 + [[2, 3]] * 10)
    load = np.bincount(sets.ravel()) / 100
    cov = grouping.covariance(sets, load)
    later = expected_load(load, sets, cov)
    assert later.sum() == pytest.approx(2)
    assert (later[2:] > load[2:]).all()
    assert (np.abs(later - load) <= DRIFT).all()
    assert cov == pytest.approx(np.array([[0, 0.09, -0.09, -0.09], [0.09, 0, -0.09, -0.09], [-0.09, -0.09, 0, 0.09],
                                          [-0.09, -0.09, 0.09, 0]]) + np.diag([0.09] * 4))  # fmt: skip
    alone = np.array([[0], [0], [0], [1]])
    assert expected_load(np.array([0.75, 0.25]), alone, np.zeros((2, 2))) == pytest.approx([0.75, 0.25])
