"""When experts are moved, and what became of it: with a clock of the test's own, no ranks."""

import threading

from ray_ep.config import load_config
from ray_ep.driver.rebalance.rebalancer import COMPARED, MOST_CAUTION, Rebalancer, beside
from ray_ep.placement import contiguous
from ray_ep.placement.planner.verdict import Verdict, decide
from tests.driver.scenes import EXPERTS, LAYERS, RANKS, Clock, Shelf, question


def rebalancer(*overrides):
    cfg = load_config(None, [f"placement.{o}" for o in overrides]).placement
    clock, shelf = Clock(), Shelf()
    return Rebalancer(cfg, clock, shelf), clock, shelf


def test_off_means_on_demand_only():
    r, _, _ = rebalancer("every=0")
    assert not any(r.due(s, 9.0) for s in range(1, 500))
    assert r.due(500, 1.0, on_demand=True) == "on demand"


def test_regular_times_are_kept_and_one_decision_is_made_at_a_time():
    r, _, shelf = rebalancer("every=10")
    assert [s for s in range(1, 20) if r.due(s, 1.0) and not r.ask(s, question())] == [10]
    assert r.answer() == (None, None)
    assert r.due(20, 1.0) == ""  # the first is not made yet
    shelf.make(Verdict(None, "stay: so", 1.0))
    verdict, said = r.answer()
    assert verdict is None
    assert (said.kind, said.words) == ("rebalance", "stay: so (asked after step 10: every 10 steps)")
    assert r.due(21, 1.0) == "every 10 steps"  # that of step 20 has waited


def test_imbalance_triggers_between_the_regular_times_but_not_on_the_same_figures_again():
    r, _, shelf = rebalancer("every=0", "imbalance=1.5", "decay=20")
    assert r.due(30, 1.4) == ""
    assert r.due(31, 1.62) == "the busiest computes 1.62 times the mean"
    r.ask(31, question())
    shelf.make(Verdict(None, "stay: so", 1.0))
    r.answer()
    assert next(s for s in range(32, 60) if r.due(s, 1.62)) == 51


def test_with_advise_a_move_is_told_with_its_reason_and_prediction_and_not_made():
    r, clock, shelf = rebalancer("every=10", "mode=advise", "alert_s=5")
    assert r.due(10, 1.0)
    r.ask(10, question())
    shelf.make()
    verdict, said = r.answer()
    assert verdict is None
    assert said.words.startswith("advised, and nothing moves (placement.mode=advise): move ")
    assert "predicted step " in said.words
    assert said.fields["moves"] is False
    assert said.fields["gain_predicted"] > 0
    clock.now += 6
    assert r.stepped(0.1) == []  # a decision was made: nobody waits for one
    assert r.due(20, 1.0) == "every 10 steps"


def test_an_answer_to_links_that_have_changed_meanwhile_is_dropped_and_asked_again():
    r, _, shelf = rebalancer("every=10")
    assert r.due(10, 1.0)
    r.ask(10, question())
    assert r.links_changed() is None
    assert r.due(11, 1.0) == ""
    shelf.make()
    verdict, said = r.answer()
    assert verdict is None
    assert "links have changed meanwhile" in said.words
    assert r.due(12, 1.0) == "links have changed"


def moved(r, shelf, at, gain=0.05, before=0.2):
    """Steps of `before` seconds, then a move."""
    for _ in range(COMPARED):
        r.stepped(before)
    assert r.due(at, 1.0, on_demand=True)
    r.ask(at, question())
    shelf.make(Verdict(contiguous(LAYERS, EXPERTS, RANKS, 5), "move", before - gain, gain, 1.0, 0.5))
    verdict, _ = r.answer()
    r.moved(verdict, at, 2.0)


def test_gains_are_measured_and_told_beside_what_was_predicted():
    r, _, shelf = rebalancer("every=0")
    moved(r, shelf, 40)
    said = [s for _ in range(COMPARED + 1) for s in r.stepped(0.16)]
    assert [s.kind for s in said] == ["rebalance"]
    assert said[0].words == (
        "measured after the move of step 40: step 200 -> 160 ms over 10 steps, 40 ms gained where 50 ms were "
        "predicted; the move took 2 s, predicted 1 s"
    )
    assert r.caution == 1
    assert r.slower == 2.0  # the root of 1 x 4


