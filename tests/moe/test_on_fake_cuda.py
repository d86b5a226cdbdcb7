"""Layers on the CUDA that is not there equal plain transformers, and let the host wait no more often than they must."""

import copy
import time
from collections import Counter

import numpy as np
import pytest
import torch

import ray_ep
from ray_ep.collective import SoloGroup
from ray_ep.errors import BadInput, LateError
from ray_ep.moe.passes import recomputing
from tests.conftest import slow
from tests.fake_cuda import fake_cuda, host_syncs, nccl_ranks
from tests.models import (
    MODELS,
    VOCAB,
    assert_equals,
    build,
    even_shards,
    gather_gradients,
    loss_sum,
    placement_of,
    reference,
)

NODES = {1: [0], 2: [0, 0], 3: [0, 0, 1]}
IDS = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))


def passes(model, size, kind, before=lambda model: None, balance="off", shards=None, triton=False):
    """Each rank's forward and backward over its rows of IDS on the device: model, loss, logits, gradients, on the host.

    Args:
        before: called with the parallelized model. triton: its kernels are used where a layer has some.
    """
    placement, shards = placement_of(model, kind, size), shards or even_shards(len(IDS), size)

    def work(group):
        ids, nodes = IDS.cuda(), np.asarray(NODES[size])
        ours = copy.deepcopy(model).cuda()
        ours = ray_ep.moe.parallelize(ours, group, placement, balance, node_of=nodes)
        before(ours)
        part = ids[shards[group.rank] : shards[group.rank + 1]]
        if len(part):
            loss, logits = loss_sum(ours, part)
        else:
            with ours.ray_ep.idle():
                loss, logits = loss_sum(ours, ids[:1, :2])
                loss = loss * 0
        loss = loss / ids[:, 1:].numel()
        loss.backward()
        total = loss.detach().clone()
        group.all_reduce(total)
        grads = {name: g.cpu() for name, g in gather_gradients(ours, group).items()}
        assert all(layer.calls for layer in ours.ray_ep.layers)
        return ours, total.cpu(), logits.detach()[: len(part)].cpu(), grads

    with fake_cuda(triton):
        return nccl_ranks(size, work)


def by(**way):
    return lambda model: model.ray_ep.exchange_by(**way)


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [(3, "shuffled"), *slow((1, "contiguous"), (2, "replicated"))])
def test_logits_and_every_gradient_equal_plain_transformers_on_one_to_three_ranks(name, ranks):
    model = build(name)
    assert_equals(passes(model, *ranks), model, IDS)


def test_a_model_on_a_gpu_that_is_not_the_current_one_is_refused_before_its_first_pass(monkeypatch):
    with fake_cuda():
        model = build("qwen3_moe", num_hidden_layers=1).cuda()
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        with pytest.raises(BadInput, match=r"on cuda:0, and this .* is cuda:1: call torch\.cuda\.set_device\(0\)"):
            ray_ep.moe.parallelize(model, SoloGroup())
        monkeypatch.undo()


def test_layers_with_kernels_in_triton_equal_plain_transformers():
    model = build("qwen3_moe", num_hidden_layers=1)
    assert_equals(passes(model, 2, "replicated", triton=True), model, IDS)


@pytest.mark.parametrize("kind", ["empty_rank", "uneven"])
def test_a_rank_without_experts_and_one_without_tokens_take_part(kind):
    model = build("qwen3_moe")
    assert_equals(passes(model, 3, kind, shards=[0, 3, 3, 5]), model, IDS)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(
    "way", [{"kind": "flat"}, {"kind": "two_level"}, {"kind": "all_gather"}, {"kind": "all_gather", "tokens": 32}]
)
def test_every_way_to_exchange_equals_plain_transformers(way, chunks):
    model = build("qwen3_moe")
    assert_equals(passes(model, 3, "replicated", by(**way, chunks=chunks)), model, IDS)


@pytest.mark.parametrize(
    "way", [{}, {"chunks": 2}, {"kind": "two_level", "chunks": 2}, {"kind": "all_gather", "tokens": 32}]
)
def test_checkpointed_blocks_exchange_again_in_the_same_order_on_every_rank(way):
    model = build("qwen3_moe")

    def before(ours):
        by(**way)(ours)
        checkpointed(ours)

    assert_equals(passes(model, 3, "empty_rank", before), model, IDS)


@pytest.mark.parametrize("kind", ["flat", "all_gather"])
def test_a_checkpointed_block_is_computed_again_on_the_stream_of_its_forward(kind):
    """Not on that of a part of its tokens, though that part's backward asks for it."""
    seen = []

    def before(ours):
        by(kind=kind, chunks=2)(ours)
        checkpointed(ours)
        for router in ours.ray_ep.routing.routers:
            router.register_forward_hook(
                lambda *_: seen.append((recomputing(), torch.cuda.current_stream().cuda_stream))
            )

    passes(build("qwen3_moe"), 2, "contiguous", before)
    assert Counter(seen) == {(False, 0): 4, (True, 0): 4}


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_guests_of_the_balance_change_no_number(again, chunks):
    model = build("qwen3_moe")

    def before(ours):
        by(chunks=chunks)(ours)
        ours.ray_ep.balancer.assume(1e-3, 1e12)
        if again:
            checkpointed(ours)

    results = passes(model, 2, "contiguous", before, "always")
    assert_equals(results, model, IDS)
    assert results[0][0].ray_ep.balancer.done.guests > 0


