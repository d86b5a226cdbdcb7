"""Both NCCL groups with one rank under the real library: every call, stream order, host syncs, abort, capture.

Not run on a GPU yet.
"""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective.nccl import NcclGroup, nccl
from ray_ep.errors import BadInput, GroupError

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_rows_of_any_type_go_to_oneself(group, device, dtype):
    if dtype == torch.float8_e4m3fn and not isinstance(group, NcclGroup):
        pytest.skip("whether torch's NCCL group takes float8 depends on its version")
    x = torch.arange(12, device=device).view(4, 3).to(dtype)
    y = torch.zeros_like(x)
    group.all_to_all(y, x, [4], [4])
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))
    group.all_to_all(y[:0], x[:0], [0], [0])


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_every_call_works_on_tensors_of_the_device_and_of_the_host(group, where, dtype):
    x = torch.arange(6, device=where).view(2, 3).to(dtype)
    want = x.clone()
    group.all_reduce(x)
    group.all_reduce(x, "max")
    group.broadcast(x, 0)
    assert torch.equal(x, want)
    gathered = group.all_gather(x)
    assert gathered.device.type == where
    assert torch.equal(gathered, want[None])
    y = torch.zeros_like(x)
    group.all_to_all(y, x, [2], [2])
    assert torch.equal(y, want)
    group.barrier()
    group.wait()


def test_tensors_that_are_not_contiguous_are_written_in_place(group, device):
    x = torch.arange(6.0, device=device).view(2, 3).t()
    y = torch.zeros(2, 3, device=device).t()
    group.all_to_all(y, x, [3], [3])
    group.all_reduce(y)
    assert torch.equal(y, x)


def test_an_exchange_comes_after_what_the_stream_holds_and_before_what_follows(group, device):
    a = torch.ones(4096, 4096, device=device)
    y = torch.zeros_like(a)
    for _ in range(20):
        x = a @ a  # long enough for the exchange to come too early if nothing held it
        group.all_to_all(y, x, [4096], [4096])
        group.all_reduce(y)
        total = y.sum(dtype=torch.float64)
        del x
        junk = torch.zeros(4096, 4096, device=device)  # takes the memory that was just freed
        assert total.item() == 4096.0**3
        del junk


def test_calls_on_device_tensors_do_not_make_the_host_wait(group, device):
    x, y = torch.ones(8, 4, device=device), torch.empty(8, 4, device=device)
    group.barrier()
    torch.cuda.set_sync_debug_mode("error")
    try:
        group.all_to_all(y, x, [8], [8])
        group.all_reduce(y)
        group.all_gather(y)
        group.broadcast(y, 0)
        read = group.seconds  # raises in this mode if it waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    group.wait()
    assert read <= group.seconds
    assert group.seconds > 0
    assert torch.equal(y, x)


def test_seconds_count_the_time_of_the_exchange_on_the_device(group, device):
    x = torch.ones(1 << 26, device=device)
    y = torch.empty_like(x)
    for _ in range(5):
        group.all_to_all(y, x, [len(x)], [len(x)])
    group.wait()
    assert 0 < group.seconds < 5


def test_wait_returns_when_the_result_is_there(group, device):
    a = torch.ones(8192, 8192, device=device)
    for _ in range(10):
        a = a @ a / 8192
    before = torch.cuda.Event()
    before.record()
    group.all_reduce(a)
    early = before.query()
    group.wait()
    assert before.query()
    assert not early, "the device was done before the host waited: nothing was tested"
    assert torch.equal(a, torch.ones_like(a))


def test_a_subgroup_has_a_communicator_of_its_own_and_ends_with_its_parent(group, device):
    sub = group.split(3)
    assert (sub.rank, sub.size, sub.members) == (0, 1, [0])
    x = torch.ones(2, device=device)
    sub.all_reduce(x)
    sub.barrier()
    group.abort()
    with pytest.raises(GroupError, match="aborted"):
        sub.all_reduce(x)


@pytest.mark.parametrize("end", ["abort", "close"])
def test_after_abort_or_close_every_call_fails_and_the_device_goes_on(group, device, end):
    x = torch.ones(4, 2, device=device)
    group.all_reduce(x)
    thread = threading.Thread(target=getattr(group, end))
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    for call in (
        lambda: group.all_to_all(x, x.clone(), [4], [4]),
        lambda: group.all_gather(x),
        lambda: group.all_reduce(x),
        lambda: group.broadcast(x, 0),
        group.barrier,
        group.wait,
    ):
        with pytest.raises(GroupError, match="closed or aborted"):
            call()
    assert x.sum().item() == 8


def test_sizes_that_do_not_fit_are_refused(device):
    pytest.importorskip("cupy")
    group = nccl(dist.HashStore(), 0, 1, timeout_s=60)
    x = torch.ones(4, 2, device=device)
    with pytest.raises(BadInput, match="do not divide 4 rows"):
        group.all_to_all(x, x.clone(), [5], [4])
    with pytest.raises(BadInput, match="does not reduce"):
        group.all_reduce(x.to(torch.complex64))
    group.close()


def test_a_peer_that_never_comes_ends_in_an_error_in_time(device):
    pytest.importorskip("cupy")
    began = time.monotonic()
    with pytest.raises(GroupError, match="joining"):
        nccl(dist.HashStore(), 0, 2, timeout_s=3)
    assert time.monotonic() - began < 30


def test_an_exchange_can_be_captured_and_replayed(device):
    pytest.importorskip("cupy")
    group = nccl(dist.HashStore(), 0, 1, timeout_s=60)
    x, y = torch.zeros(4, 2, device=device), torch.zeros(4, 2, device=device)
    group.all_to_all(y, x, [4], [4])
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        group.all_to_all(y, x, [4], [4])
        group.all_reduce(y)
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        assert y.sum().item() == 8 * value
    del graph
    group.close()
