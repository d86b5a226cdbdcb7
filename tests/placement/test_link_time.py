"""The compiled time of a layer's traffic against the formula written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.placement.link_time import TILE, busiest


def slow(to_rank, to_node, rank, node, home, node_of):
    """flat, across, inside as whole arrays."""

    def both_ways(copies):
        ways = copies * rank, copies * rank.T
        return sum(max(x.sum(1).max(), x.sum(0).max()) for x in ways)

    members = np.bincount(node_of)
    near = node_of[:, None] == node_of
    arriving = np.where(near, 0.0, to_rank).sum(0)
    inside = near * (to_rank + arriving / members[node_of])
    np.fill_diagonal(inside, 0.0)
    across = sum(max((to_node * w).sum(1).max(), ((to_node * w).sum(0) / members).max()) for w in (node, home))
    return both_ways(to_rank), across, both_ways(inside)


def case(node_of, seed):
    rng, node_of = np.random.default_rng(seed), np.unique(node_of, return_inverse=True)[1].astype(np.int64)
    ranks, nodes = len(node_of), node_of.max() + 1
    to_rank, rank = rng.random((2, ranks, ranks)) * (1 - np.eye(ranks))
    to_node, node, home = rng.random((3, ranks, nodes))
    to_node[np.arange(ranks), node_of] = 0.0
    return to_rank, to_node, rank, node, home, node_of


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_it_is_the_formula(node_of, seed):
    arguments = case(node_of, seed)
    assert busiest(*arguments) == pytest.approx(slow(*arguments))


def test_more_ranks_than_a_tile():
    arguments = case(np.arange(2 * TILE + 3) // 8, 0)
    assert busiest(*arguments) == pytest.approx(slow(*arguments))


def test_two_nodes_of_two_worked_out_by_hand():
    # Rank 0 sends half its tokens to rank 2; every link takes a second a byte.
    to_rank, to_node = np.zeros((4, 4)), np.zeros((4, 2))
    to_rank[0, 2] = to_node[0, 1] = 0.5
    rank, ways = 1.0 - np.eye(4), np.ones((4, 2))
    flat, across, inside = busiest(to_rank, to_node, rank, ways, ways, np.array([0, 0, 1, 1]))
    assert flat == 2 * 0.5
    assert across == 2 * 0.5
    assert inside == 2 * 0.25, "half of it arrives at rank 3 and goes on to rank 2"
