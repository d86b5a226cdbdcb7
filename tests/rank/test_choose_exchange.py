"""The choice of the exchange at the start of a run changes no number of the training that follows."""

import numpy as np
import pytest
import torch

from ray_ep.moe.choose import take
from ray_ep.placement import random
from tests.conftest import run_ranks
from tests.rank.test_training import EXPERTS, LAYERS, configure, make_rank, reference


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
        return [rank.train_step(n) for n in range(steps)], rank.statistics(), choice

    return run_ranks(size, work)


def assert_untouched(rank):
    ep = rank.ep
    assert [layer.calls for layer in ep.layers] == [0] * LAYERS
    assert ep.counters.enabled
    assert ep.counters.seen == ep.counters.seconds == 0
    assert ep.meter.sent.sum() == ep.meter.pairs.sum() == sum(ep.meter.seconds.values()) == 0
    assert ep.routing.logits == [None] * LAYERS
    assert rank.statistics().load.sum() == 0
    assert all(p.grad is None for p in rank.model.parameters())
    assert all(layer.captured is None for layer in ep.layers)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [(2, ()), (3, ("batch.sequences=2",)), (4, ("batch.accumulation=2", "batch.sequences=8"))],
    ids=["two ranks", "a rank without tokens", "accumulation on two nodes"],
)
def test_losses_and_statistics_are_those_of_a_run_without_a_choice_bit_for_bit(size, overrides):
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
