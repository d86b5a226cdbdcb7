"""Memory that ranks of a host share: the same rows arrive as over sockets, whatever goes which way."""

import contextlib
import os
import random
import time

import pytest
import torch

from ray_ep.collective import gloo_group as module
from ray_ep.collective.mailboxes import Mailboxes
from ray_ep.errors import GroupError

SOME_FAR = [(0, 2), (2, 0), (1, 2), (2, 1)]
"""Pairs of ranks that are told apart as if they were on two hosts: 0, 1 and 2."""


HOSTS = {"one host": ([], True), "one host, told by gloo": ([], False), "two hosts": (SOME_FAR, False)}


def divide(group, hosts):
    """As if the group's ranks were on the hosts of HOSTS, or their processor did not keep the order of writes."""
    far, watched = HOSTS[hosts]
    group._near = [near and (group.rank, r) not in far for r, near in enumerate(group._near)]
    assert group._here is not None
    group._here = group._here if watched else None


@pytest.fixture(autouse=True)
def _nearly_everything_is_big(monkeypatch):
    monkeypatch.setattr(module, "SHARED_BYTES", 64)


def sizes(step, ranks):
    """Rows from each rank (row) to each (column), some none, some small, some big, in one call."""
    draw = random.Random(step)
    return [[draw.choice([0, 1, 7, 8, 40, 3000]) for _ in range(ranks)] for _ in range(ranks)]


def rows(step, source, to, count, dtype):
    made = torch.Generator().manual_seed(1000 * step + 10 * source + to)
    return torch.randint(0, 100, (count, 4), generator=made).to(dtype)


def call(group, step, dtype, begin=False, keep=None):
    """One exchange, or a loan begun; returns what ends it and checks what arrived.

    keep: where a sender keeps its messages; what arrived is then left there, too, with what was expected.
    """
    table, me = sizes(step, group.size), group.rank
    taken = [table[r][me] for r in range(group.size)]
    send = torch.cat([rows(step, me, r, n, dtype) for r, n in enumerate(table[me])])
    expected = torch.cat([rows(step, r, me, n, dtype) for r, n in enumerate(taken)])
    if begin:
        message = group.take(*send.shape, like=send)
        message.copy_(send)
        end = group.begin_loan(message.view(torch.uint8), taken, table[me])
    else:
        out = torch.full((sum(taken), 4), -1).to(dtype)
        group.all_to_all(out, send, taken, table[me])

    def check(pause=0.0):
        parts = [part.view(dtype) for part in end()] if begin else [out]
        time.sleep(pause)
        assert torch.equal(torch.cat(parts), expected)
        if keep is not None:
            keep.append((message, parts, expected))

    return check


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_every_row_arrives_whichever_way_it_takes(ranks, size, hosts, dtype):
    def work(group):
        assert group._near == [r != group.rank for r in range(size)]
        divide(group, hosts)
        for step in range(12):
            call(group, step, dtype)()

    ranks(size, work)


@pytest.mark.parametrize("hosts", ["one host", "one host, told by gloo"])
def test_big_rows_arrive_in_memory_of_any_strides(ranks, hosts):
    def work(group):
        divide(group, hosts)
        out = torch.zeros(300, 8)[:, ::2]
        send = rows(0, group.rank, 0, 300, torch.float32).t().contiguous().t()
        group.all_to_all(out, send, [100] * 3, [100] * 3)
        own = slice(100 * group.rank, 100 * group.rank + 100)
        assert torch.equal(out, torch.cat([rows(0, r, 0, 300, torch.float32)[own] for r in range(3)]))

    ranks(3, work)


