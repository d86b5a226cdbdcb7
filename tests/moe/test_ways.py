"""Each way that tokens can travel equals plain transformers, forward and gradients, like the flat one."""

import numpy as np
import pytest
import torch

from ray_ep.moe.exchange.float8 import pack, unpack
from ray_ep.moe.exchange.ways import KINDS, gateways
from tests.conftest import slow
from tests.models import VOCAB, assert_equals, build, even_shards, parallel_pass, placement_of, reference

NODES = {1: [0], 2: [0, 1], 3: [0, 0, 1], 4: [0, 0, 1, 1], 5: [0, 1, 0, 1, 1]}


def passes(ranks, model, ids, size, kind, before, shards=None):
    placement = placement_of(model, kind, size)
    shards = shards or even_shards(len(ids), size)
    nodes = np.asarray(NODES[size])
    return ranks(size, lambda g: parallel_pass(model, ids, g, placement, shards, before, node_of=nodes))


def set_way(kind="flat", chunks=1, float8=False, tokens=0, fused=True):
    def before(model):
        model.ray_ep.exchange_by(kind=kind, chunks=chunks, float8=float8, tokens=tokens, fused=fused)

    return before


def ids_of(rows=5):
    return torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("size", [1, 4, *slow(2, 3, 5)])
def test_every_way_equals_one_process_on_any_placement(ranks, size, way, fused):
    model = build("qwen3_moe")
    for kind in ("contiguous", "replicated", "empty_rank"):
        assert_equals(passes(ranks, model, ids_of(), size, kind, set_way(way, fused=fused)), model, ids_of())


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("way", KINDS)
def test_every_way_carries_every_layout_of_experts(ranks, name, way):
    model = build(name)
    assert_equals(passes(ranks, model, ids_of(), 3, "replicated", set_way(way, chunks=2)), model, ids_of())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", KINDS)
def test_tokens_in_chunks_equal_tokens_at_once_also_on_ranks_with_none_or_few(ranks, way, fused):
    model, ids = build("qwen3_moe"), ids_of(3)
    shards = [0, 0, 1, 3]
    results = passes(ranks, model, ids, 3, "shuffled", set_way(way, chunks=3, fused=fused), shards)
    assert_equals(results, model, ids)


@pytest.mark.parametrize("way", KINDS)
def test_checkpointed_blocks_recompute_on_every_way(ranks, way):
    model, ids = build("qwen3_moe"), ids_of()

    def before(m):
        set_way(way)(m)
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m.train()

    assert_equals(passes(ranks, model, ids, 4, "replicated", before), model, ids)


@pytest.mark.parametrize(
    ("way", "fused"), [(w, f) for w in KINDS for f in (True, False) if f or w != "all_gather"]
)  # the bounded way does not round
def test_float8_dispatch_rounds_tokens_alike_wherever_they_go(ranks, way, fused):
    model, ids = build("qwen3_moe", num_hidden_layers=1), ids_of()
    _, exact, _ = reference(model, ids)
    alone = torch.cat([r[2] for r in passes(ranks, model, ids, 1, "contiguous", set_way(float8=True, fused=fused))])
    apart = passes(ranks, model, ids, 4, "shuffled", set_way(way, float8=True, fused=fused))
    assert 1e-3 < (alone - exact).abs().max() < 0.05 * exact.abs().max()
    together = torch.cat([r[2] for r in apart])
    # On two levels a token is rounded again from its rounded value: the same codes, up to the scale's last bit.
    assert (together - alone).abs().max() <= (1e-5 if way != "two_level" else 1e-3 * exact.abs().max())


def test_float8_keeps_three_bits_of_every_value_and_zero():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 50)[:, None]
    x[3] = 0
    back = unpack(pack(x), torch.float32)
    top = x.abs().amax(1, keepdim=True)
    assert ((back - x).abs() <= x.abs() / 16 + top * 2**-9 / 448 * 2).all()
    assert pack(x).shape == (50, 36)
    for few in (x[:1, :31], x[:0, :31]):  # whose scales do not begin at whole numbers
        assert (unpack(pack(few), torch.float32) - few).abs().sum() <= few.abs().sum() / 16


def test_a_node_is_reached_through_the_rank_with_the_sources_own_number():
    nodes = np.array([0, 0, 0, 1, 1])
    routes = np.arange(5)[:, None]
    assert gateways(routes, nodes, 0).ravel().tolist() == [0, 0, 0, 3, 3]
    assert gateways(routes, nodes, 2).ravel().tolist() == [2, 2, 2, 3, 3]
    assert gateways(routes, nodes, 4).ravel().tolist() == [1, 1, 1, 4, 4]


def test_two_levels_cross_nodes_once_a_node(ranks):
    model, ids = build("qwen3_moe", num_experts_per_tok=6), ids_of(8)
    flat, two = (passes(ranks, model, ids, 4, "contiguous", set_way(way)) for way in ("flat", "two_level"))
    across = [
        sum(int(r[0].ray_ep.meter.sent[2:].sum()) for r in found[:2])
        + sum(int(r[0].ray_ep.meter.sent[:2].sum()) for r in found[2:])
        for found in (flat, two)
    ]
    assert across[1] < 0.75 * across[0]


def test_more_tokens_than_the_bound_are_refused_with_the_bound(ranks):
    from ray_ep.errors import BadInput

    model = build("qwen3_moe")
    with pytest.raises(BadInput, match=r"exchange\.tokens=8: a rank has 9 tokens"):
        passes(ranks, model, ids_of(1), 1, "contiguous", set_way("all_gather", tokens=8, fused=False))


@pytest.mark.parametrize(
    ("name", "dtype", "packs"),
    [
        ("qwen3_moe", torch.float32, True),
        ("qwen3_moe", torch.bfloat16, True),
        ("nemotron_h", torch.float32, False),  # its experts have no gate
        ("gpt_oss", torch.float32, False),
    ],
)
def test_packed_weights_give_the_same_logits_and_are_let_go(ranks, name, dtype, packs):
    model, ids = build(name, dtype=dtype), ids_of()

    def work(group):
        import copy

        import ray_ep

        m = ray_ep.moe.parallelize(copy.deepcopy(model), group)
        with torch.no_grad():
            plain = m(input_ids=ids).logits
            with m.ray_ep.inference():
                assert all((layer.packed is not None) == packs for layer in m.ray_ep.layers)
                packed = m(input_ids=ids).logits
        assert all(layer.packed is None for layer in m.ray_ep.layers)
        return (plain - packed).abs().max() / plain.abs().max()

    assert max(ranks(2, work)) <= (1e-5 if dtype == torch.float32 else 0.02)
