"""Layers over DeepEP equal the general layers; the library's place is taken by a double with its signatures."""

import copy
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

import ray_ep
from ray_ep.collective import SoloGroup
from ray_ep.errors import BadInput, GroupError
from ray_ep.moe import Recorder
from ray_ep.moe.exchange.choose import settle
from ray_ep.moe.exchange.elastic import Room, check_fit, library
from ray_ep.moe.slots import Slots
from ray_ep.placement import contiguous, random
from tests import fake_deepep
from tests.fake_deepep import NcclOverGloo
from tests.models import VOCAB, build, even_shards, parallel_pass, placement_of, reference
from tests.moe.test_bodies import saved_for_being_asked


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", fake_deepep)
    monkeypatch.setattr(fake_deepep.ElasticBuffer, "made", [])
    return fake_deepep.ElasticBuffer


@pytest.fixture
def over(ranks, double):
    """Call work(group) on ranks over what takes NCCL's place."""

    def run(size, work):
        store = dist.HashStore()
        return ranks(size, lambda g: work(NcclOverGloo(PrefixStore("nccl", store), g.rank, size)))

    return run


def made(name="qwen3_moe", **sizes):
    return build(name, dtype=torch.bfloat16, **{"hidden_size": 256, **sizes})


def by_deepep(model):
    model.ray_ep.exchange_by(kind="deepep", tokens=64)


def general(model):
    model.ray_ep.exchange_by(fused=False)
    model.ray_ep.balancer.mode = "off"


def ids_of(rows):
    return torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(1))


def passes(run, model, ids, size, kind, before, shards=None):
    placement, shards = placement_of(model, kind, size), shards or even_shards(len(ids), size)
    return run(size, lambda g: parallel_pass(model, ids, g, placement, shards, before))


def assert_same(found, expected):
    """Two runs' losses, logits and gradients are the same bits: rows, their order and the roundings are the same."""
    for (_, loss, logits, grads), (_, loss2, logits2, grads2) in zip(found, expected, strict=True):
        assert torch.equal(loss, loss2)
        assert torch.equal(logits, logits2)
        assert [n for n in grads2 if not torch.equal(grads[n], grads2[n])] == []


def assert_near_plain(results, model, ids):
    _, logits, grads = reference(model, ids)
    pairs = {"logits": (torch.cat([r[2] for r in results if len(r[2])]), logits)}
    pairs |= {n: (results[0][3][n], g) for n, g in grads.items() if g is not None}
    far = {n: float((a - b).float().norm() / b.float().norm().clamp_min(1e-6)) for n, (a, b) in pairs.items()}
    assert {n: d for n, d in far.items() if d > 0.15} == {}  # bfloat16 of one process and of several


@pytest.mark.parametrize("kind", ["contiguous", "replicated", "uneven", "empty_rank"])
@pytest.mark.parametrize("size", [2, 3])
def test_any_placement_equals_the_general_layer_and_plain_transformers(over, size, kind):
    model, ids = made(), ids_of(5)
    found = passes(over, model, ids, size, kind, by_deepep)
    assert_near_plain(found, model, ids)
    assert_same(found, passes(over, model, ids, size, kind, general))


def test_sums_that_have_gone_home_are_not_kept_for_backward(over):
    model, ids = made(num_hidden_layers=1), ids_of(2)
    found = over(2, lambda g: saved_for_being_asked(
        lambda: parallel_pass(model, ids, g, placement_of(model, "contiguous", 2), [0, 1, 2], by_deepep)))  # fmt: skip
    assert found == [[0], [0]]


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "nemotron_h"])
def test_every_layout_of_experts_travels_so(over, name):
    model, ids = made(name, **({"moe_latent_size": 256} if name == "nemotron_h" else {})), ids_of(4)
    found, expected = (passes(over, model, ids, 2, "replicated", how) for how in (by_deepep, general))
    assert_same(found, expected)