@pytest.mark.parametrize("hosts", HOSTS)
def test_exchanges_that_end_later_may_have_others_between_and_within(ranks, hosts):
    def work(group):
        divide(group, hosts)
        for step in range(0, 60, 6):
            first = call(group, step, torch.float32, begin=True)
            call(group, step + 1, torch.float32)()
            second = call(group, step + 2, torch.float32, begin=True)  # while the first is under way
            for more in range(3, 6):
                call(group, step + more, torch.float32)()
            second()
            first()

    ranks(3, work)


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_rank_that_runs_ahead_overwrites_nothing_unread(ranks, hosts):
    def work(group):
        divide(group, hosts)
        slow = random.Random(group.rank)
        for step in range(60):
            if slow.random() < 0.3:
                time.sleep(0.003)
            call(group, step, torch.float32)()

    ranks(2, work)


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_loan_is_good_until_its_reader_begins_another_call(ranks, hosts):
    def work(group):
        divide(group, hosts)
        slow = random.Random(group.rank)
        for step in range(60):
            call(group, step, torch.bfloat16, begin=True)(pause=0.003 if slow.random() < 0.3 else 0.0)
            if step % 3 == 0:
                call(group, step, torch.float32)()

    ranks(3, work)


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_loan_lasts_as_long_as_its_sender_keeps_the_message(ranks, hosts):
    def work(group):
        divide(group, hosts)
        kept = []
        for step in range(40):
            call(group, step, torch.float32, begin=True, keep=kept)()
            call(group, step, torch.float32, begin=True)()
            if step % 10 == 9:
                group.barrier()
                for _, parts, expected in kept:
                    assert torch.equal(torch.cat(parts), expected)
                group.barrier()
                kept.clear()

    ranks(2, work)


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_loan_of_other_memory_is_refused(ranks, hosts):
    def work(group):
        divide(group, hosts)
        with pytest.raises(GroupError, match="take"):
            group.begin_loan(torch.zeros(400, 4, dtype=torch.uint8), [200, 200], [200, 200])
        group.barrier()

    ranks(2, work)


def test_messages_between_two_ranks_arrive_in_order(ranks):
    def work(group):
        for n in (3, 5000, 70000, 2, 70000):
            x = torch.arange(n, dtype=torch.float32)
            if group.rank == 0:
                group.send(x, 1)
            else:
                y = torch.empty(n)
                group.receive(y, 0)
                assert torch.equal(x, y)

    ranks(2, work)


def test_subgroups_share_memory_too(ranks):
    def work(group):
        part = group.split(group.rank % 2)
        assert sum(part._near) == 1
        for step in range(6):
            call(part, step, torch.float32)()
            call(group, step, torch.float32)()

    ranks(4, work)


def test_without_memory_files_sockets_carry_all(ranks, monkeypatch):
    def refused(*_):
        raise OSError("not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)

    def work(group):
        assert not any(group._near)
        for step in range(4):
            call(group, step, torch.float32)()

    ranks(3, work)


def test_a_closed_group_keeps_no_file_and_says_that_it_is_closed(ranks):
    def files():
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # it may go while we look
                found += "memfd:ray_ep" in os.readlink(f"/proc/self/fd/{fd}")
        return found

    before = files()
    groups = {}

    def work(group):
        call(group, 1, torch.float32)()
        group.barrier()

    ranks(2, work, groups=groups)
    for group in groups.values():
        group.close()
        with pytest.raises(GroupError, match="closed"):
            group.all_to_all(torch.empty(200, 4), torch.empty(200, 4), [100, 100], [100, 100])
    assert files() <= before


def test_lent_memory_is_lent_again_and_what_is_too_small_gives_its_memory_back():
    mail = Mailboxes(2, 1)
    first, second = mail.lend(200_000).fill_(1), mail.lend(200_000).fill_(2)
    at, other = mail.place(first), mail.place(second)
    part = first[1000:]
    del first
    third = mail.lend(100_000)
    assert len({at, other, mail.place(third)}) == 3, "two are in use, of one a part"
    del part
    assert mail.place(mail.lend(150_000)) == at, "free again"

    def resident():
        return os.fstat(mail.facts()[2].item()).st_blocks * 512

    before = resident()
    big = mail.lend(1_000_000)
    assert resident() < before - 190_000, "what was too small gave its memory back"
    assert (second == 2).all()
    assert mail.place(big) not in (at, other)
    assert mail.place(mail.lend(150_000)) == at
    mail.close()


def test_a_file_of_another_host_or_another_process_is_not_opened():
    mine, other = Mailboxes(2, 1), Mailboxes(2, 1)
    facts = other.facts()
    assert mine.open(1, facts)
    for place, value in [(0, 12345), (1, 2**22 + 1), (2, 1), (3, 7)]:  # host, process, descriptor, token
        false = facts.clone()
        false[place] = value
        assert not mine.open(1, false), place
    mine.close()
    other.close()
