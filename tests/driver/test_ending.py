"""What is said at the end of a run: after a signal, after a failure."""

import pytest

from ray_ep.driver.ending import STATUS, Activity, cause_of, ended, farewell, what_is_lost
from ray_ep.errors import DivergedError, RankError
from tests.driver.scenes import Clock


def test_the_answer_says_what_is_finished_first_and_how_long_saving_takes():
    step, saving = "step 12 is finished first", "saving takes about 3 s"
    assert farewell("SIGTERM", step, 8.2, saving) == (
        "SIGTERM: step 12 is finished first (about 8 s), then saving takes about 3 s"
    )
    assert "not known" in farewell("SIGTERM", step, None, saving)
    assert farewell("SIGINT", "", None, saving) == "SIGINT: saving takes about 3 s"


def test_what_is_left_of_a_step_is_what_the_last_one_took_and_only_that_step_counts_as_done():
    clock = Clock()
    doing = Activity(1, clock)
    with doing("step"):
        assert "step 1 is finished first (it is not known" in doing.answer("SIGINT", 0, "x")
        clock.now += 10
    with doing("step"):
        clock.now += 4
        assert doing.answer("SIGINT", 1, "x") == "SIGINT: step 2 is finished first (about 6 s), then x"
        assert doing.kept(1) == 2
    assert doing.answer("SIGINT", 2, "x") == "SIGINT: x"
    assert doing.kept(2) == 2


def test_a_step_of_several_passes_ends_after_one_of_them_and_does_not_count():
    clock = Clock()
    doing = Activity(4, clock)
    with doing("step"):
        clock.now += 20
    with doing("step"):
        assert doing.answer("SIGINT", 1, "x") == "SIGINT: step 2 is broken off at its next pass (about 5 s), then x"
        assert doing.kept(1) == 1


@pytest.mark.parametrize(
    ("error", "kind", "fields"),
    [
        (RankError(1, "rank 1 died: killed"), "failed", {"done": 6, "saved": 4, "rank": 1}),
        (DivergedError("loss is nan"), "diverged", {"done": 6, "saved": 4}),
        (KeyboardInterrupt(), "interrupted", {"done": 6, "saved": 4}),
    ],
)
def test_an_end_is_an_event_with_what_is_lost_and_its_figures(error, kind, fields):
    event = ended(error, "r", 4, 6)
    assert (event.kind, event.fields) == (kind, fields)
    assert event.kind in STATUS
    assert "after step 6; the newest checkpoint is of step 4: 2 steps are lost; go on with:" in event.words


def test_after_a_failure_the_steps_lost_and_the_command_that_goes_on_are_named():
    words = what_is_lost("/a b/run", 40, 46)
    assert "step 40: 6 steps are lost" in words
    assert "ray-ep train 'run_dir=/a b/run' resume=auto" in words
    assert "nothing was saved: 1 step is lost" in what_is_lost("r", -1, 1)


def test_the_cause_of_a_failure_is_one_sentence():
    assert (
        cause_of(RankError(1, "rank 1 raised:\nTraceback\n  File\nValueError: boom"))
        == "rank 1 raised: ValueError: boom"
    )
    assert cause_of(RankError(1, "rank 1 died: killed\nclass_name: X")) == "rank 1 died: killed"
    assert cause_of(ValueError()) == "ValueError"
