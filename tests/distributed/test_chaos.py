"""`ray-ep chaos` on real raylets and ranks: the faults happen, nothing is lost, and nothing is left behind."""

import json
import os
import signal
from collections import Counter

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ALL = "model.overrides={num_experts_per_tok: 8}"  # no near ties of the router


def test_a_run_under_faults_of_its_own_raylets_loses_nothing(here, lines):
    command = here.ray_ep(
        "chaos",
        *here.tiny("snapshot.every=2", ALL),
        "--minutes=0.25",
        "--every=7",
        "--faults=kill,node",
        "--seed=3",
        "--json",
        "run_dir=out",
    )
    assert command.wait(400) == 0, command.err
    (told,) = [json.loads(line) for line in command.out.splitlines()]
    out = here.path / "out"
    assert {k: v for k, v in told.items() if k != "folder"} == json.loads((out / "chaos.json").read_text())
    assert sum(told["injected"].values()) + sum(told["skipped"].values()) == 2
    assert told["recoveries"] >= 1
    recovered = [e["fields"] for e in lines(out / "disturbed" / "events.jsonl") if e["kind"] == "recovered"]
    assert len(recovered) == told["recoveries"]
    assert told["lost"] == told["unanswered"] == told["problems"] == []
    steps = Counter(m["step"] for m in lines(out / "disturbed" / "metrics.jsonl"))
    assert told["steps"] == len(steps) == max(steps) == told["against"]["count"]
    assert told["again"] == steps.total() - len(steps) == told["repeated"]["count"]
    assert 0 < told["ettr"] <= 1
    assert told["clocks"]["next step"]["median"] < 20
    assert "ETTR" in (out / "chaos.html").read_text()
    assert command.left() == {}


def test_a_signal_ends_all_of_it(here, lines):
    command = here.ray_ep("chaos", *here.tiny("snapshot.every=2"), "--every=5", "run_dir=out")
    metrics = here.path / "out" / "disturbed" / "metrics.jsonl"
    command.until(lambda: len(lines(metrics)) >= 3, 200, "three steps")
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.wait(200) == 130, command.err
    assert command.left() == {}


def test_whatever_ends_it_its_run_and_its_raylets_end_too(here, lines):
    command = here.ray_ep("chaos", *here.tiny("snapshot.every=2"), "run_dir=out")
    metrics = here.path / "out" / "disturbed" / "metrics.jsonl"
    command.until(lambda: len(lines(metrics)) >= 3, 200, "three steps")
    os.kill(command.process.pid, signal.SIGKILL)
    command.wait(10)
    assert command.left(30) == {}


def test_ranks_on_a_cluster_of_somebodys_are_hit_and_its_nodes_are_left_alone(here, lines, cluster):
    smooth = [ALL, "optim.learning_rate=0.0001", "snapshot.every=2", "optim.steps=200", "run_dir=recorded"]
    recorded = here.train(*smooth, RAY_ADDRESS=cluster.driver)
    assert recorded.wait(200) == 0, recorded.err
    command = here.ray_ep(
        "chaos", "--config=recorded/config.yaml", "--against=recorded", f"--address={cluster.driver}", "--json",
        "run_dir=out", "cluster.ranks=4", "cluster.cpus_per_rank=0.5", "--faults=kill", "--every=3", "--minutes=0.05",
    )  # fmt: skip
    assert command.wait(300) == 0, command.err
    told = json.loads(command.out)
    assert told["injected"] == {"kill": 1}
    assert told["recoveries"] == 1
    assert told["against"]["count"] == told["steps"]
    assert command.left() == {}


def test_a_run_that_is_refused_leaves_nothing_and_says_why(here):
    command = here.ray_ep("chaos", "data.files=[nowhere.txt]", "run_dir=out")
    assert command.wait(200) == 2
    assert "nowhere.txt" in command.err
    assert not (here.path / "out").exists()
    assert command.left() == {}
