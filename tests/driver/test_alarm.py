"""The alarm on recent loads, worked out by hand."""

import numpy as np
import pytest

from ray_ep.config.schema import RouterConfig
from ray_ep.driver.alarm import JUDGED, Alarm, collapse

CFG = RouterConfig()  # balancedness 0.25, starved 0.05


def test_even_loads_raise_no_alarm():
    assert collapse(np.full((3, 8), 10), CFG) == {}


def test_a_layer_without_any_tokens_raises_no_alarm():
    assert collapse(np.zeros((2, 4)), CFG) == {}


def test_an_expert_under_its_share_is_named_with_its_layer():
    load = np.array([[100, 100, 100, 100], [100, 3, 100, 100]])  # mean 75.75, 5% of it 3.79
    found = collapse(load, CFG)
    assert list(found) == [("starved", 1)]
    assert found["starved", 1] == "layer 1: 1 of 4 experts starve (under 0.05 of their fair load): 1"


def test_an_expert_just_above_its_share_is_well():
    assert collapse(np.array([[100, 4, 100, 100]]), CFG) == {}  # mean 76, 5% of it 3.8


def test_an_expert_with_a_multiple_of_the_mean_is_named():
    load = np.array([[6, 6, 6, 6, 84, 6, 6, 0.1]])  # mean 15.0125; balancedness 0.179, top 5.6 times the mean
    found = collapse(load, CFG)
    assert set(found) == {("starved", 0), ("unbalanced", 0)}
    assert found["starved", 0].endswith(": 7")
    assert "balancedness 0.18 is under 0.25; expert 4 gets 5.6 times the mean load" in found["unbalanced", 0]


@pytest.mark.parametrize(("top", "alarms"), [(7, 0), (13, 1)])
def test_the_limit_of_balancedness_is_mean_over_largest(top, alarms):
    load = np.array([[1, 1, 1, 1, 1, 1, 1, top]])  # 14/8/7 = 0.25 is not below 0.25; 20/8/13 = 0.19 is
    assert len(collapse(load, CFG)) == alarms


def test_a_long_list_of_starved_experts_is_cut():
    load = np.zeros((1, 64))
    load[0, :2] = 100
    found = collapse(load, CFG)
    assert found["starved", 0].endswith(
        "62 of 64 experts starve (under 0.05 of their fair load): 2, 3, 4, 5, 6, 7, 8, 9 ..."
    )


def test_limits_of_zero_switch_both_alarms_off():
    assert collapse(np.array([[0, 0, 0, 50]]), RouterConfig(alarm_balancedness=0.0, alarm_starved=0.0)) == {}


def test_a_collapse_is_told_once_and_again_only_after_a_window_without_it():
    told = []
    alarm = Alarm(CFG, told.append)
    even, starving = np.full((1, 4), 100), np.array([[100, 100, 100, 1]])

    def steps(load, count):
        for _ in range(count):
            alarm.watch(len(seen), load)
            seen.append(load)

    seen = []
    steps(starving, JUDGED - 1)
    assert told == []  # too few to judge by
    steps(starving, 50)
    (event,) = told
    assert (event.kind, event.fields) == ("routing-collapse", {"alarm": "starved", "layer": 0})
    assert event.words == f"step {JUDGED - 1}: layer 0: 1 of 4 experts starve (under 0.05 of their fair load): 3"
    steps(even, 2 * JUDGED)
    steps(starving, JUDGED)
    assert len(told) == 2
