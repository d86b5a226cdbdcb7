"""Where a run goes, and what its directory keeps."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

import ray_ep
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir, checkpoint_url, choose_run_dir
from ray_ep.errors import ConfigError
from ray_ep.placement import Topology, contiguous
from tests.records import record

NOW = datetime(2026, 7, 1, 12, 30, 5)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cfg(*overrides):
    return ray_ep.load_config(None, overrides)


def made(now, *overrides):
    run = choose_run_dir(cfg(*overrides), now)
    run.create(cfg(*overrides))
    return run


def test_a_run_without_a_name_gets_a_new_directory_that_is_not_yet_made(place):
    run = choose_run_dir(cfg(), NOW)
    assert run.path == place / "runs/20260701-123005"
    assert list(place.iterdir()) == []


def test_runs_of_one_second_get_different_directories():
    paths = [made(NOW).path.name for _ in range(3)]
    assert paths == ["20260701-123005", "20260701-123005-2", "20260701-123005-3"]


def test_a_named_directory_may_be_new_or_empty(place):
    (place / "empty").mkdir()
    assert choose_run_dir(cfg("run_dir=new"), NOW).path == place / "new"
    assert choose_run_dir(cfg("run_dir=empty"), NOW).path == place / "empty"
    assert not (place / "new").exists()


def test_a_directory_that_holds_files_is_refused_unless_resumed(place):
    made(NOW, "run_dir=mine")
    with pytest.raises(ConfigError, match="already holds files"):
        choose_run_dir(cfg("run_dir=mine"), NOW)
    assert choose_run_dir(cfg("run_dir=mine", "resume=auto"), NOW).path == place / "mine"


def test_going_on_from_another_run_does_not_write_into_a_third_one(place):
    made(NOW, "run_dir=third")
    with pytest.raises(ConfigError, match="already holds files"):
        choose_run_dir(cfg("run_dir=third", "resume=other/checkpoints/step-000005"), NOW)


@pytest.mark.parametrize("kept", ["{}/kept", "memory://kept"])
def test_a_run_goes_on_from_its_checkpoints_wherever_it_keeps_them(place, kept):
    kept = kept.format(place)
    made(NOW, "run_dir=mine", f"checkpoint.dir={kept}")
    assert choose_run_dir(cfg("run_dir=mine", f"resume={kept}/step-000005"), NOW).path == place / "mine"
    with pytest.raises(ConfigError, match="already holds files"):
        choose_run_dir(cfg("run_dir=mine", f"resume={kept}-of-others/step-000005"), NOW)


def test_auto_takes_the_newest_of_the_dated_runs_where_nothing_tells_which_was_started_last(place):
    made(NOW)
    newest = made(NOW + timedelta(days=1)).path
    made(NOW - timedelta(days=1))
    (place / "runs" / ".newest").unlink()  # which the third one left, since its name does not tell
    assert choose_run_dir(cfg("resume=auto"), NOW + timedelta(days=9)).path == newest


def test_auto_takes_the_later_of_two_runs_of_one_second():
    made(NOW)
    second = made(NOW).path
    assert choose_run_dir(cfg("resume=auto"), NOW + timedelta(days=9)).path == second


def test_auto_takes_the_newest_also_when_an_older_one_was_named():
    made(NOW, "run_dir=runs/warmup-experiment")
    newest = made(NOW + timedelta(days=1)).path
    assert choose_run_dir(cfg("resume=auto"), NOW + timedelta(days=2)).path == newest


def test_auto_without_an_earlier_run_starts_a_new_one(place):
    (place / "runs" / "no-run-at-all").mkdir(parents=True)
    assert choose_run_dir(cfg("resume=auto"), NOW).path == place / "runs/20260701-123005"


def test_checkpoints_go_into_the_run_unless_told_otherwise():
    run = RunDir(Path("runs/a"))
    assert checkpoint_url(cfg(), run) == "runs/a/checkpoints"
    assert checkpoint_url(cfg("checkpoint.dir=s3://bucket/a"), run) == "s3://bucket/a"


def test_of_a_step_that_was_repeated_the_last_line_counts():
    run = made(NOW)
    for step, loss in [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5), (4, 2.5)]:
        run.step(record(step, loss=loss))
    assert [(m["step"], m["loss"]) for m in run.metrics()] == [(1, 5.0), (2, 4.5), (3, 3.5), (4, 2.5)]
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 6  # nothing is taken back


def test_a_line_that_a_crash_cut_short_does_not_spoil_the_others():
    run = made(NOW)
    run.step(record(1, loss=5.0))
    with open(run.path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    assert [m["step"] for m in run.metrics()] == [1]


def test_a_run_without_steps_has_no_metrics():
    assert RunDir(Path("nowhere")).metrics() == []


def test_events_are_dated_and_in_order():
    run = made(NOW)
    run.start(Event("start", "a model on two ranks"))
    run.event(Event("checkpoint", "step-000005"))
    events = [json.loads(x) for x in (run.path / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["message"]) for e in events] == [
        ("start", "a model on two ranks"), ("checkpoint", "step-000005"),
    ]  # fmt: skip
    assert all(datetime.fromisoformat(e["time"]).tzinfo for e in events)


def test_events_tell_the_step_after_which_they_came_and_the_figures_behind_their_words():
    run = made(NOW)
    run.start(Event("start", "a model on two ranks"))
    run.event(Event("checkpoint", "step-000001", {"seconds": 0.5}, 1))
    events = [json.loads(x) for x in (run.path / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"], e["fields"]) for e in events] == [
        ("start", 0, {}), ("checkpoint", 1, {"seconds": 0.5}),
    ]  # fmt: skip


def test_the_resolved_configuration_can_be_loaded_again():
    overrides = ["optim.steps=7", "model.type=mixtral", "model.overrides={num_local_experts: 4}"]
    run = made(NOW, *overrides)
    assert ray_ep.load_config(run.path / "config.yaml") == cfg(*overrides)


def test_placements_are_kept_by_version():
    run = made(NOW)
    placement = contiguous(2, 8, 2)
    run.placement(placement)
    path = run.path / "placements" / "0000.json"
    assert type(placement).load(str(path)).to_json() == placement.to_json()
    assert [p.name for p in path.parent.iterdir()] == ["0000.json"]  # no half-written file beside it


def test_answers_to_held_out_tokens_join_the_ranks_tokens_in_order_and_skips_ranks_without_any():
    run = made(NOW)

    def part(expert, rank, tokens):  # one layer of one rank, K = 2
        return {"experts": np.full((tokens, 2), expert), "ranks": np.full((tokens, 2), rank)}

    run.held_out(3, [[part(1, 0, 2), part(2, 1, 2)], [], [part(3, 1, 1), part(4, 0, 1)]])
    kept = np.load(run.path / "held_out" / "step-000003.npz")
    assert kept["experts"][:, :, 0].tolist() == [[1, 1, 3], [2, 2, 4]]
    assert kept["ranks"][:, :, 0].tolist() == [[0, 0, 1], [1, 1, 0]]


def test_a_file_that_cannot_be_written_leaves_no_part_of_itself(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "topology.json").mkdir()
    said = []
    run.say = said.append
    run.topology(Topology.of_nodes([0, 0]))
    assert len(said) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["topology.json"]
