"""Who answers for chosen tokens is recorded on every way of exchanging, and is who really computes."""

import copy

import numpy as np
import pytest
import torch

import ray_ep
from ray_ep.moe import Recorder
from ray_ep.moe.exchange.ways import KINDS
from tests.conftest import slow
from tests.fake_cuda import fake_cuda, host_syncs, nccl_ranks
from tests.models import VOCAB, build, even_shards, loss_sum, placement_of

NODES = {1: [0], 3: [0, 0, 1], 4: [0, 0, 1, 1], 5: [0, 1, 0, 1, 1]}
IDS = torch.randint(3, VOCAB, (6, 9), generator=torch.Generator().manual_seed(1))


def routed(model, ids):
    """[L] of (experts, weights) [T, K] that plain transformers gives its experts."""
    found = []
    model = copy.deepcopy(model)
    for module in ray_ep.moe.find_experts(model).values():
        module.register_forward_pre_hook(lambda m, args: found.append((args[1].detach(), args[2].detach())))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return found


def chosen_of(rank, tokens, every):
    return np.arange(tokens)[rank % every :: every]


def recorded(
    ranks, model, size, placement, *, every=1, shards=None, before=lambda m: None, passes=1, balance="off", **way
):
    """[rank] of (chosen token numbers, answers, pairs that the rank computed)."""
    nodes, shards = np.asarray(NODES[size]), shards or even_shards(len(IDS), size)

    def work(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement, balance, node_of=nodes)
        m.ray_ep.exchange_by(**way)
        before(m)
        part = IDS[shards[group.rank] : shards[group.rank + 1]]
        recorder, m_chosen = Recorder(len(m.ray_ep.layers), m.ray_ep.num_experts), []
        for _ in range(passes):
            chosen = chosen_of(group.rank, part.numel(), every)
            with m.ray_ep.recording(recorder, chosen, part.numel()):
                if len(part):
                    loss = loss_sum(m, part)[0]
                else:
                    with m.ray_ep.idle():
                        loss = 0 * loss_sum(m, IDS[:1, :2])[0]
            loss.backward()
            m_chosen.append(chosen)
        return m_chosen, recorder.collect(group), m.ray_ep.meter.pairs.copy()

    return ranks(size, work)


def assert_is_what_transformers_chose(results, model, shards, passes=1):
    plain = routed(model, IDS)
    length = IDS.shape[1]
    for rank, (chosen, answers, _) in enumerate(results):
        tokens = np.concatenate([shards[rank] * length + c for c in chosen])
        assert answers.experts.shape == answers.ranks.shape == answers.weights.shape
        assert answers.experts.shape[1] == len(tokens)
        for layer, (experts, weights) in enumerate(plain):
            assert np.array_equal(answers.experts[layer], experts[tokens])
            np.testing.assert_allclose(answers.weights[layer], weights[tokens], atol=1e-6)


def computed(results, size):
    """[R, L] pairs by who was recorded to answer."""
    every = np.concatenate([a.ranks for _, a, _ in results], 1)  # [L, tokens, K]
    return np.stack([(every == to).sum((1, 2)) for to in range(size)])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("size", [4, *slow(1, 3, 5)])
def test_who_is_recorded_is_who_computes_on_every_way_with_replicas(ranks, size, way, fused):
    model, shards = build("qwen3_moe"), even_shards(len(IDS), size)
    for kind in ("replicated", "empty_rank"):
        placement = placement_of(model, kind, size)
        results = recorded(ranks, model, size, placement, kind=way, fused=fused)
        assert_is_what_transformers_chose(results, model, shards)
        assert np.array_equal(computed(results, size), np.array([pairs for *_, pairs in results]))
        for _, answers, _ in results:
            for layer, token, choice in np.ndindex(answers.experts.shape):
                holders = placement.ranks_of(layer, int(answers.experts[layer, token, choice]))
                assert answers.ranks[layer, token, choice] in holders


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", ["flat", "two_level"])
def test_guests_of_the_balance_in_the_step_are_recorded_where_they_are(ranks, way, fused):
    model, size = build("qwen3_moe"), 4
    placement = placement_of(model, "empty_rank", size)  # one rank has all experts: the others get guests
    costs = lambda m: m.ray_ep.balancer.assume(1e-3, 1e12)  # noqa: E731
    results = recorded(ranks, model, size, placement, before=costs, balance="always", kind=way, fused=fused)
    assert_is_what_transformers_chose(results, model, even_shards(len(IDS), size))
    pairs = np.array([pairs for *_, pairs in results])
    assert np.array_equal(computed(results, size), pairs)
    assert pairs[1].sum() > 0, "its node's other rank computes nothing but guests"


