"""What each library takes for one expert's products, timed on the machine, on the shapes of a run.

Only timings: choose.py takes the fastest. Imports the products (gemm.py) and a group, for the slowest rank counts.
H hidden, F ffn, S experts held, n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ray_ep.collective import Group
from ray_ep.moe.cpu.gemm import LIBRARIES, Gemm, Packed, has_onednn

MOST_PRODUCTS = 25
"""Most timings of one library."""

_MOST_ROWS = 256
"""Most rows of a product that is timed: beyond that rates stay what they are."""


@dataclass(frozen=True, slots=True)
class ProductTiming:
    """One library's figure: least seconds of one expert's products in a pass, on the slowest rank.

    The least, not the median: what else the machine does must not decide.
    """

    library: str
    seconds: float
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """One expert's products: gate_up [2F, H] and down [H, F] by n rows, of a dtype; with those of backward or not.

    Without those of weights' gradients, which differ by dtype alone.
    """

    gate_up: tuple[int, ...]
    down: tuple[int, ...]
    rows: int
    dtype: torch.dtype
    backward: bool

    @staticmethod
    def of(gate_up: torch.Tensor, down: torch.Tensor, rows: int, backward: bool) -> Shapes:
        """gate_up [S, 2F, H], down [S, H, F]; S may be 0."""
        shapes = tuple(gate_up.shape[1:]), tuple(down.shape[1:])
        return Shapes(
            gate_up=shapes[0],
            down=shapes[1],
            rows=max(1, min(rows, _MOST_ROWS)),
            dtype=gate_up.dtype,
            backward=backward,
        )


def time_libraries(
    shapes: Shapes, group: Group, clock: Callable[[], float], budget_s: float
) -> list[ProductTiming]:  # fmt: skip
    """What each library for the dtype takes (collective); infinite where a rank has none, the same on all ranks."""
    works: dict[str, Callable[[], None] | None] = {}
    for library in LIBRARIES[shapes.dtype]:
        gemm = Gemm()
        gemm.library[shapes.dtype] = library
        works[library] = _products(shapes, gemm) if library != "onednn" or has_onednn() else None
    return _race(works, group, clock, budget_s)


def time_packed(
    shapes: Shapes, library: str, group: Group, clock: Callable[[], float], budget_s: float
) -> list[ProductTiming]:
    """What forward takes with plain weights, by `library`, and with packed ones (collective), in that order."""
    gemm = Gemm()
    gemm.library[shapes.dtype], gemm.reuse[shapes.dtype] = library, 0
    up, down = (torch.full((1, *shape), 0.01, dtype=shapes.dtype) for shape in (shapes.gate_up, shapes.down))
    packed = Packed(up, gemm), Packed(down, gemm)
    x, g, h, y = _buffers(shapes, gemm)

    def by_packed() -> None:
        packed[0].mm(x, 0, g)
        packed[1].mm(h, 0, y)

    return _race({library: _products(shapes, gemm), "packed": by_packed}, group, clock, budget_s)


def _buffers(shapes: Shapes, gemm: Gemm) -> list[torch.Tensor]:
    """x [n, H], g [n, 2F], h [n, F], y [n, H]."""
    like = torch.zeros(0, dtype=shapes.dtype)
    between = gemm.between(like).dtype
    (wide, hidden), ffn = shapes.gate_up, shapes.down[1]
    kinds = (hidden, like.dtype), (wide, like.dtype if shapes.backward else between), (ffn, between)
    return [torch.full((shapes.rows, n), 0.01, dtype=dtype) for n, dtype in (*kinds, (hidden, like.dtype))]


def _products(shapes: Shapes, gemm: Gemm) -> Callable[[], None]:
    """One expert's products, as the fused body makes them."""
    up, down = (torch.full(shape, 0.01, dtype=shapes.dtype) for shape in (shapes.gate_up, shapes.down))
    x, g, h, y = _buffers(shapes, gemm)

    def work() -> None:
        gemm.mm(x, up.t(), out=g)
        gemm.mm(h, down.t(), out=y)
        if shapes.backward:
            gemm.mm(y, down, out=h)
            gemm.mm(g, up, out=x)

    return work


def _race(
    works: dict[str, Callable[[], None] | None], group: Group, clock: Callable[[], float], budget_s: float
) -> list[ProductTiming]:
    """Time works in turn, after a first time that counts for nothing; None: there is no such work on this rank."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        if work is not None:
            work()
    group.barrier()
    began, rounds = clock(), 0
    while rounds == 0 or (rounds < MOST_PRODUCTS and clock() - began < budget_s):
        rounds += 1
        for name, work in works.items():
            start = clock()
            if work is not None:
                work()
            took = clock() - start
            found[name].append(float("inf") if work is None else took)
    least = torch.tensor([min(times) for times in found.values()], dtype=torch.float64)
    group.all_reduce(least, "max")
    return [ProductTiming(name, seconds, rounds) for name, seconds in zip(works, least.tolist(), strict=True)]
