"""Which ranks leave: nodes by any of their names, whole nodes, and never so many that too few are left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.driver.elastic.leavers import can_go, node_named, ranks_on, surplus

WHERE = [
    {"node": "aa01", "host": "alpha", "address": "10.0.0.1"}, {"node": "aa01", "host": "alpha", "address": "10.0.0.1"},
    {"node": "ab02", "host": "beta", "address": "10.0.0.2"}, {"node": "ac03", "host": "beta", "address": "10.0.0.3"},
]  # fmt: skip


@pytest.mark.parametrize("name", ["ab02", "ab", "10.0.0.2"])
def test_a_node_goes_by_its_id_the_beginning_of_it_or_its_address(name):
    assert node_named(name, WHERE) == ("ab02", "")


def test_a_node_that_is_not_there_or_not_the_only_one_is_refused_with_those_that_are():
    assert node_named("alpha", WHERE) == ("aa01", "")
    assert node_named("beta", WHERE) == ("", "'beta' names 2 nodes: give the id of one: ab02, ac03")
    for name in ("gamma", ""):
        assert node_named(name, WHERE)[1] == (
            f"no rank is on a node {name!r}: those with ranks are aa01 (host alpha, 10.0.0.1), ab02 (host beta, "
            "10.0.0.2), ac03 (host beta, 10.0.0.3)"
        )


def test_ranks_of_nodes_come_in_the_order_of_the_nodes():
    assert list(ranks_on(["ac03", "zz", "aa01"], WHERE).items()) == [("ac03", [3]), ("aa01", [0, 1])]


def test_whole_nodes_are_given_back_before_a_part_of_one_the_last_ranks_first():
    assert surplus(1, WHERE) == [3]
    assert surplus(2, WHERE) == [2, 3]
    assert surplus(3, WHERE) == [1, 2, 3]
    assert surplus(1, WHERE, but=[3]) == [2]


def test_groups_go_whole_in_order_and_leave_enough():
    groups = [[0, 1], [2], [3]]
    assert can_go(groups, active=4, ready=0, least=1) == [0, 1, 2]  # somebody must hold the model
    assert can_go(groups, active=4, ready=0, least=2) == [0, 1]
    assert can_go(groups, active=4, ready=0, least=3) == [2]
    assert can_go(groups, active=4, ready=2, least=3) == [0, 1, 2]
    assert can_go([[0]], active=1, ready=3, least=1) == []


@given(st.lists(st.integers(1, 3), max_size=4), st.integers(0, 3), st.integers(0, 3), st.integers(1, 6))
def test_enough_are_left_whoever_goes(sizes, others, ready, least):
    groups, first = [], 0
    for size in sizes:
        groups.append(list(range(first, first + size)))
        first += size
    active = max(first + others, 1)
    gone = can_go(groups, active, ready, least)
    assert all(set(group) <= set(gone) or not set(group) & set(gone) for group in groups)
    assert not gone or active - len(gone) + ready >= least
    assert len(gone) < active
