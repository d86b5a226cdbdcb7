"""balance_step against plain NumPy references, and the optimum where it can be enumerated."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.placement.in_step.rules import balance_step, warm
from tests.placement.step_rules import make_rules, rank_seconds, slow_flows

QUICK = settings(max_examples=150, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def compiled():
    warm()


def slow_nearest(counts, rules):
    """[E, R] pairs by the nearest-replica rule, pair by pair; what does not divide starts at replica source + e."""
    quota = np.zeros(rules.holds.shape, int)
    for (i, e), c in np.ndenumerate(counts):
        hosts = np.nonzero(rules.holds[e])[0]
        near = hosts[rules.node_of[hosts] == rules.node_of[i]]
        hosts = [i] if i in hosts else near if len(near) else hosts
        for n in range(c):
            quota[e, hosts[(i + e + n) % len(hosts)]] += 1
    return quota


@st.composite
def cases(draw):
    """(counts, rules): any sizes, replicas, nodes, speeds, costs and limits."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([2, 20, 500]))
    counts = rng.integers(0, scale + 1, (ranks, experts)) * (rng.random((1, experts)) ** draw(st.integers(0, 8)))
    owner = rng.integers(0, ranks, experts) * draw(st.integers(0, 1))
    holds = rng.random((experts, ranks)) < draw(st.sampled_from([0.0, 0.3]))
    holds[np.arange(experts), owner] = True
    rules = make_rules(
        holds, owner, rng.integers(0, draw(st.integers(1, 3)), ranks), rng.choice([1.0, 1.0, 2.0], ranks),
        draw(st.sampled_from([0.0, 0.05, 0.5])) * scale, draw(st.sampled_from([0.0, 0.05, 0.5])),
        draw(st.sampled_from([0, 1, 2, 99])), draw(st.sampled_from([0, 1, 10])),
    )  # fmt: skip
    if draw(st.booleans()):  # links that differ a lot, some of them forbidden to weights
        off = ~np.eye(ranks, dtype=bool)
        closed = (rng.random((ranks, ranks)) < 0.1) & off
        uneven = 10 ** rng.uniform(-1, 1, (2, ranks, ranks))
        rules = dataclasses.replace(
            rules,
            expert_seconds=np.where(closed, np.inf, rules.expert_seconds * uneven[0]),
            pair_seconds=rules.pair_seconds * uneven[1],
        )
    return counts.astype(np.int64), rules


@given(cases(), st.booleans())
@QUICK
def test_every_pair_is_computed_once_and_every_rank_sees_the_same_flows(case, cross):
    counts, rules = case
    plan = balance_step(counts, rules, cross=cross)
    assert plan.quota.dtype == np.int64
    assert (plan.quota >= 0).all()
    assert (plan.quota.sum(1) == counts.sum(0)).all()
    sends = np.stack([plan.sends(source) for source in range(len(counts))])
    assert (sends == slow_flows(counts, plan.quota, rules.node_of)).all()
    assert (sends.sum(2) == counts).all()
    assert (sends.sum(0) == plan.quota).all()
    assert (sends.sum(1) == plan.pairs_between()).all()


@given(cases(), st.booleans())
@QUICK
def test_guests_are_exactly_the_ranks_that_compute_what_they_do_not_hold(case, cross):
    counts, rules = case
    plan = balance_step(counts, rules, cross=cross)
    expert, sender, to = plan.guests.T
    assert {(e, r) for e, r in zip(*np.nonzero((plan.quota > 0) & ~rules.holds), strict=True)} == set(
        zip(expert, to, strict=True)
    )
    assert plan.guests.tolist() == sorted(plan.guests.tolist(), key=lambda g: (g[2], g[0]))
    assert rules.holds[expert, sender].all()
    assert (np.bincount(to, minlength=len(counts)) <= rules.guest_slots).all()
    assert (plan.quota[expert, to] >= rules.min_pairs).all()
    assert cross or rules.fast[sender, to].all()
    assert np.isfinite(rules.expert_seconds[sender, to]).all()


@given(cases(), st.booleans())
@QUICK
def test_a_plan_is_never_predicted_slower_than_none_and_says_what_it_saves(case, cross):
    counts, rules = case
    plan = balance_step(counts, rules, cross=cross)
    nearest = slow_nearest(counts, rules)
    before = rank_seconds(nearest, [], counts, rules).max()
    after = rank_seconds(plan.quota, plan.guests, counts, rules).max()
    assert after <= before * (1 + 1e-9)
    assert plan.saved_seconds == pytest.approx(before - after, abs=1e-6)
    assert plan.moved == (plan.quota != nearest).any()
    fair = counts.sum() / (1 / rules.seconds_per_pair).sum()
    if fair:
        load = plan.quota.sum(0) * rules.seconds_per_pair
        assert plan.after == pytest.approx(load.max() / fair)
        assert plan.before == pytest.approx((nearest.sum(0) * rules.seconds_per_pair).max() / fair)
    if plan.moved:
        assert after < before


@given(cases())
@QUICK
def test_without_cross_pairs_do_not_leave_the_group_that_the_nearest_replica_rule_gives_them(case):
    counts, rules = case
    plan = balance_step(counts, rules)
    groups = rules.node_of[:, None] == np.unique(rules.node_of)
    assert (plan.quota @ groups == slow_nearest(counts, rules) @ groups).all()


