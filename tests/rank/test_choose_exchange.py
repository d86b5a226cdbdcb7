"""The choice of the exchange at the start of a run changes no number of the training that follows."""

import json

import numpy as np
import pytest
import torch

from ray_ep.driver.measures import step_record
from ray_ep.moe import KINDS
from ray_ep.moe.exchange.choose import take
from ray_ep.moe.passes import Pass
from ray_ep.placement import Topology, random
from ray_ep.rank.step.clock import INSIDE
from tests.conftest import run_ranks, slow
from tests.rank.test_training import EXPERTS, GPT_OSS, LAYERS, QWEN, TOP_K, configure, make_rank, reference


def run(size, steps, *overrides, choose, node_of=None):
    """[rank] (results, statistics, choice) of a training on the flat way, after a choice or without one."""
    cfg, config = configure(*overrides)
    placement = random(LAYERS, EXPERTS, size, 5, seed=1)

    def work(group):
        rank = make_rank(cfg, config, group, placement, node_of)
        choice = None
        if choose:
            group.barrier()  # all models are drawn: the random state is nobody else's
            before = torch.get_rng_state()
            choice = rank.choose_exchange(0, {"gloo": group})
            assert torch.equal(torch.get_rng_state(), before)
            assert_untouched(rank)
            take(rank.ep, "flat", group)
        return [rank.train_step(n) for n in range(steps)], rank.rank.statistics(), choice

    return run_ranks(size, work)


def assert_untouched(rank):
    ep = rank.ep
    assert [layer.calls for layer in ep.layers] == [0] * LAYERS
    assert ep.counters._enabled
    assert ep.counters.seen == ep.counters.seconds == 0
    assert ep.meter.sent.sum() == ep.meter.pairs.sum() == sum(ep.meter.seconds.values()) == 0
    assert ep.routing.logits == [None] * LAYERS
    assert rank.rank.statistics().load.sum() == 0
    assert all(p.grad is None for p in rank.model.parameters())
    assert ep.passes.now == Pass()


RUNS = {  # ranks, two on a node, and what is overridden
    "two ranks": (2, ()),
    "a rank without tokens": (3, ("batch.sequences=2",)),
    "accumulation on two nodes": (4, ("batch.accumulation=2", "batch.sequences=8")),
}


@pytest.mark.parametrize("case", ["a rank without tokens", *slow("two ranks", "accumulation on two nodes")])
def test_losses_and_statistics_are_those_of_a_run_without_a_choice_bit_for_bit(case):
    size, overrides = RUNS[case]
    node_of = np.arange(size) // 2
    overrides = (*overrides, "balance.in_step=off")  # by measured costs a sum may be taken in another order
    chosen = run(size, 3, *overrides, choose=True, node_of=node_of)
    pinned = run(size, 3, "exchange.kind=flat", *overrides, choose=False, node_of=node_of)
    for (got, counted, choice), (want, plain, _) in zip(chosen, pinned, strict=True):
        assert len(choice.timings) >= 2
        for g, w in zip(got, want, strict=True):
            assert (g.loss, g.aux_loss, g.grad_norm) == (w.loss, w.aux_loss, w.grad_norm)
            assert np.array_equal(g.load, w.load)
            assert np.array_equal(g.usage.sent, w.usage.sent)
            assert np.array_equal(g.usage.pairs, w.usage.pairs)
        for name in ("load", "coactivation", "transitions", "sample"):
            assert np.array_equal(getattr(counted, name), getattr(plain, name)), name


def test_whatever_is_taken_follows_the_single_process_trainer():
    want, _ = reference(3)
    cfg, config = configure()
    placement = random(LAYERS, EXPERTS, 4, 3, seed=1)

    def work(group):
        rank = make_rank(cfg, config, group, placement, np.array([0, 0, 1, 1]))
        choice = rank.choose_exchange(0, {"gloo": group})
        assert rank.ep.exchange.kind == choice.kind
        return choice, [rank.train_step(n).loss for n in range(3)]

    results = run_ranks(4, work)
    assert len({c.kind for c, _ in results}) == 1
    assert {t.kind for t in results[0][0].timings} == {"flat", "two_level", "all_gather"}
    for _, losses in results:
        assert losses == pytest.approx([w.loss for w in want], rel=1e-5)


@pytest.mark.parametrize("model", [QWEN, GPT_OSS], ids=["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reports_the_pairs_it_computed_and_where_its_time_went_on_every_way(kind, model):
    overrides = (f"exchange.kind={kind}", "batch.accumulation=2", "model.gradient_checkpointing=true")
    cfg, config = configure(*overrides, "balance.in_step=off", model=model)
    placement = random(LAYERS, EXPERTS, 3, seed=1)

    def work(group):
        rank = make_rank(cfg, config, group, placement, np.array([0, 0, 1]))
        rank.choose_exchange(0, {"gloo": group})
        return rank.train_step(0)

    results = run_ranks(3, work)
    pairs = sum(r.usage.pairs for r in results)
    assert pairs.tolist() == results[0].load.sum(1).tolist() == [4 * 32 * TOP_K] * LAYERS
    m = step_record(1, results, 1.0, Topology.of_nodes([0, 0, 1]), placement).line()
    json.dumps(m, allow_nan=False)
    inside = [f"{what}_{way}" for what in INSIDE for way in ("forward", "backward")]
    assert [name for name in inside if not m["phase_seconds"][name] > 0] == []
    experts = sum(m["phase_seconds"][f"experts_{way}"] for way in ("forward", "backward"))
    assert m["expert_seconds"] == pytest.approx(experts)


def test_a_lone_rank_and_a_pinned_way_are_not_timed():
    for size, kind in ((1, "auto"), (2, "all_gather")):
        cfg, config = configure(f"exchange.kind={kind}", "exchange.chunks=2", "exchange.float8=true")
        placement = random(LAYERS, EXPERTS, size, seed=1)

        def work(group):
            rank = make_rank(cfg, config, group, placement)
            choice = rank.choose_exchange(0, {"gloo": group})
            assert_untouched(rank)
            way = rank.ep.exchange
            return choice.kind, choice.timings, (way.kind, way.chunks, way.float8)

        taken = "flat" if size == 1 else kind
        assert run_ranks(size, work) == [(taken, [], (taken, 2, True))] * size
