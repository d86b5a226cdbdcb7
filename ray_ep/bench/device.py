"""`ray-ep bench layer --device cuda`: our layer on one GPU, against plain transformers and what the GPU can do at most.

One rank, so that nothing leaves the GPU: what is measured is the layer's own work. Times are of CUDA events.
Not run on a GPU yet; with the CPU as the device it runs. T tokens, K top_k, H hidden, F ffn, E experts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ray_ep.bench.contenders import WORKS, TimedCall, Work, block, steps, tokens
from ray_ep.collective import SoloGroup
from ray_ep.moe import parallelize

WARM_ROUNDS = 3
"""Rounds that are not counted."""
SIDE, COPIED = 8192, 2 << 30
"""Of the matrices whose product, and bytes of the tensor whose copy, measure what the device can do at most."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device was measured to do at most: products of large matrices, and a copy (bytes read and written)."""

    flops_per_second: float
    bytes_per_second: float

    def line(self) -> str:
        """In words."""
        return f"ceilings: {self.flops_per_second / 1e12:.4g} TFLOP/s, copy {self.bytes_per_second / 1e12:.3g} TB/s"


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """Medians over rounds of one work on one device. Seconds are of one forward (and backward)."""

    device: str
    work: str
    dtype: str
    backward: bool
    rounds: int
    ceilings: Ceilings
    seconds: float
    general_seconds: float  # ours without the fused body
    plain_seconds: float  # the same block in plain transformers
    gemm_seconds: float  # of the work's GEMMs at torch's best rate on their shapes; a backward counts as twice
    peak_mib: int  # of our steps, as torch's allocator counts; 0 on a CPU

    @property
    def tokens_per_second(self) -> float:
        """Of our layer."""
        return WORKS[self.work].tokens / self.seconds

    @property
    def share_of_gemms(self) -> float:
        """1 would be GEMMs at torch's best rate for these shapes, and nothing else."""
        return self.gemm_seconds / self.seconds

    @property
    def share_of_flops(self) -> float:
        """1 would be GEMMs as fast as the product of large matrices, and nothing else."""
        return flops(WORKS[self.work], self.backward) / self.ceilings.flops_per_second / self.seconds

    @property
    def share_of_bytes(self) -> float:
        """1 would be reading weights and tokens and writing what comes of them, and nothing else."""
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        return least_bytes(WORKS[self.work], size, self.backward) / self.ceilings.bytes_per_second / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        shares = {n: getattr(self, n) for n in ("share_of_gemms", "share_of_flops", "share_of_bytes")}
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, **shares}

    def line(self) -> str:
        """One row under `TITLE`."""
        times = (self.seconds, self.general_seconds, self.plain_seconds)
        return (
            f"{self.work:4} {self.dtype:8} {'both' if self.backward else 'forward':7} {self.tokens_per_second:12,.0f} "
            f"{' '.join(f'{s * 1e3:10.3f}' for s in times)} {self.plain_seconds / self.seconds:6.2f} "
            f"{self.share_of_gemms:6.2f} {self.share_of_flops:6.2f} {self.share_of_bytes:6.2f} {self.peak_mib:9}"
        )


TITLE = (
    f"{'work':4} {'dtype':8} {'pass':7} {'tokens/s':>12} {'ms':>10} {'general ms':>10} {'plain ms':>10} {'ratio':>6} "
    f"{'gemms':>6} {'flops':>6} {'bytes':>6} {'peak MiB':>9}"
)
"""Head of the table; ratio: plain ms / ms; gemms, flops, bytes: shares of what could be had at most (DeviceResult)."""


def flops(work: Work, backward: bool) -> float:
    """Of the three products of every pair; a backward has twice as many."""
    return 6.0 * work.tokens * work.top_k * work.hidden * work.ffn * (3 if backward else 1)


def least_bytes(work: Work, size: int, backward: bool) -> float:
    """Weights read, tokens read and written, `size` bytes an element; a backward reads both again and writes gradients.

    What lies between the products is not counted: a kernel that fused them all would not move it.
    """
    return float(size * (3 * work.experts * work.hidden * work.ffn + 2 * work.tokens * work.hidden)) * (
        3 if backward else 1
    )


