"""Where survivors go on from: by what each has done, never by who raised; and from whose copy."""

import numpy as np
import pytest

from ray_ep.collective import Membership
from ray_ep.driver.recovery.decide import Survivor, Taken, decide
from ray_ep.placement import Placement, contiguous
from ray_ep.rank.results import RankState
from ray_ep.rank.snapshot.copies import Key
from ray_ep.rank.snapshot.snapshots import Held

NOW = Membership(0, ("a", "b", "c"), (0, 1, 2))  # b keeps a, c keeps b, a keeps c
OWNERS = contiguous(2, 6, 3)
READERS = Placement(np.array([[[0, 1, 2], [3, 4, 5], [0, 1, 3]]]), 6)  # c holds replicas alone
AT_4, AT_8 = Key(0, 4), Key(0, 8)
TAKEN = [Taken(AT_4, NOW, OWNERS), Taken(AT_8, NOW, OWNERS)]


def survivor(updates, ready=None, own=(AT_4,), wards=None):
    return Survivor(RankState(updates, ready, False, False), Held(own, wards or {}))


@pytest.mark.parametrize(
    ("states", "done", "finish"),
    [
        ({"a": (9, None), "b": (9, None)}, 9, None),  # in a forward, or between steps
        ({"a": (9, 9), "b": (9, 9)}, 9, None),  # nobody has updated: the step is made again
        ({"a": (9, 9), "b": (10, None)}, 10, 9),  # b left the last collective, a did not
        ({"a": (10, None), "b": (9, 9)}, 10, 9),
        ({"a": (10, None), "b": (10, None)}, 10, None),  # in publish, or after it
    ],
)
def test_nobody_goes_back_where_no_owner_is_lost(states, done, finish):
    found = decide(NOW, READERS, {m: survivor(*s) for m, s in states.items()}, TAKEN)
    assert (found.done, found.finish, found.snapshot, found.keepers) == (done, finish, None, {})


def test_all_go_back_to_the_newest_snapshot_that_is_whole_without_the_lost_one():
    half = {
        "a": survivor(9, own=(AT_4, AT_8), wards={2: (AT_4,)}),
        "b": survivor(9, own=(AT_4, AT_8), wards={0: (AT_4, AT_8)}),
    }
    found = decide(NOW, OWNERS, half, TAKEN)
    assert (found.done, found.snapshot, found.keepers) == (4, TAKEN[0], {"c": "a"})
    whole = half | {"a": survivor(9, own=(AT_4, AT_8), wards={2: (AT_4, AT_8)})}
    assert decide(NOW, OWNERS, whole, TAKEN).done == 8
    short = whole | {"b": survivor(9, own=(AT_4,), wards={0: (AT_4,)})}
    assert decide(NOW, OWNERS, short, TAKEN).done == 4


def test_a_rank_that_is_lost_with_its_keeper_is_nowhere():
    alone = {"a": survivor(9, wards={2: (AT_4,)})}
    assert "b, c" in decide(NOW, OWNERS, alone, TAKEN)
    assert "no snapshot is whole" in decide(NOW, OWNERS, alone, TAKEN)
    assert "no snapshot yet" in decide(NOW, OWNERS, alone, [])


def test_of_a_lost_rank_that_owned_nothing_then_nothing_is_needed():
    taken = [Taken(AT_4, NOW, READERS)]
    now = OWNERS  # c came to own some since
    there = {"a": survivor(9), "b": survivor(9)}
    found = decide(NOW, now, there, taken)
    assert (found.done, found.keepers) == (4, {})


def test_a_second_loss_before_the_next_snapshot_goes_back_to_that_of_the_first_membership():
    four = Membership(0, ("a", "b", "c", "d"), (0, 0, 1, 1))  # a-c, b-d keep each other
    taken = [Taken(AT_4, four, contiguous(2, 8, 4))]
    later = four.next(["b"])
    now = contiguous(2, 8, 3)
    there = {"c": survivor(4, wards={0: (AT_4,)}), "d": survivor(4, wards={1: (AT_4,)})}
    found = decide(later, now, there, taken)
    assert found.keepers == {"a": "c", "b": "d"}


def test_once_some_went_back_all_do_even_where_nobody_else_is_lost():
    there = {"a": survivor(4, wards={2: (AT_4,)}), "b": survivor(9, wards={0: (AT_4,)})}
    found = decide(NOW.next(["c"]), contiguous(2, 6, 2), there, TAKEN, go_back=True)
    assert (found.done, found.keepers) == (4, {"c": "a"})


def test_ranks_that_are_apart_by_more_than_a_step_go_back_together():
    there = {m: survivor(n, wards={r: (AT_4,)}) for m, n, r in (("a", 9, 2), ("b", 6, 0), ("c", 9, 1))}
    assert decide(NOW, OWNERS, there, TAKEN).done == 4
