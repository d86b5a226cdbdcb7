"""Layers over DeepEP equal layers over the other ways; its place is taken by a double with its signatures and orders."""

import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup

from ray_ep.collective import TorchGroup, TorchNcclGroup
from ray_ep.collective.torch_nccl import whole
from tests import fake_deepep
from tests.models import VOCAB, build, even_shards, loss_sum, parallel_pass, placement_of, reference

BFLOAT16 = {"dtype": torch.bfloat16, "hidden_size": 256, "num_hidden_layers": 2}


class NcclOverGloo(TorchNcclGroup):
    """Takes the place of torch's NCCL where there is no GPU."""

    def __init__(self, store, rank, size):
        backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30))
        TorchGroup.__init__(self, backend, rank, size, timeout_s=30)
        self.device, self._last, self._live = torch.device("cpu"), None, True
        self._whole = whole(backend, rank, size, "cpu", ProcessGroup.BackendType.GLOO)


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", fake_deepep)
    fake_deepep.ElasticBuffer.made.clear()


@pytest.fixture
def over(ranks):
    """Call work(group) on ranks over what takes NCCL's place."""
    store = dist.HashStore()

    def run(size, work):
        return ranks(size, lambda g: work(NcclOverGloo(PrefixStore("nccl", store), g.rank, size)))

    return run


def by_deepep(model):
    model.ray_ep.exchange_by(kind="deepep", tokens=64)


def general(model):
    model.ray_ep.exchange_by(fused=False)


def ids_of(rows):
    return torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(1))


def passes(run, model, ids, size, kind, before, shards=None):
    placement, shards = placement_of(model, kind, size), shards or even_shards(len(ids), size)
    return run(size, lambda g: parallel_pass(model, ids, g, placement, shards, before))


def differ(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["contiguous", "replicated", "empty_rank"])
def test_x(over, ranks, size, kind):
    model, ids = build("qwen3_moe", **BFLOAT16), ids_of(5)
    loss, logits, grads = reference(model, ids)
    a = passes(over, model, ids, size, kind, by_deepep)
    b = passes(ranks, model, ids, size, kind, general)
    la, lb = (torch.cat([r[2] for r in x]) for x in (a, b))
    print("logits", differ(la, logits), differ(lb, logits), differ(la, lb))
    for n, g in grads.items():
        print(n, differ(a[0][3][n], g), differ(b[0][3][n], g), differ(a[0][3][n], b[0][3][n]))
