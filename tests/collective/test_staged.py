"""Tensors that travel through buffers elsewhere; here the buffers are forced, on a GPU they are needed."""

import threading
import time

import pytest
import torch

from ray_ep.collective import StagedGroup
from ray_ep.collective.cupy_nccl import library
from ray_ep.collective.device import check_sizes, cuda_device, here, in_time, writable
from ray_ep.collective.torch_nccl import check_torch_nccl
from ray_ep.errors import BadInput, GroupError
from tests.models import VOCAB, build, even_shards, parallel_pass, placement_of, reference

CPU = torch.device("cpu")


def scattered(rows, columns):
    """A tensor that is not contiguous, so that it has to go through a buffer."""
    return torch.zeros(columns, rows).t()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_call_reads_from_and_writes_to_tensors_that_need_a_buffer(ranks, size):
    def work(inner):
        g = StagedGroup(inner)
        assert (g.rank, g.size, g.epoch, g.members) == (inner.rank, inner.size, inner.epoch, inner.members)
        mine, came = scattered(size, 2), scattered(size, 2)
        mine[:, 0], mine[:, 1] = g.rank, torch.arange(size)
        g.all_to_all(came, mine, [1] * size, [1] * size)
        assert came.tolist() == [[r, g.rank] for r in range(size)]
        total = scattered(2, 3) + g.rank
        g.all_reduce(total)
        assert total.tolist() == [[sum(range(size))] * 3] * 2
        value = scattered(2, 3) + g.rank
        g.broadcast(value, size - 1)
        assert value.tolist() == [[size - 1] * 3] * 2
        assert g.all_gather(value).shape == (size, 2, 3)
        sub = g.split(g.rank % 2)
        assert sub.members == [r for r in range(size) if r % 2 == g.rank % 2]
        sub.all_reduce(total, "max")
        g.wait()
        g.barrier()

    ranks(size, work)


def test_a_model_over_staged_ranks_and_the_general_layer_equals_one_process(ranks):
    model = build("qwen3_moe")
    ids = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))
    loss, logits, grads = reference(model, ids)
    placement = placement_of(model, "replicated", 2)

    def general(parallel):
        parallel.ray_ep.exchange_by(fused=False)  # as on a GPU

    def work(inner):
        return parallel_pass(model, ids, StagedGroup(inner), placement, even_shards(5, 2), general)

    results = ranks(2, work)
    assert (torch.cat([r[2] for r in results]) - logits).abs().max() <= 1e-5
    for _, total, _, got in results:
        assert abs(total - loss) <= 1e-5
        assert all((got[n] - g).abs().max() <= 1e-5 for n, g in grads.items())


def test_abort_passes_through(ranks):
    def work(inner):
        g = StagedGroup(inner)
        if g.rank == 0:
            threading.Timer(0.3, g.abort).start()
            with pytest.raises(GroupError, match="aborted"):
                g.barrier()
        else:
            time.sleep(1)

    ranks(2, work, timeout_s=5, groups={})


def test_a_contiguous_tensor_on_the_device_is_its_own_buffer():
    x = torch.zeros(2, 3)
    assert here(x, CPU).data_ptr() == x.data_ptr()
    with writable(x, CPU, pytest.fail) as buffer:  # no copy to wait for
        assert buffer.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("output_sizes", "input_sizes", "input", "message"),
    [
        ([1, 1], [1, 2], torch.empty(2, 3), r"input: sizes \[1, 2\] do not divide 2 rows"),
        ([1, 1], [3, -1], torch.empty(2, 3), r"input: sizes \[3, -1\]"),
        ([2], [1, 1], torch.empty(2, 3), r"output: sizes \[2\]"),
        ([1, 1], [1, 1], torch.empty(2, 4), r"rows of the output .*\(3,\).* input .*\(4,\)"),
        ([1, 1], [1, 1], torch.empty(2, 3, dtype=torch.int32), "int32"),
    ],
)
def test_sizes_that_would_write_beyond_a_tensor_are_refused(output_sizes, input_sizes, input, message):
    with pytest.raises(BadInput, match=message):
        check_sizes(torch.empty(2, 3), input, output_sizes, input_sizes, 2)


def test_a_call_that_never_returns_ends_in_an_error_in_time():
    never, began = threading.Event(), time.monotonic()
    with pytest.raises(GroupError, match=r"connecting: not within 0\.3 s"):
        in_time(never.wait, 0.3, "connecting")
    with pytest.raises(GroupError, match="connecting: aborted"):
        in_time(never.wait, 60, "connecting", lambda: time.monotonic() - began > 0.5)
    assert time.monotonic() - began < 30
    never.set()
    assert in_time(lambda: 7, 5, "adding") == 7
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 // 0, 5, "dividing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("need", [library, check_torch_nccl, lambda: cuda_device("cuda:0")])
def test_without_cuda_the_nccl_groups_say_what_is_missing(need):
    with pytest.raises(BadInput, match="no GPU can be used here"):
        need()
