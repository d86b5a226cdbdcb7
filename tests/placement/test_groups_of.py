"""One grouping of ranks for plans and predictions, and what it is good for: no plan is predicted slower than none."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.placement import RoutingStatistics, StepCosts, Topology, contiguous, plan, predict
from ray_ep.placement.links.groups import find_groups, groups_of
from tests.placement.traces import statistics, trace


def links(node_of, inside, across, groups=None):
    node_of = np.asarray(node_of)
    bandwidth = np.where(node_of[:, None] == node_of, float(inside), float(across))
    return Topology(bandwidth, np.zeros_like(bandwidth), node_of, groups=groups)


@pytest.mark.parametrize(
    ("topology", "groups"),
    [
        (links([7, 7, 2, 2], 400, 50), [0, 0, 1, 1]),  # by name, numbered by their first rank
        (links([0, 0, 1, 1], 60, 50), [0, 1, 2, 3]),  # no faster inside: each rank alone
        (links([0, 0, 0, 0], 50, 50), [0, 0, 0, 0]),  # one node has no others to be faster than
        (Topology.of_nodes([0, 0, 1]), [0, 0, 1]),  # nothing measured
        (links([0, 0, 1, 1], 400, 50, [0, 1, 1, 0]), [0, 1, 1, 0]),  # what was measured goes before names
        (links([0, 0, 0, 0], 400, 50, [0, 0, 1, 1]), [0, 0, 1, 1]),  # islands inside one node
        (links([0, 0, 1, 1], 50, 50, [0, 0, 0, 0]), [0, 1, 2, 3]),  # measured alike over several nodes
        (links([0, 0, 0, 0], 50, 50, [0, 0, 0, 0]), [0, 0, 0, 0]),
    ],
)
def test_groups_are_the_measured_ones_or_else_nodes_whose_links_are_faster_inside(topology, groups):
    assert groups_of(topology).tolist() == groups


def test_predictions_take_the_measured_groups_for_nodes():
    stats = statistics(trace(2, 16, 2, 2048), 16)
    by_name = links([0, 0, 1, 1], 400e9, 50e9)
    placement = contiguous(2, 16, 4)
    other = replace(by_name, node_of=np.zeros(4, np.int64), groups=by_name.node_of)
    same, measured = (predict(placement, stats, t, level="node") for t in (by_name, other))
    assert measured.step_seconds == same.step_seconds
    assert (measured.remote_nodes == same.remote_nodes).all()
    alike = predict(placement, stats, links([0, 0, 1, 1], 60e9, 50e9), level="node")
    assert (alike.remote_nodes == alike.remote_ranks).all()
    assert alike.node_balancedness == alike.balancedness


def test_a_close_rank_of_another_host_is_reached_by_the_same_port():
    """So its fast link shows what the port can do, whichever ranks are grouped; messages then wait for slow links."""
    stats, costs = statistics(trace(2, 16, 2, 2048), 16), StepCosts(two_level=False)
    apart = links([0, 0, 1, 1], 50e6, 10e6, groups=np.arange(4))
    hosts, close = (replace(apart, node_of=np.arange(4), groups=np.array(g)) for g in ([0, 1, 2, 3], [0, 0, 1, 1]))
    alone, grouped = (predict(contiguous(2, 16, 4), stats, x, costs).traffic for x in (hosts, close))
    assert grouped == pytest.approx(alone)


def test_a_plan_sees_islands_of_fast_links_that_have_no_name():
    stats = statistics(trace(2, 32, 2, 4096), 32)
    far = np.repeat([0, 1], 4)[:, None] != np.repeat([0, 1], 4)
    bandwidth = np.where(far, 5e9, 200e9)
    named = Topology(bandwidth, np.zeros_like(bandwidth), np.zeros(8))
    topology = find_groups(named)
    ours, blind = (predict(plan(stats, t, 5), stats, topology, level="node") for t in (topology, named))
    assert ours.remote_nodes.mean() < 0.9 * blind.remote_nodes.mean()
    assert ours.step_seconds < blind.step_seconds


@st.composite
def cases(draw):
    """Random links, often with measured groups; routing with or without topics; any kind of exchange."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ranks, experts = draw(st.integers(1, 8)), draw(st.integers(2, 24))
    node_of = np.sort(rng.integers(0, draw(st.integers(1, 4)), ranks))
    near = node_of[:, None] == node_of
    bandwidth = np.where(near, draw(st.sampled_from([5e9, 60e9, 450e9])), 50e9) * rng.uniform(0.5, 1, (ranks, ranks))
    topology = Topology(bandwidth, rng.uniform(0, 1e-4, (ranks, ranks)), node_of)
    if draw(st.booleans()):
        topology = find_groups(topology)
    top_k = draw(st.integers(1, min(4, experts)))
    tokens = draw(st.sampled_from([64, 500, 3000]))
    sets = np.argsort(rng.random((2, tokens, experts)) ** rng.uniform(0.2, 5, experts), axis=2)[:, :, :top_k]
    slots = -(-experts // ranks) + draw(st.integers(0, 2))
    costs = StepCosts(
        token_bytes=draw(st.sampled_from([0.0, 500.0, 14336.0])),
        expert_seconds=draw(st.sampled_from([0.0, 0.02e-6, 2e-6])),
        speed=tuple(rng.uniform(0.3, 1, ranks)),
        two_level=draw(st.sampled_from([None, True, False])),
    )
    return statistics(sets, experts), topology, slots, costs


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from(["node", "rank"]))
def test_no_plan_is_predicted_slower_than_contiguous(case, level):
    stats, topology, slots, costs = case
    layers, experts = stats.load.shape
    plain = predict(contiguous(layers, experts, topology.num_ranks, slots), stats, topology, costs, level)
    ours = predict(plan(stats, topology, slots, level=level, costs=costs), stats, topology, costs, level)
    assert ours.step_seconds <= plain.step_seconds * (1 + 1e-9)


@pytest.mark.parametrize("level", ["node", "rank"])
def test_a_plan_from_counts_alone_is_predicted_no_slower_either(level):
    stats = RoutingStatistics(np.random.default_rng(0).integers(1, 90, (3, 12)))
    topology = links([0, 0, 1, 1], 60e9, 50e9)
    plain, ours = (
        predict(p, stats, topology, level=level)
        for p in (contiguous(3, 12, 4, 4), plan(stats, topology, 4, level=level))
    )
    assert ours.step_seconds <= plain.step_seconds
