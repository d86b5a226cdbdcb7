"""What moves between two placements, and in which rounds: only the difference, each byte once, within the buffers."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.errors import PlacementError
from ray_ep.placement import Move, Placement, StepCosts, Topology, contiguous, migration, moves, random
from ray_ep.placement.migration import MovePart, move_rounds

SETTINGS = settings(deadline=None, max_examples=60)


@st.composite
def two_placements(draw):
    """Placements of one model on the same ranks, with unlike slots and primaries anywhere among the holders."""
    layers, experts, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    out = []
    for _ in range(2):
        room = draw(st.lists(st.integers(0, experts), min_size=ranks, max_size=ranks))
        room[draw(st.integers(0, ranks - 1))] = experts
        p = random(layers, experts, ranks, room, seed=draw(st.integers(0, 99)))
        pick = draw(st.integers(0, 9))
        primary = [[(h := p.ranks_of(i, e))[(pick + e) % len(h)] for e in range(experts)] for i in range(layers)]
        out.append(Placement(p.slots, experts, primary=primary))
    return out


def holdings(p):
    """{(layer, expert, rank)} of compute weights."""
    return {(i, e, r) for i in range(p.num_layers) for r in range(p.num_ranks) for e in p.experts_of(i, r)}


@SETTINGS
@given(two_placements())
def test_moves_are_the_difference_and_come_from_ranks_that_have_what_they_send(pair):
    old, new = pair
    found, before, after = moves(old, new), holdings(old), holdings(new)
    arrived = [(m.layer, m.expert, m.target) for m in found if m.weights]
    assert sorted(arrived) == sorted(after - before), "each new replica once, nothing that is there"
    owners = {(m.layer, m.expert): (m.source, m.target) for m in found if m.state}
    changed = {(i, e): (old.owner[i, e], new.owner[i, e]) for i, e in np.argwhere(old.owner != new.owner).tolist()}
    assert owners == changed
    assert sum(m.state for m in found) == len(owners)
    for m in found:
        assert m.weights or m.state
        assert m.source != m.target
        assert (m.layer, m.expert, m.source) in before
    assert found == moves(old, new), "the same on every rank"


@SETTINGS
@given(two_placements())
def test_the_way_to_the_same_placement_is_empty(pair):
    assert moves(pair[0], pair[0]) == []


def test_moves_by_hand():
    old = contiguous(1, 4, 2)  # 0 1 | 2 3
    new = Placement(np.array([[[0, 2, 3], [1, 2, 0]]]), 4, primary=[[0, 1, 1, 0]])
    assert moves(old, new) == [
        Move(0, 0, 0, 1, weights=True, state=False),
        Move(0, 1, 0, 1, weights=True, state=True),
        Move(0, 2, 1, 0, weights=True, state=False),
        Move(0, 3, 1, 0, weights=True, state=True),
    ]
    promoted = Placement(np.array([[[0, 2, 3], [1, 2, 0]]]), 4, primary=[[1, 1, 1, 0]])
    assert moves(new, promoted) == [Move(0, 0, 0, 1, weights=False, state=True)], "a replica that becomes the primary"


def test_a_replica_comes_from_the_nearest_holder_and_equally_near_ones_take_turns():
    slots = np.full((1, 5, 2), -1)
    slots[0, :, 0] = [0, 0, 1, 0, -1]
    old = Placement(slots, 2)
    more = slots.copy()
    more[0, 4] = [0, 1]
    far = np.ones((5, 5))
    far[3, 4] = 0.5
    assert [(m.source, m.target) for m in moves(old, Placement(more, 2), far)] == [(3, 4), (2, 4)]

    layers = 6
    slots = np.tile(np.array([[0], [0], [0], [-1]]), (layers, 1, 1))
    more = slots.copy()
    more[:, 3] = 0
    sources = Counter(m.source for m in moves(Placement(slots, 1), Placement(more, 1)))
    assert sources == {0: 2, 1: 2, 2: 2}


@SETTINGS
@given(two_placements(), st.integers(1, 400), st.data())
def test_rounds_carry_every_byte_once_in_order_and_keep_within_the_buffer(pair, buffer, data):
    found, ranks = moves(*pair), pair[0].num_ranks
    sizes = [data.draw(st.integers(0, 500)) for _ in found]
    out = move_rounds(found, sizes, ranks, buffer)
    at = [0] * len(found)
    sent, received = Counter(), Counter()
    for parts in out:
        round_sent, round_received = Counter(), Counter()
        for p in parts:
            assert at[p.move] == p.start < p.stop
            at[p.move] = p.stop
            round_sent[found[p.move].source] += p.stop - p.start
            round_received[found[p.move].target] += p.stop - p.start
        assert 0 < max([*round_sent.values(), *round_received.values()]) <= buffer
        sent, received = sent + round_sent, received + round_received
    assert at == sizes
    busiest = max([0, *sent.values(), *received.values()])
    assert -(-busiest // buffer) <= len(out) <= 2 * (busiest // buffer) + 1
    assert out == move_rounds(found, sizes, ranks, buffer)


def test_rounds_by_hand():
    ways = [Move(0, e, s, t, True, False) for e, (s, t) in enumerate([(0, 1), (0, 2), (2, 1)])]
    assert move_rounds(ways, [10, 4, 6], 3, 8) == [
        [MovePart(0, 0, 8)],
        [MovePart(2, 0, 6), MovePart(0, 8, 10), MovePart(1, 0, 4)],
    ]


@SETTINGS
@given(two_placements(), st.integers(1, 100), st.integers(0, 1000))
def test_the_price_is_that_of_the_moves(pair, weights, optimizer):
    old, new = pair
    ranks = old.num_ranks
    topology = Topology(np.full((ranks, ranks), 10.0), np.full((ranks, ranks), 0.25), np.zeros(ranks))
    price = migration(old, new, topology, StepCosts(expert_bytes=weights, optimizer_bytes=optimizer))
    found = moves(old, new)
    assert (price.replicas, price.primaries) == (sum(m.weights for m in found), sum(m.state for m in found))
    ends = np.zeros((2, ranks))
    for m in found:
        ends[[0, 1], [m.source, m.target]] += (weights * m.weights + optimizer * m.state) / 10 + 0.25
    assert price.seconds == pytest.approx(ends.max())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: moves(contiguous(1, 4, 2), contiguous(2, 4, 2)), "not of one model"),
        (lambda: moves(contiguous(1, 4, 2), contiguous(1, 5, 2)), "not of one model"),
        (lambda: moves(contiguous(1, 4, 2), contiguous(1, 4, 4)), "not of one model"),
        (lambda: moves(contiguous(1, 4, 2), contiguous(1, 4, 2), np.ones((3, 3))), r"expected \[2, 2\]"),
        (lambda: move_rounds([], [], 2, 0), "buffer_bytes=0"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(PlacementError, match=says):
        make()
