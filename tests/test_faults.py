"""Scripted faults: in the call and on the rank that were named, once, and missed when they did not happen."""

import os
import signal

import pytest

from tests.faults import Faults


class Thing:
    def add(self, a, b):
        return a + b


@pytest.fixture
def script(tmp_path):
    return Faults(tmp_path / "log")


def in_a_process(work):
    """Wait status of a forked process that works: ended, or stopped and then killed."""
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return status


def test_a_rank_raises_at_the_call_that_was_named_and_no_other_rank_does(script):
    script.raise_in(rank=1, at="add", call=2, words="boom")
    first, second = script.on(Thing(), 0), script.on(Thing(), 1)
    assert [first.add(1, 1), first.add(1, 2), second.add(1, 3)] == [2, 3, 4]
    with pytest.raises(AssertionError, match="has not happened"):
        script.check()
    with pytest.raises(ValueError, match="boom"):
        second.add(1, 4)
    assert second.add(1, 5) == 6
    script.check()
    assert (script.happened(), script.happened("kill")) == (1, 0)


def test_what_is_slow_stays_slow(script):
    thing = script.slow(0.0, at="add", call=2).on(Thing(), 3)
    assert [thing.add(0, n) for n in range(4)] == [0, 1, 2, 3]
    assert [line["call"] for line in script.lines()] == [2, 3, 4]
    script.check()


def test_a_fault_that_happens_twice_is_told(script):
    script.raise_in(rank=0, at="add")
    for _ in range(2):
        with pytest.raises(ValueError, match="scripted"):
            script.on(Thing(), 0).add(1, 1)
    with pytest.raises(AssertionError, match="2 times"):
        script.check()


@pytest.mark.parametrize(("what", "sent"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_a_process_is_killed_or_stopped_after_a_line_about_it(script, what, sent):
    getattr(script, what)(rank=2, at="add")
    status = in_a_process(lambda: script.on(Thing(), 2).add(1, 1))
    assert sent == (os.WTERMSIG(status) if what == "kill" else os.WSTOPSIG(status))
    assert script.happened(what) == 1
    script.check()


def test_once_disarmed_actors_are_made_as_ever(script):
    from ray_ep.rank.actor import RankActor

    made = RankActor.__ray_metadata__.modified_class
    before, build = dict(vars(made)), made.build
    script.kill(rank=0, at="build").arm()
    assert made.build is not build
    script.disarm()
    assert dict(vars(made)) == before
