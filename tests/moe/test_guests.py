"""Balance inside the step: the numbers stay those of one process, loads become even, memory stays bounded."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ray_ep
from ray_ep.collective import gloo_group
from ray_ep.collective.mailboxes import is_free
from ray_ep.errors import BadInput
from ray_ep.moe import Limits
from ray_ep.moe.balance.guests import destinations
from ray_ep.moe.cpu import kernels
from tests.conftest import slow
from tests.models import MODELS, VOCAB, assert_equals, build, even_shards, parallel_pass, placement_of, reference


@pytest.fixture(autouse=True)
def shared(request, monkeypatch):
    """Least bytes that ranks lend each other; few, so that tiny experts are lent as big ones are.

    What was lent is overwritten (in float32 and bfloat16 with NaN) as soon as it may be.
    """
    monkeypatch.setattr(gloo_group, "SHARED_BYTES", getattr(request, "param", 64))
    all_to_all = gloo_group.GlooGroup.all_to_all

    def overwriting(self, *args):
        all_to_all(self, *args)
        for buffer in self._mail._lent:
            if is_free(buffer):
                buffer.fill_(255)

    monkeypatch.setattr(gloo_group.GlooGroup, "all_to_all", overwriting)


def free(model):
    """Guests cost nothing, so that tiny models have them."""
    model.ray_ep.balancer.assume(seconds_per_pair=1.0, bandwidth=1e18)


def ids_of(rows=5):
    return torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(1))


def passes(ranks, model, ids, size, kind, before=free, **options):
    placement, shards = placement_of(model, kind, size), even_shards(len(ids), size)
    return ranks(size, lambda g: parallel_pass(model, ids, g, placement, shards, before, **options))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [3, *slow(2, 4)])
def test_with_guests_logits_and_every_gradient_equal_one_process(ranks, name, size):
    model = build(name)
    guests = 0
    for kind in ("contiguous", "shuffled", "replicated", "empty_rank"):
        results = passes(ranks, model, ids_of(), size, kind)
        assert_equals(results, model, ids_of())
        guests += results[0][0].ray_ep.balancer.done.guests
    assert guests > 0


@pytest.mark.parametrize("shared", [64, 1 << 40], indirect=True, ids=["lent", "sent"])
@pytest.mark.parametrize("fused", [True, False])
def test_guests_are_fetched_again_in_backward_where_memory_is_for_one_layer_only(ranks, fused):
    model = build("qwen3_moe", num_hidden_layers=6, hidden_size=256, moe_intermediate_size=128, head_dim=64)

    def tight(m):
        free(m)
        m.ray_ep.balancer.guest_mb = 2  # an expert is 0.4 MB: five at once, not one for every layer
        m.ray_ep.exchange_by(fused=fused)

    results = passes(ranks, model, ids_of(), 2, "contiguous", tight)
    assert results[0][0].ray_ep.balancer.done.guests > 0
    assert not results[0][0].ray_ep.balancer.keep
    _, logits, grads = reference(model, ids_of())
    assert (torch.cat([r[2] for r in results]) - logits).abs().max() <= 1e-4 * logits.abs().max()
    for n, g in grads.items():
        assert (results[0][3][n] - g).abs().max() <= 1e-4 * max(1.0, float(g.abs().max())), n


@pytest.mark.parametrize("way", ["flat", "two_level"])
def test_checkpointed_blocks_take_the_same_guests_again(ranks, way):
    model = build("qwen3_moe")

    def before(m):
        free(m)
        m.ray_ep.exchange_by(kind=way)
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m.train()

    results = passes(ranks, model, ids_of(), 4, "contiguous", before, node_of=np.array([0, 0, 1, 1]))
    assert_equals(results, model, ids_of())
    assert results[0][0].ray_ep.balancer.done.guests > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skewed_tokens_are_computed_evenly(ranks, dtype):
    model = build("qwen3_moe", dtype=dtype, num_experts_per_tok=2)

    def work(group):
        m = ray_ep.moe.parallelize(copy(model), group)
        free(m)
        experts, g = m.ray_ep.modules[0], torch.Generator().manual_seed(group.rank)
        index = torch.rand(400, 8, generator=g).mul(torch.tensor([9.0] * 3 + [1.0] * 5)).argsort(1)[:, -2:]
        x = torch.randn(400, 32, generator=g).to(dtype)
        with torch.no_grad():
            experts(x, index, torch.ones(400, 2, dtype=dtype))
        return int(m.ray_ep.meter.pairs[0]), m.ray_ep.balancer.done

    found = ranks(4, work)
    pairs = [p for p, _ in found]
    assert sum(pairs) == 4 * 800
    assert max(pairs) <= 1.02 * 800
    done = found[0][1]
    assert done.before > 1.3
    assert done.after <= 1.02
    assert done.moved_pairs == pytest.approx((done.before - done.after) * 800)


def test_every_token_to_one_expert_leaves_no_rank_with_more_than_its_bound(ranks):
    model = build("qwen3_moe", num_experts_per_tok=1)

    def work(group):
        m = ray_ep.moe.parallelize(copy(model), group, limits=Limits(most=1.5))
        m.ray_ep.balancer.assume(seconds_per_pair=1e-12, bandwidth=1.0)  # it never pays
        with torch.no_grad():
            m.ray_ep.modules[0](torch.randn(100, 32), torch.full((100, 1), 5), torch.ones(100, 1))
        return int(m.ray_ep.meter.pairs[0])

    pairs = ranks(4, work)
    assert sum(pairs) == 400
    assert max(pairs) <= 150


@pytest.mark.parametrize("room", [100, 1])
def test_in_inference_guests_stay_and_logits_are_those_of_one_process(ranks, room):
    model = build("qwen3_moe")
    batches = [ids_of(), ids_of(), ids_of() + 1, ids_of(), ids_of() + 1]
    with torch.no_grad():
        wanted = [copy(model)(input_ids=ids).logits for ids in batches]

    def work(group):
        mine = ray_ep.moe.parallelize(copy(model), group)
        free(mine)
        balancer, guests, worst = mine.ray_ep.balancer, [], 0.0
        balancer.slots_to_keep = lambda: room
        with torch.no_grad(), mine.ray_ep.inference():
            for ids, want in zip(batches, wanted, strict=True):
                before = balancer.done.guests
                worst = max(worst, float((mine(input_ids=ids).logits - want).abs().max()))
                guests.append(balancer.done.guests - before)
        assert mine.ray_ep.passes.now.inference is None
        return guests, worst

    for guests, worst in ranks(3, work):
        assert worst <= 1e-5
        assert guests[0]
        if room == 100:
            assert guests[1] == guests[3] == guests[4] == 0


def test_balanced_tokens_stay_where_they_are(ranks):
    model = build("qwen3_moe", num_experts_per_tok=2)

    def work(group):
        m = ray_ep.moe.parallelize(copy(model), group)
        free(m)
        index = (torch.arange(64)[:, None] * 2 + torch.arange(2)) % 8
        m.ray_ep.modules[0](torch.randn(64, 32), index, torch.ones(64, 2))
        return m.ray_ep.balancer.done.guests, m.ray_ep.balancer.done.before

    assert ranks(4, work) == [(0, 1.0)] * 4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 3), st.integers(1, 4), st.integers(0, 999))
def test_destinations_meet_the_plan_exactly_in_both_bodies(tokens, top_k, ranks, seed):
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(5)[:top_k] for _ in range(tokens)]) if tokens else np.zeros((0, top_k), np.int64)
    index[rng.random(index.shape) < 0.1] = -1
    counts = np.bincount(index[index >= 0], minlength=5)
    sends = np.stack([rng.multinomial(n, np.full(ranks, 1 / ranks)) for n in counts])
    me = int(rng.integers(ranks))
    for to in (kernels.assign(index, sends, me), destinations(torch.from_numpy(index), torch.from_numpy(sends), me)):
        to = np.asarray(to)
        assert ((to == -1) == (index == -1)).all()
        for e in range(5):
            assert (np.bincount(to[index == e], minlength=ranks) == sends[e]).all()


def test_what_cannot_be_balanced_is_said_once_and_the_run_goes_on(ranks, caplog):
    model = build("qwen3_moe")
    with pytest.raises(BadInput, match="balance='sometimes': allowed are off, auto, always"):
        ranks(1, lambda g: ray_ep.moe.parallelize(copy(model), g, balance="sometimes"))

    def run(group, **options):
        m = ray_ep.moe.parallelize(copy(model), group, balance="always", **options)
        return m(input_ids=ids_of()).logits, m(input_ids=ids_of()).logits

    with caplog.at_level(logging.WARNING, "ray_ep"):
        ranks(1, run)
        assert [r.message for r in caplog.records] == [
            "balance=always: a group of one rank has nothing to balance; it goes on without"
        ]
        caplog.clear()
        ranks(2, lambda g: run(g, limits=Limits(guest_mb=0)))
        assert len(caplog.records) == 2, "once a rank"
        assert "balance.guest_mb=0 is less than one expert" in caplog.text
        caplog.clear()
        ranks(2, lambda g: run(g, node_of=np.array([0, 1])))
        assert len(caplog.records) == 2
        assert "no two ranks share a node" in caplog.text


def copy(model):
    import copy

    return copy.deepcopy(model)
