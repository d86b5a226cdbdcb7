"""Ranks are killed at every moment of a run, and while others recover: it goes on, with the curve of one undisturbed.

Scripted and counted (tests/faults.py). Six ranks on one node: each is kept by the next one, so no two neighbours die
between two snapshots.
"""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

TRAINER, SNAPSHOTS = "ray_ep.rank.trainer:Trainer", "ray_ep.rank.snapshot.snapshots:Snapshots"
IN_A_STEP = {  # rank: where, at which call (from 1)
    0: ("ray_ep.rank.step.forward:Forward.loss", 4),
    2: ("ray_ep.moe.exchange.meter:MeteredGroup.all_to_all", 60),  # forward or backward of some step
    4: (f"{TRAINER}._all_are_ready", 9),
    5: (f"{TRAINER}.finish", 13),
}
BETWEEN_STEPS = {
    1: (f"{TRAINER}.publish", 4),
    3: (f"{SNAPSHOTS}._piece", 6),
    5: (f"{TRAINER}.evaluate", 3),
    0: (f"{TRAINER}.save", 3),
}
WHILE_RECOVERING = {1: (f"{TRAINER}._reduce", 4), 3: (f"{TRAINER}.regroup", 1), 5: (f"{TRAINER}.migrate", 1)}
STEPS = 16
OPTIONS = [
    f"optim.steps={STEPS}",
    "snapshot.every=2",
    "eval.every=4",
    "checkpoint.every=5",
    "checkpoint.keep=0",
    "exchange.kind=flat",
]


def curve(lines, run):
    """Loss, norm and tokens of each step, of a repeated one the last; steps in the order in which they were told."""
    told = lines(run / "metrics.jsonl")
    by_step = {m["step"]: (m["loss"], m["grad_norm"], m["tokens"]) for m in told}
    assert sorted(by_step) == list(range(1, STEPS + 1))
    return [by_step[s] for s in sorted(by_step)], [m["step"] for m in told]


@pytest.fixture(scope="module")
def undisturbed(shared, lines, cluster):
    command = shared.train(*OPTIONS, "run_dir=undisturbed", RAY_ADDRESS=cluster.driver)
    assert command.wait(200) == 0, command.err
    return curve(lines, shared.path / "undisturbed")[0]


def check(here, lines, command, undisturbed, faults):
    assert command.wait(200) == 0, command.err
    faults.check()
    got, told = curve(lines, here.path / "run")
    for step, (a, b) in enumerate(zip(got, undisturbed, strict=True), 1):
        assert a == pytest.approx(b, rel=1e-5), f"step {step}"
    events = [e for e in lines(here.path / "run" / "events.jsonl") if e["kind"] == "recovered"]
    lost = [m for e in events for m in e["fields"]["lost"]]
    assert sorted(lost) == sorted(f"rank-{f.rank}" for f in faults.script)
    repeated = sum(e["fields"]["repeated"] for e in events)
    assert len(told) <= STEPS + repeated
    for event in events:
        fields = event["fields"]
        assert fields["repeated"] <= 3, event
        assert set(fields["seconds"]) == {"detect", "decide", "regroup", "restore", "first_step"}
        assert re.match(r"rank \d on \S+ died", fields["cause"])
    assert command.left() == {}
    return events


@pytest.mark.slow
@pytest.mark.parametrize("script", [IN_A_STEP, BETWEEN_STEPS], ids=["in a step", "between steps"])
def test_the_curve_is_that_of_the_undisturbed_run_wherever_ranks_are_killed(
    here, lines, faults, cluster, undisturbed, script
):
    for rank, (at, call) in script.items():
        faults.kill(rank, at, call)
    six = ["cluster.ranks=6", "cluster.cpus_per_rank=0.5", "run_dir=run"]
    command = here.train(*OPTIONS, *six, faults=faults, RAY_ADDRESS=cluster.driver)
    events = check(here, lines, command, undisturbed, faults)
    assert len(events) == 4


