"""A rank dies in a step, another one comes: the survivors repeat the step, and the curve is that of one process."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective import EpochGroup, SoloGroup, gloo
from ray_ep.errors import GroupError
from ray_ep.placement import Topology, contiguous
from tests.conftest import in_threads
from tests.moe.test_regroup import Worker
from tests.rank.test_migration import drawn
from tests.rank.test_training import EXPERTS, LAYERS, assert_follows, configure, make_rank, reference

STEPS = 9


@pytest.mark.parametrize("balance", ["off", "auto"])
def test_training_goes_on_over_a_death_in_a_step_and_a_rank_that_comes(balance):
    cfg, config = configure(f"balance.in_step={balance}")
    store, snapshot, dead, prepared = dist.HashStore(), {}, threading.Event(), threading.Event()
    store.set_timeout(timedelta(seconds=30))
    first, second, third = drawn(3, 1, True), drawn(2, 2, True), drawn(3, 3, True)

    def form(held, rank, size, epoch):
        held.form(epoch, {"gloo": lambda: gloo(store, rank, size, epoch, "127.0.0.1", 20, 20)}, 20)

    def start(rank):
        held = EpochGroup()
        form(held, rank, 3, 0)
        made = make_rank(cfg, config, held, first)
        return held, made, [made.train_step(s) for s in range(3)]

    def survive(rank, new):
        held, made, results = start(rank)
        with pytest.raises(GroupError):
            made.train_step(3)
        made.discard()
        assert dead.wait(20)
        form(held, new, 2, 1)
        mid = first.primaries().among([0, 2], {1: 0})
        made.regroup(mid, Topology.of_nodes([0, 0]), snapshot if new == 0 else None)
        made.migrate(second)
        results += [made.train_step(s) for s in range(3, 6)]
        assert prepared.wait(20)
        return go_on(held, made, new, results)

    def go_on(held, made, rank, results):
        form(held, rank, 3, 2)
        made.regroup(second.among([0, 1, -1]), Topology.of_nodes([0, 0, 0]))
        Worker.hand_over(made, 0)
        made.migrate(third)
        results += [made.train_step(s) for s in range(6, STEPS)]
        assert made.group.size == made.usage().sent.size == 3
        held.close()
        return results

    def die_and_come_back_as_another():
        held, made, results = start(1)
        snapshot.update(Worker.owned(made))
        threading.Timer(0.05, held.close).start()  # it does not come to the step, as a dead process
        dead.set()
        made = make_rank(cfg, config, EpochGroup(SoloGroup()), contiguous(LAYERS, EXPERTS, 1))
        made.optimizer.updates = 6
        prepared.set()
        return go_on(made.group, made, 2, results)

    one, gone, two = in_threads(lambda: survive(0, 0), die_and_come_back_as_another, lambda: survive(2, 1))
    curve, _ = reference(STEPS)
    assert_follows([one, two], curve)
    assert [r.step for r in gone] == [0, 1, 2, 6, 7, 8]
    assert [r.loss for r in gone[3:]] == [r.loss for r in one[6:]]
    assert torch.isfinite(torch.tensor([r.loss for r in one])).all()
