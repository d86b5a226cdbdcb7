"""The step loop with ranks that answer as a test says: what a signal or a failure in the middle leaves and tells."""

import os
import signal

import pytest

from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import RankError
from ray_ep.rank.saved.checkpoint import Directory
from tests.driver.fakes import driven


@pytest.fixture
def running(tmp_path):
    """A driver on formed ranks."""
    with Interrupt().caught() as interrupt:
        interrupt.hold()

        def make(*overrides):
            it = driven(tmp_path, *overrides, look=interrupt)
            it.driver.form()
            interrupt.tell = it.driver.signalled
            return it

        yield make


def terminate(then=None):
    def meanwhile():
        os.kill(os.getpid(), signal.SIGTERM)
        return then

    return meanwhile


def test_a_signal_in_a_step_lets_it_be_finished_and_saved(running, tmp_path):
    it = running()
    it.ranks.meanwhile["train_step", 3] = terminate()
    assert it.driver.run() == "interrupted"
    (words,) = it.ear.words("signal")
    assert words.startswith("SIGTERM: step 3 is finished first (about 1 s), then ")
    assert it.ranks.calls.count("stop") == 1
    assert it.ear.steps()[-1].step == 3
    assert it.ear.words("interrupted") == ["saving after step 3"]
    assert it.driver.asked.stop.by == "SIGTERM"
    assert Directory(f"{tmp_path}/checkpoints").steps() == [3]


def test_a_step_of_several_passes_is_broken_off_and_the_state_before_it_saved(running, tmp_path):
    it = running("batch.accumulation=4")
    it.ranks.meanwhile["train_step", 3] = terminate("left")
    assert it.driver.run() == "interrupted"
    assert "step 3 is broken off at its next pass" in it.ear.words("signal")[0]
    assert it.ear.steps()[-1].step == 2
    assert Directory(f"{tmp_path}/checkpoints").steps() == [2]


def test_an_evaluation_is_broken_off_and_its_step_is_saved(running, tmp_path):
    it = running()
    it.ranks.meanwhile["evaluate", 1] = terminate("left")
    assert it.driver.run() == "interrupted"
    assert "the evaluation is broken off" in it.ear.words("signal")[0]
    assert it.run.metrics()[-1]["step"] == 2
    assert "eval_loss" not in it.run.metrics()[-1]
    assert Directory(f"{tmp_path}/checkpoints").steps() == [2]


def test_a_signal_while_saving_lets_that_be_finished(running, tmp_path):
    it = running("checkpoint.every=2")
    it.ranks.meanwhile["save", 1] = terminate()
    assert it.driver.run() == "interrupted"
    assert "the checkpoint of step 2 is finished first" in it.ear.words("signal")[0]
    assert Directory(f"{tmp_path}/checkpoints").steps() == [2]


def test_a_second_signal_stops_at_once_and_what_is_lost_is_on_disk_before_that(running, tmp_path):
    it = running()

    def twice():
        terminate()()
        it.driver.requests.take()
        terminate()()

    it.ranks.meanwhile["train_step", 3] = twice
    with pytest.raises(KeyboardInterrupt), it.driver.told():
        it.driver.run()
    last = it.run.events()[-1]
    assert last["kind"] == "interrupted"
    assert last["message"].startswith("stopped at once after step 2; nothing was saved: 2 steps are lost")
    assert Directory(f"{tmp_path}/checkpoints").steps() == []


def test_a_lost_rank_is_an_event_with_the_steps_lost_and_the_command(running, tmp_path):
    it = running("checkpoint.every=2")

    def die():
        raise RankError(1, "rank 1 on beta died: killed\nand more")

    it.ranks.meanwhile["train_step", 4] = die
    with pytest.raises(RankError) as e, it.driver.told():
        it.driver.run()
    event = it.run.events()[-1]
    lost = (
        f"the newest checkpoint is of step 2: 1 step is lost; go on with: ray-ep train run_dir={tmp_path} resume=auto"
    )
    assert event["kind"] == "failed"
    assert event["message"] == f"rank 1 on beta died: killed, after step 3; {lost}"
    assert event["fields"] == {"done": 3, "saved": 2, "rank": 1}
    assert e.value.__notes__ == [lost]


@pytest.mark.parametrize(("size", "overrides", "taken"), [(1, [], 0), (1, ["snapshot.to_disk=true"], 3), (2, [], 3)])
def test_one_rank_alone_takes_snapshots_for_the_disk_and_else_none(tmp_path, size, overrides, taken):
    it = driven(tmp_path, "snapshot.every=2", *overrides, size=size)
    it.driver.form()
    it.driver.run()
    assert it.ranks.calls.count("snapshot") == taken


def test_a_snapshot_that_is_not_on_disk_is_told_and_the_run_goes_on(tmp_path):
    it = driven(tmp_path, "snapshot.every=2", "snapshot.to_disk=true")
    it.ranks.meanwhile["snapshot", 2] = lambda: "No space left on device"
    it.driver.form()
    assert it.driver.run() == "done"
    (words,) = it.ear.words("snapshot-not-on-disk")
    assert words == "No space left on device; the run goes on, the next snapshot tries again"
