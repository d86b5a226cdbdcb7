"""balance_step on cases by hand and on realistic routings; rules from a placement and a topology."""

import dataclasses

import numpy as np
import pytest

from ray_ep.errors import PlacementError
from ray_ep.placement import Placement, Topology, contiguous
from ray_ep.placement.in_step.rules import FAR_BANDWIDTH, MIN_PAIRS, StepRules, balance_step, warm
from tests.placement.step_rules import contiguous_holds, make_rules, rank_seconds


@pytest.fixture(autouse=True, scope="module")
def compiled():
    warm()


def test_two_ranks_with_everything_on_one_expert_share_it_and_each_keeps_its_own_tokens():
    plan = balance_step([[500, 0], [500, 0]], make_rules([[1, 0], [0, 1]], expert=5.0, pair=0.01))
    assert plan.guests.tolist() == [[0, 0, 1]]
    assert np.abs(plan.quota[0] - 500).max() <= 10
    assert (plan.before, plan.cost_seconds) == (2.0, 5.0)
    assert plan.after < 1.02
    assert plan.pairs_between()[0, 1] == 0  # the guest computes what was chosen on its own rank


def test_a_replica_takes_the_surplus_before_any_guest_is_made():
    counts = [[300, 0, 0], [0, 0, 0], [0, 0, 0]]
    plan = balance_step(counts, make_rules([[1, 1, 1], [0, 1, 0], [0, 0, 1]], expert=0.1))
    assert plan.quota[0].tolist() == [100, 100, 100]
    assert len(plan.guests) == 0
    assert plan.moved


def test_a_balanced_step_is_left_alone():
    counts = np.full((4, 8), 100)
    counts[0, 0] = 103
    plan = balance_step(counts, make_rules(contiguous_holds(8, 4)))
    assert not plan.moved
    assert len(plan.guests) == plan.saved_seconds == plan.cost_seconds == 0
    assert (plan.quota == counts.sum(0)[:, None] * contiguous_holds(8, 4)).all()


def test_an_imbalance_that_costs_less_than_a_guest_is_left_alone():
    counts = [[60, 50], [60, 50]]
    assert not balance_step(counts, make_rules(np.eye(2), expert=11.0)).moved
    assert balance_step(counts, make_rules(np.eye(2), expert=1.0)).moved


def test_few_guests_beat_many_slivers():
    counts = np.zeros((4, 8), int)
    counts[:, 0:2] = 200, 50  # both on rank 0; three others are idle
    plan = balance_step(counts, make_rules(contiguous_holds(8, 4), expert=1.0))
    assert plan.after < 1.03
    assert len(plan.guests) <= 4


def test_costly_guests_are_fewer_and_larger():
    """One expert with 1600 pairs, 16 ranks: k guests take 1600 / (k + 1) + k c; k is 3 or 4 at c = 100, not 15."""
    holds = np.zeros((1, 16), bool)
    holds[0, 0] = True
    counts = np.full((16, 1), 100)
    plan = balance_step(counts, make_rules(holds, expert=100.0))
    best = min(1600 / (k + 1) + k * 100.0 for k in range(16))
    assert rank_seconds(plan.quota, plan.guests, counts, make_rules(holds, expert=100.0)).max() <= 1.05 * best


def test_other_nodes_take_nothing_unless_crossing_is_allowed_and_pays():
    counts = [[500, 0], [500, 0]]
    rules = make_rules(np.eye(2), node_of=[0, 1], expert=5.0, pair=0.01)
    assert not balance_step(counts, rules).moved
    assert balance_step(counts, rules, cross=True).after < 1.02
    dear = make_rules(np.eye(2), node_of=[0, 1], expert=600.0)
    assert not balance_step(counts, dear, cross=True).moved


def test_no_guest_slots_no_guests():
    plan = balance_step([[500, 0], [500, 0]], make_rules(np.eye(2), slots=0))
    assert not plan.moved
    assert plan.after == plan.before == 2.0


def test_too_few_pairs_are_not_worth_a_guest():
    counts = [[30, 10], [30, 10]]
    assert not balance_step(counts, make_rules(np.eye(2), min_pairs=50)).moved
    assert balance_step(counts, make_rules(np.eye(2), min_pairs=15)).quota[0, 1] >= 15


