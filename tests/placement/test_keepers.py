"""Who keeps whose snapshots: never on the same node where it can be helped, and nobody keeps much more than others."""

from collections import Counter
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.placement.keepers import NOBODY, keepers


@pytest.mark.parametrize(
    ("node_of", "want"),
    [
        ([0], (NOBODY,)),
        ([0, 0], (1, 0)),
        ([0, 1], (1, 0)),
        ([0, 0, 1, 1], (2, 3, 0, 1)),
        ([0, 0, 0, 1], (3, 3, 3, 0)),
    ],
)
def test_by_hand(node_of, want):
    assert keepers(node_of) == want


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40))
def test_a_keeper_is_another_rank_on_another_node_and_the_work_is_shared(node_of):
    found, count = keepers(node_of), Counter(node_of)
    assert all(keeper not in (rank, NOBODY) for rank, keeper in enumerate(found))
    if len(count) > 1:
        assert all(node_of[k] != node_of[r] for r, k in enumerate(found))
        fullest = max(count.values())
        assert max(Counter(found).values()) == max(1, ceil(fullest / (len(node_of) - fullest)))
    else:
        assert sorted(found) == list(range(len(node_of)))
