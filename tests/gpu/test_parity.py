"""A small Qwen3-MoE on the device equals plain transformers there: under NCCL, and with ranks that share the GPU.

Not run on a GPU yet; the job of several ranks was run on CPU.
"""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ray_ep
from tests.models import VOCAB, build, loss_sum, placement_of, reference

IDS = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


def run(model, ids, group, placement=None):
    """Loss, logits and gradients by name (contiguous placement of one rank: experts in their order)."""
    model = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement)
    loss, logits = loss_sum(model, ids)
    loss = loss / ids[:, 1:].numel()
    loss.backward()
    assert all(layer.calls for layer in model.ray_ep.layers)
    return loss.detach(), logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_float32_logits_and_gradients_equal_plain_transformers(group, device, name):
    model, ids = build(name).to(device), IDS.to(device)
    loss, logits, grads = reference(model, ids)
    got_loss, got_logits, got_grads = run(model, ids, group)
    assert abs(got_loss - loss) <= 1e-5
    assert (got_logits - logits).abs().max() <= 2e-5
    for n, g in grads.items():
        worst = (got_grads[n] - g).abs().max()
        assert worst <= 2e-5, f"{n}: {worst}"


def test_bfloat16_is_as_exact_as_plain_transformers_with_grouped_mm(group, device):
    ids = IDS.to(device)
    exact, low = build("qwen3_moe").to(device), build("qwen3_moe", dtype=torch.bfloat16).to(device)
    exact.load_state_dict(low.state_dict())  # the same rounded weights, computed with in float32
    _, want, _ = reference(exact, ids)
    _, plain, _ = reference(low, ids)
    _, ours, grads = run(low, ids, group)
    assert (ours.float() - want).norm() <= 1.25 * (plain.float() - want).norm()  # as on CPU
    assert all(g.isfinite().all() for g in grads.values())


JOB = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
import ray_ep
from ray_ep.collective import StagedGroup, from_torch
from tests.gpu.test_parity import IDS
from tests.models import build, even_shards, loss_sum, placement_of, reference
group, device = StagedGroup(from_torch()), torch.device("cuda", 0)
model, ids = build("qwen3_moe").to(device), IDS.to(device)
loss, logits, grads = reference(model, ids)
shards = even_shards(5, group.size)
low, high = shards[group.rank], shards[group.rank + 1]
for kind in sys.argv[1:]:
    ours = ray_ep.moe.parallelize(build("qwen3_moe").to(device), group, placement_of(model, kind, group.size))
    ep = ours.ray_ep
    got, got_logits = loss_sum(ours, ids[low:high])
    (got / ids[:, 1:].numel()).backward()
    assert (got_logits - logits[low:high]).abs().max() <= 2e-5, kind
    experts = ep.expert_parameter_names()
    for name, p in ours.named_parameters():
        if name not in experts:
            grad = p.grad.clone()
            group.all_reduce(grad)
            assert (grad - grads[name]).abs().max() <= 2e-5, (kind, name)
    for index, module in enumerate(ep.names):
        owner, held = ep.placement.owner[index], ep.layers[index].experts
        for name, p in ep.parameters(index).items():
            grad = (p.grad if p.grad is not None else torch.zeros_like(p)).flatten(1).clone()
            ep.replicas[index].sum_to_owner(grad)
            want = grads[f"{module}.{name}"].flatten(1)
            for row, expert in enumerate(held):
                if owner[expert] == group.rank:
                    assert (grad[row] - want[expert]).abs().max() <= 2e-5, (kind, module, name, expert)
    group.barrier()
print(f"rank {group.rank} equal", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_the_gpu_equal_one_process_on_every_placement(tmp_path, size):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "--standalone", script,
         "contiguous", "shuffled", "replicated"],
        capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {f"rank {r} equal" for r in range(size)} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(("way", "most"), [("flat", 2), ("all_gather", 0)])  # rows and pairs to send, and to receive
def test_a_layer_makes_the_host_wait_for_the_split_sizes_only(group, device, way, most):
    model = build("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=1).to(device)
    model = ray_ep.moe.parallelize(model, group, placement_of(model, "contiguous", 1))
    layer, module = model.ray_ep.layers[0], model.ray_ep.modules[0]
    model.ray_ep.exchange_by(kind=way, tokens=64)
    hidden = torch.randn(64, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights, index = torch.rand(64, 8, device=device).topk(3)
    weights = weights.to(torch.bfloat16)

    def step():
        out = layer.forward(module, hidden, index, weights)
        out.backward(torch.ones_like(out))

    step()  # warm: allocations, kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) <= most, waits
    assert model.ray_ep.meter.pairs.tolist() == [2 * 64 * 3]
