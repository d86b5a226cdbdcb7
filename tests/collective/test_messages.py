"""Messages between two ranks, over every group that can stand on this machine: what arrives, and what never does."""

import time

import pytest
import torch

from ray_ep.collective import EpochGroup, SoloGroup, StagedGroup
from ray_ep.collective.gloo_group import SHARED_BYTES
from ray_ep.collective.probe import measure
from ray_ep.errors import BadInput, GroupError


class Sockets:
    """Makes a gloo group forget the memory that it shares."""

    def __new__(cls, group):
        group._near, group._here = [False] * group.size, None
        return group


OVER = {
    "shared memory": lambda group: group,
    "sockets": Sockets,
    "staged": StagedGroup,
    "epoch": EpochGroup,
    "epoch of staged": lambda group: EpochGroup(StagedGroup(group)),
}


@pytest.fixture(params=OVER)
def over(request):
    return OVER[request.param]


@pytest.mark.parametrize("size", [1, SHARED_BYTES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.uint8])
def test_a_message_arrives_in_any_tensor_while_a_third_rank_does_nothing(ranks, over, dtype, size):
    def work(inner):
        g = over(inner)
        x = torch.arange(3 * size).view(size, 3).to(dtype)
        if g.rank == 0:
            g.send(x, 2, 20.0)
            g.send(x.t(), 2)  # not contiguous
        elif g.rank == 2:
            y, z = torch.zeros_like(x), torch.zeros_like(x).t()
            g.receive(y, 0, 20.0)
            g.receive(z, 0)
            g.wait()
            assert torch.equal(y, x)
            assert torch.equal(z, x.t())
        g.barrier()

    ranks(3, work)


@pytest.mark.parametrize("size", [1, SHARED_BYTES])
def test_a_message_that_does_not_come_in_time_names_its_partner_and_ends_the_group(ranks, over, size):
    def work(inner):
        g, began = over(inner), time.monotonic()
        if g.rank == 1:
            with pytest.raises(GroupError, match=r"rank 1: .* rank 0\b.*"):
                g.receive(torch.empty(size, dtype=torch.uint8), 0, 0.3)
            took = time.monotonic() - began
            with pytest.raises(GroupError, match="closed or aborted"):
                g.barrier()
            return took
        return None

    assert 0.2 < ranks(2, work, timeout_s=30.0, groups={})[1] < 10


@pytest.mark.parametrize("partner", [0, 2, -1])
def test_a_message_goes_to_another_rank_of_the_group_alone(ranks, over, partner):
    def work(inner):
        g = over(inner)
        if g.rank == 0:
            for call in (g.send, g.receive):
                with pytest.raises(BadInput, match=rf"rank 0: a message to or from rank {partner}; allowed are 1$"):
                    call(torch.zeros(1), partner)
        g.barrier()  # it lives on

    ranks(2, work)


def test_a_group_of_one_rank_has_nobody_to_send_to_and_no_links():
    for group in (SoloGroup(), EpochGroup(SoloGroup())):
        with pytest.raises(BadInput, match="allowed are none: it is alone"):
            group.send(torch.zeros(1), 0)
        assert measure(group, [0]).num_ranks == 1


def test_links_are_probed_over_every_group(ranks, over):
    def work(inner):
        g = over(inner)
        topology = measure(g, [0, 0, 1], budget_s=0.1)
        total = torch.ones(1)
        g.all_reduce(total)
        return topology, total.item()

    found = ranks(3, work)
    assert len({topology.to_json() for topology, _ in found}) == 1
    assert found[0][0].measured.sum() == 6
    assert [total for _, total in found] == [3.0] * 3
