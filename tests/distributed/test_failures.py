"""What is left after an interruption or a lost rank: exit status, words that help, a checkpoint, and no process."""

import os
import re
import signal
import time

import pytest

from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory
from tests.browser import data_of


@pytest.fixture
def running(here, lines, faults):
    """Start a run without end and wait until it has done three steps."""

    def start(*overrides):
        command = here.train("optim.steps=100000", "run_dir=run", *overrides, faults=faults)
        command.until(lambda: len(lines(here.path / "run" / "metrics.jsonl")) >= 3, 200, "three steps")
        return command

    return start


def check_interrupted(here, lines, command):
    """What must hold after an interruption; returns the last step."""
    assert command.wait(200) == 130, command.err
    assert command.left() == {}
    assert "Traceback" not in command.err
    done = lines(here.path / "run" / "metrics.jsonl")[-1]["step"]
    directory = Directory(str(here.path / "run" / "checkpoints"))
    assert directory.steps() == [done]
    Checkpoint(directory, done).verify()
    assert data_of((here.path / "run" / "report.html").read_text())["state"]["run"]["alive"] is False
    assert "interrupted" in [e["kind"] for e in lines(here.path / "run" / "events.jsonl")]
    return done


def test_control_c_saves_and_leaves_nothing_behind(here, lines, running, faults):
    command = running()
    assert {faults.pid(0), faults.pid(1)} <= command.offspring().keys()
    os.killpg(command.process.pid, signal.SIGINT)  # a terminal sends it to every process in the foreground
    check_interrupted(here, lines, command)


@pytest.mark.slow
def test_termination_in_a_long_step_is_answered_at_once_saves_and_leaves_nothing_behind_and_a_restart_goes_on(
    here, lines, running, faults, cluster
):
    faults.slow(15, call=4)
    command = running()
    command.until(lambda: faults.happened("slow"), 200, "the long step")
    command.process.terminate()  # as Kubernetes and Slurm do: to the command alone
    events = here.path / "run" / "events.jsonl"
    sent = time.monotonic()
    said = command.until(lambda: [e for e in lines(events) if e["kind"] == "signal"], 200, "an answer")
    assert time.monotonic() - sent < 10  # of which the event takes 0.2 s, and this machine the rest
    assert re.fullmatch(r"SIGTERM: step 4 is finished first \(about \d+ s\), then .* saved.*", said[0]["message"])
    assert said[0]["message"] in command.err
    done = check_interrupted(here, lines, command)

    again = here.train(f"optim.steps={done + 2}", "run_dir=run", "resume=auto", RAY_ADDRESS=cluster.driver)
    assert again.wait(200) == 0, again.err
    assert [m["step"] for m in lines(here.path / "run" / "metrics.jsonl")] == list(range(1, done + 3))


@pytest.mark.slow
def test_a_command_that_is_terminated_while_it_starts_leaves_nothing_behind(here):
    command = here.train("run_dir=run")
    command.until(lambda: any("raylet" in line for line in command.offspring().values()), 200, "a raylet")
    command.process.terminate()
    assert command.wait(200) == 130, command.err
    assert command.left() == {}


@pytest.mark.slow
def test_a_killed_rank_is_named_and_ends_the_run_without_orphans(here, lines, running, faults):
    faults.kill(rank=1, call=4)
    command = running("snapshot.every=0")
    assert command.wait(200) == 1, command.err
    assert re.search(r"rank 1 on \S+ died", command.err)
    assert len(command.err.splitlines()) < 40
    assert command.left() == {}
    failed = lines(here.path / "run" / "events.jsonl")[-1]
    assert failed["kind"] == "failed"
    for words in (failed["message"], command.err.splitlines()[-1]):  # the last line is what to do
        assert re.search(r"nothing was saved: \d+ steps are lost; .*: ray-ep train run_dir=\S*run resume=auto", words)
    assert (here.path / "run" / "report.html").exists()


@pytest.mark.slow
def test_a_rank_that_raises_is_named_with_its_own_traceback(here, lines, running, faults):
    faults.raise_in(rank=1, call=4, words="boom from rank 1")
    command = running()
    assert command.wait(200) == 1, command.err
    assert "ValueError: boom from rank 1" in command.err
    assert "rank 1 raised" in command.err
    assert "in with_faults" in command.err  # its own stack, not that of the rank that lost its peer
    assert "GroupError" not in command.err
    assert command.left() == {}
    assert len(lines(here.path / "run" / "metrics.jsonl")) == 3


STOPPED = (
    r"rank 1 on \S+ \(process (\d+)\) has not answered for [\d.]+ s \(cluster.silence_s=2\): its node answers, so its "
)


@pytest.mark.parametrize("at", ["build", "join", "train_step", "save"])
@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_whatever_it_is_at_and_the_run_ends(here, lines, faults, cluster, at):
    faults.stop(rank=1, at=at)
    options = ["optim.steps=3", "run_dir=run", "checkpoint.every=2", "cluster.silence_s=2", "snapshot.every=0"]
    local = at == "build"  # a Ray of the run's own, which kills sooner than Ray's 5 s
    command = here.train(*options, faults=faults, **({} if local else {"RAY_ADDRESS": cluster.driver}))
    command.until(lambda: faults.happened("stop"), 200, "the fault")
    stopped = faults.lines()[-1]["pid"]
    soon = 30  # some 4 s on a quiet machine
    command.until(lambda: not os.path.exists(f"/proc/{stopped}"), soon, "the end of what is stopped")
    named = command.until(lambda: re.search(STOPPED, command.err), soon, "words of it")
    assert int(named[1]) == stopped
    assert command.wait(200) == 1, command.err  # an interpreter takes seconds to end on a busy machine
    assert command.left() == {}
    if at in ("train_step", "save"):
        assert lines(here.path / "run" / "events.jsonl")[-1]["kind"] == "failed"
