"""Rows that belong together: brought into order by small keys, and added up in that order, whatever the device.

Nothing here makes the host wait for a GPU, and sums are the same in every run. M sums, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ray_ep.moe.cuda import kernels_for


@dataclass(frozen=True, slots=True)
class Segments:
    """Which of n rows are added up to which of M sums."""

    of: torch.Tensor  # [n] number of each row's sum
    sums: int  # M
    first: torch.Tensor | None = None  # [M + 1] where each sum begins among the rows in order; None: on the CPU
    order: torch.Tensor | None = None  # [n] the rows by their sum, each sum's ascending; None: so they lie

    @staticmethod
    def made(of: torch.Tensor, sums: int) -> Segments:
        """Of rows that lie in any order; on the CPU the order is not needed."""
        return Segments(of, sums) if of.device.type == "cpu" else Segments.in_order(of, sums)

    @staticmethod
    def in_order(of: torch.Tensor, sums: int) -> Segments:
        """With `first` and `order`."""
        order = order_of(of, sums)
        return Segments(of, sums, starts(of[order], sums), order)


def order_of(keys: torch.Tensor, most: int) -> torch.Tensor:
    """int64 [n]: the stable order of keys [n] from -1 to `most`; a GPU sorts them byte by byte."""
    small = torch.int8 if most < 2**7 else torch.int16 if most < 2**15 else torch.int32
    return torch.argsort(keys.to(small), stable=True)


def add_up(rows: torch.Tensor, segments: Segments) -> torch.Tensor:
    """rows [n, H] -> sums [M, H], each in the order of its rows, in float32 at least: bfloat16 would round at each."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.device.type == "cpu":  # eight times as fast there as the other way, and in order
        sums = rows.new_zeros(segments.sums, rows.shape[1], dtype=wide)
        return sums.index_add_(0, segments.of, rows.to(wide)).to(rows.dtype)
    return add_up_in_order(rows, segments)


def add_up_in_order(rows: torch.Tensor, segments: Segments) -> torch.Tensor:
    """`add_up` for GPUs, where index_add would add in an order of its own. Not run on a GPU yet."""
    order = segments.order
    if order is None:
        order = torch.arange(len(rows), device=rows.device)
    kernels = kernels_for(rows.device, rows.dtype)
    sums: torch.Tensor = kernels.segment_sum([rows.contiguous()], segments.first, order)
    return sums


class CopyRows(torch.autograd.Function):
    """Sums [M, H] to their rows [n, H] forward, `add_up` of the rows' gradients backward: the adjoint of SumRows."""

    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor, segments: Segments) -> torch.Tensor:
        ctx.segments = segments
        return sums[segments.of]

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor) -> Any:
        return add_up(d_rows, ctx.segments), None


class SumRows(torch.autograd.Function):
    """`add_up`: rows [n, H] to sums [M, H] forward, each sum's gradient to its rows backward."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, segments: Segments) -> torch.Tensor:
        ctx.segments = segments
        return add_up(rows, segments)

    @staticmethod
    def backward(ctx: Any, d_sums: torch.Tensor) -> Any:
        return d_sums[ctx.segments.of], None


def starts(ascending: torch.Tensor, sums: int) -> torch.Tensor:
    """int64 [M + 1]: where each number below `sums` begins in ascending numbers [n], and the end."""
    return torch.searchsorted(ascending, torch.arange(sums + 1, device=ascending.device))
