"""What each way through a layer counts and times: every pair once where it is computed, every phase under its name."""

import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ray_ep
from ray_ep.collective import SoloGroup
from ray_ep.moe import PHASES
from ray_ep.moe.exchange.ways import KINDS
from tests.conftest import slow
from tests.models import VOCAB, build, even_shards, parallel_pass, placement_of

IDS = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))
NODES = np.array([0, 0, 1])
BODIES = {"fused": ("qwen3_moe", True), "grouped": ("qwen3_moe", False), "biased": ("gpt_oss", True)}
"""By name: a model, and whether the fused body may be used. Where it is not, all_gather is the bounded way."""

table = pytest.mark.parametrize(("way", "body"), [(w, b) for w in KINDS for b in BODIES])


def set_up(way, body, chunks=1, checkpoint=False, guests=False):
    def before(model):
        ep = model.ray_ep
        ep.exchange_by(kind=way, chunks=chunks, fused=BODIES[body][1])
        if guests:
            ep.balancer.assume(seconds_per_pair=1.0, bandwidth=1e18)  # for nothing: tiny models have them
        else:
            ep.balancer.active = False
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()

    return before


def pairs(model, results):
    """[L] of all ranks, and what they ought to be."""
    return sum(r[0].ray_ep.meter.pairs for r in results).tolist(), [
        IDS.numel() * model.config.num_experts_per_tok
    ] * model.config.num_hidden_layers


SITUATIONS = {
    "every rank has tokens": ({}, "replicated", None),
    "a rank has none, another no experts": ({}, "empty_rank", [0, 0, 2, 5]),
    "in chunks": ({"chunks": 3}, "shuffled", [0, 0, 1, 5]),
    "recomputed": ({"checkpoint": True}, "shuffled", [0, 2, 5, 5]),
    "with guests": ({"guests": True}, "contiguous", None),
    "with guests, recomputed": ({"guests": True, "checkpoint": True}, "contiguous", None),
}
FEW = ("every rank has tokens", "a rank has none, another no experts", "with guests, recomputed")


@table
@pytest.mark.parametrize("situation", [*FEW, *slow(*sorted(SITUATIONS.keys() - set(FEW)))])
def test_pairs_of_all_ranks_are_tokens_by_top_k_once_a_layer_and_pass(ranks, way, body, situation):
    model = build(BODIES[body][0])
    options, kind, shards = SITUATIONS[situation]
    placement, shards = placement_of(model, kind, 3), shards or even_shards(5, 3)
    before = set_up(way, body, **options)
    results = ranks(3, lambda g: parallel_pass(model, IDS, g, placement, shards, before, node_of=NODES))
    counted, expected = pairs(model, results)
    assert counted == expected
    if kind == "empty_rank":
        assert not results[2][0].ray_ep.meter.pairs.any()
    if options.get("guests") and way != "all_gather":
        assert results[0][0].ray_ep.balancer.done.guests > 0


@table
def test_a_pass_in_which_no_rank_has_tokens_counts_none_and_has_a_backward(ranks, way, body):
    model = build(BODIES[body][0])

    def work(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, "empty_rank", 2))
        set_up(way, body)(m)
        with m.ray_ep.idle():
            (0 * m(input_ids=IDS[:1, :2], use_cache=False).logits.sum()).backward()
        assert all(p.grad is None or not p.grad.any() for p in m.parameters())
        return m.ray_ep.meter

    for meter in ranks(2, work):
        assert meter.pairs.tolist() == [0, 0]
        assert meter.enter("") == ""


@table
def test_passes_add_up_with_a_trace_or_packed_weights_and_without_gradients(ranks, way, body):
    model = build(BODIES[body][0])

    def work(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, "replicated", 2))
        set_up(way, body)(m)
        part = IDS[:2] if group.rank else IDS[2:]
        with torch.no_grad():
            m(input_ids=part, use_cache=False)
            with m.ray_ep.inference():
                m(input_ids=part, use_cache=False)
            with m.ray_ep.tracing() as trace:
                m(input_ids=part, use_cache=False)
        served = [np.bincount(passes[0][1].flatten(), minlength=2) for passes in trace]
        return m, np.stack(served, 1)  # [ranks, L]

    results = ranks(2, work)
    counted, expected = pairs(model, results)
    assert counted == [3 * n for n in expected]
    assert sum(r[1] for r in results).sum(0).tolist() == expected