def test_a_move_that_made_steps_longer_makes_the_next_one_promise_more_and_a_good_one_restores_trust():
    r, _, shelf = rebalancer("every=0")
    for n in range(6):
        moved(r, shelf, 40 + 40 * n)
        said = [s for _ in range(COMPARED + 1) for s in r.stepped(0.25)]
        assert f"must promise {r.caution:g} times as much" in said[-1].words
    assert r.caution == MOST_CAUTION
    q = question(caution=r.caution, step_seconds=1.0)
    assert decide(question(step_seconds=1.0)).placement is not None
    assert decide(q).placement is None
    assert "since a move did not keep its promise" in decide(q).words
    moved(r, shelf, 500)
    [r.stepped(0.15) for _ in range(COMPARED + 1)]
    assert r.caution == MOST_CAUTION / 2


def test_while_a_move_is_judged_only_urgent_reasons_count():
    r, _, shelf = rebalancer("every=1")
    moved(r, shelf, 40)
    waiting = []
    for s in range(41, 41 + COMPARED):
        r.stepped(0.2)
        waiting.append(r.due(s, 1.0))
    assert waiting == [""] * COMPARED
    assert r.due(50, 1.0, on_demand=True) == "on demand"


def test_the_gain_of_a_move_is_not_taken_from_steps_over_other_links():
    r, _, shelf = rebalancer("every=0")
    moved(r, shelf, 40)
    [r.stepped(0.4) for _ in range(COMPARED - 1)]  # a link has slowed meanwhile
    assert r.links_changed().words == (
        "the gain of the move of step 40 was not measured: links have changed meanwhile; 50 ms a step were predicted"
    )
    assert r.due(50, 1.0) == "links have changed"
    r.ask(50, question())
    shelf.make(Verdict(contiguous(LAYERS, EXPERTS, RANKS, 5), "move", 0.35, 0.05, 1.0, 0.5))
    r.moved(r.answer()[0], 50, 2.0)
    said = [s for _ in range(COMPARED + 1) for s in r.stepped(0.3)]
    assert "step 400 -> 300 ms" in said[0].words  # no step before the links changed counts: as the verdict has it


def test_a_move_that_disappointed_since_a_link_slowed_is_not_held_against_the_next_one():
    r, _, shelf = rebalancer("every=0")
    moved(r, shelf, 40)
    [r.stepped(0.25) for _ in range(COMPARED + 1)]
    assert r.caution == 2
    r.links_changed()
    assert r.caution == 1


def test_a_decision_that_does_not_come_raises_one_alert_and_the_next_one_another():
    r, clock, shelf = rebalancer("every=1", "alert_s=60")
    for s in (1, 2):
        assert r.due(s, 1.0)
        r.ask(s, question())
        clock.now += 59
        assert r.stepped(0.1) == []
        clock.now += 2
        (alert,) = r.stepped(0.1)
        assert alert.kind == "rebalance-alert"
        assert f"after step {s} (every 1 steps)" in alert.words
        assert r.stepped(0.1) == []
        shelf.make(Verdict(None, "stay: so", 1.0))
        r.answer()
        clock.now += 1000
        assert r.stepped(0.1) == []


def test_failing_again_and_again_is_no_progress():
    r, clock, shelf = rebalancer("every=1", "alert_s=60")
    kinds = []
    for s in range(1, 10):
        assert r.due(s, 1.0)
        r.ask(s, question(slots=1))  # fewer slots than experts
        shelf.make()
        verdict, said = r.answer()
        assert verdict is None
        assert said.words.startswith("no decision: PlacementError: ")
        clock.now += 10
        kinds += [x.kind for x in r.stepped(0.1)]
    assert kinds == ["rebalance-alert"]


def test_a_decision_that_hangs_in_its_thread_stalls_no_step_and_is_told():
    hold, clock = threading.Event(), Clock()
    cfg = load_config(None, ["placement.every=1", "placement.alert_s=5"]).placement
    r = Rebalancer(cfg, clock, lambda work: beside(lambda: hold.wait(120) and work()))
    assert r.due(1, 1.0)
    r.ask(1, question())
    assert r.answer() == (None, None)
    clock.now += 6
    assert [s.kind for s in r.stepped(0.1)] == ["rebalance-alert"]
    hold.set()
    r._planning.result(30)
    assert r.answer()[0].placement is not None
