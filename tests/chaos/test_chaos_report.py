"""What is counted of a disturbed run, on runs that are written down here."""

import json
import math

import pytest

from ray_ep.chaos.observer import Recovery, Step, Switch
from ray_ep.chaos.report import Curve, Injected, Seen, curve_of, difference, report
from ray_ep.chaos.schedule import Fault, Kind


def step(number, at, loss=1.0, seconds=1.0, epoch=0, ranks=4):
    return Step(float(at), number, loss, seconds, epoch, ranks)


def recovery(at, epoch=1, **seconds):
    clocks = {"detect": 0.2, "decide": 0.1, "regroup": 0.1, "restore": 0.5, "first_step": 1.0}
    return Recovery(float(at), ("rank-1",), epoch, 3, 2, clocks | seconds, "")


def fault(at, kind=Kind.KILL, strength=0.9, skipped="", member="rank-1"):
    return Injected(Fault(0, kind, at, 0.5, strength), float(at), f"{kind.value} at {at}", (member,), skipped)


# One step a second; a kill at 4.5, steps 4 and 5 are made again, the first of them is finished at 8.
STEPS = [
    *(step(n, n) for n in range(1, 5)),
    step(3, 8, epoch=1),
    *(step(n, n + 5, epoch=1) for n in range(4, 9)),
]
CURVE = Curve(dict.fromkeys(range(1, 9), 1.0), 0.5)


def counted(steps=STEPS, recoveries=None, faults=None, curve=CURVE, failed="", **seen):
    recoveries = [recovery(7.9)] if recoveries is None else recoveries
    faults = [fault(4.5)] if faults is None else faults
    return report(Seen(steps, recoveries, **seen), faults, curve, 1e-5, failed)


def test_the_share_of_useful_time_counts_each_step_once():
    found = counted()
    assert (found.wall_s, found.steps, found.again) == (12.0, 8, 2)
    assert found.ettr == pytest.approx(7 / 12)  # seven steps of a second after the first, in 12 seconds
    assert found.speed == pytest.approx(7 * 0.5 / 12)
    assert found.between_s == 12.0
    assert found.problems == []


def test_a_step_that_was_made_again_counts_as_long_as_it_took_the_last_time():
    slow = [*STEPS[:4], step(3, 8, seconds=3.0, epoch=1), *STEPS[5:]]
    assert counted(slow).ettr == pytest.approx(9 / 12)


def test_the_next_step_is_the_first_one_of_the_epoch_after_the_recovery():
    found = counted().clocks
    assert found["next step"].median == pytest.approx(8 - 4.5)
    assert found["next step after kill"].count == 1
    assert found["restore"].most == 0.5


def test_medians_and_maxima_are_over_all_recoveries():
    more = [recovery(t, epoch, restore=s) for t, epoch, s in ((7.9, 1, 0.5), (9.5, 2, 0.7), (10.5, 3, 3.0))]
    found = counted(recoveries=more).clocks["restore"]
    assert (found.median, found.most, found.count) == (0.7, 3.0, 3)


def test_a_missing_step_is_lost():
    found = counted([s for s in STEPS if s.number != 6])
    assert found.lost == (6,)
    assert found.problems == ["steps that are missing: 1, from 6 on"]


def test_a_loss_beside_the_undisturbed_one_is_of_the_last_time():
    curve = Curve({**CURVE.loss, 3: 1.1}, 0.5)
    again = [*STEPS[:4], step(3, 8, loss=1.1, epoch=1), *STEPS[5:]]
    found = counted(again, curve=curve)
    assert found.against.most == 0.0
    assert found.repeated.step == 3
    assert found.repeated.most == pytest.approx(0.1)
    assert found.problems == ["the loss of step 3 is 1.0e-01 from the first time's, more than 1e-05"]


def test_a_curve_that_differs_is_a_problem():
    found = counted(curve=Curve({**CURVE.loss, 7: 1.001}, 0.5))
    assert (found.against.step, found.against.count) == (7, 8)
    assert "the loss of step 7 is 1.0e-03 from the undisturbed run's" in found.problems[0]


def test_a_loss_that_is_no_number_differs_without_end():
    found = difference({1: math.nan, 2: 1.0}, {1: 1.0, 2: 1.0})
    assert (found.most, found.step) == (math.inf, 1)


def test_nothing_to_compare_is_a_problem():
    assert counted(curve=Curve({}, 0.0)).problems == ["no step can be compared"]
    assert "no step can be compared" in counted(steps=[], recoveries=[], faults=[]).problems


def test_a_fault_that_costs_ranks_and_is_not_survived_is_told():
    found = counted(STEPS[:4], recoveries=[])
    assert found.problems == ["no step was finished after kill at 4.5"]
    stopped = counted(STEPS[:4], recoveries=[recovery(7.9)])  # recovered, but no step came
    assert stopped.unanswered == ("kill at 4.5",)


def test_a_recovery_from_another_loss_answers_no_fault():
    assert counted(STEPS[:4], faults=[fault(4.5, member="rank-7")]).unanswered == ("kill at 4.5",)


def test_a_fault_that_hit_a_rank_which_had_not_joined_needs_no_recovery():
    later = [*STEPS, step(9, 15.0, epoch=1)]
    found = counted(later, faults=[fault(4.5, member="rank-7")])
    assert found.unanswered == ()
    assert "next step" not in found.clocks


@pytest.mark.parametrize("kind", [Kind.DRAIN, Kind.ADD, Kind.SLOW])
def test_a_fault_that_costs_no_ranks_needs_no_recovery(kind):
    found = counted(recoveries=[], faults=[fault(4.5, kind)])
    assert found.problems == []
    assert "next step" not in found.clocks


def test_a_fault_that_was_skipped_is_counted_apart():
    found = counted(faults=[fault(4.5), fault(9.0, Kind.NODE, skipped="1 rank left")])
    assert (found.injected, found.skipped) == ({"kill": 1}, {"node": 1})


def test_a_run_that_ended_by_itself_with_an_error_is_a_problem():
    assert counted(failed="rank 2 died").problems == ["the run ended: rank 2 died"]


def test_ranks_that_come_and_go_are_counted_and_the_time_until_all_are_there_again():
    switch = Switch(9.5, ("rank-4", "rank-5"), ("rank-0",), 0.25)
    fewer = [
        *STEPS[:4],
        *(step(n, n + 5, epoch=1, ranks=3) for n in (3, 4)),
        *(step(n, n + 5, epoch=2) for n in (5, 6)),
    ]
    found = counted(fewer, switches=[switch], failures=1, planned=1)
    assert (found.ranks.lost, found.ranks.planned, found.ranks.came) == (1, 1, 2)
    assert (found.ranks.fewest, found.ranks.most) == (3, 4)
    assert found.clocks["next step"].most == pytest.approx(3.5)
    assert found.clocks["all again"].most == pytest.approx(5.5)
    assert found.clocks["switch"].median == 0.25


def test_it_is_json_whatever_happened():
    tree = counted(faults=[], curve=Curve({1: math.nan}, 0.0)).to_dict()
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert tree["between_s"] is None
    assert tree["against"]["most"] is None


def test_the_first_step_does_not_count_for_the_median_of_a_curve():
    assert curve_of([(1, 3.0, 9.0), (2, 2.0, 1.0), (3, 1.0, 2.0)]) == Curve({1: 3.0, 2: 2.0, 3: 1.0}, 1.5)
    assert curve_of([(1, 3.0, 9.0)]).step_s == 0.0
