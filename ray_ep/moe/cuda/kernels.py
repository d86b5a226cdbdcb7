"""Triton kernels of the CUDA experts: SwiGLU with the pairs' weights, its backward, segment sums. Tensors in and out.

Each equals its namesake in reference.py. Needs Triton, so only `kernels_for` imports this module. Arithmetic is
float32, what is read and written is in the tensors' own dtype. No atomics: results are the same bits in every run.
N rows, P pairs, H hidden, F ffn, S experts; "sorted" pairs are grouped by expert. Not run on a GPU yet: run by
Triton's interpreter on a CPU, and compiled for Hopper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

_TILE = 2048
"""Elements of a program at once: 16 for each of 128 threads, two loads of 16 bytes in bfloat16."""

_COLUMNS = 1024
"""Most columns of a program at once."""

_FEWEST = 64
"""Fewest columns of a program at once."""

_ZEROERS = 64
"""Programs of an expert whose gradient is to be zero; the others' end at once."""


@triton.jit
def _swiglu(gate_up, weight, pair, h, pairs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile [ROWS, COLUMNS] of h [P, F]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = row < pairs
    there = here[:, None] & (column < width)[None, :]
    w = tl.load(weight + tl.load(pair + row, mask=here, other=0), mask=here, other=0).to(tl.float32)
    at = gate_up + row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(at, mask=there, other=0).to(tl.float32)
    up = tl.load(at + width, mask=there, other=0).to(tl.float32)
    out = w[:, None] * (gate / (1 + tl.exp(-gate))) * up
    tl.store(h + row[:, None] * width + column[None, :], out.to(h.dtype.element_ty), mask=there)


@triton.jit
def _swiglu_backward(
    gate_up, weight, pair, dh, d_gate_up, h, d_weight, pairs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS pairs, COLUMNS at a time, so that a weight's gradient is summed by one program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < pairs
    number = tl.load(pair + row, mask=here, other=0)
    w = tl.load(weight + number, mask=here, other=0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = here[:, None] & (column < width)[None, :]
        wide = row[:, None] * (2 * width) + column[None, :]
        narrow = row[:, None] * width + column[None, :]
        gate = tl.load(gate_up + wide, mask=there, other=0).to(tl.float32)
        up = tl.load(gate_up + wide + width, mask=there, other=0).to(tl.float32)
        d = tl.load(dh + narrow, mask=there, other=0).to(tl.float32)
        s = 1 / (1 + tl.exp(-gate))
        silu = gate * s
        total += tl.sum(d * silu * up, 1)
        d_gate = d * w * up * (s * (1 + gate * (1 - s)))
        tl.store(d_gate_up + wide, d_gate.to(d_gate_up.dtype.element_ty), mask=there)
        tl.store(d_gate_up + wide + width, (d * w * silu).to(d_gate_up.dtype.element_ty), mask=there)
        tl.store(h + narrow, (w * silu * up).to(h.dtype.element_ty), mask=there)
    tl.store(d_weight + number, total.to(d_weight.dtype.element_ty), mask=here)


@triton.jit
def _row(rows, more, first_more, place, width, TWO: tl.constexpr):
    """Where a row begins, in `rows` or, from `first_more` on, in `more`."""
    at = rows + place * width
    if TWO:
        at = tl.where(place < first_more, at, more + (place - first_more) * width)
    return at


@triton.jit
def _segment_sum(rows, more, first_more, start, member, out, width, TWO: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS of one row of out [N, H]. Four loads are under way together, and are added in their order."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(start + segment + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in range(tl.load(start + segment), end, 4):
        # Loads stay in the order in which they are written: first all places, then all rows.
        p0 = tl.load(member + k)
        p1 = tl.load(member + k + 1, mask=k + 1 < end, other=0)
        p2 = tl.load(member + k + 2, mask=k + 2 < end, other=0)
        p3 = tl.load(member + k + 3, mask=k + 3 < end, other=0)
        w1 = tl.where(k + 1 < end, width, 0)
        w2 = tl.where(k + 2 < end, width, 0)
        w3 = tl.where(k + 3 < end, width, 0)
        r0 = tl.load(_row(rows, more, first_more, p0, width, TWO) + column, mask=column < width, other=0)
        r1 = tl.load(_row(rows, more, first_more, p1, width, TWO) + column, mask=column < w1, other=0)
        r2 = tl.load(_row(rows, more, first_more, p2, width, TWO) + column, mask=column < w2, other=0)
        r3 = tl.load(_row(rows, more, first_more, p3, width, TWO) + column, mask=column < w3, other=0)
        total += r0.to(tl.float32)
        total += r1.to(tl.float32)
        total += r2.to(tl.float32)
        total += r3.to(tl.float32)
    tl.store(out + segment * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _zero_empty(out, ends, size, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write zeros to the experts of out [S, ...] that have no pairs."""
    expert = tl.program_id(0).to(tl.int64)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if tl.load(ends + expert) == begin:
        for start in range(tl.program_id(1) * COLUMNS, size, PROGRAMS * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            zeros = tl.zeros([COLUMNS], out.dtype.element_ty)
            tl.store(out + expert * size + column, zeros, mask=column < size)


def swiglu(gate_up: torch.Tensor, weight: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """See reference.swiglu."""
    pairs, width = len(gate_up), gate_up.shape[1] // 2
    h = gate_up.new_empty(pairs, width)
    columns = _columns(width)
    rows = _TILE // columns
    if pairs:
        grid = (triton.cdiv(pairs, rows), triton.cdiv(width, columns))
        _swiglu[grid](gate_up, weight, pair, h, pairs, width, ROWS=rows, COLUMNS=columns, enable_fp_fusion=True)
    return h


def swiglu_backward(
    gate_up: torch.Tensor, weight: torch.Tensor, pair: torch.Tensor, dh: torch.Tensor, d_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.swiglu_backward."""
    pairs, width = dh.shape
    d_gate_up, h = torch.empty_like(gate_up), torch.empty_like(dh)
    columns = _columns(width)
    rows = _TILE // columns
    if pairs:
        _swiglu_backward[(triton.cdiv(pairs, rows),)](
            gate_up,
            weight,
            pair,
            dh,
            d_gate_up,
            h,
            d_weight,
            pairs,
            width,
            ROWS=rows,
            COLUMNS=columns,
            enable_fp_fusion=True,
        )
    return d_gate_up, h


def segment_sum(parts: Sequence[torch.Tensor], start: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """See reference.segment_sum."""
    first, *more = parts
    segments, width = len(start) - 1, first.shape[1]
    out = first.new_empty(segments, width)
    columns = _columns(width)
    if segments:
        _segment_sum[(segments, triton.cdiv(width, columns))](
            first, more[0] if more else first, len(first), start, member, out, width,
            TWO=bool(more), COLUMNS=columns, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def zero_empty(out: torch.Tensor, ends: torch.Tensor) -> None:
    """See reference.zero_empty."""
    if len(out):
        _zero_empty[(len(out), _ZEROERS)](
            out, ends, out[0].numel(), PROGRAMS=_ZEROERS, COLUMNS=_COLUMNS, enable_fp_fusion=True
        )


def _columns(width: int) -> Any:
    """Columns of a program: a power of two that leaves few lanes idle at the end of a row, the largest of the best."""
    choices = [_COLUMNS >> i for i in range(_COLUMNS.bit_length()) if _COLUMNS >> i >= _FEWEST]
    return min(choices, key=lambda c: (triton.cdiv(width, c) * c, -c))