class Products(TorchDispatchMode):
    """The phase that a meter is in at each product of matrices."""

    NAMES = ("aten::mm", "aten::addmm", "aten::_grouped_mm", "transformers::grouped_mm", "mkldnn::_linear_pointwise")

    def __init__(self, meter):
        super().__init__()
        self.meter, self.phases = meter, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0].startswith(self.NAMES):
            self.phases.append(now(self.meter))
        return func(*args, **(kwargs or {}))


def now(meter):
    phase = meter.enter("")
    meter.enter(phase)
    return phase


def listen(group, meter):
    """The phase of each exchange of a group from here on, and the bytes to each rank; agreed sizes (int64) left out."""
    phases, wire = [], np.zeros(group.size, np.int64)
    to_all, gather = type(group).all_to_all, type(group).all_gather

    def all_to_all(output, input, output_sizes, input_sizes):
        phases.append(now(meter))
        if input.dtype != torch.int64:
            wire[:] += [n and n * input[0].nbytes for n in input_sizes]
        to_all(group, output, input, output_sizes, input_sizes)

    def all_gather(input):
        phases.append(now(meter))
        wire[:] += input.nbytes
        return gather(group, input)

    group.all_to_all, group.all_gather = all_to_all, all_gather
    return phases, wire


@table
@pytest.mark.parametrize("guests", [False, True])
@pytest.mark.parametrize("chunks", [2, *slow(1)])
def test_products_are_timed_as_experts_exchanges_as_exchange_and_nothing_runs_on(ranks, way, body, guests, chunks):
    model = build(BODIES[body][0], num_hidden_layers=1, num_experts_per_tok=2, layer_types=["full_attention"])
    experts = ray_ep.moe.find_experts(model).popitem()[1].num_experts

    def work(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, "contiguous", 3), node_of=NODES)
        set_up(way, body, chunks, guests=guests)(m)
        meter, module = m.ray_ep.meter, m.ray_ep.modules[0]
        draw = torch.Generator().manual_seed(group.rank)
        x = torch.randn(20, 32, generator=draw, requires_grad=True)
        hot = torch.tensor([3.0] * 2 + [1.0] * (experts - 2))  # rank 0 has more pairs than others, who have some
        weights, index = torch.rand(20, experts, generator=draw).mul(hot).topk(2)
        weights.requires_grad_()
        with torch.no_grad():
            module(x, index, weights)  # the first pass measures
        phases, wire = listen(group, meter)
        sent, before = meter.sent.copy(), dict(meter.seconds)
        with Products(meter) as forward:
            out = module(x, index, weights)
        middle, left = dict(meter.seconds), now(meter)
        with Products(meter) as backward:
            out.square().sum().backward()
        after, sent = dict(meter.seconds), meter.sent - sent
        assert (left, now(meter)) == ("", "")
        assert set(forward.phases) == set(backward.phases) == {"experts"}
        assert set(phases) == {"exchange"}
        assert [p for p in PHASES if middle[p] == before[p]] == []
        assert [p for p in PHASES if after[p] == middle[p]] == ["route"]  # what was agreed on forward holds
        if not guests:  # those may travel by shared memory
            wire[group.rank] = 0
            assert sent.tolist() == wire.tolist()
        return m.ray_ep.balancer.done.guests

    assert bool(sum(ranks(3, work))) == (guests and way != "all_gather")


class NoWaits(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: values of a tensor, and shapes that depend on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().partition(".")[0] not in (
            "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount",
        )  # fmt: skip
        return func(*args, **(kwargs or {}))


def test_with_a_bound_nothing_in_the_bounded_way_asks_for_a_value_until_the_count_is_read():
    m = ray_ep.moe.parallelize(build("gpt_oss"), SoloGroup())
    m.ray_ep.exchange_by(kind="all_gather", tokens=20)
    module, meter = m.ray_ep.modules[0], m.ray_ep.meter
    x, index = torch.randn(16, 32, requires_grad=True), torch.arange(32).view(16, 2) % 6
    weights = torch.rand(16, 2, requires_grad=True)
    module(x, index, weights)  # the first pass makes what stays
    with NoWaits():
        m.ray_ep.layers[0].compute(module, x, index, weights).sum().backward()
    with pytest.raises(AssertionError), NoWaits():
        int(index.sum())
    assert meter.pairs.tolist() == [64, 0]
