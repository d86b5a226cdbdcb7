import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.errors import PlacementError
from ray_ep.placement import Topology, plan, predict
from ray_ep.placement.planner.survive import fewest_slots, price, survives
from tests.placement.traces import statistics, trace


@st.composite
def clusters(draw):
    """Experts, nodes of ranks, slots of each rank, and how many nodes may go: always enough slots."""
    experts, nodes = draw(st.integers(1, 10)), draw(st.integers(1, 4))
    node_of = np.repeat(np.arange(nodes), draw(st.lists(st.integers(1, 3), min_size=nodes, max_size=nodes)))
    room = draw(st.lists(st.integers(0, 6), min_size=len(node_of), max_size=len(node_of)))
    lost = draw(st.integers(0, nodes - 1))
    for n in range(lost + 1):  # as many nodes as must hold everything, if nothing else does
        room[int(np.argmax(node_of == n))] = experts
    return experts, node_of, room, lost, draw(st.integers(0, 50))


@settings(deadline=None, max_examples=60)
@given(clusters(), st.sampled_from(["node", "rank"]))
def test_any_k_nodes_may_go_and_every_expert_has_a_replica(cluster, level):
    experts, node_of, room, lost, seed = cluster
    rng = np.random.default_rng(seed)
    sets = np.argsort(rng.random((2, 60, experts)) * rng.random(experts), axis=2)[:, :, : min(2, experts)]
    stats, topology = statistics(sets, experts), Topology.of_nodes(node_of.tolist())
    p = plan(stats, topology, room, level=level, survive_nodes=lost)
    assert ((p.slots >= 0).sum(2) <= np.array(room)).all()
    for gone in itertools.combinations(range(int(node_of.max()) + 1), lost):
        left = p.slots[:, ~np.isin(node_of, gone)]
        assert all(set(range(experts)) <= set(layer.ravel().tolist()) for layer in left)
    assert survives(p, node_of, lost)
    for row in p.slots.reshape(-1, p.slots.shape[2]):
        filled = row[row >= 0]
        assert len(np.unique(filled)) == len(filled)
    assert survives(plan(stats, topology, room, level=level, survive_nodes=lost, current=p), node_of, lost)


def test_a_safe_plan_stays_for_the_same_figures_and_is_made_from_one_that_is_not():
    topology = Topology.of_nodes([0, 0, 1, 1, 2, 2, 3, 3])
    before, after = (statistics(trace(2, 32, 4, 4096, drift=d), 32) for d in (0.0, 0.6))
    safe = plan(before, topology, 10, survive_nodes=1)
    assert plan(before, topology, 10, survive_nodes=1, current=safe) is safe
    assert survives(plan(after, topology, 10, survive_nodes=1, current=safe), topology.node_of, 1)
    made = plan(before, topology, 10, survive_nodes=1, current=plan(before, topology, 10))
    assert survives(made, topology.node_of, 1)
    assert made.version == 1


def test_the_price_is_stated_and_safety_replicas_bring_no_tokens_from_afar():
    stats, topology = statistics(trace(2, 32, 4, 4096), 32), Topology.of_nodes([0, 0, 1, 1, 2, 2, 3, 3])
    free, safe = plan(stats, topology, 8), plan(stats, topology, 8, survive_nodes=1)
    assert not survives(free, topology.node_of, 1)
    cost = price(safe, free, stats, topology)
    a, b = (predict(p, stats, topology, level="node") for p in (safe, free))
    assert cost.step_seconds == pytest.approx(a.step_seconds - b.step_seconds)
    assert cost.remote_nodes == pytest.approx((a.remote_nodes - b.remote_nodes).mean())
    assert cost.slots == (safe.slots >= 0).sum() - (free.slots >= 0).sum()
    assert "replicas" in str(cost)
    tight = plan(stats, topology, 4)
    assert price(safe, tight, stats, topology).slots == 2 * 32
    assert predict(safe, stats, topology, level="node").remote_nodes.mean() < (
        predict(tight, stats, topology, level="node").remote_nodes.mean()
    )


def test_with_no_slot_to_spare_every_expert_is_on_exactly_k_plus_one_nodes():
    stats, topology = statistics(trace(1, 12, 2, 1024), 12), Topology.of_nodes([0, 0, 1, 1, 2, 2])
    p = plan(stats, topology, 4, survive_nodes=1)
    assert [len({int(topology.node_of[r]) for r in p.ranks_of(0, e)}) for e in range(12)] == [2] * 12


@pytest.mark.parametrize(
    ("lost", "slots", "says"),
    [(1, 3, "24 slots.*12 of use: 6 slots a rank"), (2, 6, "at most 1 may be lost"), (-1, 6, "expected 0 or more")],
)
def test_too_few_slots_or_nodes_are_named(lost, slots, says):
    stats, topology = statistics(trace(1, 12, 2, 256), 12), Topology.of_nodes([0, 0, 1, 1])
    with pytest.raises(PlacementError, match=says):
        plan(stats, topology, slots, survive_nodes=lost)


def test_the_fewest_slots_are_those_with_which_it_can_be():
    assert fewest_slots(12, [0, 0, 1, 1], 1) == 6
    assert fewest_slots(12, [0, 0, 1, 1], 0) == 3
    assert fewest_slots(12, [0, 0, 0, 1], 1) == 12, "the lone rank must hold everything"
    with pytest.raises(PlacementError, match="at most 1 may be lost"):
        fewest_slots(12, [0, 0, 1, 1], 2)
