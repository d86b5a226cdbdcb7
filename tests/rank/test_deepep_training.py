"""Training with exchange.transport=deepep, its library's place taken by a double."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ray_ep.moe.exchange.choose import take
from ray_ep.placement import random
from tests import fake_deepep
from tests.conftest import run_ranks
from tests.fake_deepep import NcclOverGloo
from tests.rank.test_training import EXPERTS, LAYERS, QWEN, configure, make_rank

WIDE = tuple(q.replace("hidden_size: 32", "hidden_size: 256") for q in QWEN)


def trained(*overrides):
    """([rank] losses, choices, ranks) of three steps on two ranks with replicas."""
    cfg, config = configure("model.dtype=bfloat16", *overrides, model=WIDE)
    store = dist.HashStore()

    def work(group):
        group = NcclOverGloo(PrefixStore("nccl", store), group.rank, 2)
        rank = make_rank(cfg, config, group, random(LAYERS, EXPERTS, 2, 6, seed=1))
        if cfg.exchange.transport == "deepep":
            choice = rank.choose_exchange(0, {"torch_nccl": group})
        else:
            rank.ep.exchange_by(fused=False)
            choice = take(rank.ep, "flat", group)
        return [rank.train_step(step) for step in range(3)], choice, rank

    return zip(*run_ranks(2, work), strict=True)


def test_a_training_over_deepep_is_that_of_the_general_layer_bit_for_bit(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", fake_deepep)
    monkeypatch.setattr(fake_deepep.ElasticBuffer, "made", [])
    results, choices, ranks = trained("exchange.transport=deepep")
    assert {(c.kind, c.transport, c.words()) for c in choices} == {
        ("deepep", "torch_nccl", "deepep over torch_nccl (pinned)")
    }
    assert [b["tokens"] for b in fake_deepep.ElasticBuffer.made] == [ranks[0].cfg.eval.sequences // 2 * 32] * 2
    expected, _, others = trained("balance.in_step=off")
    for mine, theirs, rank, other in zip(results, expected, ranks, others, strict=True):
        assert [(r.loss, r.grad_norm) for r in mine] == [(r.loss, r.grad_norm) for r in theirs]
        pairs = zip(rank.model.parameters(), other.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
