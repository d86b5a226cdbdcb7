import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.errors import PlacementError
from ray_ep.placement import Placement, RoutingStatistics, Topology, contiguous, random
from ray_ep.placement.placement import CHOICES


def test_contiguous_by_hand():
    p = contiguous(1, 5, 2)
    assert p.slots.tolist() == [[[0, 1, 2], [3, 4, 0]]]
    assert p.owner.tolist() == [[0, 0, 0, 1, 1]]
    assert p.experts_of(0, 1) == [3, 4, 0]
    assert p.ranks_of(0, 0) == [0, 1]


def test_contiguous_with_even_experts_has_no_replica():
    assert contiguous(2, 4, 2).slots.tolist() == [[[0, 1], [2, 3]]] * 2


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
def test_every_fill_is_a_placement(experts, ranks, spare, seed):
    slots = -(-experts // ranks) + spare
    p = random(2, experts, ranks, slots, seed=seed)
    assert p.slots.shape == (2, ranks, slots)
    for layer in range(2):
        owned = [e for r in range(ranks) for e in p.experts_of(layer, r) if p.owner[layer, e] == r]
        assert sorted(owned) == list(range(experts))


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2), st.integers(0, 9))
def test_routes_lead_to_a_rank_that_holds_the_expert_and_stay_local_when_they_can(experts, ranks, spare, seed):
    p = random(1, experts, ranks, -(-experts // ranks) + spare, seed=seed)
    for source in range(ranks):
        table = p.routes(0, source)
        assert table.shape == (experts, CHOICES)
        for e in range(experts):
            hosts = p.ranks_of(0, e)
            assert set(table[e]) <= ({source} if source in hosts else set(hosts))


def test_routes_prefer_the_node_and_follow_the_shares():
    slots = np.array([[[0], [1], [0], [0]]])
    p = Placement(slots, 2, shares=np.array([[[1.0], [1.0], [3.0], [1.0]]]))
    near = p.routes(0, 1, node_of=np.array([0, 0, 1, 1]))
    assert set(near[0]) == {0}
    far = np.bincount(p.routes(0, 1, node_of=np.array([0, 1, 2, 3]))[0], minlength=4)
    assert abs(far[2] - CHOICES * 0.6) <= 1


def test_different_slots_per_rank_and_json_round_trip(tmp_path):
    p = contiguous(2, 6, 3, [4, 1, 1])
    assert [len(p.experts_of(0, r)) for r in range(3)] == [4, 1, 1]
    (tmp_path / "p.json").write_text(p.to_json())
    q = Placement.load(tmp_path / "p.json")
    assert (q.slots == p.slots).all()
    assert (q.owner == p.owner).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: contiguous(1, 8, 2, 3), "at least 4 a rank"),
        (lambda: contiguous(1, 8, 2, [3, 4]), "at least 4 a rank"),
        (lambda: contiguous(1, 8, 2, [3, 4, 5]), "3 entries for 2 ranks"),
        (lambda: Placement(np.array([[[0, 1], [1, -1]]]), 3), "expert 2"),
        (lambda: Placement(np.array([[[0, 5]]]), 2), "names expert 5"),
        (lambda: Placement(np.array([[[0], [1]]]), 2, primary=np.array([[1, 1]])), "does not hold"),
        (lambda: Placement(np.array([[0, 1]]), 2), "expected"),
        (lambda: Placement.from_json("{}"), "not a placement"),
        (lambda: Placement.from_json('{"slots": 3}', "a.json"), "^a.json: placement slots have shape"),
        (lambda: Placement.load("/nowhere.json"), "^placement file /nowhere.json: No such file or directory$"),
        (lambda: RoutingStatistics(np.array([1.0])), "expected finite"),
        (lambda: RoutingStatistics(np.ones((2, 3)), np.ones((2, 3, 2))), "coactivation"),
        (lambda: RoutingStatistics(np.ones((2, 3)), sample=np.ones((1, 3, 2))), "sample"),
        (lambda: Topology(np.full((2, 2), np.nan), np.zeros((2, 2)), np.zeros(2)), "positive"),
        (lambda: Topology(np.ones((2, 2)), np.zeros((2, 2)), np.zeros(3)), "3 ranks"),
        (lambda: Topology.from_json("[]"), "not a topology"),
        (lambda: Topology.from_json('{"bandwidth": [[1]], "latency": [[0]], "node_of": [0, 0]}', "a"), "^a: "),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(PlacementError, match=says):
        make()


def test_rank_load_by_hand():
    p = contiguous(1, 4, 2)
    assert p.rank_load(np.array([[1.0, 2, 3, 4]])).tolist() == [[3.0, 7.0]]
    assert RoutingStatistics(np.array([[1, 2, 3, 4]])).balancedness(p) == pytest.approx(5 / 7)


def test_statistics_and_topology_survive_their_files(tmp_path):
    s = RoutingStatistics(
        np.arange(6).reshape(2, 3), np.zeros((2, 3, 3)), np.zeros((1, 3, 3)), np.zeros((2, 4, 2), np.int32)
    )
    s.save(tmp_path / "s.npz")
    t = RoutingStatistics.load_file(tmp_path / "s.npz")
    assert (t.load == s.load).all()
    with pytest.raises(PlacementError, match="gone"):
        RoutingStatistics.load_file(tmp_path / "gone.npz")
    topo = Topology.from_json(Topology.of_nodes([0, 0, 1]).to_json())
    assert topo.node_of.tolist() == [0, 0, 1]
    assert np.isinf(topo.bandwidth).all()
