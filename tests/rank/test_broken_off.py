"""Steps and evaluations that all ranks leave between two passes: as if they had not begun. Ranks are threads."""

import copy

import numpy as np
import pytest
import torch

from ray_ep.config.schema import BatchConfig
from ray_ep.rank.data.batch import Batch
from ray_ep.rank.evaluation import evaluation_parts
from tests.conftest import run_ranks
from tests.rank.test_training import EXPERTS, LAYERS, configure, contiguous, make_rank


def state(rank):
    """Everything that a pass may change, as plain values."""
    ep = rank.ep
    counters = {k: copy.deepcopy(v) for k, v in vars(ep.counters).items() if k not in ("seconds", "_rng")}
    return {
        "counters": counters,
        "reservoir": copy.deepcopy(ep.counters._rng.bit_generator.state),
        "sent": ep.meter.sent.copy(),
        "pairs": ep.meter.pairs.copy(),
        "calls": [layer.calls for layer in ep.layers],
        "balance": copy.deepcopy(ep.balancer.done),
        "weights": [p.detach().clone() for p in rank.model.parameters()],
        "moments": [m.clone() for w in rank.optimizer.weights for m in w.moments.values()],
        "pending": rank.optimizer.pending(),
        "gradients": [p.grad for p in rank.model.parameters() if p.grad is not None],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def ranks_of(*overrides):
    cfg, config = configure(*overrides)
    return lambda group: make_rank(cfg, config, group, contiguous(LAYERS, EXPERTS, group.size))


def test_a_step_that_one_rank_is_asked_to_leave_leaves_no_trace_on_any_and_can_be_made_again():
    make = ranks_of("batch.accumulation=4")

    def undisturbed(group):
        rank = make(group)
        return [rank.train_step(s).loss for s in range(3)]

    def broken_off(group):
        rank = make(group)
        losses = [rank.train_step(0).loss]
        before = state(rank)
        if group.rank == 1:
            rank.stop.set()
        assert rank.train_step(1) is None
        after = state(rank)
        assert [k for k in before if not same(before[k], after[k])] == []
        rank.stop.clear()
        return losses + [rank.train_step(s).loss for s in (1, 2)]

    assert run_ranks(2, broken_off) == run_ranks(2, undisturbed)


def test_a_step_of_one_pass_is_finished():
    def work(group):
        rank = ranks_of()(group)
        rank.stop.set()
        return rank.train_step(0)

    assert all(result is not None for result in run_ranks(2, work))


def test_a_long_evaluation_is_left_by_all_ranks_together():
    make = ranks_of("eval.sequences=150", "batch.length=4")

    def work(group):
        rank = make(group)
        if group.rank == 0:
            rank.stop.set()
        assert rank.evaluate(trace=True) is None
        rank.stop.clear()
        return rank.evaluate()[0]

    first, second = run_ranks(2, work)
    assert first == second


def test_an_evaluation_in_parts_has_the_loss_and_the_trace_of_one_in_a_single_pass():
    parts = ["eval.sequences=130", "batch.length=4"]
    whole = [*parts, "batch.sequences=130"]

    def work(group):
        return [ranks_of(*overrides)(group).evaluate(trace=True) for overrides in (parts, whole)]

    for (loss, trace), (expected, full) in run_ranks(2, work):
        assert abs(loss - expected) < 1e-6
        assert len(trace) == LAYERS
        assert all(np.array_equal(t["experts"], f["experts"]) for t, f in zip(trace, full, strict=True))


@pytest.mark.parametrize("stop", [False, True])
def test_after_an_evaluation_with_a_trace_steps_exchange_as_before_and_trace_nothing(stop):
    make = ranks_of("exchange.kind=two_level", "balance.in_step=off", "eval.sequences=150", "batch.length=4")

    def work(group, evaluate):
        rank = make(group)
        rank.choose_exchange(0, {"gloo": group})
        if evaluate:
            rank.stop.set() if stop else None
            assert (rank.evaluate(trace=True) is None) == stop
            rank.stop.clear()
        assert rank.ep.passes.now.trace is None
        return rank.train_step(0).usage

    for got, want in zip(*(run_ranks(3, lambda g, e=e: work(g, e)) for e in (True, False)), strict=True):
        assert np.array_equal(got.sent, want.sent)
        assert np.array_equal(got.pairs, want.pairs)


def test_what_fits_into_one_pass_is_one_and_every_rank_has_as_many():
    ids = np.arange(400).reshape(200, 2)
    rows = Batch(ids, ids, ids)
    cfg = BatchConfig(sequences=32)
    (part,) = evaluation_parts(rows.rows(0, 32), 64, cfg)
    assert part[0] == 0
    assert np.array_equal(part[1].ids, ids[:32])
    assert (
        len(list(evaluation_parts(rows.rows(0, 0), 130, cfg)))
        == len(list(evaluation_parts(rows.rows(0, 66), 130, cfg)))
        == 3
    )
    assert [n for n, _ in evaluation_parts(rows.rows(0, 66), 130, cfg)] == [0, 22, 44]
    assert np.array_equal(np.concatenate([p.ids for _, p in evaluation_parts(rows, 200, cfg)]), ids)
