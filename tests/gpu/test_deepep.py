"""The real DeepEP under the layer: equal to the general layer. Not run yet, neither on one GPU nor on several.

pytest tests/gpu/test_deepep.py        # on one node without a network card for RDMA: EP_DISABLE_GIN=1 before it
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ray_ep
from ray_ep.collective.torch_nccl import torch_nccl
from ray_ep.moe.exchange.elastic import INSTALL, installed
from tests.models import VOCAB, build, loss_sum, placement_of

IDS = torch.randint(3, VOCAB, (6, 9), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.skipif(not installed(), reason=f"needs deep_ep: {INSTALL}")


def compare(group, device, kind="replicated"):
    """Logits and gradients of this rank's rows by DeepEP, against the general layer over the same group."""
    model = build("qwen3_moe", dtype=torch.bfloat16, hidden_size=256).to(device)
    ids, found = IDS[group.rank :: group.size].to(device), []
    for exchange in ({"kind": "deepep", "tokens": 64}, {"kind": "flat", "fused": False}):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, kind, group.size), "off")
        m.ray_ep.exchange_by(**exchange)
        loss, logits = loss_sum(m, ids)
        loss.backward()
        found.append({"logits": logits.detach(), **{n: p.grad for n, p in m.named_parameters() if p.grad is not None}})
    ours, general = found
    assert ours.keys() == general.keys()
    far = {n: float((ours[n] - g).float().norm() / g.float().norm().clamp_min(1e-6)) for n, g in general.items()}
    assert {n: d for n, d in far.items() if d > 0.02} == {}


def test_one_rank_equals_the_general_layer(device):
    group = torch_nccl(dist.HashStore(), 0, 1, timeout_s=60)
    compare(group, device, "contiguous")
    group.close()


JOB = """
import os, torch, torch.distributed as dist
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
from ray_ep.collective import from_torch
from tests.gpu.test_deepep import compare
for kind in ("contiguous", "replicated", "empty_rank"):
    compare(from_torch(), torch.device("cuda", torch.cuda.current_device()), kind)
"""


def test_ranks_with_a_gpu_each_equal_the_general_layer(tmp_path):
    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip(f"needs two CUDA devices; there is {gpus}")
    (tmp_path / "job.py").write_text(JOB)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={min(gpus, 8)}"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        ["env", f"PYTHONPATH={root}", *run, str(tmp_path / "job.py")], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
