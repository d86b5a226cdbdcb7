"""The exchange is chosen by measurement: every way is timed on a layer's own tokens and routing, the fastest is taken.

So is, before, the library that multiplies on the CPU, on the shapes of the run (cpu/measure.py). All ranks time alike
and agree on the slowest rank's seconds, so all choose the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil, prod
from typing import Any, TypeVar

import torch

from ray_ep.collective import Group
from ray_ep.moe.cpu.fused import is_plain
from ray_ep.moe.cpu.gemm import is_large
from ray_ep.moe.cpu.measure import ProductTiming, Shapes, time_libraries, time_packed
from ray_ep.moe.exchange.ways import DEEPEP, KINDS
from ray_ep.moe.parallelize import ExpertParallel

Key = TypeVar("Key")

_GATHER_BYTES = 1 << 20
"""All-gather is for few tokens: it is not tried where every rank would receive more, and it does not balance."""

MOST_TIMINGS = 9
"""Most timings of one way."""

CLEARLY = 0.95
"""The first way stays unless another takes less than this share of its time: equal runs shall not differ by noise."""

LIBRARY_CLEARLY = 0.98
"""The same for libraries, whose timings differ less: nothing else is timed with them."""

_LIBRARY_S = 0.4
"""Seconds for timing the libraries."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One way's figure: median seconds of one pass over the layer on the slowest rank."""

    kind: str
    transport: str
    seconds: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What was taken, and what it was compared with on how much work."""

    kind: str
    transport: str
    pinned: bool
    layer: int
    tokens: int  # of this rank
    backward: bool
    seconds: float  # that the choice took
    timings: list[Timing]
    note: str = ""  # why it is not what was asked for
    libraries: list[ProductTiming] = field(default_factory=list)  # of products on the CPU, the one taken first

    def to_dict(self) -> dict[str, Any]:
        """For exchange.json."""
        return {**asdict(self), "words": self.words()}

    def words(self) -> str:
        """One line for people."""
        if len(self.timings) < 2:
            why = self.note or ("pinned" if self.pinned else "the only way here")
            return f"{self.kind} over {self.transport} ({why})"
        rows = sorted(self.timings, key=lambda t: t.seconds)
        rest = ", ".join(f"{t.kind} over {t.transport} {t.seconds * 1e3:.2f} ms" for t in rows)
        return f"{self.kind} over {self.transport}, by {rows[0].rounds} rounds on layer {self.layer}: {rest}"


def choose(
    ep: ExpertParallel,
    work: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    index: int,
    groups: dict[str, Group],
    *,
    kinds: tuple[str, ...] = KINDS,
    backward: bool,
    budget_s: float = 1.5,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Time the ways on layer `index`, and let all layers take the fastest (collective).

    The first way stays unless it is clearly beaten. After an error all is as it was, but for the library that
    multiplies.

    Args:
        work: hidden [T, H], top_k_index [T, K], top_k_weights [T, K] of this rank: see `ExpertParallel.capturing`.
        groups: transports to choose from by name, each with the same ranks.
        kinds: ways to choose from; those that cannot win here are left out (`candidates`).
        backward: time forward and backward.
        budget_s: time for all rounds together; the first round alone may take longer.
        clock: seconds.
    """
    began, layer, module = clock(), ep.layers[index], ep.modules[index]
    hidden, chosen, weights = work
    most = _most_tokens(ep.group, hidden)
    libraries = _choose_library(
        ep, index, ceil(most * ep.group.size * chosen.shape[1] / ep.num_experts), backward, clock
    )
    sensible, note = ways_to_try(ep, kinds, most * ep.group.size * hidden.shape[1] * hidden.element_size())
    ways = [(k, name) for name in groups for k in sensible]
    found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}

    def timed(kind: str, transport: str) -> float:
        take(ep, kind, groups[transport])
        inputs = [hidden.detach().requires_grad_(backward), weights.detach().requires_grad_(backward)]
        ep.group.barrier()
        _synchronise(hidden)
        start = clock()
        with torch.set_grad_enabled(backward):
            out = layer.compute(module, inputs[0], chosen, inputs[1])
            if backward:
                torch.autograd.grad(out.float().sum(), inputs)
        _synchronise(hidden)
        took = torch.tensor([clock() - start], dtype=torch.float64)
        ep.group.all_reduce(took, "max")
        return float(took)

    with ep.counters.off(), _taken_back_after_an_error(ep):
        first = {way: timed(*way) for way in ways} if len(ways) > 1 else {}
        if first:
            rounds = min(MOST_TIMINGS, int(budget_s / sum(first.values())))
            for _ in range(rounds):
                for way in ways:
                    found[way].append(timed(*way))
    median = {way: sorted(s)[len(s) // 2] if s else first.get(way, 0.0) for way, s in found.items()}
    best = fastest(median)
    take(ep, best[0], groups[best[1]])
    timings = [Timing(*way, median[way], max(len(found[way]), 1)) for way in ways]
    seconds = clock() - began
    return Choice(*best, len(kinds) == 1, index, len(hidden), backward, seconds, timings, note, libraries)


@contextmanager
def _taken_back_after_an_error(ep: ExpertParallel) -> Iterator[None]:
    """An error inside leaves the way and the group of before, the same on every rank; not one that was being timed."""
    kind, group = ep.exchange.kind, ep.group.present
    try:
        yield
    except BaseException:
        take(ep, kind, group)
        raise


def fastest(seconds: dict[Key, float], clearly: float = CLEARLY) -> Key:
    """The way (or library) to take, given each one's seconds: the first, or the fastest if it clearly beats that."""
    first, best = next(iter(seconds)), min(seconds, key=lambda way: seconds[way])
    return best if seconds[best] < clearly * seconds[first] else first


def settle(ep: ExpertParallel, kind: str, groups: dict[str, Group], rows: int = 0, backward: bool = True) -> Choice:
    """Take the one way that there is, without timing it: `kind` over the only one of `groups`.

    Args:
        rows: pairs of an expert in one pass, for timing the libraries that multiply (collective); 0: they stay.
        backward: there will be one.
    """
    ((transport, group),) = groups.items()
    (kind,), note = ways_to_try(ep, (kind,), 0)
    take(ep, kind, group)
    libraries = _choose_library(ep, 0, rows, backward, time.perf_counter) if rows else []
    return Choice(kind, transport, ep.group.size > 1, 0, 0, False, 0.0, [], note, libraries)


def take(ep: ExpertParallel, kind: str, group: Group) -> None:
    """Let all layers exchange by `kind` over `group`; every rank calls it with the same."""
    ep.exchange_by(kind=kind)
    ep.group.use(group)


def ways_to_try(ep: ExpertParallel, kinds: tuple[str, ...], received: int) -> tuple[list[str], str]:
    """Ways of `kinds` that could win, the same on every rank; if one was asked for that is another here, why.

    Two levels need nodes of several ranks, all-gather few tokens.

    Args:
        received: bytes of hidden states that an all-gather brings to each rank.
    """
    levels = 1 < ep.num_nodes < ep.group.size
    sensible = {"flat": True, "two_level": levels, "all_gather": ep.group.size > 1 and received <= _GATHER_BYTES}
    if kinds == ("two_level",) and not levels:
        nodes = "one node" if ep.num_nodes == 1 else "nodes of one rank each"
        return ["flat"], f"two_level is pinned; on {nodes} there is one level"
    if kinds == (DEEPEP,) and ep.group.size == 1:
        return ["flat"], "deepep is asked for; one rank exchanges with nobody"
    return [k for k in kinds if sensible.get(k)] or [kinds[0]], ""


def _choose_library(
    ep: ExpertParallel, index: int, rows: int, backward: bool, clock: Callable[[], float]
) -> list[ProductTiming]:
    """Let the fastest library multiply in all layers, and plain weights where packed ones are slower (collective).

    Args:
        rows: of an expert of layer `index` in one pass.
    """
    module: Any = ep.modules[index]
    if not is_plain(module, getattr(module, "gate_up_proj", next(module.parameters()))):
        return []
    shapes = Shapes.of(module.gate_up_proj, module.down_proj, rows, backward)
    sizes, dtype = [prod(shapes.gate_up), prod(shapes.down)], shapes.dtype
    if not is_large(max(sizes)):
        return []
    found = time_libraries(shapes, ep.group, clock, _LIBRARY_S)
    library = fastest({t.library: t.seconds for t in found}, LIBRARY_CLEARLY)
    ep.gemm.library[dtype] = library
    if not backward and ep.passes.now.inference is not None and library == "torch":
        plain, packed = time_packed(shapes, library, ep.group, clock, _LIBRARY_S)
        found.append(packed)
        reuse = ep.gemm.reuse[dtype]
        if packed.seconds > plain.seconds:
            ep.gemm.reuse[dtype] = max(reuse, ceil(max(sizes) / shapes.rows))
        else:
            ep.gemm.reuse[dtype] = min(reuse, (min(sizes) - 1) // shapes.rows)
    return sorted(found, key=lambda t: t.library != library)


def _most_tokens(group: Group, hidden: torch.Tensor) -> int:
    most = torch.tensor([len(hidden)])
    group.all_reduce(most, "max")
    return int(most)


def _synchronise(like: torch.Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)  # all of its streams: parts of the tokens may have their own
