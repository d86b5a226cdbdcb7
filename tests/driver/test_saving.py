"""When a run saves and what a failed save, record or rank leaves: small real checkpoints, a clock of the test's own."""

import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig

from ray_ep.config import load_config
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.driver.run.saving import Saver, when
from ray_ep.errors import RankError, SaveError
from ray_ep.rank.saved.checkpoint import Checkpoint, Directory
from tests.driver.fakes import Ear
from tests.driver.scenes import Clock, statistics
from tests.records import record


class FakeRanks:
    """One rank that writes a small file, unless it is told to fail."""

    def __init__(self):
        self.fails = None

    def statistics(self):
        return [statistics()]

    def save(self, url, step):
        directory = Directory(url)
        directory.fs.pipe_file(f"{directory.path(step)}/dense-0000.safetensors", b"half of it")
        if self.fails is not None:
            raise self.fails
        return [{}]


@pytest.fixture
def saver(tmp_path):
    def make(*overrides, **plan):
        cfg = load_config(None, [f"run_dir={tmp_path}", *overrides])
        given = {"run": RunDir(tmp_path), "checkpoint": None, "signature": {"w": [1000, 1000]},
                 "config": AutoConfig.for_model("qwen3_moe"), "corpus": SimpleNamespace(source="a text"),
                 "base": frozenset(), "frozen": ()}  # fmt: skip
        ear, clock, ranks = Ear(), Clock(), FakeRanks()
        publisher = Publisher([ear])
        it = Saver(cfg, SimpleNamespace(**given | plan), ranks, publisher, clock)

        def said():
            assert publisher.flush(30)
            return [(e.kind, e.words) for e in ear.heard]

        (tmp_path / "statistics").mkdir(exist_ok=True)
        return SimpleNamespace(it=it, said=said, clock=clock, ranks=ranks)

    return make


def test_a_run_saves_when_ten_minutes_have_passed_since_the_last_save(saver):
    s = saver()
    s.clock.now = 500.0  # of a long start
    s.it.start()
    assert not s.it.due(1)
    s.clock.now += 599
    assert not s.it.due(2)
    s.clock.now += 1
    assert s.it.due(3)
    s.it.save_and_go_on(3)
    assert not s.it.due(4)
    s.clock.now += 600
    assert s.it.due(5)


@pytest.mark.parametrize(
    ("overrides", "steps", "words"),
    [
        ([], [], "a checkpoint every 10 minutes (checkpoint.every_minutes)"),
        (["checkpoint.every_minutes=0"], [], "a checkpoint only at the end (checkpoint.every_minutes=0)"),
        (["checkpoint.every=4"], [4, 8], "every 4 steps (checkpoint.every) and every 10 minutes"),
        (["checkpoint.every=3", "checkpoint.every_minutes=0"], [3, 6, 9], "a checkpoint every 3 steps"),
        (["checkpoint.every_minutes=1"], [], "every minute (checkpoint.every_minutes)"),
    ],
)
def test_what_is_due_is_said_at_the_start(saver, overrides, steps, words):
    s = saver(*overrides)
    assert [n for n in range(1, 10) if s.it.due(n)] == steps
    assert words in when(s.it.cfg.checkpoint)


def test_saving_by_time_may_be_switched_off(saver):
    s = saver("checkpoint.every_minutes=0")
    s.clock.now = 1e9
    assert not s.it.due(1)


def test_a_periodic_save_that_fails_is_told_takes_no_room_and_is_tried_again(saver):
    s = saver()
    s.it.save_and_go_on(2)
    s.ranks.fails = OSError(errno.ENOSPC, "No space left on device", "/x/part")
    s.it.save_and_go_on(4)
    kind, message = s.said()[-1]
    assert kind == "checkpoint-failed"
    for part in ("step 4", s.it.directory.url, "No space left on device", "step 2", "goes on"):
        assert part in message
    assert not os.path.exists(s.it.directory.path(4))
    assert s.it.directory.steps() == [2]
    s.ranks.fails = None
    s.it.save_and_go_on(6)
    assert s.said()[-1][0] == "checkpoint"
    assert s.it.directory.steps() == [2, 6]
    assert Checkpoint(s.it.directory, 6).manifest["step"] == 6


def test_a_failed_last_save_ends_the_run_and_names_the_newest_good_checkpoint(saver):
    s = saver()
    s.it.finish(2)
    s.ranks.fails = SaveError("rank 1 on b: No space left on device")
    with pytest.raises(
        SaveError, match=r"step 4 could not be saved.*No space left.*newest good checkpoint is of step 2"
    ):
        s.it.finish(4)
    s.it.finish(2)  # it is there


