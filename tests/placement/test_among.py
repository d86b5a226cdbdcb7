"""What is left of a placement and of a topology under another membership."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.errors import PlacementError
from ray_ep.placement import Placement, StepCosts, Topology, contiguous, migration, moves, random

LAYERS = 2


@st.composite
def placements(draw):
    """Random slots, replicas, primaries and shares over 1 to 4 ranks."""
    ranks, experts, seed = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    room = rng.integers(0, experts + 2, ranks).clip(max=experts)
    room[rng.integers(ranks)] = experts
    p = random(LAYERS, experts, ranks, room.tolist(), seed=seed)
    primary = [[int(rng.choice(p.ranks_of(i, e))) for e in range(experts)] for i in range(LAYERS)]
    shares = rng.random(p.slots.shape) if draw(st.booleans()) else None
    return Placement(p.slots, experts, 3, primary, shares)


@st.composite
def origins(draw, ranks, permuted=True):
    """Some of the ranks, and up to two that come."""
    stay = [r for r in range(ranks) if draw(st.booleans())]
    stay += [-1] * draw(st.integers(0 if stay else 1, 2))
    return draw(st.permutations(stay)) if permuted else stay


def same(a, b):
    return all(
        np.array_equal(getattr(a, n), getattr(b, n)) if getattr(a, n) is not None else getattr(b, n) is None
        for n in ("slots", "primary", "shares", "version", "num_experts")
    )


@settings(deadline=None)
@given(placements())
def test_among_the_same_ranks_nothing_changes(p):
    assert same(p.among(range(p.num_ranks)), p)
    assert not len(p.lost(range(p.num_ranks)))


@settings(max_examples=100, deadline=None)
@given(st.data(), placements())
def test_who_stays_keeps_its_slots_who_comes_has_none_and_what_is_lost_is_told(data, p):
    origin = data.draw(origins(p.num_ranks))
    held = {(i, e) for i in range(LAYERS) for r in origin if r >= 0 for e in p.slots[i, r].tolist() if e >= 0}
    lost = p.lost(origin).tolist()
    assert lost == sorted([i, e] for i in range(LAYERS) for e in range(p.num_experts) if (i, e) not in held)
    if lost:
        with pytest.raises(PlacementError, match=f"{len(lost)} experts are held by nobody any more, first is expert"):
            p.among(origin)
        return
    left = p.among(origin)
    for new, old in enumerate(origin):
        assert np.array_equal(left.slots[:, new], p.slots[:, old] if old >= 0 else np.full_like(p.slots[:, 0], -1))
        if old >= 0:
            assert left.shares is None or np.array_equal(left.shares[:, new], p.shares[:, old])
            assert ((p.owner == old) <= (left.owner == new)).all(), "a primary that stays is one"


@settings(max_examples=100, deadline=None)
@given(st.data(), placements())
def test_two_changes_of_membership_are_one(data, p):
    first = data.draw(origins(p.num_ranks, permuted=False))
    if len(p.lost(first)):
        return
    middle = p.among(first)
    second = data.draw(origins(len(first), permuted=False))
    both = [-1 if r < 0 else first[r] for r in second]
    assert np.array_equal(middle.lost(second), p.lost(both))
    if not len(p.lost(both)):
        assert same(middle.among(second), p.among(both))


@settings(max_examples=100, deadline=None)
@given(st.data(), placements())
def test_keepers_own_what_ranks_that_went_owned_and_everybody_else_what_he_did(data, p):
    stay = [r for r in range(p.num_ranks) if data.draw(st.booleans())]
    origin = [*stay, -1]
    keepers = {r: data.draw(st.integers(0, len(origin) - 1)) for r in range(p.num_ranks) if r not in stay}
    owners = p.primaries()
    assert np.array_equal(owners.owner, p.owner)
    assert (owners.slots >= 0).sum() == LAYERS * p.num_experts
    new_rank = {**{old: new for new, old in enumerate(origin) if old >= 0}, **keepers}
    for q in (p, owners):
        left = q.among(origin, keepers)
        assert np.array_equal(left.owner, np.vectorize(new_rank.get)(p.owner))
        for new, old in enumerate(origin[:-1]):
            had = q.slots[0, old]
            assert (left.slots[0, new, : len(had)][had >= 0] == had[had >= 0]).all()
    assert (left.slots >= 0).sum() == LAYERS * p.num_experts, "each owner once, and nothing else"


def test_a_change_of_membership_by_hand():
    """Ranks 0 1 2, of which 1 dies and one comes: expert 1 goes to rank 2's replica, expert 2 to the keeper."""
    p = Placement(np.array([[[0, 3], [1, 2], [3, 1]]]), 4, primary=np.array([[0, 1, 1, 2]]))
    assert p.lost([0, 2, -1]).tolist() == [[0, 2]]
    with pytest.raises(PlacementError, match="1 experts are held by nobody any more, first is expert 2 of layer 0"):
        p.among([0, 2, -1])
    left = p.among([0, 2, -1], keepers={1: 0})
    assert left.slots.tolist() == [[[0, 3, 1, 2], [3, 1, -1, -1], [-1, -1, -1, -1]]]
    assert left.owner.tolist() == [[0, 0, 0, 1]]
    replicas = Placement(np.array([[[0, 1], [1, 0], [0, 1]]]), 2, primary=np.array([[0, 0]]))
    assert replicas.among([2, 1]).owner.tolist() == [[0, 1]], "the earliest slot, without keepers"


