"""The CUDA that is not there refuses what CUDA refuses, notes where the host waits, and finds uses without an order."""

import copy
import threading

import pytest
import torch

from tests.fake_cuda import fake_cuda, host_syncs
from tests.fake_streams import Race


@pytest.fixture(autouse=True)
def _cuda():
    with fake_cuda():
        yield


def there(*values):
    return torch.tensor(values or [1.0, 2.0, 3.0], device="cuda")


def test_tensors_are_where_they_were_put_and_results_where_their_inputs_are():
    x = there()
    for tensor in (x, x[1:] + 1, x.cpu().cuda(), torch.zeros_like(x), x.new_zeros(2), torch.ones(2).to(x), x.detach()):
        assert (tensor.device, tensor.is_cuda) == (torch.device("cuda", 0), True)
    for tensor in (
        x.cpu(),
        x.to("cpu"),
        torch.zeros(3),
        torch.zeros_like(x, device="cpu"),
        x.new_zeros(2, device="cpu"),
    ):
        assert (tensor.device.type, tensor.is_cuda) == ("cpu", False)
    layer = torch.nn.Linear(2, 2).to("cuda")
    assert copy.deepcopy(layer).weight.is_cuda
    y = x.clone().requires_grad_()
    (y.cpu() * torch.ones(3)).sum().backward()
    assert y.grad.is_cuda


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: torch.stack([x[0], torch.tensor(1.0)]),
        lambda x: torch.ones(3)[x.long() - 1],
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.nn.functional.linear(x, torch.ones(2, 3)),
        lambda x: x.index_add_(0, torch.tensor([0]), x[:1]),
        lambda x: torch.ones(3).__setitem__(slice(0, 2), x[:2]) or torch.ones(3).__setitem__([0], x[:1]),
    ],
)
def test_an_operation_on_tensors_of_both_devices_is_refused(mix):
    with pytest.raises(RuntimeError, match="some on cpu, some on cuda:0"):
        mix(there())


def test_numbers_of_the_host_mix_with_the_device():
    assert (there() * torch.tensor(2.0) + 1).tolist() == [3, 5, 7]


@pytest.mark.parametrize("read", [lambda x: x.numpy(), lambda x: __import__("numpy").asarray(x)])
def test_numpy_cannot_see_the_device(read):
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        read(there())


WAITS = [
    ("item", lambda x: x[0].item()),
    ("item", lambda x: bool(x[0] > 0)),
    ("item", lambda x: [0, 1, 2, 3][x[0].long()]),
    ("tolist", lambda x: x.tolist()),
    ("copy to the host", lambda x: x.cpu()),
    ("copy to the host", lambda x: torch.empty(3).copy_(x, non_blocking=True)),
    ("copy to the host", lambda x: torch.empty(3, pin_memory=True).copy_(x)),
    ("copy to the device", lambda x: torch.ones(3).to("cuda", non_blocking=True)),
    ("copy to the device", lambda x: torch.ones(3).pin_memory().to("cuda")),
    ("values of the host", lambda x: torch.tensor([1], device="cuda")),
    ("nonzero", lambda x: x.nonzero()),
    ("nonzero", lambda x: torch.where(x > 1)),
    ("index by a mask", lambda x: x[x > 1]),
    ("index_put_ by a mask", lambda x: x.__setitem__(x > 1, x[1:].clone())),
    ("index by indices of the host", lambda x: x[[0, 1]]),
    ("bincount", lambda x: torch.bincount(x.long())),
    ("repeat_interleave", lambda x: torch.repeat_interleave(x, x.long())),
    ("masked_select", lambda x: x.masked_select(x > 1)),
    ("unique", lambda x: x.unique()),
    ("equal", lambda x: torch.equal(x, x)),
    ("torch.cuda.synchronize", lambda x: torch.cuda.synchronize()),
    ("stream.synchronize", lambda x: torch.cuda.current_stream().synchronize()),
    ("event.synchronize", lambda x: torch.cuda.current_stream().record_event().synchronize()),
]


@pytest.mark.parametrize(("kind", "wait"), WAITS)
def test_the_host_waits_once_and_it_is_noted_where(kind, wait):
    x = there()
    with host_syncs() as syncs:
        wait(x)
    ((noted, where),) = syncs
    assert noted == kind
    assert where.startswith("test_fake_cuda.py:")


def test_the_host_does_not_wait_for_what_stays_on_the_device_or_travels_beside_it():
    x, host = there(), torch.empty(3, pin_memory=True)
    with host_syncs() as syncs:
        x[x > 1] = 0.0
        torch.repeat_interleave(x, torch.ones_like(x).long(), output_size=3)
        torch.zeros(3, device="cuda").scatter_add_(0, x.long(), x)
        host.copy_(x, non_blocking=True)
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        event = torch.cuda.current_stream().record_event()
        assert [event.query() for _ in range(2)] == [False, True]  # a GPU is rarely done at the first question
        torch.full((2,), 3, device="cuda")
    assert syncs == []
    assert host.tolist() == [1, 0, 0]


