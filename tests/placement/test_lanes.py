"""Network cards that the ranks of a node share: which nodes meet, and what is told from how fast links were then."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ray_ep.errors import PlacementError
from ray_ep.placement.links.probe import LinkFit, company_rounds, with_lanes
from ray_ep.placement.topology import Topology


def test_whole_nodes_meet_in_a_few_rounds_each_rank_with_one_of_the_other_node():
    assert company_rounds([0, 0, 1, 1]) == [[(0, 2), (1, 3)]]
    assert company_rounds([0, 1, 2]) == company_rounds([0, 0, 1]) == company_rounds([0, 0]) == []
    plan = company_rounds(np.repeat(np.arange(5), 3))
    assert [len(pairs) for pairs in plan] == [6, 6, 6]
    met = Counter(r for pairs in plan for p in pairs for r in p)
    assert len(met) == 15
    assert min(met.values()) == 2


def cards(node_of, bandwidth=1e9):
    n = len(node_of)
    return Topology(np.full((n, n), bandwidth), np.zeros((n, n)), np.asarray(node_of))


def company(node_of, kept):
    """What links do in company; kept: by node, the share of its speed that a link to or from it keeps at most."""
    pairs = [p for pairs in company_rounds(node_of) for a, b in pairs for p in ((a, b), (b, a))]
    return {(a, b): LinkFit(0.0, 1e9 * min(kept[node_of[a]], kept[node_of[b]]), 0.0) for a, b in pairs}


@pytest.mark.parametrize(
    ("node_of", "kept", "lanes"),
    [
        ([0, 0, 1, 1], [1, 1], None),
        ([0, 0, 1, 1], [0.8, 1], None),  # noise
        ([0, 0, 1, 1], [0.5, 0.5], [1, 1, 1, 1]),
        ([0, 0, 1, 1], [0.4, 1], [1, 1, 1, 1]),  # which of the two it is nobody can tell
        ([0] * 4 + [1] * 4, [0.5, 0.5], [2] * 8),
        ([0, 0, 1, 1, 2, 2], [1, 1, 0.5], [2, 2, 2, 2, 1, 1]),
        ([0, 0, 1], [1, 1], None),
    ],
)
def test_ranks_that_slow_each_other_down_share_lanes(node_of, kept, lanes):
    found = with_lanes(cards(node_of), company(node_of, kept)).lanes
    assert (found if found is None else found.tolist()) == lanes


def test_lanes_are_kept_with_the_topology_and_checked():
    one = with_lanes(cards([0, 0, 1, 1]), company([0, 0, 1, 1], [0.5, 0.5]))
    assert Topology.from_json(one.to_json()).lanes.tolist() == [1.0] * 4
    assert "lanes" not in cards([0, 0]).to_json()
    for bad in (np.zeros(4), np.full(4, np.nan), np.ones(3)):
        with pytest.raises(PlacementError, match="topology: lanes"):
            replace(one, lanes=bad)
