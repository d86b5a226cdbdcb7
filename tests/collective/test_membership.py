"""Who is a member of an epoch, and what becomes of ranks between two of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.collective import Membership
from ray_ep.errors import GroupError

THREE = Membership(4, ("a", "b", "c"), (0, 0, 1))


def test_who_stays_keeps_the_order_and_who_comes_is_last():
    after = THREE.next(gone=["b"], come={"d": 1, "e": 2})
    assert after == Membership(5, ("a", "c", "d", "e"), (0, 1, 1, 2))
    assert after.size == 4
    assert after.rank_of("c") == 1
    assert after.origin(THREE) == (0, 2, -1, -1)
    assert after.gone(THREE) == (1,)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Membership(0, (), ()), "at least one member"),
        (lambda: Membership(-1, ("a",), (0,)), "epoch from 0"),
        (lambda: Membership(0, ("a", "b"), (0,)), "2 members on 1 nodes"),
        (lambda: Membership(0, ("a", "b", "a"), (0, 0, 0)), "member a is in it twice"),
        (lambda: THREE.rank_of("d"), "d is no member of epoch 4"),
        (lambda: THREE.next(gone=["d"]), "d is no member of epoch 4"),
        (lambda: THREE.next(gone=["a"], come={"a": 0}), "a was a member of epoch 4"),
        (lambda: THREE.next(gone=["a", "b", "c"]), "at least one member"),
        (lambda: THREE.origin(THREE), "epoch 4 is not before epoch 4"),
    ],
)
def test_a_membership_that_cannot_be_says_why(make, says):
    with pytest.raises(GroupError, match=says):
        make()


@given(st.lists(st.tuples(st.sets(st.integers(0, 9), max_size=3), st.integers(0, 2)), max_size=4))
def test_ranks_between_far_memberships_are_those_of_the_steps_in_between(changes):
    first = now = Membership(0, tuple("abcdefghij"), (0,) * 10)
    origin = tuple(range(10))
    for number, (gone, come) in enumerate(changes):
        leaving = {m for r, m in enumerate(now.members) if r in gone}
        if len(leaving) == now.size and not come:
            continue
        after = now.next(leaving, {f"{number}-{i}": number for i in range(come)})
        origin = tuple(-1 if r < 0 else origin[r] for r in after.origin(now))
        assert set(after.gone(now)) == {now.rank_of(m) for m in leaving}
        now = after
    if now is not first:
        assert now.origin(first) == origin
