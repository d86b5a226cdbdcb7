"""What is left after an interruption or a lost rank: exit status, words that help, a checkpoint, and no process."""

import os
import re
import signal
import time

import pytest

from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory

PROBE = """
# Put on PYTHONPATH as sitecustomize. The hook waits for the module, so nothing is imported early.
import importlib.abc, importlib.util, os, sys, time

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "ray_ep.rank.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module.Trainer))
        return spec

def patch(Trainer):
    train_step = Trainer.train_step

    def probed_step(self, step, *more):
        if step == 0:
            open(f"{os.environ['RAY_EP_TEST_PIDS']}/rank-{self.group.rank}.pid", "w").write(str(os.getpid()))
        if self.group.rank == 1 and step == 3 and os.environ.get("RAY_EP_TEST_FAULT") == "1":
            raise ValueError("boom from rank 1")
        if step >= 3:
            time.sleep(float(os.environ.get("RAY_EP_TEST_SLOW_S", 0)))
        return train_step(self, step, *more)

    Trainer.train_step = probed_step

if "RAY_EP_TEST_PIDS" in os.environ:
    sys.meta_path.insert(0, Hook())
"""


@pytest.fixture
def running(here, lines):
    """Start a run without end and wait until it has done three steps; each rank leaves its process id in a file."""
    (here.path / "sitecustomize.py").write_text(PROBE)

    def start(*overrides, **env):
        paths = {"PYTHONPATH": str(here.path), "RAY_EP_TEST_PIDS": str(here.path)}
        command = here.train("optim.steps=100000", "run_dir=run", *overrides, **paths, **env)
        command.until(lambda: len(lines(here.path / "run" / "metrics.jsonl")) >= 3, 60, "three steps")
        return command

    return start


def pid_of(here, rank):
    return int((here.path / f"rank-{rank}.pid").read_text())


def check_interrupted(here, lines, command):
    """What must hold after an interruption; returns the last step."""
    assert command.wait(30) == 130, command.err
    assert command.left() == {}
    assert "Traceback" not in command.err
    done = lines(here.path / "run" / "metrics.jsonl")[-1]["step"]
    directory = Directory(str(here.path / "run" / "checkpoints"))
    assert directory.steps() == [done]
    Checkpoint(directory, done).verify()
    assert "In progress" not in (here.path / "run" / "report.html").read_text()
    assert "interrupted" in [e["kind"] for e in lines(here.path / "run" / "events.jsonl")]
    return done


def test_control_c_saves_leaves_nothing_behind_and_a_restart_goes_on_at_the_next_step(here, lines, running):
    command = running()
    assert {pid_of(here, 0), pid_of(here, 1)} <= command.offspring().keys()
    os.killpg(command.process.pid, signal.SIGINT)  # a terminal sends it to every process in the foreground
    done = check_interrupted(here, lines, command)

    again = here.train(f"optim.steps={done + 2}", "run_dir=run", "resume=auto")
    assert again.wait(60) == 0, again.err
    assert [m["step"] for m in lines(here.path / "run" / "metrics.jsonl")] == list(range(1, done + 3))


def test_termination_in_a_long_step_is_answered_at_once_saves_and_leaves_nothing_behind(here, lines, running):
    command = running(RAY_EP_TEST_SLOW_S="4")
    command.process.terminate()  # as Kubernetes and Slurm do: to the command alone
    events = here.path / "run" / "events.jsonl"
    sent = time.monotonic()
    said = command.until(lambda: [e for e in lines(events) if e["kind"] == "signal"], 20, "an answer")
    assert time.monotonic() - sent < 2  # of which the event takes 0.2 s, and this machine the rest
    assert re.fullmatch(r"SIGTERM: step 4 is finished first \(about \d+ s\), then .* saved.*", said[0]["message"])
    assert said[0]["message"] in command.err
    check_interrupted(here, lines, command)


def test_a_command_that_is_terminated_while_it_starts_leaves_nothing_behind(here):
    command = here.train("run_dir=run")
    command.until(lambda: any("raylet" in line for line in command.offspring().values()), 40, "a raylet")
    command.process.terminate()
    assert command.wait(60) == 130, command.err
    assert command.left(15) == {}


def test_a_killed_rank_is_named_and_ends_the_run_without_orphans(here, lines, running):
    command = running()
    os.kill(pid_of(here, 1), signal.SIGKILL)
    assert command.wait(20) == 1, command.err
    assert re.search(r"rank 1 on \S+ died", command.err)
    assert len(command.err.splitlines()) < 40
    assert command.left() == {}
    failed = lines(here.path / "run" / "events.jsonl")[-1]
    assert failed["kind"] == "failed"
    for words in (failed["message"], command.err.splitlines()[-1]):  # the last line is what to do
        assert re.search(r"nothing was saved: \d+ steps are lost; .*: ray-ep train run_dir=\S*run resume=auto", words)
    assert (here.path / "run" / "report.html").exists()


def test_a_rank_that_raises_is_named_with_its_own_traceback(here, lines, running):
    command = running(RAY_EP_TEST_FAULT="1")
    assert command.wait(20) == 1, command.err
    assert "ValueError: boom from rank 1" in command.err
    assert "rank 1 raised" in command.err
    assert "in probed_step" in command.err  # its own stack, not that of the rank that lost its peer
    assert "GroupError" not in command.err
    assert command.left() == {}
    assert len(lines(here.path / "run" / "metrics.jsonl")) == 3
