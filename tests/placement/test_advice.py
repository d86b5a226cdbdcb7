"""Advice before rebalancing: its figures against slow counts, its verdict on cases that have one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.errors import PlacementError
from ray_ep.placement import Placement, RoutingStatistics, contiguous, random
from ray_ep.placement.advice import advice, moved_slots, outlook
from ray_ep.placement.engines.records import vllm_record

CASE = {
    "layers": st.integers(1, 2),
    "experts": st.integers(2, 6),
    "ranks": st.integers(1, 4),
    "seed": st.integers(0, 99),
}


def statistics(layers, experts, k=2, tokens=200, seed=0):
    rng = np.random.default_rng(seed)
    skew = rng.random((1, layers, experts)) * 2
    return vllm_record(
        [("x", np.argsort(rng.random((tokens, layers, experts)) + skew, 2)[:, :, :k])], experts
    ).statistics


@settings(max_examples=40, deadline=None)
@given(**CASE)
def test_load_is_what_the_routes_of_the_placement_give(layers, experts, ranks, seed):
    s, nodes = statistics(layers, experts, seed=seed), np.arange(ranks) // 2
    p = random(layers, experts, ranks, min(experts, -(-experts // ranks) + 1), seed=seed)
    ranked = p.rank_load(s.load.astype(float), nodes)
    got = outlook(s, p, list(nodes))
    # Routes split far tokens in steps of 1/32; where shares are even that evens out over the sources.
    assert got.balancedness == pytest.approx((ranked.mean(1) / ranked.max(1)).mean(), abs=0.01)
    node = np.stack([ranked[:, nodes == n].sum(1) for n in range(nodes.max() + 1)], 1)
    assert got.node_balancedness == pytest.approx((node.mean(1) / node.max(1)).mean(), abs=0.01)


@settings(max_examples=30, deadline=None)
@given(**CASE)
def test_remote_nodes_without_replicas_are_those_of_every_source(layers, experts, ranks, seed):
    s, nodes = statistics(layers, experts, seed=seed, tokens=1500), np.arange(ranks) // 2
    p = random(layers, experts, ranks, seed=seed)
    p = Placement(np.where(first_only(p), p.slots, -1), experts)
    visits = []
    for layer in range(layers):
        at = nodes[p.owner[layer]][s.sample[layer]]  # [N, K]
        both = 2 - (at[:, 0] == at[:, 1])
        visits += [(both - (at == nodes[source]).any(1)).mean() for source in range(ranks)]
    got = outlook(s, p, list(nodes)).remote_nodes
    assert got == pytest.approx(np.mean(visits), abs=0.08)  # one source is drawn a token: 0.013 is a standard deviation


def first_only(p):
    """[L, R, S] whether the slot is the primary's first with its expert."""
    keep = np.zeros(p.slots.shape, bool)
    for layer in range(p.num_layers):
        for e in range(p.num_experts):
            rank = p.owner[layer, e]
            keep[layer, rank, np.flatnonzero(p.slots[layer, rank] == e)[0]] = True
    return keep


def test_costs_by_hand():
    s = RoutingStatistics(np.array([[4, 4, 2, 2]]))
    now, new = contiguous(1, 4, 2), Placement([[[0, 2, 1], [1, 3, 0]]], 4)
    got = outlook(s, new, [0, 1], now)
    assert (got.balancedness, got.node_balancedness, got.remote_nodes) == (pytest.approx(1), pytest.approx(1), None)
    assert (got.replica_slots, got.rank_extra_slots, got.moved_slots) == (
        2,
        1,
        3,
    )  # 2 comes to rank 0, 1 and 0 to rank 1
    assert moved_slots(now, now) == 0
    assert moved_slots(contiguous(1, 4, 4), now) == 4  # other ranks: every slot is loaded anew