def test_costs_of_the_balance_are_measured_on_the_device():
    model = build("qwen3_moe")
    results = passes(model, 2, "contiguous", balance="auto")
    assert_equals(results, model, IDS)
    assert "it pays from" in results[0][0].ray_ep.balancer.words()


def test_float8_rounds_as_it_does_on_the_host():
    model = build("qwen3_moe", num_hidden_layers=1)
    _, exact, _ = reference(model, IDS)
    ours = ray_ep.moe.parallelize(copy.deepcopy(model), ray_ep.collective.SoloGroup())
    ours.ray_ep.exchange_by(float8=True)
    alone = ours(input_ids=IDS).logits.detach()
    together = torch.cat([r[2] for r in passes(model, 3, "shuffled", by(float8=True))])
    assert (together - alone).abs().max() <= 1e-5
    assert 1e-3 < (together - exact).abs().max() < 0.05 * exact.abs().max()


def waits(way, size=2, balance="off", sample=0, train=True):
    """Host syncs [(kind, where)] of a layer's forward, and of its backward, on rank 0; the third pass of three.

    In bfloat16, for which torch's grouped products need not wait.
    """
    model = build("qwen3_moe", num_hidden_layers=1, dtype=torch.bfloat16)
    placement, nodes = placement_of(model, "contiguous", size), np.asarray(NODES[size])

    def work(group):
        ours = copy.deepcopy(model).cuda()
        ours = ray_ep.moe.parallelize(ours, group, placement, balance, sample=sample, node_of=nodes)
        ours.ray_ep.exchange_by(**way)
        if balance != "off":
            ours.ray_ep.balancer.assume(1e-3, 1e12)
        layer, module = ours.ray_ep.layers[0], ours.ray_ep.modules[0]
        generator = torch.Generator().manual_seed(group.rank)
        hidden = torch.randn(64, 32, generator=generator).bfloat16().cuda().requires_grad_(train)
        scores = torch.rand(64, 8, generator=generator)
        scores[:, : 4 if balance != "off" else 0] += 0.5  # so that the balance has to act
        weights, index = scores.cuda().topk(3)
        for _ in range(3):
            with torch.set_grad_enabled(train), host_syncs() as forward:
                out = layer.forward(module, hidden, index, weights.bfloat16())
            with host_syncs() as backward:
                if train:
                    out.sum().backward()
        if balance != "off":
            assert ours.ray_ep.balancer.done.guests > 0
        return forward, backward

    with fake_cuda():
        return nccl_ranks(size, work)[0]


@pytest.mark.parametrize(
    ("case", "most"),
    [
        ({"way": {}, "size": 1}, 0),
        ({"way": {}}, 1),
        ({"way": {}, "sample": 64}, 1),
        ({"way": {"float8": True}}, 1),
        ({"way": {"chunks": 2}}, 1),
        ({"way": {"kind": "two_level"}, "size": 3}, 2),
        ({"way": {"kind": "all_gather", "tokens": 64}}, 0),
        ({"way": {"kind": "all_gather", "tokens": 64}, "sample": 64}, 0),
        ({"way": {}, "balance": "always"}, 2),
        ({"way": {}, "balance": "always", "train": False}, 2),
    ],
    ids=str,
)
def test_the_host_waits_for_the_sizes_of_a_layer_and_for_nothing_else(case, most):
    forward, backward = waits(**case)
    print(Counter(forward), Counter(backward))
    assert (len(forward), len(backward)) == (most, 0), (Counter(forward), Counter(backward))


@pytest.mark.parametrize("way", [{}, {"kind": "two_level"}], ids=str)
def test_a_layer_whose_peer_does_not_come_ends_as_the_group_does_and_takes_no_size_from_it(monkeypatch, way):
    model = build("qwen3_moe", num_hidden_layers=1)

    def work(group):
        ours = ray_ep.moe.parallelize(copy.deepcopy(model).cuda(), group, balance="off", node_of=np.arange(2))
        ours.ray_ep.exchange_by(**way)
        group.barrier()
        if group.rank:
            time.sleep(0.8)
            return None
        group.timeout_s = 0.3
        index = torch.arange(24).view(8, 3).cuda() % 8
        with pytest.raises(LateError, match=r"no answer from the peers in 0\.3 s"):
            ours.ray_ep.layers[0].compute(ours.ray_ep.modules[0], torch.ones(8, 32).cuda(), index, index.float())
        return True

    with fake_cuda():
        real = torch.empty_like
        monkeypatch.setattr(
            torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(-999)
        )  # what sizes find before them
        assert nccl_ranks(2, work)[0]
        monkeypatch.undo()
