from dataclasses import replace

import numpy as np
import pytest

from ray_ep.errors import PlacementError
from ray_ep.placement import RoutingStatistics, StepCosts, Topology
from ray_ep.placement.whatif.simulate import Cluster, Given, simulate, spread, sweep, synthetic

SUMS = (
    "step_seconds", "compute_seconds", "traffic_seconds", "bytes_across", "bytes_inside", "tokens_per_second",
    "balancedness", "node_balancedness",
)  # fmt: skip


def test_two_ranks_worked_out_by_hand():
    # Expert 0 on rank 0, expert 1 on rank 1, each token goes to one of them, 3 of 4 to expert 0.
    sample = np.array([[[0], [0], [0], [1]] * 8], np.int32)
    stats = RoutingStatistics(np.array([[24, 8]]), sample=sample)
    costs = StepCosts(tokens_per_rank=100, token_bytes=10, expert_seconds=1e-3)
    cluster = Cluster(2, 1, 1, inside=1e6, across=1e6, latency_inside=0.0, latency_across=1e-4)
    (row,) = simulate(cluster, stats, ["contiguous"], costs, level="rank")
    assert row.compute_seconds == pytest.approx(200 * 0.75 * 1e-3)  # 150 of the 200 tokens on rank 0
    assert row.balancedness == pytest.approx(100 / 150)
    # Rank 0 sends a quarter of its tokens, rank 1 three quarters; latency once each way.
    assert row.traffic_seconds == pytest.approx(2 * (75 * 10 / 1e6) + 2 * 1e-4)
    assert row.remote_nodes == pytest.approx(0.5)
    assert row.bytes_across == pytest.approx(0.5 * 100 * 10 * 2)
    assert row.step_seconds == row.compute_seconds + row.traffic_seconds


def test_faster_links_and_ranks_shorten_what_they_carry():
    stats = synthetic(2, 16, 2, tokens=1024)
    base = Cluster(4, 2, 4)
    costs = StepCosts()
    slow, fast, quick = (
        simulate(c, stats, ["load_only"], costs)[0]
        for c in (base, Cluster(4, 2, 4, across=100e9), Cluster(4, 2, 4, speeds=(2.0,)))
    )
    assert fast.traffic_seconds < slow.traffic_seconds
    assert fast.compute_seconds == slow.compute_seconds
    assert quick.compute_seconds == pytest.approx(slow.compute_seconds / 2)


def test_a_sweep_has_a_row_for_each_combination_and_the_plan_is_best():
    stats = synthetic(2, 32, 4, tokens=2048)
    rows = sweep(Cluster(2, 2, None), stats, nodes=[2, 4], slots_per_rank=[8, 10], placements=["load_only", "plan"])
    assert [(r.cluster.nodes, r.cluster.slots_per_rank, r.placement) for r in rows] == [
        (n, s, p) for n in (2, 4) for s in (8, 10) for p in ("load_only", "plan")
    ]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours.step_seconds < theirs.step_seconds
    assert sweep(Cluster(2, 2, 8), stats, placements=["plan"])[0] == rows[1]


def test_a_thousand_ranks_are_predicted_and_what_stood_in_for_the_search_is_named():
    stats = synthetic(1, 64, 4, tokens=512)
    (row,) = simulate(Cluster(128, 8, 4), stats, ["plan"])
    assert row.placement == "load_only"
    assert 0 < row.node_balancedness <= 1


def test_evenly_spaced_layers_stand_for_all():
    stats = synthetic(7, 16, 2, tokens=256)
    few = spread(stats, 3)
    assert (few.load == stats.load[[0, 3, 6]]).all()
    assert (few.sample == stats.sample[[0, 3, 6]]).all()
    assert spread(stats, 7) is spread(stats, None) is stats
    same = RoutingStatistics(np.repeat(stats.load[:1], 6, 0), sample=np.repeat(stats.sample[:1], 6, 0))
    whole, part = (simulate(Cluster(2, 2, 6), same, ["load_only"], most_layers=n)[0] for n in (None, 2))
    assert part == replace(whole, **{n: pytest.approx(getattr(whole, n)) for n in SUMS})


def test_a_measured_cluster_is_simulated_as_it_is_and_grown_with_its_medians():
    stats, even = synthetic(1, 16, 2, tokens=256), Cluster(2, 2, 6, inside=3e9, across=1e9, speeds=(0.5,))
    given = Given(even.topology(), even.speed(), 6)
    (a,), (b,) = simulate(even, stats, ["plan"]), simulate(given, stats, ["plan"])
    assert replace(b, cluster=even) == a
    assert given.even() == even
    one = replace(even, lanes=1.0)
    assert Given(one.topology(), one.speed(), 6).even() == one
    alone, shared = (simulate(c, stats, ["contiguous"])[0] for c in (even, one))
    assert shared.traffic_seconds > 1.2 * alone.traffic_seconds
    unknown = Given(Topology.of_nodes([0, 0, 0, 1]))
    assert unknown.even() == Cluster(2, 3)


def test_synthetic_routing_is_as_skewed_as_asked_for_and_topics_share_experts():
    even, skewed = (synthetic(1, 32, 2, zipf=z, focus=0.0) for z in (0.0, 1.0))
    assert even.load.max() / even.load.mean() < 1.3 < 2.5 < skewed.load.max() / skewed.load.mean()
    assert (np.diff(np.sort(synthetic(2, 8, 3).sample, axis=2), axis=2) > 0).all()
    assert (synthetic(2, 8, 3, seed=4).sample == synthetic(2, 8, 3, seed=4).sample).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Cluster(0, 8), "nodes=0"),
        (lambda: Cluster(1024, 8), "at most 4096"),
        (lambda: Cluster(2, 2, across=float("nan")), "across=nan"),
        (lambda: Cluster(2, 2, speeds=(1.0, 0.0)), "speeds"),
        (lambda: Cluster(2, 2, latency_across=-1.0), "latency_across=-1"),
        (lambda: synthetic(1, 4, 5), "top_k=5"),
        (lambda: synthetic(1, 4, 2, zipf=-1.0), "zipf=-1"),
        (lambda: simulate(Cluster(2, 1, 2), synthetic(1, 4, 2), ["best"]), "allowed are contiguous"),
        (lambda: Given(Topology.of_nodes([0, 1]), (1.0,)), "1 speeds for 2 ranks"),
        (lambda: spread(synthetic(3, 4, 2), 0), "most_layers=0"),
        (lambda: simulate(Cluster(2, 1, 2), RoutingStatistics(np.zeros((0, 4)))), "no layers"),
        (lambda: simulate(Cluster(2, 1, 1), synthetic(1, 4, 2), ["plan"]), "at least 2 a rank"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(PlacementError, match=says):
        make()
