"""Snapshots: copied between steps, sent beside them, and given back: the curve is that of one process."""

import threading
from datetime import timedelta

import numpy as np
import pytest
import torch.distributed as dist

from ray_ep.collective import EpochGroup, gloo
from ray_ep.errors import GroupError, PlacementError
from ray_ep.placement import Topology
from ray_ep.placement.keepers import keepers
from ray_ep.rank.snapshot.copies import Key
from ray_ep.rank.snapshot.restore import Rewind, restore, rows_for
from ray_ep.rank.snapshot.snapshots import Snapshots
from tests.conftest import in_threads
from tests.rank.test_migration import drawn
from tests.rank.test_training import assert_follows, configure, make_rank, reference

STEPS = 7


class Member:
    """One process: a trainer with its snapshots, over two groups that are formed anew for each epoch."""

    def __init__(self, store, cfg, config, placement):
        self.store, self.placement, self.results = store, placement, []
        self.group, self.side = EpochGroup(), EpochGroup()
        self.what = cfg, config

    def form(self, rank, size, epoch):
        for held, name in ((self.group, "steps"), (self.side, "side")):
            place = dist.PrefixStore(name, self.store)
            held.form(epoch, {"gloo": lambda p=place: gloo(p, rank, size, epoch, "127.0.0.1", 20, 20)}, 20)

    def start(self, rank, size):
        self.form(rank, size, 0)
        self.trainer = make_rank(*self.what, self.group, self.placement)
        self.snapshots = Snapshots(self.trainer.model, self.trainer.ep, self.trainer.optimizer, self.side)

    def train(self, *steps):
        self.results += [self.trainer.train_step(s) for s in steps]

    def close(self):
        self.group.close()
        self.side.close()


@pytest.fixture
def store():
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=30))
    return made


@pytest.mark.parametrize("when", ["before the first update", "after some", "still on its way"])
def test_all_go_back_to_a_snapshot_of_before_a_move_and_repeat_the_steps(store, when):
    cfg, config = configure()
    first, second, topology = drawn(3, 1, True), drawn(3, 5, True), Topology.of_nodes([0, 1, 2])
    at = 0 if when == "before the first update" else 2
    members = [Member(store, cfg, config, first) for _ in range(3)]
    assert keepers([0, 1, 2]) == (1, 2, 0)

    def live(rank):
        me = members[rank]
        me.start(rank, 3)
        me.train(*range(at))
        me.snapshots.take(at, [0, 1, 2])
        me.counted = me.trainer.ep.counters.total.clone()
        me.train(at)  # beside it
        me.trainer.migrate(second)
        me.train(at + 1)
        if when == "still on its way":
            me.snapshots.wait()
            me.snapshots.take(at + 2, [0, 1, 2]) if rank != 1 else None  # it dies before its own
        if rank == 1:
            me.snapshots.wait()
            me.close()
            return
        with pytest.raises(GroupError):
            me.trainer.train_step(at + 2)
        me.trainer.discard()
        me.trainer._unpublished = True  # as after a loss in publish
        me.side.abort()
        me.snapshots.regroup()
        held = me.snapshots.held()
        assert held.own[0] == Key(0, at)
        assert {w: keys[0] for w, keys in held.wards.items()} == {{0: 2, 2: 1}[rank]: Key(0, at)}
        new = {0: 0, 2: 1}[rank]
        me.form(new, 2, 1)
        snapshot = me.snapshots.get(Key(0, at))
        mid = first.primaries().among([0, 2], {1: 1})  # rank 2, which is 1 now, kept rank 1
        restore(me.trainer, snapshot, Rewind(Key(0, at), first, mid, topology.among([0, 2], [0, 2]), {1: [1]}))
        assert me.trainer.optimizer.updates == at
        assert (me.trainer.ep.counters.total == me.counted + (members[1].counted if rank == 2 else 0)).all()
        me.results = me.results[:at]
        me.train(*range(at, STEPS - 1))
        me.snapshots.take(STEPS - 1, [0, 2])
        me.train(STEPS - 1)
        me.snapshots.wait()
        assert me.snapshots.held().own == (Key(1, STEPS - 1),), "a whole one takes the place of those before"
        me.close()

    in_threads(*(lambda rank=rank: live(rank) for rank in range(3)))
    curve, _ = reference(STEPS)
    assert_follows([members[0].results, members[2].results], curve)


def test_a_copy_that_is_not_here_is_named(store):
    cfg, config = configure()
    placement = drawn(2, 1, False)
    members = [Member(store, cfg, config, placement) for _ in range(2)]

    def live(rank):
        me = members[rank]
        me.start(rank, 2)
        me.snapshots.take(0, [0, 1])
        me.snapshots.wait()
        snapshot = me.snapshots.get(Key(0, 0))
        snapshot.wards.clear()
        mine = rows_for(snapshot, placement, placement, rank)
        assert {(i, e) for i, e in mine} == {(i, e) for i, e in np.argwhere(placement.owner == rank).tolist()}
        with pytest.raises(PlacementError, match=f"rank {rank} has no copy of expert"):
            rows_for(snapshot, placement, placement.among([1, 0]), rank)
        me.close()

    in_threads(*(lambda rank=rank: live(rank) for rank in range(2)))


def test_a_peer_that_dies_while_a_snapshot_travels_is_told_at_the_next_one(store):
    cfg, config = configure()
    placement, dead = drawn(2, 1, False), threading.Event()
    members = [Member(store, cfg, config, placement) for _ in range(2)]

    def live(rank):
        me = members[rank]
        me.start(rank, 2)
        if rank == 1:
            me.close()
            dead.set()
            return
        assert dead.wait(20)
        me.snapshots.take(0, [0, 1])
        with pytest.raises(GroupError, match="a snapshot was not sent"):
            me.snapshots.take(1, [0, 1])
        assert me.snapshots.held().own == (Key(0, 0),)
        assert not me.snapshots.held().wards
        me.close()

    in_threads(*(lambda rank=rank: live(rank) for rank in range(2)))