@pytest.mark.slow
def test_ranks_that_are_killed_while_others_recover_are_survived_too(here, lines, faults, cluster, undisturbed):
    for rank, (at, call) in WHILE_RECOVERING.items():
        faults.kill(rank, at, call)
    six = ["cluster.ranks=6", "cluster.cpus_per_rank=0.5", "run_dir=run"]
    command = here.train(*OPTIONS, *six, faults=faults, RAY_ADDRESS=cluster.driver)
    (event,) = check(here, lines, command, undisturbed, faults)
    assert event["fields"]["ranks"] == 3


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_other_goes_on_alone(here, lines, faults, cluster):
    faults.kill(rank=1, at=f"{TRAINER}.finish", call=4)
    command = here.train("optim.steps=6", "snapshot.every=2", "run_dir=run", faults=faults, RAY_ADDRESS=cluster.driver)
    assert command.wait(200) == 0, command.err
    assert re.search(r"event kind=recovered rank 1 on \S+ died.*; 1 rank goes on in epoch 1: all go back", command.err)
    assert [m["step"] for m in lines(here.path / "run" / "metrics.jsonl")] == [1, 2, 3, 3, 4, 5, 6]
    assert [m["world_size"] for m in lines(here.path / "run" / "metrics.jsonl")] == [2, 2, 2, 1, 1, 1, 1]
    assert command.left() == {}


IN_AN_EXCHANGE = "ray_ep.moe.exchange.meter:MeteredGroup.all_to_all"


def stopped(command, faults, what="stop"):
    """The process that has stopped itself, or sleeps, as the script says."""
    command.until(lambda: faults.happened(what), 200, "the fault")
    return faults.lines()[-1]["pid"]


@pytest.mark.slow
def test_a_rank_that_is_stopped_for_less_than_silence_s_costs_the_wait_alone(here, lines, faults, cluster, undisturbed):
    faults.stop(rank=1, at=IN_AN_EXCHANGE, call=60)
    command = here.train(*OPTIONS, "run_dir=run", faults=faults, RAY_ADDRESS=cluster.driver)
    pid = stopped(command, faults)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    assert command.wait(200) == 0, command.err
    got, told = curve(lines, here.path / "run")
    assert told == list(range(1, STEPS + 1)), "no step was made twice"
    for step, (a, b) in enumerate(zip(got, undisturbed, strict=True), 1):
        assert a == pytest.approx(b, rel=1e-5), f"step {step}"
    metrics = lines(here.path / "run" / "metrics.jsonl")
    assert {m["epoch"] for m in metrics} == {0}
    assert sum(m["step_seconds"] > 2.9 for m in metrics) == 1
    assert not [e for e in lines(here.path / "run" / "events.jsonl") if e["kind"] == "recovered"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["stop", "slow"])
def test_a_rank_that_hangs_is_lost_once_it_is_told_what_everybody_was_at(
    here, lines, faults, cluster, undisturbed, what
):
    """Stopped, it answers nothing; asleep in a call, it answers, and the others run into the limit of theirs."""
    where = {"rank": 1, "at": IN_AN_EXCHANGE, "call": 60}
    faults.stop(**where) if what == "stop" else faults.slow(600, **where)
    three = ["cluster.ranks=3", "cluster.cpus_per_rank=0.5", "cluster.silence_s=2", "run_dir=run"]
    limit = ["cluster.collective_timeout_s=8", "tracking.to=[otel]"]
    command = here.train(*OPTIONS, *three, *limit, faults=faults, RAY_ADDRESS=cluster.driver)
    pid = stopped(command, faults, what)
    command.until(lambda: "event kind=recovered" in command.err, 200, "the recovery")
    command.until(lambda: not os.path.exists(f"/proc/{pid}"), 6, "the end of what hung")
    (event,) = lost_once(here, lines, command, undisturbed)
    assert (event["lost"], event["planned"], event["failures"]) == (["rank-1"], False, 1)
    assert event["seconds"]["detect"] >= 2 or what == "slow"
    assert f"stacks of 3 ranks: {event['stacks']}" in command.err
    told = {p.name: p.read_text() for p in Path(event["stacks"]).iterdir()}
    assert sorted(told) == ["driver.txt", "rank0.txt", "rank1.txt", "rank2.txt"]
    if what == "stop":
        assert "state T (stopped)" in told["rank1.txt"]
        assert re.search(r"faults\.py(.*\n)*.*train_step|py-spy (cannot read it|was not done)", told["rank1.txt"])
    else:
        assert re.search(r"in train_step\n(.*\n)*.*in happen\n    time.sleep\(fault.value\)", told["rank1.txt"])
    for name in ("rank0.txt", "rank2.txt"):
        assert re.search(r"in all_to_all\n(.*\n)*.*in _sleep_until", told[name]), told[name]
        mine, hung = (re.search(rf"rank {r}: (\d+) calls", told[name])[1] for r in (name[4], 1))
        assert int(mine) == int(hung) + 1
        assert "Flight recorder of torch:\n" in told[name]
    spans = [line["resourceSpans"][0]["scopeSpans"][0]["spans"] for line in lines(here.path / "run" / "spans.jsonl")]
    (recovery,) = [tree for tree in spans if tree[0]["name"] == "recovery"]
    assert [s["name"] for s in recovery[1:]] == [f"recovery.{clock}" for clock in event["seconds"]]
    assert len(recovery[0]["links"]) == 1 + event["repeated"]


