"""The text file of a run's placement among the logs of a Ray session."""

import numpy as np

from ray_ep.collective import Membership
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.driver.run.standing import Cause, members_event, placement_event
from ray_ep.observe.dashboard.placement_log import PlacementLog
from ray_ep.placement import Placement, contiguous
from tests.records import record

WHERE = [{"node": "n", "host": f"host-{r}", "address": f"10.0.0.{r}"} for r in range(2)]


def test_it_says_who_holds_which_expert_and_why_and_follows_each_move(tmp_path):
    logs = tmp_path / "logs"
    run, told = RunDir(tmp_path / "a run"), []
    for part in (logs, run.path / "placements"):
        part.mkdir(parents=True)
    log = PlacementLog(run.path, lambda: told.append(1) or logs)

    def say(event):
        run.event(event)
        log.event(event)

    run.placement(contiguous(1, 4, 2))
    say(members_event(Membership(0, ("rank-0", "rank-1"), (0, 0)), WHERE, "cpu"))
    say(placement_event(contiguous(1, 4, 2), Cause.START, "the run began with it"))
    assert told == []  # Ray's logs are not asked for before the run has started
    log.start(Event("start", "a model"))
    (file,) = logs.iterdir()
    assert file.name == "ray_ep-a_run.placement.txt"
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
    log = PlacementLog(tmp_path / "run", lambda: None)
    log.start(Event("start", "a model"))
    log.event(Event("placement", "words"))
    assert list(tmp_path.iterdir()) == []
