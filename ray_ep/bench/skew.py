"""`ray-ep bench layer --routing`: how much of its balanced speed the layer keeps, with balance in the step and without.

The same layer twice in one process group, on the same tokens and routing, taking turns. The balanced ideal is the layer
without balance on balanced routing, in the same run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ray_ep.bench.contenders import WORKS, block
from ray_ep.bench.layer import WARM, Case, spawn
from ray_ep.bench.routing import route
from ray_ep.collective import from_torch
from ray_ep.moe import parallelize


@dataclass(frozen=True, slots=True)
class Skew:
    """Medians of one routing; shares are the balanced ideal's milliseconds over these."""

    case: Case
    routing: str
    ideal_ms: float
    off_ms: float
    auto_ms: float
    before: float  # slowest rank's tokens over the mean, without balance
    after: float
    guests: float  # a step, all ranks

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        shares = {"off_share": self.ideal_ms / self.off_ms, "auto_share": self.ideal_ms / self.auto_ms}
        return {**asdict(self), **shares}

    def line(self) -> str:
        """One row of the table."""
        c, ideal = self.case, self.ideal_ms
        kind = "both" if c.backward else "forward"
        return (
            f"{c.work:4} {c.dtype:8} {kind:7} {c.ranks:5} {c.malloc:7} {self.routing:9} {self.off_ms:9.1f} "
            f"{ideal / self.off_ms:6.2f} {self.auto_ms:9.1f} {ideal / self.auto_ms:6.2f} {self.before:7.2f} "
            f"{self.after:6.2f} {self.guests:7.1f}"
        )


TITLE = (
    f"{'work':4} {'dtype':8} {'pass':7} {'ranks':>5} {'malloc':7} {'routing':9} {'off ms':>9} {'share':>6} "
    f"{'auto ms':>9} {'share':>6} {'before':>7} {'after':>6} {'guests':>7}\n"
    f"share: of the balanced ideal; before, after: slowest rank's tokens over the mean"
)


def run_skew(case: Case, routings: list[str]) -> list[Skew]:
    """Measure one case on all routings in one process group."""
    found: list[Skew] = spawn(case, _rank, routings)
    return found


def _rank(rank: int, case: Case, routings: list[str], store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.ranks)
    group, dtype, work = from_torch(), getattr(torch, case.dtype), WORKS[case.work]
    modules = {mode: parallelize(block(work, dtype), group, balance=mode) for mode in ("off", "auto")}
    hidden = torch.randn(work.tokens * 2, work.hidden, generator=torch.Generator().manual_seed(rank)).to(dtype)

    def step(mode: str, index: torch.Tensor) -> float:
        x = hidden[: len(index)].detach().requires_grad_(case.backward)
        weights = torch.full(index.shape, 1 / work.top_k, dtype=dtype, requires_grad=case.backward)
        group.barrier()
        start = time.perf_counter()
        with torch.set_grad_enabled(case.backward):
            out = modules[mode].experts(x, index, weights)
            if case.backward:
                out.float().square().mean().backward()
        group.barrier()
        for p in modules[mode].parameters():
            p.grad = None
        return (time.perf_counter() - start) * 1e3

    ideal, found = 0.0, []
    for name in ["balanced", *(r for r in routings if r != "balanced")]:
        done = modules["auto"].ray_ep.balancer.done
        spent: dict[str, list[float]] = {mode: [] for mode in modules}
        start = (done.layers, done.before, done.after, done.guests)
        for number in range(WARM + case.rounds):
            index = route(name, work, rank, case.ranks, 0, number)
            for mode in modules:
                took = step(mode, index)
                if number >= WARM:
                    spent[mode].append(took)
        off, auto = (statistics.median(spent[mode]) for mode in ("off", "auto"))
        ideal = ideal or off
        layers = max(done.layers - start[0], 1)
        figures = (
            (done.before - start[1]) / layers,
            (done.after - start[2]) / layers,
            (done.guests - start[3]) / layers,
        )
        if name in routings:
            found.append(Skew(case, name, ideal, off, auto, *figures))
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()