@pytest.mark.parametrize(
    ("origin", "keepers"),
    [([0, 0], {}), ([0, 3], {}), ([-2, 0], {}), ([], {}), ([0, 1], {2: 2}), ([0, 1], {1: 0}), ([0, 1], {5: 0})],
)
def test_an_origin_or_keeper_that_cannot_be_is_refused(origin, keepers):
    with pytest.raises(PlacementError, match=r"origin|keeper"):
        contiguous(1, 6, 3).among(origin, keepers)


def test_moves_between_memberships_start_from_what_is_left():
    old, new = random(LAYERS, 6, 3, 4, seed=1), random(LAYERS, 6, 2, 4, seed=2)
    with pytest.raises(PlacementError, match=r"6 experts on 3 ranks to .* on 2 ranks; .* from `old.among\(origin\)`"):
        moves(old, new)
    mid = old.primaries().among([0, 2], keepers={1: 1})
    found = moves(mid, new)
    assert all(m.source in (0, 1) for m in found)
    joined = new.among([0, 1, -1])
    grown = contiguous(LAYERS, 6, 3)
    found = moves(joined, grown)
    assert {m.expert for m in found if m.target == 2 and m.state} == {4, 5}
    costs = StepCosts(expert_bytes=1000)
    assert migration(joined, grown, Topology.of_nodes([0, 0, 1]), costs).primaries == sum(m.state for m in found)


def topology(ranks, seed, **more):
    rng = np.random.default_rng(seed)
    node_of = np.sort(rng.integers(0, 3, ranks))
    square = (ranks, ranks)
    return Topology(
        1e9 * (1 + rng.random(square)), 1e-5 * rng.random(square), node_of, spread=rng.random(square),
        measured=rng.random(square) < 0.5, groups=rng.integers(0, 2, ranks), joined=rng.integers(0, 3, square),
        lanes=1.0 + node_of, measured_at=5.0, **more,
    )  # fmt: skip


FIELDS = ("bandwidth", "latency", "node_of", "spread", "measured", "groups", "joined", "lanes", "measured_at")


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 99))
def test_among_the_same_ranks_all_links_are_as_they_were(ranks, seed):
    t = topology(ranks, seed)
    again = t.among(range(ranks), t.node_of)
    assert all(np.array_equal(getattr(again, n), getattr(t, n)) for n in FIELDS)


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(0, 99))
def test_links_between_ranks_that_stay_are_kept_whatever_comes_and_goes_in_between(data, ranks, seed):
    t = topology(ranks, seed)
    first = data.draw(origins(ranks))
    middle = t.among(first, [t.node_of[r] if r >= 0 else 7 for r in first])
    second = data.draw(origins(len(first)))
    both = [-1 if r < 0 else first[r] for r in second]
    last = middle.among(second, [middle.node_of[r] if r >= 0 else 8 for r in second])
    stay = [new for new, old in enumerate(both) if old >= 0]
    old = [both[new] for new in stay]
    for name in FIELDS[:-1]:
        want, got = getattr(t, name), getattr(last, name)
        at = (np.ix_(stay, stay), np.ix_(old, old)) if want.ndim == 2 else (stay, old)
        assert np.array_equal(got[at[0]], want[at[1]]), name


def test_links_of_one_that_comes_are_the_median_of_their_kind_and_count_as_not_measured():
    bandwidth = np.full((4, 4), 10.0)
    bandwidth[:2, :2], bandwidth[2:, 2:] = 100.0, 200.0
    bandwidth[0, 3] = 30.0
    t = Topology(
        bandwidth, np.full((4, 4), 1e-4), [0, 0, 1, 1], measured=np.ones((4, 4)), groups=[0, 0, 1, 1],
        lanes=[2, 2, 1, 1], spread=np.full((4, 4), 0.5),
    )  # fmt: skip
    grown = t.among([0, 1, 2, -1, -1], [0, 0, 1, 1, 5])
    assert grown.bandwidth[3, 2] == grown.bandwidth[2, 3] == 150.0
    assert set(grown.bandwidth[3, [0, 1]]) == set(grown.bandwidth[4, :4]) == {10.0}
    assert not grown.measured[3:].any()
    assert not grown.measured[:, 3:].any()
    assert grown.groups.tolist()[:4] == [0, 0, 1, 1]
    assert grown.groups[4] not in (0, 1)
    assert grown.lanes.tolist() == [2, 2, 1, 1, 1]
    alone = Topology.of_nodes([0]).among([0, -1], [0, 0])
    assert np.isinf(alone.bandwidth).all()
    one_node = Topology(np.full((2, 2), 5.0), np.full((2, 2), 1e-4), [0, 0]).among([0, 1, -1], [0, 0, 9])
    assert one_node.bandwidth[2, 0] == 5.0, "the worst that is known"


@pytest.mark.parametrize(
    ("origin", "nodes"), [([0, 0], [0, 0]), ([0, 2], [0, 0]), ([0, 1], [0]), ([0, 1], [0, 3]), ([-2], [0])]
)
def test_a_topology_refuses_what_cannot_be(origin, nodes):
    with pytest.raises(PlacementError, match=r"origin|node_of"):
        Topology.of_nodes([0, 0]).among(origin, nodes)
