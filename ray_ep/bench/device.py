"""`ray-ep bench layer --device cuda`: our layer on one GPU under NCCL, against torch's own GEMMs there.

One rank, so that nothing leaves the GPU: what is measured is the layer's own work. Times are of CUDA events.
Not run on a GPU yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ray_ep.bench.contenders import WORKS, Work, block, steps, tokens
from ray_ep.collective import Group
from ray_ep.collective.device import cuda_device
from ray_ep.collective.nccl import nccl
from ray_ep.collective.torch_nccl import torch_nccl
from ray_ep.errors import BadInput
from ray_ep.moe import parallelize

MAKERS: dict[str, Callable[..., Group]] = {"nccl": nccl, "torch_nccl": torch_nccl}
"""What forms a group over NCCL, by transport."""

WARM_ROUNDS = 3
"""Rounds that are not counted."""


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """Medians over rounds of one work on one GPU. Seconds are of one forward (and backward)."""

    device: str
    work: str
    dtype: str
    backward: bool
    rounds: int
    transport: str
    seconds: float
    plain_seconds: float  # the same block in plain transformers
    roofline_seconds: float  # of the work's GEMMs at torch's best rate; a backward counts as twice
    peak_mib: int  # of our steps, as torch's allocator counts

    @property
    def tokens_per_second(self) -> float:
        """Of our layer."""
        return WORKS[self.work].tokens / self.seconds

    @property
    def share(self) -> float:
        """Of the roofline: 1 would be GEMMs at torch's best rate and nothing else."""
        return self.roofline_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, "share": self.share}

    def line(self) -> str:
        """One row under `TITLE`."""
        return (
            f"{self.work:4} {self.dtype:8} {'both' if self.backward else 'forward':7} {self.transport:10} "
            f"{self.tokens_per_second:12,.0f} {self.seconds * 1e3:9.3f} {self.plain_seconds * 1e3:9.3f} "
            f"{self.plain_seconds / self.seconds:6.2f} {self.share:8.2f} {self.peak_mib:9}"
        )


TITLE = (
    f"{'work':4} {'dtype':8} {'pass':7} {'transport':10} {'tokens/s':>12} {'ms':>9} {'plain ms':>9} {'ratio':>6} "
    f"{'roofline':>8} {'peak MiB':>9}"
)
"""Head of the table."""


def run_on_device(work: str, dtype: str, backward: bool, rounds: int) -> list[DeviceResult]:
    """Measure one work, a row for each NCCL implementation that can be used here.

    Raises:
        BadInput: no CUDA device here, or no NCCL.
    """
    device = cuda_device(None)
    rows, missing = [], []
    for transport, make in MAKERS.items():
        try:
            group = make(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]
        except BadInput as e:
            missing.append(str(e))
            continue
        try:
            rows.append(_measure(work, dtype, backward, rounds, transport, group, device))
        finally:
            group.close()
    if not rows:
        raise BadInput(f"bench layer --device cuda: {'; '.join(missing)}")
    return rows


def _measure(
    name: str, dtype: str, backward: bool, rounds: int, transport: str, group: Group, device: torch.device
) -> DeviceResult:
    work, kind = WORKS[name], getattr(torch, dtype)
    x = tokens(work, 0, kind, False).to(device).requires_grad_(backward)
    plain = block(work, kind).to(device)
    module = parallelize(block(work, kind).to(device), group)
    contenders: dict[str, Callable[[], object]] = {
        "plain": steps(plain, x, backward),
        "ray_ep": steps(module, x, backward),
    }
    contenders |= gemms(work, kind, device)
    seconds: dict[str, list[float]] = {n: [] for n in contenders}
    for number in range(WARM_ROUNDS + rounds):
        for contender, step in contenders.items():
            took = device_seconds(step)
            if number >= WARM_ROUNDS:
                seconds[contender].append(took)
    torch.cuda.reset_peak_memory_stats(device)
    contenders["ray_ep"]()
    peak = torch.cuda.max_memory_allocated(device) >> 20
    median = {n: statistics.median(s) for n, s in seconds.items()}
    roofline = min(s for n, s in median.items() if n not in ("plain", "ray_ep")) * (3 if backward else 1)
    where = torch.cuda.get_device_name(device)
    return DeviceResult(
        where, name, dtype, backward, rounds, transport, median["ray_ep"], median["plain"], roofline, peak
    )


def device_seconds(step: Callable[[], object]) -> float:
    """Seconds on the device of one call."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    began.record()
    step()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def gemms(
    work: Work, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """The GEMMs of a forward under balanced routing, from and into buffers that exist: an expert at a time, batched.

    Each returns its buffers [E, rows, 2F] and [E, rows, H].
    """
    rows = max(1, work.tokens * work.top_k // work.experts)
    generator = torch.Generator().manual_seed(3)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(work.experts, *shape, generator=generator) * 0.02).to(device, dtype)

    x, h = make(rows, work.hidden), make(rows, work.ffn)
    up, down = make(2 * work.ffn, work.hidden).transpose(1, 2), make(work.hidden, work.ffn).transpose(1, 2)
    g, y = make(rows, 2 * work.ffn), make(rows, work.hidden)

    def one_by_one() -> tuple[torch.Tensor, torch.Tensor]:
        for e in range(work.experts):
            torch.mm(x[e], up[e], out=g[e])
            torch.mm(h[e], down[e], out=y[e])
        return g, y

    def batched() -> tuple[torch.Tensor, torch.Tensor]:
        torch.bmm(x, up, out=g)
        torch.bmm(h, down, out=y)
        return g, y

    return {"one by one": one_by_one, "batched": batched}
