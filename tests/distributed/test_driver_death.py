"""The driver dies without a word: all that it started is gone soon, and resume=auto goes on with the same losses."""

import json
import os
import re
import signal
import time

import pytest

pytestmark = pytest.mark.slow
SOON_S = 10
WATCH = """
import json, sys, time
import ray
from ray._private.state import actors
from ray.util import placement_group_table

ray.init(address=sys.argv[1], log_to_driver=False)
limit = time.monotonic() + float(sys.argv[2])
while True:
    left = [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    left += [a["Name"] for a in actors().values() if a["State"] != "DEAD"]
    if not left or time.monotonic() > limit:
        break
    time.sleep(0.05)
print(json.dumps(left))
"""
STEPS = 14
OPTIONS = [f"optim.steps={STEPS}", "eval.every=0", "exchange.kind=flat", "checkpoint.every_minutes=0", "run_dir=run"]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_local_ray_and_its_ranks_go_with_the_driver_whose_terminal_is_gone(here, lines, faults):
    command = here.train("optim.steps=100000", "run_dir=run", faults=faults)
    command.until(lambda: len(lines(here.path / "run" / "metrics.jsonl")) >= 3, 200, "three steps")
    assert {faults.pid(0), faults.pid(1)} <= command.offspring().keys()
    assert any("gcs_server" in line for line in command.offspring().values())
    os.killpg(command.process.pid, signal.SIGHUP)
    assert command.wait(SOON_S) < 0
    assert command.left(SOON_S) == {}


def test_a_local_ray_goes_with_a_driver_that_dies_while_it_starts(here):
    command = here.train("run_dir=run")
    command.until(lambda: any("raylet" in line for line in command.offspring().values()), 200, "a raylet")
    command.process.kill()
    assert command.left(90) == {}, "agents that Ray was starting look for their head for a minute"


def test_ranks_and_their_places_on_a_cluster_go_with_the_driver_even_one_that_is_stopped(here, lines, faults, cluster):
    command = here.train("optim.steps=100000", "run_dir=run", faults=faults, RAY_ADDRESS=cluster.driver)
    command.until(lambda: len(lines(here.path / "run" / "metrics.jsonl")) >= 3, 200, "three steps")
    pids = faults.pid(0), faults.pid(1)
    assert all(map(alive, pids))
    os.kill(pids[1], signal.SIGSTOP)
    command.process.kill()
    began = time.monotonic()
    command.wait(SOON_S)
    while any(map(alive, pids)) and time.monotonic() < began + SOON_S:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    watch = here.start("python", "-c", WATCH, cluster.driver, str(SOON_S + began - time.monotonic()))
    assert watch.wait(200) == 0, watch.err
    assert json.loads(watch.out.splitlines()[-1]) == []


def curve(lines, run):
    """{step: (loss, norm)}, of a repeated step the last, and steps in the order in which they were told."""
    told = lines(run / "metrics.jsonl")
    return {m["step"]: (m["loss"], m["grad_norm"]) for m in told}, [m["step"] for m in told]


@pytest.fixture(scope="module")
def undisturbed(shared, lines, cluster):
    command = shared.train(*OPTIONS, RAY_ADDRESS=cluster.driver)
    assert command.wait(200) == 0, command.err
    return curve(lines, shared.path / "run")[0]


def check_resumed(here, lines, cluster, undisturbed, url, *options):
    """The run goes on from `url`, alone, with the curve of the undisturbed one; steps that were made again."""
    before = curve(lines, here.path / "run")[1]
    again = here.train("run_dir=run", "resume=auto", *options, RAY_ADDRESS=cluster.driver)
    assert again.wait(200) == 0, again.err
    (said,) = [e for e in lines(here.path / "run" / "events.jsonl") if e["kind"] == "resume"]
    assert said["fields"]["checkpoint"] == str(url)
    got, told = curve(lines, here.path / "run")
    step = int(url.name[5:])
    assert told[len(before) :] == list(range(step + 1, STEPS + 1))
    assert got.keys() == undisturbed.keys()
    for number, figures in got.items():
        assert figures == pytest.approx(undisturbed[number], rel=1e-5), f"step {number}"
    return before[-1] - step


def test_a_killed_run_goes_on_from_its_newest_checkpoint_on_another_number_of_ranks(
    here, lines, faults, cluster, undisturbed
):
    faults.slow(1, call=8)
    command = here.train(*OPTIONS, "checkpoint.every=3", faults=faults, RAY_ADDRESS=cluster.driver)
    command.until(lambda: faults.happened("slow") >= 2, 200, "step 8")
    command.process.kill()
    assert command.wait(SOON_S) == -signal.SIGKILL
    three = ["cluster.ranks=3", "cluster.cpus_per_rank=0.5"]
    url = here.path / "run" / "checkpoints" / "step-000006"
    assert check_resumed(here, lines, cluster, undisturbed, url, *three) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_snapshots_on_disk_a_killed_driver_costs_no_more_steps_than_one_takes(
    here, lines, faults, cluster, undisturbed, ranks
):
    faults.slow(1, call=9)
    options = ["checkpoint.every=5", "snapshot.every=2", "snapshot.to_disk=true", f"cluster.ranks={ranks}"]
    command = here.train(*OPTIONS, *options, faults=faults, RAY_ADDRESS=cluster.driver)
    url = here.path / "run" / "checkpoints" / "snapshots" / "step-000008"
    command.until(lambda: (url / "manifest.json").exists(), 200, "the snapshot of step 8")
    command.process.kill()
    assert command.wait(SOON_S) == -signal.SIGKILL
    assert check_resumed(here, lines, cluster, undisturbed, url) <= 2
    assert sorted(p.name for p in url.parents[1].iterdir()) == ["step-000010", f"step-{STEPS:06d}"], "none is left"


def test_a_snapshot_that_the_end_of_the_driver_cut_short_is_not_taken(here, lines, faults, cluster, undisturbed):
    faults.stop(1, "ray_ep.rank.saved.directory:Directory.write_tensors", 6)  # the second of the third one's files
    options = ["snapshot.every=2", "snapshot.to_disk=true"]
    command = here.train(*OPTIONS, *options, faults=faults, RAY_ADDRESS=cluster.driver)
    command.until(lambda: faults.happened("stop"), 200, "a rank that is stopped while it writes")
    command.process.kill()
    assert command.wait(SOON_S) == -signal.SIGKILL
    directory = here.path / "run" / "checkpoints" / "snapshots"
    assert len(list((directory / "step-000004").iterdir())) > 1
    assert not (directory / "step-000004" / "manifest.json").exists()
    assert check_resumed(here, lines, cluster, undisturbed, directory / "step-000002") <= 3


def test_a_local_run_with_snapshots_says_so_at_its_start(here, lines):
    command = here.train("optim.steps=3", "snapshot.to_disk=true", "run_dir=run")
    assert command.wait(200) == 0, command.err
    assert re.search(r"a snapshot every 10 steps \(up to \d+ MiB of a rank, written to disk, too\)", command.err)
    assert sorted(os.listdir(here.path / "run" / "checkpoints")) == ["step-000003"]
