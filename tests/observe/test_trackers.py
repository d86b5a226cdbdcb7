"""Experiment trackers, each with its real library, offline: what a run says is what the library reads back."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from ray_ep.config import load_config
from ray_ep.driver.records import Event
from ray_ep.errors import BadInput
from ray_ep.observe.trackers import check_trackers, figures, trackers
from tests.records import record

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries

CODE = """
import sys
from pathlib import Path
from tests.observe.test_trackers import config, tell
tell(config("wandb"), Path(sys.argv[1]), range(1, 4))
"""


def config(name, *more):
    return load_config(None, [f"tracking.to=[{name}]", "tracking.project=trial", *more])


def steps(numbers):
    return [replace(record(), step=n, loss=5.0 - n / 10) for n in numbers]


def tell(cfg, run_dir, numbers, *events):
    """As a run of these steps does."""
    with trackers(cfg, run_dir) as (tracker,):
        tracker.start(Event("start", "begins", step=numbers[0] - 1))
        for step in steps(numbers):
            tracker.step(step)
        for event in events:
            tracker.event(event)


def test_tensorboard_has_every_figure_of_every_step_and_events_as_text_and_a_step_made_again_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(config("tensorboard"), tmp_path, range(1, 6), Event("rebalance", "stay", step=5))
    tell(config("tensorboard"), tmp_path, range(4, 9))  # goes on after step 3
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
    assert json.loads((run_dir / "tracking.json").read_text()) == {"mlflow": run.info.run_id}


@pytest.mark.slow
def test_weights_and_biases_writes_offline_into_the_run_directory(tmp_path):
    pytest.importorskip("wandb")
    command = [sys.executable, "-c", CODE, str(tmp_path)]  # a process of its own, for the library starts another
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run(command, env=env, check=True, timeout=120)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    told = file.read_bytes()
    assert all(words in told for words in (b"step_seconds", b"4.9", b"4.8", b"4.7", b"optim"))


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_what_is_allowed(monkeypatch):
    with pytest.raises(BadInput, match=r"tracking\.to=comet: expected tensorboard, mlflow, wandb"):
        check_trackers(config("comet"))
    monkeypatch.setattr("ray_ep.observe.trackers.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"tracking\.to=wandb: it is not installed: pip install 'ray_ep\[wandb\]'"):
        check_trackers(config("wandb"))