@pytest.mark.slow
def test_ranks_of_a_node_that_stood_still_find_their_epoch_over_when_it_wakes_up(here, lines, undisturbed):
    """As a virtual machine that was paused: its raylet, which would kill them, is stopped with them."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        raylet = nodes.add_node(num_cpus=1).all_processes["raylet"][0].process.pid
        three = ["cluster.ranks=3", "cluster.cpus_per_rank=0.5", "cluster.silence_s=2", "run_dir=run"]
        command = here.train(*OPTIONS, *three, RAY_ADDRESS=nodes.address)
        command.until(lambda: len(lines(here.path / "run" / "metrics.jsonl")) >= 3, 200, "three steps")
        still = ranks_under(raylet)
        for pid in (raylet, *still):
            os.kill(pid, signal.SIGSTOP)
        command.until(lambda: "event kind=recovered" in command.err, 200, "the recovery")
        for pid in still:  # they go on with the step that they were at, and nobody tells them anything for a while
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.5)
        os.kill(raylet, signal.SIGCONT)
        command.until(lambda: not any(os.path.exists(f"/proc/{p}") for p in still), 200, "the end of what stood still")
        (event,) = lost_once(here, lines, command, undisturbed)
        assert len(event["lost"]) == len(still) >= 1
    finally:
        nodes.shutdown()


def ranks_under(raylet):
    """Processes of the ranks that a raylet has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == raylet and (entry / "cmdline").read_bytes().startswith(b"ray::RankActor"):
                found.append(int(entry.name))
    return found


def lost_once(here, lines, command, undisturbed):
    """Fields of the recoveries of a run that ends well, with the undisturbed curve."""
    assert command.wait(200) == 0, command.err
    got, _ = curve(lines, here.path / "run")
    for step, (a, b) in enumerate(zip(got, undisturbed, strict=True), 1):
        assert a == pytest.approx(b, rel=1e-5), f"step {step}"
    return [e["fields"] for e in lines(here.path / "run" / "events.jsonl") if e["kind"] == "recovered"]


@pytest.mark.slow
def test_a_node_that_is_lost_takes_its_ranks_along_and_the_others_go_on(here, lines):
    """Its raylet is killed; Ray's own verdict on it takes 13 s by default, and the ranks there live on for a while."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = nodes.add_node(num_cpus=1)
        options = ["optim.steps=100000", "snapshot.every=2", "run_dir=run", "cluster.cpus_per_rank=0.5", "eval.every=0"]
        command = here.train(*options, "cluster.ranks=3", RAY_ADDRESS=nodes.address)
        metrics = here.path / "run" / "metrics.jsonl"
        command.until(lambda: len(lines(metrics)) >= 5, 200, "five steps")
        os.kill(lost.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        command.until(lambda: "event kind=recovered" in command.err, 200, "the recovery")
        done = len(lines(metrics))
        command.until(lambda: len(lines(metrics)) >= done + 5, 200, "five more steps")
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.wait(200) == 130, command.err
        (event,) = [e["fields"] for e in lines(here.path / "run" / "events.jsonl") if e["kind"] == "recovered"]
        assert 3 - len(event["lost"]) == event["ranks"] >= 1
        assert event["repeated"] <= 3
    finally:
        nodes.shutdown()