@given(cases(), st.sampled_from([1.01, 1.05, 1.3]))
@QUICK
def test_with_free_guests_no_rank_is_above_the_bound(case, bound):
    counts, rules = case
    ranks = len(counts)
    free = np.zeros((ranks, ranks))
    rules = dataclasses.replace(
        rules, expert_seconds=free, pair_seconds=free, guest_slots=99, min_pairs=0, fast=np.ones((ranks, ranks), bool)
    )
    plan = balance_step(counts, rules, bound=bound)
    fair = counts.sum() / (1 / rules.seconds_per_pair).sum()
    load = plan.quota.sum(0) * rules.seconds_per_pair
    assert load.max() <= fair * bound * (1 + 1e-9) + rules.seconds_per_pair.max()  # whole pairs permitting


@given(cases(), st.floats(1.0, 3.0))
@QUICK
def test_a_cap_is_kept_whatever_it_costs_where_slots_allow(case, factor):
    counts, rules = case
    cap = max(int(np.ceil(counts.sum() / len(counts) * factor)), 1)
    finite = np.nan_to_num(rules.expert_seconds, posinf=1e6)
    plan = balance_step(counts, dataclasses.replace(rules, guest_slots=99, expert_seconds=finite), cap=cap)
    assert plan.above_cap == 0
    assert plan.quota.sum(0).max() <= cap
    assert (plan.quota.sum(1) == counts.sum(0)).all()
    few = balance_step(counts, rules, cap=cap)
    assert few.above_cap == max(few.quota.sum(0).max() - cap, 0)
    assert (np.bincount(few.guests[:, 2], minlength=len(counts)) <= rules.guest_slots).all()


@given(cases())
@QUICK
def test_the_plan_is_a_function_of_the_numbers_alone(case):
    counts, rules = case
    read_only = np.asfortranarray(counts.astype(np.int32))
    read_only.setflags(write=False)
    again = dataclasses.replace(rules, holds=rules.holds.copy())
    a, b = balance_step(counts, rules), balance_step(read_only, again)
    assert (a.quota == b.quota).all()
    assert (a.guests == b.guests).all()
    assert (a.saved_seconds, a.cost_seconds, a.moved) == (b.saved_seconds, b.cost_seconds, b.moved)


def test_another_process_makes_the_same_plan():
    code = (
        "import numpy as np; from ray_ep.placement import Topology, contiguous\n"
        "from ray_ep.placement.in_step.rules import StepRules, balance_step\n"
        "rng = np.random.default_rng(3); c = rng.integers(0, 300, (8, 32)) * (np.arange(32) % 7 == 0)\n"
        "r = StepRules.of(contiguous(1, 32, 8, 5), 0, Topology.of_nodes([0] * 8), 1e5, 1e-5, 4e3, 4, True)\n"
        "p = balance_step(c, r); print(p.quota.tolist(), p.guests.tolist(), p.saved_seconds.hex())"
    )
    outputs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 500


# The optimum, enumerated


def optimum(counts, rules):
    """Least possible max of `rank_seconds`, over all quotas; uniform links in one node, weights from owners."""
    ranks, experts = counts.shape
    total = np.zeros((1, ranks))
    travel, weights = rules.pair_seconds[0, 1], rules.expert_seconds[0, 1]
    for e in range(experts):
        n = counts[:, e].sum()
        quota = np.array([q for q in itertools.product(range(n + 1), repeat=ranks) if sum(q) == n])
        own = np.minimum(quota, counts[:, e])
        seconds = quota * rules.seconds_per_pair + travel * (counts[:, e] - own + quota - own)
        guest = (quota > 0) & ~rules.holds[e]
        seconds = seconds + weights * guest
        seconds[:, rules.owner[e]] += weights * guest.sum(1)
        total = (total[:, None] + seconds[None]).reshape(-1, ranks)
    return total.max(1).min()


@pytest.mark.parametrize(("ranks", "experts", "most"), [(2, 3, 16), (2, 4, 8), (3, 2, 8)])
def test_a_plan_is_within_five_percent_and_one_pair_of_the_optimum(ranks, experts, most):
    rng = np.random.default_rng(ranks * 10 + experts)
    for _ in range(80):
        counts = rng.integers(0, most // ranks + 1, (ranks, experts)) * rng.integers(0, 2, experts)
        counts[:, 0] = most // ranks
        owner = rng.integers(0, ranks, experts) * rng.integers(0, 2)
        holds = rng.random((experts, ranks)) < 0.15
        holds[np.arange(experts), owner] = True
        rules = make_rules(
            holds, owner, speed=rng.choice([1.0, 1.0, 2.0], ranks), expert=rng.choice([0, 0.3, 1, 3]),
            pair=rng.choice([0, 0.02, 0.05]),
        )  # fmt: skip
        plan = balance_step(counts, rules)
        reached = rank_seconds(plan.quota, plan.guests, counts, rules).max()
        one = rules.seconds_per_pair.max() + rules.pair_seconds.max()
        assert reached <= 1.05 * optimum(counts, rules) + one, (counts, rules)
