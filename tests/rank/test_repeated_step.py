"""A step that failed anywhere is undone without a trace, or finished where it was ready; then it can be made again.

Three ranks in threads, with replicas and guests. One fails at each kind of call in turn, and with every phase first and
last; what each rank holds is compared whole, with itself before the step and with ranks that never failed.
"""

import re

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from ray_ep.collective.mailboxes import is_free
from ray_ep.placement import Placement
from tests.conftest import slow
from tests.rank.failing import FailingGroup, differences, form, held, together
from tests.rank.test_optimizer import state
from tests.rank.test_training import EXPERTS, GPT_OSS, LAYERS, QWEN, configure, make_rank

SIZE, STEP = 3, 2
SLOTS = [[0, 1, 2, 3], [4, 5, 2, -1], [6, 7, 4, 3]]  # half of the tokens go to experts 0 and 1: they become guests
PLACEMENT = Placement(np.array([SLOTS] * LAYERS), EXPERTS)
DROPOUT = (QWEN[0].replace("{hidden_size", "{attention_dropout: 0.1, hidden_size"),)
VARIANTS = {
    "fused": ((), QWEN),
    "grouped": ((), GPT_OSS),
    "accumulation": (("batch.accumulation=2",), QWEN),
    "recomputation": (("model.gradient_checkpointing=true",), QWEN),
    "bfloat16": (("model.dtype=bfloat16",), QWEN),
    "dropout": ((), DROPOUT),
}
MORE = slow("fused", "accumulation", "bfloat16", "dropout")
TIMES = re.compile(r"seconds|_since|_inside|\.usage\.|_meter|peak_mib|\.spent|_last\.epoch")  # and the group's epoch


@pytest.fixture
def trios(request):
    """Two trios that have done the same two steps, and what a third step calls on each rank: [(phase, call)]."""
    overrides, model = VARIANTS[request.param]
    cfg, config = configure("balance.in_step=always", "router.force=skewed", *overrides, model=model)
    with set_checkpoint_early_stop(False):  # a global of torch, which ranks in threads would switch for one another
        made = [trio(cfg, config) for _ in range(2)]
        for ranks in made:
            for step in range(STEP):
                together(lambda r, ranks=ranks, step=step: ranks[r].train_step(step), SIZE)
        yield made
        for ranks in made:
            [rank.failing.inner.close() for rank in ranks]


def trio(cfg, config, assume=True):
    peers = []
    peers += [FailingGroup(group, peers) for group in form(SIZE)]
    ranks = together(lambda r: make_rank(cfg, config, peers[r], PLACEMENT), SIZE)
    for rank, failing in zip(ranks, peers, strict=True):
        rank.failing = failing
        rank.ep.balancer.assume(1e-3, 1e12) if assume else None  # so that there are guests
        rank.failing.where = lambda rank=rank: rank.clock._phase
    return ranks


def make_step(ranks):
    return together(lambda r: ranks[r].train_step(STEP), SIZE)


def regroup(ranks):
    epoch = ranks[0].failing.epoch + 1
    for rank, group in zip(ranks, form(SIZE, epoch=epoch), strict=True):
        rank.failing.inner.close()
        rank.failing.inner = group
        rank.group.use(rank.failing)  # of another epoch
        rank.failing.script(None)


def points(log):
    """{number of a call: (phase, call)}: of each kind the first and the last."""
    first, last = {}, {}
    for number, kind in enumerate(log):
        first.setdefault(kind, number)
        last[kind] = number
    return {number: log[number] for number in sorted({*first.values(), *last.values()})}


def assert_like_control(ranks, control):
    for rank, other in zip(ranks, control, strict=True):
        assert differences(held(rank)[0], held(other)[0], TIMES.search) == []