@pytest.mark.parametrize("way", KINDS)
def test_some_tokens_in_parts_over_several_passes_on_ranks_with_few_or_none(ranks, way):
    model, shards = build("gpt_oss"), [0, 0, 1, 3, 6]
    placement = placement_of(model, "replicated", 4)
    same = {"shards": shards, "chunks": 3, "kind": way}
    results = recorded(ranks, model, 4, placement, every=4, passes=2, **same)
    assert_is_what_transformers_chose(results, model, shards)
    whole = recorded(ranks, model, 4, placement, **same)
    assert np.array_equal(computed(whole, 4), np.array([pairs for *_, pairs in whole]))
    for (chosen, few, _), (_, every, _) in zip(results, whole, strict=True):
        assert np.array_equal(few.ranks, every.ranks[:, np.concatenate(chosen)])


def test_recomputed_blocks_are_recorded_once(ranks):
    def before(m):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m.train()

    model = build("qwen3_moe")
    results = recorded(ranks, model, 4, placement_of(model, "replicated", 4), before=before, kind="two_level")
    assert_is_what_transformers_chose(results, model, even_shards(len(IDS), 4))


def test_no_choice_is_recorded_as_none(ranks):
    """As the gateway of two levels has them: an index of -1."""
    model = build("qwen3_moe", num_hidden_layers=1)

    def work(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group)
        recorder, index = Recorder(1, 8), torch.tensor([[1, -1, 3], [-1, -1, -1]])
        with m.ray_ep.recording(recorder, np.array([0, 1]), 2):
            m.ray_ep.layers[0].compute(m.ray_ep.modules[0], torch.ones(2, 32), index, torch.ones(2, 3))
        return recorder.collect(group)

    for answers in ranks(2, work):
        assert answers.experts.tolist() == [[[1, -1, 3], [-1, -1, -1]]]
        assert answers.ranks.tolist() == [[[0, -1, 0], [-1, -1, -1]]]


@pytest.mark.parametrize(
    ("way", "most", "at_the_end"),
    [({}, 1, 0), ({"kind": "all_gather", "tokens": 64}, 0, 0), ({"chunks": 2}, 1, 0), ({"kind": "two_level"}, 2, 1)],
    ids=str,
)
def test_on_a_gpu_a_record_makes_no_layer_wait_longer_for_the_device(way, most, at_the_end):
    """On the CUDA that is not there; the same host syncs as without a record, but one a pass at gateways."""
    model = build("qwen3_moe", num_hidden_layers=1, dtype=torch.bfloat16)
    placement, size = placement_of(model, "contiguous", 3), 3

    def work(group):
        ours = ray_ep.moe.parallelize(
            copy.deepcopy(model).cuda(), group, placement, "off", node_of=np.asarray(NODES[3])
        )
        ours.ray_ep.exchange_by(**way)
        layer, module = ours.ray_ep.layers[0], ours.ray_ep.modules[0]
        generator = torch.Generator().manual_seed(group.rank)
        hidden = torch.randn(64, 32, generator=generator).bfloat16().cuda()
        weights, index = torch.rand(64, 8, generator=generator).cuda().topk(3)
        for _ in range(3):
            recorder = Recorder(1, 8)
            recording = ours.ray_ep.recording(recorder, np.arange(0, 64, 7), 64)
            with torch.no_grad(), host_syncs() as end, recording, host_syncs() as forward:  # `end` has not what it has
                layer.forward(module, hidden, index, weights.bfloat16())
        ranks = layer.slots.served_by(index, layer.slots.routes)
        return forward, end, recorder.collect(group), index.cpu()[::7], ranks.cpu()[::7]

    with fake_cuda():
        results = nccl_ranks(size, work)
    forward, end, *_ = results[0]
    assert (len(forward), len(end)) == (most, at_the_end)
    for *_, answers, experts, ranks in results:
        assert np.array_equal(answers.experts[0], experts)
        assert np.array_equal(answers.ranks[0], ranks)
