"""The group that holders keep: re-formed in place, left at any moment, and deaf to what earlier epochs still say."""

import contextlib
import gc
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective import EpochGroup, SoloGroup, gloo
from ray_ep.errors import GroupError
from tests.conftest import in_threads


def form(held, store, rank, size, epoch, timeout_s=20.0, limit_s=20.0):
    """Form the group of an epoch over gloo."""
    make = {"gloo": lambda: gloo(store, rank, size, epoch, "127.0.0.1", timeout_s, limit_s)}
    held.form(epoch, make, limit_s)


def total(group):
    """Sum over ranks of rank + 1, by way of an all-to-all."""
    size = group.size
    out, mine = torch.empty(size), torch.full((size,), group.rank + 1.0)
    group.all_to_all(out, mine, [1] * size, [1] * size)
    return out.sum().item()


@pytest.fixture
def held():
    """Three ranks' groups of one rank each, closed in the end."""
    groups = [EpochGroup(SoloGroup()) for _ in range(3)]
    yield groups
    [g.close() for g in groups]


def test_holders_keep_one_object_whose_ranks_and_epoch_are_those_of_the_present_group(held):
    store, kept = dist.HashStore(), [(g, g.barrier) for g in held]

    def live(i):
        group = held[i]
        seen = []
        for epoch, members in enumerate(([0, 1, 2], [2, 0], [0, 1, 2]), 1):
            if i in members:
                form(group, store, members.index(i), len(members), epoch)
                seen.append((group.rank, group.size, group.epoch, group.members, total(group)))
                kept[i][1]()  # a holder of the call itself, too
        return seen

    one, two, three = in_threads(*(lambda i=i: live(i) for i in range(3)))
    assert [x[:3] for x in one] == [(0, 3, 1), (1, 2, 2), (0, 3, 3)]
    assert [x[:3] for x in two] == [(1, 3, 1), (1, 3, 3)]
    assert [x[4] for x in one] == [x[4] for x in three] == [6.0, 3.0, 6.0]
    assert three[1] == (0, 2, 2, [0, 1], 3.0)


def test_a_rank_that_wakes_up_in_an_old_epoch_is_told_and_nobody_hears_it(held):
    store = dist.HashStore()
    in_threads(*(lambda i=i: form(held[i], store, i, 3, 0) for i in range(3)))
    asleep, answers = held[2].present, []

    def go_on(i):
        form(held[i], store, i, 2, 1)
        for n in range(200):
            x = torch.full((1000,), float(n + i))
            held[i].all_reduce(x)
            answers.append(bool((x == 2 * n + 1).all()))

    def wake():
        for call in (asleep.barrier, lambda: asleep.all_reduce(torch.full((1000,), 1e9)), lambda: total(asleep)):
            with pytest.raises(GroupError, match="epoch 0"):
                call()
        with pytest.raises(GroupError):  # nor may it come back by itself, under its old number
            gloo(store, 2, 3, 0, "127.0.0.1", 0.5)

    in_threads(lambda: go_on(0), lambda: go_on(1), wake)
    assert len(answers) == 400
    assert all(answers)


def test_a_group_whose_peer_never_comes_is_given_up_after_its_limit_and_another_epoch_works(held):
    store = dist.HashStore()

    def alone(i):
        began = time.monotonic()
        with pytest.raises(GroupError):
            form(held[i], store, i, 3, 1, limit_s=0.6)
        took = time.monotonic() - began
        with pytest.raises(GroupError, match="no group was formed after epoch 0"):
            held[i].barrier()
        return took

    assert max(in_threads(lambda: alone(0), lambda: alone(1))) < 10
    in_threads(*(lambda i=i: form(held[i], store, i, 2, 2) for i in range(2)))
    assert in_threads(*(lambda i=i: total(held[i]) for i in range(2))) == [3.0, 3.0]


def test_abort_from_another_thread_ends_the_forming_of_its_epoch_and_of_no_other(held):
    store, group = dist.HashStore(), held[0]
    threading.Timer(0.2, group.abort, [0]).start()  # an order for the epoch before: late
    threading.Timer(0.6, group.abort, [1]).start()
    began = time.monotonic()
    with pytest.raises(GroupError, match="forming the group of epoch 1 over gloo: aborted"):
        form(group, store, 0, 2, 1, limit_s=60)
    assert 0.5 < time.monotonic() - began < 20
    in_threads(*(lambda i=i: form(held[i], store, i, 2, 2) for i in range(2)))
    group.abort(1)
    assert in_threads(*(lambda i=i: total(held[i]) for i in range(2))) == [3.0, 3.0]
    group.abort(2)
    with pytest.raises(GroupError, match="closed or aborted"):
        group.barrier()


