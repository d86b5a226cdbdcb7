"""Ranks that come are given what every rank has, between two steps: the curve is that of one process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective import EpochGroup, gloo
from ray_ep.errors import GroupError
from ray_ep.placement import Topology, contiguous
from ray_ep.rank import handover
from ray_ep.rank.handover import Bytes, hand_over
from tests.conftest import in_threads
from tests.rank.test_migration import drawn
from tests.rank.test_training import EXPERTS, GPT_OSS, LAYERS, QWEN, assert_follows, configure, make_rank, reference

STEPS = 6


def form(store, held, rank, size, epoch):
    held.form(epoch, {"gloo": lambda: gloo(store, rank, size, epoch, "127.0.0.1", 20, 20)}, 20)


def newcomer(cfg, config):
    """Built alone, as a rank that no group knows of."""
    held = EpochGroup()
    held.sit(1, 2)
    return held, make_rank(cfg, config, held, contiguous(LAYERS, EXPERTS, 1).among((0, -1)))


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        (("exchange.tokens=1024", "balance.in_step=always"), QWEN),
        (("optim.kind=sgd", "optim.beta1=0.9", "exchange.chunks=2"), QWEN),
        ((), GPT_OSS),
    ],
    ids=["balanced", "sgd", "gpt_oss"],
)
@pytest.mark.parametrize("at", [0, 2])
def test_two_ranks_that_come_at_once_follow_the_curve_of_one_process(monkeypatch, overrides, model, at):
    monkeypatch.setattr(handover, "PIECE", 1000)  # many messages, tensors that lie across two of them
    cfg, config = configure(*overrides, model=model)
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    first, last = drawn(2, 1, True), drawn(4, 3, True)

    def stay(rank):
        held = EpochGroup()
        form(store, held, rank, 2, 0)
        made = make_rank(cfg, config, held, first)
        made.ep.exchange_by(kind="all_gather")
        return go_on(made, rank, [made.train_step(s) for s in range(at)])

    def come(rank):
        _, made = newcomer(cfg, config)
        assert sum(p.numel() for n, p in made.model.named_parameters() if n in made.ep.expert_parameter_names()) == 0
        for tensor in (*(w.master.data for w in made.optimizer.weights), *made.model.buffers()):
            tensor.zero_()
        return go_on(made, rank, [])

    def go_on(made, rank, results):
        form(store, made.group, rank, 4, 1)
        hand_over(made, (2, 3))
        made.regroup(first.among([0, 1, -1, -1]), Topology.of_nodes([0, 0, 1, 1]))
        assert made.ep.exchange.kind == "all_gather"
        made.migrate(last)
        results += [made.train_step(s) for s in range(at, STEPS)]
        made.group.close()
        return results

    old, _, new, other = in_threads(*(lambda r=r, go=go: go(r) for r, go in enumerate((stay, stay, come, come))))
    curve, _ = reference(STEPS, *(o for o in overrides if "balance" not in o), model=model)
    assert_follows([old], curve)
    for came in (new, other):
        assert [r.step for r in came] == list(range(at, STEPS))
        assert [(r.loss, r.grad_norm) for r in came] == [(r.loss, r.grad_norm) for r in old[at:]]


def test_a_rank_that_no_group_knows_of_can_be_built_and_reaches_nobody():
    cfg, config = configure()
    held, made = newcomer(cfg, config)
    assert (held.rank, held.size) == (1, 2)
    with pytest.raises(GroupError, match="no group was formed"):
        made.train_step(0)


def test_bytes_of_tensors_of_any_layout_are_read_and_written_in_parts():
    there = [torch.arange(6.0).view(2, 3).t(), torch.tensor(7), torch.zeros(0), torch.tensor([True, False, True])]
    here = [torch.full_like(t, 9) if t.dtype != torch.bool else torch.zeros_like(t) for t in there]
    here[0] = torch.zeros(2, 3).t()
    source, target = Bytes(there), Bytes(here)
    assert source.size == target.size == 24 + 8 + 3
    for start in range(0, source.size, 5):
        target.write(start, source.read(start, min(start + 5, source.size)))
    target.put_back()
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a, b)
