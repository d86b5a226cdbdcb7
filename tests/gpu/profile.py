"""Prints the kernels that a layer's forward and backward spend their time in. Not run on a GPU yet.

python -m tests.gpu.profile DEVICE WORK
"""

import sys

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ray_ep.bench.contenders import WORKS, block, steps, tokens
from ray_ep.collective import SoloGroup
from ray_ep.moe import parallelize

ROWS, STEPS = 14, 3


def kernels(device, work, backward):
    """Lines of a table: the kernels of our layer in bfloat16 by their own time on the device."""
    with torch.device(device):
        module = parallelize(block(WORKS[work], torch.bfloat16), SoloGroup())
    x = tokens(WORKS[work], 0, torch.bfloat16, False).to(device).requires_grad_(backward)
    step = steps(module, x, backward)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    for _ in range(3):
        step()
    with profile(activities=kinds) as seen:
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if (e.device_type == DeviceType.CUDA) == (device == "cuda")]
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = sorted(((getattr(e, key), e.count, e.key) for e in events), reverse=True)
    total = sum(time for time, _, _ in rows)
    passes = "forward and backward" if backward else "forward"
    yield f"work {work}, {passes}: {total / STEPS / 1e3:.3f} ms a step in kernels"
    for time, count, name in rows[:ROWS]:
        yield f"{time / STEPS / 1e3:9.3f} ms {time / max(total, 1e-9):6.1%} {count / STEPS:6.1f} x {name[:90]}"


if __name__ == "__main__":
    for backward in (False, True):
        print("\n".join(kernels(*sys.argv[1:], backward)), flush=True)