def test_an_order_for_the_epoch_before_leaves_the_first_of_several_transports_alone(held):
    aborted = []

    class Named(SoloGroup):
        def abort(self):
            aborted.append(self.epoch)

    def second():
        held[0].abort(0)
        return Named(1)

    held[0].form(1, {"one": lambda: Named(1), "two": second}, 5.0)
    assert aborted == []
    held[0].abort(1)
    assert aborted == [1, 1]


def test_a_group_that_comes_when_nobody_waits_any_more_is_closed(held):
    late, closed = threading.Event(), threading.Event()

    class Late(SoloGroup):
        def close(self):
            closed.set()

    def make():
        late.wait(5)
        return Late(1)

    with pytest.raises(GroupError, match="not within"):
        held[0].form(1, {"late": make}, 0.3)
    late.set()
    assert closed.wait(5)


def test_an_order_to_end_that_comes_while_the_last_peer_joins_ends_the_new_group(held):
    store, first = dist.HashStore(), held[0]

    def make():
        made = gloo(store, 0, 1, 1, "127.0.0.1", 5.0)
        first.abort(1)  # nobody looks for it any more
        return made

    first.form(1, {"gloo": make}, 5.0)
    with pytest.raises(GroupError, match="epoch 1"):
        first.barrier()


def test_forming_leaves_the_group_of_the_epoch_before(held):
    store, first = dist.HashStore(), held[0]
    form(first, store, 0, 1, 1)
    before = first.present
    form(first, store, 0, 1, 2)
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        try:
            before.barrier()
        except GroupError:
            return
        time.sleep(0.05)
    pytest.fail("the group of epoch 1 still works: it was not left")


def test_the_limit_of_forming_is_not_that_of_a_collective(held):
    store = dist.HashStore()
    in_threads(*(lambda i=i: form(held[i], store, i, 2, 1, timeout_s=20.0, limit_s=0.8) for i in range(2)))
    for group in held[:2]:
        group.present._here = None  # as between hosts: gloo itself carries it

    def meet(i):
        time.sleep(1.3 * i)
        return total(held[i])

    assert in_threads(lambda: meet(0), lambda: meet(1)) == [3.0, 3.0]


def test_the_transport_that_is_kept_is_used_and_the_others_are_closed():
    closed = []

    class Named(SoloGroup):
        def close(self):
            closed.append(self)

    one, two = Named(1), Named(1)
    group = EpochGroup()
    group.form(1, {"one": lambda: one, "two": lambda: two}, 5.0)
    assert group.present is one
    group.keep("two")
    assert (group.present, list(group.transports)) == (two, ["two"])
    group.close()
    assert closed == [one, two]
    with pytest.raises(GroupError, match="no group"):
        group.wait()


def test_twelve_epochs_leave_no_descriptor_thread_or_memory_behind(held):
    store = dist.HashStore()

    def live(i, first, last):
        for epoch in range(first, last):
            size = 2 + epoch % 2
            if i >= size:
                continue
            form(held[i], store, i, size, epoch)
            y = held[i].take(size * 40_000, like=torch.empty(0))
            end = held[i].begin_loan(y.fill_(1).view(torch.uint8).view(size, -1), [1] * size, [1] * size)
            assert all(bool((part.view(torch.float32) == 1).all()) for part in end())
            assert total(held[i]) == size * (size + 1) / 2
        held[i].close()

    def epochs(first, last):
        in_threads(*(lambda i=i: live(i, first, last) for i in range(3)))
        return left()

    epochs(1, 3)
    before, after = epochs(3, 5), epochs(5, 17)
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] - before[2] < 8, f"{after[2] - before[2]:.0f} MiB"


def left():
    """Descriptors, threads and resident MiB of this process, once closing is over."""
    found = ()
    for _ in range(100):
        gc.collect()
        now = (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
        if now == found:
            break
        found = now
        time.sleep(0.1)
    with open("/proc/self/statm") as file, contextlib.closing(file):
        pages = int(file.read().split()[1])
    return (*found, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
