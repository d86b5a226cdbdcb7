"""Whether experts are moved: pure decisions, no ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.driver.rebalance.rebalancer import MOST_CAUTION
from ray_ep.driver.rebalance.recent import NOW, Facts, Recent
from ray_ep.placement import Placement, StepCosts, moves
from ray_ep.placement.planner.verdict import LEAST_GAIN, decide, room_of
from tests.driver.scenes import EXPERTS, FACTS, LAYERS, NOWHERE, question, step, topology


def test_a_move_that_pays_is_made_and_says_what_and_why():
    v = decide(question())
    assert len(moves(NOWHERE, v.placement)) > 0
    assert v.words.startswith(f"move {len(moves(NOWHERE, v.placement))} experts: predicted step 200 -> ")
    assert v.words.endswith(" steps")
    assert "costs" in v.words
    assert v.placement.version == 1
    assert v.step_seconds == pytest.approx(0.2 - v.gain)


def test_even_routing_stays():
    v = decide(question(skewed=False))
    assert (v.placement, v.words) == (None, "stay: no other places are worth a move (step 200 ms)")


def test_a_move_over_links_too_slow_to_pay_back_in_time_stays_and_says_so():
    costs = StepCosts(512, 0.0, 2e-5, 2e10, 6e10, None, False)  # no traffic, but very large experts
    v = decide(question(costs=costs, horizon_steps=100))
    assert v.placement is None
    assert v.words.startswith("stay: ")
    ample = decide(question(costs=costs, horizon_steps=10**7))
    assert ample.placement is not None


def test_no_more_is_promised_than_the_expert_layers_take():
    assert 0 < decide(question(moe_seconds=0.01)).gain < 0.01


def test_a_gain_within_noise_stays():
    v = decide(question(step_seconds=60.0))
    assert v.placement is None
    assert "less than the 1% that a move must promise" in v.words


@settings(max_examples=30, deadline=None)
@given(
    caution=st.floats(1, MOST_CAUTION),
    slower=st.floats(1, 1e6),
    horizon=st.integers(1, 10**5),
    moe=st.floats(1e-4, 10),
    bandwidth=st.floats(1e5, 1e12),
)
def test_whatever_is_adopted_keeps_the_rules(caution, slower, horizon, moe, bandwidth):
    q = question(
        caution=caution, slower=slower, horizon_steps=horizon, moe_seconds=moe, topology=topology(bandwidth)
    )  # fmt: skip
    v = decide(q)
    assert v.words.startswith("move " if v.placement is not None else "stay: ")
    assert v.gain <= moe * (1 + 1e-9)
    if v.placement is not None:
        assert v.gain >= LEAST_GAIN * caution * q.step_seconds
        assert v.cost * caution <= v.gain * horizon
        assert v.cost == pytest.approx(v.links * slower)
    else:
        assert v.gain < LEAST_GAIN * caution * q.step_seconds or v.cost * caution > v.gain * horizon


def test_experts_are_put_where_lost_nodes_do_not_take_them_even_if_nothing_is_gained():
    v = decide(question(skewed=False, slots=8, topology=topology(node_of=(0, 1)), survive_nodes=1, horizon_steps=1))
    assert all(len(v.placement.ranks_of(i, e)) == 2 for i in range(LAYERS) for e in range(EXPERTS))
    assert "outlives 1 lost node" in v.words


def test_slots_are_those_configured_or_those_in_use():
    uneven = Placement(np.array([[[0, 1, 2], [3, 4, -1]], [[0, 1, 2], [3, -1, 4]]]), 5)
    assert room_of(uneven, 0) == [3, 2]
    assert room_of(uneven, 5) == 5


# --- figures


def test_costs_are_the_steps_own():
    recent = Recent(50)
    for _ in range(3):
        recent.add(step(experts=(0.036, 0.012)))
    c = recent.costs(FACTS)
    assert c.expert_seconds == pytest.approx(0.036 / 1800)
    assert (c.tokens_per_rank, c.token_bytes, c.expert_bytes, c.optimizer_bytes) == (512, 256.0, 4000.0, 8000.0)
    assert (c.speed, c.two_level) == (None, False)


def test_a_rank_that_takes_twice_as_long_a_pair_in_five_steps_is_half_as_fast():
    recent = Recent(50)
    for _ in range(5):
        assert recent.costs(FACTS).speed is None
        recent.add(step(experts=(0.02, 0.04), pairs=((500, 500), (500, 500))))
    fast, slow = recent.costs(FACTS).speed
    assert fast == pytest.approx(2 * slow)


def test_a_slow_while_of_a_rank_is_not_its_speed():
    recent = Recent(50)
    for seconds in (0.4, 0.02, 0.02, 0.09, 0.02):
        recent.add(step(experts=(0.02, seconds), pairs=((500, 500), (500, 500))))
    assert recent.costs(FACTS).speed is None
    assert recent.costs(FACTS).expert_seconds == pytest.approx(0.02 / 1000)


def test_a_rank_with_hardly_any_pairs_says_nothing_about_its_speed():
    recent = Recent(50)
    recent.add(step(experts=(0.02, 0.01), pairs=((500, 500), (1, 0))))
    assert recent.costs(FACTS).speed is None


def test_loads_halve_in_half_a_life():
    recent = Recent(4)
    first = np.array([[8.0, 0.0]])
    recent.add(step(load=first))
    for _ in range(4):
        recent.add(step(load=np.array([[0.0, 1.0]])))
    assert recent.load[0, 0] == pytest.approx(4.0)
    assert recent.load[0, 1] == pytest.approx(sum(0.5 ** (k / 4) for k in range(4)))


def test_where_all_tokens_go_everywhere_no_place_saves_traffic():
    recent = Recent(50)
    recent.add(step())
    assert recent.costs(Facts(512, 32, 1000, 4, 12, 2, "all_gather")).token_bytes == 0


def test_imbalance_is_of_ranks_or_of_nodes():
    recent = Recent(50)
    recent.add(step(pairs=((900, 600), (300, 600))))
    assert recent.imbalance([0, 1]) == pytest.approx((1.5 + 1.0) / 2)
    assert recent.imbalance([7, 7]) == 1.0


def test_a_layer_without_pairs_is_even():
    recent = Recent(50)
    recent.add(step(pairs=((900, 0), (300, 0))))
    assert recent.imbalance([0, 1]) == pytest.approx((1.5 + 1.0) / 2)
    recent = Recent(50)
    recent.add(step(pairs=((0, 0), (0, 0))))
    assert recent.imbalance([0, 1]) == 1.0


def test_steps_without_pairs_or_seconds_say_nothing_of_what_a_pair_takes():
    recent = Recent(50)
    for _ in range(3):
        recent.add(step(experts=(0.03, 0.001), pairs=((900, 900), (0, 0))))
    assert recent.costs(FACTS).expert_seconds == pytest.approx(0.03 / 1800)
    for _ in range(2):
        recent.add(step(experts=(0.03, 0.02), pairs=((900, 900), (600, 600))))
    assert recent.costs(FACTS).expert_seconds == pytest.approx(0.03 / 1800)
    assert recent.costs(FACTS).speed is None
    nothing = Recent(50)
    nothing.add(step(experts=(0.0, 0.0), pairs=((0, 0), (0, 0))))
    assert (nothing.costs(FACTS).expert_seconds, nothing.costs(FACTS).speed) == (0.0, None)


def test_what_a_step_takes_now_is_a_short_median():
    recent = Recent(50)
    for seconds in (9, 9, 9, *[0.1] * (NOW - 1), 5):
        recent.add(step(seconds=seconds))
    assert recent.step_seconds() == 0.1
