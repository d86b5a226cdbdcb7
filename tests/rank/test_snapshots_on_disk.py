"""Snapshots on disk: what is written beside the steps is what a checkpoint of that step holds, or nothing at all."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from ray_ep.collective import EpochGroup, SoloGroup, gloo
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.snapshot import on_disk
from ray_ep.rank.snapshot.on_disk import Shelf
from ray_ep.rank.snapshot.snapshots import Snapshots
from tests.conftest import in_threads
from tests.rank.test_checkpoint import VARIANTS, commit
from tests.rank.test_migration import drawn
from tests.rank.test_training import configure, make_rank


def live(size, work, *overrides, model=()):
    """[rank] what work(rank) returns; a rank has trainer, snapshots, group."""
    cfg, config = configure(*overrides, **({"model": model} if model else {}))
    store, placement = dist.HashStore(), drawn(size, 1, True)

    def formed(name, rank):
        place, group = dist.PrefixStore(name, store), EpochGroup()
        make = SoloGroup if size == 1 else lambda: gloo(place, rank, size, 0, "127.0.0.1", 20, 20)
        group.form(0, {"any": make}, 20)
        return group

    def main(rank):
        me = SimpleNamespace(group=formed("steps", rank), side=formed("side", rank))
        me.trainer = make_rank(cfg, config, me.group, placement)
        me.snapshots = Snapshots(me.trainer.model, me.trainer.ep, me.trainer.optimizer, me.side)
        try:
            return work(me)
        finally:
            me.group.close()
            me.side.close()

    return in_threads(*(lambda rank=rank: main(rank) for rank in range(size)))


def put(me, step, shelf):
    """Take a snapshot and wait until it is on disk; why the one before is not."""
    nodes = list(range(me.group.size))
    said = me.snapshots.take(step, nodes, shelf)
    me.snapshots.wait()
    return said


def contents(checkpoint):
    counted = checkpoint.statistics()
    sums = {k: checkpoint.tensors[k][1] for k in checkpoint.tensors}
    return sums, counted.load.tolist(), counted.coactivation.tolist(), counted.transitions.tolist()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_bit_for_bit_the_checkpoint_of_that_step_while_training_goes_on(tmp_path, variant, size):
    overrides, model, _ = VARIANTS[variant]
    there, shelf = str(tmp_path / "checkpoints"), Shelf(str(tmp_path / "snapshots"), {"format": 1, "data": "drawn"})
    Directory(there).clear(2)

    def work(me):
        [me.trainer.train_step(step) for step in range(2)]
        part = me.trainer.save(there, 2), me.trainer.rank.statistics()
        assert me.snapshots.take(2, list(range(size)), shelf) == ""
        me.trainer.train_step(2)
        me.snapshots.wait()
        return part

    commit(there, 2, live(size, work, *overrides, model=model))
    snapshot = Checkpoint(Directory(shelf.url), 2)
    snapshot.verify()
    assert contents(snapshot) == contents(Checkpoint(Directory(there), 2))
    assert (snapshot.manifest["step"], snapshot.manifest["data"]) == (2, "drawn")


def test_one_of_before_the_first_step_has_no_moments_and_what_was_counted_before_is_added(tmp_path):
    shelf = Shelf(str(tmp_path / "snapshots"), {"format": 1})
    earlier = live(2, lambda me: (me.trainer.train_step(0), me.trainer.rank.statistics())[1])
    counted = RoutingStatistics.merge(earlier, 64)
    live(2, lambda me: put(me, 0, Shelf(shelf.url, shelf.manifest, counted)))
    found = Checkpoint(Directory(shelf.url), 0)
    found.verify()
    assert {k.partition("/")[0] for k in found.tensors} == {"weight"}
    assert (found.statistics().load == counted.load).all()
    assert found.statistics().sample.shape == counted.sample.shape


def test_the_newest_alone_is_kept_and_one_that_was_cut_short_goes(tmp_path):
    shelf = Shelf(str(tmp_path / "snapshots"), {"format": 1})
    cut = tmp_path / "snapshots" / "step-000007"
    cut.mkdir(parents=True)
    (cut / "experts-L000-r001.safetensors").write_bytes(b"half of it")

    def work(me):
        assert [put(me, step, shelf) for step in (4, 8)] == ["", ""]

    live(2, work)
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == ["step-000008"]
    assert Directory(shelf.url).steps() == [8]


@pytest.mark.parametrize("at", ["a file of rank 1", "the directory"])
def test_one_that_cannot_be_written_is_told_once_leaves_the_one_before_and_the_next_is_written(
    tmp_path, monkeypatch, at
):
    shelf, write, full = Shelf(str(tmp_path / "snapshots"), {"format": 1}), on_disk.write_rank, threading.Event()

    def write_rank(directory, step, rank, *what):
        if full.is_set() and rank == 1:
            raise OSError(28, "No space left on device")
        return write(directory, step, rank, *what)

    monkeypatch.setattr(on_disk, "write_rank", write_rank)
    block = tmp_path / "snapshots" / "step-000002"

    def work(me):
        put(me, 1, shelf)
        if me.group.rank == 0:
            full.set() if at == "a file of rank 1" else block.write_text("in the way")
        me.group.barrier()
        put(me, 2, shelf)
        there = Directory(shelf.url).steps()
        me.group.barrier()
        full.clear()
        said = put(me, 3, shelf)
        return there, said, put(me, 4, shelf)

    told = live(2, work)
    assert [there for there, _, _ in told] == [[1], [1]]
    said = [why for _, why, _ in told]
    speaks = 1 if at == "a file of rank 1" else 0
    assert said[1 - speaks] == ""
    assert ("No space left on device" if speaks else "a file of that name is in the way") in said[speaks]
    assert [later for _, _, later in told] == ["", ""]
    assert Directory(shelf.url).steps() == [4]


def test_ranks_that_have_something_else_to_do_leave_at_the_next_tensor_and_nothing_is_told(tmp_path, monkeypatch):
    shelf, write = Shelf(str(tmp_path / "snapshots"), {"format": 1}), Directory.write_tensors
    begun, files = threading.Event(), []

    def slowly(self, *what):
        files.append(what)
        begun.set()
        time.sleep(0.5)
        return write(self, *what)

    monkeypatch.setattr(Directory, "write_tensors", slowly)

    def work(me):
        me.snapshots.take(1, [0, 1], shelf)
        assert begun.wait(10)
        me.snapshots.regroup()
        written = len(files)
        monkeypatch.undo()
        return written, put(me, 2, shelf), put(me, 3, shelf)

    for written, *said in live(2, work):
        assert 0 < written < 6, "of three files of each of two ranks"
        assert said == ["", ""]
    assert Directory(shelf.url).steps() == [3]
