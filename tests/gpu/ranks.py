"""Starts ranks as processes of this machine, several on one GPU, and tells what each of them said.

What they do is together.py's. NCCL refuses two ranks on one GPU unless it takes them for ranks of different hosts: each
process has a NCCL_HOSTID of its own, and so exchanges over sockets. That has not run on a GPU yet.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
NCCL = {
    "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0", "NCCL_MNNVL_ENABLE": "0",
    "NCCL_MAX_NCHANNELS": "1",  # kernels of both ranks share the GPU: few blocks each
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",  # newer versions compare the GPUs alone
    "NCCL_DEBUG": "WARN", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """Exit status and output of one rank; None: it was killed at the limit."""

    status: int | None
    text: str


@dataclass(frozen=True)
class Outcome:
    """What all ranks of a job said."""

    ranks: list[Said]

    def check(self, section, sections):
        """Fail, with the ends of all outputs, at the first section that a rank did not get through; skip the rest."""
        through = [s for s in sections if all(f"rank {r}: {s} ok" in said.text for r, said in enumerate(self.ranks))]
        broke = next((s for s in sections if s not in through), section)
        if section not in through and section != broke:
            pytest.skip(f"not reached: {broke} failed")
        ends = []
        for rank, said in enumerate(self.ranks):
            print(f"--- all of rank {rank}\n{said.text}")  # pytest shows it if this fails
            ends += [f"--- rank {rank}, status {said.status}", *said.text.splitlines()[-14:]]
        assert section in through, "\n".join(ends)


def run_job(kind, size, device, folder, limit_s):
    """Run together.py on `size` ranks over a group of a kind; returns within `limit_s` seconds and a bit.

    Args:
        kind: gloo, staged, nccl or torch_nccl. device: cpu or cuda. folder: for their outputs.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    inherited = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **NCCL, "PYTHONPATH": inherited, "PYTHONUNBUFFERED": "1"}
    logs = [Path(folder) / f"{kind}-{size}-rank-{rank}.log" for rank in range(size)]
    words = [sys.executable, "-m", "tests.gpu.together", kind, device, str(store.port), str(limit_s), str(size)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            own = {**environment, "NCCL_HOSTID": f"host-{rank}"}
            with log.open("w") as out:
                command = [*words, str(rank)]
                processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=own))
        until = time.monotonic() + limit_s
        statuses = [_wait(p, until) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return Outcome([Said(status, log.read_text(errors="replace")) for status, log in zip(statuses, logs, strict=True)])


def _wait(process, until):
    try:
        return process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
