"""Collectives of ranks that share memory: results, and how a call ends when a rank is late, gone or has left."""

import gc
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective import one_host
from ray_ep.collective.gloo_group import gloo
from ray_ep.collective.mailboxes import PLACES
from ray_ep.errors import GroupError, LateError

SIZES = [0, 1, 7, one_host._SMALL, one_host._SMALL + 1, one_host._PIECE + 3]


def values(rank, size, dtype):
    made = torch.Generator().manual_seed(rank)
    return (torch.randn(size, generator=made) * 100).to(dtype)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_reductions_are_the_same_bits_on_every_rank_in_the_order_of_ranks(ranks, size, dtype):
    def work(group):
        assert group._here is not None
        found = []
        for n in SIZES:
            for op in ("sum", "max"):
                x = values(group.rank, n, dtype)
                group.all_reduce(x, op)
                found.append(x)
        return found

    results = ranks(size, work)
    for i, n in enumerate(SIZES):
        each = [values(r, n, dtype) for r in range(size)]
        total = each[0].clone()
        for x in each[1:]:
            total += x
        for found in results:
            assert torch.equal(found[2 * i], total), n
            assert torch.equal(found[2 * i + 1], torch.stack(each).amax(0) if n else each[0]), n


def test_a_tensor_that_is_not_contiguous_is_reduced_and_gathered_as_it_stands(ranks):
    def work(group):
        x = torch.arange(12.0).view(3, 4).t() * (group.rank + 1)
        gathered = group.all_gather(x)
        group.all_reduce(x)
        return gathered, x

    for gathered, x in ranks(2, work):
        plain = torch.arange(12.0).view(3, 4).t()
        assert torch.equal(gathered, torch.stack([plain, 2 * plain]))
        assert torch.equal(x, 3 * plain)


def test_calls_of_all_kinds_follow_each_other_with_ranks_that_run_ahead(ranks):
    def work(group):
        for step in range(200):
            if (step * 7 + group.rank * 3) % 11 == 0:
                time.sleep(0.002)
            x = torch.full((5,), float(group.rank + step))
            assert torch.equal(group.all_gather(x), torch.arange(3.0)[:, None] + step + torch.zeros(5))
            out = torch.empty(6)
            group.all_to_all(out, torch.arange(3.0).repeat_interleave(2) + 10 * group.rank, [2, 2, 2], [2, 2, 2])
            assert torch.equal(out, (10 * torch.arange(3.0) + group.rank).repeat_interleave(2))
            group.all_reduce(x)
            assert torch.equal(x, torch.full((5,), 3.0 + 3 * step))
            group.barrier()

    ranks(3, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool])
def test_rows_of_any_strides_are_sent_and_received(ranks, dtype):
    def work(group):
        send = values(group.rank, 12, torch.float32).to(dtype).view(4, 3).t()
        out = torch.zeros(3, 8, dtype=dtype)[:, ::2]
        kept = out.clone()
        theirs, given = ([1, 2], [1, 2]) if group.rank == 0 else ([2, 1], [2, 1])
        group.all_to_all(out, send, theirs, given)
        group.all_to_all(kept, send.contiguous(), theirs, given)
        assert torch.equal(out, kept)
        assert kept.any()

    ranks(2, work)


def test_a_group_takes_the_time_limit_and_the_epoch_that_it_is_given_later(ranks):
    def work(group):
        group.epoch, group.timeout_s = 7, 0.3
        if group.rank == 0:
            with pytest.raises(LateError, match=r"peers of epoch 7 in 0\.3 s, first rank 1"):
                group.barrier()
            mine, other = re.findall(r"rank \d: (\d+) calls", group.standing())
            assert int(mine) == int(other) + 1  # the one that never came is behind

    ranks(2, work, groups={})


def test_a_loan_is_read_where_it_lay_however_many_began_since(ranks):
    def begin(group, number):
        message = group.take(2, 8, like=torch.zeros(0, dtype=torch.uint8))
        return group.begin_loan(message.fill_(number % 251), [1, 1], [1, 1])

    def work(group):
        first = [begin(group, n) for n in range(PLACES - 8)]
        if group.rank == 1:
            time.sleep(0.3)  # the other one ends all its loans and would begin more in the same places
        for n, end in enumerate(first):
            assert torch.cat(end()).unique().tolist() == [n % 251], n
        for n in range(PLACES):
            assert torch.cat(begin(group, n)()).unique().tolist() == [n % 251], n
        kept = [begin(group, 3) for _ in range(PLACES)]
        with pytest.raises(GroupError, match="512 loans"):
            begin(group, 3)
        assert torch.cat(kept[0]()).unique().tolist() == [3]

    ranks(2, work)


def test_tensors_with_a_gradient_and_those_of_inference_are_carried_like_others(ranks):
    def work(group):
        def all_kinds():
            weight = torch.nn.Parameter(torch.ones(70_000))
            group.all_reduce(weight)
            out = torch.zeros(2, 40_000)
            group.all_to_all(out, weight[:2, None].expand(2, 40_000), [1, 1], [1, 1])
            message = group.take(2, 200_000, like=torch.zeros(0, dtype=torch.uint8)).fill_(1)
            assert torch.stack(group.begin_loan(message, [1, 1], [1, 1])()).all()
            assert weight.eq(2).all()
            assert out.eq(2).all()
            assert not out.requires_grad

        with torch.inference_mode():
            all_kinds()
        all_kinds()

    ranks(2, work)


def test_after_a_call_that_failed_here_no_other_is_answered(ranks):
    def work(group):
        if group.rank == 0:
            with pytest.raises(KeyError, match="mean"):
                group.all_reduce(torch.ones(2), "mean")
            with pytest.raises(GroupError, match="closed or aborted"):
                group.all_reduce(torch.ones(2))

    ranks(2, work)


def test_a_rank_that_closes_its_group_from_another_thread_is_released(ranks):
    def work(group):
        if group.rank == 0:
            threading.Timer(0.2, group.close).start()
            with pytest.raises(GroupError, match=r"aborted|closed"):
                group.barrier()

    ranks(2, work, groups={})


def test_groups_that_nobody_closes_leave_no_descriptor_behind(ranks):
    def used():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    ranks(3, lambda group: group.all_reduce(torch.ones(3)))
    before = used()
    for _ in range(4):
        ranks(3, lambda group: group.all_reduce(torch.ones(3)))
    assert used() <= before + 5, "one group of three takes some thirty"


GOES = """
import os, signal, sys, time
import torch.distributed as dist
from ray_ep.collective import gloo
group = gloo(dist.FileStore(sys.argv[1], 2), 1, 2, host="127.0.0.1", timeout_s=20)
group.barrier()
if sys.argv[2] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
group.close()
time.sleep(30)
"""


@pytest.mark.parametrize(("how", "words"), [("dies", "rank 1 died"), ("leaves", "rank 1 closed its group")])
def test_a_rank_that_is_gone_ends_the_others_call_soon_and_the_group_with_it(tmp_path, how, words):
    store = str(tmp_path / "store")
    peer = subprocess.Popen([sys.executable, "-c", GOES, store, how])
    try:
        group = gloo(dist.FileStore(store, 2), 0, 2, host="127.0.0.1", timeout_s=20)
        group.barrier()
        began = time.monotonic()
        with pytest.raises(GroupError) as e:
            group.all_reduce(torch.ones(3))
        assert str(e.value) == f"rank 0: a peer of epoch 0 is gone: {words}"
        assert time.monotonic() - began < 15, "not the time limit of 20 s"
        with pytest.raises(GroupError):
            group.barrier()
    finally:
        peer.kill()
        peer.wait()
