"""The compiled time of a layer's traffic against the formula written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.placement.cost.link_time import TILE, busiest


def slow(copies, link, ports, cards, node_ways, node_of):
    """flat, across, inside as whole arrays."""
    to_rank, to_node = copies
    members, near = np.bincount(node_of), node_of[:, None] == node_of
    on = (node_of[:, None] == np.arange(len(members))).astype(float)  # [R, N]

    def until_there(copies, link, out, into, members=1):
        """Of copies [R, P]: the slowest link, or the port that takes longest."""
        return max((copies * link).max(), (copies * out).sum(1).max(), ((copies * into).sum(0) / members).max())

    def carried(from_to, cards):
        """Of copies between nodes [N, N]: the node that takes longest to send or receive them."""
        far = from_to * (1 - np.eye(len(from_to)))
        return max((far.sum(1) * cards[0]).max(), (far.sum(0) * cards[1]).max())

    def both_ways(copies):
        out = np.where(near, ports[0, 0][:, None], ports[0, 1][:, None]) * (link > 0)
        into = np.where(near, ports[1, 0], ports[1, 1]) * (link > 0)
        there = max(until_there(copies, link, out, into), carried(on.T @ (copies * (link > 0)) @ on, cards))
        back = carried((on.T @ (copies * (link.T > 0)) @ on).T, cards)
        return there + max(until_there(copies, link.T, into.T, out.T), back)

    arriving = np.where(near, 0.0, to_rank).sum(0)
    inside = near * (to_rank + arriving / members[node_of])
    np.fill_diagonal(inside, 0.0)
    between = on.T @ to_node
    across = (until_there(to_node, *w, members) for w in node_ways)
    two = sum(max(a, carried(b, cards)) for a, b in zip(across, (between, between.T), strict=True))
    return both_ways(to_rank), two, both_ways(inside)


def case(node_of, seed):
    rng, node_of = np.random.default_rng(seed), np.unique(node_of, return_inverse=True)[1].astype(np.int64)
    ranks, nodes = len(node_of), node_of.max() + 1
    to_rank, link = rng.random((2, ranks, ranks)) * (1 - np.eye(ranks))
    link *= rng.random(link.shape) < 0.9  # some links were not measured
    to_node = rng.random((ranks, nodes))
    to_node[np.arange(ranks), node_of] = 0.0
    return (
        (to_rank, to_node),
        link,
        rng.random((2, 2, ranks)),
        rng.random((2, nodes)),
        rng.random((2, 3, ranks, nodes)),
        node_of,
    )


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
    link, ports, ways = 1.0 - np.eye(4), np.ones((2, 2, 4)), np.ones((2, 3, 4, 2))
    cards, node_of = np.zeros((2, 2)), np.array([0, 0, 1, 1])
    flat, across, inside = busiest((to_rank, to_node), link, ports, cards, ways, node_of)
    assert flat == 2 * 0.5
    assert across == 2 * 0.5
    assert inside == 2 * 0.25, "half of it arrives at rank 3 and goes on to rank 2"
    to_rank[1, 3] = to_node[1, 1] = 0.5
    assert busiest((to_rank, to_node), link, ports, cards, ways, node_of)[:2] == (2 * 0.5, 2 * 0.5)
    shared = busiest((to_rank, to_node), link, ports, np.ones((2, 2)), ways, node_of)
    assert shared[:2] == (2 * 1.0, 2 * 1.0), "both go through one card"