def test_a_slow_rank_gets_less():
    plan = balance_step([[300, 0], [300, 0]], make_rules(np.eye(2), speed=[2.0, 1.0]))
    assert plan.quota.sum(0) == pytest.approx([200, 400], abs=4)
    plan = balance_step([[100, 100], [100, 100]], make_rules(np.eye(2), speed=[3.0, 1.0]))
    assert plan.quota.sum(0) == pytest.approx([100, 300], abs=4)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_token_to_one_expert_cannot_overflow_a_rank(ranks):
    counts = np.zeros((ranks, 16), int)
    counts[:, 3] = 1000
    rules = make_rules(contiguous_holds(16, ranks), expert=1e6, pair=1e3, min_pairs=10**6, slots=1)
    assert not balance_step(counts, rules).moved
    plan = balance_step(counts, rules, cap=1100)
    assert plan.quota.sum(0).max() <= 1100
    assert plan.saved_seconds < 0  # slower, but it fits
    assert plan.above_cap == 0
    assert len(plan.guests) == ranks - 1


def test_a_cap_crosses_nodes_only_when_the_group_is_full():
    counts = [[400, 0, 0], [400, 0, 0], [0, 0, 0]]
    rules = make_rules(np.eye(3), node_of=[0, 0, 1])
    assert balance_step(counts, rules, cap=500).quota[0, 2] == 0
    assert balance_step(counts, rules, cap=300).quota[0].tolist() == [300, 300, 200]


def test_a_cap_without_slots_says_what_is_left_above_it():
    plan = balance_step([[500, 0], [500, 0]], make_rules(np.eye(2), slots=0), cap=600)
    assert plan.above_cap == 400


def test_nearest_replicas_share_evenly_and_a_source_sends_to_its_node_first():
    holds = [[1, 0, 1, 1]]
    counts = [[10], [20], [10], [10]]
    plan = balance_step(counts, make_rules(holds, node_of=[0, 0, 1, 1], fast=np.eye(4) > 0))
    assert plan.quota.tolist() == [[30, 0, 10, 10]]
    assert plan.sends(1).tolist() == [[20, 0, 0, 0]]
    assert plan.pairs_between()[1].tolist() == [20, 0, 0, 0]


def test_weights_come_from_the_owner_among_equals_and_else_from_the_cheapest_holder():
    counts = np.zeros((3, 2), int)
    counts[:, 0] = 300
    rules = make_rules([[1, 1, 0], [0, 0, 1]], owner=[1, 2], expert=1.0)
    assert balance_step(counts, rules).guests.tolist() == [[0, 1, 2]]
    seconds = rules.expert_seconds.copy()
    seconds[0, 2] = 0.5
    assert balance_step(counts, dataclasses.replace(rules, expert_seconds=seconds)).guests.tolist() == [[0, 0, 2]]
    seconds[:2, 2] = np.inf
    assert len(balance_step(counts, dataclasses.replace(rules, expert_seconds=seconds)).guests) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 4)])
def test_a_step_without_tokens(shape):
    plan = balance_step(np.zeros(shape, int), make_rules(contiguous_holds(shape[1], shape[0])))
    assert not plan.moved
    assert plan.quota.sum() == plan.pairs_between().sum() == plan.sends(0).sum() == 0
    assert plan.before == plan.after == 1.0


# Realistic routings


