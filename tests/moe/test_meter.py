"""Time of phases on a device, which the host does not wait for; on a CUDA that is not there."""

import time
from functools import partial

import numpy as np
import pytest
import torch

from ray_ep.moe.exchange.meter import PHASES, Meter, MeteredGroup
from ray_ep.rank.step.before import _contents
from ray_ep.rank.step.clock import StepClock
from tests.fake_cuda import fake_cuda, host_syncs, nccl_ranks

LATE_S = 0.6


@pytest.fixture(autouse=True)
def _cuda():
    with fake_cuda():
        yield


def new_meter(ranks=2):
    meter = Meter(np.zeros(ranks, np.int64), np.zeros(1, np.int64))
    meter.to(torch.device("cuda", 0))
    return meter


def late_exchange(g, work, times=1):
    """work(meter, exchange) on rank 0, where exchange() is enqueued long before rank 1 takes part; its result."""
    meter, rows = new_meter(), torch.ones(2, 3, device="cuda")
    exchange = partial(MeteredGroup(g, meter).all_to_all, rows, [1, 1], [1, 1])
    if g.rank == 1:
        time.sleep(LATE_S)
        return [exchange() for _ in range(times)]
    found = work(meter, exchange)
    torch.cuda.synchronize()
    return found


def test_an_exchange_takes_what_the_device_waits_and_counts_once_that_is_over_without_a_host_sync():
    def work(g):
        def measured(meter, exchange):
            with host_syncs() as syncs:
                meter.enter("pack")
                exchange()
                meter.enter("")
                soon = dict(meter.seconds)
            torch.cuda.synchronize()
            return syncs, soon, dict(meter.seconds)

        return late_exchange(g, measured)

    syncs, soon, later = nccl_ranks(2, work)[0]
    assert syncs == []
    assert soon["exchange"] == 0  # the host was there before the peer
    assert later["exchange"] > LATE_S / 2
    assert later["pack"] < LATE_S / 2
    assert later["experts"] == 0


def test_a_phase_ends_on_the_stream_where_it_began_though_another_is_current_by_then():
    def work(g):
        def measured(meter, exchange):
            part = torch.cuda.Stream()
            part.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(part):
                exchange()  # as a part of the tokens does
                meter.enter("experts")
            meter.enter("combine")  # of another part, whose stream waits for nothing
            meter.enter("")
            soon = dict(meter.seconds)
            torch.cuda.synchronize()
            return soon, dict(meter.seconds)

        return late_exchange(g, measured)

    soon, later = nccl_ranks(2, work)[0]
    assert soon == dict.fromkeys(PHASES, 0.0)  # in order: what has ended waits behind what has not
    assert later["exchange"] > LATE_S / 2
    assert 0 <= later["experts"] < LATE_S / 2
    assert 0 <= later["combine"] < LATE_S / 2


def test_while_a_graph_is_captured_nothing_is_timed(monkeypatch):
    meter = new_meter()
    clock = StepClock(meter.seconds, device=meter)
    meter.enter("experts")
    clock.enter("forward")
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        m.setattr(torch.cuda, "Event", pytest.fail)
        assert meter.enter("combine") == "experts"
        assert meter.enter("") == "combine"
        clock.enter("backward")
    time.sleep(0.5)
    meter.enter("pack")
    meter.enter("")
    clock.enter("")
    assert max(meter.seconds.values()) < 0.4
    assert max(clock.seconds.values()) < 0.4


def test_a_step_has_its_layers_time_by_direction_though_all_of_it_ends_later():
    def work(g):
        def measured(meter, exchange):
            clock = StepClock(meter.seconds, device=meter)
            clock.enter("forward")
            exchange()
            clock.enter("backward")
            clock.enter("")
            soon = dict(clock.seconds)
            torch.cuda.synchronize()
            _ = meter.seconds
            return soon, clock.seconds

        return late_exchange(g, measured)

    soon, later = nccl_ranks(2, work)[0]
    assert set(soon.values()) == {0.0}
    assert later["exchange_forward"] > LATE_S / 2
    assert abs(later["forward"]) < LATE_S / 4  # without its layers
    assert abs(later["backward"]) < LATE_S / 4
    assert later["exchange_backward"] == 0


def test_of_a_half_step_that_is_undone_nothing_counts_later_and_what_was_under_way_before_it_does():
    def work(g):
        def measured(meter, exchange):
            began = time.perf_counter()
            exchange()
            undo = _contents(meter)
            meter.enter("experts")
            exchange()
            meter.enter("")
            undo()
            torch.cuda.synchronize()
            return dict(meter.seconds), time.perf_counter() - began

        return late_exchange(g, measured, times=2)

    later, took = nccl_ranks(2, work)[0]
    assert later["experts"] == 0
    assert LATE_S / 2 < later["exchange"] <= took
