"""A directory of checkpoints: nothing but checkpoints is counted or removed, and a failed save costs nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from ray_ep.errors import CheckpointError, SaveError
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.saved import directory as module
from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory

NOTHING = RoutingStatistics(np.zeros((1, 2), np.int64))


def write(directory, step, value=0.0, numbered=True, size=100):
    """A checkpoint of one tensor, as the driver and one rank write it."""
    with directory.saving(step):
        tensors = directory.write_tensors(step, "dense-0000.safetensors", {"weight/a": torch.full((size,), value)})
        manifest = {"format": 1, "step": step, "tensors": tensors}
        directory.commit(step, manifest | ({"serial": directory.next_serial()} if numbered else {}), NOTHING)


def value(directory, step):
    checkpoint = Checkpoint(directory, step)
    checkpoint.verify()
    return float(checkpoint.read("weight/a")[0])


@pytest.fixture(params=["local", "memory"])
def directory(request, tmp_path):
    return Directory(str(tmp_path) if request.param == "local" else f"memory:/{tmp_path}")


def tree(directory):
    return {p.removeprefix(directory.root): directory.fs.cat_file(p) for p in directory.fs.find(directory.root)}


STRAY = {
    "step-4/x": b"",
    "step-4/manifest.json": b'{"step": 4, "tensors": {}}',
    "step-0000004/manifest.json": b'{"step": 4, "tensors": {}}',
    "step-000004.bak/manifest.json": b'{"step": 4, "tensors": {}}',
    "step-000009/manifest.json": b'{"step": 4, "tensors": {}}',
    "step-000007/dense-0000.safetensors": b"half removed, or a save cut short",
    "step-000008": b"a file",
    "notes.txt": b"mine",
    "latest/manifest.json": b'{"step": 12, "tensors": {}}',
}


def test_only_what_a_manifest_proves_is_counted_or_removed(directory):
    for step in (2, 4):
        write(directory, step)
    for name, data in STRAY.items():
        directory.fs.makedirs(f"{directory.root}/{name}".rpartition("/")[0], exist_ok=True)
        directory.fs.pipe_file(f"{directory.root}/{name}", data)
    assert (directory.steps(), directory.newest()) == ([2, 4], 4)
    assert (directory.prune(1), directory.prune(1), directory.steps()) == ([2], [], [4])
    assert value(directory, 4) == 0
    left = tree(directory)
    assert {name: left.get(f"/{name}") for name in STRAY} == STRAY


@pytest.mark.parametrize("damage", ["cut", "lost", "manifest"])
def test_a_damaged_checkpoint_is_not_counted_nor_removed_and_a_whole_one_stays_for_it(tmp_path, damage):
    directory = Directory(str(tmp_path))
    for step in (1, 2, 3):
        write(directory, step)
    file = tmp_path / "step-000003" / ("manifest.json" if damage == "manifest" else "dense-0000.safetensors")
    file.unlink() if damage == "lost" else file.write_bytes(file.read_bytes()[:-7])
    before = tree(Directory(str(tmp_path / "step-000003")))
    assert (directory.steps(), directory.prune(1), directory.steps()) == ([1, 2], [1], [2])
    assert tree(Directory(str(tmp_path / "step-000003"))) == before
    assert directory.newest() == 3, "it is not passed over in silence"
    with pytest.raises(CheckpointError, match=r"step-000003.*step 2 is whole: ray-ep train resume=.*/step-000002$"):
        Checkpoint(directory, 3).verify()


def test_what_is_not_ours_inside_a_checkpoint_outlives_it(tmp_path):
    directory = Directory(str(tmp_path))
    for step in (1, 2):
        write(directory, step)
    (tmp_path / "step-000001" / "why.md").write_text("the best so far")
    (tmp_path / "elsewhere").mkdir()
    write(Directory(str(tmp_path / "elsewhere")), 0)
    (tmp_path / "step-000000").symlink_to(tmp_path / "elsewhere" / "step-000000")
    assert directory.prune(1) == [1]
    assert [p.name for p in (tmp_path / "step-000001").iterdir()] == ["why.md"]
    assert value(directory, 0) == 0, "a link is somebody else's"
    assert directory.steps() == [0, 2]


def test_after_going_on_from_an_older_one_the_newest_is_the_one_that_was_written_last(directory):
    for step in (5, 10):
        write(directory, step)
    write(directory, 6)
    assert (directory.newest(), directory.steps()) == (6, [10, 5, 6])
    assert (directory.prune(2), directory.steps()) == ([10], [5, 6]), "what was left behind goes first"
    write(directory, 8)
    assert (directory.prune(1), directory.steps()) == ([5, 6], [8])


def test_checkpoints_of_before_saves_were_numbered_count_as_older_and_load(directory):
    for step in (10, 20):
        write(directory, step, numbered=False)
        path = f"{directory.path(step)}/manifest.json"
        manifest = json.loads(directory.fs.cat_file(path))
        del manifest["files"], manifest["statistics"]  # nor were sizes kept
        directory.fs.pipe_file(path, json.dumps(manifest).encode())
    assert directory.steps() == [10, 20]
    write(directory, 15, 3.0)
    assert (directory.newest(), value(directory, 20), value(directory, 15)) == (15, 0, 3)
    assert (directory.prune(1), directory.steps()) == ([20, 10], [15])


def test_a_checkpoint_stays_until_another_of_its_step_is_whole(directory):
    write(directory, 4, 1.0)
    before = tree(directory)

    def fails():
        with directory.saving(4):
            directory.write_tensors(4, "dense-0000.safetensors", {"weight/a": torch.full((100,), 2.0)})
            assert (directory.steps(), value(directory, 4)) == ([4], 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert tree(directory) == before
    write(directory, 4, 3.0)
    assert value(directory, 4) == 3
    assert len(tree(directory)) == len(before) == 3, "nothing is left of the other one"


def test_a_save_killed_over_an_older_one_of_its_step_leaves_that_whole(tmp_path):
    directory = Directory(str(tmp_path))
    write(directory, 4, 1.0)
    program = f"""