@pytest.mark.parametrize(("kind", "shards"), [("contiguous", [0, 0, 1, 3]), ("empty_rank", [0, 2, 3, 3])])
def test_a_rank_without_tokens_or_with_nothing_at_all_takes_part(over, kind, shards):
    model, ids = made(), ids_of(3)
    found = passes(over, model, ids, 3, kind, by_deepep, shards)
    assert_near_plain(found, model, ids)
    assert_same(found, passes(over, model, ids, 3, kind, general, shards))


def test_checkpointed_blocks_find_their_rows_in_the_order_of_before(over):
    model, ids = made(), ids_of(5)

    def checkpointed(how):
        def before(m):
            how(m)
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            m.train()

        return before

    found = passes(over, model, ids, 3, "replicated", checkpointed(by_deepep))
    assert_same(found, passes(over, model, ids, 3, "replicated", general))


def test_layers_share_a_buffer_and_count_what_they_send_and_compute(over, double):
    model, ids = made(), ids_of(4)
    results = passes(over, model, ids, 2, "contiguous", by_deepep)
    assert sum(r[0].ray_ep.meter.pairs for r in results).tolist() == [4 * 9 * 3] * 2
    fates = sorted(double.made, key=lambda fate: fate["rank"])
    assert [(f["rank"], f["tokens"], f["destroy"], f["seconds"]) for f in fates] == [(r, 64, True, 30) for r in (0, 1)]
    for (m, *_), fate in zip(results, fates, strict=True):
        assert fate["away"] > 0
        assert m.ray_ep.meter.sent.sum() == fate["away"] * 256 * 2  # bfloat16, forward and backward


def test_a_source_knows_which_rank_answers(over):
    model, ids = made(), ids_of(4)

    def who_answers(how):
        def work(group):
            m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, "replicated", 2))
            how(m)
            with torch.no_grad(), m.ray_ep.tracing() as trace:
                m(input_ids=ids[group.rank :: 2])
            return torch.stack([torch.stack(layer[0]) for layer in trace])

        return torch.stack(over(2, work))

    assert torch.equal(who_answers(by_deepep), who_answers(general))


def test_who_is_recorded_is_who_computes(over):
    model, ids = made(), ids_of(4)

    def work(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, "replicated", 2))
        by_deepep(m)
        recorder, part = Recorder(2, 8), ids[group.rank :: 2]
        with torch.no_grad(), m.ray_ep.recording(recorder, np.arange(part.numel()), part.numel()):
            m(input_ids=part)
        return recorder.collect(group).ranks, m.ray_ep.meter.pairs.copy()

    results = over(2, work)
    every = np.concatenate([ranks for ranks, _ in results], 1)
    computed = [(every == rank).sum((1, 2)).tolist() for rank in range(2)]
    assert computed == [pairs.tolist() for _, pairs in results]


def test_after_a_move_tokens_go_to_the_new_slots(over):
    model, ids = made(), ids_of(4)
    first, then = placement_of(model, "contiguous", 2), placement_of(model, "replicated", 2)

    def work(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, first)
        by_deepep(m)
        with torch.no_grad():
            before = m(input_ids=ids).logits
            ray_ep.moe.apply_placement(m, then)
            return before, m(input_ids=ids).logits

    for before, after in over(2, work):
        assert (before - after).abs().max() <= 0.02 * before.abs().max()


