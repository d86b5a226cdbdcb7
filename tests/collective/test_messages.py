"""Messages between two ranks, over every group that can stand on this machine: what arrives, and what never does.

Those on GPUs stand on a CUDA that is not there.
"""

import threading
import time
from contextlib import nullcontext, suppress

import pytest
import torch

from ray_ep.collective import EpochGroup, SoloGroup, StagedGroup, TorchNcclGroup
from ray_ep.collective.gloo_group import SHARED_BYTES
from ray_ep.collective.probe import measure
from ray_ep.errors import BadInput, GroupError
from tests.conftest import run_ranks
from tests.fake_cuda import fake_cuda, host_syncs, nccl_ranks


def without_shared_memory(group):
    group._near, group._here = [False] * group.size, None
    return group


def over_nccl(size, work, timeout_s=30.0, groups=None):
    return nccl_ranks(size, work, timeout_s)


class Work:
    """`wait` puts the host where NCCL's puts the stream: behind the work, or behind the group's abort."""

    def __init__(self, works, aborted):
        self.done, self.aborted = threading.Event(), aborted
        self.is_completed = self.done.is_set
        threading.Thread(target=self.finish, args=(works,), daemon=True).start()

    def finish(self, works):
        with suppress(RuntimeError):  # the connection has gone
            for work in works:
                work.wait()
            self.done.set()

    def wait(self):
        while not (self.done.wait(0.002) or self.aborted.is_set()):
            pass


class LikeNccl:
    """A process group that keeps to what torch's over NCCL does with an all-to-all: ranks without rows take no part."""

    def __init__(self, gloo):
        self.gloo, self.aborted = gloo, threading.Event()
        self.abort = self.aborted.set

    def alltoall_base(self, output, input, taken, given):
        works, parts = [], [x.split(sizes) for x, sizes in ((input, given), (output, taken))]
        for method, of_ranks in zip((self.gloo.send, self.gloo.recv), parts, strict=True):
            others = [(r, part) for r, part in enumerate(of_ranks) if r != self.gloo.rank()]
            works += [method([part], r, 0) for r, part in others if len(part)]
        parts[1][self.gloo.rank()].copy_(parts[0][self.gloo.rank()])
        return Work(works, self.aborted)

    def allreduce(self, tensors, options):
        return Work([self.gloo.allreduce(tensors, options)], self.aborted)

    def _allgather_base(self, output, input):
        sizes = [len(input)] * self.gloo.size()
        return self.alltoall_base(output, input.repeat(len(sizes)), sizes, sizes)


def over_torch_nccl(group):
    return TorchNcclGroup(LikeNccl(group._pg), group.rank, group.size, timeout_s=group.timeout_s)


# name: (ranks, what wraps their group, where tensors lie)
OVER = {
    "shared memory": (run_ranks, lambda group: group, "cpu"),
    "sockets": (run_ranks, without_shared_memory, "cpu"),
    "epoch": (run_ranks, EpochGroup, "cpu"),
    "staged": (run_ranks, StagedGroup, "cuda"),
    "nccl": (over_nccl, lambda group: group, "cuda"),
    "torch_nccl": (run_ranks, over_torch_nccl, "cuda"),
    "epoch of nccl": (over_nccl, EpochGroup, "cuda"),
}


class Over:
    def __init__(self, ranks, wrap, device):
        self._ranks, self._wrap, self.device = ranks, wrap, device

    def ranks(self, size, work, **options):
        return self._ranks(size, lambda group: work(self._wrap(group)), **options)


@pytest.fixture(params=OVER)
def over(request):
    with nullcontext() if OVER[request.param][2] == "cpu" else fake_cuda():
        yield Over(*OVER[request.param])


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.bfloat16), (SHARED_BYTES, torch.int64)])
def test_a_message_arrives_in_any_tensor_while_a_third_rank_does_nothing(over, dtype, size):
    def work(g):
        x = torch.arange(3 * size).view(size, 3).to(over.device, dtype)
        if g.rank == 0:
            g.send(x, 2, 20.0)
            g.send(x.t(), 2)  # not contiguous
        elif g.rank == 2:
            y, z = torch.zeros_like(x), torch.zeros_like(x.t())
            g.receive(y, 0, 20.0)
            g.receive(z, 0)
            g.wait()
            assert torch.equal(y, x)
            assert torch.equal(z, x.t())
        g.barrier()

    over.ranks(3, work)


@pytest.mark.parametrize("size", [1, SHARED_BYTES])
def test_a_message_that_does_not_come_in_time_names_its_partner_and_ends_the_group(over, size):
    over_yet = threading.Event()

    def received(g):
        g.receive(torch.empty(size, dtype=torch.uint8, device=over.device), 0, 0.2)
        g.wait()

    def work(g):
        if g.rank == 0:
            return over_yet.wait(20)  # it is there, and says nothing
        began = time.monotonic()
        with pytest.raises(GroupError, match=r"^rank 1: .* rank 0\b"):
            received(g)
        took = time.monotonic() - began
        with pytest.raises(GroupError, match="closed or aborted"):
            g.barrier()
        over_yet.set()
        return took

    assert 0.1 < over.ranks(2, work, timeout_s=30.0, groups={})[1] < 5


@pytest.mark.parametrize("partner", [0, 2, -1])
def test_a_message_goes_to_another_rank_of_the_group_alone(over, partner):
    def work(g):
        if g.rank == 0:
            for call in (g.send, g.receive):
                with pytest.raises(BadInput, match=rf"rank 0: a message to or from rank {partner}; allowed are 1$"):
                    call(torch.zeros(1, device=over.device), partner)
        g.barrier()  # it lives on

    over.ranks(2, work)


def test_a_group_of_one_rank_has_nobody_to_send_to_and_no_links():
    for group in (SoloGroup(), EpochGroup(SoloGroup())):
        with pytest.raises(BadInput, match="allowed are none: it is alone"):
            group.send(torch.zeros(1), 0)
        assert measure(group, [0]).num_ranks == 1


def test_links_are_probed_over_every_group(over):
    def work(g):
        topology = measure(g, [0, 0, 1], budget_s=0.1, device=over.device)
        total = torch.ones(1, device=over.device)
        g.all_reduce(total)
        return topology, total.item()

    found = over.ranks(3, work)
    assert len({topology.to_json() for topology, _ in found}) == 1
    assert found[0][0].measured.sum() == 6
    assert [total for _, total in found] == [3.0] * 3


def test_a_message_between_devices_does_not_make_the_host_wait_and_its_lateness_reaches_a_host_that_only_reads():
    over_yet = threading.Event()

    def work(g):
        x = torch.zeros(4, device="cuda")
        with host_syncs() as syncs:
            (g.send if g.rank == 0 else g.receive)(x, 1 - g.rank, 5.0)
        if g.rank == 0:
            over_yet.wait(20)
            return syncs
        g.receive(x, 0, 0.2)
        x.tolist()  # would wait for ever
        with pytest.raises(GroupError, match=r"no message from rank 0 within 0\.2 s"):
            g.wait()
        over_yet.set()
        return syncs

    with fake_cuda():
        assert nccl_ranks(2, work) == [[], []]