@pytest.mark.parametrize("trios", ["grouped", "recomputation", *MORE], indirect=True)
def test_a_step_that_failed_before_its_last_collective_ended_leaves_no_trace_and_can_be_made_again(trios):
    ranks, control = trios
    [rank.failing.script(None) for rank in control]
    want = make_step(control)
    log = control[1].failing.log
    phases = {phase for phase, _ in log}
    assert phases == {"forward", "backward", "reduce", "norm", "rest", "publish"}
    assert sum(result.usage.balance[3] for result in want) > 0, "there were guests"
    assert {("reduce", "all_reduce"), ("reduce", "all_to_all"), ("rest", "all_gather")} <= set(log)
    before = [held(rank)[0] for rank in ranks]
    for number, (phase, call) in points(log).items():
        if phase == "publish":
            continue
        failing = number % SIZE
        ranks[failing].failing.script(number)
        results = make_step(ranks)
        at = f"{phase}, {call}, number {number}"
        assert ranks[failing].failing.happened == 1, at
        assert [kind for kind, _ in results] == ["Fault" if r == failing else "GroupError" for r in range(SIZE)], at
        assert [rank.state().updates for rank in ranks] == [STEP] * SIZE, at
        for rank, was in zip(ranks, before, strict=True):
            rank.discard()
            now, pools = held(rank)
            assert differences(was, now) == [], at
            assert all(is_free(b) for pool in pools for b in pool._buffers), at
            rank.discard()  # again does nothing
        regroup(ranks)
    results = make_step(ranks)
    assert [r.loss for r in results] == [r.loss for r in want]
    assert not any(logits is not None for rank in ranks for logits in rank.ep.routing.logits), "the graph is let go"
    assert_like_control(ranks, control)


@pytest.mark.parametrize("trios", ["fused", "bfloat16"], indirect=True)
def test_a_rank_that_failed_when_others_had_updated_finishes_and_all_publish_again(trios):
    ranks, control = trios
    [rank.failing.script(None) for rank in control]
    want, log = make_step(control), control[1].failing.log
    ranks[1].failing.script(log.index(("rest", "all_gather")), after=True)
    results = make_step(ranks)
    assert results[1][0] == "Fault"
    assert [(s.updates, s.ready) for s in (r.state() for r in ranks)] == [(3, None), (2, STEP), (3, None)]
    finished = [rank.finish(STEP) for rank in ranks]
    assert finished == [rank.finish(STEP) for rank in ranks], "again it does nothing"
    assert [r.state().unpublished for r in ranks] == [True] * SIZE
    regroup(ranks)
    together(lambda r: ranks[r].publish(), SIZE)
    assert [r.state() for r in ranks] == [r.state() for r in control]
    assert [(f.loss, f.grad_norm) for f in finished] == [(w.loss, w.grad_norm) for w in want]
    assert_like_control(ranks, control)


@pytest.mark.parametrize("trios", ["fused"], indirect=True)
def test_a_step_that_failed_while_it_was_published_is_done_and_is_published_again(trios):
    ranks, control = trios
    [rank.failing.script(None) for rank in control]
    make_step(control)
    publishing = [n for n, (phase, _) in enumerate(control[1].failing.log) if phase == "publish"]
    assert len(publishing) > 1
    ranks[1].failing.script(publishing[1])
    assert make_step(ranks)[1][0] == "Fault"
    assert [(s.updates, s.ready, s.unpublished) for s in (r.state() for r in ranks)] == [(3, None, True)] * SIZE
    [rank.discard() for rank in ranks]  # there is no half step
    regroup(ranks)
    assert all("publish them first" in text for _, text in together(lambda r: ranks[r].train_step(STEP + 1), SIZE))
    together(lambda r: ranks[r].publish(), SIZE)
    assert_like_control(ranks, control)


