"""Experiment trackers, each with its real library, offline: what a run says is what the library reads back."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from ray_ep.config import load_config
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.records import Event
from ray_ep.errors import BadInput
from ray_ep.observe.trackers import check_trackers, tracked, trackers
from ray_ep.observe.trackers.told import IDS, Told, figures
from tests.records import record

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries

CODE = """
import sys
from pathlib import Path
from tests.observe.test_trackers import config, tell
assert tell(config("wandb"), Path(sys.argv[1]), range(1, 4)) == []
assert tell(config("wandb"), Path(sys.argv[1]), range(4, 5)) == []
"""


def config(name, *more):
    return load_config(None, [f"tracking.to=[{name}]", "tracking.project=trial", *more])


def steps(numbers):
    return [replace(record(), step=n, loss=5.0 - n / 10) for n in numbers]


def tell(cfg, run_dir, numbers, *events):
    """As a run of these steps does."""
    said = []
    with trackers(cfg, run_dir, said.append) as listeners:
        for listener in listeners:
            listener.start(Event("start", "begins", step=numbers[0] - 1))
            for step in steps(numbers):
                listener.step(step)
            for event in events:
                listener.event(event)
    return said


def test_tensorboard_has_every_figure_of_every_step_and_events_as_text_and_a_step_made_again_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(config("tensorboard"), tmp_path, range(1, 6), Event("rebalance", "stay", step=5))
    tell(config("tensorboard"), tmp_path, [4, 5, 6, 7, 5, 6, 7, 8])  # goes on after step 3; at 7 a rank is lost
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    want = figures(steps([1])[0])
    assert want.keys() <= set(read.Tags()["scalars"])
    assert [(e.step, round(e.value, 4)) for e in read.Scalars("loss")] == [
        (n, round(5 - n / 10, 4)) for n in range(1, 9)
    ]
    assert any(tag.startswith("events/rebalance") for tag in read.Tags()["tensors"])


@pytest.mark.slow
def test_mlflow_has_one_run_with_the_configuration_goes_on_with_it_and_says_how_it_ended(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    from mlflow.tracking import MlflowClient

    client, run_dir = MlflowClient(), tmp_path / "my-run"
    run_dir.mkdir()

    def found():
        (run,) = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
        return run

    tell(config("mlflow"), run_dir, range(1, 4), Event("failed", "rank 1 died"))
    assert found().info.status == "FAILED"
    tell(config("mlflow"), run_dir, range(4, 6))
    run = found()
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    assert run.data.params["optim.steps"] == "200"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        (n, pytest.approx(5 - n / 10)) for n in range(1, 6)
    ]
    assert json.loads((run_dir / IDS).read_text()) == {"mlflow": run.info.run_id}
    client.delete_run(run.info.run_id)  # somebody has cleared up
    assert tell(config("mlflow"), run_dir, range(6, 8)) == []
    new = found()
    assert new.info.run_id != run.info.run_id
    assert json.loads((run_dir / IDS).read_text()) == {"mlflow": new.info.run_id}


@pytest.mark.slow
def test_weights_and_biases_writes_offline_into_the_run_directory_and_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    command = [sys.executable, "-c", CODE, str(tmp_path)]  # a process of its own, for the library starts another
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run(command, env=env, check=True, timeout=120)
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    assert all(words in first.read_bytes() for words in (b"step_seconds", b"4.9", b"4.8", b"4.7", b"optim"))
    assert b"4.6" in second.read_bytes()
    run_id = json.loads((tmp_path / IDS).read_text())["wandb"]
    assert first.name == second.name == f"run-{run_id}.wandb"  # `wandb sync` joins them


class Plain:
    """A tracker that keeps what it is given."""

    made = []

    def __init__(self, told):
        self.made.append(self)
        self.steps, self.ended = [], ""

    def step(self, record):
        self.steps.append(record.step)

    def event(self, event):
        pass

    def close(self, status):
        self.ended = status


@pytest.fixture
def stand_in(monkeypatch):
    """Have a class of the test be a tracker: a library cannot be told when to fail."""
    monkeypatch.setattr(Plain, "made", [])
    return lambda name, kind: monkeypatch.setitem(tracked.TRACKERS, name, ("json", kind))


@pytest.mark.parametrize("where", ["start", "step", "close"])
def test_a_tracker_that_fails_is_named_once_and_ends_nothing(stand_in, tmp_path, where):
    class Fails(Plain):
        def __init__(self, told):
            super().__init__(told)
            if where == "start":
                raise OSError("no such\nserver")

        def step(self, record):
            if where == "step" and record.step in (2, 3):
                raise ConnectionError("cut\noff")
            super().step(record)

        def close(self, status):
            super().close(status)
            if where == "close":
                raise TimeoutError

    stand_in("fails", Fails)
    stand_in("plain", Plain)
    said = tell(load_config(None, ["tracking.to=[fails,plain]"]), tmp_path, range(1, 6))
    words = {"start": "OSError: no such server", "step": "ConnectionError: cut off", "close": "TimeoutError"}
    assert said == [f"tracking.to=fails: {words[where]}; the run goes on"]
    fails, plain = Plain.made
    assert fails.steps == {"start": [], "step": [1, 4, 5], "close": [1, 2, 3, 4, 5]}[where]
    assert (plain.steps, plain.ended) == ([1, 2, 3, 4, 5], "done")


def test_a_tracker_that_hangs_holds_up_neither_the_others_nor_the_end(stand_in, tmp_path, monkeypatch):
    held = threading.Event()

    class Hangs(Plain):
        def step(self, record):
            held.wait(120)

    stand_in("hangs", Hangs)
    stand_in("plain", Plain)
    monkeypatch.setattr(tracked, "LAST_S", 0.2)
    monkeypatch.setattr(tracked, "WAITING", 20)
    said = []
    cfg = load_config(None, ["tracking.to=[hangs,plain]"])
    with trackers(cfg, tmp_path, said.append) as listeners, Publisher(listeners) as publisher:
        publisher.start(Event("start", "begins"))
        for step in steps(range(1, 41)):
            publisher.step(step)
            assert publisher.flush(120)  # a checkpoint waits for all listeners, without a limit
    full = "it is too slow: 20 steps and events wait for it, further ones are left out"
    assert said == [f"tracking.to=hangs: {full}; the run goes on"]
    assert Plain.made[1].steps == list(range(1, 41))
    held.set()


def test_ids_of_a_file_that_is_damaged_are_not_known_and_written_anew(tmp_path):
    told = Told("p", tmp_path, {}, Event("start", ""))
    for text in ("[]", "{", '{"mlflow": 3}'):
        (tmp_path / IDS).write_text(text)
        assert told.known("wandb") is None
    told.keep("wandb", "x")
    assert json.loads((tmp_path / IDS).read_text()) == {"mlflow": "3", "wandb": "x"}


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_what_is_allowed(monkeypatch, tmp_path):
    with pytest.raises(BadInput, match=r"tracking\.to=comet: expected tensorboard, mlflow, wandb, otel"):
        check_trackers(config("comet"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "left_by_wandb").mkdir()  # its directory of runs, where Python looks for modules
    for module in ("left_by_wandb", "not_there", "not_there.at_all"):
        monkeypatch.setitem(tracked.TRACKERS, "wandb", (module, Plain))
        with pytest.raises(BadInput, match=r"tracking\.to=wandb: it is not installed: pip install 'ray_ep\[wandb\]'"):
            check_trackers(config("wandb"))


@pytest.mark.parametrize(("name", "project"), [("wandb", "a/b"), ("wandb", "x" * 129), ("wandb", ""), ("mlflow", " ")])
def test_a_project_that_a_tracker_does_not_take_is_refused_before_anything_starts(stand_in, name, project):
    stand_in(name, Plain)
    with pytest.raises(BadInput, match=r"tracking\.project='.*': "):
        check_trackers(load_config(None, [f"tracking.to=[{name}]", f"tracking.project={project}"]))
    check_trackers(load_config(None, [f"tracking.to=[{name}]", "tracking.project=fine, it is"]))