def test_a_better_placement_is_advised_with_its_price():
    s = RoutingStatistics(np.array([[30, 30, 10, 10]]))
    text = advice(s, {"now": contiguous(1, 4, 2), "planned": Placement([[[0, 2], [1, 3]]], 4)}, [0, 1], 10**9)
    assert "planned: the busiest rank has 1.00x the mean load (now 1.50x), so expert compute takes 33% less" in text
    assert "costs 0.00 GB more memory in all, 0.00 GB on the fullest rank, and 2.00 GB moved once" in text
    assert "Remote nodes are unknown: only counts were recorded" in text
    assert text.splitlines()[-1].startswith("Rebalancing would help: planned saves up to 33%")


def test_nothing_to_gain_means_stay():
    s = RoutingStatistics(np.array([[10, 10, 10, 10]]))
    text = advice(s, {"now": contiguous(1, 4, 2), "other": random(1, 4, 2, seed=3)})
    assert "expert compute takes as much" in text
    assert text.splitlines()[-1].startswith("Stay with now: nothing here gains 5% or more")
    assert advice(s, {"now": contiguous(1, 4, 2)}).splitlines()[-1].startswith("Stay with now")


def test_a_trade_between_links_and_balance_is_called_one():
    pairs = np.array([[[0, 2]], [[2, 0]], [[1, 3]], [[0, 2]], [[0, 2]], [[0, 2]]] * 50)
    s = vllm_record([("x", pairs)], 4).statistics
    both = {"together": Placement([[[0, 2], [1, 3]]], 4), "split": Placement([[[0, 1], [2, 3]]], 4)}
    assert outlook(s, both["together"], [0, 1]).remote_nodes == pytest.approx(0.5, abs=0.1)
    assert outlook(s, both["split"], [0, 1]).remote_nodes == 1
    last = advice(s, both, [0, 1], current="split").splitlines()[-1]
    assert last.startswith("Stay with split unless its steps wait for slow links: together is better there")
    last = advice(s, both, [0, 1], current="together").splitlines()[-1]
    assert last.startswith("Stay with together unless its steps wait for expert compute: split is better there")


def test_nearest_replica_is_assumed_and_said():
    s = vllm_record([("x", np.array([[[0, 1]], [[0, 2]], [[0, 3]]] * 40))], 4).statistics
    hot = Placement([[[0, 1], [0, 2], [0, 3]]], 4)
    text = advice(s, {"now": contiguous(1, 4, 3, [2, 1, 1]), "hot": hot}, [0, 1, 2])
    assert "Assumed: a token goes to its nearest replica." in text
    assert text.splitlines()[-1].startswith("Rebalancing would help: hot")


def test_an_engine_that_picks_any_replica_is_judged_so():
    s = vllm_record([("x", np.array([[[1], [1]]] * 400))], 2).statistics
    p = Placement([[[1, -1], [0, -1], [1, -1]]] * 2, 2)  # ranks 0 and 1 share a node, 1 has no replica of expert 1
    near, any_ = (outlook(s, p, [5, 5, 7], nearest=n) for n in (True, False))
    # Nearest: ranks take 2/3, 0, 1/3 of the tokens; any: 1/2, 0, 1/2.
    assert (near.balancedness, any_.balancedness) == (pytest.approx(1 / 2), pytest.approx(2 / 3))
    assert (near.remote_nodes, any_.remote_nodes) == (0, pytest.approx(0.5, abs=0.1))
    assert "any replica, near or far" in advice(s, {"a": p}, [5, 5, 7], nearest=False)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda s, p: advice(s, {}), "no placements"),
        (lambda s, p: advice(s, {"a": p}, current="b"), "current is 'b': allowed are a"),
        (lambda s, p: advice(s, {"a": contiguous(1, 6, 2)}), "1 layers and 6 experts, statistics of 1 and 4"),
        (lambda s, p: advice(s, {"a": p}, [0, 0, 1]), "node_of has 3 entries for 2 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(ask, says):
    with pytest.raises(PlacementError, match=says):
        ask(RoutingStatistics(np.array([[1, 2, 3, 4]])), contiguous(1, 4, 2))
