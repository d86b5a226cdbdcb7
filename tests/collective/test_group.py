import contextlib
import gc
import os
import random
import threading
import time
from datetime import timedelta

import pytest
import torch

from ray_ep.collective import from_torch
from ray_ep.collective.group import SLICE
from ray_ep.errors import GroupError, LateError


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64])
def test_all_to_all_with_uneven_sizes_delivers_every_row_to_its_rank(ranks, size, dtype):
    def work(g):
        sizes_in = [(g.rank + to) % 3 for to in range(size)]  # zero rows to some
        sizes_out = [(source + g.rank) % 3 for source in range(size)]
        x = torch.cat([torch.full((n, 2), 10 * g.rank + to) for to, n in enumerate(sizes_in)]).to(dtype)
        y = torch.empty(sum(sizes_out), 2, dtype=dtype)
        g.all_to_all(y, x, sizes_out, sizes_in)
        want = torch.cat([torch.full((n, 2), 10 * source + g.rank) for source, n in enumerate(sizes_out)]).to(dtype)
        assert torch.equal(y, want)

    ranks(size, work)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_reductions_gathers_and_broadcasts(ranks, size):
    def work(g):
        x = torch.tensor([float(g.rank), 1.0])
        g.all_reduce(x)
        assert x.tolist() == [sum(range(size)), size]
        x = torch.tensor([float(g.rank)])
        g.all_reduce(x, "max")
        assert x.item() == size - 1
        assert g.all_gather(torch.tensor([g.rank])).flatten().tolist() == list(range(size))
        x = torch.tensor([float(g.rank)])
        g.broadcast(x, size - 1)
        assert x.item() == size - 1
        g.barrier()

    ranks(size, work)


def test_a_group_is_connected_when_it_is_made_not_at_its_first_use(ranks):
    def work(g):
        g.barrier()
        made = sockets()
        g.barrier()  # nobody goes on before everybody has counted
        y = torch.empty(3, 1)
        g.all_to_all(y, torch.ones(3, 1), [1] * 3, [1] * 3)
        g.all_reduce(y)
        g.barrier()
        used = sockets()
        g.barrier()
        return made, used

    gc.collect()  # groups of earlier tests
    before = sockets()
    for made, used in ranks(3, work):
        assert made > before
        assert used <= made  # fewer: an earlier test's may go meanwhile


def sockets():
    """Sockets of this process; a descriptor may go while we look."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket")
    return found


def test_nothing_to_send_at_all_is_fine(ranks):
    def work(g):
        y = torch.empty(0, 4)
        g.all_to_all(y, torch.empty(0, 4), [0, 0], [0, 0])
        return y.shape

    assert ranks(2, work) == [(0, 4)] * 2


def test_abort_releases_a_waiting_rank_at_once(ranks):
    groups, released = {}, threading.Event()

    def work(g):
        if g.rank == 1:
            return released.wait(30)
        threading.Timer(0.3, g.abort).start()
        with pytest.raises(GroupError, match="aborted"):
            g.barrier()
        released.set()
        return True

    assert ranks(2, work, timeout_s=60.0, groups=groups) == [True, True]
    with pytest.raises(GroupError, match="closed or aborted"):
        groups[0].barrier()


def test_a_peer_that_never_comes_ends_in_an_error_after_the_time_limit(ranks):
    def work(g):
        if g.rank == 0:
            g.timeout_s = 0.5
            with pytest.raises(LateError, match="no answer"):
                g.all_reduce(torch.ones(1))

    ranks(2, work, timeout_s=10.0, groups={})


def test_from_torch_without_a_process_group_says_what_to_do():
    with pytest.raises(GroupError, match="init_process_group"):
        from_torch()


def test_an_exchange_that_ends_just_after_a_slice_of_waiting_is_no_failure(ranks, monkeypatch):
    monkeypatch.setattr("ray_ep.collective.torch_group.SLICE", timedelta(milliseconds=1))

    def work(group):
        wait = random.Random(group.rank)
        for _ in range(300):
            time.sleep(wait.random() * 0.004)
            x = torch.full((4,), float(group.rank))
            group.all_reduce(x)
            assert x.tolist() == [1.0] * 4

    ranks(2, work)


def test_a_message_of_a_late_peer_arrives_and_the_connection_lives_on(ranks):
    """gloo closes a connection when a wait for one message runs out, so the wait must not be cut in slices."""

    def work(group):
        x = torch.full((3,), float(group.rank))
        if group.rank == 0:
            time.sleep(2.5 * SLICE.total_seconds())  # the receiver would have looked up from its wait twice
            group.send(x, 1)
            time.sleep(2.5 * SLICE.total_seconds())
            group.receive(x, 1)
        else:
            y = torch.empty(3)
            group.receive(y, 0)
            assert y.tolist() == [0.0] * 3
            group.send(x, 0)
        group.all_reduce(x)
        return x.tolist()

    assert ranks(2, work) == [[2.0] * 3] * 2


def test_a_message_that_never_comes_ends_in_an_error_after_its_limit(ranks):
    def work(group):
        if group.rank == 0:
            with pytest.raises(GroupError, match="rank 0: a peer of epoch 0 is gone"):
                group.receive(torch.empty(1), 1, 0.3)
            with pytest.raises(GroupError, match="closed or aborted"):
                group.barrier()

    ranks(2, work, timeout_s=10.0, groups={})