def test_a_failed_save_names_its_directory_once(saver):
    s = saver()
    where = s.it.directory.url
    s.ranks.fails = SaveError(f"the checkpoint of step 2 could not be saved in {where}: No space left on device")
    with pytest.raises(SaveError) as e:
        s.it.finish(2)
    assert str(e.value).count(where) == 1
    assert "no older checkpoint" in str(e.value)


def test_a_lost_rank_is_no_failed_save(saver):
    s = saver()
    s.ranks.fails = RankError(1, "rank 1 died: killed")
    with pytest.raises(RankError):
        s.it.save_and_go_on(2)


@pytest.fixture
def snapshot(tmp_path):
    """Puts a snapshot on disk; a directory of its."""

    def put(step):
        directory = Directory(f"{tmp_path}/checkpoints/snapshots")
        directory.clear(step)
        directory.commit(step, {"step": step, "tensors": {}}, statistics())
        return directory

    return put


def test_a_checkpoint_takes_the_place_of_the_snapshots_on_disk_before_it(saver, snapshot, tmp_path):
    s = saver()
    s.it.save_and_go_on(2)
    directory = snapshot(4)
    directory.fs.makedirs(directory.path(5))
    directory.fs.pipe_file(f"{directory.path(5)}/dense-0000.safetensors", b"half of it")
    assert (s.it.saved, s.it.newest_there()) == (4, (directory.url, 4))
    s.ranks.fails = OSError(errno.ENOSPC, "No space left on device")
    s.it.save_and_go_on(6)
    assert (s.it.saved, directory.steps()) == (4, [4])
    s.ranks.fails = None
    s.it.save_and_go_on(6)
    assert (s.it.saved, s.it.newest_there()) == (6, (s.it.directory.url, 6))
    assert not (tmp_path / "checkpoints" / "snapshots").exists()


def test_a_run_that_goes_on_from_a_snapshot_saves_as_soon_as_it_can(saver, snapshot):
    directory = snapshot(4)
    s = saver("checkpoint.every_minutes=0", checkpoint=Checkpoint(directory, 4))
    s.it.start()
    assert (s.it.saved, s.it.newest_there()) == (4, (directory.url, 4))
    assert s.it.due(4)
    s.it.finish(4)  # if it is stopped at once
    assert (s.it.directory.steps(), directory.steps()) == ([4], [])
    assert not s.it.due(5)


def test_a_run_that_goes_on_from_elsewhere_has_nothing_to_do_with_the_snapshot_of_before(saver, snapshot):
    s = saver()
    s.it.save_and_go_on(2)
    directory = snapshot(9)
    s = saver(checkpoint=Checkpoint(s.it.directory, 2))
    s.it.start()
    assert (s.it.saved, directory.steps()) == (2, [])


def test_how_long_saving_takes_is_that_of_the_last_save(saver):
    s = saver()
    assert "12 MB are saved, for the first time" in s.it.ahead(1)
    write = s.ranks.save
    s.ranks.save = lambda *a: (setattr(s.clock, "now", s.clock.now + 7.4), write(*a))[1]
    s.it.save_and_go_on(1)
    assert s.it.ahead(2) == "saving takes about 7 s"
    assert s.it.ahead(1) == "there is nothing left to save"


def test_a_record_that_cannot_be_written_ends_no_run_and_is_said_once(tmp_path):
    run, said = RunDir(tmp_path / "run"), []
    run.say = said.append
    run.create(load_config(None, []))
    run.step(record(1))
    for name in ("metrics.jsonl", "events.jsonl", "statistics", "held_out"):
        path = tmp_path / "run" / name
        os.rename(path, path.with_suffix(".kept")) if path.exists() else None
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    (tmp_path / "run" / "events.jsonl").mkdir()
    run.step(record(2))
    run.event(Event("checkpoint", "x"))
    run.statistics(statistics())
    run.held_out(2, [[{"experts": np.zeros((3, 2)), "ranks": np.zeros((3, 2))}]])
    assert len(said) == 1
    assert f"{tmp_path}/run/metrics.jsonl cannot be written: Is a directory" in said[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_half_a_line_is_taken_back_when_the_disk_is_full(tmp_path):
    run, said = RunDir(tmp_path), []
    run.say = said.append
    run.create(load_config(None, []))
    run.step(record(1))
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    run.event(Event("checkpoint", "x"))
    assert "No space left on device" in said[0]
    run.step(record(2))
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
