"""moe.parallelize in a plain torch job: torchrun, no Ray."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
torch.set_num_threads(1)
import ray_ep
from tests.models import build, even_shards, parallel_pass, placement_of, reference
group = ray_ep.collective.from_torch()
model = build("qwen3_moe")
ids = torch.randint(3, 64, (5, 9), generator=torch.Generator().manual_seed(1))
loss, logits, grads = reference(model, ids)
for kind in ("contiguous", "replicated"):
    shards = even_shards(5, group.size)
    _, total, got, got_grads = parallel_pass(model, ids, group, placement_of(model, kind, group.size), shards)
    assert abs(total - loss) < 1e-5
    assert (got - logits[shards[group.rank]:shards[group.rank + 1]]).abs().max() < 1e-5
    assert all((got_grads[n] - g).abs().max() < 1e-5 for n, g in grads.items())
assert "ray" not in sys.modules, "no Ray is needed here"
print(f"rank {group.rank} equal", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_torchrun_job_without_ray_equals_one_process(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_env(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {r} equal" in done.stdout for r in range(2)), done.stdout  # their lines may run into each other


def _env():
    import os

    return {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
