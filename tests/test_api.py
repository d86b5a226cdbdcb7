"""What `ray_ep.Run` offers to Python users, read from a run directory: no Ray, no model."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ray_ep
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.placement import RoutingStatistics, Topology, contiguous, random
from tests.records import record

LAYERS, EXPERTS, RANKS = 2, 8, 2


@pytest.fixture
def run(tmp_path):
    """A run of two steps of three, with everything that the driver writes but checkpoints."""
    made = RunDir(tmp_path / "run")
    made.create(ray_ep.load_config(None, ["optim.steps=3", "router.force=balanced"]))
    made.start(Event("start", "a model"))
    made.placement(contiguous(LAYERS, EXPERTS, RANKS))
    made.topology(Topology(np.full((RANKS, RANKS), 1e9), np.full((RANKS, RANKS), 1e-5), [0, 1]))
    counts = np.ones((LAYERS, EXPERTS), np.int64)
    made.statistics(RoutingStatistics(counts, np.ones((LAYERS, EXPERTS, EXPERTS), np.int64)))
    for step in (1, 2):
        made.step(record(step, loss=5.0 - step))
    return made


def test_a_run_is_opened_from_its_directory_with_everything_that_it_left(run):
    opened = ray_ep.open_run(str(run.path))
    assert opened.dir == run.path
    assert [m["loss"] for m in opened.metrics()] == [4.0, 3.0]
    assert [(e["step"], e["kind"], e["message"]) for e in opened.events()] == [(0, "start", "a model")]
    assert opened.config.optim.steps == 3
    assert opened.placement.slots.shape == (LAYERS, RANKS, EXPERTS // RANKS)
    assert opened.statistics.load.shape == (LAYERS, EXPERTS)
    assert opened.statistics.coactivation.shape == (LAYERS, EXPERTS, EXPERTS)
    assert opened.topology.bandwidth.shape == opened.topology.latency.shape == (RANKS, RANKS)
    assert opened.topology.node_of.tolist() == [0, 1]
    assert opened.report == run.path / "report.html"
    assert opened.checkpoint is None
    assert opened.mark == "[router.force=balanced] "


def test_what_getting_started_says_about_a_run_can_be_done(run):
    text = (Path(__file__).parents[1] / "docs" / "getting-started.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "ray_ep.open_run" in b]
    assert len(block.splitlines()) > 9
    exec(block, {"ray_ep": ray_ep, "run": ray_ep.Run(run.path, "done")})


def test_the_newest_placement_is_the_runs(run):
    moved = replace(random(LAYERS, EXPERTS, RANKS, None, 3), version=1)
    run.placement(moved)
    assert ray_ep.open_run(run.path).placement.slots.tolist() == moved.slots.tolist()


def test_its_status_is_told_from_its_files_and_a_resume_begins_anew(run):
    def status():
        return ray_ep.open_run(run.path).status

    assert status() == "unfinished"
    run.event(Event("interrupted", "saving after step 2"))
    run.event(Event("checkpoint", "step-000002"))
    assert status() == "interrupted"
    run.start(Event("start", "a model, once more"))
    assert status() == "unfinished"
    run.event(Event("failed", "rank 1 died"))
    assert status() == "failed"
    run.start(Event("start", "a model, with another learning rate"))
    run.event(Event("diverged", "step 3 diverged"))
    assert status() == "failed"
    run.start(Event("start", "a model, for the last time"))
    run.step(record(3, loss=1.0))
    assert status() == "done"
    run.start(Event("start", "a model, from an earlier checkpoint"))
    run.step(record(2, loss=2.0))
    assert status() == "unfinished"
    assert [m["step"] for m in ray_ep.open_run(run.path).metrics()] == [1, 2], "3 is to be made again, too"


def test_what_a_run_has_not_got_is_none_or_empty(tmp_path):
    (tmp_path / "config.yaml").write_text("optim: {steps: 3}")
    run = ray_ep.open_run(tmp_path)
    assert (run.status, run.metrics(), run.events()) == ("unfinished", [], [])
    assert (run.placement, run.statistics, run.topology, run.checkpoint) == (None, None, None, None)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ray_ep.BadInput, match="is not a run directory"):
        ray_ep.open_run(tmp_path)
    with pytest.raises(ray_ep.BadInput, match="is not a run directory"):
        ray_ep.open_run(tmp_path / "nowhere")
