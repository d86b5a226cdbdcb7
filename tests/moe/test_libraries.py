"""The library that multiplies is timed where the exchange is chosen, alike on all ranks, and kept with the choice."""

import copy
import importlib.util
import json

import pytest
import torch

import ray_ep
from ray_ep.moe import choose, settle
from ray_ep.moe.cpu import gemm
from ray_ep.moe.cpu.gemm import LIBRARIES, has_onednn
from ray_ep.moe.cpu.measure import Shapes, time_libraries
from tests.models import build

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch carries no oneDNN")


def ticking(*seconds):
    """A clock by which works that are timed in turn take `seconds`, whatever they take."""

    def ticks():
        now = 0.0
        yield now
        while True:
            for s in seconds:
                yield now
                now += s
                yield now
            yield now

    return ticks().__next__


def shapes(dtype):
    return Shapes(gate_up=(24, 8), down=(8, 12), rows=5, dtype=dtype, backward=True)


@needs_onednn
def test_the_least_seconds_of_the_slowest_rank_count_on_every_rank(ranks):
    clocks = [(1.0, 0.5), (2.0, 3.0)]

    def work(group):
        timings = time_libraries(shapes(torch.float32), group, ticking(*clocks[group.rank]), 100.0)
        return {t.library: t.seconds for t in timings}

    assert ranks(2, work) == [{"torch": 2.0, "onednn": 3.0}] * 2


def test_a_library_that_a_rank_lacks_is_never_the_fastest(ranks, monkeypatch):
    from ray_ep.moe.cpu import measure

    monkeypatch.setattr(measure, "has_onednn", lambda: False)
    timings = ranks(1, lambda g: time_libraries(shapes(torch.float32), g, ticking(1.0, 0.1), 100.0))[0]
    assert [t.seconds for t in timings] == [1.0, float("inf")]


@pytest.mark.parametrize("backward", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", LIBRARIES)
def test_a_choice_takes_the_same_library_on_all_ranks_and_keeps_the_timings(ranks, dtype, backward):
    model = build("qwen3_moe", dtype=dtype, num_hidden_layers=1)

    def work(group):
        ep = ray_ep.moe.parallelize(copy.deepcopy(model), group).ray_ep
        draw = torch.Generator().manual_seed(group.rank)
        index = torch.rand(9, 8, generator=draw).topk(3).indices
        tokens = torch.randn(9, 32, generator=draw).to(dtype), index, torch.rand(9, 3, generator=draw).to(dtype)
        with ep.inference():
            choice = choose(ep, tokens, 0, {"gloo": group}, backward=backward, budget_s=0.01)
        assert choice.libraries[0].library == ep.gemm.library[dtype]
        return json.loads(json.dumps(choice.to_dict()))["libraries"], ep.gemm.reuse[dtype]

    (first, reuse), other = ranks(2, work)
    assert other == (first, reuse)
    names = {t["library"] for t in first}
    assert set(LIBRARIES[dtype]) <= names
    assert all(t["seconds"] > 0 and t["rounds"] > 0 for t in first)


def test_a_pinned_way_times_the_libraries_too_and_small_experts_or_other_layouts_none(ranks, monkeypatch):
    def libraries(group, name):
        ep = ray_ep.moe.parallelize(build(name), group).ray_ep
        return settle(ep, "flat", {"gloo": group}, rows=4).libraries

    assert len(ranks(2, lambda g: libraries(g, "qwen3_moe"))[1]) == 2
    assert ranks(2, lambda g: libraries(g, "gpt_oss")) == [[], []]
    monkeypatch.setattr(gemm, "_LARGE", 1 << 18)
    assert ranks(1, lambda g: libraries(g, "qwen3_moe")) == [[]]


def test_importing_reads_nothing_from_the_machine(monkeypatch):
    def asked(*args):
        raise AssertionError("asked at import")

    monkeypatch.setattr(torch.cpu, "get_capabilities", asked)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", asked)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", asked)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", asked)
    spec = importlib.util.spec_from_file_location("once_more", gemm.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with pytest.raises(AssertionError, match="asked at import"):
        gemm.has_onednn()