def measure_ceilings(dtype: str, device: torch.device, side: int = SIDE, copied: int = COPIED) -> Ceilings:
    """Medians of ten: the product of two matrices [side, side], and the copy of `copied` bytes."""
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copying = (
        statistics.median([device_seconds(call, device) for _ in range(13)][WARM_ROUNDS:])
        for call in (lambda: a @ a, lambda: target.copy_(source))
    )
    return Ceilings(2.0 * side**3 / product, 2.0 * copied / copying)


def run_on_device(
    name: str, dtype: str, backward: bool, rounds: int, ceilings: Ceilings, device: torch.device
) -> DeviceResult:
    """Measure one work: contenders take turns in every round."""
    work, kind = WORKS[name], getattr(torch, dtype)
    with torch.device(device):  # a large work's weights take long to draw on the host
        plain = block(work, kind)
    x = tokens(work, 0, kind, False).to(device).requires_grad_(backward)
    module = parallelize(copy.deepcopy(plain), SoloGroup())
    ours = steps(module, x, backward)
    contenders: dict[str, Callable[[], object]] = {
        "plain": steps(plain, x, backward),
        "ray_ep": _with(module, ours, fused=True),
        "general": _with(module, ours, fused=False),
    }
    products = gemms(work, kind, device)
    seconds: dict[str, list[float]] = {n: [] for n in (*contenders, *products)}
    for number in range(WARM_ROUNDS + rounds):
        for contender, step in (contenders | products).items():
            took = device_seconds(step, device)
            if number >= WARM_ROUNDS:
                seconds[contender].append(took)
    median = {n: statistics.median(s) for n, s in seconds.items()}
    return DeviceResult(
        device=name_of(device),
        work=name,
        dtype=dtype,
        backward=backward,
        rounds=rounds,
        ceilings=ceilings,
        seconds=median["ray_ep"],
        general_seconds=median["general"],
        plain_seconds=median["plain"],
        gemm_seconds=min(median[n] for n in products) * (3 if backward else 1),
        peak_mib=_peak_mib(contenders["ray_ep"], device),
    )


def _with(module: Any, step: TimedCall, fused: bool) -> TimedCall:
    """The step with, or without, the fused body."""

    def call() -> None:
        module.ray_ep.exchange_by(fused=fused)
        step()

    return call


def _peak_mib(step: Callable[[], object], device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return int(torch.cuda.max_memory_allocated(device)) >> 20


def name_of(device: torch.device) -> str:
    """Of the GPU, as its driver says it."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"


def device_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Seconds on the device of one call."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    began.record()
    step()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def gemms(
    work: Work, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """The GEMMs of a forward under balanced routing, in torch's three ways: an expert at a time, batched, grouped.

    Each returns [E, rows, 2F] and [E, rows, H].
    """
    rows = max(1, work.tokens * work.top_k // work.experts)
    generator = torch.Generator(device).manual_seed(3)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(work.experts, *shape, generator=generator, device=device) * 0.02).to(dtype)

    x, h = make(rows, work.hidden), make(rows, work.ffn)
    up, down = make(2 * work.ffn, work.hidden).transpose(1, 2), make(work.hidden, work.ffn).transpose(1, 2)
    g, y = make(rows, 2 * work.ffn), make(rows, work.hidden)
    ends = torch.arange(1, work.experts + 1, device=device, dtype=torch.int32) * rows

    def one_by_one() -> tuple[torch.Tensor, torch.Tensor]:
        for e in range(work.experts):
            torch.mm(x[e], up[e], out=g[e])
            torch.mm(h[e], down[e], out=y[e])
        return g, y

    def batched() -> tuple[torch.Tensor, torch.Tensor]:
        torch.bmm(x, up, out=g)
        torch.bmm(h, down, out=y)
        return g, y

    def grouped() -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.nn.functional.grouped_mm(x.flatten(0, 1), up, offs=ends)
        second = torch.nn.functional.grouped_mm(h.flatten(0, 1), down, offs=ends)
        return first.view_as(g), second.view_as(y)

    return {"one by one": one_by_one, "batched": batched, "grouped": grouped}
