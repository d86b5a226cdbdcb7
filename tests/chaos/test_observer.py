"""A run directory seen from outside while it is written."""

import json
import math

import pytest

from ray_ep.chaos.observer import Observer


def metrics(step, epoch=0, **more):
    line = {"step": step, "loss": 2.0, "step_seconds": 0.1, "epoch": epoch, "world_size": 4, **more}
    return json.dumps(line) + "\n"


def event(kind, **fields):
    return json.dumps({"kind": kind, "message": f"{kind} it is", "fields": fields}) + "\n"


RECOVERED = {"lost": ["rank-1"], "epoch": 1, "ranks": 3, "repeated": 2, "seconds": {"detect": 0.2}}


def append(path, text):
    with open(path, "a") as f:
        f.write(text)


def test_lines_are_seen_once_with_the_time_they_were_seen_at(tmp_path):
    now = [0.0]
    observer = Observer(tmp_path, lambda: now[0])
    observer.look()  # nothing is there yet
    append(tmp_path / "metrics.jsonl", metrics(1) + metrics(2))
    now[0] = 1.0
    observer.look()
    observer.look()
    append(tmp_path / "metrics.jsonl", metrics(3))
    now[0] = 2.0
    observer.look()
    assert [(s.number, s.at) for s in observer.steps] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_half_a_line_waits_for_its_other_half(tmp_path):
    observer = Observer(tmp_path)
    append(tmp_path / "metrics.jsonl", metrics(1) + metrics(2)[:9])
    observer.look()
    assert [s.number for s in observer.steps] == [1]
    append(tmp_path / "metrics.jsonl", metrics(2)[9:])
    observer.look()
    assert [s.number for s in observer.steps] == [1, 2]


def test_a_recovery_is_seen_with_its_clocks_and_the_counts_of_ranks(tmp_path):
    observer = Observer(tmp_path)
    append(tmp_path / "events.jsonl", event("start") + event("recovered", **RECOVERED, failures=1, planned_leaves=0))
    observer.look()
    (found,) = observer.recoveries
    assert (found.lost, found.epoch, found.seconds) == (("rank-1",), 1, {"detect": 0.2})
    assert (observer.failures, observer.planned) == (1, 0)


def test_ranks_that_come_and_go_are_seen_and_what_is_only_told_of_them_is_no_switch(tmp_path):
    observer = Observer(tmp_path)
    took = {"hand_over": 0.1, "move": 0.2}
    append(tmp_path / "events.jsonl", event("elastic", desired=4, failures=1, planned_leaves=1))
    append(tmp_path / "events.jsonl", event("elastic", come=["rank-4"], left=[], seconds=took, planned_leaves=2))
    observer.look()
    (found,) = observer.switches
    assert (found.come, found.left, found.seconds) == (("rank-4",), (), pytest.approx(0.3))
    assert (observer.failures, observer.planned) == (1, 2)


def test_a_loss_that_json_could_not_hold_is_no_number(tmp_path):
    append(tmp_path / "metrics.jsonl", metrics(1, loss=None))
    observer = Observer(tmp_path)
    observer.look()
    assert math.isnan(observer.steps[0].loss)


def test_what_was_written_before_the_end_is_seen(tmp_path):
    with Observer(tmp_path) as observer:
        append(tmp_path / "metrics.jsonl", metrics(1))
    assert [s.number for s in observer.steps] == [1]
