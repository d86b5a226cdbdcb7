"""Seconds of copies over measured links, by hand: a slow link is slow by itself, all messages share a port."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ray_ep.placement import StepCosts, Topology
from ray_ep.placement.cost.links import LinkSeconds
from ray_ep.placement.planner.problem import Problem

ONE = StepCosts(tokens_per_rank=1, token_bytes=1, two_level=False)


def links(bandwidth, node_of):
    bandwidth = np.asarray(bandwidth, np.float64)
    return LinkSeconds.of(Topology(bandwidth, np.zeros_like(bandwidth), np.asarray(node_of)), np.asarray(node_of))


def seconds(bandwidth, node_of, to_rank, costs=ONE):
    """Of copies [R, R] from ranks; a token's copies to ranks of a node are then different tokens'."""
    to_rank = np.asarray(to_rank, np.float64)
    member = np.equal.outer(node_of, np.unique(node_of)).astype(float)
    to_node = np.where(member > 0, 0.0, to_rank @ member)
    return links(bandwidth, node_of).seconds((to_rank, to_node), costs)


def test_ranks_with_equal_links_take_as_long_as_the_busiest_sends_or_receives():
    copies = [[0, 3, 4, 0], [1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 2, 0]]
    assert seconds(np.full((4, 4), 10.0), [0, 1, 2, 3], copies) == pytest.approx(2 * 7 / 10)


def test_messages_over_slow_links_travel_beside_the_others():
    bandwidth = np.full((3, 3), 10.0)
    bandwidth[0, 1] = 1.0
    # To rank 1 in 4 s; rank 0's port, at 10 to rank 2, has sent all in 1 s meanwhile. Back: all ten at 10.
    assert seconds(bandwidth, [0, 1, 2], [[0, 4, 6], [0, 0, 0], [0, 0, 0]]) == pytest.approx(4 + 1)
    # With both slow, the port is taken to be no faster than they: ten bytes at 2.
    bandwidth[0, 2] = 2.0
    assert seconds(bandwidth, [0, 1, 2], [[0, 4, 6], [0, 0, 0], [0, 0, 0]]) == pytest.approx(5 + 1)


def test_links_inside_a_node_and_across_add_up():
    bandwidth = [[1, 100, 10, 10], [100, 1, 10, 10], [10, 10, 1, 100], [10, 10, 100, 1]]
    copies = np.zeros((4, 4))
    copies[0] = [0, 50, 2, 3]
    assert seconds(bandwidth, [0, 0, 1, 1], copies) == pytest.approx(2 * (50 / 100 + 5 / 10))


def test_links_that_nobody_measured_cost_nothing():
    bandwidth = np.full((3, 3), np.inf)
    assert seconds(bandwidth, [0, 1, 2], np.ones((3, 3))) == 0.0
    bandwidth[0, 1] = bandwidth[1, 0] = 5.0
    assert seconds(bandwidth, [0, 1, 2], np.ones((3, 3))) == pytest.approx(2 / 5)


@pytest.mark.parametrize("two_level", [False, True])
def test_ranks_that_share_a_network_card_wait_for_each_other_but_not_for_those_of_their_node(two_level):
    near = np.equal.outer([0, 0, 1, 1], [0, 0, 1, 1])
    topology = Topology(np.where(near, 100.0, 10.0), np.zeros((4, 4)), [0, 0, 1, 1])
    copies = np.array([[0, 0, 4, 0], [0, 0, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0]]), np.array([[0, 4]] * 2 + [[0, 0]] * 2)
    costs, took = replace(ONE, two_level=two_level), []
    for lanes in (None, np.full(4, 2.0), np.full(4, 1.0), np.array([1.5, 1.5, 2, 2])):
        t = replace(topology, lanes=lanes)
        took.append(LinkSeconds.of(t, t.node_of).seconds(tuple(c.astype(float) for c in copies), costs))
    inside = took[0] - 2 * 4 / 10
    assert took == pytest.approx([inside + 2 * x for x in (4 / 10, 4 / 10, 8 / 10, 8 / 15)])
    assert inside == pytest.approx(2 * 2 / 100 if two_level else 0.0)  # half of what arrives is for the other rank


def test_a_plan_knows_that_a_shared_card_makes_traffic_dearer():
    node_of = np.repeat([0, 1], 4)
    near = np.equal.outer(node_of, node_of)
    topology = Topology(np.where(near, 4e11, 5e10), np.zeros((8, 8)), node_of)
    problem = lambda t: Problem.of(t, 32, 2, 5, "node", 1000, StepCosts())  # noqa: E731
    alone, shared = problem(topology), problem(replace(topology, lanes=np.ones(8)))
    assert shared.prices.visit_seconds == pytest.approx(4 * alone.prices.visit_seconds)


@given(
    arrays(np.float64, (4, 4), elements=st.floats(0.5, 100)),
    arrays(np.float64, (4, 4), elements=st.floats(0, 10)),
    st.sampled_from([True, False]),
)
def test_times_go_with_copies_and_bandwidths_and_no_link_is_outrun(bandwidth, copies, two_level):
    np.fill_diagonal(copies, 0.0)
    costs = StepCosts(tokens_per_rank=1, token_bytes=1, two_level=two_level)
    nodes = [0, 0, 1, 1]
    now = seconds(bandwidth, nodes, copies, costs)
    assert seconds(bandwidth, nodes, copies / 2, costs) == pytest.approx(now / 2)
    assert seconds(2 * bandwidth, nodes, copies, costs) == pytest.approx(now / 2)
    assert two_level or now >= (copies / bandwidth).max()
