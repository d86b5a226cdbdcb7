"""No slot stays empty, whatever the shape; and what fills it does not make a step longer."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.placement import Placement, RoutingStatistics, StepCosts, Topology, contiguous, plan, predict
from ray_ep.placement.planner import plan as planner
from ray_ep.placement.planner.survive import survives
from ray_ep.placement.planner.verdict import Question, decide
from tests.placement.traces import statistics, trace


def cluster(node_of, links=True):
    node_of = np.array(node_of)
    if not links:
        return Topology.of_nodes(node_of)
    bandwidth = np.where(node_of[:, None] == node_of, 4e11, 5e10)
    return Topology(bandwidth, np.zeros_like(bandwidth), node_of)


def filled(placement):
    for rank in placement.slots.reshape(-1, placement.slots.shape[2]):
        held = rank[rank >= 0]
        assert len(set(held.tolist())) == len(held)
    return (placement.slots >= 0).sum(2)


@st.composite
def shapes(draw):
    experts, node_of = draw(st.integers(1, 40)), draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    slots = -(-experts // len(node_of)) + draw(st.integers(0, 6))
    rng, top_k = np.random.default_rng(draw(st.integers(0, 99))), draw(st.integers(1, min(4, experts)))
    heat = draw(st.sampled_from([0, 1, 4]))
    sets = np.argsort(rng.random((2, 130, experts)) * rng.random(experts) ** heat, axis=2)[:, :, -top_k:]
    known = statistics(sets, experts)
    if draw(st.booleans()):
        known = RoutingStatistics(known.load)
    return known, cluster(node_of, draw(st.booleans())), slots


@settings(deadline=None, max_examples=60)
@given(shapes(), st.sampled_from(["node", "rank"]))
def test_every_slot_is_filled_fresh_and_replanned_and_replanning_a_full_plan_fills_it_too(shape, level):
    known, topology, slots = shape
    layers, experts = known.load.shape
    p = plan(known, topology, slots, level=level)
    assert (filled(p) == min(slots, experts)).all()
    again = plan(known, topology, slots, level=level, current=p)
    assert (filled(again) == min(slots, experts)).all()
    small = contiguous(layers, experts, topology.num_ranks)
    grown = plan(known, topology, slots, level=level, current=small)
    assert (filled(grown) == min(slots, experts)).all()
    assert grown.version == small.version + (grown is not small)


@pytest.mark.parametrize("slots", range(9, 15))
@pytest.mark.parametrize("level", ["node", "rank"])
def test_64_experts_of_even_load_on_8_ranks_of_a_node_fill_9_to_14_slots_and_stay_even(slots, level):
    known = RoutingStatistics(np.ones((1, 64), np.int64))
    p = plan(known, Topology.of_nodes([0] * 8), slots, level=level)
    assert (filled(p) == slots).all()
    assert predict(p, known, cluster([0] * 8), level="rank").balancedness > 0.9


@settings(deadline=None, max_examples=25)
@given(shapes(), st.sampled_from(["node", "rank"]), st.integers(1, 2))
def test_safe_plans_are_full_too_and_still_safe(shape, level, lost):
    known, topology, slots = shape
    experts = known.load.shape[1]
    nodes = len(set(topology.node_of.tolist()))
    room = np.minimum(np.bincount(topology.node_of) * min(slots, experts), experts)
    if lost >= nodes or room.sum() < experts * (lost + 1):
        return
    p = plan(known, topology, slots, level=level, survive_nodes=lost)
    assert (filled(p) == min(slots, experts)).all()
    assert survives(p, topology.node_of, lost)


def longer(known, topology, slots, level):
    """Predicted step of a plan over that of the same plan without filling."""
    full = plan(known, topology, slots, level=level)
    with mock.patch.object(planner, "_filled", lambda made, *_: made):
        lean = plan(known, topology, slots, level=level)
    seconds = [predict(p, known, topology, level=level).step_seconds for p in (full, lean)]
    return seconds[0] / seconds[1] if seconds[1] else 1.0


@settings(deadline=None, max_examples=40, derandomize=True)
@given(shapes(), st.sampled_from(["node", "rank"]))
def test_filling_hardly_lengthens_a_step(shape, level):
    """Where every rank holds nearly every expert, a full one serves its own tokens: some shapes are 1 to 3% slower."""
    assert longer(*shape, level) <= 1.04


def test_a_slot_count_for_each_rank_is_filled_as_far_as_ranks_have_use_for_it():
    known = statistics(trace(2, 8, 2, 300), 8)
    p = plan(known, cluster([0, 0, 1, 1]), [8, 9, 3, 4], level="rank")
    assert (filled(p) <= [8, 8, 3, 4]).all()
    assert filled(p).sum() > 2 * 8


@settings(deadline=None, max_examples=25, derandomize=True)
@given(shapes(), st.sampled_from(["node", "rank"]), st.data())
def test_a_slot_count_for_each_rank_is_not_filled_where_a_step_would_be_longer(shape, level, data):
    known, topology, slots = shape
    counts = [slots + data.draw(st.integers(0, 3)) for _ in range(topology.num_ranks)]
    assert longer(known, topology, counts, level) <= 1.005


def test_a_running_job_does_not_move_replicas_that_gain_nothing():
    """Nobody waits for a slot of a running job to be filled: each filled slot is a transfer."""
    known = RoutingStatistics(np.full((2, 8), 1000))
    slots = np.full((2, 4, 3), -1)
    slots[:, :, :2] = np.arange(8).reshape(4, 2)
    current = Placement(slots, 8)
    topology = Topology.of_nodes([0, 0, 0, 0])
    assert (filled(plan(known, topology, 3, current=current)) == 3).all()
    verdict = decide(Question(known, topology, current, 3, StepCosts(), "node", 1.0, 0.5, 1000))
    assert verdict.placement is None
    assert "no other places are worth a move" in verdict.words
