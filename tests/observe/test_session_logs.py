"""What a run writes among the logs of a Ray session: its placement, and what its driver says."""

from datetime import datetime

import numpy as np

from ray_ep.collective import Membership
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.driver.run.standing import Cause, members_event, placement_event
from ray_ep.observe.dashboard.session_logs import DriverLog, PlacementLog
from ray_ep.placement import Placement, contiguous
from tests.records import record

WHERE = [{"node": "n", "host": f"host-{r}", "address": f"10.0.0.{r}"} for r in range(2)]


def test_it_says_who_holds_which_expert_and_why_and_follows_each_move(tmp_path):
    logs = tmp_path / "logs"
    run, told = RunDir(tmp_path / "a run"), []
    for part in (logs, run.path / "placements"):
        part.mkdir(parents=True)
    log = PlacementLog(run.path, lambda _, what: told.append(1) or logs / what)

    def say(event):
        run.event(event)
        log.event(event)

    run.placement(contiguous(1, 4, 2))
    say(members_event(Membership(0, ("rank-0", "rank-1"), (0, 0)), WHERE, "cpu"))
    say(placement_event(contiguous(1, 4, 2), Cause.START, "the run began with it"))
    assert told == []  # Ray's logs are not asked for before the run has started
    log.start(Event("start", "a model"))
    (file,) = logs.iterdir()
    assert file.name == "placement.txt"
    assert "rank 1 (rank-1): host-1 (10.0.0.1), cpu" in file.read_text()
    assert "layer 0: rank 0: 0* 1* | rank 1: 2* 3*" in file.read_text()
    moved = Placement(np.array([[[0, 2, 3], [1, 3, -1]]]), 4, 1)
    run.placement(moved)
    say(placement_event(moved, Cause.REBALANCE, "move 3 experts"))
    log.step(record(1))
    text = file.read_text()
    assert "layer 0: rank 0: 0* 2* 3 | rank 1: 1* 3*" in text
    assert text.index("1, after step 0: move 3 experts, 3 experts moved") < text.index("0, after step 0: the run began")
    assert [p.name for p in logs.iterdir()] == [file.name]


def test_outside_of_a_ray_session_nothing_is_written(tmp_path):
    with DriverLog(tmp_path / "run", 9, place=nowhere) as said:
        for log in (PlacementLog(tmp_path / "run", nowhere), said):
            log.start(Event("start", "a model"))
            log.step(record(1))
            log.event(Event("placement", "words"))
    assert list(tmp_path.iterdir()) == []


def nowhere(run_dir, what):
    return None


def test_what_the_driver_says_is_there_with_its_time_from_the_first_word_to_a_failure(tmp_path):
    def log():
        return DriverLog(tmp_path, 9, "[router.force=uniform]", lambda run_dir, what: run_dir / what)

    with log() as it:
        it.event(Event("control", "listens"))
        assert list(tmp_path.iterdir()) == []  # before Ray is there
        it.start(Event("start", "a model ü"))
        it.step(record(1, loss=2.0))
        it.event(Event("failed", "rank 1 died"))
    with log() as it:
        it.start(Event("start", "goes on"))
    lines = (tmp_path / "driver.log").read_text(encoding="utf-8").splitlines()
    times, words = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert all(datetime.fromisoformat(time).tzinfo for time in times)
    mark = "[router.force=uniform] "
    assert [w.removeprefix(mark) for w in words] == [
        "event kind=control listens", "start a model ü", words[2].removeprefix(mark), "failed: rank 1 died",
        "start goes on",
    ]  # fmt: skip
    assert "step=1/9 loss=2.0000" in words[2]