def routed(name, tokens, experts, top_k, ranks):
    """[R, E] counts: zipf, hot-rank, one, or RATIO:HOT (that share of the tokens picks among the first HOT)."""
    rng = np.random.default_rng(5)
    chance = np.ones((ranks * tokens, experts))
    if name == "zipf":
        chance /= np.arange(1, experts + 1)
    elif name == "hot-rank":
        chance[:, experts // ranks :] *= 0.1
    elif name == "one":
        chance[:, 1:] = 1e-9
    else:
        ratio, hot = map(int, name.split(":"))
        first = rng.random(len(chance)) < ratio / 100
        chance[np.ix_(first, np.arange(max(hot, top_k), experts))] = 1e-12
        chance[np.ix_(~first, np.arange(max(hot, top_k)))] = 1e-12
    chosen = np.argsort(-np.log(chance) - rng.gumbel(size=chance.shape), 1)[:, :top_k]
    return np.stack([np.bincount(part.ravel(), minlength=experts) for part in np.split(chosen, ranks)])


@pytest.mark.parametrize("name", ["zipf", "30:4", "50:4", "80:4", "95:4", "hot-rank", "one"])
@pytest.mark.parametrize(("work", "ranks"), [("A", 2), ("A", 4), ("B", 2), ("B", 4)])
def test_skewed_routings_come_within_three_percent_of_even(name, work, ranks):
    tokens, hidden, ffn, experts, top_k = {"A": (2048, 512, 1024, 16, 2), "B": (4096, 1024, 512, 64, 8)}[work]
    rules = StepRules.of(
        contiguous(1, experts, ranks), 0, Topology.of_nodes([0] * ranks), 12 * hidden * ffn,
        6 * hidden * ffn / 7e10, 4 * hidden, experts, False,
    )  # fmt: skip
    plan = balance_step(routed(name, tokens, experts, top_k, ranks), rules)
    assert plan.before > 1.04
    assert plan.after < 1.03
    assert len(plan.guests) <= 2 * ranks if name != "hot-rank" else experts // 2
    assert plan.saved_seconds > 0


# Rules from a placement and a topology


def test_rules_of_a_placement_by_hand():
    placement = Placement(np.array([[[0, 1], [1, 2], [3, 0]]]), 4)
    bandwidth = np.full((3, 3), 2e9)
    bandwidth[0, 1], bandwidth[1, 0] = 1e9, 4e9
    rules = StepRules.of(placement, 0, Topology(bandwidth, np.full((3, 3), 1e-3), [0, 0, 0]), 8e6, 1e-5, 4e3, 2, False)
    assert rules.holds.astype(int).tolist() == [[1, 0, 1], [1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert rules.owner.tolist() == placement.owner[0].tolist()
    assert rules.expert_seconds[0, 1] == pytest.approx(9e-3)
    assert rules.expert_seconds[1, 0] == pytest.approx(3e-3)
    assert rules.pair_seconds[0, 1] == rules.pair_seconds[1, 0] == pytest.approx(5e-6)
    assert (rules.min_pairs, rules.guest_slots) == (MIN_PAIRS, 2)
    train = StepRules.of(placement, 0, Topology(bandwidth, np.full((3, 3), 1e-3), [0, 0, 0]), 8e6, 1e-5, 4e3, 2, True)
    assert train.expert_seconds[0, 1] == train.expert_seconds[1, 0] == pytest.approx(12e-3)
    assert train.pair_seconds[0, 1] == pytest.approx(1e-5)
    assert not train.expert_seconds.diagonal().any()


def test_links_that_were_not_measured_are_fast_inside_a_node_only():
    rules = StepRules.of(contiguous(1, 4, 4), 0, Topology.of_nodes([0, 0, 1, 1]), 3e6, 1e-5, 1e3, 1, False)
    assert rules.expert_seconds[0, 1] == pytest.approx(1.1e-3)
    assert rules.expert_seconds[0, 2] == pytest.approx(1e-3 + 3e6 / FAR_BANDWIDTH)
    assert rules.fast.tolist() == (np.kron(np.eye(2), np.ones((2, 2))) > 0).tolist()


def test_links_between_nodes_are_fast_when_they_are_measured_nearly_as_fast_as_inside():
    bandwidth = np.full((4, 4), 1e10)
    bandwidth[0, 2] = bandwidth[2, 0] = 8e9
    bandwidth[1, 3] = bandwidth[3, 1] = 1e9
    bandwidth[0, 3] = 1e9  # slow one way
    topology = Topology(bandwidth, np.full((4, 4), 1e-5), [0, 0, 1, 1])
    fast = StepRules.of(contiguous(1, 4, 4), 0, topology, 3e6, 1e-5, 1e3, 1, False).fast
    assert fast[0, 1]
    assert fast[0, 2]
    assert fast[2, 0]
    assert not fast[1, 3]
    assert not fast[0, 3]


def test_bad_input_says_what_is_wrong():
    rules = make_rules(np.eye(2))
    for counts, message in (([[1, 2, 3]], "expected"), ([[1, -2], [0, 0]], "-2 pairs")):
        with pytest.raises(PlacementError, match=message):
            balance_step(counts, rules)
    for kwargs in ({"bound": 0.9}, {"cap": 0}):
        with pytest.raises(PlacementError, match="at least 1"):
            balance_step([[1, 1], [1, 1]], rules, **kwargs)
    with pytest.raises(PlacementError, match="source rank 2"):
        balance_step([[1, 1], [1, 1]], rules).sends(2)
    two = np.ones((2, 2))
    for change, message in (
        ({"owner": [1, 1]}, "owner"), ({"node_of": [0]}, "node_of"), ({"seconds_per_pair": [0.0, 1.0]}, "positive"),
        ({"expert_seconds": -two}, "negative"), ({"pair_seconds": two}, "diagonal"), ({"holds": [1, 1]}, "holds"),
        ({"fast": [[True, True], [False, True]]}, "symmetric"), ({"guest_slots": -1}, "at least 0"),
    ):  # fmt: skip
        with pytest.raises(PlacementError, match=message):
            dataclasses.replace(rules, **change)
    with pytest.raises(PlacementError, match="3 ranks"):
        StepRules.of(contiguous(1, 4, 2), 0, Topology.of_nodes([0, 0, 0]), 1.0, 1.0, 1.0, 1, False)
    with pytest.raises(PlacementError, match="layer 1"):
        StepRules.of(contiguous(1, 4, 2), 1, Topology.of_nodes([0, 0]), 1.0, 1.0, 1.0, 1, False)