@pytest.mark.parametrize("trios", ["fused"], indirect=True)
def test_a_rank_that_failed_in_its_update_is_torn_and_the_others_have_done_the_step(trios):
    ranks, control = trios
    make_step(control)

    def enter(phase):
        type(ranks[1].clock).enter(ranks[1].clock, phase)
        if phase == "update":
            ranks[1].failing.script(0)
            ranks[1].failing.log.append((phase, "no call"))
            ranks[1].failing.fail()

    ranks[1].optimizer.enter = enter
    results = make_step(ranks)
    assert [kind for kind, _ in results] == ["GroupError", "Fault", "GroupError"]
    assert ranks[1].state().torn
    for call in (ranks[1].discard, lambda: ranks[1].finish(STEP)):
        with pytest.raises(AssertionError):
            call()
    for r in (0, 2):
        assert (ranks[r].state().updates, ranks[r].state().torn) == (3, False)
        mine, other = state(ranks[r]), state(control[r])
        assert [k for k in other if not torch.equal(mine[k], other[k])] == []


@pytest.mark.parametrize("trios", ["fused"], indirect=True)
def test_a_step_is_not_begun_over_a_half_one_and_ranks_at_different_steps_update_nothing(trios):
    ranks, _ = trios
    before = [state(rank) for rank in ranks]
    results = together(lambda r: ranks[r].train_step(STEP + (r == 1)), SIZE)
    assert all(kind == "GroupError" and "do not make the same step" in text for kind, text in results)
    assert {kind for kind, _ in make_step(ranks)} == {"AssertionError"}
    for rank in ranks:
        with pytest.raises(AssertionError, match="neither finished nor discarded"):
            rank.regroup(PLACEMENT, None)
        rank.discard()
    assert all(torch.equal(state(rank)[k], t) for rank, was in zip(ranks, before, strict=True) for k, t in was.items())


@pytest.mark.parametrize("way", ["flat", "all_gather"])
def test_what_ranks_agree_on_at_its_first_use_they_agree_on_again_after_a_failure_in_the_midst_of_it(way):
    cfg, config = configure("balance.in_step=always")
    ranks = trio(cfg, config, assume=False)
    [rank.ep.exchange_by(kind=way) for rank in ranks]
    for number in range(0, 12, 2) if way == "flat" else [0]:
        ranks[1].failing.script(number, after=True)  # the others have learnt what it has not
        assert [kind for kind, _ in together(lambda r: ranks[r].train_step(0), SIZE)][1] == "Fault"
        [rank.discard() for rank in ranks]
        regroup(ranks)
    results = together(lambda r: ranks[r].train_step(0), SIZE)
    assert len({(r.loss, r.grad_norm) for r in results}) == 1


def test_an_evaluation_or_a_choice_that_failed_leaves_no_trace():
    cfg, config = configure("balance.in_step=always", "exchange.kind=auto")
    ranks = trio(cfg, config, assume=False)
    together(lambda r: ranks[r].train_step(0), SIZE)
    before = [held(rank)[0] for rank in ranks]
    choose = lambda r: ranks[r].choose_exchange(1, {"gloo": ranks[r].failing, "again": ranks[r].failing})  # noqa: E731
    for work, numbers in ((lambda r: ranks[r].evaluate(), range(0, 8, 2)), (choose, range(0, 60, 6))):
        for number in numbers:
            ranks[1].failing.script(number, after=True)
            assert together(work, SIZE)[1][0] == "Fault"
            for rank, was in zip(ranks, before, strict=True):
                assert differences(was, held(rank)[0], lambda path: "._chosen" in path) == [], number
            regroup(ranks)


def test_the_norm_is_one_number_where_processors_sum_dense_gradients_otherwise_in_the_last_bit():
    ranks = trio(*configure())

    def norm(r):
        optimizer = ranks[r].optimizer
        optimizer.accumulate()
        dense = next(w for w in optimizer.weights if w.layer is None)
        dense.gradient.flatten()[0] = 1 + r * 1e-7
        return optimizer.norm(torch.zeros(1, dtype=torch.float64))

    assert len(set(together(norm, SIZE))) == 1