def test_slots_are_numbered_over_all_ranks_by_the_widest():
    def numbered(placement, rank):
        found, width = Slots(placement, 0, rank, None, torch.device("cpu")).numbered()
        return found.tolist(), width

    found, width = numbered(contiguous(1, 4, 2), 0)
    assert ([set(numbers) for numbers in found], width) == ([{0}, {1}, {2}, {3}], 2)
    assert numbered(random(1, 3, 2, [3, 0]), 1)[1] == 3
    placement = random(1, 8, 3, [4, 5, 3], seed=2)
    for rank in range(3):
        routes, (found, width) = placement.routes(0, rank, None), numbered(placement, rank)
        for expert, numbers in enumerate(found):
            assert [n // width for n in numbers] == routes[expert].tolist()
            assert {placement.experts_of(0, n // width)[n % width] for n in numbers} == {expert}


ROOM = {"tokens": 64, "hidden": 512, "choices": 8}


@pytest.mark.parametrize(
    ("changed", "ranks_", "slots", "dtype", "said"),
    [
        ({"hidden": 384}, 2, 8, torch.bfloat16, "hidden size 384: it moves multiples of 256"),
        ({}, 2, 8, torch.float32, "hidden states of float32: it moves bfloat16"),
        ({"choices": 33}, 2, 64, torch.bfloat16, "33 experts of a token: it takes 1 to 32"),
        ({"tokens": 0}, 2, 8, torch.bfloat16, "exchange.tokens=0: its buffer needs a bound"),
        ({}, 2, 257, torch.bfloat16, "257 slots on each of 2 ranks: it takes up to 256 on a rank and 2048 in all"),
        ({}, 16, 129, torch.bfloat16, "129 slots on each of 16 ranks"),
        ({}, 1025, 1, torch.bfloat16, "1025 ranks: it takes up to 1024"),
    ],
)
def test_what_the_library_does_not_carry_is_refused_with_what_it_does(changed, ranks_, slots, dtype, said):
    check_fit(Room(**ROOM), 2, 256, torch.bfloat16)
    with pytest.raises(BadInput, match=r"exchange\.transport=deepep cannot carry") as error:
        check_fit(Room(**{**ROOM, **changed}), ranks_, slots, dtype)
    assert said in str(error.value)


def one_pass(model, how):
    def work(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group)
        how(m)
        return m(input_ids=ids_of(1)).logits

    return work


def test_layers_refuse_what_cannot_travel_on_every_rank(ranks, over):
    for model, how, said in (
        (build("qwen3_moe"), by_deepep, "hidden states of float32.*hidden size 32"),
        (made(), lambda m: m.ray_ep.exchange_by(kind="deepep"), r"exchange\.tokens=0"),
        (made(), lambda m: m.ray_ep.exchange_by(kind="deepep", tokens=8), r"exchange\.tokens=8: a rank has 9 tokens"),
        (made(), lambda m: m.ray_ep.exchange_by(kind="deepep", tokens=9, chunks=2), "allowed are 1, False"),
    ):
        with pytest.raises(BadInput, match=said):
            over(2, one_pass(model, how))
    with pytest.raises(BadInput, match=r"torch's NCCL between GPUs; this group is a GlooGroup"):
        ranks(2, one_pass(made(), by_deepep))


def test_a_library_that_is_missing_old_or_broken_is_named(monkeypatch):
    with pytest.raises(BadInput, match="finds no module deep_ep; it is built from source"):
        library()
    old = ModuleType("deep_ep")
    old.__spec__ = fake_deepep.__spec__
    monkeypatch.setitem(sys.modules, "deep_ep", old)
    with pytest.raises(BadInput, match="has no ElasticBuffer, as version 1 has none"):
        library()


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "deep_ep.py").write_text("assert False, 'Duplicate NCCL runtime found\\nmore'")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadInput, match="cannot be loaded: Duplicate NCCL runtime found; it is built"):
        library()


@pytest.mark.parametrize("call", ["dispatch", "combine"])
def test_a_failure_of_the_library_is_a_group_error_and_ends_the_group(over, double, monkeypatch, call):
    def broken(*args, **kwargs):
        raise RuntimeError("Dispatch CPU wait exception (buffer.hpp:1): count\nmore")

    monkeypatch.setattr(double, call, broken)

    def work(group):
        with pytest.raises(GroupError, match=rf"rank {group.rank}: DeepEP failed in epoch 0: Dispatch CPU wait"):
            one_pass(made(), by_deepep)(group)
        with pytest.raises(GroupError, match="closed or aborted"):
            group.all_reduce(torch.ones(1))

    over(2, work)


def test_one_rank_alone_goes_without():
    model = ray_ep.moe.parallelize(made(), SoloGroup())
    choice = settle(model.ray_ep, "deepep", {"memory": SoloGroup()})
    assert (choice.kind, choice.note) == ("flat", "deepep is asked for; one rank exchanges with nobody")
    model(input_ids=ids_of(1))
