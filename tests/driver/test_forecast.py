"""What a step would take on other numbers of ranks: predicted beside the steps, and only from what was measured."""

from dataclasses import replace

import numpy as np
import pytest

from ray_ep.driver.elastic.forecast import EVERY, MEASURED, Forecast, Outlook, fixed_seconds, next_node, predicted
from ray_ep.errors import PlacementError
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.step.clock import STEP_PHASES
from tests.driver.fakes import results
from tests.driver.scenes import EXPERTS, LAYERS, Shelf, question, topology

FAST = Outlook(question(skewed=False), fixed_s=0.02, node=0)


def test_the_present_number_takes_what_was_measured_and_more_ranks_take_less():
    found = predicted(FAST, [1, 3])
    assert found[2] == pytest.approx(0.2)
    assert found[1] > found[2] > found[3]
    assert found[3] > 0.02 + 0.08 * 2 / 3, "what no rank shares stays, and the experts take something"


def test_a_rank_more_brings_less_to_ranks_that_wait_for_their_links_than_to_ranks_that_compute():
    """Each has fewer tokens then, and sends more of them to others."""
    computing, waiting = (
        Outlook(question(skewed=False, topology=topology(speed, (0, 1)), slots=[4, 4]), 0.02, node=2)
        for speed in (1e12, 1e6)
    )
    assert predicted(computing, [3])[3] < predicted(waiting, [3])[3] - 0.005


def test_nothing_is_predicted_from_nothing():
    unmeasured = replace(FAST.question.costs, expert_seconds=0.0)
    nothing = RoutingStatistics(np.zeros((LAYERS, EXPERTS)), sample=np.zeros((LAYERS, 0, 2), np.int32))
    for q in (question(costs=unmeasured), question(step_seconds=None), question(statistics=nothing)):
        assert predicted(replace(FAST, question=q), [1, 3]) == {}


def test_speeds_and_slots_of_another_number_of_ranks_fit_it():
    uneven = replace(FAST.question.costs, speed=(1.0, 0.5))
    found = predicted(Outlook(question(costs=uneven, slots=[4, 4]), 0.0, 0), [1, 3])
    assert sorted(found) == [1, 2, 3]


def test_a_rank_more_comes_to_the_node_of_the_run_with_most_room_or_to_a_new_one():
    where, node_of = ["a", "a", "b"], [0, 0, 1]
    assert next_node({"a": 1, "b": 2, "x": 9}, where, node_of) == 1
    assert next_node({"x": 9}, where, node_of) == 2
    assert next_node({}, where, node_of) == 2


def test_what_no_rank_shares_out_is_told_by_phases_and_the_drivers_own_time():
    said = results()
    for r in said:
        r.usage.phases[:] = [0.01] * len(STEP_PHASES)  # five of them are fixed
    assert fixed_seconds(said, 0.2) == pytest.approx(0.05 + 0.2 - 0.01 * len(STEP_PHASES))


def test_a_prediction_is_due_once_the_ranks_are_measured_then_from_time_to_time_and_ends_with_the_membership():
    shelf = Shelf()
    forecast = Forecast(shelf)
    assert [forecast.stepped() for _ in range(MEASURED)].count(True) == 1
    forecast.ask(FAST, [3])
    assert not forecast.stepped()
    shelf.make({2: 0.2, 3: 0.1})
    assert not forecast.stepped()
    assert forecast.step_seconds == {2: 0.2, 3: 0.1}
    assert [forecast.stepped() for _ in range(EVERY - 2)].count(True) == 1
    forecast.ask(FAST, [3])
    forecast.forget()
    shelf.make({2: 9.0})
    assert not forecast.stepped()
    assert forecast.step_seconds == {}, "of ranks that are others now"


def test_figures_that_do_not_fit_are_no_prediction_and_a_mistake_is_raised():
    shelf = Shelf()
    forecast = Forecast(shelf)
    forecast.step_seconds = {2: 0.2}
    forecast.ask(FAST, [3])
    shelf.waiting[0][0].set_exception(PlacementError("no"))
    forecast.stepped()
    assert forecast.step_seconds == {}
    forecast.ask(FAST, [3])
    shelf.waiting[1][0].set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        forecast.stepped()