def test_torchs_debug_mode_for_syncs_raises_and_warns():
    x = there()
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        x.tolist()
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="called a synchronizing CUDA operation"):
        x.tolist()
    torch.cuda.set_sync_debug_mode("default")
    assert x.tolist() == [1, 2, 3]


def test_events_measure_the_time_between_them_once_they_have_passed():
    stream = torch.cuda.current_stream()
    first, last, plain = (torch.cuda.Event(enable_timing=timing) for timing in (True, True, False))
    with pytest.raises(ValueError, match="recorded"):
        first.elapsed_time(last)
    [event.record(stream) for event in (first, plain, last)]
    with pytest.raises(RuntimeError, match="not ready"):
        first.elapsed_time(last)
    last.synchronize()
    assert 0 <= first.elapsed_time(last) < 1000
    with pytest.raises(ValueError, match="enable_timing"):
        first.elapsed_time(plain)


def test_a_pinned_copy_must_have_arrived_before_the_host_reads_it():
    host = torch.empty(3, pin_memory=True).copy_(there(), non_blocking=True)
    for read in (lambda: host.tolist(), lambda: host.numpy(), lambda: host + 1):
        with pytest.raises(Race, match=r"(tolist|numpy|add) on host thread .* reads memory"):
            read()
    torch.cuda.synchronize()
    assert host.tolist() == [1, 2, 3]


def test_a_pinned_source_must_not_change_before_it_has_left():
    host = torch.ones(3).pin_memory()
    host.to("cuda", non_blocking=True)
    with pytest.raises(Race, match=r"fill_ on host thread .* writes memory that stream .* has read"):
        host.fill_(2)


def test_a_stream_reads_what_another_wrote_only_after_waiting_for_it():
    side, x = torch.cuda.Stream(), there()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    for late in (lambda: y + 1, lambda: y[1:].tolist(), lambda: y.cpu()):
        with pytest.raises(Race, match=r"reads memory that stream .* has written at test_fake_cuda.py:"):
            late()
    torch.cuda.current_stream().wait_event(side.record_event())
    assert (y + 1).tolist() == [3, 5, 7]


def test_a_stream_overwrites_what_another_read_only_after_waiting_for_it():
    side, x = torch.cuda.Stream(), there()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    with pytest.raises(Race, match=r"writes memory that stream .* has read at"):
        x.zero_()
    torch.cuda.current_stream().wait_stream(side)
    x.zero_()
    assert y.tolist() == [2, 4, 6]


def test_parts_of_one_tensor_are_apart():
    x, side = torch.zeros(4, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    x[:2].fill_(1)
    with torch.cuda.stream(side):
        x[2:].fill_(2)
        with pytest.raises(Race):
            x[1:].fill_(3)
    torch.cuda.current_stream().wait_stream(side)
    assert x.tolist() == [1, 1, 2, 2]


def test_memory_that_another_stream_still_uses_is_taken_again_only_after_record_stream():
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()

    def use(recorded):
        x = there()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            x + 1
        if recorded:
            x.record_stream(side)

    use(recorded=True)
    there()
    use(recorded=False)
    with pytest.raises(Race, match="without record_stream"):
        there()


def test_waiting_for_an_event_that_was_recorded_before_orders_nothing():
    side, x = torch.cuda.Stream(), there()
    side.wait_stream(torch.cuda.current_stream())
    early = side.record_event()
    with torch.cuda.stream(side):
        x.mul_(2)
    torch.cuda.current_stream().wait_event(early)
    with pytest.raises(Race):
        x + 1


def test_backward_runs_on_the_streams_of_forward_and_waits_between_them():
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    x, seen = there().requires_grad_(), []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch.cuda.current_stream())
            return 2 * gradient

    side.wait_stream(main)
    with torch.cuda.stream(side):
        y = Twice.apply(x * 3)
    main.wait_stream(side)
    with pytest.warns(UserWarning, match="AccumulateGrad node's stream does not match"):  # as torch's engine does
        (y + x + Twice.apply(x)).sum().backward()
    assert seen == [main, side]  # the latest node first
    assert torch.cuda.current_stream() == main
    assert x.grad.tolist() == [9, 9, 9]


def test_a_backward_that_reads_beside_the_graph_must_wait_itself():
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    x = there().requires_grad_()

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            with torch.cuda.stream(side):  # which has not waited for the gradient
                return gradient * 2

    y = Careless.apply(x)
    side.wait_stream(main)
    with pytest.raises(Race, match="mul on stream"):
        y.sum().backward()


def test_a_gradient_that_nobody_gave_is_made_on_the_device():
    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1, x * 2

        @staticmethod
        def backward(ctx, first, second):
            return first + second

    x = there().requires_grad_()
    Two.apply(x)[0].sum().backward()
    assert x.grad.tolist() == [1, 1, 1]


def test_a_thread_is_of_the_process_that_started_it():
    x, seen = there(), []
    thread = threading.Thread(target=lambda: seen.append((torch.cuda.current_stream(), (x + 1).is_cuda)))
    thread.start()
    thread.join()
    assert seen == [(torch.cuda.current_stream(), True)]


def test_nothing_is_left_of_it():
    before = {**vars(torch.Tensor)}
    with fake_cuda():
        assert torch.cuda.is_available()
    assert vars(torch.Tensor) == before
