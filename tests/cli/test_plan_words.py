"""What `ray-ep plan` says of placements, and that nobody says otherwise. Pure: no files."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.cli.plan.words import assumed, sentences
from ray_ep.placement import Placement, RoutingStatistics, StepCosts, Topology, contiguous, random
from ray_ep.placement.compare import PLAN, Case, Measured, candidates, compare, question, verdict
from ray_ep.placement.engines.records import vllm_record
from ray_ep.placement.planner.verdict import LEAST_GAIN, decide

COSTS = StepCosts(tokens_per_rank=512, token_bytes=256, expert_seconds=2e-5, expert_bytes=2e5, optimizer_bytes=6e5)


def case(statistics, node_of, slots=None, horizon=1000.0, bandwidth=1e9, level="rank", costs=COSTS, lost=0):
    n = len(node_of)
    links = Topology(np.full((n, n), bandwidth), np.full((n, n), 1e-5) * (1 - np.eye(n)), np.array(node_of))
    return Case(statistics, links, slots, level, horizon, costs, survive_nodes=lost, free_slots=slots)


def words(statistics, placements, node_of, level="rank", expert_bytes=None):
    found = compare(case(statistics, node_of, level=level), placements, next(iter(placements)))
    return sentences(found, found[0].name, level, expert_bytes)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    skew=st.floats(0, 3),
    sampled=st.booleans(),
    experts=st.sampled_from([4, 6]),
    node_of=st.sampled_from([(0, 0), (0, 1), (0, 0, 1, 1)]),
    extra=st.integers(0, 1),
    horizon=st.sampled_from([1e-3, 1.0, 100.0, 1e6]),
    bandwidth=st.sampled_from([1e6, 1e9, 1e12]),
    level=st.sampled_from(["node", "rank"]),
    known=st.booleans(),
    measured=st.one_of(st.none(), st.builds(Measured, st.floats(1e-3, 10), st.floats(1e-4, 1))),
)
def test_the_table_the_sentences_and_the_running_job_agree(
    seed, skew, sampled, experts, node_of, extra, horizon, bandwidth, level, known, measured
):  # fmt: skip
    rng = np.random.default_rng(seed)
    score = rng.random((2, 200, experts)) + skew * rng.random((2, 1, experts))
    sets = np.argsort(-score, 2)[:, :, :2].astype(np.int32)
    load = np.stack([np.bincount(s.ravel(), minlength=experts) for s in sets])
    statistics = RoutingStatistics(load, sample=sets if sampled else None)
    slots = -(-experts // len(node_of)) + extra
    this = case(statistics, node_of, slots, horizon, bandwidth, level)
    now = random(2, experts, len(node_of), slots, seed=seed)
    found = compare(this, candidates(this, now if known else None), "current" if known else "contiguous")
    current, new = found[0].placement, next(c for c in found if c.name == PLAN)
    answer = verdict(this, found, found[0].name, measured)
    if known:  # a running job has a placement
        job = decide(question(this, current, measured))
        assert (job.words, job.gain, job.cost) == (answer.words, answer.gain, answer.cost)
        assert (job.placement is None) == (answer.placement is None)
    before, after = found[0].prediction.step_seconds, new.prediction.step_seconds
    if answer.placement is None:
        assert answer.words.startswith("stay: ")
    else:  # the table's figures say the same: it gains, enough of a step, and soon enough
        assert answer.words.startswith("move ")
        assert after < before
        assert new.moving.replicas + new.moving.primaries > 0
        assert answer.gain >= LEAST_GAIN * (before if measured is None else measured.step_seconds)
        assert answer.cost <= answer.gain * horizon
    told = " ".join([*sentences(found, found[0].name, level, None), *assumed(found, True)])
    assert not re.search("rebalanc|stay|move ", told, re.I), "sentences tell what changes, the verdict what to do"


def test_a_placement_is_told_with_its_price():
    s = RoutingStatistics(np.array([[30, 30, 10, 10]]))
    (told,) = words(s, {"now": contiguous(1, 4, 2), "other": Placement([[[0, 2], [1, 3]]], 4)}, [0, 1], "rank", 1e9)
    assert "other: the busiest rank has 1.00x the mean load (now 1.50x), so expert compute takes 33% less" in told
    assert "costs 0.00 GB more memory in all, 0.00 GB on the fullest rank, and 2.00 GB moved once" in told
    (told,) = words(s, {"now": contiguous(1, 4, 2), "other": contiguous(1, 4, 2, 3)}, [0, 1])
    assert "costs 2 slots more memory in all, 1 slots on the fullest rank, and 2 slots moved once" in told


def test_visits_to_other_nodes_are_told_where_tokens_were_sampled():
    pairs = np.array([[[0, 2]], [[2, 0]], [[1, 3]], [[0, 2]], [[0, 2]], [[0, 2]]] * 50)
    s = vllm_record([("x", pairs)], 4).statistics
    both = {"split": Placement([[[0, 1], [2, 3]]], 4), "together": Placement([[[0, 2], [1, 3]]], 4)}
    (told,) = words(s, both, [0, 1], "node")
    assert "a token visits 0.50 other nodes a layer (now 1.00, 50% less on the slow links)" in told
    assert "the busiest node has 1.67x the mean load (now 1.00x), so expert compute takes 67% more" in told


@pytest.mark.parametrize(("nearest", "says"), [(True, "replica."), (False, "any replica, near or far")])
def test_what_is_assumed_is_said(nearest, says):
    s = RoutingStatistics(np.array([[10, 10, 10, 10]]))
    this = case(s, [0, 1])
    plain = compare(this, {"a": contiguous(1, 4, 2)}, "a")
    assert assumed(plain, nearest) == [
        "Remote nodes are unknown: only counts were recorded (SGLang: record in mode per_token)."
    ]
    replicas = compare(this, {"a": contiguous(1, 4, 2, 3)}, "a")
    assert "Assumed: a token goes to its nearest replica" in assumed(replicas, nearest)[1]
    assert says in assumed(replicas, nearest)[1]
