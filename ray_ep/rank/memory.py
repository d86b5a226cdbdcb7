"""Memory: what this process has had of it, what the kernel did for want of it. Imports nothing of the package."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

COUNTERS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
"""Files that count kills for lack of memory: of the machine, and of this container (cgroup 2 and 1)."""


def oom_kills(counters: tuple[str, ...] = COUNTERS) -> int:
    """Processes that the kernel's OOM killer has ended here so far; 0 where nothing tells."""
    found = [0]
    for path in counters:
        with suppress(OSError, ValueError):
            lines = [line.split() for line in Path(path).read_text().splitlines()]
            found += [int(words[1]) for words in lines if len(words) == 2 and words[0] == "oom_kill"]
    return max(found)


def peak_mib(device: torch.device, status: str = "/proc/self/status") -> int:
    """Most memory that this process has had so far, in MiB: resident, or of its GPU (not run yet). 0: nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) >> 20
    with suppress(OSError, ValueError, StopIteration):
        lines = Path(status).read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10
    return 0