import os, signal, torch
from ray_ep.rank.saved.directory import Directory
directory = Directory({str(tmp_path)!r})
with directory.saving(4):
    directory.write_tensors(4, "dense-0000.safetensors", {{"weight/a": torch.full((100,), 2.0)}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert (directory.steps(), value(directory, 4)) == ([4], 1)
    assert len(tree(directory)) == 4
    write(directory, 4, 3.0)
    assert (value(directory, 4), len(tree(directory))) == (3, 3)


def test_a_save_into_a_directory_that_holds_another_step_puts_that_aside(directory):
    write(directory, 4, 1.0)
    directory.fs.mv(directory.path(4), directory.path(5), recursive=True)
    write(directory, 5, 2.0)
    assert value(directory, 5) == 2
    (aside,) = directory.fs.glob(f"{directory.path(5)}.moved-*")
    directory.fs.mv(aside, directory.path(4), recursive=True)
    assert value(directory, 4) == 1


def test_a_save_over_a_damaged_one_of_its_step_destroys_nothing(tmp_path):
    directory = Directory(str(tmp_path))
    write(directory, 4, 1.0)
    (tmp_path / "step-000004" / "statistics.npz").write_bytes(b"")
    write(directory, 4, 2.0)
    (aside,) = tmp_path.glob("step-000004.moved-*")
    assert (value(directory, 4), len(list(aside.iterdir()))) == (2, 3)


@contextmanager
def files_up_to(size):
    """The file system refuses what is larger, also for root, and without a file system of its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def one_sentence(e, *words):
    text = str(e.value)
    assert len(text.splitlines()) == 1
    assert [w for w in words if w not in text] == [], text


def test_what_cannot_be_written_is_one_sentence_and_gives_its_room_back(tmp_path):
    directory = Directory(str(tmp_path))
    write(directory, 1)
    before = tree(directory)
    with files_up_to(50_000), pytest.raises(SaveError) as e:
        write(directory, 2, size=100_000)
    says = "checkpoint of step 1 is untouched", "make room there, or name another place with checkpoint.dir"
    one_sentence(e, str(tmp_path), "step 2", "File too large", "dense-0000.safetensors, 0.4 MB", *says)
    assert tree(directory) == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    write(directory, 2)
    assert directory.steps() == [1, 2]


def test_a_disk_that_fills_up_is_one_sentence_with_its_directory(tmp_path):
    directory = Directory(str(tmp_path / "full"))

    def save():
        with directory.saving(1):
            os.symlink("/dev/full", tmp_path / "full" / "step-000001" / "statistics.npz")
            directory.commit(1, {"step": 1, "tensors": {}}, NOTHING)

    with pytest.raises(SaveError) as e:
        save()
    one_sentence(e, f"{tmp_path}/full", "No space left on device", "statistics.npz", "make room")
    assert tree(directory) == {}


@pytest.mark.parametrize("where", ["/proc/nowhere", "{}/file", "{}/file/below"])
def test_a_place_where_nothing_can_be_written_is_named(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError) as e:
        write(Directory(where.format(tmp_path)), 1)
    one_sentence(e, where.format(tmp_path), "checkpoint of step 1 could not be saved", "checkpoint.dir")
    assert (tmp_path / "file").read_text() == "mine"


def test_only_stores_go_through_a_temporary_file_and_name_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    write(Directory(str(tmp_path / "local")), 1)
    assert value(Directory(str(tmp_path / "local")), 1) == 0
    store = Directory(f"memory:/{tmp_path}/store")
    with pytest.raises(SaveError) as e:
        write(store, 1)
    one_sentence(e, f"temporary directory {tmp_path}/nowhere (TMPDIR)", "another directory with TMPDIR")
    assert tree(store) == {}


def test_a_checkpoint_whose_parts_lie_on_other_machines_is_not_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "APPEARS_S", 0.1)
    here, there = Directory(str(tmp_path / "here")), Directory(str(tmp_path / "there"))
    write(here, 1)
    there.clear(2)
    parts = there.write_tensors(2, "experts-L000-r001.safetensors", {"weight/a/0": torch.zeros(3)})

    def save():
        with here.saving(2):
            here.commit(2, {"step": 2, "tensors": parts}, NOTHING)

    with pytest.raises(SaveError) as e:
        save()
    one_sentence(e, "step-000002", "experts-L000-r001.safetensors is missing", "one place that all nodes share")
    assert here.steps() == [1]


def test_files_are_as_readable_as_their_directory(tmp_path):
    write(Directory(str(tmp_path)), 1)
    mode = (tmp_path / "step-000001").stat().st_mode & 0o666
    assert (tmp_path / "step-000001" / "dense-0000.safetensors").stat().st_mode & 0o777 == mode
