"""NcclGroup over the NCCL that is not there: exchanges, their order, and the ends of a group."""

import threading
import time

import pytest
import torch

from ray_ep.errors import GroupError
from tests import fake_nccl
from tests.fake_cuda import fake_cuda, host_syncs, nccl_ranks
from tests.fake_streams import Race


@pytest.fixture(autouse=True)
def _cuda():
    with fake_cuda():
        yield


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_call_delivers_what_it_should(size, device):
    def work(g):
        for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
            give = [(g.rank + to) % 3 for to in range(size)]  # zero rows to some
            take = [(source + g.rank) % 3 for source in range(size)]
            rows = torch.repeat_interleave(10 * g.rank + torch.arange(size), torch.tensor(give))[:, None].expand(-1, 2)
            got = torch.empty(sum(take), 2, dtype=dtype, device=device)
            g.all_to_all(got, rows.to(device, dtype), take, give)
            want = torch.repeat_interleave(10 * torch.arange(size) + g.rank, torch.tensor(take))
            assert got[:, 1].tolist() == want.tolist()
            x = torch.full((3,), g.rank + 1, dtype=dtype, device=device)
            g.all_reduce(x)
            assert x.tolist() == [size * (size + 1) // 2] * 3
            x = torch.tensor([g.rank, -g.rank], device=device).to(dtype if dtype != torch.uint8 else torch.int8)
            g.all_reduce(x, "max")
            assert x.tolist() == [size - 1, 0]
            assert g.all_gather(torch.tensor([g.rank], device=device)).flatten().tolist() == list(range(size))
            x = torch.full((2, 2), g.rank, dtype=dtype, device=device)
            g.broadcast(x.t(), size - 1)
            assert x.flatten().tolist() == [size - 1] * 4
        g.barrier()
        return g.seconds

    assert all(seconds > 0 for seconds in nccl_ranks(size, work))


def test_messages_arrive_in_order_and_a_split_has_its_own():
    def work(g):
        half = g.split(g.rank % 2)
        x = torch.full((2,), float(g.rank), device="cuda")
        half.all_reduce(x)
        if g.rank == 0:
            for value in range(3):
                g.send(torch.full((2,), float(value), device="cuda"), 1)
        if g.rank == 1:
            got = torch.empty(3, 2, device="cuda")
            for row in got:
                g.receive(row, 0)
            assert got[:, 0].tolist() == [0, 1, 2]
        return x.tolist(), half.members

    assert nccl_ranks(3, work) == [([2.0, 2.0], [0, 2]), ([1.0, 1.0], [1]), ([2.0, 2.0], [0, 2])]


def test_calls_wait_for_nothing_and_are_in_the_order_of_the_stream_that_makes_them():
    def work(g):
        side = torch.cuda.Stream()
        with host_syncs() as syncs:
            x = torch.full((4,), float(g.rank), device="cuda")
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x += 1
                g.all_reduce(x)
                y = x * 1
            torch.cuda.current_stream().wait_stream(side)
            g.all_reduce(x)
            x.record_stream(side)
        assert syncs == []
        return x.tolist(), y.tolist()

    assert nccl_ranks(2, work) == [([6.0] * 4, [3.0] * 4)] * 2


def test_a_call_on_memory_that_another_stream_is_writing_is_found():
    def work(g):
        side, x = torch.cuda.Stream(), torch.zeros(4, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x += 1
        with pytest.raises(Race, match=r"allReduce on stream .* reads memory"):
            g.all_reduce(x)

    nccl_ranks(2, work)


def timed(call):
    """Seconds until a call raises GroupError, and its text."""
    start = time.monotonic()
    with pytest.raises(GroupError) as caught:
        call()
    return time.monotonic() - start, str(caught.value)


def test_abort_releases_a_waiting_rank_and_the_device_goes_on():
    def work(g):
        if g.rank == 1:
            time.sleep(0.7)
            return None
        x = torch.ones(3, device="cuda")
        g.all_reduce(x)  # the peer does not come: enqueued, and the host goes on
        threading.Timer(0.2, g.abort).start()
        took, text = timed(g.wait)
        assert torch.ones(2, device="cuda").sum().item() == 2
        return took, text, timed(lambda: g.all_reduce(x))

    took, text, (_, later) = nccl_ranks(2, work)[0]
    assert 0.1 < took < 20
    assert "aborted" in text
    assert "aborted" in later


WAITS = {
    "wait": lambda g, x: (g.all_reduce(x), g.wait()),
    "work": lambda g, x: (g.all_reduce(x), x + 1, g.wait()),
    "barrier": lambda g, x: (g.all_reduce(x), g.barrier()),
    "a result on the host": lambda g, x: g.all_reduce(x.cpu()),
    "more results on the host": lambda g, x: g.all_gather(x.cpu()),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_peer_that_never_comes_ends_the_group_after_the_time_limit(wait):
    def work(g):
        if g.rank == 0:
            g.timeout_s = 0.3
            return timed(lambda: wait(g, torch.ones(1, device="cuda")))
        time.sleep(0.7)
        return None

    took, text = nccl_ranks(2, work)[0]
    assert took < 20
    assert "no answer from the peers in 0.3 s" in text


def test_a_call_that_does_not_come_back_ends_at_its_limit():
    """NCCL connects in the first call of a kind, which blocks the host until the peer does the same."""

    def work(g):
        aborted, abort = threading.Event(), g._communicator.abort
        g._communicator.abort = lambda: (aborted.set(), abort())

        def connect(*_):
            assert aborted.wait(20)
            raise fake_nccl.NcclError("NCCL_ERROR_INTERNAL_ERROR: aborted")

        g._communicator.send = connect
        return timed(lambda: g.send(torch.ones(1, device="cuda"), 1 - g.rank, 0.3))

    took, text = nccl_ranks(2, work)[0]
    assert took < 15
    assert "rank 1 did not take a message within 0.3 s" in text


def test_a_lost_peer_is_heard_of_long_before_the_time_limit():
    def work(g):
        g.barrier()
        if g.rank == 2:
            fake_nccl.lose(g._communicator)
            return None
        x = torch.ones(1, device="cuda")
        return timed(lambda: (g.all_reduce(x), g.wait()))

    for took, text in nccl_ranks(3, work)[:2]:
        assert took < 20
        assert "a peer is gone: NCCL_ERROR_REMOTE_ERROR" in text


def test_ranks_that_do_not_come_to_the_group_are_named_as_missing():
    import torch.distributed as dist

    from ray_ep.collective.nccl import nccl

    with pytest.raises(GroupError, match=r"rank 0: joining the NCCL group of epoch 0: not within 0\.3 s"):
        nccl(dist.HashStore(), 0, 2, timeout_s=0.3)
