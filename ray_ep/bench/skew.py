"""`ray-ep bench layer --routing`: how much of its balanced speed the layer keeps, with balance in the step and without.

The same layer twice in one process group, on the same tokens and routing, taking turns. The balanced ideal is the layer
without balance on balanced routing, which takes its turns too.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ray_ep.bench.contenders import WORKS, block
from ray_ep.bench.layer import WARM_ROUNDS, LayerCase, spawn
from ray_ep.bench.llep import Layer, ours, peer, twin
from ray_ep.bench.routing import route, tokens_of
from ray_ep.collective import Group, from_torch
from ray_ep.moe import parallelize, settle
from ray_ep.moe.balance.balancer import Balancer


@dataclass(frozen=True, slots=True)
class Beside:
    """LLEP on the same routing."""

    ms: float
    share: float | None  # of its own ideal: balanced routing, its balancer off; None: brief
    ratio: float  # its milliseconds over ours, balanced
    twin_ratio: float | None  # the same over those of our layer on LLEP's kind of experts; None: brief


@dataclass(frozen=True, slots=True)
class Skew:
    """One routing: medians of milliseconds, and of their ratios within a round (machines have slow whiles)."""

    case: LayerCase
    routing: str
    ideal_ms: float
    off_ms: float | None  # None: brief
    off_share: float | None  # the balanced ideal's milliseconds over these
    auto_ms: float
    auto_share: float
    before: float  # slowest rank's tokens over the mean, without balance
    after: float
    guests: float  # a step, all ranks
    rounds_ms: dict[str, list[float]]  # by contender, round by round
    llep: Beside | None = None  # if it was asked for

    @property
    def tokens(self) -> int:
        """Of all ranks in a step."""
        work, ranks = WORKS[self.case.work], self.case.ranks
        return sum(tokens_of(self.routing, work, rank, ranks, 0, 0) for rank in range(ranks))

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        found = asdict(self)
        if self.llep is None:
            del found["llep"]
        else:
            found["llep"]["tokens_per_second"] = self.tokens / self.llep.ms * 1e3
        return found

    def line(self) -> str:
        """One row of the table."""
        c, llep = self.case, self.llep
        kind = "both" if c.backward else "forward"
        more = (
            ""
            if llep is None
            else (
                f" {self.tokens / self.auto_ms * 1e3:9,.0f} {self.tokens / llep.ms * 1e3:9,.0f} "
                f"{_text(llep.share, 6, 2)} {llep.ratio:6.2f} {_text(llep.twin_ratio, 6, 2)}"
            )
        )
        return (
            f"{c.work:4} {c.dtype:8} {kind:7} {c.ranks:5} {c.malloc:7} {self.routing:9} {_text(self.off_ms, 9, 1)} "
            f"{_text(self.off_share, 6, 2)} {self.auto_ms:9.1f} {self.auto_share:6.2f} {self.before:7.2f} "
            f"{self.after:6.2f} {self.guests:7.1f}{more}"
        )


def _text(x: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if x is None else f"{x:{width}.{digits}f}"


def title(llep: bool) -> str:
    """Head of the table."""
    head = (
        f"{'work':4} {'dtype':8} {'pass':7} {'ranks':>5} {'malloc':7} {'routing':9} {'off ms':>9} {'share':>6} "
        f"{'auto ms':>9} {'share':>6} {'before':>7} {'after':>6} {'guests':>7}"
    )
    legend = "share: of the balanced ideal; before, after: slowest rank's tokens over the mean"
    if llep:
        head += f" {'auto t/s':>9} {'LLEP t/s':>9} {'share':>6} {'ratio':>6} {'same':>6}"
        legend += (
            "\nLLEP: share of its own balanced ideal; ratio: auto's tokens/s over LLEP's (the same GEMMs, Qwen3-MoE "
            "experts against gpt-oss ones);\nsame: that of our layer on LLEP's gpt-oss experts"
        )
    return f"{head}\n{legend}"


def run_skew(case: LayerCase, routings: list[str], llep: str | None = None, brief: bool = False) -> list[Skew]:
    """Measure one case on all routings in one process group.

    Args:
        llep: folder with the package `llep` to compare with, after `llep.check`; None: without.
        brief: leave out, to take less time, the layer without balance, LLEP's ideal and our layer on its experts.
    """
    found: list[Skew] = spawn(case, _rank, routings, llep, brief)
    return found


def step(layer: Layer, hidden: torch.Tensor, index: torch.Tensor, group: Group, backward: bool) -> float:
    """Milliseconds of one forward (and backward) of hidden [T, H], index [T, K] over all ranks (collective)."""
    x = hidden.detach().requires_grad_(backward)
    weights = layer.weights(index).requires_grad_(backward)
    group.barrier()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = layer.call(x, index, weights)
        if backward:
            out.float().square().mean().backward()  # type: ignore[no-untyped-call]
    group.barrier()
    for p in layer.parameters:
        p.grad = None
    return (time.perf_counter() - start) * 1e3


def _rank(
    rank: int, case: LayerCase, routings: list[str], llep: str | None, brief: bool, store: str, queue: Any
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.ranks)
    group, dtype, work = from_torch(), getattr(torch, case.dtype), WORKS[case.work]
    modules = {mode: parallelize(block(work, dtype), group, balance=mode) for mode in ("off", "auto")}
    layers = {mode: ours(module, dtype) for mode, module in modules.items()}
    if llep is not None:
        layers["llep"], layers["llep ideal"] = peer(llep, work, group, dtype, case.backward)
        layers["twin"] = twin(work, group, dtype)
    layers["ideal"] = layers["off"]
    for name in ("off", "llep ideal", "twin") if brief else ():
        layers.pop(name, None)
    with contextlib.ExitStack() as stack:
        for module in () if case.backward else modules.values():
            stack.enter_context(module.ray_ep.inference())  # weights stay as they are: pack once
        for module in modules.values():  # as at the start of a run
            rows = work.tokens * case.ranks * work.top_k // work.experts
            settle(module.ray_ep, "flat", {"gloo": group}, rows, case.backward)
        found = [_compare(name, case, group, layers, modules["auto"].ray_ep.balancer) for name in routings]
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _compare(name: str, case: LayerCase, group: Group, layers: dict[str, Layer], balancer: Balancer) -> Skew:
    """All contenders on one routing (the ideals: on the balanced one), taking turns there and back (collective)."""
    work, dtype, done = WORKS[case.work], getattr(torch, case.dtype), balancer.done
    hidden = torch.randn(work.tokens * 2, work.hidden, generator=torch.Generator().manual_seed(group.rank)).to(dtype)
    spent: dict[str, list[float]] = {n: [] for n in layers}
    start = (done.layers, done.before, done.after, done.guests)
    for number in range(WARM_ROUNDS + case.rounds):
        for contender in list(spent)[:: 1 if number % 2 else -1]:
            kind = "balanced" if contender.endswith("ideal") else name
            index = route(kind, work, group.rank, group.size, 0, number)
            took = step(layers[contender], hidden[: len(index)], index, group, case.backward)
            if number >= WARM_ROUNDS:
                spent[contender].append(took)
    median = {contender: statistics.median(times) for contender, times in spent.items()}
    count = max(done.layers - start[0], 1)
    figures = (
        (done.before - start[1]) / count,
        (done.after - start[2]) / count,
        (done.guests - start[3]) / count,
    )

    def over(a: str, b: str) -> Any:
        both = a in spent and b in spent
        return statistics.median(x / y for x, y in zip(spent[a], spent[b], strict=True)) if both else None

    beside = None
    if "llep" in median:
        ratios = (over(a, b) for a, b in (("llep ideal", "llep"), ("llep", "auto"), ("llep", "twin")))
        beside = Beside(median["llep"], *ratios)
    off, auto = (median.get("off"), over("ideal", "off")), (median["auto"], over("ideal", "auto"))
    return Skew(case, name, median["ideal"], *off, *auto, *figures, spent, beside)
